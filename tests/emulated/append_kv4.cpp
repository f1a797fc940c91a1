// The kernel of append_kv4 as a function of the CPU: some of its instances, all widths of pages.
#include "append_kv4.cuh"

using namespace pyquant;

namespace {

template <typename T, int D, int BITS>
bool append_if(const Kv4Append& a) {
    if (a.dtype != (std::is_same_v<T, __half> ? 1 : 0) || a.head_size != D || a.bits != BITS) return false;
    const auto body = [](const void* c) { append_kernel<T, D, BITS>(*static_cast<const Kv4Append*>(c)); };
    run_grid(body, &a, static_cast<int>(a.kv_heads), static_cast<int>(a.batch), kThreads, 0);
    return true;
}

}  // namespace

// 0, or 1 where the instance is not among these.
extern "C" int append(const Kv4Append* a) {
    return !(append_if<__half, 64, 2>(*a) || append_if<__half, 64, 3>(*a) || append_if<__half, 64, 4>(*a) ||
             append_if<__half, 80, 8>(*a) || append_if<__half, 96, 2>(*a) || append_if<__nv_bfloat16, 64, 8>(*a) ||
             append_if<__nv_bfloat16, 80, 4>(*a));
}
