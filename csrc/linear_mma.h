// The kernel of linear_w4a16 for a few tokens (linear_mma.cuh), on Hopper with rows of x at 16 bytes.
#pragma once

#include "ops.h"

namespace pyquant {

// tokens of a pass: 8 or 16. variant is the number of blocks that share K, 1, 2, 4 or 8, and 16 times the number of a
// geometry (kGeometries); -1 leaves both to a count of bytes. Callers of linear_w4a16 pin it with tokens -8 and -16.
void linear_mma_bf16(const LinearCall& call, int tokens, int variant, cudaStream_t stream);
void linear_mma_fp16(const LinearCall& call, int tokens, int variant, cudaStream_t stream);

}  // namespace pyquant
