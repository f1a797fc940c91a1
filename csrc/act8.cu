// quantize_activation and its fused forms: a row of x [M, K] to 8-bit codes and the scales of its groups,
//
//   scale = max(max|v| * factor, 1e-12)     code = clamp(round(v / scale), -top - 1, top)     (ties to even, IEEE
//   quotient)
//
// with v = x, rms_norm(x) * weight, silu(gate) * up (both rounded to 16 bits first, as the ops that they stand for do),
// or the rotated x: v = x R, R = S (x) H with H the Walsh-Hadamard matrix of 2^n columns and S a small dense one.
//
//   x      [M, K] with any row stride, 16-bit
//   codes  int8 or e4m3 [M, K padded to 64]; scale and sums fp32 [groups, M padded to 4]: csrc/act8.cuh
//
//   row | thread 0 | thread 1 | ...      a piece = 16 columns: 32 bytes in, 16 bytes out, put in order inside the
//   thread
//
// One block a row, each value read once and kept in registers (rows too long for that are read again). A group of 32 to
// 128 columns is 2 to 8 neighbouring lanes; a whole row meets at one barrier. Bound by memory, 3 bytes a value, from
// some hundred rows on; by latency below: the kernel behind may start at once. The rotation goes through shared memory,
// four levels of butterflies a pass, and the dense factor takes its size many multiplications a value, for which
// nothing here uses tensor cores: fine up to some tens.
//
// NaN or infinity in a group makes its scale NaN or infinite, and codes of NaN quotients 0: the product's row is NaN.
#include <cuda_fp8.h>

#include <algorithm>

#include "act8.cuh"
#include "ops.h"
#include "pieces.cuh"
#include "programmatic.cuh"

namespace pyquant {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMostPieces = 8;  // of a thread in registers: rows of 32,768 columns

enum class Source { plain, norm, silu, rotated };

template <typename T>
struct Rows {
    const T* x;
    int64_t x_stride;
    const T* weight;  // norm
    float eps;
    const float* small;  // [small_size, small_size], or null for 1
    int small_size;
    uint4* codes;
    float *scale, *sums;
    int m, k, pieces, group_pieces, sum_pieces;  // pieces of 16 columns; group and sum: 0 for the whole row
    float factor, top;
    bool fp8, vectors;
};

template <typename V, typename F>
__device__ __forceinline__ V over_lanes(V v, int lanes, F f) {
    for (int lane = lanes / 2; lane > 0; lane /= 2) v = f(v, __shfl_xor_sync(0xffffffff, v, lane));
    return v;
}

// f over the block, the same in every thread. `parts` is not used again before the next barrier.
template <typename V, typename F>
__device__ __forceinline__ V over_block(V v, V* parts, F f) {
    v = over_lanes(v, 32, f);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
    __syncthreads();
    v = parts[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) v = f(v, parts[warp]);
    return v;
}

__device__ __forceinline__ float silu(float v) { return __fdividef(v, 1.0f + __expf(-v)); }

// 16 columns of a row from col on, zeros outside [0, limit).
template <typename T>
__device__ __forceinline__ void load_columns(float (&v)[kActBlock], const T* row, int col, int limit, bool vectors) {
    if (vectors && col + kActBlock <= limit) {
        float half[2][kPiece];
        const uint4 a = ptx::load16(row + col), b = ptx::load16(row + col + kPiece);
        unpack8<T>(half[0], a);
        unpack8<T>(half[1], b);
#pragma unroll
        for (int i = 0; i < kPiece; ++i) v[i] = half[0][i], v[kPiece + i] = half[1][i];
    } else {
#pragma unroll
        for (int i = 0; i < kActBlock; ++i) v[i] = col + i < limit ? ptx::load_one(row + col + i) : 0.0f;
    }
}

template <typename T>
__device__ __forceinline__ float rounded(float v) {
    return to_float(from_float<T>(v));
}

template <typename T, Source SOURCE>
__device__ __forceinline__ void load_piece(float (&v)[kActBlock], const Rows<T>& rows, const T* row, int piece) {
    const int col = piece * kActBlock;
    load_columns(v, row, col, rows.k, rows.vectors);
    if constexpr (SOURCE == Source::silu) {
        float up[kActBlock];
        load_columns(up, row + rows.k, col, rows.k, rows.vectors);
#pragma unroll
        for (int i = 0; i < kActBlock; ++i) v[i] = rounded<T>(silu(v[i]) * up[i]);
    }
}

// The codes of a piece, their sum, and where they go.
template <typename T>
__device__ __forceinline__ float store_codes(const float (&v)[kActBlock], float scale, const Rows<T>& rows, uint4* to) {
    uint32_t words[4];
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        words[w] = 0;
#pragma unroll
        for (int b = 0; b < 4; ++b) {
            float q = __fdiv_rn(v[act8_column(4 * w + b)], scale);
            uint32_t code;
            if (rows.fp8) {
                q = q != q ? 0.0f : q;
                const __nv_fp8_e4m3 e(q);  // to nearest even, at most 448
                sum += static_cast<float>(e);
                code = e.__x;
            } else {
                q = q != q ? 0.0f : fminf(fmaxf(rintf(q), -rows.top - 1.0f), rows.top);
                sum += q;
                code = static_cast<uint32_t>(static_cast<int>(q)) & 0xff;
            }
            words[w] |= code << (8 * b);
        }
    }
    *to = make_uint4(words[0], words[1], words[2], words[3]);
    return sum;
}

// row [m, p] in shared memory *= the Walsh-Hadamard matrix over p, four levels a pass, without its factor.
__device__ __forceinline__ void butterflies(float* row, int k, int p) {
    for (int width = 1; width < p;) {
        const int levels = min(4, 31 - __clz(p / width)), count = 1 << levels;
        for (int i = threadIdx.x; i < k >> levels; i += kThreads) {
            float* at = row + (i / width << levels) * width + i % width;
            float v[16];
#pragma unroll
            for (int j = 0; j < 16; ++j) v[j] = j < count ? at[j * width] : 0.0f;
#pragma unroll
            for (int level = 0; level < 4; ++level) {
                if (level >= levels) break;
#pragma unroll
                for (int j = 0; j < 16; ++j) {
                    const int other = j | 1 << level;
                    if (other == j) continue;
                    const float a = v[j], b = v[other];
                    v[j] = a + b, v[other] = a - b;
                }
            }
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                if (j < count) at[j * width] = v[j];
            }
        }
        width <<= levels;
        __syncthreads();
    }
}

// The rotated row, fp32 in shared memory (twice k where there is a dense factor), rounded to 16 bits.
template <typename T>
__device__ __forceinline__ float* rotate(const Rows<T>& rows, const T* from, float* row) {
    const int k = rows.k, size = rows.small_size, p = k / size;
    for (int piece = threadIdx.x; piece < rows.pieces; piece += kThreads) {
        float v[kActBlock];
        load_columns(v, from, piece * kActBlock, k, rows.vectors);
#pragma unroll
        for (int i = 0; i < kActBlock; ++i) {
            if (piece * kActBlock + i < k) row[piece * kActBlock + i] = v[i];
        }
    }
    __syncthreads();
    butterflies(row, k, p);
    const float norm = 1.0f / sqrtf(static_cast<float>(p));
    if (size == 1) {
        for (int i = threadIdx.x; i < k; i += kThreads) row[i] = rounded<T>(row[i] * norm);
        __syncthreads();
        return row;
    }
    float* out = row + k;
    constexpr int kRows = 4;  // of the result at a time
    for (int i = threadIdx.x; i < (size + kRows - 1) / kRows * p; i += kThreads) {
        const int first = i / p * kRows, column = i % p;
        float sum[kRows] = {};
        for (int j = 0; j < size; ++j) {
            const float v = row[j * p + column] * norm;
#pragma unroll
            for (int r = 0; r < kRows; ++r) sum[r] += v * __ldg(rows.small + j * size + min(first + r, size - 1));
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (first + r < size) out[(first + r) * p + column] = rounded<T>(sum[r]);
        }
    }
    __syncthreads();
    return out;
}

// PIECES: of a thread, in registers; 0 for any number, read again.
template <typename T, Source SOURCE, int PIECES>
__global__ void __launch_bounds__(kThreads) act8_kernel(const Rows<T> rows) {
    extern __shared__ float memory[];
    __shared__ float parts[2][kWarps];
    __shared__ uint32_t part_bits[kWarps];
    ptx::launch_dependents();
    ptx::wait_for_predecessor();
    const int row = blockIdx.x, rows4 = static_cast<int>(act8_rows(rows.m)), thread = threadIdx.x;
    const T* const from = rows.x + row * rows.x_stride;
    const float* held = nullptr;
    if constexpr (SOURCE == Source::rotated) held = rotate(rows, from, memory);
    const int passes = PIECES ? PIECES : (rows.pieces + kThreads - 1) / kThreads;

    float v[PIECES ? PIECES : 1][kActBlock];
    const auto load = [&](int pass) -> float (&)[kActBlock] {
        float (&to)[kActBlock] = v[PIECES ? pass : 0];
        const int piece = pass * kThreads + thread;
        if constexpr (SOURCE == Source::rotated) {
#pragma unroll
            for (int i = 0; i < kActBlock; ++i) {
                to[i] = piece * kActBlock + i < rows.k ? held[piece * kActBlock + i] : 0.0f;
            }
        } else {
            load_piece<T, SOURCE>(to, rows, from, piece);
        }
        return to;
    };

    float norm = 0.0f;
    if constexpr (SOURCE == Source::norm) {
        float squares = 0.0f;
#pragma unroll
        for (int pass = 0; pass < passes; ++pass) {
            float (&piece)[kActBlock] = load(pass);
#pragma unroll
            for (int i = 0; i < kActBlock; ++i) squares += piece[i] * piece[i];
        }
        const auto add = [](float a, float b) { return a + b; };
        norm = rsqrtf(over_block(squares, parts[0], add) / rows.k + rows.eps);
    }
    // The values of a pass, loaded before or again.
    const auto values = [&](int pass, bool first) -> float (&)[kActBlock] {
        if (PIECES && !first) return v[PIECES ? pass : 0];
        float (&piece)[kActBlock] = PIECES && SOURCE == Source::norm ? v[PIECES ? pass : 0] : load(pass);
        if constexpr (SOURCE == Source::norm) {
            const int col = (pass * kThreads + thread) * kActBlock;
            float weight[kActBlock];
            load_columns(weight, rows.weight, col, rows.k, rows.vectors);
#pragma unroll
            for (int i = 0; i < kActBlock; ++i) piece[i] = rounded<T>(piece[i] * norm * weight[i]);
        }
        return piece;
    };
    const auto most = [](uint32_t a, uint32_t b) { return max(a, b); };  // of bits: NaN is larger than infinity
    const auto magnitude = [&](const float (&piece)[kActBlock]) {
        uint32_t bits = 0;
#pragma unroll
        for (int i = 0; i < kActBlock; ++i) bits = max(bits, __float_as_uint(piece[i]) & 0x7fffffff);
        return bits;
    };
    const auto to_scale = [&](uint32_t bits) {
        const float scale = __uint_as_float(bits) * rows.factor;
        return scale < 1e-12f ? 1e-12f : scale;
    };
    float scale = 0.0f;
    if (rows.group_pieces == 0) {
        uint32_t bits = 0;
#pragma unroll
        for (int pass = 0; pass < passes; ++pass) bits = max(bits, magnitude(values(pass, true)));
        scale = to_scale(over_block(bits, part_bits, most));
        if (thread == 0) rows.scale[row] = scale;
    }
    float total = 0.0f;
#pragma unroll
    for (int pass = 0; pass < passes; ++pass) {
        const int piece = pass * kThreads + thread;
        const float (&here)[kActBlock] = values(pass, PIECES == 0 || rows.group_pieces != 0);
        if (rows.group_pieces) {
            scale = to_scale(over_lanes(magnitude(here), rows.group_pieces, most));
            if (piece % rows.group_pieces == 0 && piece * kActBlock < rows.k) {
                rows.scale[static_cast<int64_t>(piece / rows.group_pieces) * rows4 + row] = scale;
            }
        }
        float sum = 0.0f;
        if (piece < rows.pieces) {
            sum = store_codes(here, scale, rows, rows.codes + static_cast<int64_t>(row) * rows.pieces + piece);
        }
        total += sum;
        if (rows.sums && rows.sum_pieces) {
            sum = over_lanes(sum, rows.sum_pieces, [](float a, float b) { return a + b; });
            if (piece % rows.sum_pieces == 0 && piece * kActBlock < rows.k) {
                rows.sums[static_cast<int64_t>(piece / rows.sum_pieces) * rows4 + row] = sum;
            }
        }
    }
    if (rows.sums && rows.sum_pieces == 0) {
        total = over_block(total, parts[1], [](float a, float b) { return a + b; });
        if (thread == 0) rows.sums[row] = total;
    }
}

template <typename T, Source SOURCE>
void launch(const Rows<T>& rows, cudaStream_t stream) {
    const int major = current_device().major;
    const size_t bytes = SOURCE == Source::rotated ? sizeof(float) * rows.k * (rows.small_size > 1 ? 2 : 1) : 0;
    const auto run = [&](auto pieces) {
        constexpr auto kernel = act8_kernel<T, SOURCE, decltype(pieces)::value>;
        if (bytes > 0) {
            const int most = allow_shared_memory<kernel>("quantize_activation");
            require(static_cast<int64_t>(bytes) <= most, "hadamard_quantize: K=" + std::to_string(rows.k) +
                                                             " does not fit into shared memory (" +
                                                             std::to_string(most) + " bytes)");
        }
        launch_programmatic("quantize_activation", kernel, dim3(static_cast<unsigned>(rows.m)), kThreads, bytes, 1,
                            major, stream, rows);
    };
    const int passes = static_cast<int>(ceil_div(rows.pieces, kThreads));
    if constexpr (SOURCE != Source::rotated) {
        if (passes <= 1) return run(std::integral_constant<int, 1>{});
        if (passes <= 2) return run(std::integral_constant<int, 2>{});
        if (passes <= 4) return run(std::integral_constant<int, 4>{});
        if (passes <= kMostPieces) return run(std::integral_constant<int, kMostPieces>{});
    }
    run(std::integral_constant<int, 0>{});
}

}  // namespace

void quantize_activation(const ActCall& call, cudaStream_t stream) {
    if (call.m == 0 || call.k == 0) return;
    require(call.dtype == 0 || call.dtype == 1, "quantize_activation: x must be bf16 or fp16");
    require(std::max(call.m, call.k) < (int64_t{1} << 30),
            "quantize_activation: a size of 2^30 or more is not supported");
    for (const int64_t size : {call.group_size, call.sum_size}) {
        require(size == -1 || size == 0 || size == 32 || size == 64 || size == 128,
                "quantize_activation: groups of " + std::to_string(size) + " must be of 32, 64, 128 or -1");
    }
    const auto run = [&](auto type) {
        using T = decltype(type);
        Rows<T> rows{};
        rows.x = static_cast<const T*>(call.x), rows.x_stride = call.x_stride;
        rows.weight = static_cast<const T*>(call.weight), rows.eps = call.eps;
        rows.small = call.small, rows.small_size = call.small ? call.small_size : 1;
        rows.codes = static_cast<uint4*>(call.codes), rows.scale = call.scale;
        rows.sums = call.sum_size ? call.sums : nullptr;
        rows.m = static_cast<int>(call.m), rows.k = static_cast<int>(call.k);
        rows.pieces = static_cast<int>(act8_columns(call.k) / kActBlock);
        rows.group_pieces = call.group_size < 0 ? 0 : static_cast<int>(call.group_size) / kActBlock;
        rows.sum_pieces = call.sum_size < 0 ? 0 : static_cast<int>(call.sum_size) / kActBlock;
        rows.fp8 = call.fp8;
        rows.top = call.fp8 ? 448.0f : static_cast<float>((1 << (call.bits - 1)) - 1);
        rows.factor = static_cast<float>(call.clip / rows.top);
        rows.vectors = reinterpret_cast<uintptr_t>(call.x) % 16 == 0 && call.x_stride % 8 == 0 &&
                       (call.source != 2 || call.k % 8 == 0) && reinterpret_cast<uintptr_t>(call.weight) % 16 == 0;
        switch (call.source) {
            case 1:
                return launch<T, Source::norm>(rows, stream);
            case 2:
                return launch<T, Source::silu>(rows, stream);
            case 3:
                require(
                    rows.k % rows.small_size == 0 && ((rows.k / rows.small_size) & (rows.k / rows.small_size - 1)) == 0,
                    "hadamard_quantize: K=" + std::to_string(call.k) + " is no power of two times " +
                        std::to_string(rows.small_size));
                return launch<T, Source::rotated>(rows, stream);
            default:
                return launch<T, Source::plain>(rows, stream);
        }
    };
    call.dtype == 0 ? run(__nv_bfloat16{}) : run(__half{});
}

}  // namespace pyquant
