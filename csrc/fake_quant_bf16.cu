// fake_quant for bf16 weights.
#include "fake_quant_launch.cuh"

namespace pyquant::fq {

void launch_bf16(const Call& c, Plan plan, cudaStream_t stream) { launch<__nv_bfloat16>(c, plan, stream); }

}  // namespace pyquant::fq
