// Codes of a page (pyquant/formats/kv4.py) as A fragments of mma.m16n8k16, for each width in bits.
//
//   bits   numbers in fp16       in registers 0, 1   and 2, 3       of 8 codes, one after the other
//   8      1024 + code                                              4 byte permutations
//   4      1 + code / u          u = 16              256            1 turn, 4 LOP3
//   3      1 + code / u          u = 8               32             4 turns, 8 LOP3
//   2      1 + code / u          u = 8               32             2 turns, 4 LOP3
#pragma once

#include "pieces.cuh"

namespace pyquant {
namespace {

__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    const __half2 r =
        __hfma2(reinterpret_cast<__half2&>(a), reinterpret_cast<__half2&>(b), reinterpret_cast<__half2&>(c));
    return reinterpret_cast<const uint32_t&>(r);
}
__device__ __forceinline__ uint32_t mul2(uint32_t a, uint32_t b) {
    const __half2 r = __hmul2(reinterpret_cast<__half2&>(a), reinterpret_cast<__half2&>(b));
    return reinterpret_cast<const uint32_t&>(r);
}
__device__ __forceinline__ uint32_t both(float v) {
    const __half2 r = __float2half2_rn(v);
    return reinterpret_cast<const uint32_t&>(r);
}

// A power of 2.
struct Power {
    float value, log2;
    __device__ constexpr explicit Power(float v) : value(v), log2(0.0f) {
        for (; v > 1.0f; v /= 2.0f) log2 += 1.0f;
        for (; v < 1.0f; v *= 2.0f) log2 -= 1.0f;
    }
};

// N words of each lane, as they lie: [32 lanes][N].
template <int N>
__device__ __forceinline__ void load_words(uint32_t (&w)[4], const unsigned char* from, int lane) {
    if constexpr (N == 4) {
        const uint4 v = reinterpret_cast<const uint4*>(from)[lane];
        w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    } else if constexpr (N == 2) {
        const uint2 v = reinterpret_cast<const uint2*>(from)[lane];
        w[0] = v.x, w[1] = v.y;
    } else {
        w[0] = reinterpret_cast<const uint32_t*>(from)[lane];
    }
}

__device__ __forceinline__ uint32_t turned_right(uint32_t word, int by) { return __funnelshift_r(word, word, by); }

// Constants that stay in registers: LOP3 takes one immediate only.
template <int NEAR, int FAR>
struct Masks {
    uint32_t near, far, one;
    __device__ Masks() : near(NEAR * 0x10001), far(FAR * 0x10001), one(0x3C003C00) {
        asm volatile("" : "+r"(near), "+r"(far), "+r"(one));
    }
};

// A code is number * kNearBy - kNear in registers 0 and 1 of a fragment, number * kFarBy - kFar in the others. kGain is
// what scores are multiplied by in the end: it keeps queries times K's scales in the middle of fp16. kPGain is what
// weights are multiplied by, so that kFarBy times that, times V's scales, ends where fp16 ends. Words<COUNT> are
// those of a lane for COUNT pieces from FIRST on, of kSpan blocks of 16 tokens; pieces lie kGroup at a time.
template <int BITS>
struct Codes;

template <>
struct Codes<8> {
    static constexpr int kGroup = 2, kSpan = 1;
    static constexpr float kNearBy = 1, kFarBy = 1, kNear = 1024, kFar = 1024, kGain = 1.0f / 16, kPGain = 256 / kFarBy;
    template <int COUNT>
    struct Words {
        uint32_t w[4];
    };
    template <int D, int FIRST, int COUNT>
    __device__ __forceinline__ static void load(Words<COUNT>& to, const unsigned char* codes, int block, int lane) {
        load_words<2 * COUNT>(to.w, codes + block * 16 * D + FIRST * 256, lane);
    }
    template <int COUNT>
    __device__ __forceinline__ void expand(uint32_t (&a)[4], const Words<COUNT>& words, int piece, int) const {
#pragma unroll
        for (int r = 0; r < 4; ++r) a[r] = __byte_perm(words.w[2 * piece + r / 2], 0x64646464, r % 2 ? 0x4342 : 0x4140);
    }
};

template <>
struct Codes<4> : Masks<0x03C0, 0x003C> {
    static constexpr int kGroup = 4, kSpan = 1;
    static constexpr float kNearBy = 16, kFarBy = 256, kNear = 16, kFar = 256, kGain = 16, kPGain = 256 / kFarBy;
    template <int COUNT>
    struct Words {
        uint32_t w[4];
    };
    template <int D, int FIRST, int COUNT>
    __device__ __forceinline__ static void load(Words<COUNT>& to, const unsigned char* codes, int block, int lane) {
        load_words<COUNT>(to.w, codes + block * 8 * D + FIRST * 128, lane);
    }
    template <int COUNT>
    __device__ __forceinline__ void expand(uint32_t (&a)[4], const Words<COUNT>& words, int piece, int) const {
        const uint32_t word = words.w[piece], turned = turned_right(word, 8);
        a[0] = ptx::and_or(word, near, one);
        a[1] = ptx::and_or(turned, near, one);
        a[2] = ptx::and_or(word, far, one);
        a[3] = ptx::and_or(turned, far, one);
    }
};

template <>
struct Codes<2> : Masks<0x0180, 0x0060> {
    static constexpr int kGroup = 4, kSpan = 2;
    static constexpr float kNearBy = 8, kFarBy = 32, kNear = 8, kFar = 32, kGain = 8, kPGain = 256 / kFarBy;
    template <int COUNT>
    struct Words {
        uint32_t w[4];
    };
    template <int D, int FIRST, int COUNT>
    __device__ __forceinline__ static void load(Words<COUNT>& to, const unsigned char* codes, int block, int lane) {
        load_words<COUNT>(to.w, codes + block / 2 * 8 * D + FIRST * 128, lane);
    }
    template <int COUNT>
    __device__ __forceinline__ void expand(uint32_t (&a)[4], const Words<COUNT>& words, int piece, int block) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t word = turned_right(words.w[piece], 8 * (block % 2) + 4 * r);
            a[r] = ptx::and_or(word, near, one);
            a[r + 2] = ptx::and_or(word, far, one);
        }
    }
};

// The plane of the two lower bits, which is a page of 2 bits, then that of the highest.
template <>
struct Codes<3> : Codes<2> {
    static constexpr int kSpan = 4;
    Masks<0x0200, 0x0080> highest;
    template <int COUNT>
    struct Words {
        Codes<2>::Words<COUNT> low[2];
        uint32_t high[4];
    };
    template <int D, int FIRST, int COUNT>
    __device__ __forceinline__ static void load(Words<COUNT>& to, const unsigned char* codes, int, int lane) {
        Codes<2>::load<D, FIRST>(to.low[0], codes, 0, lane);
        Codes<2>::load<D, FIRST>(to.low[1], codes, 2, lane);
        load_words<COUNT>(to.high, codes + 16 * D + FIRST * 128, lane);
    }
    template <int COUNT>
    __device__ __forceinline__ void expand(uint32_t (&a)[4], const Words<COUNT>& words, int piece, int block) const {
        Codes<2>::expand(a, words.low[block / 2], piece, block);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t word = turned_right(words.high[piece], 8 * (block % 2) + 4 * r + block / 2);
            a[r] = ptx::and_or(word, highest.near, a[r]);
            a[r + 2] = ptx::and_or(word, highest.far, a[r + 2]);
        }
    }
};

}  // namespace
}  // namespace pyquant
