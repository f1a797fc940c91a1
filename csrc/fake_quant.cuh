// What the kernels of fake_quant share: exact division by a scale, the surrogates of round and clamp, memory access.
//
// Equations (reference/fake_quant.py has them in full), with v = w / scale, x = v + zero the position on the grid of
// codes low .. high, m = (low + high) / 2 its middle and half = (high - low) / 2; m is half an integer, so that in
//
//   y = |x - m|        thresholds of the rounding lie at integers y, grid points between them, the edges at y = half
//
// and, slopes being symmetric about m, one formula serves both ends:
//
//   clamp   e = y - half (beyond the edge: e > 0)     g = gate(-e)      c = half + e g      c' = g + e gate'(-e) (-1)
//   round   d = c - rint(c)                            f' of c depends on |d| alone
//
// This takes the gate of the far edge for 1, which changes a slope by less than 2^-17 where beta * half >= 15; other
// calls run the full formulas (AnySurrogate).
//
// Memory bounds the exact forward (2 x sizeof(T) an element) and the backward of LSQ (3 x); the soft backward issues
// about 29 instructions an element, of the 40 that fit into the time of its bytes, and is bound by both. Nothing is
// saved but w and the parameters: recomputing costs no byte. benchmarks/NOTES.md says what was tried.
#pragma once

#include "dequant.cuh"
#include "launch.cuh"

#include <type_traits>

namespace pyquant::fq {

enum Rounding : int { kSte = 0, kSigmoidA = 1, kSigmoidB = 2 };
enum Clamp : int { kHard = 0, kSigmoid = 1, kPhi = 2 };

struct Range {
    float low, high;
};

// One call. Counts are elements; a segment is one (row, group), total of them; lanes threads (a power of two) share
// one.
struct Call {
    const void *w, *grad;
    int64_t w_stride, grad_stride;
    const float *scale, *zero, *temperature;
    void* out;  // w_hat, or dw
    float *dscale, *dzero;
    uint32_t total, groups, k, group, lanes;
    Range range;
    float beta, grad_scale;
    int rounding, clamp;
    bool soft;
};

constexpr float kNear = 15.0f;  // beta * half from which one gate of the soft clamp is enough

__device__ __forceinline__ float ex2(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
__device__ __forceinline__ float rcp(float v) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
__device__ __forceinline__ float tanh_approx(float v) {
    float r;
    asm("tanh.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
// NaN stays NaN.
__device__ __forceinline__ float clamp_nan(float v, float low, float high) {
    float r;
    asm("{.reg .f32 t; max.NaN.f32 t, %1, %2; min.NaN.f32 %0, t, %3;}" : "=f"(r) : "f"(v), "f"(low), "f"(high));
    return r;
}
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
__device__ __forceinline__ float round_even(float v) { return __fadd_rn(__fadd_rn(v, kMagic), -kMagic); }

// ------------------------------------------------------------------------------------------------ division

// The parameters of one group, ready to use. A quotient is wanted in hundreds of millions of elements by one of few
// scales, so its reciprocal is kept in two floats: v = w * r + w * rest is off by 2^-45 before its rounding. Only
// where w / scale lies that close to the middle of two floats can v differ from the IEEE quotient; and if one of the
// two is an integer or half of one below 256, a w of at most 11 bits leaves scale no mantissa but all ones, where rest
// is exact. So 16-bit weights get the codes, and the same side of a clamp, that division gives. fp32 weights take one
// Newton step more, to the IEEE quotient (Markstein). Scales beyond 2^+-60, where a remainder could leave fp32's range,
// are scaled by `factor` together with w. Before the division w is limited to margin steps beyond the codes, where no
// result changes any more; so nothing overflows.
struct Group {
    float scale, zero, low, high;  // low, high: first and last code minus zero
    float w_low, w_high, divisor, r, rest, factor;
    uint32_t low2, high2;  // w_low and w_high as pairs of bf16
    bool special;          // needs the limits in fp32, or the factor
};

__device__ __forceinline__ uint32_t pack2(float a, float b, __nv_bfloat16) {
    const __nv_bfloat162 r = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<const uint32_t&>(r);
}
__device__ __forceinline__ uint32_t pack2(float a, float b, __half) {
    const __half2 r = __floats2half2_rn(a, b);
    return reinterpret_cast<const uint32_t&>(r);
}

// bf16 limits are rounded by at most 2^-9 of 64 steps: a margin of a quarter keeps them beyond the code, and short of
// the step after it.
template <typename T>
constexpr bool kPairs = std::is_same<T, __nv_bfloat16>::value;

template <typename T>
__device__ __forceinline__ Group make_group(float scale, float zero, Range range, float margin) {
    Group p;
    p.scale = scale;
    p.zero = fminf(fmaxf(rintf(zero), range.low), range.high);
    p.low = range.low - p.zero;
    p.high = range.high - p.zero;
    p.factor = scale < 0x1p-60f ? 0x1p60f : scale > 0x1p60f ? 0x1p-60f : 1.0f;
    p.special = p.factor != 1.0f || (kPairs<T> && range.high - range.low > 63.0f);
    p.w_low = (p.low - margin) * scale;
    p.w_high = (p.high + margin) * scale;
    if constexpr (kPairs<T>) {
        p.low2 = pack2(p.w_low, p.w_low, T{});
        p.high2 = pack2(p.w_high, p.w_high, T{});
    }
    p.divisor = scale == 0.0f ? 1.0f : scale * p.factor;
    float r = rcp(p.divisor);
    r = fmaf(fmaf(-p.divisor, r, 1.0f), r, r);
    // A mantissa of ones: of the two floats around the reciprocal the upper one, from which rest is exact.
    if ((__float_as_uint(p.divisor) & 0x7fffff) == 0x7fffff) r = __uint_as_float(__float_as_uint(r) | 1);
    const float e = fmaf(-p.divisor, r, 1.0f);
    p.r = r;
    p.rest = fmaf(e, e, e) * r;  // 1 / divisor = r / (1 - e) = r (1 + e + e^2 + ..)
    return p;
}

template <typename T>
__device__ __forceinline__ float quotient(float w, const Group& p) {
    const float v = fmaf(w, p.r, __fmul_rn(w, p.rest));
    return sizeof(T) == 2 ? v : fmaf(fmaf(-v, p.divisor, w), p.r, v);
}

// ------------------------------------------------------------------------------------------------ surrogates

// g = scale / (1 + e^{2 h}), and twice its product with its complement. APPROX: one MUFU.TANH, right to 2^-12; else
// two, to 2^-22.
template <bool APPROX>
__device__ __forceinline__ void logistic(float h, float scale, float& g, float& slope) {
    if constexpr (APPROX) {
        const float t = tanh_approx(h);
        g = fmaf(t, -0.5f * scale, 0.5f * scale);
        slope = fmaf(t * t, -0.5f * scale, 0.5f * scale);
    } else {
        const float e = ex2(h * 2.88539008f), q = rcp(1.0f + e);  // 2 / ln 2
        g = q * scale;
        slope = 2.0f * e * q * g;
    }
}

// Steps beyond the codes after which a weight is as good as clamped.
template <typename T>
__device__ __forceinline__ float margin_of(int clamp, float beta) {
    const float least = kPairs<T> ? 0.25f : 0x1p-10f;
    return clamp == kHard ? least : fmaxf(20.0f * rcp(beta), least);
}

// 1 - tanh(h)^2, and where it is wanted tanh(h).
template <bool APPROX>
__device__ __forceinline__ float sech2(float h, float* tanh = nullptr) {
    if constexpr (APPROX) {
        const float t = tanh_approx(h);
        if (tanh) *tanh = t;
        return fmaf(-t, t, 1.0f);
    } else {
        const float e = ex2(-fabsf(h) * 2.88539008f), q = rcp(1.0f + e);
        if (tanh) *tanh = copysignf((1.0f - e) * q, h);
        return 4.0f * e * (q * q);
    }
}

// Slope h' = f'(c(x)) c'(x) of a rounding over a clamp that is hard or has the sigmoid gate, and with SOFT the value
// f(c(x)) - zero.
template <typename T, int ROUND, int CLAMP, bool SOFT>
struct Surrogate {
    static_assert(CLAMP != kPhi, "the gate Phi is AnySurrogate's");
    static constexpr bool kLsq = ROUND == kSte && CLAMP == kHard, kSoft = SOFT && !kLsq, kApprox = sizeof(T) == 2;
    float half, middle, margin, a, b, per, t2, norm;

    __device__ __forceinline__ explicit Surrogate(const Call& c) {
        half = 0.5f * (c.range.high - c.range.low);
        middle = 0.5f * (c.range.high + c.range.low);
        margin = margin_of<T>(CLAMP, c.beta);
        norm = 1.0f;  // factor of f'
        if constexpr (ROUND != kSte) {
            const float t = *c.temperature;
            t2 = 0.5f * t;
            norm = 0.25f * t;
            if constexpr (ROUND == kSigmoidB) {  // over tanh(t / 4); every thread does this, tanhf would be felt
                const float e = ex2(t * -0.72134752f);
                norm *= (1.0f + e) * rcp(1.0f - e);
            }
        }
        if constexpr (CLAMP == kSigmoid) {
            a = 0.5f * c.beta;  // h = beta e / 2
            b = half * a;
            per = rcp(a * norm);
        }
    }
    __device__ __forceinline__ bool soft() const { return kSoft; }
    __device__ __forceinline__ bool hard() const { return CLAMP == kHard; }

    // offset: zero - middle.
    __device__ __forceinline__ float operator()(float v, float offset, const Group& p, float* value) const {
        float y, slope;
        if constexpr (CLAMP == kHard) {
            slope = v >= p.low && v <= p.high ? norm : 0.0f;
            y = fminf(fabsf(v + offset), half);
        } else {
            const float h = fabsf(fmaf(v, a, offset * a)) - b;
            float g, gg;
            logistic<kApprox>(h, norm, g, gg);
            slope = fmaf(-h, gg, g);  // g - beta e g (1 - g)
            y = fmaf(h * g, per, half);
        }
        if constexpr (ROUND == kSte) {
            if constexpr (SOFT) *value = round_even(copysignf(y, v + offset) - offset);
        } else {
            const float n = round_even(y), away = y - n, argument = t2 * away;
            float near, far;
            float bell = sech2<kApprox>(argument, SOFT ? &near : nullptr);
            if constexpr (ROUND == kSigmoidA) {
                bell += sech2<kApprox>(t2 - fabsf(argument), SOFT ? &far : nullptr);
                if constexpr (SOFT) y = n + copysignf(0.5f + 0.5f * (fabsf(near) - far), away);
            } else if constexpr (SOFT) {
                y = fmaf(near, norm * rcp(t2), n);  // norm / t2 = 1 / (2 tanh(t / 4))
            }
            slope *= bell;
            if constexpr (SOFT) *value = copysignf(y, v + offset) - offset;
        }
        return slope;
    }
};

// Every surrogate, chosen at run time, with both gates of the soft clamp where beta is small: the full formulas.
template <typename T>
struct AnySurrogate {
    static constexpr bool kLsq = false;
    const Call& c;
    float half, middle, margin, beta, t, norm;
    bool near;

    __device__ __forceinline__ explicit AnySurrogate(const Call& call) : c(call) {
        half = 0.5f * (c.range.high - c.range.low);
        middle = 0.5f * (c.range.high + c.range.low);
        margin = margin_of<T>(c.clamp, c.beta);
        beta = c.clamp == kPhi ? c.beta / 1.702f : c.beta;
        t = c.rounding == kSte ? 1.0f : *c.temperature;
        norm = tanhf(0.25f * t);
        near = c.beta * half >= kNear;
    }
    __device__ __forceinline__ bool soft() const { return c.soft; }
    __device__ __forceinline__ bool hard() const { return c.clamp == kHard; }

    static __device__ __forceinline__ float logistic(float z, float& slope) {
        const float e = ex2(fabsf(z) * -1.44269504f), q = rcp(1.0f + e);
        slope = e * q * q;
        return z >= 0.0f ? q : e * q;
    }
    __device__ __forceinline__ float gate(float z, float& slope) const {
        if (c.clamp == kSigmoid) return logistic(z, slope);
        slope = 0.39894228f * ex2(z * z * -0.72134752f);
        return 0.5f * erfcf(-0.70710678f * z);
    }
    __device__ __forceinline__ float operator()(float v, float offset, const Group& p, float* value) const {
        const float x = v + (offset + middle);
        float at, slope;
        if (c.clamp == kHard) {
            at = fminf(fmaxf(x, c.range.low), c.range.high);
            slope = v >= p.low && v <= p.high ? 1.0f : 0.0f;
        } else if (near) {
            const float e = fabsf(x - middle) - half;
            float d;
            const float g = gate(-beta * e, d);
            at = middle + copysignf(fmaf(e, g, half), x - middle);
            slope = g - beta * e * d;
        } else {
            float up, down;
            const float above = gate(beta * (x - c.range.low), up), below = gate(beta * (c.range.high - x), down);
            at = x * above * below + c.range.low * (1.0f - above) + c.range.high * (1.0f - below);
            slope = above * below + beta * (up * (x * below - c.range.low) + down * (c.range.high - x * above));
        }
        float f;
        if (c.rounding == kSte) {
            f = round_even(at);
        } else if (c.rounding == kSigmoidA) {
            const float n = round_even(at), u = at - n + 0.5f;
            float first, second;
            f = n - 1.0f + logistic(t * u, first) + logistic(t * (u - 1.0f), second);
            slope *= t * (first + second);
        } else {
            const float n = floorf(at), r = at - n - 0.5f;
            float d;
            f = n + 0.5f + (logistic(t * r, d) - 0.5f) / norm;
            slope *= t * d / norm;
        }
        *value = f - (offset + middle);
        return slope;
    }
};

// ------------------------------------------------------------------------------------------------ memory

template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Vector {
    T at[VEC];
};

template <typename T, int VEC>
__device__ __forceinline__ Vector<T, VEC> load(const T* from) {
    return *reinterpret_cast<const Vector<T, VEC>*>(from);
}
template <typename T, int VEC>
__device__ __forceinline__ void store(T* to, const Vector<T, VEC>& v) {
    *reinterpret_cast<Vector<T, VEC>*>(to) = v;
}

template <typename T, int VEC>
__device__ __forceinline__ void widen(const Vector<T, VEC>& from, float (&to)[VEC]) {
    if constexpr (sizeof(T) == 2 && VEC % 2 == 0) {
        const uint32_t* pairs = reinterpret_cast<const uint32_t*>(&from);
#pragma unroll
        for (int i = 0; i < VEC / 2; ++i) {
            to[2 * i] = Magic<T>::low(pairs[i]);
            to[2 * i + 1] = Magic<T>::high(pairs[i]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < VEC; ++i) to[i] = to_float(from.at[i]);
    }
}
template <typename T, int VEC>
__device__ __forceinline__ Vector<T, VEC> narrow(const float (&from)[VEC]) {
    Vector<T, VEC> to;
    if constexpr (sizeof(T) == 2 && VEC % 2 == 0) {
        uint32_t* pairs = reinterpret_cast<uint32_t*>(&to);
#pragma unroll
        for (int i = 0; i < VEC / 2; ++i) pairs[i] = pack2(from[2 * i], from[2 * i + 1], T{});
    } else {
#pragma unroll
        for (int i = 0; i < VEC; ++i) to.at[i] = from_float<T>(from[i]);
    }
    return to;
}

// The weights of a vector, limited to the range that matters, as floats. SPECIAL serves every group, the other form
// those that are not special.
template <bool SPECIAL, typename T, int VEC>
__device__ __forceinline__ void limit(Vector<T, VEC> raw, const Group& p, float (&w)[VEC]) {
    if constexpr (!SPECIAL && kPairs<T> && VEC % 2 == 0) {
        __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&raw);
        const __nv_bfloat162 low = reinterpret_cast<const __nv_bfloat162&>(p.low2);
        const __nv_bfloat162 high = reinterpret_cast<const __nv_bfloat162&>(p.high2);
#pragma unroll
        for (int i = 0; i < VEC / 2; ++i) pairs[i] = __hmin2_nan(__hmax2_nan(pairs[i], low), high);
        widen(raw, w);
    } else {
        widen(raw, w);
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            w[i] = clamp_nan(w[i], p.w_low, p.w_high);
            if constexpr (SPECIAL) w[i] *= p.factor;
        }
    }
}

template <bool SPECIAL, typename T, int VEC, typename S>
__device__ __forceinline__ Vector<T, VEC> forward_of(const Vector<T, VEC>& raw, const Group& p, const S& s) {
    float v[VEC];
    limit<SPECIAL>(raw, p, v);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        v[i] = quotient<T>(v[i], p);
        float steps;
        if (!S::kLsq && s.soft()) {
            s(v[i], p.zero - s.middle, p, &steps);
        } else {
            steps = round_even(v[i]);
        }
        v[i] = steps * p.scale;
    }
    return narrow<T>(v);
}

// What a backward sums over a group: dscale is q - v, dzero is zero * scale.
struct Sums {
    float q = 0.0f, v = 0.0f, zero = 0.0f;
};

// dw, and its part of the sums.
template <bool SPECIAL, bool ZEROS, typename T, int VEC, typename S>
__device__ __forceinline__ Vector<T, VEC> backward_of(const Vector<T, VEC>& raw_w, const Vector<T, VEC>& raw_g,
                                                      const Group& p, const S& s, Sums& sums) {
    float v[VEC], g[VEC], d[VEC];
    limit<SPECIAL>(raw_w, p, v);
    widen(raw_g, g);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        float value;
        v[i] = quotient<T>(v[i], p);
        if constexpr (S::kLsq) {
            d[i] = v[i] >= p.low && v[i] <= p.high ? g[i] : 0.0f;
            value = round_even(v[i]);
        } else {
            const float slope = s(v[i], p.zero - s.middle, p, &value);
            if (!s.soft()) value = round_even(s.hard() ? v[i] : clamp_nan(v[i], p.low, p.high));
            d[i] = g[i] * slope;
        }
        sums.q = fmaf(g[i], value, sums.q);
        sums.v = fmaf(d[i], v[i], sums.v);
        if constexpr (ZEROS) sums.zero += d[i] - g[i];
    }
    return narrow<T>(d);
}

// ------------------------------------------------------------------------------------------------ flat kernels

constexpr int kThreads = 256;

// Rows that follow each other without a gap, in whole groups of lanes * U vectors, so that segment `at` starts at
// element at * group and no access needs a condition.
template <typename T, int U, typename S, int MINB>
__global__ void __launch_bounds__(kThreads, MINB) forward_flat(const __grid_constant__ Call c) {
    constexpr int VEC = 16 / sizeof(T);
    const uint32_t bits = 31 - __clz(c.lanes), lane = threadIdx.x & (c.lanes - 1);
    const uint32_t at = blockIdx.x * (kThreads >> bits) + (threadIdx.x >> bits);
    if (at >= c.total) return;
    const int64_t offset = static_cast<int64_t>(at) * c.group + lane * VEC;
    const T* w = static_cast<const T*>(c.w);
    T* out = static_cast<T*>(c.out);
    const float scale = c.scale[at], zero = c.zero ? c.zero[at] : 0.0f;
    Vector<T, VEC> raw[U];
#pragma unroll
    for (int u = 0; u < U; ++u) raw[u] = load<T, VEC>(w + offset + (u << bits) * VEC);
    const S surrogate(c);
    const Group p = make_group<T>(scale, zero, c.range, surrogate.margin);
    const auto write = [&](auto special) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            store(out + offset + (u << bits) * VEC, forward_of<decltype(special)::value>(raw[u], p, surrogate));
        }
    };
    p.special ? write(std::true_type{}) : write(std::false_type{});
}

template <typename T, int U, typename S, bool ZEROS, int MINB>
__global__ void __launch_bounds__(kThreads, MINB) backward_flat(const __grid_constant__ Call c) {
    constexpr int VEC = 16 / sizeof(T);
    const uint32_t bits = 31 - __clz(c.lanes), lane = threadIdx.x & (c.lanes - 1);
    const uint32_t at = blockIdx.x * (kThreads >> bits) + (threadIdx.x >> bits);
    const bool mine = at < c.total;  // the shuffles below need every thread
    const int64_t offset = static_cast<int64_t>(at) * c.group + lane * VEC;
    const T *w = static_cast<const T*>(c.w), *grad = static_cast<const T*>(c.grad);
    T* dw = static_cast<T*>(c.out);
    Vector<T, VEC> raw_w[U], raw_g[U];
    float scale = 1.0f, zero = 0.0f;
    if (mine) {
        scale = c.scale[at];
        if constexpr (ZEROS) zero = c.zero[at];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            raw_w[u] = load<T, VEC>(w + offset + (u << bits) * VEC);
            raw_g[u] = load<T, VEC>(grad + offset + (u << bits) * VEC);
        }
    }
    const S surrogate(c);
    const Group p = make_group<T>(scale, zero, c.range, surrogate.margin);
    Sums sums;
    const auto write = [&](auto special) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            store(dw + offset + (u << bits) * VEC,
                  backward_of<decltype(special)::value, ZEROS>(raw_w[u], raw_g[u], p, surrogate, sums));
        }
    };
    if (mine) p.special ? write(std::true_type{}) : write(std::false_type{});
    float sum_scale = sums.q - sums.v;
    for (uint32_t o = c.lanes / 2; o > 0; o /= 2) {
        sum_scale += __shfl_xor_sync(0xffffffff, sum_scale, o);
        if constexpr (ZEROS) sums.zero += __shfl_xor_sync(0xffffffff, sums.zero, o);
    }
    if (lane == 0 && mine) {
        c.dscale[at] = c.grad_scale * sum_scale;
        if constexpr (ZEROS) c.dzero[at] = c.grad_scale * (p.scale * sums.zero);
    }
}

// ------------------------------------------------------------------------------------------------ row kernels

// Any stride between rows, any group, a short last group, VEC 1 where 16 bytes do not fit. `lanes` may be a whole
// block: one launch for long rows too, with a fixed order of sums through shared memory.
template <int VEC>
struct Place {
    int64_t row;
    uint32_t first, vectors;

    __device__ __forceinline__ Place(uint32_t at, const Call& c) {
        const uint32_t r = c.groups == 1 ? at : at / c.groups;
        row = r;
        first = (at - r * c.groups) * c.group;
        vectors = min(c.group, c.k - first) / VEC;
    }
};

template <typename T, int VEC, int U, typename S>
__global__ void __launch_bounds__(kThreads, 2) forward_rows(const __grid_constant__ Call c) {
    const uint32_t lane = threadIdx.x & (c.lanes - 1), segments = kThreads / c.lanes;
    const uint32_t at = blockIdx.x * segments + threadIdx.x / c.lanes;
    if (at >= c.total) return;
    const S surrogate(c);
    const Place<VEC> place(at, c);
    const T* w = static_cast<const T*>(c.w) + place.row * c.w_stride + place.first;
    T* out = static_cast<T*>(c.out) + place.row * c.k + place.first;
    const Group p = make_group<T>(c.scale[at], c.zero ? c.zero[at] : 0.0f, c.range, surrogate.margin);
    for (uint32_t base = lane; base < place.vectors; base += c.lanes * U) {
        Vector<T, VEC> raw[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const uint32_t i = base + u * c.lanes;
            if (i < place.vectors) raw[u] = load<T, VEC>(w + i * VEC);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const uint32_t i = base + u * c.lanes;
            if (i < place.vectors) store(out + i * VEC, forward_of<true>(raw[u], p, surrogate));
        }
    }
}

template <typename T, int VEC, int U, typename S>
__global__ void __launch_bounds__(kThreads, 2) backward_rows(const __grid_constant__ Call c) {
    __shared__ float parts[2][kThreads / 32];
    const uint32_t lane = threadIdx.x & (c.lanes - 1), segments = kThreads / c.lanes;
    const uint32_t at = blockIdx.x * segments + threadIdx.x / c.lanes;
    const bool zeros = c.zero != nullptr;
    float sum_scale = 0.0f, sum_zero = 0.0f;
    if (at < c.total) {
        const S surrogate(c);
        const Place<VEC> place(at, c);
        const T* w = static_cast<const T*>(c.w) + place.row * c.w_stride + place.first;
        const T* grad = static_cast<const T*>(c.grad) + place.row * c.grad_stride + place.first;
        T* dw = static_cast<T*>(c.out) + place.row * c.k + place.first;
        const Group p = make_group<T>(c.scale[at], zeros ? c.zero[at] : 0.0f, c.range, surrogate.margin);
        Sums sums;
        for (uint32_t base = lane; base < place.vectors; base += c.lanes * U) {
            Vector<T, VEC> raw_w[U], raw_g[U];
#pragma unroll
            for (int u = 0; u < U; ++u) {
                const uint32_t i = base + u * c.lanes;
                if (i < place.vectors) {
                    raw_w[u] = load<T, VEC>(w + i * VEC);
                    raw_g[u] = load<T, VEC>(grad + i * VEC);
                }
            }
#pragma unroll
            for (int u = 0; u < U; ++u) {
                const uint32_t i = base + u * c.lanes;
                if (i < place.vectors) {
                    store(dw + i * VEC, backward_of<true, true>(raw_w[u], raw_g[u], p, surrogate, sums));
                }
            }
        }
        sum_scale = sums.q - sums.v;
        sum_zero = p.scale * sums.zero;
    }
    for (uint32_t o = min(c.lanes, 32) / 2; o > 0; o /= 2) {
        sum_scale += __shfl_xor_sync(0xffffffff, sum_scale, o);
        if (zeros) sum_zero += __shfl_xor_sync(0xffffffff, sum_zero, o);
    }
    if (c.lanes > 32) {
        if (threadIdx.x % 32 == 0) {
            parts[0][threadIdx.x / 32] = sum_scale;
            parts[1][threadIdx.x / 32] = sum_zero;
        }
        __syncthreads();
        sum_scale = sum_zero = 0.0f;
        const uint32_t warps = c.lanes / 32, first = threadIdx.x / c.lanes * warps;
#pragma unroll 1
        for (uint32_t i = 0; i < warps; ++i) {
            sum_scale += parts[0][first + i];
            sum_zero += parts[1][first + i];
        }
    }
    if (lane == 0 && at < c.total) {
        c.dscale[at] = c.grad_scale * sum_scale;
        if (zeros) c.dzero[at] = c.grad_scale * sum_zero;
    }
}

}  // namespace pyquant::fq
