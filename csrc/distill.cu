// distill_rows: losses of a distillation step for rows of logits, and their gradient D to the student's products.
//
//   z = cap tanh(scale product / cap)      s, t = softmax(z / T) of student and teacher
//   p = softmax(z) of the student          m = beta t + (1 - beta) s
//
//   kl  = T^2 sum t log(t / s)             reverse = T^2 sum s log(s / t)             ce = -log p[label]
//   jsd = T^2 (beta sum t log(t / m) + (1 - beta) sum s log(s / m))
//
//   D = (T w_kl (s - t)
//        + T w_reverse s (log(s / t) - sum s log(s / t))
//        + T w_jsd (1 - beta) s (log(s / m) - sum s log(s / m))
//        + w_ce (p - [label])) * (1 - (z / cap)^2) * scale * factor
//
//   student fp32 [C, V], teacher fp32, bf16 or fp16 [C, V], rows at 16 bytes; D in 16 or 32 bits, in blocks of columns
//   one behind the other (reference.distill_blocks); sums fp32 [C, 4]; fp32 inside, base-2 exponentials.
//
// Bound by memory, 8 + 2 bytes a value where each logit is read once. A row of V = 128256 is 1 MB, more than a
// multiprocessor holds, and the rows of all multiprocessors are more than L2 holds, so a cluster of up to 8 blocks
// takes a row: student values in registers, the teacher's in shared memory, statistics through distributed shared
// memory:
//
//   row   | block 0          | block 1          | ... | block 7          |     a block: 512 threads x VECS x 4 columns
//         | thread 0 | 1 | 2 ... | thread 0 | ...                              (VECS = 8: two blocks a multiprocessor)
//
// One row's loads run under another's arithmetic. The usual loss (forward KL, cross-entropy) has one exchange between
// the blocks of a row, and keeps the exponentials of its sums in place of the logits. Other losses take a step more,
// for the sums that the gradients of reverse KL and JSD need. Rows beyond 8 x 512 x 64 columns, and GPUs before sm_90,
// take the plain kernel: a block a row, which reads the logits again in each step.
//
// Tried: a release barrier of the cluster for the exchange instead of counted stores (st.async). It is a fence of all
// global memory and stood behind the stores of D: 396 us for 512 rows of both models on an H200, 1.7 TB/s.
#include "ops.h"
#include "pieces.cuh"
#include "programmatic.cuh"

namespace pyquant {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLow = -1e30f;  // below every logit: exp2 of the distance is 0, and no NaN as with infinity

enum Mode { kCrossEntropy, kForwardKl, kAll };  // which terms; kForwardKl with cross-entropy beside it or not

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// cap tanh(scale product / cap), as 1 - 2 / (1 + e^2x): absolute error of a few 2^-24 cap.
struct Cap {
    float scale, cap, rate;

    __device__ __forceinline__ Cap(float scale, float cap)
        : scale(scale), cap(cap), rate(cap > 0.0f ? 2.0f * kLog2e * scale / cap : 0.0f) {}
    __device__ __forceinline__ float operator()(float z) const {
        return cap > 0.0f ? cap * (1.0f - __fdividef(2.0f, 1.0f + exp2_fast(fminf(z * rate, 100.0f)))) : z * scale;
    }
    __device__ __forceinline__ void operator()(float (&z)[4]) const {
        if (cap > 0.0f) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                z[i] = cap * (1.0f - __fdividef(2.0f, 1.0f + exp2_fast(fminf(z[i] * rate, 100.0f))));
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) z[i] *= scale;
        }
    }
};

__device__ __forceinline__ void load4(float (&v)[4], const float* from) {
    const float4 q = __ldcs(reinterpret_cast<const float4*>(from));
    v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
}
template <typename T>
__device__ __forceinline__ void load4(float (&v)[4], const T* from) {  // T of 16 bits
    const uint2 q = __ldcs(reinterpret_cast<const uint2*>(from));
    v[0] = Magic<T>::low(q.x), v[1] = Magic<T>::high(q.x), v[2] = Magic<T>::low(q.y), v[3] = Magic<T>::high(q.y);
}
// Of one vector, what lies beyond the vocabulary gets the probability 0.
__device__ __forceinline__ void cut_off(float (&v)[4], int col, int end) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = col + i < end ? v[i] : kLow;
}

// ---- statistics over the block and the cluster, in a fixed order

// Running maximum of z, and sums of exp2((z - max) rate) for one or two rates.
struct Softmax {
    float max = kLow, sum = 0.0f, sum1 = 0.0f;

    __device__ __forceinline__ void raise(const float (&z)[4]) {
        max = fmaxf(fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3])), max);
    }
    __device__ __forceinline__ float exponentials(const float (&z)[4], float by) const {
        const float base = -max * by;
        return (exp2_fast(fmaf(z[0], by, base)) + exp2_fast(fmaf(z[1], by, base))) +
               (exp2_fast(fmaf(z[2], by, base)) + exp2_fast(fmaf(z[3], by, base)));
    }
    __device__ __forceinline__ void add(const float (&z)[4], float rate, float rate1, bool both) {
        const float old = max;
        raise(z);
        sum = sum * exp2_fast((old - max) * rate) + exponentials(z, rate);
        if (both) sum1 = sum1 * exp2_fast((old - max) * rate1) + exponentials(z, rate1);
    }
    __device__ __forceinline__ void merge(float max2, float sum2, float sum12, float rate, float rate1) {
        const float top = fmaxf(max, max2);
        sum = sum * exp2_fast((max - top) * rate) + sum2 * exp2_fast((max2 - top) * rate);
        sum1 = sum1 * exp2_fast((max - top) * rate1) + sum12 * exp2_fast((max2 - top) * rate1);
        max = top;
    }
};

struct Stats {
    static constexpr int kFloats = 6;
    Softmax student, teacher;
    float rate, rate1;

    __device__ __forceinline__ float get(int i) const {
        const Softmax& m = i < 3 ? student : teacher;
        return i % 3 == 0 ? m.max : i % 3 == 1 ? m.sum : m.sum1;
    }
    __device__ __forceinline__ void merge(const float (&v)[kFloats]) {
        student.merge(v[0], v[1], v[2], rate, rate1);
        teacher.merge(v[3], v[4], v[5], rate, rate1);
    }
    __device__ __forceinline__ void set(const float* v) {
        student.max = v[0], student.sum = v[1], student.sum1 = v[2];
        teacher.max = v[3], teacher.sum = v[4], teacher.sum1 = v[5];
    }
};

template <int N>
struct Sums {
    static constexpr int kFloats = N;
    float v[N] = {};

    __device__ __forceinline__ float get(int i) const { return v[i]; }
    __device__ __forceinline__ void merge(const float (&other)[N]) {
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] += other[i];
    }
    __device__ __forceinline__ void set(const float* other) {
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] = other[i];
    }
};

template <typename S>
__device__ __forceinline__ void merge_lanes(S& stats, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
        float other[S::kFloats];
#pragma unroll
        for (int i = 0; i < S::kFloats; ++i) other[i] = __shfl_xor_sync(0xffffffff, stats.get(i), offset);
        stats.merge(other);
    }
}

// How the blocks of a cluster tell each other their numbers; used once.
struct Exchange {
    float of_warps[kWarps][6];
    float of_ranks[8][6];
    uint64_t arrived;  // when the numbers of every block are here
};

// Before the first exchange of a kernel, by all threads: open() early, entered() before the first merge_all.
template <int N>
__device__ __forceinline__ void open(Exchange (&exchanges)[N], const int (&floats)[N], int ranks) {
#if __CUDA_ARCH__ >= 900
    if (ranks == 1) return;
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < N; ++i) ptx::barrier_init(&exchanges[i].arrived, 1);
        ptx::barrier_init_fence();
#pragma unroll
        for (int i = 0; i < N; ++i) ptx::barrier_expect(&exchanges[i].arrived, ranks * floats[i] * 4);
    }
    __syncwarp();
    ptx::cluster_arrive_relaxed();
#endif
}
__device__ __forceinline__ void entered(int ranks) {
#if __CUDA_ARCH__ >= 900
    if (ranks > 1) ptx::cluster_wait();
#endif
}

// Merged over all threads of the cluster, the same in every thread. A block leaves only when it has what was sent to
// it.
template <typename S>
__device__ __forceinline__ void merge_all(S& stats, Exchange& exchange, int rank, int ranks) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    merge_lanes(stats, 32);
    if (lane == 0) {
#pragma unroll
        for (int i = 0; i < S::kFloats; ++i) exchange.of_warps[warp][i] = stats.get(i);
    }
    __syncthreads();
    if (ranks == 1 || warp == 0) {
        stats.set(exchange.of_warps[lane % kWarps]);
        merge_lanes(stats, kWarps);
    }
#if __CUDA_ARCH__ >= 900
    if (ranks > 1) {
        if (warp == 0 && lane < ranks) {  // to every block of the cluster
            const uint32_t to = ptx::map_shared(exchange.of_ranks[rank], lane);
            const uint32_t barrier = ptx::map_shared(&exchange.arrived, lane);
#pragma unroll
            for (int i = 0; i < S::kFloats; ++i) ptx::send(to + 4 * i, stats.get(i), barrier);
        }
        ptx::barrier_wait(&exchange.arrived, 0);
        stats.set(exchange.of_ranks[lane % ranks]);
        merge_lanes(stats, ranks);
    }
#endif
}

// ---- where a row's logits are between the steps

// In registers and shared memory; VECS x 4 columns a thread, which alone reads what it wrote.
template <int VECS, bool TEACHER>
struct Held {
    float student[VECS][4];
    float4* teacher;  // shared
    int begin, end;

    __device__ __forceinline__ Held(const DistillRows& a, int64_t row, int rank, int, void* shared)
        : teacher(static_cast<float4*>(shared) + threadIdx.x),
          begin(rank * kThreads * VECS * 4 + static_cast<int>(threadIdx.x) * 4),
          end(static_cast<int>(a.vocabulary)) {
        // all loads of a thread are on their way before the first value is needed
        const Cap cap(a.student_scale, a.softcap), teacher_cap(a.teacher_scale, a.teacher_softcap);
        if constexpr (TEACHER) {
            if (a.teacher_dtype == 2) copy_teacher(static_cast<const float*>(a.teacher) + row * a.teacher_stride);
        }
        const float* from = a.student + row * a.student_stride;
#pragma unroll
        for (int i = 0; i < VECS; ++i) {
            if (at(i) < end) load4(student[i], from + at(i));
        }
        if constexpr (TEACHER) {
            const int64_t start = row * a.teacher_stride;
            if (a.teacher_dtype == 0) {
                widen_teacher(static_cast<const __nv_bfloat16*>(a.teacher) + start);
            } else if (a.teacher_dtype == 1) {
                widen_teacher(static_cast<const __half*>(a.teacher) + start);
            }
        }
        if (a.softcap > 0.0f || a.student_scale != 1.0f) {
#pragma unroll
            for (int i = 0; i < VECS; ++i) cap(student[i]);
        }
#pragma unroll
        for (int i = 0; i < VECS; ++i) {
            if (at(i) < end && at(i) + 4 > end) cut_off(student[i], at(i), end);
        }
        if constexpr (TEACHER) {
            ptx::copy_async_commit();
            ptx::copy_async_wait<0>();
            const bool changes = a.teacher_softcap > 0.0f || a.teacher_scale != 1.0f;
            if (changes || end % 4) {
                for (int i = 0; i < VECS && at(i) < end; ++i) {
                    const float4 q = teacher[i * kThreads];
                    float v[4] = {q.x, q.y, q.z, q.w};
                    if (changes) teacher_cap(v);
                    cut_off(v, at(i), end);
                    teacher[i * kThreads] = make_float4(v[0], v[1], v[2], v[3]);
                }
            }
        }
    }
    __device__ __forceinline__ int at(int i) const { return begin + i * kThreads * 4; }
    __device__ __forceinline__ void copy_teacher(const float* from) {
#pragma unroll
        for (int i = 0; i < VECS; ++i) {
            if (at(i) < end) ptx::copy_async<16>(teacher + i * kThreads, from + at(i));
        }
    }
    template <typename T>
    __device__ __forceinline__ void widen_teacher(const T* from) {
#pragma unroll 4
        for (int i = 0; i < VECS; ++i) {
            if (at(i) < end) {
                float v[4];
                load4(v, from + at(i));
                teacher[i * kThreads] = make_float4(v[0], v[1], v[2], v[3]);
            }
        }
    }
    template <typename F>
    __device__ __forceinline__ void each(F&& step) const {
#pragma unroll
        for (int i = 0; i < VECS; ++i) {
            if (at(i) >= end) continue;
            float t[4] = {};
            if constexpr (TEACHER) {
                const float4 q = teacher[i * kThreads];
                t[0] = q.x, t[1] = q.y, t[2] = q.z, t[3] = q.w;
            }
            step(at(i), student[i], t);
        }
    }
    // Maximum first, then sums: each value is at hand twice, and nothing is rescaled.
    __device__ __forceinline__ void softmax(Stats& stats, bool two_rates) const {
        each([&](int, const float (&s)[4], const float (&t)[4]) {
            stats.student.raise(s);
            if constexpr (TEACHER) stats.teacher.raise(t);
        });
        each([&](int, const float (&s)[4], const float (&t)[4]) {
            stats.student.sum += stats.student.exponentials(s, stats.rate);
            if constexpr (TEACHER) stats.teacher.sum += stats.teacher.exponentials(t, stats.rate);
        });
        if (two_rates) {
            each([&](int, const float (&s)[4], const float (&)[4]) {
                stats.student.sum1 += stats.student.exponentials(s, kLog2e);
            });
        }
    }
};

// In global memory, read again in each step.
template <bool TEACHER>
struct Plain {
    const DistillRows& a;
    int64_t row;

    __device__ __forceinline__ Plain(const DistillRows& a, int64_t row, int, int, void*) : a(a), row(row) {}
    __device__ __forceinline__ void load_teacher(float (&v)[4], int col) const {
        const int64_t at = row * a.teacher_stride + col;
        if (a.teacher_dtype == 2) {
            load4(v, static_cast<const float*>(a.teacher) + at);
        } else if (a.teacher_dtype == 0) {
            load4(v, static_cast<const __nv_bfloat16*>(a.teacher) + at);
        } else {
            load4(v, static_cast<const __half*>(a.teacher) + at);
        }
    }
    template <typename F>
    __device__ __forceinline__ void each(F&& step) const {
        const Cap cap(a.student_scale, a.softcap), teacher_cap(a.teacher_scale, a.teacher_softcap);
        const int end = static_cast<int>(a.vocabulary);
        for (int col = static_cast<int>(threadIdx.x) * 4; col < end; col += kThreads * 4) {
            float s[4], t[4] = {};
            load4(s, a.student + row * a.student_stride + col);
            cap(s);
            cut_off(s, col, end);
            if constexpr (TEACHER) {
                load_teacher(t, col);
                teacher_cap(t);
                cut_off(t, col, end);
            }
            step(col, s, t);
        }
    }
    __device__ __forceinline__ void softmax(Stats& stats, bool two_rates) const {
        each([&](int, const float (&s)[4], const float (&t)[4]) {
            stats.student.add(s, stats.rate, kLog2e, two_rates);
            if constexpr (TEACHER) stats.teacher.add(t, stats.rate, stats.rate, false);
        });
    }
};

// ---- the result

// Where a row of D goes, for columns that come in ascending order.
struct Target {
    const DistillRows& a;
    int64_t row;  // of the whole matrix
    int next = 0;
    int64_t offset = 0;

    __device__ __forceinline__ Target(const DistillRows& a, int64_t row) : a(a), row(row) {}
    __device__ __forceinline__ void store(int col, const float (&d)[4]) {
        if (col >= next) {  // seldom: another block of columns
            const int begin = col / a.block * a.block, left = static_cast<int>(a.vocabulary) - begin;
            const int stride = left < a.block ? (left + 7) / 8 * 8 : a.block;
            offset = static_cast<int64_t>(begin) * a.rows + row * stride - begin;
            next = begin + a.block;
        }
        const int64_t at = offset + col;
        if (a.grad_dtype == 0) {
            const uint2 q = {pack2(d[0], d[1], __nv_bfloat16{}), pack2(d[2], d[3], __nv_bfloat16{})};
            __stcs(reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(a.grad) + at), q);
        } else if (a.grad_dtype == 1) {
            const uint2 q = {pack2(d[0], d[1], __half{}), pack2(d[2], d[3], __half{})};
            __stcs(reinterpret_cast<uint2*>(static_cast<__half*>(a.grad) + at), q);
        } else {
            __stcs(reinterpret_cast<float4*>(static_cast<float*>(a.grad) + at), make_float4(d[0], d[1], d[2], d[3]));
        }
    }
};

// A row that does not count; every block of the cluster comes here.
__device__ __forceinline__ void write_nothing(const DistillRows& a, int64_t row, int rank, int ranks) {
    if (a.grad) {
        Target target(a, a.first + row);
        const float none[4] = {};
        for (int col = (rank * kThreads + threadIdx.x) * 4; col < a.vocabulary; col += ranks * kThreads * 4)
            target.store(col, none);
    }
    if (rank == 0 && threadIdx.x < 4) a.sums[row * 4 + threadIdx.x] = 0.0f;
}

// -log p[label], where of_p is log2 of the sum of exponentials; a label outside of the vocabulary shows.
__device__ __forceinline__ float cross_entropy(const DistillRows& a, int64_t row, int64_t label, float of_p) {
    if (!a.labels) return 0.0f;
    if (label < 0 || label >= a.vocabulary) return NAN;
    return (of_p - Cap(a.student_scale, a.softcap)(a.student[row * a.student_stride + label]) * kLog2e) * kLn2;
}

__device__ __forceinline__ float times(float p, float log_ratio) { return p > 0.0f ? p * log_ratio : 0.0f; }

// log2(m / s) for u = log2(t / s): the larger of the two terms of m in front, so that nothing overflows.
__device__ __forceinline__ float mixture(float u, float beta) {
    const float small = exp2_fast(-fabsf(u));
    return u > 0.0f ? u + log2_fast(beta + (1.0f - beta) * small) : log2_fast(1.0f - beta + beta * small);
}

template <typename STORE, Mode MODE>
__device__ __forceinline__ void row_of_losses(const DistillRows& a, int rank, int ranks, void* shared) {
    constexpr bool kTeacher = MODE != kCrossEntropy;
    __shared__ Exchange exchange[2];
    const int64_t row = blockIdx.x / ranks;
    const int64_t label = a.labels ? a.labels[row] : -1;
    if (a.labels && label == a.ignore_index) return write_nothing(a, row, rank, ranks);
    open(exchange, {Stats::kFloats, 4}, ranks);

    const STORE store(a, row, rank, ranks, shared);
    Stats stats;
    stats.rate1 = kLog2e;
    stats.rate = kTeacher ? kLog2e / a.temperature : kLog2e;
    const float rate = stats.rate;
    const bool two_rates = kTeacher && a.labels && a.temperature != 1.0f;
    store.softmax(stats, two_rates);
    entered(ranks);
    merge_all(stats, exchange[0], rank, ranks);
    // log2 of s, t and p is rate * z - of_s, ... - of_t, ... - of_p
    const float of_s = fmaf(stats.student.max, rate, log2_fast(stats.student.sum));
    const float of_t = fmaf(stats.teacher.max, rate, log2_fast(stats.teacher.sum));
    const float of_p = two_rates ? fmaf(stats.student.max, kLog2e, log2_fast(stats.student.sum1)) : of_s;

    Sums<4> sums;  // in base 2: kl, reverse, s against m, t against m
    if constexpr (MODE == kAll) {
        store.each([&](int, const float (&s)[4], const float (&t)[4]) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float ls = fmaf(s[i], rate, -of_s), lt = fmaf(t[i], rate, -of_t), u = lt - ls;
                const float ps = exp2_fast(ls), pt = exp2_fast(lt), r = a.jsd != 0.0f ? mixture(u, a.jsd_beta) : 0.0f;
                sums.v[0] += times(pt, u);
                sums.v[1] -= times(ps, u);
                sums.v[2] -= times(ps, r);
                sums.v[3] += times(pt, u - r);
            }
        });
        merge_all(sums, exchange[1], rank, ranks);
    }

    const float factor = *a.factor * a.student_scale, ln = a.temperature * kLn2 * factor;
    const float of_kl = a.kl * a.temperature * factor, of_ce = a.labels ? a.ce * factor : 0.0f;
    const float of_reverse = a.reverse_kl * ln, of_jsd = a.jsd * (1.0f - a.jsd_beta) * ln;
    const float flat = a.softcap > 0.0f ? 1.0f / (a.softcap * a.softcap) : 0.0f;
    if (a.grad || MODE == kForwardKl) {
        Target target(a, a.first + row);
        store.each([&](int col, const float (&s)[4], const float (&t)[4]) {
            float d[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float ls = fmaf(s[i], rate, -of_s), ps = exp2_fast(ls);
                d[i] = 0.0f;
                if constexpr (kTeacher) {
                    const float lt = fmaf(t[i], rate, -of_t), pt = exp2_fast(lt), u = lt - ls;
                    d[i] = of_kl * (ps - pt);
                    if constexpr (MODE == kForwardKl) {
                        sums.v[0] += times(pt, u);
                    } else {
                        const float pull = of_jsd != 0.0f ? of_jsd * (mixture(u, a.jsd_beta) + sums.v[2]) : 0.0f;
                        d[i] -= times(ps, (of_reverse != 0.0f ? of_reverse * (u + sums.v[1]) : 0.0f) + pull);
                    }
                }
                d[i] = fmaf(of_ce, two_rates ? exp2_fast(fmaf(s[i], kLog2e, -of_p)) : ps, d[i]);
            }
            if (static_cast<uint64_t>(label - col) < 4) {
#pragma unroll
                for (int i = 0; i < 4; ++i) d[i] -= col + i == label ? of_ce : 0.0f;
            }
            if (flat > 0.0f) {
#pragma unroll
                for (int i = 0; i < 4; ++i) d[i] *= 1.0f - s[i] * s[i] * flat;
            }
            if (a.grad) target.store(col, d);
        });
    }
    if constexpr (MODE == kForwardKl) merge_all(sums, exchange[1], rank, ranks);
    if (rank == 0 && threadIdx.x == 0) {
        const float square = a.temperature * a.temperature * kLn2;
        a.sums[row * 4] = kTeacher ? sums.v[0] * square : 0.0f;
        a.sums[row * 4 + 1] = a.reverse_kl != 0.0f ? sums.v[1] * square : 0.0f;
        a.sums[row * 4 + 2] =
            a.jsd != 0.0f ? (a.jsd_beta * sums.v[3] + (1.0f - a.jsd_beta) * sums.v[2]) * square : 0.0f;
        a.sums[row * 4 + 3] = cross_entropy(a, row, label, of_p);
    }
}

// The usual loss: forward KL, cross-entropy at the same temperature, no cap on the student. Everything of a row that
// its gradient needs is known after one exchange, and the exponentials of the sums are kept in place of the logits:
//
//   sum t log(t / s) = sum e_t (t' - s') / sum e_t  - log Z_t + log Z_s     for logits t', s' over T and e_t = exp(t' -
//   max) D = (w_kl T + w_ce) s - w_kl T t
#if __CUDA_ARCH__ >= 900
struct Forward {
    static constexpr int kFloats = 5;
    float max_s, sum_s, max_t, sum_t, cross, rate;

    __device__ __forceinline__ float get(int i) const {
        return i == 0 ? max_s : i == 1 ? sum_s : i == 2 ? max_t : i == 3 ? sum_t : cross;
    }
    __device__ __forceinline__ void set(const float* v) {
        max_s = v[0], sum_s = v[1], max_t = v[2], sum_t = v[3], cross = v[4];
    }
};

// Maxima first: one rescaling, not one a step.
__device__ __forceinline__ void merge_lanes(Forward& f, int lanes) {
    float top_s = f.max_s, top_t = f.max_t;
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
        top_s = fmaxf(top_s, __shfl_xor_sync(0xffffffff, top_s, offset));
        top_t = fmaxf(top_t, __shfl_xor_sync(0xffffffff, top_t, offset));
    }
    const float by_s = exp2_fast((f.max_s - top_s) * f.rate), by_t = exp2_fast((f.max_t - top_t) * f.rate);
    f.sum_s *= by_s, f.sum_t *= by_t, f.cross *= by_t;
    f.max_s = top_s, f.max_t = top_t;
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
        f.sum_s += __shfl_xor_sync(0xffffffff, f.sum_s, offset);
        f.sum_t += __shfl_xor_sync(0xffffffff, f.sum_t, offset);
        f.cross += __shfl_xor_sync(0xffffffff, f.cross, offset);
    }
}

template <int VECS>
__device__ __forceinline__ void row_of_forward_kl(const DistillRows& a, int rank, int ranks, void* shared) {
    __shared__ Exchange exchange[1];
    const int64_t row = blockIdx.x / ranks;
    const int64_t label = a.labels ? a.labels[row] : -1;
    if (a.labels && label == a.ignore_index) return write_nothing(a, row, rank, ranks);
    open(exchange, {Forward::kFloats}, ranks);

    Held<VECS, true> store(a, row, rank, ranks, shared);
    const float rate = kLog2e / a.temperature;
    float max_s = kLow, max_t = kLow;
#pragma unroll
    for (int i = 0; i < VECS; ++i) {
        if (store.at(i) < store.end) {
            const float4 t = store.teacher[i * kThreads];
            const float (&s)[4] = store.student[i];
            max_s = fmaxf(fmaxf(fmaxf(s[0], s[1]), fmaxf(s[2], s[3])), max_s);
            max_t = fmaxf(fmaxf(fmaxf(t.x, t.y), fmaxf(t.z, t.w)), max_t);
        }
    }
    const float mine_s = max_s * rate, mine_t = max_t * rate;  // what this thread's exponentials are relative to
    float sum_s = 0.0f, sum_t = 0.0f, cross = 0.0f;
#pragma unroll
    for (int i = 0; i < VECS; ++i) {
        if (store.at(i) < store.end) {
            const float4 q = store.teacher[i * kThreads];
            float t[4] = {q.x, q.y, q.z, q.w};
            float (&s)[4] = store.student[i];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                t[j] = fmaxf(t[j], kLow);  // minus infinity would make 0 * infinity of the product
                const float apart = t[j] - s[j];
                s[j] = exp2_fast(fmaf(s[j], rate, -mine_s));
                t[j] = exp2_fast(fmaf(t[j], rate, -mine_t));
                sum_s += s[j];
                sum_t += t[j];
                cross = fmaf(t[j], apart, cross);
            }
            store.teacher[i * kThreads] = make_float4(t[0], t[1], t[2], t[3]);
        }
    }

    Forward f{max_s, sum_s, max_t, sum_t, cross, rate};
    entered(ranks);
    merge_all(f, exchange[0], rank, ranks);

    const float of_s = fmaf(f.max_s, rate, log2_fast(f.sum_s)), of_t = fmaf(f.max_t, rate, log2_fast(f.sum_t));
    if (a.grad) {
        const float factor = *a.factor * a.student_scale;
        const float of_kl = a.kl * a.temperature * factor, of_ce = a.labels ? a.ce * factor : 0.0f;
        const float by_s = (of_kl + of_ce) * exp2_fast(mine_s - of_s), by_t = of_kl * exp2_fast(mine_t - of_t);
        Target target(a, a.first + row);
#pragma unroll
        for (int i = 0; i < VECS; ++i) {
            const int col = store.at(i);
            if (col < store.end) {
                const float4 t = store.teacher[i * kThreads];
                const float (&s)[4] = store.student[i];
                float d[4] = {fmaf(s[0], by_s, -t.x * by_t), fmaf(s[1], by_s, -t.y * by_t),
                              fmaf(s[2], by_s, -t.z * by_t), fmaf(s[3], by_s, -t.w * by_t)};
                if (static_cast<uint64_t>(label - col) < 4) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) d[j] -= col + j == label ? of_ce : 0.0f;
                }
                target.store(col, d);
            }
        }
    }
    if (rank == 0 && threadIdx.x == 0) {
        const float kl = fmaf(f.cross / f.sum_t, rate, of_s - of_t);
        a.sums[row * 4] = kl * a.temperature * a.temperature * kLn2;
        a.sums[row * 4 + 1] = a.sums[row * 4 + 2] = 0.0f;
        a.sums[row * 4 + 3] = cross_entropy(a, row, label, of_s);
    }
}
#endif

template <int VECS, Mode MODE>
__global__ void __launch_bounds__(kThreads, VECS == 8 ? 2 : 1) held_kernel(DistillRows a, int ranks) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ float4 memory[];
    ptx::wait_for_predecessor();
    if constexpr (MODE == kForwardKl) {
        row_of_forward_kl<VECS>(a, blockIdx.x % ranks, ranks, memory);
    } else {
        row_of_losses<Held<VECS, MODE != kCrossEntropy>, MODE>(a, blockIdx.x % ranks, ranks, memory);
    }
#endif
}

template <Mode MODE>
__global__ void __launch_bounds__(kThreads, 2) plain_kernel(DistillRows a) {
    ptx::wait_for_predecessor();
    row_of_losses<Plain<MODE != kCrossEntropy>, MODE>(a, 0, 1, nullptr);
}

template <int VECS, Mode MODE>
bool launch_held(const DistillRows& a, int major, cudaStream_t stream) {
    constexpr int64_t kColumns = VECS * kThreads * 4;  // of a block
    int ranks = 1;
    while (ranks < 8 && ranks * kColumns < a.vocabulary) ranks *= 2;
    if (ranks * kColumns < a.vocabulary) return false;
    const int bytes = MODE == kCrossEntropy ? 0 : VECS * kThreads * 16;
    if (allow_shared_memory<held_kernel<VECS, MODE>>("distill_rows") < bytes) return false;
    launch_programmatic("distill_rows", held_kernel<VECS, MODE>, dim3(static_cast<unsigned>(a.count * ranks)), kThreads,
                        bytes, ranks, major, stream, a, ranks);
    return true;
}

template <Mode HELD, Mode PLAIN>
void launch_rows(const DistillRows& a, cudaStream_t stream) {
    const int major = current_device().major;
    if (major == 9 && (launch_held<8, HELD>(a, major, stream) || launch_held<16, HELD>(a, major, stream))) return;
    launch_programmatic("distill_rows", plain_kernel<PLAIN>, dim3(static_cast<unsigned>(a.count)), kThreads, 0, 1,
                        major, stream, a);
}

template <typename T>
struct alignas(16) Vector16 {
    T at[16 / sizeof(T)];
};

template <typename T>
__global__ void __launch_bounds__(256)
    scale_kernel(T* __restrict__ t, int64_t count, const float* __restrict__ factor, float scale) {
    const float by = *factor * scale;
    if (by == 1.0f) return;
    constexpr int kVec = 16 / sizeof(T);
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x, me = blockIdx.x * 256ll + threadIdx.x;
    const bool fits = reinterpret_cast<uintptr_t>(t) % 16 == 0;
    const int64_t vectors = fits ? count / kVec : 0;
    for (int64_t i = me; i < vectors; i += step) {
        auto v = reinterpret_cast<Vector16<T>*>(t)[i];
#pragma unroll
        for (int j = 0; j < kVec; ++j) v.at[j] = from_float<T>(to_float(v.at[j]) * by);
        reinterpret_cast<Vector16<T>*>(t)[i] = v;
    }
    for (int64_t i = vectors * kVec + me; i < count; i += step) t[i] = from_float<T>(to_float(t[i]) * by);
}

}  // namespace

void distill_rows(const DistillRows& a, cudaStream_t stream) {
    if (a.count == 0 || a.vocabulary == 0) return;
    require(a.vocabulary < (1 << 30) && a.count < (1 << 27),
            "distill_rows: " + std::to_string(a.count) + " rows of " + std::to_string(a.vocabulary) + " are too many");
    if (!a.teacher) return launch_rows<kCrossEntropy, kCrossEntropy>(a, stream);
    if (a.reverse_kl != 0.0f || a.jsd != 0.0f) return launch_rows<kAll, kAll>(a, stream);
    const bool usual = a.softcap <= 0.0f && (!a.labels || a.temperature == 1.0f);
    usual ? launch_rows<kForwardKl, kForwardKl>(a, stream) : launch_rows<kAll, kForwardKl>(a, stream);
}

void distill_scale(void* t, int dtype, int64_t count, const float* factor, float scale, cudaStream_t stream) {
    if (count == 0) return;
    const int64_t wanted = ceil_div(count, 256 * 16);
    const auto blocks = static_cast<unsigned>(wanted < 132 * 16 ? wanted : 132 * 16);
    with_float_type(dtype, [&](auto type) {
        using T = decltype(type);
        scale_kernel<T><<<blocks, 256, 0, stream>>>(static_cast<T*>(t), count, factor, scale);
    });
    check_cuda(cudaGetLastError(), "distill_scale");
}

}  // namespace pyquant
