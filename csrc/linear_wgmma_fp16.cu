// linear_w4a16 for many tokens in fp16: one file a dtype, so that they compile side by side.
#include "linear_wgmma.cuh"

namespace pyquant {

void linear_wgmma_fp16(const LinearCall& call, int force_tokens, int force_cut, cudaStream_t stream) {
    linear_wgmma_of<__half>(call, force_tokens, force_cut, stream);
}

}  // namespace pyquant
