// silu_and_mul: y [M, I] = silu(gate) * up with silu(v) = v / (1 + exp(-v)), for gate_up [M, 2 I] = gate | up.
//
//   gate_up with any row stride, y contiguous; fp32 inside, one rounding at the end.
//
// Eight columns a thread, as 16-byte accesses where the rows allow them. Bound by memory, 6 bytes a result; one row (a
// decode step) is bound by latency: the kernel behind may start at once.
#include <algorithm>

#include "ops.h"
#include "pieces.cuh"
#include "programmatic.cuh"

namespace pyquant {
namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ float silu(float v) { return __fdividef(v, 1.0f + __expf(-v)); }

template <typename T, bool PIECES>
__global__ void __launch_bounds__(kThreads)
    silu_and_mul_kernel(const T* gate_up, int64_t stride, T* y, int m, int columns) {
    ptx::launch_dependents();
    ptx::wait_for_predecessor();
    constexpr int kWidth = PIECES ? kPiece : 1;
    const int col = (blockIdx.x * kThreads + threadIdx.x) * kWidth;
    if (col >= columns) return;
    for (int64_t row = blockIdx.y; row < m; row += gridDim.y) {
        const T* gate = gate_up + row * stride + col;
        T* to = y + row * columns + col;
        if constexpr (PIECES) {
            float g[kPiece], u[kPiece];
            const uint4 first = ptx::load16(gate), second = ptx::load16(gate + columns);
            unpack8<T>(g, first);
            unpack8<T>(u, second);
#pragma unroll
            for (int j = 0; j < kPiece; ++j) g[j] = silu(g[j]) * u[j];
            *reinterpret_cast<uint4*>(to) = pack8<T>(g);
        } else {
            *to = from_float<T>(silu(ptx::load_one(gate)) * ptx::load_one(gate + columns));
        }
    }
}

template <typename T>
void launch(const T* gate_up, int64_t stride, T* y, int m, int columns, cudaStream_t stream) {
    const bool pieces = reinterpret_cast<uintptr_t>(gate_up) % 16 == 0 && stride % kPiece == 0 && columns % kPiece == 0;
    const dim3 grid(static_cast<unsigned>(ceil_div(columns, kThreads * (pieces ? kPiece : 1))),
                    static_cast<unsigned>(std::min(m, 65535)));
    const int major = current_device().major;
    const auto kernel = pieces ? silu_and_mul_kernel<T, true> : silu_and_mul_kernel<T, false>;
    launch_programmatic("silu_and_mul", kernel, grid, kThreads, 0, 1, major, stream, gate_up, stride, y, m, columns);
}

}  // namespace

void silu_and_mul(const void* gate_up, int64_t stride, int dtype, void* y, int64_t m, int64_t columns,
                  cudaStream_t stream) {
    if (m == 0 || columns == 0) return;
    require(dtype == 0 || dtype == 1, "silu_and_mul: gate_up must be bf16 or fp16");
    require(std::max(m, columns) < (int64_t{1} << 30), "silu_and_mul: a size of 2^30 or more is not supported");
    const auto run = [&](auto type) {
        using T = decltype(type);
        launch<T>(static_cast<const T*>(gate_up), stride, static_cast<T*>(y), static_cast<int>(m),
                  static_cast<int>(columns), stream);
    };
    dtype == 0 ? run(__nv_bfloat16{}) : run(__half{});
}

}  // namespace pyquant
