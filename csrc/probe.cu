// An empty kernel compiled for the same targets as all the others: where the driver finds code for it, it finds theirs.
#include "probe.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace pyquant {
namespace {

__global__ void probe_kernel() {}

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        cudaGetLastError();  // clear it: the next, unrelated launch must not report this one
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
    }
}

}  // namespace

DeviceCode device_code(int device) {
    int previous = 0;
    check(cudaGetDevice(&previous), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
    cudaFuncAttributes attributes{};
    const cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
    cudaSetDevice(previous);
    check(status, "no code for this device");
    return {attributes.binaryVersion, attributes.ptxVersion};
}

}  // namespace pyquant
