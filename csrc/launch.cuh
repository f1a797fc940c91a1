// Host-side helpers: error checks and the choice of a template by dtype number (0 bf16, 1 fp16, 2 fp32).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace pyquant {

inline void check_cuda(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

// Let a kernel use all the shared memory that a block of the current device can have, and say how much that is. Set
// once a kernel and device.
template <auto KERNEL>
int allow_shared_memory(const char* what) {
    static std::atomic<int> allowed[64];
    int device = 0, most = 0;
    check_cuda(cudaGetDevice(&device), what);
    if (device < 64) most = allowed[device].load(std::memory_order_relaxed);
    if (most) return most;
    check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), what);
    cudaFuncAttributes attributes{};
    check_cuda(cudaFuncGetAttributes(&attributes, KERNEL), what);
    most -= static_cast<int>(attributes.sharedSizeBytes);  // what the kernel declares itself
    check_cuda(cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, most), what);
    if (device < 64) allowed[device].store(most, std::memory_order_relaxed);
    return most;
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

// f with the head size as a compile-time constant.
template <typename F>
void with_head_size(int64_t head_size, const char* what, F&& f) {
    switch (head_size) {
        case 64:
            return f(std::integral_constant<int, 64>{});
        case 80:
            return f(std::integral_constant<int, 80>{});
        case 96:
            return f(std::integral_constant<int, 96>{});
        case 128:
            return f(std::integral_constant<int, 128>{});
        case 256:
            return f(std::integral_constant<int, 256>{});
        default:
            throw std::invalid_argument(std::string(what) + ": head size " + std::to_string(head_size) +
                                        " must be 64, 80, 96, 128 or 256");
    }
}

}  // namespace pyquant
