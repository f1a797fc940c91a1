// linear_w4a16 for up to 8 tokens on Hopper: y [M, N] = x [M, K] w_hat^T + bias, w_hat = (code - zero) * scale.
//
// The problem is transposed: the weight is the A operand of m16n8k16 (tiles of 16 rows), the tokens of x are B. A code
// is not made a number of its own: it is OR'ed into the mantissa of a constant, which gives base + code exactly. What
// that adds is taken off a group's fp32 sum through the sum of its x:
//
//     y[m, n] = sum over groups of  scale[n] ( sum((base + code) * x) - (base + zero[n]) sum(x) )
//
// sum(x) is one more row of the same product, a tile of ones times x; it is made once, with the first rows of a block,
// and kept. The weight is never rounded.
//
//              pairs of units (128 columns) ->             the warps of a block share the columns, a pair each in turn,
//   tile 0     w0  w1 .. w7  w0  w1 ..                     and take 4 tiles side by side; each has the x of its own
//   ..                                                     pairs in shared memory and no other's. They meet only where
//   tile 3     w0  w1 .. w7  w0  w1 ..                     their partial sums are added up, at the end of the 4 tiles
//
// Weights pass a ring in shared memory: each thread copies its own 16 bytes of a unit and tile into its own slots
// (cp.async), so that no barrier guards it. The grid is one block a multiprocessor with half of its registers and,
// where x allows, of its shared memory: the next kernel of a chain moves in beside it (programmatic launch) and fills
// its ring before its x exists.
//
// All blocks read all of x, 2 M K bytes each, through L2. Where K is long, or a strip of 64 rows for each block would
// leave half of the multiprocessors without one, a cluster of 2 blocks shares the columns: half of x to each. Each
// block sends its sums straight to the block of the cluster that adds them up and writes y, where a barrier counts the
// bytes; the two do not meet otherwise. The order of all sums is fixed.
//
// A fragment needs 7 logic instructions, one product, and some 2 others; at 4.5 TB/s a scheduler has 27 cycles for it,
// so that two warps each suffice.
//
// Tried and lost (benchmarks/NOTES.md): two tiles side by side with rings of 4 and 2 pairs, 12 warps, clusters of 4 and
// 8, and 16 tokens a pass, where linear_wgmma.cuh is faster.
//
// NaN and infinity in x make every output of that token NaN.
#pragma once

#include <algorithm>

#include "format.cuh"
#include "linear_mma.h"
#include "pieces.cuh"
#include "programmatic.cuh"

namespace pyquant {
namespace {

constexpr int kTile = 16;  // rows of a fragment
constexpr int kTilesPerStrip = kStrip / kTile;
constexpr int kPairK = 2 * kUnitK;                           // 128 columns
constexpr int kSteps = kPairK / 16;                          // products along them
constexpr int kTileThreads = kUnitThreads / kTilesPerStrip;  // threads whose 16 bytes make a tile of a unit
constexpr int kRowBytes = 2 * kPairK + 16;  // of x of a token and pair; 8 tokens of an ldmatrix meet different banks
constexpr int kBarrierBytes = 16;           // two barriers, where clusters meet
constexpr int kTokens = 8;                  // of a product; rows of x that may be there
constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kSide = 4;   // tiles side by side
constexpr int kSlots = 2;  // pairs of a warp on their way
constexpr int kItemsPerToken = kSide * kTile / 4;
constexpr int kSumsRow = kSide * kTile + 4;  // floats of a token's partial sums: no bank conflicts

struct Problem {
    int64_t x_stride;
    int m, n, k, units, pairs, groups, tiles;  // units = padded K / 64, pairs of them (the last may be half)
    bool per_channel;
};

// How a launch is cut up, and shared memory behind the ring: barriers, an area of each warp, sums from other blocks.
struct Plan {
    int row_blocks;                       // blocks (cut: clusters) along N, each its share of the tiles
    int cut;                              // 1 where a cluster of 2 blocks shares K, else 0
    int window;                           // pairs of a warp whose x is in shared memory at once
    bool restage;                         // that is not all of them
    int sums_at, sums_bytes, warp_bytes;  // area of a warp: x, sums of x, two places for partial sums
    int places;                           // 1 where a block takes its tiles at once; the sums then take the place of x
};

// A pair of each warp on its way. Weights have a thread's own places. Scales and zeros of a tile are brought by one
// lane for the four that need them: scales of rows g and g + 8, or 4 neighbouring zeros, 2 of them of these rows.
template <int GROUPS>
struct Slot {
    uint4 weight[2][kSide][kThreads];  // [unit][tile]
    uint32_t scales[kSide][GROUPS][kWarps][8], zeros[kSide][GROUPS][kWarps][8];
};

// One word of the tiled order to the A fragment of m16n8k16, as the exact numbers kBase + code in row g and kBase8 +
// code in row g + 8. Where in the mantissa a code goes is free: where it lies, or as little of a base as the same
// number of shifts allows.
template <typename T>
struct Raised;
template <>
struct Raised<__nv_bfloat16> {
    static constexpr float kBase = 128.0f, kBase8 = 16.0f;
    static __device__ __forceinline__ void fragment(uint32_t (&a)[4], uint32_t word) {
        a[0] = ptx::and_or(word, 0x000f000f, 0x43004300);
        a[1] = ptx::and_or(word >> 1, 0x00780078, 0x41804180);
        a[2] = ptx::and_or(word >> 8, 0x000f000f, 0x43004300);
        a[3] = ptx::and_or(word >> 9, 0x00780078, 0x41804180);
    }
};
template <>
struct Raised<__half> {
    static constexpr float kBase = 16.0f, kBase8 = 64.0f;
    static __device__ __forceinline__ void fragment(uint32_t (&a)[4], uint32_t word) {
        a[0] = ptx::and_or(word << 6, 0x03c003c0, 0x4c004c00);
        a[1] = ptx::and_or(word, 0x00f000f0, 0x54005400);
        a[2] = ptx::and_or(word >> 2, 0x03c003c0, 0x4c004c00);
        a[3] = ptx::and_or(word >> 8, 0x00f000f0, 0x54005400);
    }
};

// Until at most `pending`, or MOST, of this thread's newest groups of copies are unfinished.
template <int MOST>
__device__ __forceinline__ void wait_for_all_but(int pending) {
    if constexpr (MOST > 0) {
        if (pending < MOST) return wait_for_all_but<MOST - 1>(pending);
    }
    ptx::copy_async_wait<MOST>();
}

// GROUPS: groups of scales in a pair.
template <typename T, int GROUPS>
__global__ void __launch_bounds__(kThreads, 2)
    linear_mma_kernel(const T* __restrict__ x, const uint4* __restrict__ qweight, const T* __restrict__ scale,
                      const uint8_t* __restrict__ zero, const T* __restrict__ bias, T* __restrict__ y, const Problem p,
                      const Plan plan) {
#if __CUDA_ARCH__ >= 900  // other GPUs never launch it
    using S = Slot<GROUPS>;
    extern __shared__ __align__(16) unsigned char memory[];
    S* const ring = reinterpret_cast<S*>(memory);
    uint64_t* const met = reinterpret_cast<uint64_t*>(memory + kSlots * sizeof(S));  // sums of the others are here
    unsigned char* const areas = memory + kSlots * sizeof(S) + kBarrierBytes;
    float4* const received = reinterpret_cast<float4*>(areas + kWarps * plan.warp_bytes);  // [place][block][item]

    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, c = lane % 4;
    const int cut = plan.cut, rank = blockIdx.x & cut, block = blockIdx.x >> cut;
    const int share = (p.pairs + cut) >> cut;
    const int begin = min(rank * share, p.pairs), end = min(begin + share, p.pairs);
    const int first_tile = static_cast<int>(static_cast<int64_t>(block) * p.tiles / plan.row_blocks);
    const int tiles = static_cast<int>(static_cast<int64_t>(block + 1) * p.tiles / plan.row_blocks) - first_tile;
    const int items = p.m * kItemsPerToken, own_items = items >> cut;  // of 4 rows and a token; each block adds up half
    ptx::launch_dependents();

    // ---- what is fetched next: pair `ahead` of tiles `ahead_tile`, .. of this block ----
    int ahead = begin + warp, ahead_tile = ahead < end ? 0 : tiles;
    uint32_t weight_at[kSide];  // of pair `ahead`, in 16 bytes
    const T* scale_at;          // of its first group; this lane brings numbers of tile c
    const uint8_t* zero_at;
    const auto aim = [&] {
#pragma unroll
        for (int r = 0; r < kSide; ++r) {
            const uint32_t tile = first_tile + ahead_tile + r;
            weight_at[r] = (tile / kTilesPerStrip * p.units + 2 * ahead) * kUnitThreads +
                           tile % kTilesPerStrip * kTileThreads + lane;
        }
        const uint32_t tile = first_tile + ahead_tile + c;
        const uint32_t group = tile / kTilesPerStrip * p.groups + (p.per_channel ? 0 : ahead * GROUPS);
        const int64_t at = int64_t{group} * kStrip + 2 * (8 * (tile % kTilesPerStrip) + g);
        scale_at = scale + at, zero_at = zero + (at & ~3);
    };
    const auto fetch = [&](int slot, int unit) {
        const bool unit_there = unit == 0 || 2 * ahead + 1 < p.units;
#pragma unroll
        for (int r = 0; r < kSide; ++r) {
            if (ahead_tile + r < tiles && unit_there) {
                ptx::copy_async<16>(&ring[slot].weight[unit][r][thread], qweight + weight_at[r] + unit * kUnitThreads);
            }
        }
#pragma unroll
        for (int i = unit * GROUPS / 2; i < (unit + 1) * GROUPS / 2; ++i) {  // groups that end in this unit
            uint32_t* const scales = &ring[slot].scales[c][i][warp][g];
            uint32_t* const zeros = &ring[slot].zeros[c][i][warp][g];
            if (GROUPS > 1 && ahead * GROUPS + i >= p.groups) {
                *scales = *zeros = 0;  // x is 0 there, but what lies in the slot may be NaN
            } else if (ahead_tile + c < tiles) {
                ptx::copy_async<4>(scales, scale_at + i * kStrip);
                if (zero) ptx::copy_async<4>(zeros, zero_at + i * kStrip);
            }
        }
        ptx::copy_async_commit();
    };
    const auto advance = [&] {
        ahead += kWarps;
#pragma unroll
        for (int r = 0; r < kSide; ++r) weight_at[r] += kWarps * 2 * kUnitThreads;
        const int numbers = p.per_channel ? 0 : kWarps * GROUPS * kStrip;
        scale_at += numbers, zero_at += numbers;
        if (ahead >= end) {
            ahead = begin + warp;
            ahead_tile += kSide;
            aim();
        }
    };
    aim();
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
        fetch(slot, 0);
        fetch(slot, 1);
        advance();
    }
    if (cut) {
        if (thread == 0) {
            for (int i = 0; i < 2; ++i) {
                ptx::barrier_init(&met[i], 1);
                ptx::barrier_expect(&met[i], items * sizeof(float4));
            }
            ptx::barrier_init_fence();
        }
        __syncwarp();
        ptx::cluster_arrive_relaxed();  // until the others' barriers are there
    }
    ptx::wait_for_predecessor();  // x and y may be another kernel's until here

    // ---- x of this warp's pairs ----
    unsigned char* const area = areas + warp * plan.warp_bytes;  // [pair][token][kRowBytes]
    float* const sums_of_x = reinterpret_cast<float*>(area + plan.window * p.m * kRowBytes);  // [pair][group][kTokens]
    const auto stage = [&](int first_pair, int pairs) {  // first_pair, + kWarps, ..: a group of copies each
        __syncwarp();
        for (int i = 0; i < pairs; ++i) {
            const int col = (first_pair + i * kWarps) * kPairK + lane % 16 * kPiece;
            const int there = max(min(p.k - col, kPiece), 0);  // what is behind K becomes 0
            for (int token = lane / 16; token < p.m; token += 2) {
                const T* from = x + token * p.x_stride + (there ? col : 0);
                unsigned char* to = area + (i * p.m + token) * kRowBytes + lane % 16 * 16;
                if (there % kPiece == 0) {
                    ptx::copy_async_or_zero(to, from, there > 0);
                } else {
#pragma unroll
                    for (int j = 0; j < kPiece; ++j) {
                        reinterpret_cast<uint16_t*>(to)[j] = j < there ? ptx::load_bits(from + j) : uint16_t{0};
                    }
                }
            }
            ptx::copy_async_commit();
        }
    };
    // Where this lane's row of an ldmatrix is: the low and the high half of these and the next 16 columns. Tokens that
    // are not there are as good as the last.
    const unsigned char* const x_lane = area + min(lane % 8, p.m - 1) * kRowBytes + lane / 8 * 16;

    float total[kSide][4];
    int slot = 0;
    // The product of a pair, the i-th of a window. fresh: its x is on the way, and its sums are not there yet.
    const auto multiply = [&](auto is_fresh, int i, int pairs) {
        constexpr bool kFresh = decltype(is_fresh)::value;
        constexpr int kGroupSteps = kSteps / GROUPS;
        const unsigned char* const x_pair = x_lane + i * p.m * kRowBytes;
        float part[kSide][4], sum[4];
        uint32_t four[4];
#pragma unroll
        for (int unit = 0; unit < 2; ++unit) {
            if (kFresh && i < kSlots) {  // weights came before x: let the x of later pairs, and what is newer, be
                wait_for_all_but<2 * kSlots - 1>(pairs - 1 + i + unit);
            } else {
                ptx::copy_async_wait<2 * kSlots - 1>();
            }
            __syncwarp();  // scales and x are other lanes'
            uint32_t words[kSide][4];
#pragma unroll
            for (int r = 0; r < kSide; ++r) {
                const uint4 w = ring[slot].weight[unit][r][thread];  // a tile that is not there: what lies in its slot
                words[r][0] = w.x, words[r][1] = w.y, words[r][2] = w.z, words[r][3] = w.w;
            }
#pragma unroll
            for (int word = 0; word < 4; ++word) {
                const int step = 4 * unit + word, group = step / kGroupSteps;
                if (step % 2 == 0) ptx::ldmatrix_x4(four, x_pair + step * 32);
                const uint32_t low = four[step % 2 * 2], high = four[step % 2 * 2 + 1];
                if (step % kGroupSteps == 0) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        sum[e] = 0.0f;
#pragma unroll
                        for (int r = 0; r < kSide; ++r) part[r][e] = 0.0f;
                    }
                }
#pragma unroll
                for (int r = 0; r < kSide; ++r) {
                    uint32_t a[4];
                    Raised<T>::fragment(a, words[r][word]);
                    ptx::mma_m16n8k16(part[r], a, {low, high}, T{});
                }
                if constexpr (kFresh) {
                    const uint32_t one = pack2(1.0f, 1.0f, T{}), ones[4] = {one, one, one, one};
                    ptx::mma_m16n8k16(sum, ones, {low, high}, T{});
                }
                if ((step + 1) % kGroupSteps != 0) continue;

                // The end of a group.
                float2* const at = reinterpret_cast<float2*>(&sums_of_x[(i * GROUPS + group) * kTokens + 2 * c]);
                if constexpr (kFresh) {
                    if (g == 0) *at = make_float2(sum[0], sum[1]);
                } else {
                    sum[0] = at->x, sum[1] = at->y;
                }
#pragma unroll
                for (int r = 0; r < kSide; ++r) {
                    const uint32_t two = ring[slot].scales[r][group][warp][g];
                    const float s[2] = {Magic<T>::low(two), Magic<T>::high(two)};
                    float offset[2] = {Raised<T>::kBase + kSymmetricZero, Raised<T>::kBase8 + kSymmetricZero};
                    if (zero) {
                        const uint32_t zeros = ring[slot].zeros[r][group][warp][g] >> (16 * (g % 2));
                        offset[0] = Raised<T>::kBase + static_cast<float>(zeros & 0xff);
                        offset[1] = Raised<T>::kBase8 + static_cast<float>(zeros >> 8 & 0xff);
                    }
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const float of_codes = __fmaf_rn(-offset[e / 2], sum[e % 2], part[r][e]);
                        total[r][e] = __fmaf_rn(s[e / 2], of_codes, total[r][e]);
                    }
                }
            }
            __syncwarp();
            fetch(slot, unit);
        }
        advance();
        slot = (slot + 1) % kSlots;
    };

    for (int tile = 0, turn = 0; tile < tiles; tile += kSide, ++turn) {
#pragma unroll
        for (int r = 0; r < kSide; ++r) total[r][0] = total[r][1] = total[r][2] = total[r][3] = 0.0f;
        for (int window = begin + warp; window < end; window += plan.window * kWarps) {
            const int pairs = min(plan.window, (end - window + kWarps - 1) / kWarps);
            if (plan.restage || tile == 0) {
                stage(window, pairs);
                for (int i = 0; i < pairs; ++i) multiply(std::true_type{}, i, pairs);
            } else {
                for (int i = 0; i < pairs; ++i) multiply(std::false_type{}, i, pairs);
            }
        }

        // Sum over the warps. Two places in turn: whoever writes to one again has seen everybody pass the barrier in
        // between.
        const int place = turn % 2 * (plan.places - 1), sums_at = plan.sums_at + place * plan.sums_bytes;
        __syncwarp();
        float* const mine = reinterpret_cast<float*>(area + sums_at);
#pragma unroll
        for (int r = 0; r < kSide; ++r) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int token = 2 * c + e % 2;
                if (token < p.m) mine[token * kSumsRow + r * kTile + g + e / 2 * 8] = total[r][e];
            }
        }
        __syncthreads();
        const int rows = min(tiles - tile, kSide) * kTile, first_n = (first_tile + tile) * kTile;
        const auto store = [&](int item, const float4& sum) {
            const int token = item / kItemsPerToken, row = item % kItemsPerToken * 4, n = first_n + row;
            if (row >= rows) return;
            T* to = y + static_cast<int64_t>(token) * p.n + n;
            float v[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (bias && n + i < p.n) v[i] += to_float(bias[n + i]);
            }
            if (p.n % 4 == 0) {
                if (n < p.n) {
                    *reinterpret_cast<uint2*>(to) = make_uint2(pack2(v[0], v[1], T{}), pack2(v[2], v[3], T{}));
                }
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (n + i < p.n) to[i] = from_float<T>(v[i]);
                }
            }
        };
        const auto add = [](float4& sum, const float4& v) { sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w; };
        if (cut && turn == 0) ptx::cluster_wait();
        for (int item = thread; item < items; item += kThreads) {
            const int token = item / kItemsPerToken, row = item % kItemsPerToken * 4;
            float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int w = 0; w < kWarps; ++w) {
                add(sum, *reinterpret_cast<const float4*>(areas + w * plan.warp_bytes + sums_at +
                                                          (token * kSumsRow + row) * sizeof(float)));
            }
            if (!cut) {
                store(item, sum);
            } else {
                const int to = item >= own_items;
                ptx::send(ptx::map_shared(&received[place * items + rank * own_items + item - to * own_items], to), sum,
                          ptx::map_shared(&met[place], to));
            }
        }
        if (cut) {  // nobody sends for a place again before this block has sent for the next one
            ptx::barrier_wait(&met[place], turn / 2 & 1);
            if (thread == 0) ptx::barrier_expect(&met[place], items * sizeof(float4));
            for (int item = thread; item < own_items; item += kThreads) {
                float4 sum = received[place * items + item];
                add(sum, received[place * items + own_items + item]);
                store(rank * own_items + item, sum);
            }
        }
    }
    ptx::copy_async_wait<0>();
#endif
}

// ---- host ----------------------------------------------------------------------------------------------------------

Problem problem_of(const LinearCall& call) {
    const int units = static_cast<int>(ceil_div(call.k, kUnitK));
    return {call.x_stride,
            static_cast<int>(call.m),
            static_cast<int>(call.n),
            static_cast<int>(call.k),
            units,
            (units + 1) / 2,
            static_cast<int>(tiled_groups(call.k, call.group_size)),
            static_cast<int>(ceil_div(call.n, kTile)),
            call.group_size < 0};
}

int groups_of(const LinearCall& call) { return call.group_size < 0 ? 1 : static_cast<int>(kPairK / call.group_size); }

// Blocks that share K, by times at 8 tokens (benchmarks/NOTES.md). 4096 x 4096 was not timed: there, cut, two blocks
// fit a multiprocessor (105 KB of shared memory each with groups of 128), and whole they do not (137 KB).
int splits_of(const Problem& p, int multiprocessors) {
    return p.k <= 4096 && 2 * ceil_div(p.n, kStrip) > multiprocessors ? 1 : 2;
}

struct Choice {
    Plan plan;
    int bytes;  // shared memory
};

// A launch where 1 or 2 blocks share K; bytes > most_bytes where shared memory holds not even one pair of x a warp.
Choice plan_of(const Problem& p, int multiprocessors, int splits, int groups, int most_bytes) {
    const int slot = kSide * (kThreads * 2 * 16 + groups * kWarps * 8 * 2 * 4);
    Choice c{};
    Plan& plan = c.plan;
    plan.cut = splits - 1;
    plan.row_blocks = std::max(1, std::min(p.tiles, multiprocessors / splits));
    const int tiles = (p.tiles + plan.row_blocks - 1) / plan.row_blocks;
    const int share = (p.pairs + splits - 1) / splits, pairs = (share + kWarps - 1) / kWarps;
    plan.sums_bytes = p.m * kSumsRow * 4;
    const auto fit = [&](int window) {
        plan.window = window;
        plan.restage = window < pairs;
        plan.places = tiles > kSide || plan.restage ? 2 : 1;
        const int x_bytes = static_cast<int>(ceil_div(window * (p.m * kRowBytes + groups * kTokens * 4), 16)) * 16;
        plan.sums_at = plan.places == 1 ? 0 : x_bytes;
        plan.warp_bytes = plan.places == 1 ? std::max(x_bytes, plan.sums_bytes) : x_bytes + 2 * plan.sums_bytes;
        c.bytes = kSlots * slot + kBarrierBytes + kWarps * plan.warp_bytes;
        if (plan.cut) c.bytes += plan.places * p.m * kItemsPerToken * 16;
        return c.bytes <= most_bytes;
    };
    int window = pairs;
    while (!fit(window) && window > 1) --window;
    return c;
}

template <typename T, int GROUPS>
void launch(const LinearCall& call, const Problem& p, const Choice& choice, cudaStream_t stream) {
    constexpr auto kernel = linear_mma_kernel<T, GROUPS>;
    static_assert(sizeof(Slot<GROUPS>) == kSide * (kThreads * 2 * 16 + GROUPS * kWarps * 8 * 2 * 4));
    allow_shared_memory<kernel>("linear_w4a16");
    const unsigned splits = choice.plan.cut + 1;
    launch_programmatic("linear_w4a16", kernel, dim3(choice.plan.row_blocks * splits), kThreads, choice.bytes, splits,
                        9, stream, static_cast<const T*>(call.x), reinterpret_cast<const uint4*>(call.qweight),
                        static_cast<const T*>(call.scale), call.zero, static_cast<const T*>(call.bias),
                        static_cast<T*>(call.y), p, choice.plan);
}

template <typename T>
void linear_mma_of(const LinearCall& call, int variant, cudaStream_t stream) {
    require(call.m <= kTokens, "linear_w4a16: M=" + std::to_string(call.m) + " is more than the 8 tokens of tokens=-8");
    require(call.x_stride % 8 == 0 && reinterpret_cast<uintptr_t>(call.x) % 16 == 0,
            "linear_w4a16: rows of x must begin at multiples of 16 bytes");
    require(variant == -1 || variant == 1 || variant == 2,
            "linear_w4a16: variant=" + std::to_string(variant) + " must be 1 or 2 blocks that share K, or -1");
    constexpr int kMostBytes = 226 << 10;  // of a block on Hopper, 1 KB less than there is
    const Problem p = problem_of(call);
    const int multiprocessors = current_device().multiprocessors, groups = groups_of(call);
    const int splits = variant > 0 ? variant : splits_of(p, multiprocessors);
    const Choice choice = plan_of(p, multiprocessors, splits, groups, kMostBytes);
    switch (groups) {
        case 4:
            return launch<T, 4>(call, p, choice, stream);
        case 2:
            return launch<T, 2>(call, p, choice, stream);
        default:
            return launch<T, 1>(call, p, choice, stream);
    }
}

}  // namespace
}  // namespace pyquant
