// fake_quant, forward and backward: the checks, and how a call is cut into segments. The kernels are in fake_quant.cuh.
#include "fake_quant_launch.cuh"
#include "ops.h"

namespace pyquant {
namespace {

uint32_t power_of_two_from(uint32_t v) {
    uint32_t p = 1;
    while (p < v) p *= 2;
    return p;
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

void run(const char* op, const FakeQuantCall& a, bool backward, cudaStream_t stream) {
    if (a.n == 0 || a.k == 0) return;
    const int64_t group = a.group_size < 0 || a.group_size > a.k ? a.k : a.group_size, groups = ceil_div(a.k, group);
    require(a.k < (1 << 30), std::string(op) + ": K=" + std::to_string(a.k) + " must be below 2^30");
    require(a.n * groups < (int64_t{1} << 31) - (1 << 20),
            std::string(op) + ": too many groups (" + std::to_string(a.n * groups) + ")");
    const float half = static_cast<float>(1 << (a.bits - 1));
    fq::Call c{};
    c.w = a.w;
    c.grad = a.grad;
    c.w_stride = a.w_stride;
    c.grad_stride = a.grad_stride;
    c.scale = a.scale;
    c.zero = a.zero;
    c.temperature = a.temperature;
    c.out = a.out;
    c.dscale = a.dscale;
    c.dzero = a.dzero;
    c.total = static_cast<uint32_t>(a.n * groups);
    c.groups = static_cast<uint32_t>(groups);
    c.k = static_cast<uint32_t>(a.k);
    c.group = static_cast<uint32_t>(group);
    c.range = a.zero ? fq::Range{0.0f, 2 * half - 1} : fq::Range{-half, half - 1};
    c.beta = a.beta;
    c.grad_scale = a.grad_scale;
    c.rounding = a.rounding;
    c.clamp = a.clamp;
    c.soft = a.soft_forward;

    const int64_t vec = a.dtype == 2 ? 4 : 8;
    fq::Plan plan{backward, true, false};
    for (const void* p : {a.w, a.grad, static_cast<const void*>(a.out)}) plan.wide = plan.wide && aligned(p);
    for (int64_t count : {a.w_stride, backward ? a.grad_stride : 0, a.k, group})
        plan.wide = plan.wide && count % vec == 0;
    const uint32_t vectors = static_cast<uint32_t>(plan.wide ? group / vec : group);
    const bool gapless = a.w_stride == a.k && (!backward || a.grad_stride == a.k) && a.k % group == 0;
    const uint32_t share = vectors / fq::kFlatVectors;
    plan.flat = plan.wide && gapless && vectors % fq::kFlatVectors == 0 && share <= 32 && (share & (share - 1)) == 0;
    c.lanes = plan.flat ? share : power_of_two_from(ceil_div(vectors, 2));
    if (c.lanes > fq::kThreads) c.lanes = fq::kThreads;

    switch (a.dtype) {
        case 0:
            fq::launch_bf16(c, plan, stream);
            break;
        case 1:
            fq::launch_fp16(c, plan, stream);
            break;
        case 2:
            fq::launch_fp32(c, plan, stream);
            break;
        default:
            throw std::invalid_argument("unknown dtype number " + std::to_string(a.dtype));
    }
    check_cuda(cudaGetLastError(), op);
}

}  // namespace

void fake_quant(const FakeQuantCall& call, cudaStream_t stream) { run("fake_quant", call, false, stream); }

void fake_quant_backward(const FakeQuantCall& call, cudaStream_t stream) {
    run("fake_quant_backward", call, true, stream);
}

}  // namespace pyquant
