// attention_kv4 over pages of 2 bits: one file a width, so that they compile side by side.
#include "attention_kv4.cuh"

namespace pyquant {

void attention_kv4_2bit(const Kv4Arguments& a, cudaStream_t stream) { attention_of<2>(a, stream); }

}  // namespace pyquant
