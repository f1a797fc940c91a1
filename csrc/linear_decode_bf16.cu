// linear_w4a16 for few tokens in bf16: one file a dtype, so that they compile side by side.
#include "linear_decode.cuh"

namespace pyquant {

void linear_decode_bf16(const LinearCall& call, int force_splits, cudaStream_t stream) {
    linear_decode_of<__nv_bfloat16>(call, force_splits, stream);
}

}  // namespace pyquant
