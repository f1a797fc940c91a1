// linear_w4a16 for many tokens in bf16: one file a dtype, so that they compile side by side.
#include "linear_wgmma.cuh"

namespace pyquant {

int64_t linear_workspace(int multiprocessors) {
    int64_t most = 0;
    for (int tokens : {16, 32, 64, 128, 256})
        most = std::max(most, multiprocessors * blocks_on(tokens) * partial_bytes(tokens));
    return kFlagBytes + most;
}

void linear_wgmma_bf16(const LinearCall& call, int force_tokens, int force_cut, cudaStream_t stream) {
    linear_wgmma_of<__nv_bfloat16>(call, force_tokens, force_cut, stream);
}

}  // namespace pyquant
