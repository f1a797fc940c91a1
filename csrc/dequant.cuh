// From packed codes to floats, and small conversions shared by all kernels.
#pragma once

#include "format.cuh"
#include "ptx.cuh"

namespace pyquant {

template <typename T>
__device__ __forceinline__ float to_float(T v) {
    return static_cast<float>(v);
}
template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
    return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
    return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
    return __float2half_rn(v);
}

// A 16-bit float whose low mantissa bits take a code: kBits | code = base + code, exactly.
template <typename T>
struct Magic;
template <>
struct Magic<__nv_bfloat16> {
    static constexpr uint32_t kBits = 0x43004300;  // 128, twice: 7 mantissa bits, step 1 in [128, 256)
    static constexpr float kBase = 128.0f;
    // The two values of a pair, as floats.
    static __device__ __forceinline__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
    static __device__ __forceinline__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000); }
};
template <>
struct Magic<__half> {
    static constexpr uint32_t kBits = 0x64006400;  // 1024, twice: 10 mantissa bits, step 1 in [1024, 2048)
    static constexpr float kBase = 1024.0f;
    static __device__ __forceinline__ float low(uint32_t pair) {
        return __low2float(reinterpret_cast<const __half2&>(pair));
    }
    static __device__ __forceinline__ float high(uint32_t pair) {
        return __high2float(reinterpret_cast<const __half2&>(pair));
    }
};

__device__ __forceinline__ uint32_t subtract2(uint32_t a, uint32_t b, __nv_bfloat16) {
    __nv_bfloat162 r = __hsub2(reinterpret_cast<__nv_bfloat162&>(a), reinterpret_cast<__nv_bfloat162&>(b));
    return reinterpret_cast<uint32_t&>(r);
}
__device__ __forceinline__ uint32_t subtract2(uint32_t a, uint32_t b, __half) {
    __half2 r = __hsub2(reinterpret_cast<__half2&>(a), reinterpret_cast<__half2&>(b));
    return reinterpret_cast<uint32_t&>(r);
}

// Pairwise products.
__device__ __forceinline__ uint32_t multiply2(uint32_t a, uint32_t b, __nv_bfloat16) {
    __nv_bfloat162 r = __hmul2(reinterpret_cast<__nv_bfloat162&>(a), reinterpret_cast<__nv_bfloat162&>(b));
    return reinterpret_cast<uint32_t&>(r);
}
__device__ __forceinline__ uint32_t multiply2(uint32_t a, uint32_t b, __half) {
    __half2 r = __hmul2(reinterpret_cast<__half2&>(a), reinterpret_cast<__half2&>(b));
    return reinterpret_cast<uint32_t&>(r);
}
// Both halves times one factor.
__device__ __forceinline__ uint32_t multiply2(uint32_t a, __nv_bfloat16 factor) {
    __nv_bfloat162 r = __hmul2(reinterpret_cast<__nv_bfloat162&>(a), __bfloat162bfloat162(factor));
    return reinterpret_cast<uint32_t&>(r);
}
__device__ __forceinline__ uint32_t multiply2(uint32_t a, __half factor) {
    __half2 r = __hmul2(reinterpret_cast<__half2&>(a), __half2half2(factor));
    return reinterpret_cast<uint32_t&>(r);
}

// base + zero in both halves: what subtract2 takes away.
template <typename T>
__device__ __forceinline__ uint32_t offset2(int zero) {
    const T v = from_float<T>(Magic<T>::kBase + zero);
    const uint32_t bits = reinterpret_cast<const uint16_t&>(v);
    return bits | bits << 16;
}

// One word of the tiled order to the A fragment of m16n8k16, as the integers code - zero (at most 15: exact in 16
// bits). offset[h] = offset2(zero of row g + 8 h).
template <typename T>
__device__ __forceinline__ void word_to_fragment(uint32_t (&a)[4], uint32_t word, const uint32_t (&offset)[2]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        a[j] = subtract2(ptx::and_or(word >> (4 * j), 0x000f000f, Magic<T>::kBits), offset[j % 2], T{});
    }
}

}  // namespace pyquant
