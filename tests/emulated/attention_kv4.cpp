// The kernels of attention_kv4 as a function of the CPU: some of their instances, all widths of pages.
#include "attention_kv4.cuh"

#if __has_include("attention_kv4_cluster.cuh")
#include "attention_kv4_cluster.cuh"
#endif

using namespace pyquant;

namespace {

template <typename T, int D, int NT, int BITS>
void attend_blocks(const Call<T>& call, int grid) {
    const auto body = [](const void* c) { attention_kv4_kernel<T, D, NT, BITS>(*static_cast<const Call<T>*>(c)); };
    run_grid(body, &call, grid, 1, Shape<D, NT, BITS>::kThreads, sizeof(Shared<T, D, NT, BITS>));
}

template <typename T, int D, int NT, int BITS>
bool attend_clusters([[maybe_unused]] const Call<T>& call, [[maybe_unused]] int cluster) {
#if __has_include("attention_kv4_cluster.cuh")
    const auto body = [](const void* c) {
        attention_kv4_cluster_kernel<T, D, NT, BITS>(*static_cast<const Call<T>*>(c));
    };
    run_grid(body, &call, call.batch * call.kv_heads * cluster, 1, Shape<D, NT, BITS>::kThreads,
             sizeof(ClusterShared<T, D, NT, BITS>), cluster);
    return true;
#else
    return false;
#endif
}

template <typename T, int D, int NT, int BITS>
bool attend_if(const Kv4Arguments& a, int grid, int cluster) {
    const int rows = static_cast<int>(a.heads / a.kv_heads * a.tokens);
    const bool fits = rows <= 8 ? NT == 1 : rows <= 16 ? NT == 2 : NT == 4;
    if (a.dtype != (std::is_same_v<T, __half> ? 1 : 0) || a.head_size != D || a.bits != BITS || !fits) return false;
    const Call<T> call = call_of<T>(a);
    if (cluster > 1) {
        if constexpr (NT == 1) return attend_clusters<T, D, NT, BITS>(call, cluster);
        return false;
    }
    attend_blocks<T, D, NT, BITS>(call, grid);
    return true;
}

}  // namespace

// 0, or 1 where the instance is not among these. `cluster` 1: the kernel of any batch, with `grid` blocks.
extern "C" int attend(const Kv4Arguments* a, int grid, int cluster) {
    return !(attend_if<__half, 64, 1, 4>(*a, grid, cluster) || attend_if<__half, 64, 1, 8>(*a, grid, cluster) ||
             attend_if<__half, 64, 1, 3>(*a, grid, cluster) || attend_if<__half, 64, 1, 2>(*a, grid, cluster) ||
             attend_if<__half, 80, 1, 4>(*a, grid, cluster) || attend_if<__half, 80, 1, 2>(*a, grid, cluster) ||
             attend_if<__half, 96, 1, 3>(*a, grid, cluster) || attend_if<__half, 128, 2, 2>(*a, grid, cluster) ||
             attend_if<__half, 128, 2, 4>(*a, grid, cluster) || attend_if<__half, 128, 4, 4>(*a, grid, cluster) ||
             attend_if<__half, 256, 2, 8>(*a, grid, cluster) || attend_if<__nv_bfloat16, 64, 1, 4>(*a, grid, cluster));
}
