// attention_kv4 of one sequence, a cluster of blocks for each KV head (sm_90). Clusters need no workspace and no
// counter: every block has a share of the output, each sends what it has of it straight to that block's shared memory,
// and a barrier there counts the bytes. The rest is csrc/attention_kv4.cuh's: of the units of a head, block r of C
// takes units r, r + C, ..., in turn by its warps.
#pragma once

#include "attention_kv4.cuh"

namespace pyquant {
namespace {

constexpr int kMostCluster = 16;

template <typename T, int D, int NT, int BITS>
struct ClusterShared {
    using S = Shape<D, NT, BITS>;
    Shared<T, D, NT, BITS> of_block;
    float4 sums[S::kRows * (D / 4) + kMostCluster];  // [block][share]
    float2 numbers[kMostCluster][S::kRows];          // largest score, sum of weights
    uint64_t met;                                    // what the others send has arrived
};

template <typename T, int D, int NT, int BITS>
__global__ void __launch_bounds__(Shape<D, NT, BITS>::kThreads, Shape<D, NT, BITS>::kBlocks)
    attention_kv4_cluster_kernel(const __grid_constant__ Call<T> call) {
#if __CUDA_ARCH__ >= 900
    using S = Shape<D, NT, BITS>;
    constexpr int kThreads = S::kThreads;
    extern __shared__ __align__(16) unsigned char memory[];
    auto& cluster = *reinterpret_cast<ClusterShared<T, D, NT, BITS>*>(memory);
    auto& shared = cluster.of_block;
    ptx::launch_dependents();
    const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int size = ptx::cluster_size(), rank = ptx::cluster_rank();
    const int b = blockIdx.x / size / call.kv_heads, head = blockIdx.x / size % call.kv_heads;
    const int rows = call.heads / call.kv_heads * call.tokens, items = rows * (D / 4);
    const int share = (items + size - 1) / size;  // items of a block: rank, rank + size, ...
    if (!call.early) ptx::wait_for_predecessor();

    if (threadIdx.x == 0) {
        Segments s = Segments::read(call.segments + 3 * b, call.reach + call.tokens - 1);
        const bool halve = S::kHalves == 2 || (S::kHalves == 1 && s.units(1) <= size * (S::kWarps + 1));
        if (!halve) s.join_halves();
        shared.list.segments[b] = s;
        shared.list.halves = halve;
        ptx::barrier_init(&cluster.met, 1);
        const int own = (items - rank + size - 1) / size;
        ptx::barrier_expect(&cluster.met, size * (max(own, 0) * 16 + rows * 8));
    }
    if (lane == 0) {
        for (int i = 0; i < S::kStages; ++i) ptx::barrier_init(&shared.full[warp][i], 1);
        ptx::barrier_init_fence();
    }
    __syncthreads();
    ptx::cluster_arrive_relaxed();  // until the others' barriers are there
    const int units = shared.list.segments[b].units(shared.list.halves);
    const Walk walk{0, units, b, head, 0, units, units};
    const int first = rank + size * warp, step = size * S::kWarps;
    Warp<T, D, NT, BITS> mine{call, shared, lane, lane / 4, lane % 4};
    if (lane == 0) shared.ahead[warp] = {walk, first, step, true, false};
    __syncwarp();
    for (int stage = 0; stage < S::kStages; ++stage) mine.fetch(warp, stage);
    if (call.early) ptx::wait_for_predecessor();
    load_queries<T, D, NT, BITS>(call, shared, b, head);
    __syncthreads();

    const Codes<BITS> codes;
    int stage = 0;
    uint32_t parity = 0;
    mine.reset();
    mine.work(warp, walk, first, step, stage, parity, codes);
    mine.meet(warp);

    ptx::cluster_wait();
    for (int i = threadIdx.x; i < items; i += kThreads) {
        const int to = i % size;
        float4 sum;
        sum_block<D, NT, BITS>(shared, i / (D / 4), i % (D / 4) * 4, sum);
        ptx::send(ptx::map_shared(&cluster.sums[rank * share + i / size], to), sum, ptx::map_shared(&cluster.met, to));
    }
    for (int i = threadIdx.x; i < rows * size; i += kThreads) {
        const int to = i % size, row = i / size;
        float4 sum;
        const float2 of = sum_block<D, NT, BITS>(shared, row, 0, sum);
        ptx::send(ptx::map_shared(&cluster.numbers[rank][row], to), of, ptx::map_shared(&cluster.met, to));
    }
    ptx::barrier_wait(&cluster.met, 0);

    // Neighbouring lanes have the parts of one item.
    const int part = threadIdx.x % size;
    for (int of = threadIdx.x / size; of < (share + kThreads / size - 1) / (kThreads / size) * (kThreads / size);
         of += kThreads / size) {
        const int i = rank + size * of, row = min(i, items - 1) / (D / 4);
        const float2 numbers = cluster.numbers[part][row];
        float4 sum = cluster.sums[part * share + min(of, share - 1)];
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
            write_out<T, D>(call, b, head, row, i % (D / 4) * 4, sum, weight, highest);
        }
    }
#endif
}

}  // namespace
}  // namespace pyquant
