// The Python face of csrc/. Tensors cross it as addresses, sizes and a stream, all plain integers: no torch header is
// included, so that one build serves every torch version. Shapes, dtypes and devices are checked by pyquant/ops.
#include <pybind11/pybind11.h>

#include "probe.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
    m.doc() = "CUDA kernels of pyquant. Call them through pyquant.ops, which checks what is passed.";

    m.def(
        "build_info",
        [] {
            py::dict info;
            info["cuda"] = PYQUANT_CUDA_VERSION;
            info["archs"] = PYQUANT_ARCHS;
            info["flags"] = PYQUANT_FLAGS;
            return info;
        },
        "How this module was compiled: CUDA toolkit version, targets, compiler flags.");

    m.def(
        "device_code",
        [](int device) {
            const pyquant::DeviceCode code = pyquant::device_code(device);
            py::dict found;
            found["binary"] = code.binary;
            found["ptx"] = code.ptx;
            return found;
        },
        py::arg("device"), "The machine code of this module that runs on a device; RuntimeError where none does.");
}
