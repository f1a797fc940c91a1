// attention_kv4 by a cluster of blocks for each KV head (sm_90). Clusters need no plan, workspace or counter: every
// block has a share of the output, each sends what it has of it straight to that block's shared memory, and a barrier
// there counts the bytes. But all wait for the longest sequence; where that matters the blocks look at all lengths
// first and work on the list of csrc/attention_kv4.cuh where they differ. The rest is that file's too: of the units of
// a head, block r of C takes units r, r + C, ..., in turn by its warps.
#pragma once

#include "attention_kv4.cuh"

namespace pyquant {
namespace {

constexpr int kMostCluster = 16;

template <typename T, int D, int NT, int BITS, int WARPS>
struct ClusterShared {
    using S = Shape<D, NT, BITS, WARPS>;
    static constexpr bool kOneHead = true;
    union alignas(16) {
        unsigned char ring[S::kStages][S::kStageBytes];
        float sums[S::kRows][S::kSumRow];  // in the end, by rows
    } of_warp[S::kWarps];
    __device__ unsigned char* stage(int warp, int at) { return of_warp[warp].ring[at]; }
    uint2 q[NT][S::kPieces][32], q_codes[NT][S::kPieces][32];  // as of Shared
    float4 sums[S::kRows * (D / 4) + kMostCluster];            // [block][share]
    float2 numbers[kMostCluster][S::kRows];                    // largest score, sum of weights
    float most[S::kWarps][S::kRows], total[S::kWarps][S::kRows];
    OneList list;
    Ahead ahead[S::kWarps];
    uint64_t full[S::kWarps][S::kStages];
    uint64_t met;  // what the others send has arrived
};

// Largest score of a row and sum of its weights over all warps.
template <typename M>
__device__ __forceinline__ float2 sum_weights(const M& shared, int row) {
    float highest = shared.most[0][row], weight = 0.0f;
#pragma unroll
    for (int w = 1; w < M::S::kWarps; ++w) highest = fmaxf(highest, shared.most[w][row]);
#pragma unroll
    for (int w = 0; w < M::S::kWarps; ++w) {
        weight += ptx::exp2_approx(shared.most[w][row] - highest) * shared.total[w][row];
    }
    return make_float2(highest, weight);
}

// Where clusters would wait for the longest sequence. Apart, so that its registers are its own.
template <typename T, int D, int NT, int BITS, int WARPS>
__device__ __noinline__ void attend_uneven(const Call<T>& call, unsigned char* memory) {
    attend_list(call, *reinterpret_cast<Shared<T, D, NT, BITS, WARPS>*>(memory));
}

template <typename T, int D, int NT, int BITS, int WARPS>
__global__ void __launch_bounds__(Shape<D, NT, BITS, WARPS>::kThreads, Shape<D, NT, BITS, WARPS>::kBlocks)
    attention_kv4_cluster_kernel(const __grid_constant__ Call<T> call) {
#if __CUDA_ARCH__ >= 900
    using S = Shape<D, NT, BITS, WARPS>;
    using Memory = ClusterShared<T, D, NT, BITS, WARPS>;
    constexpr int kThreads = S::kThreads;
    extern __shared__ __align__(16) unsigned char memory[];
    auto& shared = *reinterpret_cast<Memory*>(memory);
    ptx::launch_dependents();
    const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int size = ptx::cluster_size(), rank = ptx::cluster_rank(), log2_size = __ffs(size) - 1;
    const int of_all = blockIdx.x >> log2_size, b = of_all / call.kv_heads, head = of_all - b * call.kv_heads;
    const int rows = call.rows(), items = rows * (D / 4);
    const int share = (items + size - 1) >> log2_size;  // items of a block: rank, rank + size, ...
    if (!call.early) ptx::wait_for_predecessor();

    if (S::kCanCheck && call.check_even) {
        const auto units_of = [&](int of) {
            return Segments::read(call.segments + 3 * of, call.reach + call.tokens - 1).units(1);
        };
        bool uneven = false;
        const int usual = units_of(0);
        for (int of = threadIdx.x; of < call.batch; of += kThreads) {
            const int units = units_of(of);
            uneven |= 4 * units > 5 * usual || 4 * usual > 5 * units;
        }
        if (__syncthreads_or(uneven)) {
            if constexpr (S::kCanCheck) attend_uneven<T, D, NT, BITS, WARPS>(call, memory);
            return;
        }
    }

    if (threadIdx.x == 0) {
        Segments s = Segments::read(call.segments + 3 * b, call.reach + call.tokens - 1);
        const bool halve = S::kHalves == 2 || (S::kHalves == 1 && s.units(1) <= size * (S::kWarps + S::kWarps / 8));
        if (!halve) s.join_halves();
        shared.list.segments = s;
        shared.list.halves = halve;
        ptx::barrier_init(&shared.met, 1);
        const int own = (items - rank + size - 1) >> log2_size;
        ptx::barrier_expect(&shared.met, size * (max(own, 0) * 16 + rows * 8));
    }
    if (lane == 0) {
        for (int i = 0; i < S::kStages; ++i) ptx::barrier_init(&shared.full[warp][i], 1);
        ptx::barrier_init_fence();
    }
    __syncthreads();
    ptx::cluster_arrive_relaxed();  // until the others' barriers are there
    const int units = shared.list.segments.units(shared.list.halves);
    const Walk walk{0, units, b, head, 0, units, units};
    const int first = rank + size * warp, step = size * S::kWarps;
    Warp<T, D, NT, BITS, Memory> mine{call, shared, lane, lane / 4, lane % 4};
    if (lane == 0) shared.ahead[warp] = {walk, first, first, step, 0, 0, true, nullptr};
    __syncwarp();
    for (int stage = 0; stage < S::kStages; ++stage) mine.fetch(warp, stage);
    load_queries<T, D, NT, BITS>(call, shared, b, head, [&] {
        if (call.early) ptx::wait_for_predecessor();
    });
    __syncthreads();

    const Codes<BITS> codes;
    int stage = 0;
    uint32_t parity = 0;
    mine.reset();
    mine.work(warp, walk, first, step, stage, parity, codes);
    mine.finish();
    mine.keep(warp);
    mine.leave(shared.of_warp[warp].sums);
    __syncthreads();

    ptx::cluster_wait();
    for (int i = threadIdx.x; i < items; i += kThreads) {
        const int to = i & (size - 1), row = i / (D / 4), d = i % (D / 4) * 4;
        float highest = shared.most[0][row];
#pragma unroll
        for (int w = 1; w < S::kWarps; ++w) highest = fmaxf(highest, shared.most[w][row]);
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < S::kWarps; ++w) {
            add(sum, ptx::exp2_approx(shared.most[w][row] - highest),
                *reinterpret_cast<const float4*>(&shared.of_warp[w].sums[row][d]));
        }
        if (size == 1) {
            const float2 of = sum_weights(shared, row);
            write_out<T, D, BITS>(call, b, head, row, d, sum, of.y, of.x);
        } else {
            ptx::send(ptx::map_shared(&shared.sums[rank * share + (i >> log2_size)], to), sum,
                      ptx::map_shared(&shared.met, to));
        }
    }
    if (size == 1) return;
    for (int i = kThreads - 1 - threadIdx.x; i < rows * size; i += kThreads) {  // threads that have no item, if any
        const int to = i & (size - 1), row = i >> log2_size;
        ptx::send(ptx::map_shared(&shared.numbers[rank][row], to), sum_weights(shared, row),
                  ptx::map_shared(&shared.met, to));
    }
    ptx::barrier_wait(&shared.met, 0);

    // Neighbouring lanes have the parts of one item.
    const int part = threadIdx.x & (size - 1), at_once = kThreads >> log2_size;
    for (int first = 0; first < share; first += at_once) {
        const int of = first + (threadIdx.x >> log2_size), i = rank + size * of, row = min(i, items - 1) / (D / 4);
        const float2 numbers = shared.numbers[part][row];
        float4 sum = shared.sums[part * share + min(of, share - 1)];
        float highest = numbers.x;
        for (int by = 1; by < size; by *= 2) highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, by));
        const float factor = ptx::exp2_approx(numbers.x - highest);
        float weight = factor * numbers.y;
        sum = make_float4(factor * sum.x, factor * sum.y, factor * sum.z, factor * sum.w);
        for (int by = 1; by < size; by *= 2) {
            weight += __shfl_xor_sync(0xffffffff, weight, by);
            sum.x += __shfl_xor_sync(0xffffffff, sum.x, by);
            sum.y += __shfl_xor_sync(0xffffffff, sum.y, by);
            sum.z += __shfl_xor_sync(0xffffffff, sum.z, by);
            sum.w += __shfl_xor_sync(0xffffffff, sum.w, by);
        }
        if (part == 0 && of < share && i < items) {
            write_out<T, D, BITS>(call, b, head, row, i % (D / 4) * 4, sum, weight, highest);
        }
    }
#endif
}

}  // namespace
}  // namespace pyquant
