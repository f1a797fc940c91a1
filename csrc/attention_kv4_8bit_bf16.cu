// attention_kv4 in bf16 over pages of 8 bits: one file a dtype and width, so that they compile side by side.
#include "attention_kv4_launch.cuh"

namespace pyquant {

void attention_kv4_8bit_bf16(const Kv4Arguments& a, cudaStream_t stream) { attention_of<__nv_bfloat16, 8>(a, stream); }

}  // namespace pyquant
