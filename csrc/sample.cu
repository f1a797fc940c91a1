// greedy_append: the end of a greedy step, one launch. For each row of logits [B, V]
//
//   chosen = argmax(logits), the lowest index among equals;   pad where the row has ended
//   tokens[slot + 1] = ids = chosen;   length += unfinished;   unfinished *= chosen is none of eos;   slot += 1
//
//   tokens int64 [B, W], ids, unfinished, length int64 [B], slot int32 [B], eos int64 [E] or absent
//
// A cluster of blocks a row, each a share of the columns, 8 of them a load; the blocks' winners meet in distributed
// shared memory. Bound by latency: 256 KB of logits a row lie in L2. Below sm_90 one block a row.
#include <algorithm>
#include <cmath>

#include "ops.h"
#include "pieces.cuh"
#include "programmatic.cuh"

namespace pyquant {
namespace {

constexpr int kThreads = 512;
constexpr int kBlocks = 8;  // of a cluster

struct Winner {
    float value;
    int index;
};

__device__ __forceinline__ Winner better(Winner a, Winner b) {
    return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    greedy_kernel(const T* logits, int64_t stride, int columns, bool pieces, GreedyState s) {
    __shared__ Winner winners[kThreads / 32];
    __shared__ float block_value;
    __shared__ float block_index;  // the bits of an index, as load_cluster reads floats
    ptx::launch_dependents();
    ptx::wait_for_predecessor();
    const int row = blockIdx.y;
    const T* from = logits + row * stride;
    Winner best{-INFINITY, columns};
    const int first = blockIdx.x * kThreads + threadIdx.x, step = gridDim.x * kThreads;
    if (pieces) {
        for (int i = first; i < columns / kPiece; i += step) {
            float v[kPiece];
            const uint4 piece = ptx::load16(from + i * kPiece);
            unpack8<T>(v, piece);
#pragma unroll
            for (int j = 0; j < kPiece; ++j) best = better(best, {v[j], i * kPiece + j});
        }
    } else {
        for (int i = first; i < columns; i += step) best = better(best, {ptx::load_one(from + i), i});
    }
#pragma unroll
    for (int other = 16; other > 0; other /= 2) {
        best = better(best,
                      {__shfl_xor_sync(0xffffffff, best.value, other), __shfl_xor_sync(0xffffffff, best.index, other)});
    }
    if (threadIdx.x % 32 == 0) winners[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < kThreads / 32; ++warp) best = better(best, winners[warp]);
        block_value = best.value;
        block_index = __int_as_float(best.index);
    }
#if __CUDA_ARCH__ >= 900
    if (gridDim.x > 1) ptx::cluster_sync();
#endif
    if (blockIdx.x == 0 && threadIdx.x == 0) {
#if __CUDA_ARCH__ >= 900
        for (uint32_t rank = 1; rank < gridDim.x; ++rank) {
            best = better(best, {ptx::load_cluster(ptx::map_shared(&block_value, rank)),
                                 __float_as_int(ptx::load_cluster(ptx::map_shared(&block_index, rank)))});
        }
#endif
        int64_t chosen = best.index < columns ? best.index : 0;  // all -inf or NaN
        const int64_t unfinished = s.unfinished[row];
        if (s.eos) {
            if (!unfinished) chosen = s.pad;
            bool ends = false;
            for (int i = 0; i < s.eos_count; ++i) ends |= chosen == s.eos[i];
            s.unfinished[row] = unfinished && !ends;
        }
        s.length[row] += unfinished;
        s.ids[row] = chosen;
        const int slot = ++s.slot[row];
        if (slot < s.width) s.tokens[row * s.token_stride + slot] = chosen;
    }
#if __CUDA_ARCH__ >= 900
    if (gridDim.x > 1) ptx::cluster_sync();  // nobody leaves while its shared memory is being read
#endif
}

}  // namespace

void greedy_append(const void* logits, int64_t stride, int dtype, int64_t rows, int64_t columns, const GreedyState& s,
                   cudaStream_t stream) {
    if (rows == 0) return;
    require(dtype == 0 || dtype == 1, "greedy_append: logits must be bf16 or fp16");
    require(rows <= 65535 && columns > 0 && columns < (1 << 30), "greedy_append: too many rows or columns");
    const int major = current_device().major;
    const unsigned blocks = major >= 9 && columns >= 4096 ? kBlocks : 1;
    const bool pieces = reinterpret_cast<uintptr_t>(logits) % 16 == 0 && stride % kPiece == 0 && columns % kPiece == 0;
    const auto run = [&](auto type) {
        using T = decltype(type);
        launch_programmatic("greedy_append", greedy_kernel<T>, dim3(blocks, static_cast<unsigned>(rows)), kThreads, 0,
                            blocks, major, stream, static_cast<const T*>(logits), stride, static_cast<int>(columns),
                            pieces, s);
    };
    dtype == 0 ? run(__nv_bfloat16{}) : run(__half{});
}

}  // namespace pyquant
