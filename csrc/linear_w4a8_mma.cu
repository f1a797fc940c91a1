// linear_w4a8 on any GPU from sm_80 on: int8 codes and a 4-bit weight by mma.m16n8k32, the tiled order as it is.
//
//   y[m, n] = s_a[m] sum over groups of s_w[n, g] ( sum over k in g of code * (w - zero) )  + bias[n]
//
//               K ->   unit    unit
//   strip (64 rows)    4 warps, 16 rows each: 16 bytes a thread and unit from global memory, no shared memory between
//   BN tokens          codes of x through shared memory, two units on their way (cp.async)
//
// A thread's word pair is the A fragment of a k32 step, as in linear_w4a8.cuh; ldmatrix of the codes is the B fragment.
// Zeros: for two rows of a thread, code - zero fits int8, but to subtract costs more than to correct: the sums of x's
// codes come from a product with ones, as in linear_decode.cuh. Sums become fp32 at the end of each group of 32 to 128.
//
// A portable kernel, not a fast one: each block walks all of K for its strip.
#include <algorithm>

#include "act8.cuh"
#include "ops.h"
#include "pieces.cuh"
#include "programmatic.cuh"

namespace pyquant {
namespace {

constexpr int kThreads = 128;
constexpr int kPad = 16;  // bytes between tokens: 8 rows of an ldmatrix meet 8 different banks
constexpr int kStages = 3;

struct Problem {
    int m, n, k, units, groups, group, act_group, m4;  // group, act_group: 0 for one
    bool half, wide;
};

__device__ __forceinline__ float scale_of(uint32_t bits, bool half) {
    return half ? __half2float(__ushort_as_half(static_cast<unsigned short>(bits))) : __uint_as_float(bits << 16);
}

template <int BN>
__global__ void __launch_bounds__(kThreads)
    w4a8_mma_kernel(const unsigned char* __restrict__ codes, const float* __restrict__ act_scale,
                    const uint4* __restrict__ qweight, const uint16_t* __restrict__ scale,
                    const uint8_t* __restrict__ zero, const uint16_t* __restrict__ bias, void* __restrict__ y,
                    const Problem p) {
    constexpr int kTiles = BN / 8;
    __shared__ alignas(16) unsigned char x[kStages][BN][kUnitK + kPad];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, c = lane % 4;
    const int strip = blockIdx.x, m0 = blockIdx.y * BN, pair = 2 * (8 * warp + g);
    ptx::launch_dependents();
    ptx::wait_for_predecessor();
    const int64_t columns = static_cast<int64_t>(p.units) * kUnitK;
    const auto fetch = [&](int unit) {
        for (int i = thread; i < BN * 4; i += kThreads) {
            const int token = i / 4, m = m0 + token;
            const bool wanted = unit < p.units && m < p.m;
            ptx::copy_async_or_zero(&x[unit % kStages][token][i % 4 * 16],
                                    codes + (wanted ? m * columns + unit * kUnitK + i % 4 * 16 : 0), wanted);
        }
        ptx::copy_async_commit();
    };
    float acc[kTiles][4] = {};
    int part[kTiles][4] = {}, sum[kTiles][4] = {};
    const uint4* weight = qweight + static_cast<int64_t>(strip) * p.units * kUnitThreads + thread;
    uint4 next = weight[0];
    for (int i = 0; i < kStages - 1; ++i) fetch(i);
    for (int unit = 0; unit < p.units; ++unit) {
        ptx::copy_async_wait<kStages - 2>();
        __syncthreads();
        fetch(unit + kStages - 1);
        const uint4 words = next;
        if (unit + 1 < p.units) next = weight[static_cast<int64_t>(unit + 1) * kUnitThreads];
        const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t a[4] = {word[2 * half] & 0x0f0f0f0f, word[2 * half] >> 4 & 0x0f0f0f0f,
                                   word[2 * half + 1] & 0x0f0f0f0f, word[2 * half + 1] >> 4 & 0x0f0f0f0f};
            const uint32_t ones[4] = {0x01010101, 0x01010101, 0x01010101, 0x01010101};
#pragma unroll
            for (int t = 0; t < kTiles; t += 2) {  // 16 tokens by 32 columns
                uint32_t b[4];
                ptx::ldmatrix_x4(b,
                                 &x[unit % kStages][8 * t + lane / 16 * 8 + lane % 8][half * 32 + lane / 8 % 2 * 16]);
                ptx::mma_m16n8k32(part[t], a, {b[0], b[1]});
                ptx::mma_m16n8k32(part[t + 1], a, {b[2], b[3]});
                ptx::mma_m16n8k32(sum[t], ones, {b[0], b[1]});
                ptx::mma_m16n8k32(sum[t + 1], ones, {b[2], b[3]});
            }
            const int column = unit * kUnitK + half * 32, after = column + 32;
            const bool ends = (p.group ? after % p.group == 0 : after % 128 == 0) ||
                              (p.act_group && after % p.act_group == 0) || (unit + 1 == p.units && half == 1);
            if (!ends) continue;
            const int64_t at =
                (static_cast<int64_t>(strip) * p.groups + (p.group ? column / p.group : 0)) * kStrip + pair;
            const bool there = p.group == 0 || column / p.group < p.groups;
            const float s[2] = {there ? scale_of(scale[at], p.half) : 0.0f,
                                there ? scale_of(scale[at + 1], p.half) : 0.0f};
            const int z[2] = {zero && there ? zero[at] : kSymmetricZero, zero && there ? zero[at + 1] : kSymmetricZero};
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int m = m0 + 8 * t + 2 * c + i % 2;
                    float by = s[i / 2];
                    if (p.act_group) {  // the last group may end behind K
                        const int group = column / p.act_group;
                        by *= group * p.act_group < p.k && m < p.m ? act_scale[group * int64_t{p.m4} + m] : 0.0f;
                    }
                    acc[t][i] += by * static_cast<float>(part[t][i] - z[i / 2] * sum[t][i]);
                    part[t][i] = sum[t][i] = 0;
                }
            }
        }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int m = m0 + 8 * t + 2 * c + i % 2, n = strip * kStrip + 16 * warp + g + i / 2 * 8;
            if (m >= p.m || n >= p.n) continue;
            float v = acc[t][i] * (p.act_group ? 1.0f : act_scale[m]) + (bias ? scale_of(bias[n], p.half) : 0.0f);
            const int64_t to = static_cast<int64_t>(m) * p.n + n;
            if (p.wide) {
                static_cast<float*>(y)[to] = v;
            } else if (p.half) {
                static_cast<__half*>(y)[to] = from_float<__half>(v);
            } else {
                static_cast<__nv_bfloat16*>(y)[to] = from_float<__nv_bfloat16>(v);
            }
        }
    }
}

}  // namespace

void linear_w4a8_mma(const LinearA8Call& call, cudaStream_t stream) {
    const Problem p{static_cast<int>(call.m),
                    static_cast<int>(call.n),
                    static_cast<int>(call.k),
                    static_cast<int>(ceil_div(call.k, kUnitK)),
                    static_cast<int>(tiled_groups(call.k, call.group_size)),
                    static_cast<int>(std::max<int64_t>(call.group_size, 0)),
                    static_cast<int>(std::max<int64_t>(call.act_group_size, 0)),
                    static_cast<int>(act8_rows(call.m)),
                    call.scale_dtype == 1,
                    call.y_dtype == 2};
    const auto run = [&](auto tokens) {
        constexpr int kTokens = decltype(tokens)::value;
        const int64_t passes = ceil_div(call.m, kTokens);
        require(passes <= 65535, "linear_w4a8: M=" + std::to_string(call.m) + " is too large for one launch");
        launch_programmatic("linear_w4a8", w4a8_mma_kernel<kTokens>,
                            dim3(static_cast<unsigned>(ceil_div(call.n, kStrip)), static_cast<unsigned>(passes)),
                            kThreads, 0, 1, current_device().major, stream,
                            static_cast<const unsigned char*>(call.codes), call.act_scale,
                            reinterpret_cast<const uint4*>(call.qweight), static_cast<const uint16_t*>(call.scale),
                            call.zero, static_cast<const uint16_t*>(call.bias), call.y, p);
    };
    call.m <= 16 ? run(std::integral_constant<int, 16>{}) : run(std::integral_constant<int, 64>{});
}

}  // namespace pyquant
