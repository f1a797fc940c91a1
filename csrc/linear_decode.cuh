// linear_w4a16 for few tokens (M <= 8 a pass): y [M, N] = x [M, K] w_hat^T + bias, w_hat = (code - zero) * scale.
//
// The problem is transposed: the weight is the A operand (tiles of 16 rows), x is the B operand, and both are integers:
// codes 0..15 as they are, x as fixed point. Within 128 columns of a token, x = 2^(e - 14) * v with |v| < 2^15 and e
// the exponent of the largest of them; v = 256 high + low is two columns of 8-bit integers. The product is exact in
// int32 (mma.m16n8k32), then becomes fp32 once a group:
//
//     y[m, n] = sum over groups of  scale[n] 2^(e - 14) ( sum(code * v) - zero[n] sum(v) )
//
// sum(v) is one more row of the same product, codes times a tile of ones. The weight is never rounded; x is rounded to
// 2^-15 of the largest of its 128 neighbours, where bf16 itself keeps 2^-8 of each value. Why integers: to unpack 8
// codes takes 3 instructions instead of the 7 of the bit trick for bf16, and these instructions are what binds (half
// rate).
//
//              pairs of units (128 columns) ->             a block owns whole rows where it can: no sum leaves it
//   tile 0     w0  w1  w2 .. w15 w0  w1 ..                 16 warps share the columns, a pair each in turn, and each
//   tile 1     w0  w1  w2 .. w15 w0  w1 ..                 converts the x of its own pairs: they meet only where
//   then the next two tiles of the block                   the partial sums of two tiles are added up
//
// Built for a chain of calls. The grid is one block a multiprocessor with half of its shared memory and registers, so
// that the next kernel's blocks move in beside the running ones (programmatic launch) and fill their rings of weights
// before x exists. x is read only after the predecessor has ended, past L1. That is right because weights are never
// written by a kernel that lets its successor start early. Each thread copies its own 32 bytes a tile into its own
// slots (cp.async): no barrier guards the ring.
//
// Where whole rows would leave multiprocessors idle, or x would not fit, a cluster of 2, 4 or 8 blocks shares the
// columns and adds up through distributed shared memory in a fixed order. One launch, no workspace, no atomics, the
// same bits every time. GPUs before sm_90 have no clusters: there the cluster is one block.
//
// NaN and infinity in x make every output of that token NaN.
//
// Tried and lost: benchmarks/NOTES.md.
#pragma once

#include <algorithm>

#include "ops.h"
#include "pieces.cuh"
#include "programmatic.cuh"

namespace pyquant {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kTile = 16;  // rows of a fragment
constexpr int kTiles = 2;  // tiles that a warp takes side by side
constexpr int kTilesPerStrip = kStrip / kTile;
constexpr int kPairK = 2 * kUnitK;                           // 128 columns
constexpr int kTileThreads = kUnitThreads / kTilesPerStrip;  // threads whose 16 bytes make a tile of a unit
constexpr int kSlots = 2;                                    // pairs on their way for each warp: 64 KB a block
constexpr int kSumPad = 4;                                   // floats between tokens of partial sums: no bank conflicts
constexpr int kSmallBlock = 113 << 10;                       // shared memory of a block that leaves room for another

struct Problem {
    int64_t x_stride;
    int m, n, k, units, pairs, groups, tiles;  // units = padded K / 64, pairs of them (the last may be half)
};

// How a launch is cut up.
struct Plan {
    int row_blocks;  // blocks along N, each its share of the tiles
    int log_splits;  // blocks of a cluster, along K
    int window;      // pairs of a warp whose x is in shared memory at once
    bool restage;    // that is not all of them
};

// A pair of each warp on its way. Weights have a thread's own places; a scale is brought by one lane for the four that
// need it.
template <int GROUPS, bool ZERO>
struct Slot {
    uint4 weight[2][kTiles][kThreads];                    // [unit][tile]
    uint32_t scale[kTiles][GROUPS][kWarps][8];            // the scales of rows g and g + 8
    uint32_t zero[ZERO ? kTiles : 0][GROUPS][kWarps][8];  // 4 neighbours, 2 of them of rows g and g + 8
};

// Shared memory behind the ring: partial sums, then x of each warp: for each pair of its window the fixed-point columns
// of `tokens` tokens (a power of two), 256 bytes each, and their exponents' powers of two.
__host__ __device__ constexpr int sums_row() { return kTiles * kTile + kSumPad; }
__host__ __device__ constexpr int sums_bytes(int live) { return 2 * kWarps * live * sums_row() * 4; }
__host__ __device__ constexpr int x_bytes(int tokens, int pairs) {
    return (pairs * tokens * (2 * kPairK + 4) + 15) / 16 * 16;
}

// 8 neighbours of x's row from column col on, zeros outside [0, K). Past L1, where an older x may lie.
template <typename T>
__device__ __forceinline__ uint4 load_x(const T* __restrict__ row, const Problem& p, int col, bool vectors) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (col >= p.k) return v;
    if (vectors) return ptx::load16(row + col);
    unsigned short* parts = reinterpret_cast<unsigned short*>(&v);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (col + i < p.k) parts[i] = ptx::load_bits(row + col + i);
    }
    return v;
}

// The 16 columns of step `step` (0..7) of a pair, of one token, to fixed point: 8 words, byte b of word c + 4 * part
// holding the high (part 0) or low (1) byte of column 2 c + 8 (b % 2) + b / 2: the order of a word of codes. The 8
// lanes that hold a pair agree on its exponent; returned is 2^(e - 14), NaN where x has no finite maximum.
template <typename T>
__device__ __forceinline__ float to_fixed(uint32_t (&words)[8], const uint4 (&x)[2]) {
    const uint32_t two[8] = {x[0].x, x[0].y, x[0].z, x[0].w, x[1].x, x[1].y, x[1].z, x[1].w};
    float v[16];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        v[2 * i] = Magic<T>::low(two[i]), v[2 * i + 1] = Magic<T>::high(two[i]);
    }
    uint32_t bits = 0;  // as integers, NaN is larger than infinity, and that larger than any number
#pragma unroll
    for (int i = 0; i < 16; ++i) bits = max(bits, __float_as_uint(v[i]) & 0x7fffffff);
#pragma unroll
    for (int lane = 1; lane < 8; lane *= 2) bits = max(bits, __shfl_xor_sync(0xffffffff, bits, lane));
    // One up where the largest is above 1.99 2^e: value + 128 must stay below 2^15. Below 2^-111 the step stays as it
    // is.
    const uint32_t exponent = max((bits + 0x10000) >> 23, 16u);
    const float inverse = __uint_as_float((268 - exponent) << 23);
#pragma unroll
    for (int i = 0; i < 16; ++i) v[i] = __fmaf_rn(v[i], inverse, 12582912.0f + 128.0f);  // low 16 bits: value + 128
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        const uint32_t even = __byte_perm(__float_as_uint(v[2 * c]), __float_as_uint(v[2 * c + 8]), 0x5140);
        const uint32_t odd = __byte_perm(__float_as_uint(v[2 * c + 1]), __float_as_uint(v[2 * c + 9]), 0x5140);
        words[c] = __byte_perm(even, odd, 0x7632);
        words[4 + c] = __byte_perm(even, odd, 0x5410) ^ 0x80808080;
    }
    return bits >= 0x7f800000 ? __uint_as_float(0x7fffffff) : __uint_as_float((exponent - 14) << 23);
}

// NT: tiles of 8 columns of the product, 4 tokens each. GROUPS: groups of scales in a pair.
template <typename T, int NT, int GROUPS, bool PER_CHANNEL, bool ZERO>
__global__ void __launch_bounds__(kThreads, 2)
    decode_kernel(const T* __restrict__ x, const uint4* __restrict__ qweight, const T* __restrict__ scale,
                  const uint8_t* __restrict__ zero, const T* __restrict__ bias, T* __restrict__ y, const Problem p,
                  const Plan plan, bool vectors) {
    using S = Slot<GROUPS, ZERO>;
    extern __shared__ __align__(16) unsigned char memory[];
    S* const ring = reinterpret_cast<S*>(memory);

    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, c = lane % 4;
    const int splits = 1 << plan.log_splits, split = blockIdx.x & (splits - 1), block = blockIdx.x >> plan.log_splits;
    const int first_m = blockIdx.y * 4 * NT, live = min(p.m - first_m, 4 * NT);
    const int log_tokens = live <= 1 ? 0 : live <= 2 ? 1 : live <= 4 ? 2 : 3, tokens = 1 << log_tokens;
    const int share = (p.pairs + splits - 1) >> plan.log_splits;
    const int begin = min(split * share, p.pairs), end = min(begin + share, p.pairs);
    const int first_tile = static_cast<int>(static_cast<int64_t>(block) * p.tiles / plan.row_blocks);
    const int tiles = static_cast<int>(static_cast<int64_t>(block + 1) * p.tiles / plan.row_blocks) - first_tile;
    float* const sums = reinterpret_cast<float*>(memory + kSlots * sizeof(S));  // [2][warps][live][sums_row]
    unsigned char* const x_words = memory + kSlots * sizeof(S) + sums_bytes(live) + warp * x_bytes(tokens, plan.window);
    float* const x_power = reinterpret_cast<float*>(x_words + plan.window * tokens * 2 * kPairK);  // [pair][token]
    ptx::launch_dependents();
#if __CUDA_ARCH__ >= 900
    __shared__ uint64_t written[2], read[2];  // the two places for partial sums, by turns
    if (thread == 0) {
        for (int i = 0; i < 2; ++i) ptx::barrier_init(&written[i], kWarps), ptx::barrier_init(&read[i], live);
        ptx::barrier_init_fence();
    }
    __syncthreads();
#endif

    // ---- what is fetched next: pair `ahead` of tiles `ahead_tile`, `ahead_tile` + 1 of this block ----
    int ahead = begin + warp, ahead_tile = ahead < end ? 0 : tiles;
    const uint4* weight_at[kTiles];  // of pair `ahead`
    uint32_t scale_at[kTiles];       // of column 0
    const auto aim = [&] {
#pragma unroll
        for (int r = 0; r < kTiles; ++r) {
            const uint32_t tile = first_tile + ahead_tile + r, strip = tile / kTilesPerStrip,
                           within = tile % kTilesPerStrip;
            weight_at[r] = qweight + (static_cast<uint64_t>(strip) * p.units + 2 * ahead) * kUnitThreads +
                           within * kTileThreads + lane;
            scale_at[r] = strip * p.groups * kStrip + 2 * (8 * within + g);
        }
    };
    const auto fetch = [&](int slot, int unit) {
#pragma unroll
        for (int r = 0; r < kTiles; ++r) {
            if (ahead_tile + r < tiles) {
                if (unit == 0 || 2 * ahead + 1 < p.units) {
                    ptx::copy_async<16>(&ring[slot].weight[unit][r][thread], weight_at[r] + unit * kUnitThreads);
                }
#pragma unroll
                for (int i = unit * GROUPS / 2; i < (unit + 1) * GROUPS / 2; ++i) {  // groups that end in this unit
                    const int group = PER_CHANNEL ? 0 : ahead * GROUPS + i;
                    if (c != 0) continue;
                    if (GROUPS == 1 || group < p.groups) {
                        const uint32_t at = scale_at[r] + group * kStrip;
                        ptx::copy_async<4>(&ring[slot].scale[r][i][warp][g], scale + at);
                        if constexpr (ZERO) ptx::copy_async<4>(&ring[slot].zero[r][i][warp][g], zero + (at & ~3u));
                    } else {
                        ring[slot].scale[r][i][warp][g] = 0;  // x is 0 there, but what lies in the slot may be NaN
                    }
                }
            }
        }
        ptx::copy_async_commit();
    };
    const auto advance = [&] {
        ahead += kWarps;
#pragma unroll
        for (int r = 0; r < kTiles; ++r) weight_at[r] += kWarps * 2 * kUnitThreads;
        if (ahead >= end) {
            ahead = begin + warp;
            ahead_tile += kTiles;
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
    ptx::wait_for_predecessor();  // x and y may be another kernel's until here

    // Where column g of the product finds its words of a pair: [token][high, low][c, swizzled by the pair][step].
    const int column = (g & (2 * tokens - 1)) * kPairK;
    const auto convert = [&](int first_pair, int pairs) {  // x of this warp's pairs first_pair, + kWarps, ..
        __syncwarp();
        for (int task = lane; task / 32 * 32 < pairs * tokens * 8; task += 32) {  // 16 columns each; whole warps
            const int step = task % 8, token = task / 8 & (tokens - 1), i = task / 8 >> log_tokens;
            const bool there = i < pairs && token < live;
            uint4 piece[2] = {};
            if (there) {
                const int col = (first_pair + i * kWarps) * kPairK + step * 16;
                const T* row = x + (first_m + token) * p.x_stride;
                piece[0] = load_x(row, p, col, vectors), piece[1] = load_x(row, p, col + 8, vectors);
            }
            uint32_t words[8];
            const float power = to_fixed<T>(words, piece);
            if (there) {
                unsigned char* to = x_words + (i * tokens + token) * 2 * kPairK + step * 4;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    *reinterpret_cast<uint32_t*>(to + (j ^ (i & 3)) * 32) = words[j];
                    *reinterpret_cast<uint32_t*>(to + kPairK + (j ^ (i & 3)) * 32) = words[4 + j];
                }
                if (step == 0) x_power[i * tokens + token] = power;
            }
        }
        __syncwarp();
    };

    int slot = 0, turn = 0;
    for (int tile = 0; tile < tiles; tile += kTiles, ++turn) {
        float total[kTiles][NT][2] = {};
        for (int window = begin + warp; window < end; window += plan.window * kWarps) {
            const int pairs = min(plan.window, (end - window + kWarps - 1) / kWarps);
            if (plan.restage || tile == 0) convert(window, pairs);
            for (int i = 0; i < pairs; ++i) {
                int part[kTiles][NT][4] = {}, sum_x[NT][4] = {};
                float power[NT];
#pragma unroll
                for (int t = 0; t < NT; ++t) power[t] = x_power[i * tokens + ((4 * t + c) & (tokens - 1))];
#pragma unroll
                for (int unit = 0; unit < 2; ++unit) {
                    ptx::copy_async_wait<2 * kSlots - 1>();
                    __syncwarp();  // the scales are another lane's
                    uint32_t b[NT][4];
#pragma unroll
                    for (int t = 0; t < NT; ++t) {
                        const uint4 four = *reinterpret_cast<const uint4*>(x_words + (i * tokens * 2 + t * 8) * kPairK +
                                                                           column + (c ^ (i & 3)) * 32 + unit * 16);
                        b[t][0] = four.x, b[t][1] = four.y, b[t][2] = four.z, b[t][3] = four.w;
                    }
#pragma unroll
                    for (int half = 0; half < 2; ++half) {  // 32 columns
#pragma unroll
                        for (int t = 0; t < NT; ++t) {
                            const uint32_t ones[4] = {0x01010101, 0x01010101, 0x01010101, 0x01010101};
                            ptx::mma_m16n8k32(sum_x[t], ones, {b[t][2 * half], b[t][2 * half + 1]});
                        }
#pragma unroll
                        for (int r = 0; r < kTiles; ++r) {  // a tile that is not there multiplies what lies in its slot
                            const uint2 words =
                                reinterpret_cast<const uint2*>(&ring[slot].weight[unit][r][thread])[half];
                            const uint32_t a[4] = {words.x & 0x0f0f0f0f, words.x >> 4 & 0x0f0f0f0f,
                                                   words.y & 0x0f0f0f0f, words.y >> 4 & 0x0f0f0f0f};
#pragma unroll
                            for (int t = 0; t < NT; ++t) {
                                ptx::mma_m16n8k32(part[r][t], a, {b[t][2 * half], b[t][2 * half + 1]});
                            }
                        }
                        const int quarter = 2 * unit + half;
                        if ((quarter + 1) * GROUPS % 4 != 0) continue;
                        const int group = quarter * GROUPS / 4;  // its last columns
#pragma unroll
                        for (int r = 0; r < kTiles; ++r) {
                            const uint32_t two = ring[slot].scale[r][group][warp][g];
                            const float s[2] = {Magic<T>::low(two), Magic<T>::high(two)};
                            int z[2] = {kSymmetricZero, kSymmetricZero};
                            if constexpr (ZERO) {
                                const uint32_t zeros = ring[slot].zero[r][group][warp][g] >> (16 * (g % 2));
                                z[0] = zeros & 0xff, z[1] = zeros >> 8 & 0xff;
                            }
#pragma unroll
                            for (int t = 0; t < NT; ++t) {
                                const int sum = 256 * sum_x[t][0] + sum_x[t][1];
#pragma unroll
                                for (int h = 0; h < 2; ++h) {
                                    const int value = 256 * part[r][t][2 * h] + part[r][t][2 * h + 1] - z[h] * sum;
                                    total[r][t][h] += s[h] * power[t] * static_cast<float>(value);
                                    part[r][t][2 * h] = part[r][t][2 * h + 1] = 0;
                                }
                            }
                        }
#pragma unroll
                        for (int t = 0; t < NT; ++t) sum_x[t][0] = sum_x[t][1] = sum_x[t][2] = sum_x[t][3] = 0;
                    }
                    __syncwarp();
                    fetch(slot, unit);
                }
                advance();
                slot = slot + 1 == kSlots ? 0 : slot + 1;
            }
        }

        // Sum over the warps: element (row, token) of warp w at here[(w * live + token) * sums_row + row]. One warp a
        // token adds up; the others go on, and write to the other of two places.
        float* const here = sums + turn % 2 * kWarps * live * sums_row();
#if __CUDA_ARCH__ >= 900
        if (turn >= 2) ptx::barrier_wait(&read[turn % 2], turn / 2 - 1 & 1);
#endif
#pragma unroll
        for (int r = 0; r < kTiles; ++r) {
#pragma unroll
            for (int t = 0; t < NT; ++t) {
                float* to = here + (warp * live + 4 * t + c) * sums_row() + r * kTile + g;
                if (4 * t + c < live) to[0] = total[r][t][0], to[8] = total[r][t][1];
            }
        }
        const int token = (warp + kWarps - turn * live % kWarps) % kWarps, row = lane;  // warps take turns
#if __CUDA_ARCH__ >= 900
        __syncwarp();
        if (lane == 0) ptx::barrier_arrive(&written[turn % 2]);
        if (token < live || splits > 1) ptx::barrier_wait(&written[turn % 2], turn / 2 & 1);
#else
        __syncthreads();  // whoever writes here again has seen everybody pass the barrier in between
#endif
        const int rows = min(tiles - tile, kTiles) * kTile, first_n = (first_tile + tile) * kTile;
        const auto store = [&](int token, int row, float sum) {
            const int n = first_n + row;
            if (n < p.n) {
                y[static_cast<int64_t>(first_m + token) * p.n + n] =
                    from_float<T>(bias ? sum + to_float(bias[n]) : sum);
            }
        };
        if (token < live) {
            float* at = here + token * sums_row() + row;
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) sum += at[w * live * sums_row()];
            if (splits > 1) {
                *at = sum;  // read by this thread alone until now
            } else if (row < rows) {
                store(token, row, sum);
            }
#if __CUDA_ARCH__ >= 900
            __syncwarp();
            if (lane == 0) ptx::barrier_arrive(&read[turn % 2]);
#endif
        }
#if __CUDA_ARCH__ >= 900
        if (splits > 1) {  // block `split` of the cluster adds up and writes its share of the elements
            __syncwarp();
            ptx::cluster_sync();
            const int part = (rows * live + splits - 1) >> plan.log_splits;
            const int stop = min((split + 1) * part, rows * live);
            for (int i = split * part + thread; i < stop; i += kThreads) {
                const float* at = here + i / rows * sums_row() + i % rows;
                float parts[8];
#pragma unroll
                for (int rank = 0; rank < 8; ++rank) {
                    parts[rank] = rank < splits ? ptx::load_cluster(ptx::map_shared(at, rank)) : 0.0f;
                }
                float sum = 0.0f;
#pragma unroll
                for (int rank = 0; rank < 8; ++rank) sum += parts[rank];
                store(i / rows, i % rows, sum);
            }
            __syncwarp();
            ptx::cluster_sync_relaxed();  // nobody leaves, or writes again, while its sums are being read
        }
#endif
    }
    ptx::copy_async_wait<0>();
}

// The split that moves the fewest bytes through the busiest multiprocessor: weights, and x, whose conversion costs as
// much as reading about twice its size, for every pass over it; adding up a cluster costs as much as about 90 KB, and a
// block that leaves no room for the next kernel as much as 40. force_splits > 0 takes that many.
struct Choice {
    Plan plan;
    int bytes;  // shared memory
};

Choice choose(const Problem& p, const Device& device, int most_bytes, int slot_bytes, int force_splits,
              int most_tokens) {
    Choice best{};
    double least = 0;
    const int live = std::min(p.m, most_tokens), tokens = live <= 1 ? 1 : live <= 2 ? 2 : live <= 4 ? 4 : 8;
    for (int log = 0; log <= (device.major >= 9 ? 3 : 0); ++log) {
        const int splits = 1 << log, share = (p.pairs + splits - 1) / splits;
        if (force_splits > 0 ? splits != force_splits : log > 0 && share < 2) continue;
        Choice c{};
        c.plan.log_splits = log;
        c.plan.row_blocks = std::max(1, std::min(p.tiles, device.multiprocessors / splits));
        const int tiles = (p.tiles + c.plan.row_blocks - 1) / c.plan.row_blocks, passes = (tiles + kTiles - 1) / kTiles;
        const int pairs = (share + kWarps - 1) / kWarps;
        const auto bytes_of = [&](int window) {
            return kSlots * slot_bytes + sums_bytes(live) + kWarps * x_bytes(tokens, window);
        };
        c.plan.window = pairs;
        while (c.plan.window > 1 && bytes_of(c.plan.window) > most_bytes) --c.plan.window;
        c.plan.restage = c.plan.window < pairs;
        c.bytes = bytes_of(c.plan.window);
        const double reads = 2.0 * share * live * 2 * kPairK * (c.plan.restage ? passes : 1);
        const double bytes = static_cast<double>(share) * tiles * 1056 + reads + (log > 0 ? 90e3 * passes : 0) +
                             (c.bytes > kSmallBlock ? 40e3 : 0);
        if (least == 0 || bytes < least) least = bytes, best = c;
    }
    require(least > 0,
            "linear_w4a16: splits=" + std::to_string(force_splits) + " must be 1, 2, 4 or 8, and 1 before sm_90");
    return best;
}

template <typename T, int NT, int GROUPS, bool PER_CHANNEL, bool ZERO>
void launch(const LinearCall& call, const Problem& p, int force_splits, cudaStream_t stream) {
    constexpr auto kernel = decode_kernel<T, NT, GROUPS, PER_CHANNEL, ZERO>;
    constexpr int slot_bytes = sizeof(Slot<GROUPS, ZERO>);
    const Device device = current_device();
    const int most_bytes = allow_shared_memory<kernel>("linear_w4a16");
    const Choice choice = choose(p, device, most_bytes, slot_bytes, force_splits, 4 * NT);
    const int64_t passes = ceil_div(p.m, 4 * NT);
    require(passes <= 65535, "linear_w4a16: M=" + std::to_string(p.m) + " is too large for one launch");
    const dim3 grid(static_cast<unsigned>(choice.plan.row_blocks << choice.plan.log_splits),
                    static_cast<unsigned>(passes));
    const bool vectors = p.k % 8 == 0 && p.x_stride % 8 == 0 && reinterpret_cast<uintptr_t>(call.x) % 16 == 0;
    launch_programmatic("linear_w4a16", kernel, grid, kThreads, choice.bytes, 1u << choice.plan.log_splits,
                        device.major, stream, static_cast<const T*>(call.x),
                        reinterpret_cast<const uint4*>(call.qweight), static_cast<const T*>(call.scale), call.zero,
                        static_cast<const T*>(call.bias), static_cast<T*>(call.y), p, choice.plan, vectors);
}

template <typename T>
void linear_decode_of(const LinearCall& call, int force_splits, cudaStream_t stream) {
    const int units = static_cast<int>(ceil_div(call.k, kUnitK));
    const Problem p{call.x_stride,
                    static_cast<int>(call.m),
                    static_cast<int>(call.n),
                    static_cast<int>(call.k),
                    units,
                    (units + 1) / 2,
                    static_cast<int>(tiled_groups(call.k, call.group_size)),
                    static_cast<int>(ceil_div(call.n, kTile))};
    const auto with_zero = [&](auto zeros) {
        constexpr bool kZero = decltype(zeros)::value;
        const auto with_group = [&](auto columns) {
            constexpr int kNT = decltype(columns)::value;
            switch (call.group_size) {
                case 32:
                    return launch<T, kNT, 4, false, kZero>(call, p, force_splits, stream);
                case 64:
                    return launch<T, kNT, 2, false, kZero>(call, p, force_splits, stream);
                case 128:
                    return launch<T, kNT, 1, false, kZero>(call, p, force_splits, stream);
                default:
                    return launch<T, kNT, 1, true, kZero>(call, p, force_splits, stream);
            }
        };
        p.m <= 4 ? with_group(std::integral_constant<int, 1>{}) : with_group(std::integral_constant<int, 2>{});
    };
    call.zero ? with_zero(std::true_type{}) : with_zero(std::false_type{});
}

}  // namespace
}  // namespace pyquant
