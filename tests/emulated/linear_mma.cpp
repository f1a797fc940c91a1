// The kernel of linear_mma as a function of the CPU, and the choice of blocks that share K.
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

template <typename T, int GROUPS>
bool multiply_if(const LinearCall& a, const Problem& p, const Choice& choice) {
    if ((a.dtype == 1) != std::is_same_v<T, __half> || groups_of(a) != GROUPS) return false;
    const auto body = [](const void* c) {
        const auto& b = *static_cast<const Bound<T>*>(c);
        linear_mma_kernel<T, GROUPS>(static_cast<const T*>(b.call.x), reinterpret_cast<const uint4*>(b.call.qweight),
                                     static_cast<const T*>(b.call.scale), b.call.zero,
                                     static_cast<const T*>(b.call.bias), static_cast<T*>(b.call.y), b.p, b.plan);
    };
    const Bound<T> bound{a, p, choice.plan};
    const int splits = choice.plan.cut + 1;
    run_grid(body, &bound, choice.plan.row_blocks * splits, 1, kThreads, choice.bytes, splits);
    return true;
}

}  // namespace

// 0, or 1 where there is no such instance, or 2 where shared memory of most_bytes does not hold it.
extern "C" int multiply(const LinearCall* a, int splits, int multiprocessors, int most_bytes) {
    const Problem p = problem_of(*a);
    const Choice c = plan_of(p, multiprocessors, splits, groups_of(*a), most_bytes);
    if (c.bytes > most_bytes) return 2;
    const auto made = [&](auto... instances) { return !(instances(*a, p, c) || ...); };
    return made(multiply_if<__nv_bfloat16, 1>, multiply_if<__nv_bfloat16, 2>, multiply_if<__nv_bfloat16, 4>,
                multiply_if<__half, 1>, multiply_if<__half, 2>, multiply_if<__half, 4>);
}

// The number of blocks that share K, and bytes of shared memory of a block of such a launch.
extern "C" int chosen(const LinearCall* a, int multiprocessors, int most_bytes, int* bytes) {
    const Problem p = problem_of(*a);
    const int splits = splits_of(p, multiprocessors);
    *bytes = plan_of(p, multiprocessors, splits, groups_of(*a), most_bytes).bytes;
    return splits;
}
