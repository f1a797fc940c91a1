// Does this build hold code for the GPU at hand? Asked by `pyquant doctor`.
#pragma once

namespace pyquant {

struct DeviceCode {
    int binary;  // compute capability of the machine code that would run, times ten: 90 on a Hopper GPU
    int ptx;     // and of the PTX it came from
};

// Throws std::runtime_error with CUDA's own sentence where nothing in the build runs on `device`.
DeviceCode device_code(int device);

}  // namespace pyquant
