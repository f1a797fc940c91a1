// fake_quant, forward and backward: round a weight [N, K] to its quantized value, with LSQ's gradients.
//
//   v = w / scale      q = clamp(round_half_even(v) + zero, low, high)      w_hat = (q - zero) * scale
//   inside: low <= v + zero <= high
//   dw = grad where inside      dscale = sum_group grad * (q - zero - (inside ? v : 0))      dzero = sum_group inside ?
//   0 : -grad * scale
//
// Symmetric codes are the case zero = 0, low = -2^(b-1). One launch each way, no atomics, nothing saved but w and the
// parameters: the backward recomputes q. A group of the backward belongs to one warp (to one block where a group is
// long), whose fixed summation order makes the result the same bits every time. Bound by memory: forward 2 x sizeof(T)
// an element, backward 3 x.
#include "dequant.cuh"
#include "launch.cuh"
#include "ops.h"

namespace pyquant {
namespace {

struct Range {
    float low, high;
};

// The parameters of one group, ready to use.
struct Group {
    float scale, zero;
};

__device__ __forceinline__ Group load_group(const float* scale, const float* zero, int64_t at, Range range) {
    return {scale[at], zero ? fminf(fmaxf(rintf(zero[at]), range.low), range.high) : 0.0f};
}

__device__ __forceinline__ float steps_of(float v, Group p, Range range) {
    return fminf(fmaxf(rintf(v) + p.zero, range.low), range.high) - p.zero;
}

template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Vector {
    T at[VEC];
};

// One thread a vector of VEC neighbours, which share a group. grid: x over a row, y over rows.
template <typename T, int VEC>
__global__ void forward_kernel(const T* __restrict__ w, int64_t w_stride, const float* __restrict__ scale,
                               const float* __restrict__ zero, T* __restrict__ out, int64_t n, int64_t k,
                               int64_t group_size, int64_t groups, Range range) {
    const int64_t col = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * VEC;
    if (col >= k) return;
    const int group =
        static_cast<int>(col) / static_cast<int>(group_size);  // 64-bit division takes longer than the rest
    for (int64_t row = blockIdx.y; row < n; row += gridDim.y) {
        const Group p = load_group(scale, zero, row * groups + group, range);
        const auto in = *reinterpret_cast<const Vector<T, VEC>*>(w + row * w_stride + col);
        Vector<T, VEC> result;
#pragma unroll
        for (int i = 0; i < VEC; ++i)
            result.at[i] = from_float<T>(steps_of(to_float(in.at[i]) / p.scale, p, range) * p.scale);
        *reinterpret_cast<Vector<T, VEC>*>(out + row * k + col) = result;
    }
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffff, v, offset);
    return v;
}

// THREADS (a warp or a block) a group; a block holds 256 / THREADS groups.
template <typename T, int VEC, int THREADS>
__global__ void __launch_bounds__(256)
    backward_kernel(const T* __restrict__ grad, int64_t grad_stride, const T* __restrict__ w, int64_t w_stride,
                    const float* __restrict__ scale, const float* __restrict__ zero, T* __restrict__ dw,
                    float* __restrict__ dscale, float* __restrict__ dzero, int64_t n, int64_t k, int64_t group_size,
                    int64_t groups, Range range, float grad_scale) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * (256 / THREADS) + threadIdx.x / THREADS;
    const int lane = threadIdx.x % THREADS;
    float sum_scale = 0.0f, sum_zero = 0.0f;
    if (at < n * groups) {
        const int64_t row = groups == 1 ? at : at / groups, first = (at - row * groups) * group_size;
        const int64_t last = first + group_size < k ? first + group_size : k;
        const Group p = load_group(scale, zero, at, range);
        for (int64_t col = first + lane * VEC; col < last; col += THREADS * VEC) {
            const auto gs = *reinterpret_cast<const Vector<T, VEC>*>(grad + row * grad_stride + col);
            const auto ws = *reinterpret_cast<const Vector<T, VEC>*>(w + row * w_stride + col);
            Vector<T, VEC> result;
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                const float v = to_float(ws.at[i]) / p.scale, g = to_float(gs.at[i]);
                const bool inside = v + p.zero >= range.low && v + p.zero <= range.high;
                const float steps = steps_of(v, p, range);
                sum_scale += g * (inside ? steps - v : steps);
                sum_zero += inside ? 0.0f : -g * p.scale;
                result.at[i] = from_float<T>(inside ? g : 0.0f);
            }
            *reinterpret_cast<Vector<T, VEC>*>(dw + row * k + col) = result;
        }
    }
    sum_scale = warp_sum(sum_scale);
    sum_zero = warp_sum(sum_zero);
    if constexpr (THREADS > 32) {
        __shared__ float parts[2][THREADS / 32];
        if (lane % 32 == 0) {
            parts[0][lane / 32] = sum_scale;
            parts[1][lane / 32] = sum_zero;
        }
        __syncthreads();
        sum_scale = sum_zero = 0.0f;
#pragma unroll
        for (int i = 0; i < THREADS / 32; ++i) {
            sum_scale += parts[0][i];
            sum_zero += parts[1][i];
        }
    }
    if (lane == 0 && at < n * groups) {
        dscale[at] = grad_scale * sum_scale;
        if (zero) dzero[at] = grad_scale * sum_zero;
    }
}

Range codes_range(const float* zero, int bits) {
    const float half = static_cast<float>(1 << (bits - 1));
    return zero ? Range{0.0f, 2 * half - 1} : Range{-half, half - 1};
}

// The widest vector (16 bytes, or 1 element) that every row start, group start and row end is aligned to.
template <typename T>
bool vectors_fit(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> counts) {
    constexpr int64_t kVec = 16 / sizeof(T);
    for (const void* p : pointers) {
        if (reinterpret_cast<uintptr_t>(p) % 16) return false;
    }
    for (int64_t count : counts) {
        if (count % kVec) return false;
    }
    return true;
}

template <typename T, int VEC>
void launch_forward(const T* w, int64_t w_stride, const float* scale, const float* zero, T* out, int64_t n, int64_t k,
                    int64_t group, int64_t groups, Range range, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div(k, 256 * VEC)), static_cast<unsigned>(n < 65535 ? n : 65535));
    forward_kernel<T, VEC><<<grid, 256, 0, stream>>>(w, w_stride, scale, zero, out, n, k, group, groups, range);
}

}  // namespace

void fake_quant(const void* w, int dtype, int64_t w_stride, const float* scale, const float* zero, void* out, int64_t n,
                int64_t k, int64_t group_size, int bits, cudaStream_t stream) {
    if (n == 0 || k == 0) return;
    require(k < (1 << 30), "fake_quant: K=" + std::to_string(k) + " must be below 2^30");
    const int64_t group = group_size < 0 ? k : group_size, groups = ceil_div(k, group);
    with_float_type(dtype, [&](auto type) {
        using T = decltype(type);
        const T* from = static_cast<const T*>(w);
        T* to = static_cast<T*>(out);
        if (vectors_fit<T>({w, out}, {w_stride, k, group})) {
            launch_forward<T, 16 / sizeof(T)>(from, w_stride, scale, zero, to, n, k, group, groups,
                                              codes_range(zero, bits), stream);
        } else {
            launch_forward<T, 1>(from, w_stride, scale, zero, to, n, k, group, groups, codes_range(zero, bits), stream);
        }
    });
    check_cuda(cudaGetLastError(), "fake_quant");
}

void fake_quant_backward(const void* grad, int64_t grad_stride, const void* w, int dtype, int64_t w_stride,
                         const float* scale, const float* zero, void* dw, float* dscale, float* dzero, int64_t n,
                         int64_t k, int64_t group_size, int bits, float grad_scale, cudaStream_t stream) {
    if (n == 0 || k == 0) return;
    require(k < (1 << 30), "fake_quant: K=" + std::to_string(k) + " must be below 2^30");
    const int64_t group = group_size < 0 ? k : group_size, groups = ceil_div(k, group);
    const Range range = codes_range(zero, bits);
    with_float_type(dtype, [&](auto type) {
        using T = decltype(type);
        const auto launch = [&](auto vec, auto threads) {
            constexpr int kVec = decltype(vec)::value, kThreads = decltype(threads)::value;
            const int64_t blocks = ceil_div(n * groups, 256 / kThreads);
            require(blocks <= INT32_MAX, "fake_quant_backward: too many groups (" + std::to_string(n * groups) + ")");
            backward_kernel<T, kVec, kThreads><<<static_cast<unsigned>(blocks), 256, 0, stream>>>(
                static_cast<const T*>(grad), grad_stride, static_cast<const T*>(w), w_stride, scale, zero,
                static_cast<T*>(dw), dscale, dzero, n, k, group, groups, range, grad_scale);
        };
        using Wide = std::integral_constant<int, 16 / sizeof(T)>;
        using Four = std::integral_constant<int, 4>;  // a warp on a group of 128: 16 bytes a lane would idle half of it
        using One = std::integral_constant<int, 1>;
        using Warp = std::integral_constant<int, 32>;
        using Block = std::integral_constant<int, 256>;
        const bool wide = vectors_fit<T>({grad, w, dw}, {grad_stride, w_stride, k, group});
        if (group > 1024) {
            wide ? launch(Wide{}, Block{}) : launch(One{}, Block{});
        } else if (wide && group < 256) {
            launch(Four{}, Warp{});
        } else {
            wide ? launch(Wide{}, Warp{}) : launch(One{}, Warp{});
        }
    });
    check_cuda(cudaGetLastError(), "fake_quant_backward");
}

}  // namespace pyquant
