// wgmma with A in registers: d [64, N] += a [64, 16] * b [16, N] for one warpgroup, b in shared memory, K-major with
// the 128-byte swizzle. One specialisation per N, because the operand list is part of the instruction's text. A thread
// holds the fragments of mma.m16n8k16: d[4 j .. 4 j + 3] is tile j of 8 columns.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace pyquant::ptx {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // sm_90a alone knows these instructions

#define PYQUANT_D4(i)  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PYQUANT_D16(i) PYQUANT_D4(i), PYQUANT_D4(i + 4), PYQUANT_D4(i + 8), PYQUANT_D4(i + 12)
#define PYQUANT_D64(i) PYQUANT_D16(i), PYQUANT_D16(i + 16), PYQUANT_D16(i + 32), PYQUANT_D16(i + 48)

// accumulate = 0 starts from zero.
#define PYQUANT_WGMMA_16(TYPES)                             \
    asm volatile(                                           \
        "{ .reg .pred p; setp.ne.b32 p, %13, 0;\n"          \
        "wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPES \
        " {"                                                \
        "%0,%1,%2,%3,%4,%5,%6,%7}, "                        \
        "{%8,%9,%10,%11}, %12, p, 1, 1, 0; }\n"             \
        : PYQUANT_D4(0), PYQUANT_D4(4)                      \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

#define PYQUANT_WGMMA_32(TYPES)                                    \
    asm volatile(                                                  \
        "{ .reg .pred p; setp.ne.b32 p, %21, 0;\n"                 \
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPES        \
        " {"                                                       \
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, " \
        "{%16,%17,%18,%19}, %20, p, 1, 1, 0; }\n"                  \
        : PYQUANT_D16(0)                                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

#define PYQUANT_WGMMA_64(TYPES)                                              \
    asm volatile(                                                            \
        "{ .reg .pred p; setp.ne.b32 p, %37, 0;\n"                           \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES                  \
        " {"                                                                 \
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"             \
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, " \
        "{%32,%33,%34,%35}, %36, p, 1, 1, 0; }\n"                            \
        : PYQUANT_D16(0), PYQUANT_D16(16)                                    \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

#define PYQUANT_WGMMA_128(TYPES)                                             \
    asm volatile(                                                            \
        "{ .reg .pred p; setp.ne.b32 p, %69, 0;\n"                           \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPES                 \
        " {"                                                                 \
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"             \
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"   \
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"   \
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, " \
        "{%64,%65,%66,%67}, %68, p, 1, 1, 0; }\n"                            \
        : PYQUANT_D64(0)                                                     \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

#define PYQUANT_WGMMA_256(TYPES)                                                             \
    asm volatile(                                                                            \
        "{ .reg .pred p; setp.ne.b32 p, %133, 0;\n"                                          \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPES                                 \
        " {"                                                                                 \
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                             \
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"                   \
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"                   \
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"                   \
        "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"                   \
        "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"                   \
        "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"       \
        "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, " \
        "{%128,%129,%130,%131}, %132, p, 1, 1, 0; }\n"                                       \
        : PYQUANT_D64(0), PYQUANT_D64(64)                                                    \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

__device__ __forceinline__ void wgmma(float (&d)[8], const uint32_t (&a)[4], uint64_t b, int accumulate,
                                      __nv_bfloat16) {
    PYQUANT_WGMMA_16("bf16.bf16");
}
__device__ __forceinline__ void wgmma(float (&d)[8], const uint32_t (&a)[4], uint64_t b, int accumulate, __half) {
    PYQUANT_WGMMA_16("f16.f16");
}
__device__ __forceinline__ void wgmma(float (&d)[16], const uint32_t (&a)[4], uint64_t b, int accumulate,
                                      __nv_bfloat16) {
    PYQUANT_WGMMA_32("bf16.bf16");
}
__device__ __forceinline__ void wgmma(float (&d)[16], const uint32_t (&a)[4], uint64_t b, int accumulate, __half) {
    PYQUANT_WGMMA_32("f16.f16");
}
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate,
                                      __nv_bfloat16) {
    PYQUANT_WGMMA_64("bf16.bf16");
}
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate, __half) {
    PYQUANT_WGMMA_64("f16.f16");
}
__device__ __forceinline__ void wgmma(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int accumulate,
                                      __nv_bfloat16) {
    PYQUANT_WGMMA_128("bf16.bf16");
}
__device__ __forceinline__ void wgmma(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int accumulate, __half) {
    PYQUANT_WGMMA_128("f16.f16");
}
__device__ __forceinline__ void wgmma(float (&d)[128], const uint32_t (&a)[4], uint64_t b, int accumulate,
                                      __nv_bfloat16) {
    PYQUANT_WGMMA_256("bf16.bf16");
}
__device__ __forceinline__ void wgmma(float (&d)[128], const uint32_t (&a)[4], uint64_t b, int accumulate, __half) {
    PYQUANT_WGMMA_256("f16.f16");
}

// Order this warpgroup's register accesses before its next wgmma; end a batch; wait until at most PENDING batches run.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Descriptor of a K-major tile with the 128-byte swizzle: rows of 128 bytes, 8 of them (1,024 bytes) a swizzle atom,
// atoms one after another. 16 columns further is 32 bytes further.
__device__ __forceinline__ uint64_t wgmma_tile(const void* shared) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    return static_cast<uint64_t>(1) << 62 | static_cast<uint64_t>(1024 >> 4) << 32 | static_cast<uint64_t>(1) << 16 |
           (address >> 4 & 0x3fff);
}

#endif

}  // namespace pyquant::ptx
