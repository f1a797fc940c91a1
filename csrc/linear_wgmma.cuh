// linear_w4a16 for many tokens on Hopper: y [M, N] = x [M, K] w_hat^T + bias, w_hat = (code - zero) * scale.
//
//               K ->
//   128 rows    strip 2i      warpgroup 0     weights are the A operand, in registers: 16 bytes a thread and unit, made
//   of w_hat    strip 2i + 1  warpgroup 1     into four k16 fragments while the tensor cores work on the ones before
//
//   BN tokens   x tile, K-major, 128-byte swizzle: the B operand, in shared memory, read by both warpgroups
//
// Three warps copy (of a warpgroup for BN = 256, whose registers the others take): one a strip, weights and scales in
// linear pieces, and one for x through a tensor map, all onto one mbarrier a stage. A single thread could not keep up.
// The weights of the first stages are on their way before the predecessor in the stream has ended (programmatic
// launch); x waits for it.
//
// Work is (tile, stage of K) pairs in a line. With many tiles the blocks stay and take whole tiles in turn, so that the
// copies for the next tile run while this one is written. With few, each block takes an equal piece of the line
// (stream-K): a tile that is cut belongs to the block with its last columns, which gets to it last; the others, blocks
// before it, leave their fp32 sums in a workspace and raise a flag, the owner adds them up in order and takes the flags
// down again. One launch, no atomics, the same bits every time; and since blocks begin in order and wait for earlier
// ones only, no other kernel that holds a part of the GPU can keep them from ending.
//
// Up to 16 tokens the weights become codes less zero, exactly, and the sums of a group are scaled in fp32; above that
// the scale is multiplied in and the weight rounded to 16 bits, as a dequantized weight would be.
//
// Bound by the tensor cores from about 128 tokens on. Below, by instructions and their latency: for 8 weights a thread
// needs 7 logic instructions at half rate, 4 subtractions, 4 multiplications and some 6 others, and a multiprocessor
// streams 8 weights a thread of two warpgroups in 56 cycles.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cmath>

#include "ops.h"
#include "pieces.cuh"
#include "programmatic.cuh"
#include "wgmma.cuh"

namespace pyquant {
namespace {

constexpr int kGroups = 2;               // warpgroups that compute, 64 rows each
constexpr int kRows = kGroups * kStrip;  // 128
constexpr int kComputeThreads = kGroups * 128;
constexpr int kUnitBytes = kUnitWords * 4;
constexpr int kOutPad = 8;  // elements between tokens of a finished tile

template <int BN>
struct Config {
    static constexpr int kUnits = BN >= 256 ? 1 : BN >= 64 ? 2 : 4;  // units (64 columns) of a stage
    static constexpr int kStages = BN >= 128 ? 5 : BN == 32 ? 3 : 4;
    static constexpr int kBlocks = BN >= 128 ? 1 : 2;  // a multiprocessor
    static constexpr bool kMoveRegisters = BN >= 256;
    static constexpr bool kScaleSums = BN <= 16;  // few sums: scale them instead of the weights
    static constexpr int kThreads = kComputeThreads + (kMoveRegisters ? 128 : 96);
    static constexpr int kOutTokens = BN < 32 ? BN : BN < 128 ? 32 : 64;  // tokens of a tile written at a time
};

// GROUP is the group size; per channel counts as 128 with one group.
template <typename T, int BN, int GROUP>
struct Shared {
    using C = Config<BN>;
    static constexpr int kStageGroups = C::kUnits * kUnitK > GROUP ? C::kUnits * kUnitK / GROUP : 1;
    alignas(1024) T x[C::kStages][C::kUnits][BN][kUnitK];
    alignas(128) unsigned char weight[C::kStages][kGroups][C::kUnits][kUnitBytes];
    T scale[C::kStages][kGroups][kStageGroups][kStrip];
    uint8_t zero[C::kStages][kGroups][kStageGroups][kStrip];
    T out[kGroups][C::kOutTokens][kStrip + kOutPad];
    uint64_t full[C::kStages], empty[C::kStages];
};

struct Problem {
    int m, n, k, units, groups, strips;
    bool per_channel;  // one group: scales stay in registers
    int row_blocks, token_blocks;
    int steps;  // stages along K
    bool cut;   // stream-K; otherwise whole tiles
};

// Workspace: a flag for each block, then its partial tile. The flags are 0 between launches.
constexpr int kFlagBytes = 4096;
constexpr int kMaxBlocks = kFlagBytes / 4;
__host__ __device__ constexpr int64_t partial_bytes(int tokens) { return int64_t{kRows} * tokens * 4; }

// The stretches of K of single tiles that a block works on. A block that takes a piece of the line goes through it from
// its end, so that the tile it owns comes last.
// Whole warps (WARPS) read the numbers off lane 0, so that the compiler sees they are uniform and keeps what depends on
// them, such as the place in the ring, out of the vector registers.
template <bool WARPS>
struct Work {
    int tile, begin, end;  // stages
    int line, line_end;

    static __device__ __forceinline__ int uniform(int v) { return WARPS ? __shfl_sync(0xffffffff, v, 0) : v; }

    static __device__ __forceinline__ int line_of(int block, const Problem& p) {
        const int64_t all = static_cast<int64_t>(p.row_blocks) * p.token_blocks * p.steps;
        return static_cast<int>(all * block / static_cast<int>(gridDim.x));
    }
    // The block whose piece holds this place of the line: line_of(block) <= line < line_of(block + 1).
    static __device__ __forceinline__ int block_of(int line, const Problem& p) {
        const int64_t all = static_cast<int64_t>(p.row_blocks) * p.token_blocks * p.steps;
        return uniform(static_cast<int>(((line + int64_t{1}) * gridDim.x - 1) / all));
    }
    __device__ __forceinline__ explicit Work(const Problem& p) {
        line = uniform(p.cut ? line_of(blockIdx.x, p) : blockIdx.x * p.steps);
        line_end = uniform(p.cut ? line_of(blockIdx.x + 1, p) : p.row_blocks * p.token_blocks * p.steps);
        aim(p);
    }
    __device__ __forceinline__ bool more() const { return line < line_end; }
    __device__ __forceinline__ void aim(const Problem& p) {
        if (p.cut) {
            tile = uniform((line_end - 1) / p.steps);
            end = line_end - tile * p.steps, begin = max(line - tile * p.steps, 0);
        } else {
            tile = uniform(line / p.steps);
            begin = 0, end = p.steps;
        }
    }
    __device__ __forceinline__ void next(const Problem& p) {
        if (p.cut) {
            line_end -= end - begin;
        } else {
            line += gridDim.x * p.steps;
        }
        aim(p);
    }
};

// Tile number -> (row block, token block): 8 token blocks beside each other, so that weights and x of the tiles in
// flight stay in L2.
__device__ __forceinline__ int2 tile_at(int tile, const Problem& p) {
    constexpr int kWide = 8;
    const int band = tile / (kWide * p.row_blocks), width = min(kWide, p.token_blocks - band * kWide);
    const int within = tile - band * kWide * p.row_blocks;
    return make_int2(within / width, band * kWide + within % width);
}

// A place in the ring of stages.
template <int STAGES>
struct Cursor {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

template <typename T, int BN, int GROUP>
__global__ void __launch_bounds__(Config<BN>::kThreads, Config<BN>::kBlocks)
    wgmma_kernel(const __grid_constant__ CUtensorMap x_map, const unsigned char* __restrict__ qweight,
                 const T* __restrict__ scale, const uint8_t* __restrict__ zero, const T* __restrict__ bias,
                 T* __restrict__ y, unsigned char* __restrict__ workspace, const Problem p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // on other GPUs linear.cu never launches it
    using C = Config<BN>;
    extern __shared__ __align__(1024) unsigned char memory[];
    using S = Shared<T, BN, GROUP>;
    S& shared = *reinterpret_cast<S*>(memory);
    const int thread = threadIdx.x,
              group = __shfl_sync(0xffffffff, thread / 128, 0);  // so that the compiler sees it is uniform
    ptx::launch_dependents();
    if (thread == 0) {
        for (int i = 0; i < C::kStages; ++i) {
            ptx::barrier_init(&shared.full[i], kGroups + 1);
            ptx::barrier_init(&shared.empty[i], kComputeThreads / 32);
        }
        ptx::barrier_init_fence();
    }
    if (p.units % C::kUnits !=
        0) {  // the last stage is read whole: x is 0 there, but scales that were never written may be NaN
        for (int i = thread; i < static_cast<int>(sizeof(shared.scale) / 4); i += C::kThreads) {
            reinterpret_cast<uint32_t*>(shared.scale)[i] = 0;
        }
        ptx::fence_async();
    }
    __syncthreads();

    if (group == kGroups) {  // ---- copies --------------------------------------------------------------------------
        if constexpr (C::kMoveRegisters) ptx::give_registers<24>();
        const int role = thread / 32 - kComputeThreads / 32;
        Cursor<C::kStages> at;
        if (thread % 32 == 0 && role < kGroups) {  // weights and scales of one strip
            for (Work<false> work(p); work.more(); work.next(p)) {
                const int64_t strip = tile_at(work.tile, p).x * kGroups + role;
                const bool there = strip < p.strips;
                const int begin = work.begin, first_group = begin * C::kUnits * kUnitK / GROUP;
                const unsigned char* weight = qweight + (strip * p.units + begin * C::kUnits) * kUnitBytes;
                const T* scales = scale + (strip * p.groups + first_group) * kStrip;
                const uint8_t* zeros = zero + (strip * p.groups + first_group) * kStrip;
                for (int step = begin; step < work.end; ++step) {
                    const int units = min(C::kUnits, p.units - step * C::kUnits);
                    const int group_now = step * C::kUnits * kUnitK / GROUP;
                    const int groups = p.per_channel ? 0 : min(S::kStageGroups, p.groups - group_now) * kStrip;
                    ptx::barrier_wait(&shared.empty[at.stage], at.parity ^ 1);
                    uint64_t* full = &shared.full[at.stage];
                    ptx::barrier_expect(
                        full,
                        there ? units * kUnitBytes + groups * static_cast<int>(sizeof(T)) + (zero ? groups : 0) : 0);
                    if (there) {
                        ptx::copy_bulk(shared.weight[at.stage][role], weight, units * kUnitBytes, full);
                        if (groups) ptx::copy_bulk(shared.scale[at.stage][role], scales, groups * sizeof(T), full);
                        if (groups && zero) ptx::copy_bulk(shared.zero[at.stage][role], zeros, groups, full);
                    }
                    weight += C::kUnits * kUnitBytes;
                    if constexpr (C::kUnits * kUnitK >= GROUP) {
                        scales += S::kStageGroups * kStrip, zeros += S::kStageGroups * kStrip;
                    } else if ((step + 1) * C::kUnits * kUnitK % GROUP == 0) {
                        scales += kStrip, zeros += kStrip;
                    }
                    at.next();
                }
            }
        } else if (thread % 32 == 0 && role == kGroups) {  // x
            ptx::prefetch_map(&x_map);
            ptx::wait_for_predecessor();  // x may be another kernel's until here
            for (Work<false> work(p); work.more(); work.next(p)) {
                const int token = tile_at(work.tile, p).y * BN;
                for (int step = work.begin; step < work.end; ++step) {
                    ptx::barrier_wait(&shared.empty[at.stage], at.parity ^ 1);
                    ptx::barrier_expect(&shared.full[at.stage], C::kUnits * BN * kUnitK * static_cast<int>(sizeof(T)));
#pragma unroll
                    for (int u = 0; u < C::kUnits; ++u) {
                        ptx::copy_box(shared.x[at.stage][u], &x_map, (step * C::kUnits + u) * kUnitK, token,
                                      &shared.full[at.stage]);
                    }
                    at.next();
                }
            }
        }
    } else {  // ---- products ---------------------------------------------------------------------------------------
        if constexpr (C::kMoveRegisters) ptx::take_registers<240>();
        const int within = thread % 128, warp = within / 32, lane = thread % 32, g = lane / 4;
        const int pair = 2 * (8 * warp + g);  // where rows g and g + 8 of this warp are in a group of scales
        Cursor<C::kStages> at;
        for (Work<true> work(p); work.more(); work.next(p)) {
            const int begin = work.begin, end = work.end;
            const int2 where = tile_at(work.tile, p);
            const int strip = where.x * kGroups + group, n0 = strip * kStrip, m0 = where.y * BN;
            float acc[BN / 2];
            uint32_t offset[2] = {Magic<T>::kBits + kSymmetricZero * 0x10001,
                                  Magic<T>::kBits + kSymmetricZero * 0x10001};
            uint32_t two = 0;  // the scales of rows g and g + 8
            const auto take_scale = [&](const T* scales, const uint8_t* zeros) {
                two = *reinterpret_cast<const uint32_t*>(scales + pair);
                if (zero) {
                    const uint32_t z = *reinterpret_cast<const uint16_t*>(zeros + pair);
                    offset[0] = Magic<T>::kBits + (z & 0xff) * 0x10001,
                    offset[1] = Magic<T>::kBits + (z >> 8) * 0x10001;
                }
            };
            if (p.per_channel && strip < p.strips) take_scale(scale + n0, zero ? zero + n0 : nullptr);
            int held = -1;  // the stage that running products still read
            const auto release = [&](int next) {
                __syncwarp();  // every lane has read its part of the stage
                if (held >= 0 && lane == 0) ptx::barrier_arrive(&shared.empty[held]);
                held = next;
            };
            if constexpr (C::kScaleSums) {
                // Codes less zero, exact; sums of a group are scaled in fp32.
                float part[BN / 2], s[2] = {};
#pragma unroll
                for (int i = 0; i < BN / 2; ++i) acc[i] = part[i] = 0.0f;
                const auto add_group = [&] {
                    ptx::wgmma_wait<0>();
#pragma unroll
                    for (int i = 0; i < BN / 2; ++i) acc[i] += s[i / 2 % 2] * part[i];
                };
                uint32_t a[2][4][4];
                bool fresh = true;  // part holds nothing
                for (int step = begin; step < end; ++step) {
                    ptx::barrier_wait(&shared.full[at.stage], at.parity);
#pragma unroll
                    for (int u = 0; u < C::kUnits; ++u) {
                        const uint4 words = reinterpret_cast<const uint4*>(shared.weight[at.stage][group][u])[within];
                        const uint64_t b = ptx::wgmma_tile(shared.x[at.stage][u]);
                        const uint32_t word[4] = {words.x, words.y, words.z, words.w};
                        constexpr int kSteps = GROUP < kUnitK ? GROUP / 16 : 4;  // products of a batch
#pragma unroll
                        for (int first = 0; first < 4; first += kSteps) {
                            const int column = u * kUnitK + first * 16;
                            const bool begins = column % GROUP == 0 && !p.per_channel;  // a group
                            if (begins)
                                take_scale(shared.scale[at.stage][group][column / GROUP],
                                           shared.zero[at.stage][group][column / GROUP]);
#pragma unroll
                            for (int j = first; j < first + kSteps; ++j)
                                word_to_fragment<T>(a[u % 2][j], word[j], offset);
                            if (begins) {
                                add_group();
                                fresh = true;
                            }
                            if (begins || p.per_channel) s[0] = Magic<T>::low(two), s[1] = Magic<T>::high(two);
                            ptx::wgmma_fence();
#pragma unroll
                            for (int j = first; j < first + kSteps; ++j) {
                                ptx::wgmma(part, a[u % 2][j], b + 2 * j, !fresh || j > first, T{});
                            }
                            fresh = false;
                            ptx::wgmma_commit();
                            ptx::wgmma_wait<1>();
                            if (u == 0 && first == 0) release(at.stage);
                        }
                    }
                    at.next();
                }
                add_group();
            } else {
                // The weight, rounded to 16 bits.
                for (int step = begin; step < end; ++step) {
                    ptx::barrier_wait(&shared.full[at.stage], at.parity);
                    uint4 stage_words[C::kUnits];
#pragma unroll
                    for (int u = 0; u < C::kUnits; ++u) {
                        stage_words[u] = reinterpret_cast<const uint4*>(shared.weight[at.stage][group][u])[within];
                    }
#pragma unroll
                    for (int u = 0; u < C::kUnits; ++u) {
                        const uint64_t b = ptx::wgmma_tile(shared.x[at.stage][u]);
                        const uint32_t word[4] = {stage_words[u].x, stage_words[u].y, stage_words[u].z,
                                                  stage_words[u].w};
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            const int column = u * kUnitK + half * (kUnitK / 2);
                            if (column % GROUP == 0 && !p.per_channel) {
                                take_scale(shared.scale[at.stage][group][column / GROUP],
                                           shared.zero[at.stage][group][column / GROUP]);
                            }
                            const uint32_t s[2] = {__byte_perm(two, 0, 0x1010), __byte_perm(two, 0, 0x3232)};
                            uint32_t a[2][4];
#pragma unroll
                            for (int j = 0; j < 2; ++j) {
                                word_to_fragment<T>(a[j], word[2 * half + j], offset);
#pragma unroll
                                for (int r = 0; r < 4; ++r) a[j][r] = multiply2(a[j][r], s[r % 2], T{});
                            }
                            ptx::wgmma_fence();
#pragma unroll
                            for (int j = 0; j < 2; ++j) {
                                ptx::wgmma(acc, a[j], b + 2 * (2 * half + j), step > begin || u + half + j > 0, T{});
                            }
                            ptx::wgmma_commit();
                            ptx::wgmma_wait<1>();  // the batch before: its fragments and, if it was the last of a
                                                   // stage, that
                            if (u == 0 && half == 0) release(at.stage);
                        }
                    }
                    at.next();
                }
                ptx::wgmma_wait<0>();
            }
            release(-1);

            if (end < p.steps) {  // another block owns the tile
                float4* to =
                    reinterpret_cast<float4*>(workspace + kFlagBytes + blockIdx.x * partial_bytes(BN)) + thread;
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
                constexpr int kAtOnce = BN <= 16 ? 4 : BN <= 32 ? 2 : 1;  // blocks whose sums are on their way together
                for (int block = blockIdx.x - 1; block >= first; block -= kAtOnce) {
                    uint4 four[kAtOnce][BN / 8];  // floats
#pragma unroll
                    for (int j = 0; j < kAtOnce; ++j) {
                        const float4* from =
                            reinterpret_cast<const float4*>(workspace + kFlagBytes + (block - j) * partial_bytes(BN)) +
                            thread;
#pragma unroll
                        for (int i = 0; i < BN / 8; ++i) {
                            four[j][i] =
                                block - j >= first ? ptx::load16(from + i * kComputeThreads) : make_uint4(0, 0, 0, 0);
                        }
                    }
#pragma unroll
                    for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
                        for (int i = 0; i < BN / 8; ++i) {
                            acc[4 * i] += __uint_as_float(four[j][i].x);
                            acc[4 * i + 1] += __uint_as_float(four[j][i].y);
                            acc[4 * i + 2] += __uint_as_float(four[j][i].z);
                            acc[4 * i + 3] += __uint_as_float(four[j][i].w);
                        }
                    }
                }
            }
            if (bias) {
                const int n = n0 + 16 * warp + g;
                const float add[2] = {n < p.n ? to_float(bias[n]) : 0.0f, n + 8 < p.n ? to_float(bias[n + 8]) : 0.0f};
#pragma unroll
                for (int i = 0; i < BN / 2; ++i) acc[i] += add[i / 2 % 2];
            }
            // Transpose through shared memory, 64 tokens at a time, and write whole lines of y.
#pragma unroll
            for (int first = 0; first < BN; first += C::kOutTokens) {
                if (m0 + first >= p.m) break;
#pragma unroll
                for (int j = 0; j < C::kOutTokens / 16; ++j) {
                    const float* d = acc + (first / 8 + 2 * j) * 4;
                    T* to = &shared.out[group][16 * j + lane / 16 * 8 + lane % 8][16 * warp + lane / 8 % 2 * 8];
                    ptx::stmatrix_x4_trans(to, pack2(d[0], d[1], T{}), pack2(d[2], d[3], T{}), pack2(d[4], d[5], T{}),
                                           pack2(d[6], d[7], T{}));
                }
                ptx::named_barrier(2 + group, 128);
                for (int i = within; i < C::kOutTokens * 8; i += 128) {
                    const int token = i / 8, n = n0 + i % 8 * 8, m = m0 + first + token;
                    if (m >= p.m) continue;
                    const T* from = &shared.out[group][token][i % 8 * 8];
                    T* to = y + static_cast<int64_t>(m) * p.n + n;
                    if (p.n % 8 == 0) {
                        if (n < p.n) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
                    } else {
                        for (int j = 0; j < 8 && n + j < p.n; ++j) to[j] = from[j];
                    }
                }
                ptx::named_barrier(2 + group, 128);
            }
        }
    }
#endif
}

// ---- host ----------------------------------------------------------------------------------------------------------

// x [m, k] with rows of x_stride elements, cut into boxes of 64 columns x BN tokens.
CUtensorMap map_x(const LinearCall& call, int tokens) {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found{};
        check_cuda(
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
            "cuTensorMapEncodeTiled");
        require(found == cudaDriverEntryPointSuccess, "linear_w4a16: the driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    CUtensorMap map;
    const cuuint64_t size[2] = {static_cast<cuuint64_t>(call.k), static_cast<cuuint64_t>(call.m)};
    const cuuint64_t stride[1] = {static_cast<cuuint64_t>(call.x_stride) * 2};
    const cuuint32_t box[2] = {kUnitK, static_cast<cuuint32_t>(tokens)}, step[2] = {1, 1};
    const CUresult status =
        encode(&map, call.dtype == 0 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
               const_cast<void*>(call.x), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    require(status == CUDA_SUCCESS, "linear_w4a16: x of " + std::to_string(call.m) + " x " + std::to_string(call.k) +
                                        " with a row stride of " + std::to_string(call.x_stride) +
                                        " has no tensor map: rows must begin at multiples of 16 bytes");
    return map;
}

struct Choice {
    int tokens;  // BN
    int cut;     // 0: whole tiles, else stream-K over this many blocks a multiprocessor
};

int blocks_on(int tokens) { return tokens >= 128 ? 1 : 2; }  // a multiprocessor

// What a tile costs, measured on an H200 at 1.75 GHz: cycles for 16 columns with one and with two blocks a
// multiprocessor (conversion and latency bind up to 64 tokens, the tensor cores above), and the ends of a launch in
// nanoseconds: filling the ring, and for cut tiles the meeting of the parts.
struct Cost {
    int tokens;
    double cycles[2];
    double cut_ends;
};
constexpr Cost kCosts[] = {{16, {83, 73}, 5000},
                           {32, {99, 90}, 7000},
                           {64, {132, 120}, 7000},
                           {128, {147, 147}, 9000},
                           {256, {262, 262}, 20000}};
constexpr double kWholeEnds = 2500;

// The tile with the least estimated time: all bytes at 4.4 TB/s, or the products of the busiest multiprocessor.
Choice choose(const LinearCall& call, int multiprocessors, int force_tokens, int force_cut) {
    Choice best{};
    double least = 0;
    for (const Cost& cost : kCosts) {
        const int tokens = cost.tokens;
        if (force_tokens > 0 ? tokens != force_tokens : tokens > 16 && tokens >= 2 * call.m) continue;
        const double tiles = static_cast<double>(ceil_div(call.n, kRows) * ceil_div(call.m, tokens));
        const double bytes = 0.52 * call.n * call.k + 2.0 * call.m * (call.k + call.n);
        for (int cut = 0; cut <= blocks_on(tokens); ++cut) {
            // Whole tiles on a part of the multiprocessors: in a chain the next kernel's blocks pile up on the others.
            const bool uneven = cut == 0 && blocks_on(tokens) > 1 && tiles < multiprocessors;
            if (force_cut >= 0 ? cut != force_cut : call.workspace == nullptr ? cut > 0 : uneven) continue;
            const double turns = cut ? tiles / multiprocessors : std::ceil(tiles / multiprocessors);
            const double cycles = cost.cycles[cut == 1 ? 0 : 1] * static_cast<double>(ceil_div(call.k, 16));
            const double time =
                std::max(bytes / 4400, turns * cycles / 1.75) + (cut ? cost.cut_ends + (cut - 1) * 1500 : kWholeEnds);
            if (least == 0 || time < least) least = time, best = {tokens, cut};
        }
    }
    require(least > 0, "linear_w4a16: no tile of " + std::to_string(force_tokens) + " tokens cut " +
                           std::to_string(force_cut) +
                           " ways: known are 16, 32, 64, 128 and 256 tokens, and 0, 1 or 2");
    return best;
}

template <typename T, int BN, int GROUP>
void launch(const LinearCall& call, int cut, int multiprocessors, cudaStream_t stream) {
    using C = Config<BN>;
    Problem p{};
    p.m = static_cast<int>(call.m), p.n = static_cast<int>(call.n), p.k = static_cast<int>(call.k);
    p.units = static_cast<int>(ceil_div(call.k, kUnitK));
    p.groups = static_cast<int>(tiled_groups(call.k, call.group_size));
    p.strips = static_cast<int>(ceil_div(call.n, kStrip));
    p.per_channel = call.group_size < 0;
    p.row_blocks = static_cast<int>(ceil_div(call.n, kRows));
    p.token_blocks = static_cast<int>(ceil_div(call.m, BN));
    p.steps = static_cast<int>(ceil_div(p.units, C::kUnits));
    p.cut = cut > 0;

    constexpr auto kernel = wgmma_kernel<T, BN, GROUP>;
    constexpr size_t bytes = sizeof(Shared<T, BN, GROUP>);
    static_assert(bytes <= 227 << 10, "shared memory of a block");
    allow_shared_memory<kernel>("linear_w4a16");
    const int64_t tiles = static_cast<int64_t>(p.row_blocks) * p.token_blocks;
    require(tiles * ceil_div(call.k, kUnitK) < (int64_t{1} << 30),
            "linear_w4a16: M=" + std::to_string(p.m) + " x N=" + std::to_string(p.n) + " is too large");
    const int64_t resident = std::min(multiprocessors * (cut ? cut : C::kBlocks), kMaxBlocks);
    const int64_t blocks = std::min<int64_t>(cut ? tiles * p.steps : tiles, resident);
    require(!cut || call.workspace_bytes >= kFlagBytes + blocks * partial_bytes(BN),
            "linear_w4a16: a workspace of " + std::to_string(call.workspace_bytes) + " bytes is too small");

    launch_programmatic("linear_w4a16", kernel, dim3(static_cast<unsigned>(blocks)), C::kThreads, bytes, 1, 9, stream,
                        map_x(call, BN), reinterpret_cast<const unsigned char*>(call.qweight),
                        static_cast<const T*>(call.scale), call.zero, static_cast<const T*>(call.bias),
                        static_cast<T*>(call.y), static_cast<unsigned char*>(call.workspace), p);
}

template <typename T>
void linear_wgmma_of(const LinearCall& call, int force_tokens, int force_cut, cudaStream_t stream) {
    const int multiprocessors = current_device().multiprocessors;
    const Choice choice = choose(call, multiprocessors, force_tokens, force_cut);
    const auto with_group = [&](auto group) {
        constexpr int kGroup = decltype(group)::value;
        switch (choice.tokens) {
            case 16:
                return launch<T, 16, kGroup>(call, choice.cut, multiprocessors, stream);
            case 32:
                return launch<T, 32, kGroup>(call, choice.cut, multiprocessors, stream);
            case 64:
                return launch<T, 64, kGroup>(call, choice.cut, multiprocessors, stream);
            case 128:
                return launch<T, 128, kGroup>(call, choice.cut, multiprocessors, stream);
            default:
                return launch<T, 256, kGroup>(call, choice.cut, multiprocessors, stream);
        }
    };
    switch (call.group_size) {
        case 32:
            return with_group(std::integral_constant<int, 32>{});
        case 64:
            return with_group(std::integral_constant<int, 64>{});
        default:
            return with_group(std::integral_constant<int, 128>{});
    }
}

}  // namespace
}  // namespace pyquant
