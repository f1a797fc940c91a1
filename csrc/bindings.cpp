// The Python face of csrc/. Tensors cross it as addresses, sizes and a stream, all plain integers: no torch header is
// included, so that one build serves every torch version. Shapes, dtypes and devices are checked by pyquant/ops.
#include <pybind11/pybind11.h>

#include "launch.cuh"
#include "ops.h"
#include "probe.h"

namespace py = pybind11;

namespace {

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

cudaStream_t as_stream(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

void quantize_int4(uintptr_t w, int w_dtype, int64_t w_stride, uintptr_t scale, uintptr_t zero, uintptr_t qweight,
                   int64_t n, int64_t k, int64_t group_size, int bits, uintptr_t stream) {
    pyquant::quantize_int4(at<void>(w), w_dtype, w_stride, at<float>(scale), at<float>(zero), at<int32_t>(qweight), n,
                           k, group_size, bits, as_stream(stream));
}

void dequantize_int4(uintptr_t qweight, uintptr_t scale, int scale_dtype, uintptr_t zero, uintptr_t out, int out_dtype,
                     int64_t n, int64_t k, int64_t group_size, uintptr_t stream) {
    pyquant::dequantize_int4(at<int32_t>(qweight), at<void>(scale), scale_dtype, at<uint8_t>(zero), at<void>(out),
                             out_dtype, n, k, group_size, as_stream(stream));
}

void linear_w4a16(uintptr_t x, int64_t x_stride, int dtype, uintptr_t qweight, uintptr_t scale, uintptr_t zero,
                  uintptr_t bias, uintptr_t y, int64_t m, int64_t n, int64_t k, int64_t group_size, uintptr_t stream,
                  uintptr_t workspace, int64_t workspace_bytes, int tokens, int variant) {
    const pyquant::LinearCall call{at<void>(x),
                                   x_stride,
                                   dtype,
                                   at<int32_t>(qweight),
                                   at<void>(scale),
                                   at<uint8_t>(zero),
                                   at<void>(bias),
                                   at<void>(y),
                                   m,
                                   n,
                                   k,
                                   group_size,
                                   at<void>(workspace),
                                   workspace_bytes};
    pyquant::linear_w4a16(call, tokens, variant, as_stream(stream));
}

uint64_t capture_id(uintptr_t stream) {
    cudaStreamCaptureStatus status{};
    unsigned long long id = 0;
    pyquant::check_cuda(cudaStreamGetCaptureInfo(as_stream(stream), &status, &id), "cudaStreamGetCaptureInfo");
    return status == cudaStreamCaptureStatusActive ? id : 0;
}

void fake_quant(uintptr_t w, int dtype, int64_t w_stride, uintptr_t scale, uintptr_t zero, uintptr_t out, int64_t n,
                int64_t k, int64_t group_size, int bits, uintptr_t stream) {
    pyquant::fake_quant(at<void>(w), dtype, w_stride, at<float>(scale), at<float>(zero), at<void>(out), n, k,
                        group_size, bits, as_stream(stream));
}

void fake_quant_backward(uintptr_t grad, int64_t grad_stride, uintptr_t w, int dtype, int64_t w_stride, uintptr_t scale,
                         uintptr_t zero, uintptr_t dw, uintptr_t dscale, uintptr_t dzero, int64_t n, int64_t k,
                         int64_t group_size, int bits, float grad_scale, uintptr_t stream) {
    pyquant::fake_quant_backward(at<void>(grad), grad_stride, at<void>(w), dtype, w_stride, at<float>(scale),
                                 at<float>(zero), at<void>(dw), at<float>(dscale), at<float>(dzero), n, k, group_size,
                                 bits, grad_scale, as_stream(stream));
}

}  // namespace

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

    // Arguments: csrc/ops.h.
    m.def("quantize_int4", &quantize_int4);
    m.def("dequantize_int4", &dequantize_int4);
    m.def("linear_w4a16", &linear_w4a16, py::arg("x"), py::arg("x_stride"), py::arg("dtype"), py::arg("qweight"),
          py::arg("scale"), py::arg("zero"), py::arg("bias"), py::arg("y"), py::arg("m"), py::arg("n"), py::arg("k"),
          py::arg("group_size"), py::arg("stream"), py::arg("workspace") = 0, py::arg("workspace_bytes") = 0,
          py::arg("tokens") = 0, py::arg("variant") = -1);
    m.def("linear_workspace", &pyquant::linear_workspace, py::arg("multiprocessors"));
    m.def("capture_id", &capture_id, py::arg("stream"),
          "The id of the graph that a stream is being captured into, or 0.");
    m.def("fake_quant", &fake_quant);
    m.def("fake_quant_backward", &fake_quant_backward);
}
