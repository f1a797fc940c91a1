// append_kv4: T new tokens a sequence into the window of a cache in mixed precision (pyquant/formats/kv4.py), and the
// oldest 64 tokens of the window into the next page, where the window then holds keep + 64 or more. One launch.
//
//   k, v [B, T, Hkv, D]    any strides in steps of whole values
//   cos, sin [B or 1, T, D]   T or fp32: keys are rotated as they come, k cos + (-k_high, k_low) sin; or null, they are
//   pages, window          written; segments int32 [B, 3] read, then brought up to date
//
// A block serves one KV head of one sequence. What it decides follows from the segments as they were before the call:
// blocks of a sequence count their arrivals after they have read them, and the last to arrive writes the new ones and
// sets the counter back to 0.
//
// **Packing.** A lane has of a page's piece exactly those 8 values of each of its 4 tiles whose codes its words hold,
// so codes need no exchange. It holds 4 columns of a piece (tokens are rows of K, channels rows of V^T; ranges go by
// columns of both): its own extremes, then three shuffles over the 8 lanes of the same columns. Ranges of V go over all
// pieces: they are left in shared memory before codes of V are made. One call in 64 packs: 64 D values read from the L2
// and divided, a microsecond or two.
//
// Divisions and roundings are those of IEEE, in the order of kv4.quantize_page: codes, scales and zeros are equal to
// its bit for bit.
#include "ops.h"
#include "pieces.cuh"
#include "programmatic.cuh"

namespace pyquant {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kPageTokens = 64, kTileTokens = 16;

struct Range {
    float scale, zero;
};

template <int BITS>
__device__ __forceinline__ Range make_range(float low, float high, float most) {
    constexpr float kSteps = (1 << BITS) - 1, kReach = BITS > 4 ? 1023 : 240, kGrid = BITS > 4 ? 1 : 4;
    const float size = fmaxf(fabsf(low), fabsf(high));
    const float wide = fmaxf(__fdiv_rn(__fsub_rn(high, low), kSteps), __fdiv_rn(size, kReach));
    const float scale = __half2float(__float2half_rn(fminf(fmaxf(wide, 0x1p-14f), most)));
    const float zero = __fadd_rn(rintf(__fdiv_rn(-kGrid * low, scale)) / kGrid, 0.0f);  // no negative 0
    return {scale, __half2float(__float2half_rn(zero))};
}

template <int BITS>
__device__ __forceinline__ uint32_t code_of(float value, const Range& range) {
    const float at = rintf(__fadd_rn(__fdiv_rn(value, range.scale), range.zero));
    return static_cast<uint32_t>(fminf(fmaxf(at, 0.0f), static_cast<float>((1 << BITS) - 1)));
}

// Extremes of a lane's four columns 2t, 2t + 1, 2t + 8, 2t + 9.
template <typename T, int BITS>
struct Extremes {
    float low[4], high[4];
    __device__ Extremes() {
#pragma unroll
        for (int e = 0; e < 4; ++e) low[e] = INFINITY, high[e] = -INFINITY;
    }
    __device__ __forceinline__ void take(const uint4& piece) {
        const uint32_t registers[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const float value[2] = {Magic<T>::low(registers[r]), Magic<T>::high(registers[r])};
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int e = r / 2 * 2 + h;
                low[e] = fminf(low[e], value[h]);
                high[e] = fmaxf(high[e], value[h]);
            }
        }
    }
    __device__ __forceinline__ void ranges(Range (&found)[4], float most) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
#pragma unroll
            for (int other = 4; other < 32; other *= 2) {
                low[e] = fminf(low[e], __shfl_xor_sync(0xffffffff, low[e], other));
                high[e] = fmaxf(high[e], __shfl_xor_sync(0xffffffff, high[e], other));
            }
            found[e] = make_range<BITS>(low[e], high[e], most);
        }
    }
};

// Codes of the 8 values that a lane has of a tile, a byte each: half h of register r in byte r % 2 * 2 + h of word r
// / 2.
template <typename T, int BITS>
__device__ __forceinline__ void codes_of(uint32_t (&codes)[2], const uint4& piece, const Range (&ranges)[4]) {
    const uint32_t registers[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const uint32_t low = code_of<BITS>(Magic<T>::low(registers[r]), ranges[r / 2 * 2]);
        const uint32_t high = code_of<BITS>(Magic<T>::high(registers[r]), ranges[r / 2 * 2 + 1]);
        const uint32_t both = low | high << 8;
        codes[r / 2] = r % 2 ? codes[r / 2] | both << 16 : both;
    }
}

// WIDTH bits of each code from bit LOWEST on, of the blocks [FIRST, FIRST + SPAN) of 16 tokens, as a word of a plane.
template <int WIDTH, int LOWEST, int FIRST, int SPAN>
__device__ __forceinline__ uint32_t word_of(const uint32_t (&codes)[4][2]) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < SPAN; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int near = WIDTH * (r / 2 ? 0 : 1);  // registers 0 and 1 lie higher
            int at = near + 8 * (r % 2);
            if (WIDTH == 2) at = near + 4 * (r % 2) + 8 * i;
            if (WIDTH == 1) at = 2 * near + 4 * (r % 2) + 8 * (i % 2) + i / 2;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const uint32_t code = codes[FIRST + i][r / 2] >> (16 * (r % 2) + 8 * h + LOWEST);
                word |= (code & ((1u << WIDTH) - 1)) << (at + 16 * h);
            }
        }
    }
    constexpr int kTurn = WIDTH == 4 ? 2 : WIDTH == 2 ? 5 : 7;
    return __funnelshift_l(word, word, kTurn);
}

// The words of a lane for 16 x 64 values: piece j, where pieces lie GROUP at a time.
template <int BITS, int D>
__device__ __forceinline__ void store_words(unsigned char* page, const uint32_t (&codes)[4][2], int j, int lane) {
    constexpr int kGroup = BITS == 8 ? 2 : 4;
    const int first = j / kGroup * kGroup, count = min(kGroup, D / 16 - first);
    const int at = first * 32 + lane * count + j - first;
    auto* const words = reinterpret_cast<uint32_t*>(page);
    if constexpr (BITS == 8) {
#pragma unroll
        for (int b = 0; b < 4; ++b) {
            *reinterpret_cast<uint2*>(words + 2 * (2 * D * b + at)) = make_uint2(codes[b][0], codes[b][1]);
        }
    } else if constexpr (BITS == 4) {
        words[at] = word_of<4, 0, 0, 1>(codes);
        words[2 * D + at] = word_of<4, 0, 1, 1>(codes);
        words[4 * D + at] = word_of<4, 0, 2, 1>(codes);
        words[6 * D + at] = word_of<4, 0, 3, 1>(codes);
    } else {
        words[at] = word_of<2, 0, 0, 2>(codes);
        words[2 * D + at] = word_of<2, 0, 2, 2>(codes);
        if constexpr (BITS == 3) words[4 * D + at] = word_of<1, 2, 0, 4>(codes);
    }
}

// Four ring tiles from `first` on become a page. All threads call it; `v_ranges` is shared memory.
template <typename T, int D, int BITS>
__device__ void pack_page(const T* ring, int first, int ring_tiles, unsigned char* page,
                          Range (&v_ranges)[kPageTokens]) {
    constexpr int kPieces = D / 16, kCodeBytes = 8 * BITS * D;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const auto tile = [&](int block) {
        return reinterpret_cast<const uint4*>(ring + static_cast<int64_t>((first + block) % ring_tiles) * (32 * D)) +
               lane;
    };
    unsigned char* const values = page + kCodeBytes + 4 * D;
    for (int task = warp; task < kPieces + 4; task += kWarps) {
        Extremes<T, BITS> extremes;
        Range ranges[4];
        if (task < 4) {  // V, 16 tokens: their ranges
            const uint4* const v = tile(task) + 2 * D;
            for (int j = 0; j < kPieces; ++j) extremes.take(v[32 * j]);
            extremes.ranges(ranges, 255.0f);
            if (g == 0) {
                auto* const numbers = reinterpret_cast<__half*>(values + kCodeBytes);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int token = 16 * task + 2 * t + e % 2 + e / 2 * 8;
                    numbers[token] = __float2half_rn(ranges[e].scale);
                    numbers[kPageTokens + token] = __float2half_rn(ranges[e].zero);
                    v_ranges[token] = ranges[e];
                }
            }
        } else {  // K, 16 channels
            const int j = task - 4;
            uint4 k[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                k[i] = tile(i)[32 * j];
                extremes.take(k[i]);
            }
            extremes.ranges(ranges, 65504.0f);
            uint32_t codes[4][2];
#pragma unroll
            for (int i = 0; i < 4; ++i) codes_of<T, BITS>(codes[i], k[i], ranges);
            store_words<BITS, D>(page, codes, j, lane);
            if (g == 0) {
                auto* const numbers = reinterpret_cast<__half*>(page + kCodeBytes) + 16 * j + 4 * t;
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    numbers[e] = __float2half_rn(ranges[e].scale);
                    numbers[D + e] = __float2half_rn(ranges[e].zero);
                }
            }
        }
    }
    __syncthreads();
    for (int j = warp; j < kPieces; j += kWarps) {  // V, 16 channels
        uint32_t codes[4][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            Range ranges[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) ranges[e] = v_ranges[16 * i + 2 * t + e % 2 + e / 2 * 8];
            codes_of<T, BITS>(codes[i], tile(i)[2 * D + 32 * j], ranges);
        }
        store_words<BITS, D>(values, codes, j, lane);
    }
}

// cos or sin of a channel, in T or fp32.
template <typename T>
__device__ __forceinline__ float angle(const void* table, bool wide, int64_t at) {
    return wide ? __ldcg(static_cast<const float*>(table) + at) : ptx::load_one(static_cast<const T*>(table) + at);
}

template <typename T, int D, int BITS>
__global__ void __launch_bounds__(kThreads) append_kernel(Kv4Append a) {
    ptx::launch_dependents();
    ptx::wait_for_predecessor();
    __shared__ int segments[3];
    __shared__ Range v_ranges[kPageTokens];
    const int64_t head = blockIdx.x, batch = blockIdx.y;
    int* const own = a.segments + 3 * batch;
    if (threadIdx.x < 3) segments[threadIdx.x] = ptx::load_int(own + threadIdx.x);
    __syncthreads();
    const int prompt = segments[0], pages = segments[1], length = segments[2], tokens = static_cast<int>(a.tokens);
    const int ring_tiles = static_cast<int>(a.ring_tiles), ring_tokens = kTileTokens * ring_tiles;
    T* const ring = static_cast<T*>(a.window) + (batch * a.kv_heads + head) * ring_tiles * (32 * D);
    const T* const k = static_cast<const T*>(a.k) + batch * a.k_strides[0] + head * a.k_strides[2];
    const T* const v = static_cast<const T*>(a.v) + batch * a.v_strides[0] + head * a.v_strides[2];
    for (int i = threadIdx.x; i < tokens * D; i += kThreads) {
        const int token = i / D, c = i % D;
        const int slot = (length - prompt + token) % ring_tokens, r = slot % kTileTokens;
        T* const tile = ring + static_cast<int64_t>(slot / kTileTokens) * (32 * D);
        const int piece = c / 16 * 32, down = c % 16 / 8, below = r / 8;
        T key = k[token * a.k_strides[1] + c * a.k_strides[3]];
        if (a.cos) {  // products and sum each rounded to fp32, as in plain torch
            const int64_t at = batch * a.rope_batch_stride + static_cast<int64_t>(token) * D + c;
            const float across =
                to_float(k[token * a.k_strides[1] + (c < D / 2 ? c + D / 2 : c - D / 2) * a.k_strides[3]]);
            const float turned = __fmul_rn(c < D / 2 ? -across : across, angle<T>(a.sin, a.rope_wide, at));
            key = from_float<T>(__fadd_rn(__fmul_rn(to_float(key), angle<T>(a.cos, a.rope_wide, at)), turned));
        }
        tile[((piece + 4 * (r % 8) + c % 8 / 2) * 4 + below + 2 * down) * 2 + c % 2] = key;
        tile[16 * D + ((piece + 4 * (c % 8) + r % 8 / 2) * 4 + down + 2 * below) * 2 + r % 2] =
            v[token * a.v_strides[1] + c * a.v_strides[3]];
    }
    __syncthreads();
    const bool pack = a.keep >= 0 && length + tokens - prompt - kPageTokens * pages >= a.keep + kPageTokens &&
                      pages < a.page_capacity;
    if (pack) {
        unsigned char* const page =
            static_cast<unsigned char*>(a.pages) +
            ((batch * a.kv_heads + head) * a.page_capacity + pages) * static_cast<int64_t>(16 * BITS * D + 4 * D + 256);
        pack_page<T, D, BITS>(ring, kPageTokens / kTileTokens * pages % ring_tiles, ring_tiles, page, v_ranges);
    }
    if (threadIdx.x == 0) {
        auto* const counter = static_cast<unsigned*>(a.workspace) + batch;
        if (ptx::count_arrival(counter) == static_cast<unsigned>(a.kv_heads - 1)) {
            *counter = 0;
            own[1] = pages + (pack ? 1 : 0);
            own[2] = length + tokens;
        }
    }
}

}  // namespace

void append_kv4(const Kv4Append& a, cudaStream_t stream) {
    if (a.batch == 0 || a.tokens == 0 || a.kv_heads == 0) return;
    require(a.dtype == 0 || a.dtype == 1, "append_kv4: k must be bf16 or fp16");
    require(a.tokens <= kPageTokens, "append_kv4: at most 64 tokens at once");
    require(a.batch <= kKv4AppendBatch,
            "append_kv4: at most " + std::to_string(kKv4AppendBatch) + " sequences, not " + std::to_string(a.batch));
    const int major = current_device().major;
    const auto run = [&](auto type, auto size, auto bits) {
        constexpr auto kernel = append_kernel<decltype(type), decltype(size)::value, decltype(bits)::value>;
        const dim3 grid(static_cast<unsigned>(a.kv_heads), static_cast<unsigned>(a.batch));
        launch_programmatic("append_kv4", kernel, grid, kThreads, 0, 1, major, stream, a);
    };
    const auto with_bits = [&](auto type, auto size) {
        switch (a.bits) {
            case 2:
                return run(type, size, std::integral_constant<int, 2>{});
            case 3:
                return run(type, size, std::integral_constant<int, 3>{});
            case 4:
                return run(type, size, std::integral_constant<int, 4>{});
            case 8:
                return run(type, size, std::integral_constant<int, 8>{});
            default:
                throw std::invalid_argument("append_kv4: pages of " + std::to_string(a.bits) +
                                            " bits; there are those of 2, 3, 4 and 8");
        }
    };
    const auto with_type = [&](auto size) {
        a.dtype == 0 ? with_bits(__nv_bfloat16{}, size) : with_bits(__half{}, size);
    };
    with_head_size(a.head_size, "append_kv4", with_type);
}

}  // namespace pyquant
