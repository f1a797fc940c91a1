// The Python face of csrc/. Tensors cross it as addresses, sizes and a stream, all plain integers: no torch header is
// included, so that one build serves every torch version. Shapes, dtypes and devices are checked by pyquant/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

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

void quantize_activation(uintptr_t x, int64_t x_stride, int dtype, int source, uintptr_t weight, float eps,
                         uintptr_t small, int small_size, uintptr_t codes, uintptr_t scale, uintptr_t sums, int64_t m,
                         int64_t k, int64_t group_size, int64_t sum_size, int bits, double clip, bool fp8,
                         uintptr_t stream) {
    pyquant::quantize_activation(
        {at<void>(x), x_stride, dtype, source, at<void>(weight), eps, at<float>(small), small_size, at<void>(codes),
         at<float>(scale), at<float>(sums), m, k, group_size, sum_size, bits, clip, fp8},
        as_stream(stream));
}

void linear_w4a8(uintptr_t codes, uintptr_t act_scale, uintptr_t sums, bool fp8, uintptr_t qweight, uintptr_t scale,
                 int scale_dtype, uintptr_t zero, uintptr_t bias, uintptr_t y, int y_dtype, int64_t m, int64_t n,
                 int64_t k, int64_t group_size, int64_t act_group_size, uintptr_t stream, uintptr_t workspace,
                 int64_t workspace_bytes, int tokens, int variant) {
    pyquant::linear_w4a8({at<void>(codes), at<float>(act_scale), at<float>(sums), fp8, at<int32_t>(qweight),
                          at<void>(scale), scale_dtype, at<uint8_t>(zero), at<void>(bias), at<void>(y), y_dtype, m, n,
                          k, group_size, act_group_size, at<void>(workspace), workspace_bytes},
                         tokens, variant, as_stream(stream));
}

uint64_t capture_id(uintptr_t stream) {
    cudaStreamCaptureStatus status{};
    unsigned long long id = 0;
    pyquant::check_cuda(cudaStreamGetCaptureInfo(as_stream(stream), &status, &id), "cudaStreamGetCaptureInfo");
    return status == cudaStreamCaptureStatusActive ? id : 0;
}

void fake_quant(uintptr_t w, int dtype, int64_t w_stride, uintptr_t scale, uintptr_t zero, uintptr_t out, int64_t n,
                int64_t k, int64_t group_size, int bits, int rounding, int clamp, uintptr_t temperature, float beta,
                bool soft_forward, uintptr_t stream) {
    pyquant::fake_quant({at<void>(w),
                         nullptr,
                         dtype,
                         w_stride,
                         0,
                         at<float>(scale),
                         at<float>(zero),
                         at<float>(temperature),
                         at<void>(out),
                         nullptr,
                         nullptr,
                         n,
                         k,
                         group_size,
                         bits,
                         1.0f,
                         rounding,
                         clamp,
                         beta,
                         soft_forward},
                        as_stream(stream));
}

void fake_quant_backward(uintptr_t grad, int64_t grad_stride, uintptr_t w, int dtype, int64_t w_stride, uintptr_t scale,
                         uintptr_t zero, uintptr_t dw, uintptr_t dscale, uintptr_t dzero, int64_t n, int64_t k,
                         int64_t group_size, int bits, float grad_scale, int rounding, int clamp, uintptr_t temperature,
                         float beta, bool soft_forward, uintptr_t stream) {
    pyquant::fake_quant_backward({at<void>(w),
                                  at<void>(grad),
                                  dtype,
                                  w_stride,
                                  grad_stride,
                                  at<float>(scale),
                                  at<float>(zero),
                                  at<float>(temperature),
                                  at<void>(dw),
                                  at<float>(dscale),
                                  at<float>(dzero),
                                  n,
                                  k,
                                  group_size,
                                  bits,
                                  grad_scale,
                                  rounding,
                                  clamp,
                                  beta,
                                  soft_forward},
                                 as_stream(stream));
}

void distill_rows(uintptr_t sums, uintptr_t grad, int grad_dtype, uintptr_t student, int64_t student_stride,
                  uintptr_t teacher, int teacher_dtype, int64_t teacher_stride, uintptr_t labels, uintptr_t factor,
                  int64_t ignore_index, float kl, float reverse_kl, float jsd, float jsd_beta, float ce,
                  float temperature, float softcap, float teacher_softcap, float student_scale, float teacher_scale,
                  int64_t count, int64_t vocabulary, int64_t first, int64_t rows, int block, uintptr_t stream) {
    const pyquant::DistillRows a{at<float>(sums),
                                 at<void>(grad),
                                 grad_dtype,
                                 at<float>(student),
                                 student_stride,
                                 at<void>(teacher),
                                 teacher_dtype,
                                 teacher_stride,
                                 at<int64_t>(labels),
                                 at<float>(factor),
                                 ignore_index,
                                 kl,
                                 reverse_kl,
                                 jsd,
                                 jsd_beta,
                                 ce,
                                 temperature,
                                 softcap,
                                 teacher_softcap,
                                 student_scale,
                                 teacher_scale,
                                 count,
                                 vocabulary,
                                 first,
                                 rows,
                                 block};
    pyquant::distill_rows(a, as_stream(stream));
}

void distill_scale(uintptr_t t, int dtype, int64_t count, uintptr_t factor, float scale, uintptr_t stream) {
    pyquant::distill_scale(at<void>(t), dtype, count, at<float>(factor), scale, as_stream(stream));
}

void rms_norm(uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride, int dtype, uintptr_t weight,
              uintptr_t y, uintptr_t sum, int64_t m, int64_t k, float eps, uintptr_t stream) {
    pyquant::rms_norm(at<void>(x), x_stride, at<void>(residual), residual_stride, dtype, at<void>(weight), at<void>(y),
                      at<void>(sum), m, k, eps, as_stream(stream));
}

void silu_and_mul(uintptr_t gate_up, int64_t stride, int dtype, uintptr_t y, int64_t m, int64_t columns,
                  uintptr_t stream) {
    pyquant::silu_and_mul(at<void>(gate_up), stride, dtype, at<void>(y), m, columns, as_stream(stream));
}

pyquant::AttentionArguments attention_arguments(uintptr_t qkv, int64_t qkv_stride, int dtype, uintptr_t k_cache,
                                                uintptr_t v_cache, int64_t batch_stride, int64_t head_stride,
                                                int64_t slot_stride, uintptr_t slot, uintptr_t start, uintptr_t q_norm,
                                                uintptr_t k_norm, float eps, int64_t positions, int64_t batch,
                                                int64_t heads, int64_t kv_heads, int64_t head_size, int64_t capacity) {
    return {
        at<void>(qkv), qkv_stride,    dtype,          at<void>(k_cache), at<void>(v_cache), batch_stride, head_stride,
        slot_stride,   at<int>(slot), at<int>(start), at<void>(q_norm),  at<void>(k_norm),  eps,          positions,
        batch,         heads,         kv_heads,       head_size,         capacity};
}

void rope_append(const pyquant::AttentionArguments& a, uintptr_t cos, uintptr_t sin, uintptr_t q_out, int64_t length,
                 uintptr_t stream) {
    pyquant::rope_append(a, at<void>(cos), at<void>(sin), at<void>(q_out), length, as_stream(stream));
}

void attention_decode(const pyquant::AttentionArguments& a, uintptr_t cos, uintptr_t sin, uintptr_t out, float scaling,
                      int64_t window, bool early, uintptr_t stream) {
    pyquant::attention_decode(a, at<void>(cos), at<void>(sin), at<void>(out), scaling, window, early,
                              as_stream(stream));
}

void attention_kv4(uintptr_t q, int64_t q_batch_stride, int64_t q_token_stride, int dtype, uintptr_t prompt,
                   int64_t prompt_batch_stride, int64_t prompt_tiles, uintptr_t pages, int64_t page_capacity,
                   uintptr_t window, int64_t ring_tiles, uintptr_t segments, uintptr_t out, uintptr_t lse,
                   uintptr_t workspace, float scaling, float softcap, int64_t batch, int64_t tokens, int64_t heads,
                   int64_t kv_heads, int64_t head_size, bool early, int64_t bits, int64_t sliding_window,
                   uintptr_t sinks, uintptr_t stream) {
    pyquant::attention_kv4({at<void>(q),
                            q_batch_stride,
                            q_token_stride,
                            dtype,
                            at<void>(prompt),
                            prompt_batch_stride,
                            prompt_tiles,
                            at<void>(pages),
                            page_capacity,
                            at<void>(window),
                            ring_tiles,
                            at<int>(segments),
                            at<void>(out),
                            at<float>(lse),
                            at<void>(workspace),
                            scaling,
                            softcap,
                            batch,
                            tokens,
                            heads,
                            kv_heads,
                            head_size,
                            early,
                            bits,
                            sliding_window,
                            at<float>(sinks)},
                           as_stream(stream));
}

void append_kv4(uintptr_t k, std::array<int64_t, 4> k_strides, uintptr_t v, std::array<int64_t, 4> v_strides, int dtype,
                uintptr_t pages, int64_t page_capacity, uintptr_t window, int64_t ring_tiles, uintptr_t segments,
                uintptr_t workspace, int64_t batch, int64_t tokens, int64_t kv_heads, int64_t head_size, int64_t keep,
                int64_t bits, uintptr_t cos, uintptr_t sin, int64_t rope_batch_stride, bool rope_wide,
                uintptr_t stream) {
    pyquant::Kv4Append a{at<void>(k),
                         at<void>(v),
                         {},
                         {},
                         dtype,
                         at<void>(pages),
                         page_capacity,
                         at<void>(window),
                         ring_tiles,
                         at<int>(segments),
                         at<void>(workspace),
                         batch,
                         tokens,
                         kv_heads,
                         head_size,
                         keep,
                         bits,
                         at<void>(cos),
                         at<void>(sin),
                         rope_batch_stride,
                         rope_wide};
    std::copy(k_strides.begin(), k_strides.end(), a.k_strides);
    std::copy(v_strides.begin(), v_strides.end(), a.v_strides);
    pyquant::append_kv4(a, as_stream(stream));
}

void greedy_append(uintptr_t logits, int64_t stride, int dtype, int64_t rows, int64_t columns, uintptr_t tokens,
                   int64_t token_stride, int64_t width, uintptr_t ids, uintptr_t slot, uintptr_t unfinished,
                   uintptr_t length, uintptr_t eos, int64_t eos_count, int64_t pad, uintptr_t stream) {
    pyquant::greedy_append(at<void>(logits), stride, dtype, rows, columns,
                           {at<int64_t>(tokens), token_stride, width, at<int64_t>(ids), at<int>(slot),
                            at<int64_t>(unfinished), at<int64_t>(length), at<int64_t>(eos), eos_count, pad},
                           as_stream(stream));
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
    m.def("quantize_activation", &quantize_activation);
    m.def("linear_w4a8", &linear_w4a8, py::arg("codes"), py::arg("act_scale"), py::arg("sums"), py::arg("fp8"),
          py::arg("qweight"), py::arg("scale"), py::arg("scale_dtype"), py::arg("zero"), py::arg("bias"), py::arg("y"),
          py::arg("y_dtype"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("group_size"),
          py::arg("act_group_size"), py::arg("stream"), py::arg("workspace") = 0, py::arg("workspace_bytes") = 0,
          py::arg("tokens") = 0, py::arg("variant") = -1);
    m.def("linear_w4a8_workspace", &pyquant::linear_w4a8_workspace, py::arg("multiprocessors"));
    m.def("capture_id", &capture_id, py::arg("stream"),
          "The id of the graph that a stream is being captured into, or 0.");
    m.def("fake_quant", &fake_quant);
    m.def("fake_quant_backward", &fake_quant_backward);
    m.def("distill_rows", &distill_rows);
    m.def("distill_scale", &distill_scale);
    py::class_<pyquant::AttentionArguments>(m, "AttentionArguments").def(py::init(&attention_arguments));
    m.def("rms_norm", &rms_norm);
    m.def("silu_and_mul", &silu_and_mul);
    m.def("rope_append", &rope_append);
    m.def("attention_decode", &attention_decode);
    m.def("attention_kv4", &attention_kv4);
    m.def("attention_kv4_workspace", &pyquant::attention_kv4_workspace, py::arg("head_size"),
          py::arg("multiprocessors"));
    m.def("attention_kv4_shared", &pyquant::attention_kv4_shared, py::arg("bits"), py::arg("head_size"),
          py::arg("rows"));
    m.def("append_kv4", &append_kv4);
    m.attr("append_kv4_batch") = pyquant::kKv4AppendBatch;
    m.def("greedy_append", &greedy_append);
}
