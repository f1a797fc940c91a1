// linear_w4a8 on Hopper: y [M, N] = codes of x [M, K] times a 4-bit weight, both as 8-bit operands of wgmma,
//
//   y[m, n] = sum over pieces of K with one s_w and one s_a of  s_w[n] s_a[m] ( P[m, n] - zero[n] S[m] )   + bias[n]
//
//   P   int8: the exact integer sum of codes; e4m3: the tensor cores' fp32 sum. S: the sum of x's codes over the piece.
//
//               K ->
//   64 rows     strip 2i      warpgroup 0     weights are the A operand, in registers: two words of the tiled order are
//   of w each   strip 2i + 1  warpgroup 1     one k32 fragment, made with three instructions a word. Two warpgroups, or
//                                             three
//
//   BN tokens   codes of x, 128 columns a stage, 128-byte swizzle: the B operand, in shared memory
//
// How a word becomes bytes (csrc/act8.cuh has the order of x that makes this possible):
//   symmetric        (w << 4 & 0xf0f0f0f0) ^ 0x80808080 is 16 (code - 8) of row g, (w & 0xf0f0f0f0) ^ 0x80808080 of row
//                    g + 8: no zero is left, and s_w / 16 undoes the factor.
//   zeros            w & 0x0f0f0f0f and w >> 4 & 0x0f0f0f0f: the codes; S corrects by the zero.
//   e4m3             the same bytes: 0 .. 15 read as e4m3 are code * 2^-9 exactly (subnormal numbers and the first
//                    normal ones), so e4m3 needs no conversion; zeros, and the 8 of symmetric weights, through S.
//
// Sums become fp32 once in 128 columns (32 in groups smaller than that, the plain and slow way), as s_w changes: for
// m64 that is 1 conversion and 1 multiply-add a result, half of the time of its tensor instructions at two a cycle.
// Other warpgroups, of the block or of a second one, multiply meanwhile. Two warpgroups with the largest tile pass the
// tensor cores on by named barriers, so that they do not promote both at once; three, and smaller tiles, are faster
// left alone.
//
// Copies, programmatic launch, whole tiles or stream-K: as in linear_wgmma.cuh.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cmath>

#include "act8.cuh"
#include "ops.h"
#include "pieces.cuh"
#include "programmatic.cuh"
#include "stream_k.cuh"
#include "wgmma.cuh"
#include "wgmma8.cuh"

namespace pyquant {
namespace {

constexpr int kUnitBytes = kUnitWords * 4;
constexpr int kUnits = 2;                         // of a stage
constexpr int kStageK = kUnits * kUnitK;          // 128
constexpr int kStageBytes = kUnits * kUnitBytes;  // of a strip
constexpr int kTurn = 8;                          // the first of the barriers by which warpgroups take turns
constexpr int kOutPad = 8;                        // elements between tokens of a finished tile

// What a weight and tokens are: symmetric, one scale a token; symmetric, scales of groups of tokens, or of the weight
// below 128 columns; with zeros; e4m3 codes. The last two take sums of codes, and scales of groups of tokens where sums
// become fp32 every 32 columns.
enum class Kind { symmetric, grouped, zeros, e4m3 };
__host__ __device__ constexpr bool is_signed(Kind kind) { return kind == Kind::symmetric || kind == Kind::grouped; }

// 64 GROUPS rows of the weight, a warpgroup each, x BN tokens, CHUNK of them a wgmma. TURNS: at the tensor cores.
template <int GROUPS, int BN, int CHUNK = BN, bool TURNS = false>
struct Tile {
    static constexpr int kGroups = GROUPS, kTokens = BN, kChunk = CHUNK;
    static constexpr int kRows = GROUPS * kStrip;
    static constexpr int kComputeThreads = GROUPS * 128, kThreads = kComputeThreads + 128;  // and those that copy
    static constexpr int kBlocks = GROUPS == 2 && BN < 128 ? 2 : 1;                         // a multiprocessor
    static constexpr int kSharedMemory = kBlocks == 1 ? 227 << 10 : 113 << 10;
    static constexpr bool kTurns = TURNS;
    static constexpr int kOutTokens = BN < 32 ? BN : BN < 128 ? 32 : 64;  // tokens of a tile written at a time
    // Registers of a thread that computes, and of one that copies: together those that the block begins with.
    static constexpr bool kMoveRegisters = BN >= 32 || GROUPS > 2;
    static constexpr int kRegisters = kBlocks == 2 ? 96 : GROUPS == 2 ? 232 : 160;
    static constexpr int kCopyRegisters = kBlocks == 2 ? 48 : GROUPS == 2 ? 40 : 32;
    static constexpr int64_t kPartialBytes = int64_t{kRows} * BN * 4;
    static_assert((GROUPS == 2 || GROUPS == 3) && BN % CHUNK == 0);
};

// STEP: columns after which sums become fp32, 128 or 32.
template <typename T, Kind KIND, int STEP>
struct Shared {
    static constexpr int BN = T::kTokens, kGroups = T::kGroups;
    static constexpr int kSteps = kStageK / STEP;
    static constexpr bool kSums = !is_signed(KIND);
    static constexpr bool kAct = KIND == Kind::grouped || (kSums && STEP < kStageK);  // tokens with scales of groups
    static constexpr int kBytes = BN * kStageK + kGroups * (kStageBytes + kSteps * kStrip * 2) +
                                  (kSums ? kSteps * (kGroups * kStrip + BN * 4) : 0) + (kAct ? kSteps * BN * 4 : 0);
    static constexpr int kOutBytes = kGroups * T::kOutTokens * (kStrip + kOutPad) * 2;
    static constexpr int kFit = (T::kSharedMemory - kOutBytes - 1024) / kBytes;
    static constexpr int kStages = kFit < 8 ? kFit : 8;
    alignas(1024) unsigned char x[kStages][BN][kStageK];
    alignas(128) unsigned char weight[kStages][kGroups][kUnits][kUnitBytes];
    uint16_t scale[kStages][kGroups][kSteps][kStrip];
    alignas(16) uint8_t zero[kSums ? kStages : 1][kGroups][kSteps][kStrip];
    alignas(16) float sums[kSums ? kStages : 1][kSteps][kSums ? BN : 4];
    alignas(16) float act[kAct ? kStages : 1][kSteps][kAct ? BN : 4];
    alignas(16) uint16_t out[kGroups][T::kOutTokens][kStrip + kOutPad];
    uint64_t full[kStages], empty[kStages];
};

struct Problem : Tiles {
    int m, n, k, units, groups, strips;
    int group, act_group;  // columns; 0: one scale, held in registers or left to the end
    int act_groups, sum_groups, m4;
    bool half;  // scales, bias and y are fp16
    bool wide;  // y is fp32
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// (a & 0xf0f0f0f0) ^ 0x80808080 in one instruction (truth table 0x6A).
__device__ __forceinline__ uint32_t and_xor(uint32_t a) {
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(r) : "r"(a), "r"(0xf0f0f0f0), "r"(0x80808080));
    return r;
}

// Two words (32 columns) to the A fragment of m64k32.
template <Kind KIND>
__device__ __forceinline__ void to_fragment(uint32_t (&a)[4], uint32_t first, uint32_t second) {
    const uint32_t word[2] = {first, second};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if constexpr (is_signed(KIND)) {
            a[2 * i] = and_xor(word[i] << 4), a[2 * i + 1] = and_xor(word[i]);
        } else {
            a[2 * i] = word[i] & 0x0f0f0f0f, a[2 * i + 1] = word[i] >> 4 & 0x0f0f0f0f;
        }
    }
}

__device__ __forceinline__ float scale_bits(uint32_t bits, bool half) {  // of 16 bits
    return half ? __half2float(__ushort_as_half(static_cast<unsigned short>(bits))) : __uint_as_float(bits << 16);
}
#endif

template <typename T, Kind KIND, int STEP>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    w4a8_kernel(const __grid_constant__ CUtensorMap x_map, const float* __restrict__ act_scale,
                const float* __restrict__ sums, const unsigned char* __restrict__ qweight,
                const uint16_t* __restrict__ scale, const uint8_t* __restrict__ zero, const uint16_t* __restrict__ bias,
                void* __restrict__ y, unsigned char* __restrict__ workspace, const Problem p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // on other GPUs linear_w4a8.cu never launches it
    using S = Shared<T, KIND, STEP>;
    using Sum = std::conditional_t<KIND == Kind::e4m3, float, int>;
    constexpr int BN = T::kTokens, CHUNK = T::kChunk;
    constexpr int kGroups = T::kGroups, kComputeThreads = T::kComputeThreads;
    constexpr int kChunks = BN / CHUNK, kChunkSums = CHUNK / 2;
    constexpr bool kSums = S::kSums, kAct = S::kAct;
    extern __shared__ __align__(1024) unsigned char memory[];
    S& shared = *reinterpret_cast<S*>(memory);
    const int thread = threadIdx.x,
              group = __shfl_sync(0xffffffff, thread / 128, 0);  // so that the compiler sees it is uniform
    ptx::launch_dependents();
    if (thread == 0) {
        for (int i = 0; i < S::kStages; ++i) {
            ptx::barrier_init(&shared.full[i], kGroups + 1);
            ptx::barrier_init(&shared.empty[i], kComputeThreads / 32);
        }
        ptx::barrier_init_fence();
    }
    // What copies leave out: scales of columns past K, where x is 0, and s_a where the token has one scale.
    for (int i = thread; i < static_cast<int>(sizeof(shared.scale) / 2); i += T::kThreads)
        (&shared.scale[0][0][0][0])[i] = 0;
    if constexpr (kSums) {
        for (int i = thread; i < static_cast<int>(sizeof(shared.zero)); i += T::kThreads) {
            (&shared.zero[0][0][0][0])[i] = kSymmetricZero;
        }
        for (int i = thread; i < static_cast<int>(sizeof(shared.sums) / 4); i += T::kThreads)
            (&shared.sums[0][0][0])[i] = 0.0f;
    }
    if constexpr (kAct) {
        for (int i = thread; i < static_cast<int>(sizeof(shared.act) / 4); i += T::kThreads)
            (&shared.act[0][0][0])[i] = 1.0f;
    }
    ptx::fence_async();
    __syncthreads();

    if (group == kGroups) {  // ---- copies --------------------------------------------------------------------------
        if constexpr (T::kMoveRegisters) ptx::give_registers<T::kCopyRegisters>();
        const int role = thread / 32 - kComputeThreads / 32;
        Cursor<S::kStages> at;
        if (thread % 32 == 0 && role < kGroups) {  // weights and scales of one strip
            for (Work<false> work(p); work.more(); work.next(p)) {
                const int strip = tile_at(work.tile, p).x * kGroups + role;
                const bool there = strip < p.strips;
                const unsigned char* weight = qweight + (int64_t{strip} * p.units + work.begin * kUnits) * kUnitBytes;
#pragma unroll 1
                for (int step = work.begin; step < work.end; ++step) {
                    const int bytes = min(kUnits, p.units - step * kUnits) * kUnitBytes;
                    int first = step, values = p.group ? kStrip : 0;  // groups of 128, or smaller ones
                    if (STEP < kStageK && p.group) {
                        first = step * kStageK / p.group;
                        values = min(kStageK / p.group, p.groups - first) * kStrip;
                    }
                    const bool zeros = kSums && zero != nullptr;
                    const int64_t from = (int64_t{strip} * p.groups + first) * kStrip;
                    ptx::barrier_wait(&shared.empty[at.stage], at.parity ^ 1);
                    uint64_t* full = &shared.full[at.stage];
                    ptx::barrier_expect(full, there ? bytes + values * 2 + (zeros ? values : 0) : 0);
                    if (there) {
                        ptx::copy_bulk(shared.weight[at.stage][role], weight, bytes, full);
                        if (values) ptx::copy_bulk(shared.scale[at.stage][role], scale + from, values * 2, full);
                        if (values && zeros) ptx::copy_bulk(shared.zero[at.stage][role], zero + from, values, full);
                    }
                    weight += kStageBytes;
                    at.next();
                }
            }
        } else if (thread % 32 == 0 && role == kGroups) {  // x
            ptx::prefetch_map(&x_map);
            ptx::wait_for_predecessor();  // x may be another kernel's until here
            for (Work<false> work(p); work.more(); work.next(p)) {
                const int token = tile_at(work.tile, p).y * BN;
                const int row_bytes = min(BN, p.m4 - token) * 4;
#pragma unroll 1
                for (int step = work.begin; step < work.end; ++step) {
                    uint64_t* full = &shared.full[at.stage];
                    int sum_rows = 0, act_rows = 0, sum_first = 0, act_first = 0;
                    if constexpr (kSums) {
                        sum_first = step * S::kSteps;
                        sum_rows = min(S::kSteps, p.sum_groups - sum_first);
                    }
                    if (kAct && p.act_group) {
                        act_first = step, act_rows = 1;
                        if constexpr (STEP < kStageK) {
                            act_first = step * kStageK / p.act_group;
                            act_rows = min(kStageK / p.act_group, p.act_groups - act_first);
                        }
                    }
                    ptx::barrier_wait(&shared.empty[at.stage], at.parity ^ 1);
                    ptx::barrier_expect(full, BN * kStageK + (sum_rows + act_rows) * row_bytes);
                    ptx::copy_box(shared.x[at.stage], &x_map, step * kStageK, token, full);
                    if constexpr (kSums) {
                        for (int i = 0; i < sum_rows; ++i) {
                            ptx::copy_bulk(shared.sums[at.stage][i], sums + int64_t{sum_first + i} * p.m4 + token,
                                           row_bytes, full);
                        }
                    }
                    if constexpr (kAct) {
                        for (int i = 0; i < act_rows; ++i) {
                            ptx::copy_bulk(shared.act[at.stage][i], act_scale + int64_t{act_first + i} * p.m4 + token,
                                           row_bytes, full);
                        }
                    }
                    at.next();
                }
            }
        }
    } else {  // ---- products ---------------------------------------------------------------------------------------
        if constexpr (T::kMoveRegisters) ptx::take_registers<T::kRegisters>();
        const int within = thread % 128, warp = within / 32, lane = thread % 32, g = lane / 4, c = lane % 4;
        const int pair = 2 * (8 * warp + g);  // where rows g and g + 8 of this warp are in a group of scales
        Cursor<S::kStages> at;
        if (T::kTurns && group == kGroups - 1) ptx::named_arrive(kTurn, 256);
        for (Work<true> work(p); work.more(); work.next(p)) {
            const int begin = work.begin, end = work.end;
            const int2 where = tile_at(work.tile, p);
            const int strip = where.x * kGroups + group, n0 = strip * kStrip, m0 = where.y * BN;
            constexpr float kFactor = is_signed(KIND) ? 0x1p-4f : KIND == Kind::e4m3 ? 0x1p9f : 1.0f;
            constexpr float kZeroFactor = KIND == Kind::e4m3 ? 0x1p-9f : 1.0f;
            float acc[BN / 2];
            Sum part[kChunkSums];
#pragma unroll
            for (int i = 0; i < BN / 2; ++i) acc[i] = 0.0f;
            float s[2] = {}, z[2] = {};  // of rows g and g + 8
            struct Raw {                 // of the two rows: scales, zeros
                uint32_t scale, zero;
            };
            const auto load_scale = [&](const uint16_t* scales, const uint8_t* zeros) {
                Raw raw{*reinterpret_cast<const uint32_t*>(scales + pair), 0};
                if constexpr (kSums) raw.zero = zeros ? *reinterpret_cast<const uint16_t*>(zeros + pair) : 0x0808u;
                return raw;
            };
            const auto take_scale = [&](const Raw& raw) {
                s[0] = scale_bits(raw.scale & 0xffff, p.half) * kFactor;
                s[1] = scale_bits(raw.scale >> 16, p.half) * kFactor;
                if constexpr (kSums) {
                    z[0] = static_cast<float>(raw.zero & 0xff) * kZeroFactor;
                    z[1] = static_cast<float>(raw.zero >> 8) * kZeroFactor;
                }
            };
            if (p.group == 0 && strip < p.strips) take_scale(load_scale(scale + n0, zero ? zero + n0 : nullptr));
            // acc += s ( sums of a chunk - z S ) s_a, the sums being those of a step of a stage
            const auto promote = [&](int chunk, Sum(&of)[kChunkSums], const float (&by)[2], const float (&less)[2],
                                     int stage, int sum_step, int act_step) {
#pragma unroll
                for (int i = 0; i < kChunkSums; ++i) ptx::settle(of[i]);
#pragma unroll
                for (int j = 0; j < CHUNK / 8; ++j) {
                    const int token = chunk * CHUNK + 8 * j + 2 * c;
                    float2 own_sum = {}, own_scale = {};
                    if constexpr (kSums) {
                        own_sum = *reinterpret_cast<const float2*>(&shared.sums[stage][sum_step][token]);
                    }
                    if constexpr (kAct) {
                        own_scale = *reinterpret_cast<const float2*>(&shared.act[stage][act_step][token]);
                    }
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float v;
                        if constexpr (KIND == Kind::e4m3) {
                            v = of[4 * j + i];
                        } else {
                            v = static_cast<float>(of[4 * j + i]);
                        }
                        if constexpr (kSums) v = fmaf(-less[i / 2], i % 2 ? own_sum.y : own_sum.x, v);
                        if constexpr (kAct) v *= i % 2 ? own_scale.y : own_scale.x;
                        float& to = acc[chunk * kChunkSums + 4 * j + i];
                        to = fmaf(by[i / 2], v, to);
                    }
                }
            };
            const auto multiply = [&](int chunk, Sum(&to)[kChunkSums], const uint32_t (*a)[4], int count, int first,
                                      int stage) {
                const uint64_t b = ptx::wgmma_tile(&shared.x[stage][chunk * CHUNK][0]);
                ptx::wgmma_fence();
#pragma unroll
                for (int j = 0; j < count; ++j) ptx::wgmma8(to, a[j], b + 2 * (first + j), j > 0);
                ptx::wgmma_commit();
            };
            const auto release = [&](int stage) {
                __syncwarp();  // every lane has read its part of the stage
                if (lane == 0) ptx::barrier_arrive(&shared.empty[stage]);
            };

            if constexpr (STEP == kStageK) {
                uint32_t a[4][4];
                uint4 words;
                Raw raw{};
                // Scales of the next stage out of shared memory, and the weights of its first unit; those of the
                // others, or all where registers are scarce, when they become fragments.
                constexpr bool kEarly = !kSums && !kAct;
                const auto fetch = [&] {
                    ptx::barrier_wait(&shared.full[at.stage], at.parity);
                    if (kEarly) words = reinterpret_cast<const uint4*>(shared.weight[at.stage][group][0])[within];
                    if (p.group) {
                        raw = load_scale(shared.scale[at.stage][group][0],
                                         kSums ? shared.zero[kSums ? at.stage : 0][group][0] : nullptr);
                    }
                };
                const auto make_fragments = [&](int stage) {
#pragma unroll
                    for (int u = 0; u < kUnits; ++u) {
                        uint4 own = words;
                        if (u > 0 || !kEarly)
                            own = reinterpret_cast<const uint4*>(shared.weight[stage][group][u])[within];
                        ptx::settle(own);  // not before the wait for the products that read the last fragments
                        to_fragment<KIND>(a[2 * u], own.x, own.y);
                        to_fragment<KIND>(a[2 * u + 1], own.z, own.w);
                        ptx::settle(a[2 * u]), ptx::settle(a[2 * u + 1]);  // nor between products
                    }
                };
                constexpr bool kAhead = BN >= 64;  // below that memory is slower: nothing waits for what comes next
                // While the first chunk multiplies, the next stage's weights come; the other warpgroups keep the
                // tensor cores busy while sums are added up.
                if (kAhead) fetch();
#pragma unroll 1
                for (int step = begin; step < end; ++step) {
                    const int stage = at.stage;
                    if (!kAhead) fetch();
                    make_fragments(stage);
                    if (p.group) take_scale(raw);
#pragma unroll
                    for (int chunk = 0; chunk < kChunks; ++chunk) {
                        if constexpr (T::kTurns) ptx::named_barrier(kTurn + group, 256);
                        multiply(chunk, part, a, 4, 0, stage);
                        if constexpr (T::kTurns)
                            ptx::named_arrive(group + 1 < kGroups ? kTurn + group + 1 : kTurn, 256);
                        if (chunk == 0) {
                            at.next();
                            if (kAhead && step + 1 < end) fetch();
                        }
                        ptx::wgmma_wait<0>();
                        if (chunk == kChunks - 1 && !kSums && !kAct) release(stage);
                        promote(chunk, part, s, z, stage, 0, 0);
                    }
                    if (kSums || kAct) release(stage);
                }
            } else {  // 32 columns at a time
                for (int step = begin; step < end; ++step) {
                    ptx::barrier_wait(&shared.full[at.stage], at.parity);
                    const int quarters =
                        min(4, (p.k - step * kStageK + STEP - 1) / STEP);  // what comes behind K is stale
                    for (int quarter = 0; quarter < quarters; ++quarter) {
                        const int own = p.group == 0 ? 0 : quarter * STEP / p.group;
                        const int own_act = p.act_group == 0 ? 0 : quarter * STEP / p.act_group;
                        if (p.group) {
                            take_scale(load_scale(shared.scale[at.stage][group][own],
                                                  kSums ? shared.zero[kSums ? at.stage : 0][group][own] : nullptr));
                        }
                        const uint2 words = reinterpret_cast<const uint2*>(
                            shared.weight[at.stage][group][quarter / 2])[2 * within + quarter % 2];
                        uint32_t a[1][4];
                        to_fragment<KIND>(a[0], words.x, words.y);
#pragma unroll
                        for (int chunk = 0; chunk < kChunks; ++chunk) {
                            multiply(chunk, part, a, 1, quarter, at.stage);
                            ptx::wgmma_wait<0>();
                            promote(chunk, part, s, z, at.stage, quarter, own_act);
                        }
                    }
                    release(at.stage);
                    at.next();
                }
            }

            if (end < p.steps) {  // another block owns the tile
                float4* to = reinterpret_cast<float4*>(workspace + kFlagBytes + blockIdx.x * T::kPartialBytes) + thread;
#pragma unroll
                for (int i = 0; i < BN / 8; ++i) {
                    __stcg(to + i * kComputeThreads,
                           make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
                }
                ptx::named_barrier(1, kComputeThreads);
                if (thread == 0) ptx::raise_flag(reinterpret_cast<uint32_t*>(workspace) + blockIdx.x);
                continue;
            }
            if (begin > 0) {  // the blocks before this one, back to the one with the tile's first columns
                const int first = Work<true>::block_of(work.tile * p.steps, p);
                for (int block = first + thread; block < static_cast<int>(blockIdx.x); block += kComputeThreads) {
                    ptx::take_flag(reinterpret_cast<uint32_t*>(workspace) + block);
                }
                ptx::named_barrier(1, kComputeThreads);
#pragma unroll 1
                for (int block = static_cast<int>(blockIdx.x) - 1; block >= first; --block) {
                    const float4* from =
                        reinterpret_cast<const float4*>(workspace + kFlagBytes + block * T::kPartialBytes) + thread;
#pragma unroll
                    for (int i = 0; i < BN / 8; ++i) {
                        const uint4 four = ptx::load16(from + i * kComputeThreads);
                        acc[4 * i] += __uint_as_float(four.x), acc[4 * i + 1] += __uint_as_float(four.y);
                        acc[4 * i + 2] += __uint_as_float(four.z), acc[4 * i + 3] += __uint_as_float(four.w);
                    }
                }
            }
            ptx::wait_for_predecessor();  // for this thread's own reads of s_a
            const int n = n0 + 16 * warp + g;
            float add[2] = {};
            if (bias) {
                add[0] = n < p.n ? scale_bits(bias[n], p.half) : 0.0f;
                add[1] = n + 8 < p.n ? scale_bits(bias[n + 8], p.half) : 0.0f;
            }
            if (p.act_group == 0) {  // s_a of all tokens at once, through the memory that turns the result
                float* own = reinterpret_cast<float*>(shared.out[group][0]);
                for (int i = within; i < BN; i += 128) own[i] = m0 + i < p.m4 ? __ldcg(act_scale + m0 + i) : 0.0f;
                ptx::named_barrier(2 + group, 128);
#pragma unroll
                for (int j = 0; j < BN / 8; ++j) {
                    const float2 two = *reinterpret_cast<const float2*>(own + 8 * j + 2 * c);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        acc[4 * j + i] = fmaf(acc[4 * j + i], i % 2 ? two.y : two.x, add[i / 2]);
                    }
                }
                ptx::named_barrier(2 + group, 128);  // the result takes its place
            } else {
#pragma unroll
                for (int i = 0; i < BN / 2; ++i) acc[i] += add[i / 2 % 2];
            }
            if (p.wide) {
#pragma unroll
                for (int i = 0; i < BN / 2; ++i) {
                    const int m = m0 + i / 4 * 8 + 2 * c + i % 2, row = n + i / 2 % 2 * 8;
                    if (m < p.m && row < p.n) static_cast<float*>(y)[static_cast<int64_t>(m) * p.n + row] = acc[i];
                }
                continue;
            }
            // Transpose through shared memory, some tokens at a time, and write whole lines of y.
#pragma unroll
            for (int first = 0; first < BN; first += T::kOutTokens) {
                if (m0 + first >= p.m) break;
#pragma unroll
                for (int j = 0; j < T::kOutTokens / 16; ++j) {
                    const float* d = acc + (first / 8 + 2 * j) * 4;
                    void* to = &shared.out[group][16 * j + lane / 16 * 8 + lane % 8][16 * warp + lane / 8 % 2 * 8];
                    uint32_t two[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        two[i] = p.half ? pack2(d[2 * i], d[2 * i + 1], __half{})
                                        : pack2(d[2 * i], d[2 * i + 1], __nv_bfloat16{});
                    }
                    ptx::stmatrix_x4_trans(to, two[0], two[1], two[2], two[3]);
                }
                ptx::named_barrier(2 + group, 128);
                for (int i = within; i < T::kOutTokens * 8; i += 128) {
                    const int token = i / 8, column = n0 + i % 8 * 8, m = m0 + first + token;
                    if (m >= p.m) continue;
                    const uint16_t* from = &shared.out[group][token][i % 8 * 8];
                    uint16_t* to = static_cast<uint16_t*>(y) + static_cast<int64_t>(m) * p.n + column;
                    if (p.n % 8 == 0) {
                        if (column < p.n) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
                    } else {
                        for (int j = 0; j < 8 && column + j < p.n; ++j) to[j] = from[j];
                    }
                }
                ptx::named_barrier(2 + group, 128);
            }
        }
        if (T::kTurns && group == 0) ptx::named_barrier(kTurn, 256);  // the last turn, which nobody takes
    }
#endif
}

// ---- host ----------------------------------------------------------------------------------------------------------

// Codes [m, padded k], cut into boxes of 128 columns x BN tokens.
inline CUtensorMap map_codes(const LinearA8Call& call, int tokens) {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found{};
        check_cuda(
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
            "cuTensorMapEncodeTiled");
        require(found == cudaDriverEntryPointSuccess, "linear_w4a8: the driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    CUtensorMap map;
    const auto columns = static_cast<cuuint64_t>(act8_columns(call.k));
    const cuuint64_t size[2] = {columns, static_cast<cuuint64_t>(call.m)}, stride[1] = {columns};
    const cuuint32_t box[2] = {kStageK, static_cast<cuuint32_t>(tokens)}, step[2] = {1, 1};
    const CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(call.codes), size, stride,
                                   box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    require(status == CUDA_SUCCESS,
            "linear_w4a8: codes of " + std::to_string(call.m) + " x " + std::to_string(call.k) + " have no tensor map");
    return map;
}

template <typename T, Kind KIND, int STEP = kStageK>
void launch(const LinearA8Call& call, int cut, int multiprocessors, cudaStream_t stream) {
    Problem p{};
    p.m = static_cast<int>(call.m), p.n = static_cast<int>(call.n), p.k = static_cast<int>(call.k);
    p.units = static_cast<int>(ceil_div(call.k, kUnitK));
    p.groups = static_cast<int>(tiled_groups(call.k, call.group_size));
    p.strips = static_cast<int>(ceil_div(call.n, kStrip));
    p.group = static_cast<int>(std::max<int64_t>(call.group_size, 0));
    p.act_group = static_cast<int>(std::max<int64_t>(call.act_group_size, 0));
    p.act_groups = p.act_group ? static_cast<int>(ceil_div(call.k, p.act_group)) : 1;
    p.sum_groups = static_cast<int>(ceil_div(call.k, STEP));
    p.m4 = static_cast<int>(act8_rows(call.m));
    p.half = call.scale_dtype == 1, p.wide = call.y_dtype == 2;
    p.row_blocks = static_cast<int>(ceil_div(call.n, T::kRows));
    p.token_blocks = static_cast<int>(ceil_div(call.m, T::kTokens));
    p.steps = static_cast<int>(ceil_div(p.units, kUnits));
    p.cut = cut > 0;

    constexpr auto kernel = w4a8_kernel<T, KIND, STEP>;
    constexpr size_t bytes = sizeof(Shared<T, KIND, STEP>);
    static_assert(bytes <= T::kSharedMemory && Shared<T, KIND, STEP>::kStages >= 3, "shared memory of a block");
    allow_shared_memory<kernel>("linear_w4a8");
    const int64_t tiles = static_cast<int64_t>(p.row_blocks) * p.token_blocks;
    require(tiles * p.steps < (int64_t{1} << 30),
            "linear_w4a8: M=" + std::to_string(p.m) + " x N=" + std::to_string(p.n) + " is too large");
    const int64_t resident = std::min(multiprocessors * (cut ? cut : T::kBlocks), kMaxBlocks);
    const int64_t blocks = std::min<int64_t>(cut ? tiles * p.steps : tiles, resident);
    require(!cut || call.workspace_bytes >= kFlagBytes + blocks * T::kPartialBytes,
            "linear_w4a8: a workspace of " + std::to_string(call.workspace_bytes) + " bytes is too small");
    launch_programmatic("linear_w4a8", kernel, dim3(static_cast<unsigned>(blocks)), T::kThreads, bytes, 1, 9, stream,
                        map_codes(call, T::kTokens), call.act_scale, call.sums,
                        reinterpret_cast<const unsigned char*>(call.qweight), static_cast<const uint16_t*>(call.scale),
                        call.zero, static_cast<const uint16_t*>(call.bias), call.y,
                        static_cast<unsigned char*>(call.workspace), p);
}

// The tiles that linear_w4a8.cu names; false: none of this name. fine: sums become fp32 after every 32 columns, which
// symmetric weights with one scale a token never need.
template <Kind KIND>
bool launch_tile(const LinearA8Call& call, bool fine, int tile, int cut, int multiprocessors, cudaStream_t stream) {
    constexpr bool kPlain = KIND == Kind::symmetric;
    void (*run)(const LinearA8Call&, int, int, cudaStream_t) = nullptr;
    if (fine) {
        if constexpr (!kPlain) {
            if (tile == 16) run = launch<Tile<2, 16>, KIND, 32>;
            if (tile == 64) run = launch<Tile<2, 64>, KIND, 32>;
        }
    } else {
        if (tile == 16) run = launch<Tile<2, 16>, KIND>;
        if (tile == 64) run = launch<Tile<2, 64>, KIND>;
        if (tile == 192128) run = launch<Tile<3, 128>, KIND>;
        if constexpr (kPlain) {
            if (tile == 32) run = launch<Tile<2, 32>, KIND>;
            if (tile == 256) run = launch<Tile<2, 256, 128, true>, KIND>;
            if (tile == 192064) run = launch<Tile<3, 64>, KIND>;
        }
    }
    if (run) run(call, cut, multiprocessors, stream);
    return run != nullptr;
}

}  // namespace
}  // namespace pyquant
