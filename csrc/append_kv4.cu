// append_kv4: T new tokens a sequence into the window of a cache in mixed precision (pyquant/formats/kv4.py), and the
// oldest 64 tokens of the window into the next page, where the window then holds keep + 64 or more. One launch.
//
//   k, v [B, T, Hkv, D]    any strides in steps of whole values; keys are rotated
//   pages, window          written; segments int32 [B, 3] read, then brought up to date
//
// A block serves one KV head of one sequence. What it decides follows from the segments as they were before the call:
// blocks of a sequence count their arrivals after they have read them, and the last to arrive writes the new ones and
// sets the counter back to 0.
//
// **Packing.** A word of a page holds the codes of exactly those 8 values that one lane has of a tile in 16 bits, so
// codes need no exchange. A lane holds 4 columns of a piece (tokens are rows of K, channels rows of V^T; ranges go by
// columns of both): its own extremes, then three shuffles over the 8 lanes of the same columns. A warp takes a piece of
// K over all 64 tokens, or 16 tokens of V over all channels. One call in 64 packs: 64 D values read from the L2 and
// divided, a microsecond or two.
//
// Divisions and roundings are those of IEEE, in the order of kv4.quantize_page: codes, scales and zeros are equal to
// its bit for bit.
#include "ops.h"
#include "pieces.cuh"
#include "programmatic.cuh"

namespace pyquant {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kPageTokens = 64, kTileTokens = 16;

// Bit of a register's code in its half of a word.
__device__ __forceinline__ constexpr int place(int r) { return r < 2 ? 4 + 8 * r : 8 * (r - 2); }

struct Range {
    float scale, zero;
};

__device__ __forceinline__ Range make_range(float low, float high, float most) {
    const float size = fmaxf(fabsf(low), fabsf(high));
    const float wide = fmaxf(__fdiv_rn(__fsub_rn(high, low), 15.0f), __fdiv_rn(size, 240.0f));
    const float scale = __half2float(__float2half_rn(fminf(fmaxf(wide, 0x1p-14f), most)));
    const float zero = __fadd_rn(0.25f * rintf(__fdiv_rn(-4.0f * low, scale)), 0.0f);  // no negative 0
    return {scale, __half2float(__float2half_rn(zero))};
}

__device__ __forceinline__ uint32_t code_of(float value, const Range& range) {
    const float at = rintf(__fadd_rn(__fdiv_rn(value, range.scale), range.zero));
    return static_cast<uint32_t>(fminf(fmaxf(at, 0.0f), 15.0f));
}

// Extremes of a lane's four columns 2t, 2t + 1, 2t + 8, 2t + 9.
template <typename T>
struct Extremes {
    float low[4], high[4];
    __device__ Extremes() {
#pragma unroll
        for (int e = 0; e < 4; ++e) low[e] = INFINITY, high[e] = -INFINITY;
    }
    __device__ __forceinline__ void take(const uint4& piece) {
        const uint32_t registers[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const float value[2] = {Magic<T>::low(registers[r]), Magic<T>::high(registers[r])};
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int e = r / 2 * 2 + h;
                low[e] = fminf(low[e], value[h]);
                high[e] = fmaxf(high[e], value[h]);
            }
        }
    }
    __device__ __forceinline__ void ranges(Range (&found)[4], float most) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
#pragma unroll
            for (int other = 4; other < 32; other *= 2) {
                low[e] = fminf(low[e], __shfl_xor_sync(0xffffffff, low[e], other));
                high[e] = fmaxf(high[e], __shfl_xor_sync(0xffffffff, high[e], other));
            }
            found[e] = make_range(low[e], high[e], most);
        }
    }
};

template <typename T>
__device__ __forceinline__ uint32_t word_of(const uint4& piece, const Range (&ranges)[4]) {
    const uint32_t registers[4] = {piece.x, piece.y, piece.z, piece.w};
    uint32_t word = 0;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        word |= code_of(Magic<T>::low(registers[r]), ranges[r / 2 * 2]) << place(r);
        word |= code_of(Magic<T>::high(registers[r]), ranges[r / 2 * 2 + 1]) << (place(r) + 16);
    }
    return __funnelshift_l(word, word, 2);
}

// Where in a page's codes the word of a lane lies: 16 tokens, then pieces four at a time, then lanes.
template <int D>
__device__ __forceinline__ int word_place(int block, int piece, int lane) {
    constexpr int kPieces = D / 16;
    const int first = piece / 4 * 4, count = min(4, kPieces - first);
    return block * 32 * kPieces + first * 32 + lane * count + piece - first;
}

// Four ring tiles from `first` on become a page.
template <typename T, int D>
__device__ void pack_page(const T* ring, int first, int ring_tiles, unsigned char* page) {
    constexpr int kPieces = D / 16;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const auto tile = [&](int block) {
        return reinterpret_cast<const uint4*>(ring + static_cast<int64_t>((first + block) % ring_tiles) * (32 * D)) +
               lane;
    };
    for (int task = warp; task < kPieces + 4; task += kWarps) {
        Extremes<T> extremes;
        Range ranges[4];
        if (task < 4) {  // V, 16 tokens
            const uint4* const v = tile(task) + 2 * D;
            for (int j = 0; j < kPieces; ++j) extremes.take(v[32 * j]);
            extremes.ranges(ranges, 255.0f);
            auto* const words = reinterpret_cast<uint32_t*>(page + 36 * D);
            for (int j = 0; j < kPieces; ++j) words[word_place<D>(task, j, lane)] = word_of<T>(v[32 * j], ranges);
            if (g == 0) {
                auto* const numbers = reinterpret_cast<__half*>(page + 68 * D) + 16 * task + 2 * t;
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    numbers[e % 2 + e / 2 * 8] = __float2half_rn(ranges[e].scale);
                    numbers[kPageTokens + e % 2 + e / 2 * 8] = __float2half_rn(ranges[e].zero);
                }
            }
        } else {  // K, 16 channels
            const int j = task - 4;
            uint4 k[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                k[i] = tile(i)[32 * j];
                extremes.take(k[i]);
            }
            extremes.ranges(ranges, 65504.0f);
            auto* const words = reinterpret_cast<uint32_t*>(page);
#pragma unroll
            for (int i = 0; i < 4; ++i) words[word_place<D>(i, j, lane)] = word_of<T>(k[i], ranges);
            if (g == 0) {
                auto* const numbers = reinterpret_cast<__half*>(page + 32 * D) + 16 * j + 4 * t;
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    numbers[e] = __float2half_rn(ranges[e].scale);
                    numbers[D + e] = __float2half_rn(ranges[e].zero);
                }
            }
        }
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(kThreads) append_kernel(Kv4Append a) {
    ptx::launch_dependents();
    ptx::wait_for_predecessor();
    __shared__ int segments[3];
    const int64_t head = blockIdx.x, batch = blockIdx.y;
    int* const own = a.segments + 3 * batch;
    if (threadIdx.x < 3) segments[threadIdx.x] = ptx::load_int(own + threadIdx.x);
    __syncthreads();
    const int prompt = segments[0], pages = segments[1], length = segments[2], tokens = static_cast<int>(a.tokens);
    const int ring_tiles = static_cast<int>(a.ring_tiles), ring_tokens = kTileTokens * ring_tiles;
    T* const ring = static_cast<T*>(a.window) + (batch * a.kv_heads + head) * ring_tiles * (32 * D);
    const T* const k = static_cast<const T*>(a.k) + batch * a.k_strides[0] + head * a.k_strides[2];
    const T* const v = static_cast<const T*>(a.v) + batch * a.v_strides[0] + head * a.v_strides[2];
    for (int i = threadIdx.x; i < tokens * D; i += kThreads) {
        const int token = i / D, c = i % D;
        const int slot = (length - prompt + token) % ring_tokens, r = slot % kTileTokens;
        T* const tile = ring + static_cast<int64_t>(slot / kTileTokens) * (32 * D);
        const int piece = c / 16 * 32, down = c % 16 / 8, below = r / 8;
        tile[((piece + 4 * (r % 8) + c % 8 / 2) * 4 + below + 2 * down) * 2 + c % 2] =
            k[token * a.k_strides[1] + c * a.k_strides[3]];
        tile[16 * D + ((piece + 4 * (c % 8) + r % 8 / 2) * 4 + down + 2 * below) * 2 + r % 2] =
            v[token * a.v_strides[1] + c * a.v_strides[3]];
    }
    __syncthreads();
    const bool pack = a.keep >= 0 && length + tokens - prompt - kPageTokens * pages >= a.keep + kPageTokens &&
                      pages < a.page_capacity;
    if (pack) {
        unsigned char* const page =
            static_cast<unsigned char*>(a.pages) +
            ((batch * a.kv_heads + head) * a.page_capacity + pages) * static_cast<int64_t>(68 * D + 256);
        pack_page<T, D>(ring, kPageTokens / kTileTokens * pages % ring_tiles, ring_tiles, page);
    }
    if (threadIdx.x == 0) {
        auto* const counter = static_cast<unsigned*>(a.workspace) + batch;
        if (ptx::count_arrival(counter) == static_cast<unsigned>(a.kv_heads - 1)) {
            *counter = 0;
            own[1] = pages + (pack ? 1 : 0);
            own[2] = length + tokens;
        }
    }
}

}  // namespace

void append_kv4(const Kv4Append& a, cudaStream_t stream) {
    if (a.batch == 0 || a.tokens == 0 || a.kv_heads == 0) return;
    require(a.dtype == 0 || a.dtype == 1, "append_kv4: k must be bf16 or fp16");
    require(a.tokens <= kPageTokens, "append_kv4: at most 64 tokens at once");
    require(a.batch <= kKv4AppendBatch,
            "append_kv4: at most " + std::to_string(kKv4AppendBatch) + " sequences, not " + std::to_string(a.batch));
    const int major = current_device().major;
    const auto run = [&](auto type, auto size) {
        using T = decltype(type);
        const dim3 grid(static_cast<unsigned>(a.kv_heads), static_cast<unsigned>(a.batch));
        launch_programmatic("append_kv4", append_kernel<T, decltype(size)::value>, grid, kThreads, 0, 1, major, stream,
                            a);
    };
    const auto with_type = [&](auto size) { a.dtype == 0 ? run(__nv_bfloat16{}, size) : run(__half{}, size); };
    with_head_size(a.head_size, "append_kv4", with_type);
}

}  // namespace pyquant
