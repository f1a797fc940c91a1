// fake_quant for fp32 weights.
#include "fake_quant_launch.cuh"

namespace pyquant::fq {

void launch_fp32(const Call& c, Plan plan, cudaStream_t stream) { launch<float>(c, plan, stream); }

}  // namespace pyquant::fq
