// quantize_int4 and dequantize_int4: between a float weight [N, K] and the tiled order of format.cuh.
//
//   code  = clamp(round_half_even(w / scale) + zero)         w_hat = (code - zero) * scale
//
// Both run one block of 128 threads per unit (64 rows x 64 columns); thread t owns words 4t .. 4t+3, as in the GEMM.
// Bound by memory: quantize reads 2 or 4 bytes and writes half a byte an element, dequantize the reverse. Quantizing
// reads w in pairs of neighbours, which is good enough for work done once per model. Dequantizing is on the path of
// large batches, so there the four threads that share a row first exchange words, and each then writes 16 neighbouring
// values.
#include "dequant.cuh"
#include "launch.cuh"
#include "ops.h"

namespace pyquant {
namespace {

template <typename T>
__global__ void quantize_kernel(const T* __restrict__ w, int64_t w_stride, const float* __restrict__ scale,
                                const float* __restrict__ zero, int32_t* __restrict__ qweight, int64_t n, int64_t k,
                                int64_t group_size, int64_t groups, float low, float high) {
    const int64_t units = gridDim.x, unit = blockIdx.x, strip = blockIdx.y;
    const int thread = threadIdx.x, g = thread % 32 / 4, c = thread % 4;
    int32_t words[4];
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        uint32_t word = 0;
#pragma unroll
        for (int nibble = 0; nibble < 8; ++nibble) {
            const int64_t row = strip * kStrip + 16 * (thread / 32) + g + 8 * (nibble % 2);
            const int64_t col = unit * kUnitK + 16 * step + 2 * c + 8 * (nibble / 2 % 2) + nibble / 4;
            float code = kSymmetricZero;
            if (row < n && col < k) {
                const int64_t at =
                    row * groups + (group_size < 0 ? 0 : static_cast<int>(col) / static_cast<int>(group_size));
                const float z = zero ? zero[at] : kSymmetricZero;
                code = fminf(fmaxf(rintf(to_float(w[row * w_stride + col]) / scale[at]) + z, low), high);
            }
            word |= static_cast<uint32_t>(code) << (4 * nibble);
        }
        words[step] = static_cast<int32_t>(word);
    }
    reinterpret_cast<int4*>(qweight)[(strip * units + unit) * kUnitThreads + thread] =
        make_int4(words[0], words[1], words[2], words[3]);
}

// out[0..1] = (code - zero) * scale for the codes in bits 0..3 and 16..19. Conversions from int run at a quarter of the
// rate, so the codes become floats by their bits: exact, as code + a power of two that is then taken away.
template <typename S, typename T>
__device__ __forceinline__ void scaled_pair(T* out, uint32_t pair, int zero, S scale) {
    constexpr uint32_t kBits = 0x4b000000;  // 2^23: the lowest mantissa bit is 1
    const float offset = 8388608.0f + zero, s = to_float(scale);
    out[0] = from_float<T>((__uint_as_float((pair & 15) | kBits) - offset) * s);
    out[1] = from_float<T>((__uint_as_float((pair >> 16 & 15) | kBits) - offset) * s);
}

// Scale and result in one 16-bit type: the exact product rounds once here too, and takes half the instructions.
template <typename T>
__device__ __forceinline__ void scaled_pair(T* out, uint32_t pair, int zero, T scale) {
    if constexpr (sizeof(T) == 2) {
        const uint32_t steps = subtract2(ptx::and_or(pair, 0x000f000f, Magic<T>::kBits), offset2<T>(zero), T{});
        *reinterpret_cast<uint32_t*>(out) = multiply2(steps, scale);
    } else {
        scaled_pair<T, T>(out, pair, zero, scale);
    }
}

template <typename S, typename T>
__global__ void dequantize_kernel(const int32_t* __restrict__ qweight, const S* __restrict__ scale,
                                  const uint8_t* __restrict__ zero, T* __restrict__ out, int64_t n, int64_t k,
                                  int64_t group_size, int64_t groups) {
    const int64_t units = gridDim.x, unit = blockIdx.x, strip = blockIdx.y;
    const int thread = threadIdx.x, g = thread % 32 / 4, c = thread % 4;
    const uint4 mine = reinterpret_cast<const uint4*>(qweight)[(strip * units + unit) * kUnitThreads + thread];
    const uint32_t words[4] = {mine.x, mine.y, mine.z, mine.w};
    // The four threads of a row pair hold 64 columns of two rows. They exchange words so that, of the eight 16-byte
    // pieces of a row, thread c writes pieces c and 4 + c: 64 neighbouring bytes an instruction, whole sectors (half
    // sectors cost double). Piece 4 * i + c lies in k16 step 2 * i + c / 2, upper half c % 2; quad[i][p] is thread p's
    // word of that step.
    uint32_t quad[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int other = 0; other < 4; ++other) {
            const int partner = c ^ other;
            const uint32_t send =
                partner < 2 ? words[2 * i] : words[2 * i + 1];  // my word of the step the partner writes
            const uint32_t got = __shfl_xor_sync(0xffffffff, send, other);
#pragma unroll
            for (int p = 0; p < 4; ++p) quad[i][p] = partner == p ? got : quad[i][p];
        }
    }
    const int shift = 8 * (c % 2);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64_t col = unit * kUnitK + 32 * i + 8 * c;
        const int group = group_size < 0 ? 0 : static_cast<int>(col) / static_cast<int>(group_size);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int64_t row = strip * kStrip + 16 * (thread / 32) + g + 8 * h;
            if (row >= n) continue;
            const int64_t at = (strip * groups + group) * kStrip + 2 * (8 * (thread / 32) + g) + h;
            const int z = zero ? zero[at] : kSymmetricZero;
            alignas(16) T values[8];
#pragma unroll
            for (int p = 0; p < 4; ++p) scaled_pair(values + 2 * p, quad[i][p] >> (shift + 4 * h), z, scale[at]);
            T* to = out + row * k + col;
            if (k % 8 == 0 && col < k) {
#pragma unroll
                for (int v = 0; v < static_cast<int>(sizeof(values) / 16); ++v) {
                    reinterpret_cast<uint4*>(to)[v] = reinterpret_cast<const uint4*>(values)[v];
                }
            } else {
#pragma unroll
                for (int v = 0; v < 8; ++v) {
                    if (col + v < k) to[v] = values[v];
                }
            }
        }
    }
}

dim3 unit_grid(int64_t n, int64_t k) {
    const int64_t strips = ceil_div(n, kStrip);
    require(strips <= 65535, "N=" + std::to_string(n) + " exceeds 4194240 rows");
    require(k < (1 << 30), "K=" + std::to_string(k) + " must be below 2^30");
    return dim3(static_cast<unsigned>(ceil_div(k, kUnitK)), static_cast<unsigned>(strips));
}

}  // namespace

void quantize_int4(const void* w, int w_dtype, int64_t w_stride, const float* scale, const float* zero,
                   int32_t* qweight, int64_t n, int64_t k, int64_t group_size, int bits, cudaStream_t stream) {
    if (n == 0 || k == 0) return;
    const float half = static_cast<float>(1 << (bits - 1));
    const float low = zero ? 0.0f : kSymmetricZero - half;
    const float high = zero ? 2 * half - 1 : kSymmetricZero + half - 1;
    const int64_t groups = group_size < 0 ? 1 : ceil_div(k, group_size);
    with_float_type(w_dtype, [&](auto type) {
        using T = decltype(type);
        quantize_kernel<<<unit_grid(n, k), kUnitThreads, 0, stream>>>(static_cast<const T*>(w), w_stride, scale, zero,
                                                                      qweight, n, k, group_size, groups, low, high);
    });
    check_cuda(cudaGetLastError(), "quantize_int4");
}

void dequantize_int4(const int32_t* qweight, const void* scale, int scale_dtype, const uint8_t* zero, void* out,
                     int out_dtype, int64_t n, int64_t k, int64_t group_size, cudaStream_t stream) {
    if (n == 0 || k == 0) return;
    with_float_type(scale_dtype, [&](auto scale_type) {
        with_float_type(out_dtype, [&](auto out_type) {
            using S = decltype(scale_type);
            using T = decltype(out_type);
            dequantize_kernel<<<unit_grid(n, k), kUnitThreads, 0, stream>>>(qweight, static_cast<const S*>(scale), zero,
                                                                            static_cast<T*>(out), n, k, group_size,
                                                                            tiled_groups(k, group_size));
        });
    });
    check_cuda(cudaGetLastError(), "dequantize_int4");
}

}  // namespace pyquant
