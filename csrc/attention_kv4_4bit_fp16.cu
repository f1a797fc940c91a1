// attention_kv4 in fp16 over pages of 4 bits: one file a dtype and width, so that they compile side by side.
#include "attention_kv4_launch.cuh"

namespace pyquant {

void attention_kv4_4bit_fp16(const Kv4Arguments& a, cudaStream_t stream) { attention_of<__half, 4>(a, stream); }

}  // namespace pyquant
