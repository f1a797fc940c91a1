// attention_kv4: a few query tokens a sequence against a cache in mixed precision (pyquant/formats/kv4.py), in one
// launch.
//
//   q        [B, Tq, Hq, D]      the newest Tq tokens, rotated; their keys and values are in the cache already
//   prompt, pages, window, segments   the cache; segments int32 [B, 3] is read on the device
//   out      [B, Tq, Hq, D]      lse fp32 [B, Tq, Hq] or null
//
// **Work.** A unit is what one warp fetches at once: a page of 64 tokens (of 4 bits 68 D + 256 bytes) or a tile of 16
// tokens in 16 bits (64 D bytes): with 4 bits nearly the same bytes, so equal numbers of units are equal shares of the
// memory's time, whatever mix of precisions a sequence has. All units of all sequences and KV heads form one list,
//
//     sequence 0, head 0: prompt tiles | pages | window tiles   head 1: ...   sequence 1, head 0: ...
//
// of which each block takes a run, and of its part of a head each warp takes every kWarps-th unit, through its own ring
// of stages that the copy engine (before sm_90 cp.async) fills: no barrier but at the end of a head. Runs end with
// heads where that costs little, each head then in equal shares, and are equal shares of everything otherwise, so
// ragged batches balance by themselves. Half a page is a unit where there is so little work that every warp then has
// one.
//
// **Products.** The cache is the A operand of mma.m16n8k16 and the G Tq query rows of a KV head are the columns of B,
// so no row is wasted on missing heads: S^T [16 tokens, rows] = K Q^T, then O^T [D, rows] += V^T P^T, where a tile of
// S^T becomes the B operand by one transpose in registers.
//
// **Codes.** A few instructions (csrc/kv4_codes.cuh) make codes numbers in fp16: 1024 + code of 8 bits, 1 + code / u of
// fewer. K: (code - zero) scale = u scale (1 + code/u) - u scale (1 + zero/u), so u scale is folded into the query,
// once a page, and the second term is one more row of A, whose negative is added to the scores. V likewise: V's scale
// and u go into P (u as a power of 2 in the exponent), and what 1 + zero/u comes to in all is one more row, the same
// for every channel, which is taken off the sums when they are next multiplied anyway.
//
// **Sliding window.** Units that no query sees are not in the list. **Sinks** join when the parts of a head are summed.
//
// **Meeting.** Warps meet in shared memory. A head that several blocks share meets in a workspace: each leaves its
// maximum, its sum and its part of the output, and the last to arrive, by a counter that it sets back to 0, adds them
// up in the order of the blocks. The same bits every time.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kv4_codes.cuh"
#include "kv4_work.cuh"
#include "ops.h"
#include "programmatic.cuh"

namespace pyquant {
namespace {

constexpr float kNothing = -1e30f;  // a score that weighs nothing; finite, so that differences are numbers
constexpr float kLog2e = 1.4426950408889634f;
constexpr int64_t kCounters = 1 << 14;  // at the beginning of the workspace, one a (sequence, KV head)

template <typename T>
struct Call {
    const T* q;
    int64_t q_batch, q_token;
    const T* prompt;
    int64_t prompt_batch;
    const uint8_t* pages;
    const T* window;
    const int* segments;
    T* out;
    float* lse;
    float* parts;
    unsigned* arrived;
    const float* sinks;    // by query head, or null
    float scale, softcap;  // softcap 0: none; scale includes log2(e) then, and 1 / softcap otherwise
    int batch, tokens, heads, kv_heads, prompt_tiles, page_capacity, ring_tiles;
    int group;  // query heads a KV head
    int reach;  // each query token sees so many tokens up to its own
    bool early;
    bool check_even;  // clusters are for sequences of about the same length only
    __device__ int rows() const { return group * tokens; }
    // The query token and the head of its group that a row is, without a division in the usual case.
    __device__ int token(int row) const { return tokens == 1 ? 0 : row / group; }
};

template <typename T>
Call<T> call_of(const Kv4Arguments& a) {
    const bool capped = a.softcap > 0.0f;
    char* const space = static_cast<char*>(a.workspace);
    return Call<T>{static_cast<const T*>(a.q),
                   a.q_batch_stride,
                   a.q_token_stride,
                   static_cast<const T*>(a.prompt),
                   a.prompt_batch_stride,
                   static_cast<const uint8_t*>(a.pages),
                   static_cast<const T*>(a.window),
                   a.segments,
                   static_cast<T*>(a.out),
                   a.lse,
                   reinterpret_cast<float*>(space + kCounters * 4),
                   reinterpret_cast<unsigned*>(space),
                   a.sinks,
                   capped ? a.scaling / a.softcap : a.scaling * kLog2e,
                   capped ? a.softcap * kLog2e : 0.0f,
                   static_cast<int>(a.batch),
                   static_cast<int>(a.tokens),
                   static_cast<int>(a.heads),
                   static_cast<int>(a.kv_heads),
                   static_cast<int>(a.prompt_tiles),
                   static_cast<int>(a.page_capacity),
                   static_cast<int>(a.ring_tiles),
                   static_cast<int>(a.kv_heads ? a.heads / a.kv_heads : 0),
                   static_cast<int>(a.sliding_window ? a.sliding_window : 1 << 30),
                   a.early,
                   false};
}

template <int D, int NT, int BITS>
constexpr int kUsualWarps = D > 128 && (NT > 1 || BITS > 4) ? 4 : 8;

template <int D, int NT, int BITS, int WARPS = kUsualWarps<D, NT, BITS>>
struct Shape {
    static constexpr int kRows = 8 * NT, kPieces = D / 16;
    // What is fetched at once is half a unit: K, then V.
    static constexpr int kCodeBytes = 8 * BITS * D, kKBytes = kCodeBytes + 4 * D,
                         kVBytes = kCodeBytes + 4 * kPageTokens;
    static constexpr int kTileBytes = 32 * D, kStageBytes = std::max({kKBytes, kVBytes, kTileBytes});
    static constexpr int kStages = kStageBytes >= 3072 ? 2 : 4;
    static constexpr int kWarps = WARPS;
    // On a multiprocessor, so that the next call fits beside.
    static constexpr int kBlocks = NT == 1 && D <= 128 && BITS <= 4 && WARPS <= 8 ? 2 : 1;
    // Clusters for many heads, of the usual sizes only: they take long to compile.
    static constexpr bool kCanCheck = NT == 1 && (D == 64 || D == 128) && BITS <= 4;
    static constexpr int kThreads = 32 * kWarps, kHalf = kWarps / 2;
    // Whether a page can be two units: never, where there is little work, always (many rows need many registers).
    static constexpr int kHalves = Codes<BITS>::kSpan > 2 ? 0 : NT * kPieces >= 20 ? 2 : 1;
    static constexpr int kSumRow = D + 4;
    static constexpr int kPart =
        kRows * (D + 2);  // floats that a block leaves of a head: the output, then maximum and sum
};

template <typename T, int D, int NT, int BITS, int WARPS = kUsualWarps<D, NT, BITS>>
struct Shared {
    using S = Shape<D, NT, BITS, WARPS>;
    static constexpr bool kOneHead = false;
    alignas(16) unsigned char ring[S::kWarps][S::kStages][S::kStageBytes];
    __device__ unsigned char* stage(int warp, int at) { return ring[warp][at]; }
    uint2 q[NT][S::kPieces][32];        // B fragments in T
    uint2 q_codes[NT][S::kPieces][32];  // in fp16, times scale, and 16 scale
    union alignas(16) {
        float4 exchange[NT][S::kPieces][32];  // registers of a warp of the upper half
        float sums[S::kRows][S::kSumRow];
    } meet[S::kHalf];
    float most[S::kWarps][S::kRows], total[S::kWarps][S::kRows];
    List list;
    Ahead ahead[S::kWarps];
    uint64_t full[S::kWarps][S::kStages];  // a stage has arrived
    bool last;
};

template <typename T, int D, int NT, int BITS, typename Memory = Shared<T, D, NT, BITS>>
struct Warp {
    using S = typename Memory::S;
    const Call<T>& call;
    Memory& shared;
    int lane, g, t;
    float most[NT][2], total[NT][2];  // of rows 8 n + 2 t and 8 n + 2 t + 1
    float sums[NT][S::kPieces][4];    // channels g and g + 8 of a piece, for the two rows, times C::kPGain
    float offset[NT][2];              // still to be added to each channel of `sums`

    __device__ void reset() {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            most[n][0] = most[n][1] = kNothing;
            total[n][0] = total[n][1] = offset[n][0] = offset[n][1] = 0.0f;
#pragma unroll
            for (int i = 0; i < S::kPieces; ++i) {
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[n][i][e] = 0.0f;
            }
        }
    }

    // The units that `ahead` takes next: how many one after the other, whole pages only, or one, or none.
    __device__ __forceinline__ int find_units(Ahead& ahead) const {
        if constexpr (Memory::kOneHead) {
            if (ahead.unit >= ahead.walk.stop) return 0;
        } else {
            while (ahead.more && ahead.unit >= ahead.walk.stop) {
                ahead.more = ahead.walk.next(shared.list);
                ahead.unit = ahead.walk.from + ahead.first;
            }
            if (!ahead.more) return 0;
        }
        const Segments s = shared.list.of(ahead.walk.b);
        const int halves = S::kHalves ? shared.list.halves : 0, step = ahead.step;
        const int64_t b = ahead.walk.b, head = ahead.walk.head, of_all = b * call.kv_heads + head;
        const int unit = ahead.unit + s.skip, body = unit - s.prompt_tiles(), late = body - (s.pages << halves);
        int count = 1;
        if (body >= 0 && late < 0) {
            ahead.from = call.pages + (of_all * call.page_capacity + (body >> halves)) * (S::kKBytes + S::kVBytes);
            ahead.kind = halves ? Ahead::kHalf + body % 2 : Ahead::kPage;
            if (!halves) count = (min(ahead.walk.stop - ahead.unit, -late) + step - 1) / step;
        } else {
            const int tile = (kPageTokens / kTileTokens * s.pages + late) % call.ring_tiles;
            const T* const tiles =
                body < 0 ? call.prompt + b * call.prompt_batch + (head * call.prompt_tiles + unit) * (32 * D)
                         : call.window + (of_all * call.ring_tiles + tile) * (32 * D);
            ahead.from = reinterpret_cast<const unsigned char*>(tiles);
            ahead.kind = Ahead::kTile;
        }
        ahead.unit += count * step;
        return count;
    }

    // The next half unit to a stage: K to those of even number, V to the others.
    __device__ __forceinline__ void fetch(int warp, int stage) const {
        // Two pieces of memory: of half a page its codes, and the numbers of the whole.
        const unsigned char *from = nullptr, *numbers = nullptr;
        int bytes = 0, to = 0, number_bytes = 0;
        if (lane == 0) {
            Ahead& ahead = shared.ahead[warp];
            const bool v = stage % 2;
            int count = ahead.count;
            if (!v && count == 0) ahead.count = count = find_units(ahead);
            if (count) {
                from = ahead.from;
                if (v) {
                    ahead.from =
                        from + static_cast<int64_t>(ahead.step) * (S::kKBytes + S::kVBytes);  // if there is more
                    ahead.count = count - 1;
                }
                const int kind = ahead.kind;
                if (kind == Ahead::kTile) {
                    from += v ? S::kTileBytes : 0;
                    bytes = S::kTileBytes;
                } else {
                    from += v ? S::kKBytes : 0;
                    bytes = v ? S::kVBytes : S::kKBytes;
                    if (S::kHalves && kind >= Ahead::kHalf) {
                        numbers = from + S::kCodeBytes;
                        number_bytes = bytes - S::kCodeBytes;
                        bytes = S::kCodeBytes / 2;
                        to = (kind - Ahead::kHalf) * bytes;
                        from += to;
                    }
                }
#if __CUDA_ARCH__ >= 900
                unsigned char* const ring = shared.stage(warp, stage);
                ptx::barrier_expect(&shared.full[warp][stage], bytes + number_bytes);
                ptx::copy_bulk(ring + to, from, bytes, &shared.full[warp][stage]);
                if (number_bytes) {
                    ptx::copy_bulk(ring + S::kCodeBytes, numbers, number_bytes, &shared.full[warp][stage]);
                }
#endif
            }
        }
#if __CUDA_ARCH__ < 900
        const auto of_first = [](const unsigned char* p) {
            return reinterpret_cast<const unsigned char*>(
                __shfl_sync(0xffffffff, reinterpret_cast<unsigned long long>(p), 0));
        };
        from = of_first(from), numbers = of_first(numbers);
        bytes = __shfl_sync(0xffffffff, bytes, 0), to = __shfl_sync(0xffffffff, to, 0);
        number_bytes = __shfl_sync(0xffffffff, number_bytes, 0);
        unsigned char* const ring = shared.stage(warp, stage);
        for (int i = 16 * lane; i < bytes; i += 512) ptx::copy_async<16>(ring + to + i, from + i);
        for (int i = 16 * lane; i < number_bytes; i += 512) {
            ptx::copy_async<16>(ring + S::kCodeBytes + i, numbers + i);
        }
        ptx::copy_async_commit();
#endif
    }

    // The numbers x of BLOCKS x 16 tokens, whose scores are `by` x + shift, become weights times `low` of the first 8
    // tokens of a block and times `high` of the others; the running maximum and sums follow.
    template <int BLOCKS>
    __device__ __forceinline__ void soften(float (&score)[NT][BLOCKS][4], float by, float (&shift)[NT][2], Power low,
                                           Power high, int position, int limit, int valid) {
        if (call.softcap > 0.0f) {
#pragma unroll
            for (int n = 0; n < NT; ++n) {
#pragma unroll
                for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        score[n][b][e] = call.softcap / by * tanhf(by * score[n][b][e] + shift[n][e % 2]);
                    }
                }
                shift[n][0] = shift[n][1] = 0.0f;
            }
        }
        // Not every row attends to every token of the unit: its end, or tokens newer than a query or too old for it.
        if (position + 16 * BLOCKS > min(limit - call.tokens + 1, valid) || position < limit - call.reach) {
#pragma unroll
            for (int n = 0; n < NT; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int query = limit - call.tokens + call.token(8 * n + 2 * t + e % 2);
#pragma unroll
                    for (int b = 0; b < BLOCKS; ++b) {
                        const int at = position + 16 * b + g + e / 2 * 8;
                        if (at > query || at <= query - call.reach || at >= valid) score[n][b][e] = kNothing / by;
                    }
                }
            }
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float highest = fmaxf(score[n][0][h], score[n][0][h + 2]);
#pragma unroll
                for (int b = 1; b < BLOCKS; ++b) highest = fmaxf(highest, fmaxf(score[n][b][h], score[n][b][h + 2]));
#pragma unroll
                for (int other = 4; other < 32; other *= 2) {
                    highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, other));
                }
                highest = fmaxf(by * highest + shift[n][h], most[n][h]);
                const float shrink = ptx::exp2_approx(most[n][h] - highest);
                most[n][h] = highest;
                const float add_low = shift[n][h] - highest + low.log2, add_high = shift[n][h] - highest + high.log2;
                float sum_low = 0.0f, sum_high = 0.0f;
#pragma unroll
                for (int b = 0; b < BLOCKS; ++b) {
                    score[n][b][h] = ptx::exp2_approx(by * score[n][b][h] + add_low);
                    score[n][b][h + 2] = ptx::exp2_approx(by * score[n][b][h + 2] + add_high);
                    sum_low += score[n][b][h], sum_high += score[n][b][h + 2];
                }
                total[n][h] = total[n][h] * shrink + (sum_low * (1 / low.value) + sum_high * (1 / high.value));
                offset[n][h] *= shrink;
#pragma unroll
                for (int i = 0; i < S::kPieces; ++i) {
                    sums[n][i][h] = shrink * sums[n][i][h] + offset[n][h];
                    sums[n][i][h + 2] = shrink * sums[n][i][h + 2] + offset[n][h];
                }
                offset[n][h] = 0.0f;
            }
        }
    }

    // A tile of 16 tokens; `next` gives its V, once K is read.
    template <typename F>
    __device__ void tile(const unsigned char* memory, F&& next, int position, int limit, int valid) {
        // Two sums where there are few, so that fewer products wait for the one before.
        constexpr int kSums = NT == 1 ? 2 : 1;
        float partial[kSums][NT][1][4] = {};
        auto& score = partial[0];
        const auto* k = reinterpret_cast<const uint4*>(memory) + lane;
#pragma unroll
        for (int j = 0; j < S::kPieces; ++j) {
            const uint4 piece = k[32 * j];
            const uint32_t a[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                const uint2 q = shared.q[n][j][lane];
                ptx::mma_m16n8k16(partial[j % kSums][n][0], a, {q.x, q.y}, T{});
            }
        }
        const auto* v = reinterpret_cast<const uint4*>(next()) + lane;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if constexpr (kSums > 1) score[n][0][e] += partial[1][n][0][e];
                score[n][0][e] *= call.scale;
            }
        }
        float shift[NT][2] = {};
        constexpr Power kGain(Codes<BITS>::kPGain);
        soften(score, 1.0f, shift, kGain, kGain, position, limit, valid);
        uint32_t p[NT][2];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                p[n][h] = ptx::transpose8(pack2(score[n][0][2 * h], score[n][0][2 * h + 1], T{}));
            }
        }
        uint32_t keep[2] = {0xffffffff, 0xffffffff};  // what lies past the end may be anything, NaN too
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int at = position + 2 * t + 8 * r;
            keep[r] = (at < valid ? 0xffffu : 0u) | (at + 1 < valid ? 0xffff0000u : 0u);
        }
#pragma unroll
        for (int i = 0; i < S::kPieces; ++i) {
            const uint4 piece = v[32 * i];
            const uint32_t a[4] = {piece.x & keep[0], piece.y & keep[0], piece.z & keep[1], piece.w & keep[1]};
#pragma unroll
            for (int n = 0; n < NT; ++n) ptx::mma_m16n8k16(sums[n][i], a, p[n], T{});
        }
    }

    // A page of 64 tokens, likewise, or half of one: BLOCKS blocks of 16 tokens from block 2 `half` on.
    template <int BLOCKS, typename F>
    __device__ void page(const unsigned char* memory, F&& next, int half, int position, int limit,
                         const Codes<BITS>& codes) {
        using C = Codes<BITS>;
        const auto* k_scale = reinterpret_cast<const __half*>(memory + S::kCodeBytes) + 4 * t;
        const __half* k_zero = k_scale + D;
        const uint32_t minus_near = both(-1 / C::kNearBy), minus_far = both(-1 / C::kFarBy);

        // Two sums where there are few, so that fewer products wait for the one before.
        constexpr int kSums = NT * BLOCKS < 4 ? 2 : 1;
        float partial[kSums][NT][BLOCKS][4] = {}, shift[NT][4] = {};
        auto& score = partial[0];
        const auto scores = [&](auto first_piece, auto count) {
            constexpr int kFirst = decltype(first_piece)::value, kCount = decltype(count)::value;
            typename C::template Words<kCount> words[BLOCKS / C::kSpan];
#pragma unroll
            for (int b = 0; b < BLOCKS; b += C::kSpan) {
                C::template load<D, kFirst>(words[b / C::kSpan], memory + half * (S::kCodeBytes / 2), b, lane);
            }
#pragma unroll
            for (int r = 0; r < kCount; ++r) {
                const int j = kFirst + r;
                const uint2 s = *reinterpret_cast<const uint2*>(k_scale + 16 * j);
                const uint2 z = *reinterpret_cast<const uint2*>(k_zero + 16 * j);
                const uint32_t zx = fma2(z.x, minus_near, both(-C::kNear / C::kNearBy)),
                               zy = fma2(z.y, minus_far, both(-C::kFar / C::kFarBy));
                uint32_t q[NT][2];
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    const uint2 from = shared.q_codes[n][j][lane];
                    q[n][0] = mul2(from.x, s.x);
                    q[n][1] = mul2(from.y, s.y);
                    ptx::mma_m16n8k16(shift[n], {zx, zx, zy, zy}, q[n], __half{});
                }
#pragma unroll
                for (int b = 0; b < BLOCKS; ++b) {
                    uint32_t a[4];
                    codes.expand(a, words[b / C::kSpan], r, b);
#pragma unroll
                    for (int n = 0; n < NT; ++n) ptx::mma_m16n8k16(partial[j % kSums][n][b], a, q[n], __half{});
                }
            }
        };
        each_chunk(scores);
        const unsigned char* const values = next();
        float add[NT][2];
#pragma unroll
        for (int n = 0; n < NT; ++n) add[n][0] = C::kGain * shift[n][0], add[n][1] = C::kGain * shift[n][1];
        if constexpr (kSums > 1) {
#pragma unroll
            for (int n = 0; n < NT; ++n) {
#pragma unroll
                for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) score[n][b][e] += partial[1][n][b][e];
                }
            }
        }
        constexpr Power kLow(C::kPGain * C::kNearBy), kHigh(C::kPGain * C::kFarBy);
        soften(score, C::kGain, add, kLow, kHigh, position, limit, position + 16 * BLOCKS);

        const auto* v_scale = reinterpret_cast<const uint32_t*>(values + S::kCodeBytes) + half * (kPageTokens / 4) + t;
        const uint32_t* v_zero = v_scale + kPageTokens / 2;
        float minus[NT][4] = {};
#pragma unroll
        for (int first = 0; first < BLOCKS; first += C::kSpan) {
            uint32_t p[C::kSpan][NT][2];
#pragma unroll
            for (int i = 0; i < C::kSpan; ++i) {
                const int b = first + i;
                // of tokens 2t, 2t + 1, and of 2t + 8, 2t + 9
                const uint32_t low = v_scale[8 * b], high = v_scale[8 * b + 4];
                const uint32_t near = fma2(v_zero[8 * b], minus_near, both(-C::kNear / C::kNearBy));
                const uint32_t far = fma2(v_zero[8 * b + 4], minus_far, both(-C::kFar / C::kFarBy));
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    p[i][n][0] = mul2(ptx::transpose8(pack2(score[n][b][0], score[n][b][1], __half{})), low);
                    p[i][n][1] = mul2(ptx::transpose8(pack2(score[n][b][2], score[n][b][3], __half{})), high);
                    ptx::mma_m16n8k16(minus[n], {near, near, far, far}, p[i][n], __half{});
                }
            }
            const auto output = [&](auto first_piece, auto count) {
                constexpr int kFirst = decltype(first_piece)::value, kCount = decltype(count)::value;
                typename C::template Words<kCount> words;
                C::template load<D, kFirst>(words, values + half * (S::kCodeBytes / 2), first, lane);
#pragma unroll
                for (int r = 0; r < kCount; ++r) {
#pragma unroll
                    for (int i = 0; i < C::kSpan; ++i) {
                        uint32_t a[4];
                        codes.expand(a, words, r, first + i);
#pragma unroll
                        for (int n = 0; n < NT; ++n) ptx::mma_m16n8k16(sums[n][kFirst + r], a, p[i][n], __half{});
                    }
                }
            };
            each_chunk(output);
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) offset[n][0] = minus[n][0], offset[n][1] = minus[n][1];
        if constexpr (NT == 4 || NT * S::kPieces >= 32)
            add_offset();  // registers are short: not kept until the next unit
    }

    // The pieces of a head as many at a time as lie together, then what is left.
    template <int FIRST = 0, typename F>
    __device__ __forceinline__ static void each_chunk(F&& f) {
        constexpr int kLeft = S::kPieces - FIRST, kCount = kLeft < Codes<BITS>::kGroup ? kLeft : Codes<BITS>::kGroup;
        f(std::integral_constant<int, FIRST>{}, std::integral_constant<int, kCount>{});
        if constexpr (FIRST + kCount < S::kPieces) each_chunk<FIRST + kCount>(f);
    }

    // Units `unit`, + step, ... of the head of `walk`; `stage` is the next one of K, of even number.
    __device__ __forceinline__ void work(int warp, const Walk& walk, int unit, int step, int& stage, uint32_t& parity,
                                         const Codes<BITS>& codes) {
        for (; unit < walk.stop; unit += step) {
            const int k = S::kStages == 2 ? 0 : stage;
            const auto arrived = [&](int at) {
#if __CUDA_ARCH__ >= 900
                ptx::barrier_wait(&shared.full[warp][at], parity);
#else
                ptx::copy_async_wait<S::kStages - 1>();
                __syncwarp();
#endif
                return shared.stage(warp, at);
            };
            const auto done = [&](int at) {  // the stage is read by all lanes
                __syncwarp();
                fetch(warp, at);
            };
            const unsigned char* const keys = arrived(k);
            const auto next = [&] {
                done(k);
                return arrived(k + 1);
            };
            const Segments of = shared.list.of(walk.b);
            const int halves = S::kHalves ? shared.list.halves : 0;
            const int at = unit + of.skip, body = at - of.prompt_tiles(), late = body - (of.pages << halves);
            if (body >= 0 && late < 0) {
                if (S::kHalves == 2 || (S::kHalves == 1 && halves)) {
                    page<S::kHalves ? 2 : 4>(keys, next, body % 2, of.prompt + kPageTokens / 2 * body, of.length,
                                             codes);
                } else {
                    page<S::kHalves == 2 ? 2 : 4>(keys, next, 0, of.prompt + kPageTokens * body, of.length, codes);
                }
            } else {
                const int position = body < 0 ? kTileTokens * at : of.window_start() + kTileTokens * late;
                tile(keys, next, position, of.length, body < 0 ? of.prompt : of.length);
            }
            done(k + 1);
            stage += 2;
            if (S::kStages == 2 || stage == S::kStages) stage = 0, parity ^= 1;
        }
    }

    __device__ __forceinline__ void add_offset() {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
#pragma unroll
                for (int i = 0; i < S::kPieces; ++i) {
                    sums[n][i][h] += offset[n][h];
                    sums[n][i][h + 2] += offset[n][h];
                }
                offset[n][h] = 0.0f;
            }
        }
    }

    // After the last unit.
    __device__ void finish() {
        add_offset();
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
#pragma unroll
                for (int other = 4; other < 32; other *= 2) {
                    total[n][h] += __shfl_xor_sync(0xffffffff, total[n][h], other);
                }
            }
        }
    }

    // By rows to `to`.
    __device__ void leave(float (*to)[S::kSumRow]) const {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int i = 0; i < S::kPieces; ++i) {
#pragma unroll
                for (int e = 0; e < 4; ++e) to[8 * n + 2 * t + e % 2][16 * i + g + e / 2 * 8] = sums[n][i][e];
            }
        }
    }

    // The upper half of the warps hand their registers to the lower half, which leave what they have then by rows. All
    // warps call it; it ends with a barrier.
    __device__ void meet(int warp) {
        finish();
        if (warp >= S::kHalf) {
            keep(warp);
#pragma unroll
            for (int n = 0; n < NT; ++n) {
#pragma unroll
                for (int i = 0; i < S::kPieces; ++i) {
                    shared.meet[warp - S::kHalf].exchange[n][i][lane] =
                        make_float4(sums[n][i][0], sums[n][i][1], sums[n][i][2], sums[n][i][3]);
                }
            }
        }
        __syncthreads();
        if (warp < S::kHalf) {
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                float mine[2], theirs[2];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int row = 8 * n + 2 * t + h;
                    const float other = shared.most[warp + S::kHalf][row], highest = fmaxf(most[n][h], other);
                    mine[h] = ptx::exp2_approx(most[n][h] - highest);
                    theirs[h] = ptx::exp2_approx(other - highest);
                    total[n][h] = mine[h] * total[n][h] + theirs[h] * shared.total[warp + S::kHalf][row];
                    most[n][h] = highest;
                }
#pragma unroll
                for (int i = 0; i < S::kPieces; ++i) {
                    const float4 v = shared.meet[warp].exchange[n][i][lane];
                    sums[n][i][0] = mine[0] * sums[n][i][0] + theirs[0] * v.x;
                    sums[n][i][1] = mine[1] * sums[n][i][1] + theirs[1] * v.y;
                    sums[n][i][2] = mine[0] * sums[n][i][2] + theirs[0] * v.z;
                    sums[n][i][3] = mine[1] * sums[n][i][3] + theirs[1] * v.w;
                }
            }
            __syncwarp();
            keep(warp);
            leave(shared.meet[warp].sums);
        }
        __syncthreads();
    }

    __device__ void keep(int warp) {
        if (g != 0) return;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                shared.most[warp][8 * n + 2 * t + h] = most[n][h];
                shared.total[warp][8 * n + 2 * t + h] = total[n][h];
            }
        }
    }
};

__device__ __forceinline__ void add(float4& sum, float factor, const float4& v) {
    sum.x += factor * v.x, sum.y += factor * v.y, sum.z += factor * v.z, sum.w += factor * v.w;
}

// Output of a row from the sum of its weighted values, the sum of weights and the largest score.
template <typename T, int D, int BITS>
__device__ __forceinline__ void write_out(const Call<T>& call, int b, int head, int row, int d, const float4& sum,
                                          float weight, float most) {
    const int token = call.token(row), of_heads = (head - token) * call.group + row;
    const int64_t to = (static_cast<int64_t>(b) * call.tokens + token) * call.heads + of_heads;
    constexpr float kPGain = Codes<BITS>::kPGain;
    float by = kPGain * weight;
    if (call.sinks && weight > 0.0f) {  // one more exponential
        const float sink = call.sinks[of_heads] * kLog2e, highest = fmaxf(most, sink);
        const float shrink = ptx::exp2_approx(most - highest);
        weight = shrink * weight + ptx::exp2_approx(sink - highest);
        by = shrink / (kPGain * weight);
        most = highest;
    } else {
        by = weight > 0.0f ? 1.0f / by : 0.0f;
    }
    *reinterpret_cast<uint2*>(call.out + to * D + d) =
        make_uint2(pack2(by * sum.x, by * sum.y, T{}), pack2(by * sum.z, by * sum.w, T{}));
    if (d == 0 && call.lse) call.lse[to] = (most + log2f(weight)) * 0.6931471805599453f;
}

// The parts of `count` blocks from `first_block` on, added up by the last of them to arrive; the first block's part
// lies `skip` further. A function of its own, so that its registers are not those of the loop over units.
template <typename T, int D, int NT, int BITS, int WARPS>
__device__ __noinline__ void add_up(const Call<T>& call, Shared<T, D, NT, BITS, WARPS>& shared, int first_block,
                                    int count, int64_t skip, int b, int head) {
    using S = Shape<D, NT, BITS, WARPS>;
    constexpr int kThreads = S::kThreads;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = call.rows();
    const auto part_of = [&](int other) {
        return call.parts + static_cast<int64_t>(first_block + other) * 2 * S::kPart + (other ? 0 : skip);
    };
    // Neighbouring threads share the parts of one place of the output. The first of them are on their way while the
    // weights of parts are computed.
    const int items = rows * (D / 4);
    int ways = 1;
    while (2 * ways * items <= kThreads && ways < 32) ways *= 2;
    const int way = threadIdx.x % ways;
    constexpr int kAtOnce = 12;
    float4 v[kAtOnce];
    const auto load = [&](int first, int from) {
        const int i = min(first + static_cast<int>(threadIdx.x) / ways, items - 1), row = i / (D / 4);
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            const float* const part = part_of(min(from + u * ways, count - 1));
            v[u] = __ldcg(reinterpret_cast<const float4*>(part + row * D + i % (D / 4) * 4));
        }
    };
    load(0, way);
    auto* const factors = reinterpret_cast<float (*)[S::kRows]>(shared.meet);
    for (int row = warp; row < rows; row += S::kWarps) {
        const auto of = [&](int other) {
            return __ldcg(reinterpret_cast<const float2*>(part_of(other) + S::kRows * D + 2 * row));
        };
        const float2 own = lane < count ? of(lane) : make_float2(kNothing, 0.0f);
        float highest = own.x, weight = 0.0f;
        for (int other = lane + 32; other < count; other += 32) highest = fmaxf(highest, of(other).x);
#pragma unroll
        for (int by = 16; by > 0; by /= 2) {
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, by));
        }
        for (int other = lane; other < count; other += 32) {
            const float2 part = other == lane ? own : of(other);
            factors[other][row] = ptx::exp2_approx(part.x - highest);
            weight += factors[other][row] * part.y;
        }
        weight = sum_lanes<32>(weight);
        if (lane == 0) shared.most[0][row] = highest, shared.total[0][row] = weight;
    }
    __syncthreads();
    for (int first = 0; first < items; first += kThreads / ways) {
        const int i = first + threadIdx.x / ways;
        const int row = min(i, items - 1) / (D / 4), d = i % (D / 4) * 4;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int from = way; from < count; from += kAtOnce * ways) {
            if (first || from != way) load(first, from);
#pragma unroll
            for (int u = 0; u < kAtOnce; ++u) {
                const int other = from + u * ways;
                if (other < count) add(sum, factors[other][row], v[u]);
            }
        }
        for (int by = 1; by < ways; by *= 2) {
            sum.x += __shfl_xor_sync(0xffffffff, sum.x, by);
            sum.y += __shfl_xor_sync(0xffffffff, sum.y, by);
            sum.z += __shfl_xor_sync(0xffffffff, sum.z, by);
            sum.w += __shfl_xor_sync(0xffffffff, sum.w, by);
        }
        if (way == 0 && i < items)
            write_out<T, D, BITS>(call, b, head, row, d, sum, shared.total[0][row], shared.most[0][row]);
    }
}

// Four channels of a row, summed over what meet() left of the warps, with its largest score and the sum of weights.
template <typename M>
__device__ __forceinline__ float2 sum_block(const M& shared, int row, int d, float4& sum) {
    using S = typename M::S;
    float highest = shared.most[0][row], weight = 0.0f;
#pragma unroll
    for (int w = 1; w < S::kHalf; ++w) highest = fmaxf(highest, shared.most[w][row]);
    sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < S::kHalf; ++w) {
        const float factor = ptx::exp2_approx(shared.most[w][row] - highest);
        add(sum, factor, *reinterpret_cast<const float4*>(&shared.meet[w].sums[row][d]));
        weight += factor * shared.total[w][row];
    }
    return make_float2(highest, weight);
}

// The queries of one KV head as B fragments, once `ready` has been called; by all threads.
template <typename T, int D, int NT, int BITS, typename M, typename F>
__device__ __forceinline__ void load_queries(const Call<T>& call, M& shared, int b, int head, F&& ready) {
    using S = typename M::S;
    using C = Codes<BITS>;
    constexpr int kItems = NT * S::kPieces * 32, kEach = (kItems + S::kThreads - 1) / S::kThreads;
    const auto place = [&](int e) {
        const int i = threadIdx.x + e * S::kThreads, l = i % 32, j = i / 32 % S::kPieces;
        const int row = 8 * (i / (32 * S::kPieces)) + l / 4, token = call.token(row);
        const int of_heads = (head - token) * call.group + row;
        return row < call.rows() ? call.q + b * call.q_batch + token * call.q_token +
                                       static_cast<int64_t>(of_heads) * D + 16 * j + 2 * (l % 4)
                                 : nullptr;
    };
    const T* const first = place(0);
    ready();
#pragma unroll(kEach > 2 ? 1 : kEach)  // many addresses would have to be kept
    for (int e = 0; e < kEach; ++e) {
        const int i = threadIdx.x + e * S::kThreads;
        if (kItems % S::kThreads && i >= kItems) break;
        const int l = i % 32, j = i / 32 % S::kPieces, n = i / (32 * S::kPieces);
        const T* const from = e ? place(e) : first;
        uint32_t v[2] = {};
        if (from) {
            v[0] = static_cast<uint32_t>(ptx::load_int(reinterpret_cast<const int*>(from)));
            v[1] = static_cast<uint32_t>(ptx::load_int(reinterpret_cast<const int*>(from + 8)));
        }
        shared.q[n][j][l] = make_uint2(v[0], v[1]);
        const float by = call.scale / (C::kGain / C::kNearBy), by_far = call.scale / (C::kGain / C::kFarBy);
        shared.q_codes[n][j][l] =
            make_uint2(pack2(by * Magic<T>::low(v[0]), by * Magic<T>::high(v[0]), __half{}),
                       pack2(by_far * Magic<T>::low(v[1]), by_far * Magic<T>::high(v[1]), __half{}));
    }
}

// The whole list of units over all blocks, by all threads.
template <typename T, int D, int NT, int BITS, int WARPS>
__device__ __forceinline__ void attend_list(const Call<T>& call, Shared<T, D, NT, BITS, WARPS>& shared) {
    using S = Shape<D, NT, BITS, WARPS>;
    constexpr int kThreads = S::kThreads;
    const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int rows = call.rows();
    if (!call.early) ptx::wait_for_predecessor();

    for (int b = threadIdx.x; b < call.batch; b += kThreads) {
        shared.list.segments[b] = Segments::read(call.segments + 3 * b, call.reach + call.tokens - 1);
    }
    __syncthreads();
    shared.list.template plan<S::kWarps, S::kHalves>(warp, lane, call.batch, call.kv_heads,
                                                     static_cast<int>(gridDim.x));
    const int units = shared.list.ends[call.batch - 1], run = shared.list.run;
    const int blocks = run > 1 ? units / run : min(static_cast<int>(gridDim.x), (units + S::kWarps - 1) / S::kWarps);
    const int block = blockIdx.x;
    if (block == gridDim.x - 1) {  // sequences without tokens: zeros
        for (int b = 0; b < call.batch; ++b) {
            if (shared.list.segments[b].length > 0) continue;
            ptx::wait_for_predecessor();
            const int64_t first = static_cast<int64_t>(b) * call.tokens * call.heads;
            for (int i = threadIdx.x; i < call.tokens * call.heads * D; i += kThreads) {
                call.out[first * D + i] = from_float<T>(0.0f);
            }
            for (int i = threadIdx.x; call.lse && i < call.tokens * call.heads; i += kThreads) {
                call.lse[first + i] = -INFINITY;
            }
        }
    }
    if (block >= blocks) return;
    const int begin = run_begin(block, blocks, units), end = run_begin(block + 1, blocks, units);

    Warp<T, D, NT, BITS, Shared<T, D, NT, BITS, WARPS>> mine{call, shared, lane, lane / 4, lane % 4};
    Walk walk;
    walk.start(shared.list, begin, end, call.batch);
    if (lane == 0) shared.ahead[warp] = {walk, warp, walk.from + warp, S::kWarps, 0, 0, true, nullptr};
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
        for (int i = 0; i < S::kStages; ++i) ptx::barrier_init(&shared.full[warp][i], 1);
        ptx::barrier_init_fence();
    }
    __syncwarp();
#endif
    for (int stage = 0; stage < S::kStages; ++stage) mine.fetch(warp, stage);

    const Codes<BITS> codes;
    int stage = 0;
    uint32_t parity = 0;
    bool again;
    do {
        load_queries<T, D, NT, BITS>(call, shared, walk.b, walk.head, [&] {
            if (call.early) ptx::wait_for_predecessor();
        });
        __syncthreads();

        mine.reset();
        mine.work(warp, walk, walk.from + warp, S::kWarps, stage, parity, codes);
        mine.meet(warp);

        // Which blocks share this head. Only the first of them can have begun its run before the head, and so have left
        // a part of another head too.
        const int head_units = shared.list.units(shared.list.segments[walk.b]);
        const int head_begin = (walk.b ? shared.list.ends[walk.b - 1] : 0) + walk.head * head_units;
        const bool whole = walk.from == 0 && walk.to == shared.list.segments[walk.b].units(shared.list.halves);
        float* const part = call.parts + (static_cast<int64_t>(block) * 2 + (begin >= head_begin ? 0 : 1)) * S::kPart;
        for (int i = threadIdx.x; i < rows * (D / 4); i += kThreads) {
            const int row = i / (D / 4), d = i % (D / 4) * 4;
            float4 sum;
            const float2 of = sum_block(shared, row, d, sum);
            if (whole) {
                write_out<T, D, BITS>(call, walk.b, walk.head, row, d, sum, of.y, of.x);
            } else {
                *reinterpret_cast<float4*>(part + row * D + d) = sum;
                if (d == 0) *reinterpret_cast<float2*>(part + S::kRows * D + 2 * row) = of;
            }
        }
        if (!whole) {
            __syncthreads();
            const int first_block = block_of(head_begin, blocks, units);
            const int last_block = block_of(head_begin + head_units - 1, blocks, units);
            if (threadIdx.x == 0) {
                unsigned* counter = call.arrived + walk.b * call.kv_heads + walk.head;
                shared.last = ptx::count_arrival(counter) == static_cast<unsigned>(last_block - first_block);
                if (shared.last) *counter = 0;
            }
            __syncthreads();
            if (shared.last) {
                const int64_t skip = run_begin(first_block, blocks, units) >= head_begin ? 0 : S::kPart;
                add_up<T, D, NT, BITS, WARPS>(call, shared, first_block, last_block - first_block + 1, skip, walk.b,
                                              walk.head);
            }
        }
        again = walk.next(shared.list);
        __syncthreads();  // q and the sums are read
    } while (again);
}

template <typename T, int D, int NT, int BITS>
__global__ void __launch_bounds__(Shape<D, NT, BITS>::kThreads, Shape<D, NT, BITS>::kBlocks)
    attention_kv4_kernel(const __grid_constant__ Call<T> call) {
    extern __shared__ __align__(16) unsigned char memory[];
    ptx::launch_dependents();
    attend_list(call, *reinterpret_cast<Shared<T, D, NT, BITS>*>(memory));
}

}  // namespace
}  // namespace pyquant
