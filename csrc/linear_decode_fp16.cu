// linear_w4a16 for few tokens in fp16: one file a dtype, so that they compile side by side.
#include "linear_decode.cuh"

namespace pyquant {

void linear_decode_fp16(const LinearCall& call, int force_splits, cudaStream_t stream) {
    linear_decode_of<__half>(call, force_splits, stream);
}

}  // namespace pyquant
