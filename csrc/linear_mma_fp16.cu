// linear_w4a16 for a few tokens in fp16: one file a dtype, so that they compile side by side.
#include "linear_mma.cuh"

namespace pyquant {

void linear_mma_fp16(const LinearCall& call, int variant, cudaStream_t stream) {
    linear_mma_of<__half>(call, variant, stream);
}

}  // namespace pyquant
