// Eight neighbouring 16-bit values (16 bytes) at a time, and reads of what the kernel before has just written.
#pragma once

#include "dequant.cuh"

namespace pyquant {

constexpr int kPiece = 8;  // 16-bit values of one 16-byte access

__device__ __forceinline__ uint32_t pack2(float low, float high, __nv_bfloat16) {
    __nv_bfloat162 r = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<uint32_t&>(r);
}
__device__ __forceinline__ uint32_t pack2(float low, float high, __half) {
    __half2 r = __floats2half2_rn(low, high);
    return reinterpret_cast<uint32_t&>(r);
}

template <typename T>
__device__ __forceinline__ void unpack8(float (&v)[kPiece], const uint4& piece) {
    const uint32_t two[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        v[2 * i] = Magic<T>::low(two[i]);
        v[2 * i + 1] = Magic<T>::high(two[i]);
    }
}

template <typename T>
__device__ __forceinline__ uint4 pack8(const float (&v)[kPiece]) {
    return make_uint4(pack2(v[0], v[1], T{}), pack2(v[2], v[3], T{}), pack2(v[4], v[5], T{}), pack2(v[6], v[7], T{}));
}

namespace ptx {

// Loads that pass L1 by and are never moved over wait_for_predecessor(): a kernel that started early may share its
// multiprocessor, and so its L1, with kernels that read the old contents.
__device__ __forceinline__ uint4 load16(const void* from) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}
__device__ __forceinline__ int load_int(const int* from) {
    int v;
    asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}
__device__ __forceinline__ uint16_t load_bits(const void* from) {
    uint16_t bits;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(bits) : "l"(from) : "memory");
    return bits;
}
template <typename T>
__device__ __forceinline__ float load_one(const T* from) {  // T of 16 bits
    const uint16_t bits = load_bits(from);
    return to_float(reinterpret_cast<const T&>(bits));
}

// 16 bytes to shared memory in the background, or 16 zero bytes (then nothing is read).
__device__ __forceinline__ void copy_async_or_zero(void* shared, const void* global, bool wanted) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const int bytes = wanted ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}

// As ldmatrix_x4, each 8x8 matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// Transpose of an 8x8 matrix that lies over the warp as fragments do.
__device__ __forceinline__ uint32_t transpose8(uint32_t a) {
    uint32_t r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
    return r;
}

__device__ __forceinline__ float exp2_approx(float x) {  // -inf gives 0
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

}  // namespace ptx

// Sum over the LANES neighbours of a lane, a power of two; every lane of the warp takes part and gets the sum.
template <int LANES>
__device__ __forceinline__ float sum_lanes(float v) {
#pragma unroll
    for (int lane = LANES / 2; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffff, v, lane);
    return v;
}

}  // namespace pyquant
