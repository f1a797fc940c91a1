// wgmma with 8-bit operands, A in registers: d [64, N] (+)= a [64, 32] * b [32, N] for one warpgroup, b in shared
// memory, K-major with the 128-byte swizzle (wgmma.cuh). A thread holds the fragments of mma.m16n8k32: d[4 j .. 4 j +
// 3] is tile j of 8 columns. Signed integers with int32 sums, or e4m3 with fp32 sums.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace pyquant::ptx {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // sm_90a alone knows these instructions

#define PYQUANT_R4(F, i)  F(d[i]), F(d[i + 1]), F(d[i + 2]), F(d[i + 3])
#define PYQUANT_R16(F, i) PYQUANT_R4(F, i), PYQUANT_R4(F, i + 4), PYQUANT_R4(F, i + 8), PYQUANT_R4(F, i + 12)
#define PYQUANT_INT(v)    "+r"(v)
#define PYQUANT_FLOAT(v)  "+f"(v)

// accumulate = 0 starts from zero.
#define PYQUANT_WGMMA8_16(TYPES, F, END)                \
    asm volatile(                                       \
        "{ .reg .pred p; setp.ne.b32 p, %13, 0;\n"      \
        "wgmma.mma_async.sync.aligned.m64n16k32." TYPES \
        " {"                                            \
        "%0,%1,%2,%3,%4,%5,%6,%7}, "                    \
        "{%8,%9,%10,%11}, %12, p" END "; }\n"           \
        : PYQUANT_R4(F, 0), PYQUANT_R4(F, 4)            \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

#define PYQUANT_WGMMA8_32(TYPES, F, END)                           \
    asm volatile(                                                  \
        "{ .reg .pred p; setp.ne.b32 p, %21, 0;\n"                 \
        "wgmma.mma_async.sync.aligned.m64n32k32." TYPES            \
        " {"                                                       \
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, " \
        "{%16,%17,%18,%19}, %20, p" END "; }\n"                    \
        : PYQUANT_R16(F, 0)                                        \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

#define PYQUANT_WGMMA8_64(TYPES, F, END)                                     \
    asm volatile(                                                            \
        "{ .reg .pred p; setp.ne.b32 p, %37, 0;\n"                           \
        "wgmma.mma_async.sync.aligned.m64n64k32." TYPES                      \
        " {"                                                                 \
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"             \
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, " \
        "{%32,%33,%34,%35}, %36, p" END "; }\n"                              \
        : PYQUANT_R16(F, 0), PYQUANT_R16(F, 16)                              \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

#define PYQUANT_WGMMA8_128(TYPES, F, END)                                               \
    asm volatile(                                                                       \
        "{ .reg .pred p; setp.ne.b32 p, %69, 0;\n"                                      \
        "wgmma.mma_async.sync.aligned.m64n128k32." TYPES                                \
        " {"                                                                            \
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                        \
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"              \
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"              \
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "            \
        "{%64,%65,%66,%67}, %68, p" END "; }\n"                                         \
        : PYQUANT_R16(F, 0), PYQUANT_R16(F, 16), PYQUANT_R16(F, 32), PYQUANT_R16(F, 48) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

__device__ __forceinline__ void wgmma8(int (&d)[8], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    PYQUANT_WGMMA8_16("s32.s8.s8", PYQUANT_INT, "");
}
__device__ __forceinline__ void wgmma8(float (&d)[8], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    PYQUANT_WGMMA8_16("f32.e4m3.e4m3", PYQUANT_FLOAT, ", 1, 1");
}
__device__ __forceinline__ void wgmma8(int (&d)[16], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    PYQUANT_WGMMA8_32("s32.s8.s8", PYQUANT_INT, "");
}
__device__ __forceinline__ void wgmma8(float (&d)[16], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    PYQUANT_WGMMA8_32("f32.e4m3.e4m3", PYQUANT_FLOAT, ", 1, 1");
}
__device__ __forceinline__ void wgmma8(int (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    PYQUANT_WGMMA8_64("s32.s8.s8", PYQUANT_INT, "");
}
__device__ __forceinline__ void wgmma8(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    PYQUANT_WGMMA8_64("f32.e4m3.e4m3", PYQUANT_FLOAT, ", 1, 1");
}
__device__ __forceinline__ void wgmma8(int (&d)[64], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    PYQUANT_WGMMA8_128("s32.s8.s8", PYQUANT_INT, "");
}
__device__ __forceinline__ void wgmma8(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    PYQUANT_WGMMA8_128("f32.e4m3.e4m3", PYQUANT_FLOAT, ", 1, 1");
}
// Arrive at a barrier of `count` threads without waiting; the others call named_barrier.
__device__ __forceinline__ void named_arrive(int id, int count) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// After a wait: keeps the compiler from reading sums, or making operands, before it.
__device__ __forceinline__ void settle(int& v) { asm volatile("" : "+r"(v)::"memory"); }
__device__ __forceinline__ void settle(uint4& v) {
    asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)::"memory");
}
__device__ __forceinline__ void settle(uint32_t (&v)[4]) {
    asm volatile("" : "+r"(v[0]), "+r"(v[1]), "+r"(v[2]), "+r"(v[3])::"memory");
}
__device__ __forceinline__ void settle(float& v) { asm volatile("" : "+f"(v)::"memory"); }

#endif

}  // namespace pyquant::ptx
