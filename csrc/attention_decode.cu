// attention_decode: one new token a sequence. Rotates its queries and key, appends key and value to the cache, attends
// over the cache, in one launch.
//
//   qkv      [B, (Hq + 2 Hkv) D]  the new token's projections, heads q | k | v, any row stride
//   k_cache, v_cache [B, Hkv, S, D]  strides of B, Hkv and S free (the same for both), D contiguous
//   slot     int32 [B]  where the new token goes; it attends to slots start[b] .. slot[b]
//   start    int32 [B]  the first slot in use (left padding lies before it); the token's position is slot - start
//   cos, sin fp32 [P, D/2]  rotary tables            out [B, Hq D] contiguous
//
// A block serves one KV head of one sequence with the G = Hq / Hkv query heads that share it, so the cache is read
// once, and a share of the context; the blocks of a cluster split the context. Each of its 4 warps takes every fourth
// tile of 16 slots:
//
//             slots ->  16   16   16   16   16   16   16   16          warp w's ring of tiles (K and V) in shared
//   block 0             w0   w1   w2   w3   w0   w1                    memory is filled by its own cp.async: no block
//   block 1                                           w0   w1 ...      barrier in the loop
//
// Both products put the cache in the A operand and the heads in the 8 columns of B, so that no row is wasted on missing
// heads: S^T [16 slots, 8 heads] = K Q^T, and O^T [D, 8 heads] += V^T P^T. A tile of S^T becomes the B operand of the
// second product by one transpose in registers. Softmax runs in base 2 with a running maximum a head.
//
// Partial results meet in shared memory, those of the blocks of a cluster through distributed shared memory, in a fixed
// order: no workspace, no atomics, the same bits every time. Below sm_90 there are no clusters: one block a head.
//
// Bound by memory: 4 D bytes a slot and KV head. With few sequences latency counts, so the cache may be read early:
// `early` promises that slot, start, the tables, and the cache before the new token are final since before the kernel
// ahead of this one began (true inside a decode step, where only qkv is new); the kernel then fetches its first tiles
// before it waits. Without the promise it waits first.
#include <algorithm>
#include <cmath>

#include "ops.h"
#include "programmatic.cuh"
#include "rope.cuh"

namespace pyquant {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kTile = 16;  // slots
constexpr int kMaxSplits = 8;
constexpr float kNothing = -INFINITY;

template <typename T>
struct Step {
    const T* qkv;
    int64_t qkv_stride;
    const float *cos, *sin;
    T *k_cache, *v_cache;
    int64_t batch_stride, head_stride, slot_stride;
    const int *slot, *start;
    const T *q_norm, *k_norm;  // null: no norm
    T* out;
    float eps, scale;  // scale includes log2(e)
    int positions, heads, kv_heads, capacity, window;
    bool early;
};

template <typename T, int D, int TILES>
struct Shared {
    static constexpr int kHeads = 8 * TILES;
    static constexpr int kRow = D + 8;  // elements from a row to the next: ldmatrix without bank conflicts
    static constexpr int kStages = D > 128 ? 1 : 2;
    static constexpr int kSumRow = D + 4;
    union {
        T tiles[kWarps][kStages][2][kTile][kRow];  // K and V
        float sums[kWarps][kHeads][kSumRow];       // O of each warp, once the tiles are used up
    };
    T q[kHeads][kRow];
    T fresh[2][D];  // the new token's key and value
    float most[kWarps][kHeads], total[kWarps][kHeads];
    float block_most[kHeads], block_total[kHeads];
};

// What a block works on.
struct Share {
    int first, last;  // slots that are attended to, both included
    int begin, end;   // tiles of this block
    int fresh;        // the tile with the new token
};

__device__ __forceinline__ Share share_of(int slot, int start, int window, int capacity, int split, int splits) {
    Share s;
    s.last = min(slot, capacity - 1);
    s.first = max(start, 0);
    if (window > 0) s.first = max(s.first, slot - window + 1);
    const int lowest = s.first / kTile, tiles = s.last < s.first ? 0 : s.last / kTile - lowest + 1;
    const int each = (tiles + splits - 1) / splits;
    s.begin = lowest + min(split * each, tiles);
    s.end = lowest + min((split + 1) * each, tiles);
    s.fresh = slot < capacity ? s.last / kTile : -1;
    return s;
}

// Slots of a tile to shared memory by one warp; zeros where the cache is not attended to or not yet written.
template <typename T, int D, typename S>
__device__ __forceinline__ void fetch(S& shared, const T* k, const T* v, int64_t slot_stride, const Share& share,
                                      int tile, int stage, int warp, int lane, int slot) {
    constexpr int kPieces = D / kPiece;
#pragma unroll
    for (int i = lane; i < kTile * kPieces; i += 32) {
        const int row = i / kPieces, col = i % kPieces * kPiece, at = tile * kTile + row;
        const bool wanted = at >= share.first && at <= share.last && at < slot;
        const int64_t offset = wanted ? at * slot_stride + col : 0;
        ptx::copy_async_or_zero(&shared.tiles[warp][stage][0][row][col], k + offset, wanted);
        ptx::copy_async_or_zero(&shared.tiles[warp][stage][1][row][col], v + offset, wanted);
    }
}

template <typename T, int D, int TILES>
__global__ void __launch_bounds__(kThreads) attention_kernel(Step<T> step) {
    using S = Shared<T, D, TILES>;
    extern __shared__ __align__(16) unsigned char memory[];
    S& shared = *reinterpret_cast<S*>(memory);
    ptx::launch_dependents();

    const int splits = gridDim.x, split = blockIdx.x, kv_head = blockIdx.y, batch = blockIdx.z;
    const int group = step.heads / step.kv_heads;
    const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);  // one value a warp, as the compiler then knows
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    T* const k_cache = step.k_cache + batch * step.batch_stride + kv_head * step.head_stride;
    T* const v_cache = step.v_cache + batch * step.batch_stride + kv_head * step.head_stride;
    for (int i = threadIdx.x; i < S::kHeads * S::kRow; i += kThreads) shared.q[0][i] = from_float<T>(0.0f);

    if (!step.early) ptx::wait_for_predecessor();
    const int slot = ptx::load_int(step.slot + batch), start = ptx::load_int(step.start + batch);
    const Share share = share_of(slot, start, step.window, step.capacity, split, splits);
#pragma unroll
    for (int stage = 0; stage < S::kStages; ++stage) {
        const int tile = share.begin + warp + stage * kWarps;
        if (tile < share.end) {
            fetch<T, D>(shared, k_cache, v_cache, step.slot_stride, share, tile, stage, warp, lane, slot);
        }
        ptx::copy_async_commit();
    }
    const int position = min(max(slot - start, 0), step.positions - 1);
    const int head_lane = lane % kHeadLanes;
    const Angles angles = load_angles<D>(step.cos, step.sin, position, head_lane);
    if (step.early) ptx::wait_for_predecessor();
    __syncthreads();  // q is cleared

    // Heads by half warps: `group` queries, then the key and the value where this block holds the new token.
    const bool owner = share.begin <= share.fresh && share.fresh < share.end;
    const int items = group + (owner ? 2 : 0);
    for (int first = 2 * warp; first < items; first += kThreads / kHeadLanes) {
        const int item = first + lane / kHeadLanes;
        const bool is_q = item < group, is_k = item == group, is_v = item == group + 1;
        const int head = is_q ? kv_head * group + item : step.heads + (is_v ? step.kv_heads : 0) + kv_head;
        const bool wanted = item < items;
        HeadSlice slice =
            load_head<T, D>(step.qkv + batch * step.qkv_stride + static_cast<int64_t>(head) * D, head_lane, wanted);
        if (step.q_norm) {
            HeadSlice normed = slice;
            norm_head<T, D>(normed, is_q ? step.q_norm : step.k_norm, step.eps, head_lane);
            if (!is_v) slice = normed;
        }
        if (!is_v) rotate(slice, angles);
        if (!wanted) continue;
        if (is_q) {
            store_head<T, D>(shared.q[item], head_lane, slice);
        } else {
            store_head<T, D>(shared.fresh[is_k ? 0 : 1], head_lane, slice);
            store_head<T, D>((is_k ? k_cache : v_cache) + slot * step.slot_stride, head_lane, slice);
        }
    }
    __syncthreads();

    float most[TILES][2], total[TILES][2] = {}, sums[TILES][D / 16][4] = {};  // of heads 2c and 2c + 1
#pragma unroll
    for (int t = 0; t < TILES; ++t) most[t][0] = most[t][1] = kNothing;
    int stage = 0;
    for (int tile = share.begin + warp; tile < share.end; tile += kWarps) {
        ptx::copy_async_wait<S::kStages - 1>();
        __syncwarp();
        T(&k)[kTile][S::kRow] = shared.tiles[warp][stage][0];
        T(&v)[kTile][S::kRow] = shared.tiles[warp][stage][1];
        if (tile == share.fresh) {
            const int row = slot % kTile;
            for (int i = lane; i < D; i += 32) {
                k[row][i] = shared.fresh[0][i];
                v[row][i] = shared.fresh[1][i];
            }
            __syncwarp();
        }

        float score[TILES][4] = {};  // slots g (0, 1) and g + 8 (2, 3) of heads 2c (0, 2) and 2c + 1 (1, 3)
#pragma unroll
        for (int d = 0; d < D; d += 16) {
            uint32_t a[4];
            ptx::ldmatrix_x4(a, &k[lane % 16][d + lane / 16 * 8]);
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                const T* q = &shared.q[8 * t + g][d + 2 * c];
                ptx::mma_m16n8k16(score[t], a,
                                  {*reinterpret_cast<const uint32_t*>(q), *reinterpret_cast<const uint32_t*>(q + 8)},
                                  T{});
            }
        }

        const int at = tile * kTile + g;
        const bool live[2] = {at >= share.first && at <= share.last, at + 8 >= share.first && at + 8 <= share.last};
        uint32_t p[TILES][2];
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            float shrink[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                score[t][h] = live[0] ? score[t][h] * step.scale : kNothing;
                score[t][h + 2] = live[1] ? score[t][h + 2] * step.scale : kNothing;
                float highest = fmaxf(score[t][h], score[t][h + 2]);
#pragma unroll
                for (int other = 4; other < 32; other *= 2) {
                    highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, other));
                }
                highest = fmaxf(highest, most[t][h]);  // finite: every tile has a slot that is attended to
                shrink[h] = ptx::exp2_approx(most[t][h] - highest);
                most[t][h] = highest;
                score[t][h] = ptx::exp2_approx(score[t][h] - highest);
                score[t][h + 2] = ptx::exp2_approx(score[t][h + 2] - highest);
                total[t][h] = total[t][h] * shrink[h] + score[t][h] + score[t][h + 2];
            }
            p[t][0] = ptx::transpose8(pack2(score[t][0], score[t][1], T{}));
            p[t][1] = ptx::transpose8(pack2(score[t][2], score[t][3], T{}));
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[t][d][e] *= shrink[e % 2];
            }
        }
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
            uint32_t a[4];
            ptx::ldmatrix_x4_trans(a, &v[lane % 8 + lane / 16 * 8][16 * d + lane / 8 % 2 * 8]);
#pragma unroll
            for (int t = 0; t < TILES; ++t) ptx::mma_m16n8k16(sums[t][d], a, p[t], T{});
        }

        __syncwarp();  // the tile is read by all lanes
        const int next = tile + S::kStages * kWarps;
        if (next < share.end) {
            fetch<T, D>(shared, k_cache, v_cache, step.slot_stride, share, next, stage, warp, lane, slot);
        }
        ptx::copy_async_commit();
        stage = (stage + 1) % S::kStages;
    }
    ptx::copy_async_wait<0>();
    __syncthreads();  // tiles become sums

#pragma unroll
    for (int t = 0; t < TILES; ++t) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int head = 8 * t + 2 * c + h;
            float sum = total[t][h];
#pragma unroll
            for (int other = 4; other < 32; other *= 2) sum += __shfl_xor_sync(0xffffffff, sum, other);
            if (g == 0) {
                shared.most[warp][head] = most[t][h];
                shared.total[warp][head] = sum;
            }
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
                shared.sums[warp][head][16 * d + g] = sums[t][d][h];
                shared.sums[warp][head][16 * d + g + 8] = sums[t][d][h + 2];
            }
        }
    }
    __syncthreads();

    // The warps' parts, into those of warp 0.
    for (int i = threadIdx.x; i < group * D; i += kThreads) {
        const int head = i / D, d = i % D;
        float highest = kNothing;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) highest = fmaxf(highest, shared.most[w][head]);
        float sum = 0.0f, weight = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            const float m = shared.most[w][head], factor = m == kNothing ? 0.0f : ptx::exp2_approx(m - highest);
            sum += factor * shared.sums[w][head][d];
            weight += factor * shared.total[w][head];
        }
        shared.sums[0][head][d] = sum;
        if (d == 0) {
            shared.block_most[head] = highest;
            shared.block_total[head] = weight;
        }
    }
#if __CUDA_ARCH__ >= 900
    if (splits > 1) {
        ptx::cluster_sync();
    } else {
        __syncthreads();
    }
#else
    __syncthreads();
#endif

    // The blocks' parts; each block writes its share of the result.
    T* const out = step.out + (static_cast<int64_t>(batch) * step.heads + kv_head * group) * D;
    for (int i = split * kThreads + threadIdx.x; i < group * D; i += splits * kThreads) {
        const int head = i / D, d = i % D;
        float sum = shared.sums[0][head][d], weight = shared.block_total[head];
#if __CUDA_ARCH__ >= 900
        if (splits > 1) {
            float m[kMaxSplits], highest = kNothing;
#pragma unroll
            for (int rank = 0; rank < kMaxSplits; ++rank) {
                m[rank] = rank < splits ? ptx::load_cluster(ptx::map_shared(&shared.block_most[head], rank)) : kNothing;
                highest = fmaxf(highest, m[rank]);
            }
            sum = weight = 0.0f;
#pragma unroll
            for (int rank = 0; rank < kMaxSplits; ++rank) {
                if (rank < splits) {
                    const float factor = m[rank] == kNothing ? 0.0f : ptx::exp2_approx(m[rank] - highest);
                    sum += factor * ptx::load_cluster(ptx::map_shared(&shared.sums[0][head][d], rank));
                    weight += factor * ptx::load_cluster(ptx::map_shared(&shared.block_total[head], rank));
                }
            }
        }
#endif
        out[i] = from_float<T>(weight > 0.0f ? sum / weight : 0.0f);
    }
#if __CUDA_ARCH__ >= 900
    if (splits > 1) ptx::cluster_sync();  // nobody leaves while its shared memory is being read
#endif
}

// Blocks along the context for one head: enough to fill the multiprocessors, while each warp still has a tile.
int choose_splits(int64_t heads, int capacity, const Device& device) {
    if (device.major < 9) return 1;
    int splits = 1;
    while (splits < kMaxSplits && heads * splits < device.multiprocessors && capacity >= 2 * splits * kWarps * kTile) {
        splits *= 2;
    }
    return splits;
}

template <typename T, int D, int TILES>
void launch(const Step<T>& step, int64_t batch, cudaStream_t stream) {
    const auto kernel = attention_kernel<T, D, TILES>;
    constexpr size_t bytes = sizeof(Shared<T, D, TILES>);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
               "attention_decode: shared memory");
    const Device device = current_device();
    const int splits = choose_splits(batch * step.kv_heads, step.capacity, device);
    launch_programmatic("attention_decode", kernel,
                        dim3(splits, static_cast<unsigned>(step.kv_heads), static_cast<unsigned>(batch)), kThreads,
                        bytes, splits, device.major, stream, step);
}

template <typename T>
void dispatch(const Step<T>& step, int64_t batch, int d, cudaStream_t stream) {
    const auto with_heads = [&](auto size) {
        constexpr int D = decltype(size)::value;
        step.heads <= 8 * step.kv_heads ? launch<T, D, 1>(step, batch, stream) : launch<T, D, 2>(step, batch, stream);
    };
    with_head_size(d, "attention_decode", with_heads);
}

}  // namespace

void attention_decode(const AttentionArguments& a, const void* cos, const void* sin, void* out, float scaling,
                      int64_t window, bool early, cudaStream_t stream) {
    if (a.batch == 0) return;
    require(a.dtype == 0 || a.dtype == 1, "attention_decode: qkv must be bf16 or fp16");
    require(a.heads % a.kv_heads == 0 && a.heads <= 16 * a.kv_heads,
            "attention_decode: " + std::to_string(a.heads) + " query heads over " + std::to_string(a.kv_heads) +
                " KV heads must be a whole number of at most 16 each");
    require(a.batch <= 65535 && a.kv_heads <= 65535, "attention_decode: at most 65535 sequences and KV heads");
    require(a.capacity < (1 << 30), "attention_decode: at most 2^30 slots");
    const auto run = [&](auto type) {
        using T = decltype(type);
        const Step<T> step{static_cast<const T*>(a.qkv),
                           a.qkv_stride,
                           static_cast<const float*>(cos),
                           static_cast<const float*>(sin),
                           static_cast<T*>(a.k_cache),
                           static_cast<T*>(a.v_cache),
                           a.batch_stride,
                           a.head_stride,
                           a.slot_stride,
                           a.slot,
                           a.start,
                           static_cast<const T*>(a.q_norm),
                           static_cast<const T*>(a.k_norm),
                           static_cast<T*>(out),
                           a.eps,
                           scaling * 1.4426950408889634f,
                           static_cast<int>(a.positions),
                           static_cast<int>(a.heads),
                           static_cast<int>(a.kv_heads),
                           static_cast<int>(a.capacity),
                           static_cast<int>(window),
                           early};
        dispatch<T>(step, a.batch, static_cast<int>(a.head_size), stream);
    };
    a.dtype == 0 ? run(__nv_bfloat16{}) : run(__half{});
}

}  // namespace pyquant
