// fake_quant for fp16 weights.
#include "fake_quant_launch.cuh"

namespace pyquant::fq {

void launch_fp16(const Call& c, Plan plan, cudaStream_t stream) { launch<__half>(c, plan, stream); }

}  // namespace pyquant::fq
