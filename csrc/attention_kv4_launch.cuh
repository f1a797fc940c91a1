// Launches of attention_kv4: which kernel, how many blocks.
#pragma once

#include <map>
#include <mutex>

#include "attention_kv4_cluster.cuh"

namespace pyquant {
namespace {

// How many clusters of 2^i blocks the current device runs at once; found once a device.
struct Fits {
    int clusters[5];
};

template <auto KERNEL>
Fits cluster_fits(size_t bytes, unsigned threads) {
    static std::mutex lock;
    static std::map<int, Fits> known;
    int device = 0;
    check_cuda(cudaGetDevice(&device), "attention_kv4");
    const std::lock_guard<std::mutex> guard(lock);
    const auto found = known.find(device);
    if (found != known.end()) return found->second;
    allow_shared_memory<KERNEL>("attention_kv4");
    cudaFuncSetAttribute(KERNEL, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);  // more than 8
    Fits fits{};
    for (int i = 0; i < 5; ++i) {
        cudaLaunchConfig_t config{};
        cudaLaunchAttribute attribute{};
        config.gridDim = dim3(1u << i);
        config.blockDim = dim3(threads);
        config.dynamicSmemBytes = bytes;
        config.attrs = &attribute;
        config.numAttrs = 1;
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = 1u << i;
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        if (cudaOccupancyMaxActiveClusters(&fits.clusters[i], KERNEL, &config) != cudaSuccess) fits.clusters[i] = 0;
    }
    cudaGetLastError();  // a size that is refused is no error of the next launch
    known[device] = fits;
    return fits;
}

// By clusters of 2^log2_size blocks of WARPS warps for each head; false where the device does not run all at once.
template <int WARPS, int D, int NT, int BITS, typename T>
bool launch_cluster(Call<T> call, int log2_size, bool check_even, const Device& device, cudaStream_t stream) {
    using S = Shape<D, NT, BITS, WARPS>;
    constexpr auto kernel = attention_kv4_cluster_kernel<T, D, NT, BITS, WARPS>;
    constexpr size_t kOwn = sizeof(ClusterShared<T, D, NT, BITS, WARPS>);
    constexpr size_t kBytes = S::kCanCheck ? std::max(kOwn, sizeof(Shared<T, D, NT, BITS, WARPS>)) : kOwn;
    static_assert(S::kBlocks * (kBytes + 1024) <= 228 << 10, "a multiprocessor of sm_90");
    const int heads = call.batch * call.kv_heads;
    if (cluster_fits<kernel>(kBytes, S::kThreads).clusters[log2_size] < heads) return false;
    call.check_even = check_even;
    launch_programmatic("attention_kv4", kernel, dim3(static_cast<unsigned>(heads << log2_size)), S::kThreads, kBytes,
                        1u << log2_size, device.major, stream, call);
    return true;
}

// Clusters, where they are faster (measured on an H200); false where not. Their fixed cost is less than a list's, but a
// block of a long sequence keeps fewer bytes on their way, and all wait for the longest sequence. So: at most so many
// units a warp, whatever lengths, or about equal lengths, which the kernel finds out, and nearly all multiprocessors.
template <int D, int NT, int BITS, typename T>
bool launch_clusters(const Call<T>& call, int64_t capacity, const Device& device, cudaStream_t stream) {
    constexpr int kWarps = kUsualWarps<D, NT, BITS>;
    constexpr int kFew = NT == 1 ? 6 : 3;  // units a warp
    const int heads = call.batch * call.kv_heads, all = device.multiprocessors;
    // Half of what a multiprocessor holds, so that the next call begins beside, or 2 blocks of twice as many warps.
    for (int log2_size = 4; log2_size >= 2; --log2_size) {
        if (heads << log2_size > all || capacity > kFew * kWarps << log2_size) continue;
        if (launch_cluster<kWarps, D, NT, BITS>(call, log2_size, false, device, stream)) return true;
    }
    if constexpr (Shape<D, NT, BITS>::kCanCheck) {
        const auto takes = [&](int blocks, int slots, int warps) {
            return blocks <= slots && (capacity * heads <= kFew * blocks * warps || 10 * blocks >= 9 * slots);
        };
        const auto check = [&](int blocks, int warps) { return capacity * heads > kFew * blocks * warps; };
        if (2 * heads > all / 2 && takes(2 * heads, all, 16)) {
            if (launch_cluster<16, D, NT, BITS>(call, 1, check(2 * heads, 16), device, stream)) return true;
        }
        for (int log2_size = 1; log2_size >= 0; --log2_size) {
            const int blocks = heads << log2_size;
            if (blocks <= all || !takes(blocks, 2 * all, 8)) continue;
            if (launch_cluster<8, D, NT, BITS>(call, log2_size, check(blocks, 8), device, stream)) return true;
        }
    }
    return false;
}

template <typename T, int D, int NT, int BITS>
void launch(const Call<T>& call, int64_t capacity, cudaStream_t stream) {
    using S = Shape<D, NT, BITS>;
    constexpr auto kernel = attention_kv4_kernel<T, D, NT, BITS>;
    static_assert(S::kBlocks * (sizeof(Shared<T, D, NT, BITS>) + 1024) <= 228 << 10, "a multiprocessor of sm_90");
    const Device device = current_device();
    if constexpr (NT <= 2) {
        if (device.major >= 9 && launch_clusters<D, NT, BITS>(call, capacity, device, stream)) return;
    }
    allow_shared_memory<kernel>("attention_kv4");
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

// A call in one dtype over pages of one width.
template <typename T, int BITS>
void attention_of(const Kv4Arguments& a, cudaStream_t stream) {
    const Call<T> call = call_of<T>(a);
    // Units of a head at most.
    const int64_t capacity = a.prompt_tiles + a.page_capacity + a.ring_tiles;
    const int64_t rows = a.heads / a.kv_heads * a.tokens;
    with_head_size(a.head_size, "attention_kv4", [&](auto size) {
        constexpr int kSize = decltype(size)::value;
        with_rows<kSize>(rows, [&](auto nt) { launch<T, kSize, decltype(nt)::value, BITS>(call, capacity, stream); });
    });
}

}  // namespace

void attention_kv4_2bit_bf16(const Kv4Arguments& a, cudaStream_t stream);
void attention_kv4_2bit_fp16(const Kv4Arguments& a, cudaStream_t stream);
void attention_kv4_3bit_bf16(const Kv4Arguments& a, cudaStream_t stream);
void attention_kv4_3bit_fp16(const Kv4Arguments& a, cudaStream_t stream);
void attention_kv4_4bit_bf16(const Kv4Arguments& a, cudaStream_t stream);
void attention_kv4_4bit_fp16(const Kv4Arguments& a, cudaStream_t stream);
void attention_kv4_8bit_bf16(const Kv4Arguments& a, cudaStream_t stream);
void attention_kv4_8bit_fp16(const Kv4Arguments& a, cudaStream_t stream);

}  // namespace pyquant
