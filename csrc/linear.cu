// linear_w4a16: checks what all kernels take for granted, and picks one.
//
//   M <= 4            linear_decode.cuh, any GPU: exact integer products, made for chains of small calls
//   M  > 4, Hopper    linear_wgmma.cuh
//   M  > 4, others    linear_decode.cuh in passes of 8 tokens (pyquant/ops/linear.py expands the weight for many
//   tokens)
//
// tokens = -8 pins linear_mma.cuh (Hopper, up to 8 tokens), which is for tests and timing until it is chosen.
#include <algorithm>

#include "format.cuh"
#include "linear_mma.h"
#include "ops.h"
#include "programmatic.cuh"

namespace pyquant {

void linear_w4a16(const LinearCall& call, int tokens, int variant, cudaStream_t stream) {
    if (call.m == 0 || call.n == 0) return;
    require(call.dtype == 0 || call.dtype == 1, "linear_w4a16: x must be bf16 or fp16");
    require(call.group_size == -1 || call.group_size == 32 || call.group_size == 64 || call.group_size == 128,
            "linear_w4a16: group_size=" + std::to_string(call.group_size) + " must be 32, 64, 128 or -1");
    require(std::max({call.m, call.n, call.k}) < (1 << 30) && call.n * call.k < (int64_t{1} << 36),
            "linear_w4a16: M=" + std::to_string(call.m) + " N=" + std::to_string(call.n) +
                " K=" + std::to_string(call.k) + " is too large");
    require(reinterpret_cast<uintptr_t>(call.qweight) % 16 == 0 && reinterpret_cast<uintptr_t>(call.scale) % 16 == 0 &&
                reinterpret_cast<uintptr_t>(call.zero) % 16 == 0 && reinterpret_cast<uintptr_t>(call.y) % 16 == 0,
            "linear_w4a16: qweight, scale, zero and y must begin at multiples of 16 bytes");
    const bool hopper = current_device().major == 9;
    if (tokens < 0) {
        require(hopper && tokens == -8,
                "linear_w4a16: tokens=" + std::to_string(tokens) + " must be -8, and the GPU a Hopper");
        return (call.dtype == 0 ? linear_mma_bf16 : linear_mma_fp16)(call, variant, stream);
    }
    if (hopper && (tokens > 0 ? tokens > 8 : call.m > 4)) {
        (call.dtype == 0 ? linear_wgmma_bf16 : linear_wgmma_fp16)(call, tokens, variant, stream);
    } else {
        (call.dtype == 0 ? linear_decode_bf16 : linear_decode_fp16)(call, std::max(variant, 0), stream);
    }
}

}  // namespace pyquant
