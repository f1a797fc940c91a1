// Host-side helpers: error checks and the choice of a template by dtype number (0 bf16, 1 fp16, 2 fp32).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace pyquant {

inline void check_cuda(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

template <typename F>
void with_float_type(int dtype, F&& f) {
    switch (dtype) {
        case 0:
            return f(__nv_bfloat16{});
        case 1:
            return f(__half{});
        case 2:
            return f(float{});
        default:
            throw std::invalid_argument("unknown dtype number " + std::to_string(dtype));
    }
}

}  // namespace pyquant
