// The functions that bindings.cpp exposes: addresses, sizes and the stream, no torch types.
// dtype numbers: 0 bf16, 1 fp16, 2 fp32. Strides count elements. A null pointer means "absent".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pyquant {

// w [n, k] -> qweight in tiled order; scale and zero fp32 row-major [n, ceil(k / group)].
void quantize_int4(const void* w, int w_dtype, int64_t w_stride, const float* scale, const float* zero,
                   int32_t* qweight, int64_t n, int64_t k, int64_t group_size, int bits, cudaStream_t stream);

// qweight -> out [n, k] contiguous; scale and zero in tiled order.
void dequantize_int4(const int32_t* qweight, const void* scale, int scale_dtype, const uint8_t* zero, void* out,
                     int out_dtype, int64_t n, int64_t k, int64_t group_size, cudaStream_t stream);

// y [m, n] contiguous = x [m, k] w_hat^T + bias; x, scale, bias and y of one 16-bit dtype, x with rows x_stride apart.
struct LinearCall {
    const void* x;
    int64_t x_stride;
    int dtype;
    const int32_t* qweight;
    const void* scale;
    const uint8_t* zero;
    const void* bias;
    void* y;
    int64_t m, n, k, group_size;
    void* workspace;  // linear_workspace() bytes, zero before its first use and used by one launch at a time; or null
    int64_t workspace_bytes;
};
// tokens and variant pin the token tile and how it is cut, for measurements; 0 and -1 leave the choice to the kernels.
// tokens <= 8 is linear_decode.cuh, where variant is the number of blocks that share K; above it linear_wgmma.cuh
// (sm_90, rows of x at 16 bytes), where variant 0 takes whole tiles, and 1 and 2 cut them over that many blocks a
// multiprocessor. tokens = -8 is linear_mma.h.
void linear_w4a16(const LinearCall& call, int tokens, int variant, cudaStream_t stream);
void linear_decode_bf16(const LinearCall& call, int force_splits, cudaStream_t stream);
void linear_decode_fp16(const LinearCall& call, int force_splits, cudaStream_t stream);
void linear_wgmma_bf16(const LinearCall& call, int force_tokens, int force_cut, cudaStream_t stream);
void linear_wgmma_fp16(const LinearCall& call, int force_tokens, int force_cut, cudaStream_t stream);
int64_t linear_workspace(int multiprocessors);  // bytes

// Rows of x [m, k], x_stride apart, to 8-bit codes [m, k padded to 64] and scales fp32 [groups, m padded to 4]:
// csrc/act8.cu. source 0 takes x, 1 rms_norm(x) with weight [k] and eps, 2 silu(gate) * up of x [m, 2 k], 3 the rotated
// x with a dense factor small fp32 [small_size, small_size], or null. sum_size 0: no sums; else fp32 like scale.
struct ActCall {
    const void* x;
    int64_t x_stride;
    int dtype, source;
    const void* weight;
    float eps;
    const float* small;
    int small_size;
    void* codes;
    float *scale, *sums;
    int64_t m, k, group_size, sum_size;
    int bits;
    double clip;
    bool fp8;
};
void quantize_activation(const ActCall& call, cudaStream_t stream);

// y [m, n] contiguous = the product of 8-bit codes [m, k padded to 64] and a 4-bit weight; csrc/linear_w4a8.cuh says
// what is computed. act_scale and sums fp32 [groups, m padded to 4]; sums of 128 columns
// each, or of 32 where tokens have groups or those of the weight are smaller than 128, are needed with zeros and for
// fp8. scale and bias of scale_dtype (0 bf16, 1 fp16), y of scale_dtype or fp32.
struct LinearA8Call {
    const void* codes;
    const float *act_scale, *sums;
    bool fp8;
    const int32_t* qweight;
    const void* scale;
    int scale_dtype;
    const uint8_t* zero;
    const void* bias;
    void* y;
    int y_dtype;
    int64_t m, n, k, group_size, act_group_size;
    void* workspace;  // linear_w4a8_workspace() bytes, zero before its first use and used by one launch at a time; or
                      // null
    int64_t workspace_bytes;
};
// tokens and variant pin the tile and how it is cut, as for linear_w4a16; 0 and -1 leave the choice to the kernels, and
// tokens = 8 is linear_w4a8_mma.
void linear_w4a8(const LinearA8Call& call, int tokens, int variant, cudaStream_t stream);
void linear_w4a8_mma(const LinearA8Call& call, cudaStream_t stream);
int64_t linear_w4a8_workspace(int multiprocessors);  // bytes

// fake_quant: out [n, k] contiguous = the quantized value of w; scale and zero fp32 row-major [n, ceil(k / group)].
// Its backward: out is dw, dscale and dzero are fp32 row-major. rounding 0 straight-through, 1 and 2 the sigmoid
// roundings A and B; clamp 0 hard, 1 sigmoid, 2 phi; temperature one fp32 on the device, or null with rounding 0.
struct FakeQuantCall {
    const void *w, *grad;
    int dtype;
    int64_t w_stride, grad_stride;
    const float *scale, *zero, *temperature;
    void* out;
    float *dscale, *dzero;
    int64_t n, k, group_size;
    int bits;
    float grad_scale;
    int rounding, clamp;
    float beta;
    bool soft_forward;
};
void fake_quant(const FakeQuantCall& call, cudaStream_t stream);
void fake_quant_backward(const FakeQuantCall& call, cudaStream_t stream);

// Rows of logits of a distillation step: csrc/distill.cu says what is computed. grad null: losses only; teacher null:
// cross-entropy only; labels null: every row counts. softcap 0: none. student and teacher have rows at 16 bytes.
struct DistillRows {
    float* sums;  // [count, 4]
    void* grad;   // in blocks of columns, of a matrix [rows, vocabulary]; row 0 here is its row `first`
    int grad_dtype;
    const float* student;
    int64_t student_stride;
    const void* teacher;
    int teacher_dtype;
    int64_t teacher_stride;
    const int64_t* labels;
    const float* factor;
    int64_t ignore_index;
    float kl, reverse_kl, jsd, jsd_beta, ce, temperature, softcap, teacher_softcap, student_scale, teacher_scale;
    int64_t count, vocabulary, first, rows;
    int block;
};
void distill_rows(const DistillRows& a, cudaStream_t stream);

// t *= *factor * scale, in place; where that is 1 nothing is touched.
void distill_scale(void* t, int dtype, int64_t count, const float* factor, float scale, cudaStream_t stream);

// ---- the kernels of a decode step around the matrix products

// y [m, k] contiguous = x * rsqrt(mean(x^2) + eps) * weight; with a residual, sum = x + residual is written and takes
// the place of x.
void rms_norm(const void* x, int64_t x_stride, const void* residual, int64_t residual_stride, int dtype,
              const void* weight, void* y, void* sum, int64_t m, int64_t k, float eps, cudaStream_t stream);

// y [m, columns] contiguous = silu(gate) * up for gate_up [m, 2 columns].
void silu_and_mul(const void* gate_up, int64_t stride, int dtype, void* y, int64_t m, int64_t columns,
                  cudaStream_t stream);

// What rope_append and attention_decode share: csrc/attention_decode.cu says what each is.
struct AttentionArguments {
    const void* qkv;
    int64_t qkv_stride;
    int dtype;
    void *k_cache, *v_cache;
    int64_t batch_stride, head_stride, slot_stride;
    const int *slot, *start;
    const void *q_norm, *k_norm;
    float eps;
    int64_t positions, batch, heads, kv_heads, head_size, capacity;
};

// cos and sin fp32 [positions, head_size / 2]; q_out [batch, length, heads, head_size].
void rope_append(const AttentionArguments& a, const void* cos, const void* sin, void* q_out, int64_t length,
                 cudaStream_t stream);

// out [batch, heads * head_size]; window 0 attends to everything since start.
void attention_decode(const AttentionArguments& a, const void* cos, const void* sin, void* out, float scaling,
                      int64_t window, bool early, cudaStream_t stream);

// q and out [batch, tokens, heads, head_size], out contiguous, lse fp32 [batch, tokens, heads] or null; the cache as
// pyquant/formats/kv4.py says, prompt_batch_stride 0 for one prompt of the whole batch. workspace:
// attention_kv4_workspace() bytes, zero before its first use and used by one launch at a time. early: nothing but q is
// written by the kernel ahead in the stream. sinks: fp32 by query head, or null. sliding_window: 0 for none.
struct Kv4Arguments {
    const void* q;
    int64_t q_batch_stride, q_token_stride;
    int dtype;
    const void* prompt;
    int64_t prompt_batch_stride, prompt_tiles;
    const void* pages;
    int64_t page_capacity;
    const void* window;
    int64_t ring_tiles;
    const int* segments;
    void* out;
    float* lse;
    void* workspace;
    float scaling, softcap;
    int64_t batch, tokens, heads, kv_heads, head_size;
    bool early;
    int64_t bits, sliding_window;
    const float* sinks;
};
int64_t attention_kv4_workspace(int64_t head_size, int multiprocessors);
// Bytes of shared memory that a block needs; rows: query heads a KV head times query tokens.
int64_t attention_kv4_shared(int64_t bits, int64_t head_size, int64_t rows);
void attention_kv4(const Kv4Arguments& a, cudaStream_t stream);

// k and v [batch, tokens <= 64, kv_heads, head_size] with strides in values. cos and sin [tokens, head_size] of each
// sequence, in fp32 where rope_wide and otherwise in k's dtype, or null. keep: tokens that the window keeps at
// least, or -1 where nothing is packed. workspace: kKv4AppendBatch counters of 4 bytes, zero before its first use and
// used by one launch at a time.
constexpr int64_t kKv4AppendBatch = 4096;
struct Kv4Append {
    const void *k, *v;
    int64_t k_strides[4], v_strides[4];  // batch, token, head, channel
    int dtype;
    void* pages;
    int64_t page_capacity;
    void* window;
    int64_t ring_tiles;
    int* segments;
    void* workspace;
    int64_t batch, tokens, kv_heads, head_size, keep, bits;
    const void *cos, *sin;
    int64_t rope_batch_stride;
    bool rope_wide;
};
void append_kv4(const Kv4Append& a, cudaStream_t stream);

// What greedy_append updates: csrc/sample.cu says how. eos null: sequences do not end.
struct GreedyState {
    int64_t* tokens;
    int64_t token_stride, width;
    int64_t* ids;
    int* slot;
    int64_t *unfinished, *length;
    const int64_t* eos;
    int64_t eos_count, pad;
};

// logits [rows, columns] of a 16-bit dtype.
void greedy_append(const void* logits, int64_t stride, int dtype, int64_t rows, int64_t columns, const GreedyState& s,
                   cudaStream_t stream);

}  // namespace pyquant
