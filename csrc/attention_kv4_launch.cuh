// Launches of attention_kv4: which kernel, how many blocks.
#pragma once

#include "attention_kv4_cluster.cuh"

namespace pyquant {
namespace {

// The largest cluster of this kernel that the current device can run, a power of 2 up to 16; found once a device. More
// than 8 blocks are not for every GPU, or every part of one.
template <auto KERNEL>
int most_cluster(size_t bytes, unsigned threads) {
    static std::atomic<int> known[64];
    int device = 0;
    check_cuda(cudaGetDevice(&device), "attention_kv4");
    int size = device < 64 ? known[device].load(std::memory_order_relaxed) : 0;
    if (size) return size;
    allow_shared_memory<KERNEL>("attention_kv4");
    const bool large = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess;
    for (size = large ? kMostCluster : 8; size > 1; size /= 2) {
        cudaLaunchConfig_t config{};
        cudaLaunchAttribute attribute{};
        config.gridDim = dim3(static_cast<unsigned>(size));
        config.blockDim = dim3(threads);
        config.dynamicSmemBytes = bytes;
        config.attrs = &attribute;
        config.numAttrs = 1;
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = static_cast<unsigned>(size);
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        int fit = 0;
        if (cudaOccupancyMaxActiveClusters(&fit, KERNEL, &config) == cudaSuccess && fit > 0) break;
    }
    cudaGetLastError();  // a size that is refused is no error of the next launch
    if (device < 64) known[device].store(size, std::memory_order_relaxed);
    return size;
}

// One sequence by clusters, where they keep most multiprocessors busy, or where there is little to do; false where not.
// All heads are equally long then: no block waits for another that has more to do.
template <typename T, int D, int BITS>
bool launch_cluster(const Call<T>& call, int64_t capacity, const Device& device, cudaStream_t stream) {
    using S = Shape<D, 1, BITS>;
    constexpr auto kernel = attention_kv4_cluster_kernel<T, D, 1, BITS>;
    constexpr size_t kBytes = sizeof(ClusterShared<T, D, 1, BITS>);
    static_assert(S::kBlocks * (kBytes + 1024) <= 228 << 10, "a multiprocessor of sm_90");
    const int resident = device.multiprocessors * S::kBlocks;
    int size = most_cluster<kernel>(kBytes, S::kThreads);
    while (size > 1 && size * call.kv_heads > resident) size /= 2;
    if (size == 1 || (size * call.kv_heads * 2 <= device.multiprocessors && capacity > 4 * size * S::kWarps)) {
        return false;
    }
    launch_programmatic("attention_kv4", kernel, dim3(static_cast<unsigned>(size * call.kv_heads)), S::kThreads, kBytes,
                        static_cast<unsigned>(size), device.major, stream, call);
    return true;
}

template <typename T, int D, int NT, int BITS>
void launch(const Call<T>& call, int64_t capacity, cudaStream_t stream) {
    using S = Shape<D, NT, BITS>;
    constexpr auto kernel = attention_kv4_kernel<T, D, NT, BITS>;
    static_assert(S::kBlocks * (sizeof(Shared<T, D, NT, BITS>) + 1024) <= 228 << 10, "a multiprocessor of sm_90");
    allow_shared_memory<kernel>("attention_kv4");
    const Device device = current_device();
    if constexpr (NT == 1) {
        // Measured on an H200: faster up to 32k tokens, at 128k slower by 40 %, since it keeps fewer bytes in flight.
        constexpr int kClusterPages = 1024;
        if (call.batch == 1 && call.page_capacity <= kClusterPages && device.major >= 9 &&
            launch_cluster<T, D, BITS>(call, capacity, device, stream))
            return;
    }
    // As many blocks as fit, while the last of a head can hold a factor for each.
    constexpr int kMostParts = sizeof(Shared<T, D, NT, BITS>::meet) / (4 * S::kRows);
    const int blocks = std::min(device.multiprocessors * S::kBlocks, kMostParts);
    launch_programmatic("attention_kv4", kernel, dim3(static_cast<unsigned>(blocks)), S::kThreads,
                        sizeof(Shared<T, D, NT, BITS>), 1, device.major, stream, call);
}

// f with how many times 8 rows there are, as a compile-time constant.
template <int D, typename F>
void with_rows(int64_t rows, F&& f) {
    if (rows <= 8) return f(std::integral_constant<int, 1>{});
    if (rows <= 16) return f(std::integral_constant<int, 2>{});
    if constexpr (D <= 128) f(std::integral_constant<int, 4>{});
}

// A call over pages of one width.
template <int BITS>
void attention_of(const Kv4Arguments& a, cudaStream_t stream) {
    const auto run = [&](auto type) {
        using T = decltype(type);
        const Call<T> call = call_of<T>(a);
        // Units of a head at most.
        const int64_t capacity = a.prompt_tiles + a.page_capacity + a.ring_tiles;
        const int64_t rows = a.heads / a.kv_heads * a.tokens;
        const auto with_size = [&](auto size) {
            constexpr int kSize = decltype(size)::value;
            with_rows<kSize>(rows,
                             [&](auto nt) { launch<T, kSize, decltype(nt)::value, BITS>(call, capacity, stream); });
        };
        with_head_size(a.head_size, "attention_kv4", with_size);
    };
    a.dtype == 0 ? run(__nv_bfloat16{}) : run(__half{});
}

}  // namespace

// One file each, so that they compile side by side.
void attention_kv4_2bit(const Kv4Arguments& a, cudaStream_t stream);
void attention_kv4_3bit(const Kv4Arguments& a, cudaStream_t stream);
void attention_kv4_4bit(const Kv4Arguments& a, cudaStream_t stream);
void attention_kv4_8bit(const Kv4Arguments& a, cudaStream_t stream);

}  // namespace pyquant
