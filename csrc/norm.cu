// rms_norm:      y [M, K] = x * rsqrt(mean(x^2) + eps) * weight, row by row
// add_rms_norm:  sum [M, K] = x + residual, rounded to 16 bits; y = rms_norm(sum)
//
//   x, residual [M, K] with any row stride, y and sum contiguous; weight [K]; fp32 inside, one rounding at the end.
//
// One block a row. A thread keeps its pieces of 8 columns in registers between the sum of squares and the result, so
// each value is read once:
//
//   row   | thread 0 | thread 1 | ... | thread T-1 | thread 0 | ...      a piece = 8 columns = 16 bytes
//
// Many rows: bound by memory, 4 bytes a value (8 with the addition). One row (a decode step): nothing but latency, two
// trips to L2 and one barrier; the weight is fetched before the wait for the kernel ahead, and the kernel behind may
// start at once. Rows that are too long for registers, or not made of aligned pieces, take the plain kernel, which
// reads them twice.
#include <algorithm>

#include "ops.h"
#include "pieces.cuh"
#include "programmatic.cuh"

namespace pyquant {
namespace {

constexpr int kFewRows = 64;

template <typename T>
struct Rows {
    const T* x;
    int64_t x_stride;
    const T* residual;  // null: nothing is added
    int64_t residual_stride;
    const T* weight;
    T* y;
    T* sum;
    int k;
    float eps;
};

// Sum over the block, the same in every thread; one barrier.
template <int THREADS>
__device__ __forceinline__ float sum_block(float v) {
    __shared__ float parts[THREADS / 32];
    v = sum_lanes<32>(v);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < THREADS / 32; ++warp) total += parts[warp];
    return total;
}

template <typename T, int THREADS, int PIECES>
__global__ void __launch_bounds__(THREADS) norm_kernel(Rows<T> rows) {
    ptx::launch_dependents();
    const int64_t row = blockIdx.x;
    uint4 weight[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        const int col = (i * THREADS + threadIdx.x) * kPiece;
        weight[i] = col < rows.k ? *reinterpret_cast<const uint4*>(rows.weight + col) : make_uint4(0, 0, 0, 0);
    }
    ptx::wait_for_predecessor();

    uint4 x[PIECES], residual[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        const int col = (i * THREADS + threadIdx.x) * kPiece;
        x[i] = residual[i] = make_uint4(0, 0, 0, 0);
        if (col < rows.k) {
            x[i] = ptx::load16(rows.x + row * rows.x_stride + col);
            if (rows.residual) residual[i] = ptx::load16(rows.residual + row * rows.residual_stride + col);
        }
    }
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        const int col = (i * THREADS + threadIdx.x) * kPiece;
        float v[kPiece];
        unpack8<T>(v, x[i]);
        if (rows.residual) {
            float r[kPiece];
            unpack8<T>(r, residual[i]);
#pragma unroll
            for (int j = 0; j < kPiece; ++j) v[j] += r[j];
            x[i] = pack8<T>(v);
            unpack8<T>(v, x[i]);  // the norm is that of the rounded sum, which the next layer adds to
            if (col < rows.k) *reinterpret_cast<uint4*>(rows.sum + row * rows.k + col) = x[i];
        }
#pragma unroll
        for (int j = 0; j < kPiece; ++j) squares += v[j] * v[j];
    }
    const float factor = rsqrtf(sum_block<THREADS>(squares) / rows.k + rows.eps);
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        const int col = (i * THREADS + threadIdx.x) * kPiece;
        float v[kPiece], w[kPiece];
        unpack8<T>(v, x[i]);
        unpack8<T>(w, weight[i]);
#pragma unroll
        for (int j = 0; j < kPiece; ++j) v[j] = v[j] * factor * w[j];
        if (col < rows.k) *reinterpret_cast<uint4*>(rows.y + row * rows.k + col) = pack8<T>(v);
    }
}

template <typename T, int THREADS>
__global__ void __launch_bounds__(THREADS) plain_norm_kernel(Rows<T> rows) {
    ptx::launch_dependents();
    ptx::wait_for_predecessor();
    const int64_t row = blockIdx.x;
    const T* x = rows.x + row * rows.x_stride;
    const T* residual = rows.residual + row * rows.residual_stride;
    T* sum = rows.sum + row * rows.k;
    float squares = 0.0f;
    for (int col = threadIdx.x; col < rows.k; col += THREADS) {
        float v = ptx::load_one(x + col);
        if (rows.residual) {
            const T rounded = from_float<T>(v + ptx::load_one(residual + col));
            sum[col] = rounded;
            v = to_float(rounded);
        }
        squares += v * v;
    }
    const float factor = rsqrtf(sum_block<THREADS>(squares) / rows.k + rows.eps);
    for (int col = threadIdx.x; col < rows.k; col += THREADS) {
        float v = ptx::load_one(x + col);
        if (rows.residual) v = to_float(from_float<T>(v + ptx::load_one(residual + col)));
        rows.y[row * rows.k + col] = from_float<T>(v * factor * to_float(rows.weight[col]));
    }
}

bool aligned(const void* p, int64_t stride) { return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % kPiece == 0; }

template <typename T>
void launch(const Rows<T>& rows, int64_t m, cudaStream_t stream) {
    const int major = current_device().major;
    const auto run = [&](auto kernel, unsigned threads) {
        launch_programmatic("rms_norm", kernel, dim3(static_cast<unsigned>(m)), threads, 0, 1, major, stream, rows);
    };
    const bool pieces = aligned(rows.x, rows.x_stride) && aligned(rows.weight, 0) && rows.k % kPiece == 0 &&
                        (!rows.residual || aligned(rows.residual, rows.residual_stride));
    if (!pieces || rows.k > 512 * 4 * kPiece) return run(plain_norm_kernel<T, 512>, 512);
    if (rows.k <= 128 * kPiece) return run(norm_kernel<T, 128, 1>, 128);
    // A step of decoding: small enough to stand beside two blocks of linear_decode.cuh, which stream weights meanwhile.
    if (m <= kFewRows && rows.k <= 128 * 4 * kPiece) return run(norm_kernel<T, 128, 4>, 128);
    if (rows.k <= 512 * kPiece) return run(norm_kernel<T, 512, 1>, 512);
    if (rows.k <= 512 * 2 * kPiece) return run(norm_kernel<T, 512, 2>, 512);
    run(norm_kernel<T, 512, 4>, 512);
}

}  // namespace

void rms_norm(const void* x, int64_t x_stride, const void* residual, int64_t residual_stride, int dtype,
              const void* weight, void* y, void* sum, int64_t m, int64_t k, float eps, cudaStream_t stream) {
    if (m == 0 || k == 0) return;
    require(dtype == 0 || dtype == 1, "rms_norm: x must be bf16 or fp16");
    require(std::max(m, k) < (int64_t{1} << 30), "rms_norm: a size of 2^30 or more is not supported");
    const auto run = [&](auto type) {
        using T = decltype(type);
        launch<T>({static_cast<const T*>(x), x_stride, static_cast<const T*>(residual), residual_stride,
                   static_cast<const T*>(weight), static_cast<T*>(y), static_cast<T*>(sum), static_cast<int>(k), eps},
                  m, stream);
    };
    dtype == 0 ? run(__nv_bfloat16{}) : run(__half{});
}

}  // namespace pyquant
