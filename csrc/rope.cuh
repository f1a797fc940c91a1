// Rotary embedding of one head by 16 neighbouring lanes, after an optional RMS norm of the head (Qwen3).
//
//   lane l (of 16, the first D / 16 of them) holds   elements [8 l, 8 l + 8)            as low
//                                              and   elements [D/2 + 8 l, + 8)          as high
//
//   low' = low * cos - high * sin        high' = high * cos + low * sin       ("rotate half", as Llama stores its
//   heads)
//
// cos and sin are fp32 tables [positions, D / 2].
#pragma once

#include "pieces.cuh"

namespace pyquant {

constexpr int kHeadLanes = 16;

struct HeadSlice {
    float low[kPiece], high[kPiece];
};

// The slice of lane `lane`; zeros for lanes past the head and where nothing is wanted.
template <typename T, int D>
__device__ __forceinline__ HeadSlice load_head(const T* head, int lane, bool wanted) {
    uint4 low = make_uint4(0, 0, 0, 0), high = low;
    if (wanted && lane < D / 16) {
        low = ptx::load16(head + kPiece * lane);
        high = ptx::load16(head + D / 2 + kPiece * lane);
    }
    HeadSlice slice;
    unpack8<T>(slice.low, low);
    unpack8<T>(slice.high, high);
    return slice;
}

template <typename T, int D>
__device__ __forceinline__ void store_head(T* head, int lane, const HeadSlice& slice) {
    if (lane >= D / 16) return;
    *reinterpret_cast<uint4*>(head + kPiece * lane) = pack8<T>(slice.low);
    *reinterpret_cast<uint4*>(head + D / 2 + kPiece * lane) = pack8<T>(slice.high);
}

// All lanes of the warp must call it.
template <typename T, int D>
__device__ __forceinline__ void norm_head(HeadSlice& slice, const T* weight, float eps, int lane) {
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) squares += slice.low[j] * slice.low[j] + slice.high[j] * slice.high[j];
    const float factor = rsqrtf(sum_lanes<kHeadLanes>(squares) / D + eps);
    if (lane >= D / 16) return;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
        slice.low[j] *= factor * to_float(weight[kPiece * lane + j]);
        slice.high[j] *= factor * to_float(weight[D / 2 + kPiece * lane + j]);
    }
}

struct Angles {
    float cos[kPiece], sin[kPiece];
};

template <int D>
__device__ __forceinline__ Angles load_angles(const float* cos, const float* sin, int64_t position, int lane) {
    Angles a{};
    if (lane >= D / 16) return a;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float4 c = *reinterpret_cast<const float4*>(cos + position * (D / 2) + kPiece * lane + 4 * i);
        const float4 s = *reinterpret_cast<const float4*>(sin + position * (D / 2) + kPiece * lane + 4 * i);
        a.cos[4 * i] = c.x, a.cos[4 * i + 1] = c.y, a.cos[4 * i + 2] = c.z, a.cos[4 * i + 3] = c.w;
        a.sin[4 * i] = s.x, a.sin[4 * i + 1] = s.y, a.sin[4 * i + 2] = s.z, a.sin[4 * i + 3] = s.w;
    }
    return a;
}

__device__ __forceinline__ void rotate(HeadSlice& slice, const Angles& a) {
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
        const float low = slice.low[j], high = slice.high[j];
        slice.low[j] = low * a.cos[j] - high * a.sin[j];
        slice.high[j] = high * a.cos[j] + low * a.sin[j];
    }
}

}  // namespace pyquant
