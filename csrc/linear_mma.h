// The kernel of linear_w4a16 for up to 8 tokens (linear_mma.cuh), on Hopper with rows of x at 16 bytes.
#pragma once

#include "ops.h"

namespace pyquant {

// variant is the number of blocks that share K, 1 or 2; -1 chooses. Callers of linear_w4a16 pin it with tokens = -8.
void linear_mma_bf16(const LinearCall& call, int variant, cudaStream_t stream);
void linear_mma_fp16(const LinearCall& call, int variant, cudaStream_t stream);

}  // namespace pyquant
