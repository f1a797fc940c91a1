// Host-side helpers: error checks and the choice of a template by dtype number (0 bf16, 1 fp16, 2 fp32).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace pyquant {

inline void check_cuda(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

// Let a kernel use all the shared memory a block of this device can have. Asked for once a kernel and device.
template <auto KERNEL>
void allow_shared_memory(int device, const char* what) {
    static std::atomic<uint64_t> done{0};
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if (bit && (done.load(std::memory_order_relaxed) & bit)) return;
    int most = 0;
    check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), what);
    check_cuda(cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, most), what);
    done.fetch_or(bit, std::memory_order_relaxed);
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
