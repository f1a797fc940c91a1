// Host-side: launch a kernel that may start before the one ahead of it in the stream has ended (sm_90), by clusters of
// blocks where asked for.
#pragma once

#include "launch.cuh"

namespace pyquant {

struct Device {
    int multiprocessors, major;
};

inline Device current_device() {
    int device = 0;
    Device d{};
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, device),
               "cudaDeviceGetAttribute");
    check_cuda(cudaDeviceGetAttribute(&d.major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    return d;
}

// The kernel must execute wait_for_predecessor() before it touches what another kernel writes, or reads.
template <typename... Params, typename... Args>
void launch_programmatic(const char* what, void (*kernel)(Params...), dim3 grid, unsigned threads, size_t bytes,
                         unsigned cluster, int major, cudaStream_t stream, Args... args) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    cudaLaunchAttribute attributes[2]{};
    config.attrs = attributes;
    if (cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim.x = cluster;
        attributes[config.numAttrs].val.clusterDim.y = attributes[config.numAttrs].val.clusterDim.z = 1;
        ++config.numAttrs;
    }
    if (major >= 9) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
        ++config.numAttrs;
    }
    check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), what);
}

}  // namespace pyquant
