// The kernel of linear_mma as a function of the CPU: some of its instances, all of its geometries.
#include "cuda.h"

struct Device {
    int multiprocessors, major;
};

#include "linear_mma.cuh"

using namespace pyquant;

namespace {

template <typename T>
struct Bound {
    const LinearCall& call;
    Problem p;
    Plan plan;
};

template <typename T, int NT, int GROUPS, int GEOMETRY>
bool multiply_if(const LinearCall& a, const Problem& p, const Choice& choice, int tokens, int groups, bool half) {
    static constexpr Geometry kShape = kGeometries[GEOMETRY];
    if (half != std::is_same_v<T, __half> || tokens != 8 * NT || groups != GROUPS || choice.geometry != GEOMETRY)
        return false;
    const auto body = [](const void* c) {
        const auto& b = *static_cast<const Bound<T>*>(c);
        linear_mma_kernel<T, NT, GROUPS, kShape.warps, kShape.tiles, kShape.slots>(
            static_cast<const T*>(b.call.x), reinterpret_cast<const uint4*>(b.call.qweight),
            static_cast<const T*>(b.call.scale), b.call.zero, static_cast<const T*>(b.call.bias),
            static_cast<T*>(b.call.y), b.p, b.plan);
    };
    const Bound<T> bound{a, p, choice.plan};
    const int splits = 1 << choice.plan.log_splits;
    run_grid(body, &bound, choice.plan.row_blocks * splits, static_cast<int>(ceil_div(p.m, tokens)), 32 * kShape.warps,
             choice.bytes, splits);
    return true;
}

}  // namespace

// 0, or 1 where the instance is not among these, or 2 where shared memory of most_bytes does not hold it.
extern "C" int multiply(const LinearCall* a, int tokens, int geometry, int log_splits, int multiprocessors,
                        int most_bytes) {
    const Problem p = problem_of(*a);
    const int groups = groups_of(*a);
    const Choice c = plan_of(p, multiprocessors, tokens, geometry, log_splits, groups, most_bytes);
    if (c.bytes > most_bytes) return 2;
    const auto made = [&](auto... instances) { return !(instances(*a, p, c, tokens, groups, a->dtype == 1) || ...); };
    return made(multiply_if<__nv_bfloat16, 1, 1, 0>, multiply_if<__nv_bfloat16, 2, 1, 1>,
                multiply_if<__nv_bfloat16, 1, 4, 1>, multiply_if<__half, 2, 2, 0>, multiply_if<__half, 1, 4, 2>,
                multiply_if<__half, 2, 1, 3>, multiply_if<__nv_bfloat16, 2, 2, 2>);
}
