// The kernels of attention_kv4 as a function of the CPU: some of their instances, all widths of pages.
#include "attention_kv4_cluster.cuh"

using namespace pyquant;

namespace {

template <typename T, int D, int NT, int BITS>
void attend_blocks(const Call<T>& call, int grid) {
    const auto body = [](const void* c) { attention_kv4_kernel<T, D, NT, BITS>(*static_cast<const Call<T>*>(c)); };
    run_grid(body, &call, grid, 1, Shape<D, NT, BITS>::kThreads, sizeof(Shared<T, D, NT, BITS>));
}

template <int WARPS, typename T, int D, int NT, int BITS>
void attend_clusters(const Call<T>& call, int cluster) {
    const auto body = [](const void* c) {
        attention_kv4_cluster_kernel<T, D, NT, BITS, WARPS>(*static_cast<const Call<T>*>(c));
    };
    run_grid(body, &call, call.batch * call.kv_heads * cluster, 1, 32 * WARPS,
             std::max(sizeof(ClusterShared<T, D, NT, BITS, WARPS>), sizeof(Shared<T, D, NT, BITS, WARPS>)), cluster);
}

template <typename T, int D, int NT, int BITS>
bool attend_if(const Kv4Arguments& a, int grid, int cluster, int warps, bool check_even) {
    const int rows = static_cast<int>(a.heads / a.kv_heads * a.tokens);
    const bool fits = rows <= 8 ? NT == 1 : rows <= 16 ? NT == 2 : NT == 4;
    if (a.dtype != (std::is_same_v<T, __half> ? 1 : 0) || a.head_size != D || a.bits != BITS || !fits) return false;
    Call<T> call = call_of<T>(a);
    call.check_even = check_even;
    if (cluster > 0) {
        if constexpr (NT <= 2 && D <= 128) {
            if (warps == 8) return attend_clusters<8, T, D, NT, BITS>(call, cluster), true;
            if constexpr (NT == 1 && D == 64) return attend_clusters<16, T, D, NT, BITS>(call, cluster), true;
        }
        return false;
    }
    attend_blocks<T, D, NT, BITS>(call, grid);
    return true;
}

}  // namespace

// 0, or 1 where the instance is not among these. `cluster` 0: the kernel of any batch, with `grid` blocks; otherwise
// that of clusters of so many blocks of 8 or 16 warps.
extern "C" int attend(const Kv4Arguments* a, int grid, int cluster, int warps, bool check_even) {
    const auto made = [&](auto... instances) { return !(instances(*a, grid, cluster, warps, check_even) || ...); };
    return made(attend_if<__half, 64, 1, 4>, attend_if<__half, 64, 1, 8>, attend_if<__half, 64, 1, 3>,
                attend_if<__half, 64, 1, 2>, attend_if<__half, 80, 1, 4>, attend_if<__half, 80, 1, 2>,
                attend_if<__half, 96, 1, 3>, attend_if<__half, 128, 2, 2>, attend_if<__half, 128, 2, 4>,
                attend_if<__half, 128, 4, 4>, attend_if<__half, 256, 2, 8>, attend_if<__nv_bfloat16, 64, 1, 4>);
}
