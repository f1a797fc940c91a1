// From a call to the kernel that runs it: instantiated once for each dtype, in files of its own that compile in
// parallel.
#pragma once

#include "fake_quant.cuh"

namespace pyquant::fq {

// How the host cut a call: in 16-byte vectors or single elements, and whether the flat kernels take it.
struct Plan {
    bool backward, wide, flat;
};
void launch_bf16(const Call& c, Plan plan, cudaStream_t stream);
void launch_fp16(const Call& c, Plan plan, cudaStream_t stream);
void launch_fp32(const Call& c, Plan plan, cudaStream_t stream);

constexpr int kFlatVectors = 4;  // vectors of a tensor that a thread of the flat kernels holds

inline uint32_t blocks_for(const Call& c) {
    const uint32_t segments = kThreads / c.lanes;
    return c.total / segments + (c.total % segments != 0);
}

template <typename T, int VEC, typename S>
void launch_rows(const Call& c, Plan plan, cudaStream_t stream) {
    const uint32_t blocks = blocks_for(c);
    plan.backward ? backward_rows<T, VEC, 2, S><<<blocks, kThreads, 0, stream>>>(c)
                  : forward_rows<T, VEC, 2, S><<<blocks, kThreads, 0, stream>>>(c);
}

// What is rare runs a kernel that looks its surrogate up: a soft forward over long rows, gates that overlap, the gate
// Phi, surrogates of fp32 weights, and of weights that 16 bytes do not fit.
template <typename T>
void launch_any(const Call& c, Plan plan, cudaStream_t stream) {
    plan.wide ? launch_rows<T, 16 / sizeof(T), AnySurrogate<T>>(c, plan, stream)
              : launch_rows<T, 1, AnySurrogate<T>>(c, plan, stream);
}

// Blocks of a flat kernel that a multiprocessor shall hold, which bounds its registers. A block for every vector is
// started: blocks that stay and walk over the weight were 4 to 14 % slower, with prefetching too.
template <typename S, bool BACKWARD>
constexpr int kResident = S::kLsq && !BACKWARD ? 4 : 3;

template <typename T, int ROUND, int CLAMP, bool SOFT>
void launch_one(const Call& c, Plan plan, cudaStream_t stream) {
    using S = Surrogate<T, ROUND, CLAMP, SOFT>;
    if (plan.flat && plan.backward) {
        constexpr int kBlocks = kResident<S, true>;
        const uint32_t blocks = blocks_for(c);
        c.zero ? backward_flat<T, kFlatVectors, S, true, kBlocks><<<blocks, kThreads, 0, stream>>>(c)
               : backward_flat<T, kFlatVectors, S, false, kBlocks><<<blocks, kThreads, 0, stream>>>(c);
    } else if (plan.flat) {
        if constexpr (SOFT || S::kLsq) {  // an exact forward is launched as LSQ's
            forward_flat<T, kFlatVectors, S, kResident<S, false>><<<blocks_for(c), kThreads, 0, stream>>>(c);
        }
    } else if constexpr (SOFT) {
        launch_any<T>(c, plan, stream);
    } else {
        launch_rows<T, 16 / sizeof(T), S>(c, plan, stream);
    }
}

template <typename T, int ROUND, int CLAMP>
void launch_soft(const Call& c, Plan plan, cudaStream_t stream) {
    c.soft ? launch_one<T, ROUND, CLAMP, true>(c, plan, stream) : launch_one<T, ROUND, CLAMP, false>(c, plan, stream);
}

template <typename T>
void launch(const Call& c, Plan plan, cudaStream_t stream) {
    if ((c.rounding == kSte && c.clamp == kHard) || (!plan.backward && !c.soft)) {  // the exact forward is one for all
        return plan.wide ? launch_one<T, kSte, kHard, false>(c, plan, stream)
                         : launch_rows<T, 1, Surrogate<T, kSte, kHard, false>>(c, plan, stream);
    }
    const bool near = c.beta * (c.range.high - c.range.low) / 2 >= kNear;
    if constexpr (sizeof(T) == 2) {
        if (plan.wide && (c.clamp == kHard || (c.clamp == kSigmoid && near))) {
            switch (c.rounding * 2 + c.clamp) {
                case kSte * 2 + kSigmoid:
                    return launch_soft<T, kSte, kSigmoid>(c, plan, stream);
                case kSigmoidA * 2 + kHard:
                    return launch_soft<T, kSigmoidA, kHard>(c, plan, stream);
                case kSigmoidA * 2 + kSigmoid:
                    return launch_soft<T, kSigmoidA, kSigmoid>(c, plan, stream);
                case kSigmoidB * 2 + kHard:
                    return launch_soft<T, kSigmoidB, kHard>(c, plan, stream);
                default:
                    return launch_soft<T, kSigmoidB, kSigmoid>(c, plan, stream);
            }
        }
    }
    launch_any<T>(c, plan, stream);
}

}  // namespace pyquant::fq
