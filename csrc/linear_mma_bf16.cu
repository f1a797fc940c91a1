// linear_w4a16 for a few tokens in bf16: one file a dtype, so that they compile side by side.
#include "linear_mma.cuh"

namespace pyquant {

void linear_mma_bf16(const LinearCall& call, int variant, cudaStream_t stream) {
    linear_mma_of<__nv_bfloat16>(call, variant, stream);
}

}  // namespace pyquant
