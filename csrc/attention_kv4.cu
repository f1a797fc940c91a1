// attention_kv4: a few query tokens a sequence against a cache in mixed precision (pyquant/formats/kv4.py), in one
// launch.
//
//   q        [B, Tq, Hq, D]      the newest Tq tokens, rotated; their keys and values are in the cache already
//   prompt, pages, window, segments   the cache; segments int32 [B, 3] is read on the device
//   out      [B, Tq, Hq, D]      lse fp32 [B, Tq, Hq] or null
//
// **Work.** A unit is what one warp fetches at once: a page of 64 tokens (68 D + 256 bytes) or a tile of 16 tokens in
// 16 bits (64 D bytes): nearly the same bytes, so equal numbers of units are equal shares of the memory's time,
// whatever mix of precisions a sequence has. All units of all sequences and KV heads form one list,
//
//     sequence 0, head 0: prompt tiles | pages | window tiles   head 1: ...   sequence 1, head 0: ...
//
// of which each block takes an equal run, and of its part of a head each warp takes every kWarps-th unit, through its
// own ring of cp.async stages: no barrier but at the end of a head. Ragged batches balance by themselves.
//
// **Products.** The cache is the A operand of mma.m16n8k16 and the G Tq query rows of a KV head are the columns of B,
// so no row is wasted on missing heads: S^T [16 tokens, rows] = K Q^T, then O^T [D, rows] += V^T P^T, where a tile of
// S^T becomes the B operand by one transpose in registers.
//
// **4 bits.** One turn of a word and four LOP3 make its 8 codes numbers 1 + code / u in fp16, u = 16 or 256. K:
// (code - zero) scale = u scale (1 + code/u) - u scale (1 + zero/u), so u scale is folded into the query, once a page,
// and the second term is one more row of A, whose negative is added to the scores. V: the code minus the zero is one
// fused multiply-add, exact in fp16; the scale goes into P.
//
// **Meeting.** Warps meet in shared memory. A head that several blocks share meets in a workspace: each leaves its
// maximum, its sum and its part of the output, and the last to arrive, by a counter that it sets back to 0, adds them
// up in the order of the blocks. The same bits every time.
#include <algorithm>
#include <type_traits>

#include "ops.h"
#include "pieces.cuh"
#include "programmatic.cuh"

namespace pyquant {
namespace {

constexpr int kPageTokens = 64, kTileTokens = 16;
constexpr float kNothing = -1e30f;  // a score that weighs nothing; finite, so that differences are numbers
constexpr float kPGain = 256.0f;    // keeps small probabilities times V's scales away from fp16's smallest numbers
constexpr int kMaxBatch = 256;
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
    float scale, softcap;  // softcap 0: none; scale includes log2(e) then, and 1 / softcap otherwise
    int batch, tokens, heads, kv_heads, prompt_tiles, page_capacity, ring_tiles;
    bool early;
};

template <int D, int NT>
struct Shape {
    static constexpr int kRows = 8 * NT;
    static constexpr int kWarps = D > 128 && NT > 1 ? 4 : 8;
    static constexpr int kBlocks =
        NT == 1 && D <= 128 ? 2 : 1;  // on a multiprocessor, so that the next call fits beside
    static constexpr int kThreads = 32 * kWarps, kHalf = kWarps / 2;
    static constexpr int kStages = D > 80 ? 2 : 4;
    static constexpr int kPieces = D / 16;
    // What is fetched at once is half a unit: K, then V.
    static constexpr int kKBytes = 36 * D, kVBytes = 32 * D + 256, kTileBytes = 32 * D;
    static constexpr int kStageBytes = kKBytes > kVBytes ? kKBytes : kVBytes;
    static constexpr int kSumRow = D + 4;
    static constexpr int kPart =
        kRows * (D + 2);  // floats that a block leaves of a head: the output, then maximum and sum
};

struct Segments {
    int prompt, pages, length;
    __device__ int prompt_tiles() const { return (prompt + kTileTokens - 1) / kTileTokens; }
    __device__ int window_start() const { return prompt + kPageTokens * pages; }
    __device__ int window_tiles() const { return (length - window_start() + kTileTokens - 1) / kTileTokens; }
    __device__ int units() const { return length <= 0 ? 0 : prompt_tiles() + pages + window_tiles(); }
};

// The list of all units: where those of each sequence end. Where a run of kWarps units for every block is enough, heads
// are padded to whole runs, so that no block has to work on two of them, one after the other.
struct List {
    int ends[kMaxBatch];
    Segments segments[kMaxBatch];
    int run;  // what the units of a head are rounded up to: kWarps, or 1
    __device__ int units(const Segments& s) const { return (s.units() + run - 1) / run * run; }

    // By one warp, the segments being there; how many units there are.
    __device__ int count(int lane, int batch, int kv_heads, int round_to) {
        if (lane == 0) run = round_to;
        __syncwarp();
        int sum = 0;
        for (int first = 0; first < batch; first += 32) {
            const int b = first + lane;
            int mine = b < batch ? units(segments[b]) * kv_heads : 0;
#pragma unroll
            for (int by = 1; by < 32; by *= 2) {
                const int other = __shfl_up_sync(0xffffffff, mine, by);
                if (lane >= by) mine += other;
            }
            if (b < batch) ends[b] = sum + mine;
            sum += __shfl_sync(0xffffffff, mine, 31);
        }
        return sum;
    }
};

// A walk over the run [at, end) of all units, head by head: the units [from, to) of one head, padding from `stop` on.
struct Walk {
    int at, end, b, head, from, to, stop;

    __device__ void start(const List& list, int begin, int stop_at, int batch) {
        at = begin, end = stop_at;
        int low = 0, high = batch - 1;  // the first sequence whose units end after `begin`
        while (low < high) {
            const int middle = (low + high) / 2;
            if (list.ends[middle] > begin) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        b = low;
        enter(list);
    }
    __device__ void enter(const List& list) {
        const int units = list.units(list.segments[b]), within = at - (b ? list.ends[b - 1] : 0);
        head = within / units;
        from = within - head * units;
        cut(list, units);
    }
    __device__ void cut(const List& list, int units) {
        to = min(units, from + end - at);
        stop = min(to, list.segments[b].units());
    }
    // To the next head; false after the last.
    __device__ bool next(const List& list) {
        at += to - from;
        if (at >= end) return false;
        if (at >= list.ends[b]) {
            do ++b;
            while (list.ends[b] <= at);  // sequences without tokens have no units
            enter(list);
        } else {
            ++head;
            from = 0;
            cut(list, list.units(list.segments[b]));
        }
        return true;
    }
};

// What a warp fetches next, kStages halves ahead of what it works on. One lane keeps it, in shared memory: registers
// are what limits the warps on a multiprocessor.
struct Ahead {
    Walk walk;
    int unit;
    bool more, v;
};

template <typename T, int D, int NT>
struct Shared {
    using S = Shape<D, NT>;
    alignas(16) unsigned char ring[S::kWarps][S::kStages][S::kStageBytes];
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

// A word as the four registers of an A fragment: halves 1 + code / 16 in the first two, 1 + code / 256 in the others.
struct Expand {
    uint32_t high, low, one;  // in registers: LOP3 takes one immediate only
    __device__ Expand() : high(0x03C003C0), low(0x003C003C), one(0x3C003C00) {
        asm volatile("" : "+r"(high), "+r"(low), "+r"(one));
    }
    __device__ __forceinline__ void operator()(uint32_t (&a)[4], uint32_t word) const {
        const uint32_t turned = __funnelshift_r(word, word, 8);
        a[0] = ptx::and_or(word, high, one);
        a[1] = ptx::and_or(turned, high, one);
        a[2] = ptx::and_or(word, low, one);
        a[3] = ptx::and_or(turned, low, one);
    }
};

__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    const __half2 r =
        __hfma2(reinterpret_cast<__half2&>(a), reinterpret_cast<__half2&>(b), reinterpret_cast<__half2&>(c));
    return reinterpret_cast<const uint32_t&>(r);
}
__device__ __forceinline__ uint32_t mul2(uint32_t a, uint32_t b) {
    const __half2 r = __hmul2(reinterpret_cast<__half2&>(a), reinterpret_cast<__half2&>(b));
    return reinterpret_cast<const uint32_t&>(r);
}
__device__ __forceinline__ uint32_t both(float v) {
    const __half2 r = __float2half2_rn(v);
    return reinterpret_cast<const uint32_t&>(r);
}

// N words of each lane, as they lie: [32 lanes][N].
template <int N>
__device__ __forceinline__ void load_words(uint32_t (&w)[4], const unsigned char* from, int lane) {
    if constexpr (N == 4) {
        const uint4 v = reinterpret_cast<const uint4*>(from)[lane];
        w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    } else if constexpr (N == 2) {
        const uint2 v = reinterpret_cast<const uint2*>(from)[lane];
        w[0] = v.x, w[1] = v.y;
    } else {
        w[0] = reinterpret_cast<const uint32_t*>(from)[lane];
    }
}

template <typename T, int D, int NT>
struct Warp {
    using S = Shape<D, NT>;
    using Memory = Shared<T, D, NT>;
    const Call<T>& call;
    Memory& shared;
    int lane, g, t;
    float most[NT][2], total[NT][2];  // of rows 8 n + 2 t and 8 n + 2 t + 1
    float sums[NT][S::kPieces][4];    // channels g and g + 8 of a piece, for the two rows

    __device__ void reset() {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            most[n][0] = most[n][1] = kNothing;
            total[n][0] = total[n][1] = 0.0f;
#pragma unroll
            for (int i = 0; i < S::kPieces; ++i) {
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[n][i][e] = 0.0f;
            }
        }
    }

    // The next half unit, K or V, to a stage.
    __device__ void fetch(int warp, int stage) const {
        const unsigned char* from = nullptr;
        int bytes = 0;
        if (lane == 0) {
            Ahead& ahead = shared.ahead[warp];
            while (ahead.more && ahead.unit >= ahead.walk.stop) {
                ahead.more = ahead.walk.next(shared.list);
                ahead.unit = ahead.walk.from + warp;
            }
            if (ahead.more) {
                const Segments s = shared.list.segments[ahead.walk.b];
                const int64_t b = ahead.walk.b, head = ahead.walk.head, of_all = b * call.kv_heads + head;
                const int body = ahead.unit - s.prompt_tiles(), late = body - s.pages;
                const bool v = ahead.v;
                if (body >= 0 && late < 0) {
                    from = call.pages + (v ? S::kKBytes : 0) +
                           (of_all * call.page_capacity + body) * (S::kKBytes + S::kVBytes);
                    bytes = v ? S::kVBytes : S::kKBytes;
                } else {
                    const int tile = (kPageTokens / kTileTokens * s.pages + late) % call.ring_tiles;
                    const T* tiles = body < 0 ? call.prompt + b * call.prompt_batch +
                                                    (head * call.prompt_tiles + ahead.unit) * (32 * D)
                                              : call.window + (of_all * call.ring_tiles + tile) * (32 * D);
                    from = reinterpret_cast<const unsigned char*>(tiles) + (v ? S::kTileBytes : 0);
                    bytes = S::kTileBytes;
                }
                if (v) ahead.unit += S::kWarps;
                ahead.v = !v;
#if __CUDA_ARCH__ >= 900
                ptx::barrier_expect(&shared.full[warp][stage], bytes);
                ptx::copy_bulk(shared.ring[warp][stage], from, bytes, &shared.full[warp][stage]);
#endif
            }
        }
#if __CUDA_ARCH__ < 900
        from = reinterpret_cast<const unsigned char*>(
            __shfl_sync(0xffffffff, reinterpret_cast<unsigned long long>(from), 0));
        bytes = __shfl_sync(0xffffffff, bytes, 0);
        for (int i = 16 * lane; i < bytes; i += 512) ptx::copy_async<16>(shared.ring[warp][stage] + i, from + i);
        ptx::copy_async_commit();
#endif
    }

    // The scores of BLOCKS x 16 tokens become weights P (times kPGain), the running maximum and sums follow.
    template <int BLOCKS>
    __device__ void soften(float (&score)[NT][BLOCKS][4], int position, int limit, int valid) {
        if (call.softcap > 0.0f) {
#pragma unroll
            for (int n = 0; n < NT; ++n) {
#pragma unroll
                for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) score[n][b][e] = call.softcap * tanhf(score[n][b][e]);
                }
            }
        }
        // Not every row attends to every token of the unit: its end, or tokens newer than a query.
        if (position + 16 * BLOCKS > min(limit - call.tokens + 1, valid)) {
            const int group = call.heads / call.kv_heads;
#pragma unroll
            for (int n = 0; n < NT; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int query = limit - call.tokens + (8 * n + 2 * t + e % 2) / group;
#pragma unroll
                    for (int b = 0; b < BLOCKS; ++b) {
                        const int at = position + 16 * b + g + e / 2 * 8;
                        if (at > query || at >= valid) score[n][b][e] = kNothing;
                    }
                }
            }
        }
        float shrink[NT][2];
        bool moved = false;
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
                highest = fmaxf(highest, most[n][h]);
                shrink[n][h] = ptx::exp2_approx(most[n][h] - highest);
                moved |= highest > most[n][h];
                most[n][h] = highest;
                float sum = 0.0f;
#pragma unroll
                for (int b = 0; b < BLOCKS; ++b) {
                    score[n][b][h] = ptx::exp2_approx(score[n][b][h] - highest);
                    score[n][b][h + 2] = ptx::exp2_approx(score[n][b][h + 2] - highest);
                    sum += score[n][b][h] + score[n][b][h + 2];
                }
                total[n][h] = total[n][h] * shrink[n][h] + sum;
            }
        }
        if (__any_sync(0xffffffff, moved)) {
#pragma unroll
            for (int n = 0; n < NT; ++n) {
#pragma unroll
                for (int i = 0; i < S::kPieces; ++i) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) sums[n][i][e] *= shrink[n][e % 2];
                }
            }
        }
    }

    // A tile of 16 tokens; `next` gives its V, once K is read.
    template <typename F>
    __device__ void tile(const unsigned char* memory, F&& next, int position, int limit, int valid) {
        float score[NT][1][4] = {};
        const auto* k = reinterpret_cast<const uint4*>(memory) + lane;
#pragma unroll
        for (int j = 0; j < S::kPieces; ++j) {
            const uint4 piece = k[32 * j];
            const uint32_t a[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                const uint2 q = shared.q[n][j][lane];
                ptx::mma_m16n8k16(score[n][0], a, {q.x, q.y}, T{});
            }
        }
        const auto* v = reinterpret_cast<const uint4*>(next()) + lane;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) score[n][0][e] *= call.scale;
        }
        soften(score, position, limit, valid);
        uint32_t p[NT][2];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                p[n][h] = ptx::transpose8(pack2(kPGain * score[n][0][2 * h], kPGain * score[n][0][2 * h + 1], T{}));
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

    // A page of 64 tokens, likewise.
    template <typename F>
    __device__ void page(const unsigned char* memory, F&& next, int position, int limit, const Expand& expand) {
        const auto* k_scale = reinterpret_cast<const __half*>(memory + 32 * D) + 4 * t;
        const __half* k_zero = k_scale + D;
        const uint32_t minus_16th = both(-1.0f / 16), minus_256th = both(-1.0f / 256), minus_one = both(-1.0f);

        float score[NT][4][4] = {}, shift[NT][4] = {};
        const auto scores = [&](auto first_piece, auto count) {
            constexpr int kFirst = decltype(first_piece)::value, kCount = decltype(count)::value;
            uint32_t words[4][4];
#pragma unroll
            for (int b = 0; b < 4; ++b) load_words<kCount>(words[b], memory + b * 8 * D + kFirst * 128, lane);
#pragma unroll
            for (int r = 0; r < kCount; ++r) {
                const int j = kFirst + r;
                const uint2 s = *reinterpret_cast<const uint2*>(k_scale + 16 * j);
                const uint2 z = *reinterpret_cast<const uint2*>(k_zero + 16 * j);
                const uint32_t zx = fma2(z.x, minus_16th, minus_one), zy = fma2(z.y, minus_256th, minus_one);
                uint32_t q[NT][2];
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    const uint2 from = shared.q_codes[n][j][lane];
                    q[n][0] = mul2(from.x, s.x);
                    q[n][1] = mul2(from.y, s.y);
                    ptx::mma_m16n8k16(shift[n], {zx, zx, zy, zy}, q[n], __half{});
                }
#pragma unroll
                for (int b = 0; b < 4; ++b) {
                    uint32_t a[4];
                    expand(a, words[b][r]);
#pragma unroll
                    for (int n = 0; n < NT; ++n) ptx::mma_m16n8k16(score[n][b], a, q[n], __half{});
                }
            }
        };
        each_chunk(scores);
        const unsigned char* const values = next();
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int b = 0; b < 4; ++b) {
#pragma unroll
                for (int e = 0; e < 4; ++e) score[n][b][e] = 16.0f * score[n][b][e] + 16.0f * shift[n][e];
            }
        }
        soften(score, position, limit, position + kPageTokens);

        const auto* v_scale = reinterpret_cast<const __half*>(values + 32 * D);
        const __half* v_zero = v_scale + kPageTokens;
#pragma unroll
        for (int b = 0; b < 4; ++b) {
            const float low = kPGain * __half2float(v_scale[16 * b + g]);
            const float high = kPGain * __half2float(v_scale[16 * b + g + 8]);
            uint32_t p[NT][2];
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                p[n][0] = ptx::transpose8(pack2(low * score[n][b][0], low * score[n][b][1], __half{}));
                p[n][1] = ptx::transpose8(pack2(high * score[n][b][2], high * score[n][b][3], __half{}));
            }
            // -(16 + zero) of tokens 2t, 2t + 1, and -(256 + zero) of 2t + 8, 2t + 9
            const auto* zeros = reinterpret_cast<const uint32_t*>(v_zero + 16 * b + 2 * t);
            const uint32_t near = fma2(zeros[0], minus_one, both(-16.0f)),
                           far = fma2(zeros[4], minus_one, both(-256.0f));
            const auto output = [&](auto first_piece, auto count) {
                constexpr int kFirst = decltype(first_piece)::value, kCount = decltype(count)::value;
                uint32_t words[4];
                load_words<kCount>(words, values + b * 8 * D + kFirst * 128, lane);
#pragma unroll
                for (int r = 0; r < kCount; ++r) {
                    uint32_t a[4];
                    expand(a, words[r]);
                    a[0] = fma2(a[0], both(16.0f), near), a[1] = fma2(a[1], both(16.0f), near);
                    a[2] = fma2(a[2], both(256.0f), far), a[3] = fma2(a[3], both(256.0f), far);
#pragma unroll
                    for (int n = 0; n < NT; ++n) ptx::mma_m16n8k16(sums[n][kFirst + r], a, p[n], __half{});
                }
            };
            each_chunk(output);
        }
    }

    // The pieces of a head four at a time, then what is left.
    template <typename F>
    __device__ static void each_chunk(F&& f) {
        if constexpr (S::kPieces >= 4) f(std::integral_constant<int, 0>{}, std::integral_constant<int, 4>{});
        if constexpr (S::kPieces >= 8) f(std::integral_constant<int, 4>{}, std::integral_constant<int, 4>{});
        if constexpr (S::kPieces >= 16) {
            f(std::integral_constant<int, 8>{}, std::integral_constant<int, 4>{});
            f(std::integral_constant<int, 12>{}, std::integral_constant<int, 4>{});
        }
        if constexpr (S::kPieces % 4) {
            f(std::integral_constant<int, S::kPieces / 4 * 4>{}, std::integral_constant<int, S::kPieces % 4>{});
        }
    }

    // The upper half of the warps hand their registers to the lower half, which leave what they have then by rows. All
    // warps call it; it ends with a barrier.
    __device__ void meet(int warp) {
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
#pragma unroll
            for (int n = 0; n < NT; ++n) {
#pragma unroll
                for (int i = 0; i < S::kPieces; ++i) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        shared.meet[warp].sums[8 * n + 2 * t + e % 2][16 * i + g + e / 2 * 8] = sums[n][i][e];
                    }
                }
            }
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

// The first unit of a block's run, and the block whose run holds a unit.
__device__ __forceinline__ int run_begin(int block, int blocks, int units) {
    return static_cast<int>(static_cast<int64_t>(units) * block / blocks);
}

__device__ __forceinline__ int block_of(int unit, int blocks, int units) {
    return static_cast<int>((static_cast<int64_t>(unit + 1) * blocks - 1) / units);
}

// Output of a row from the sum of its weighted values, the sum of weights and the largest score.
template <typename T, int D>
__device__ __forceinline__ void write_out(const Call<T>& call, int b, int head, int row, int d, const float4& sum,
                                          float weight, float most) {
    const int group = call.heads / call.kv_heads;
    const int64_t to = (static_cast<int64_t>(b) * call.tokens + row / group) * call.heads + head * group + row % group;
    const float by = weight > 0.0f ? 1.0f / (kPGain * weight) : 0.0f;
    *reinterpret_cast<uint2*>(call.out + to * D + d) =
        make_uint2(pack2(by * sum.x, by * sum.y, T{}), pack2(by * sum.z, by * sum.w, T{}));
    if (d == 0 && call.lse) call.lse[to] = (most + log2f(weight)) * 0.6931471805599453f;
}

// The parts of `count` blocks from `first_block` on, added up by the last of them to arrive; the first block's part
// lies `skip` further. A function of its own, so that its registers are not those of the loop over units.
template <typename T, int D, int NT>
__device__ __noinline__ void add_up(const Call<T>& call, Shared<T, D, NT>& shared, int first_block, int count,
                                    int64_t skip, int b, int head) {
    using S = Shape<D, NT>;
    constexpr int kThreads = S::kThreads;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = call.heads / call.kv_heads * call.tokens;
    const auto part_of = [&](int other) {
        return call.parts + static_cast<int64_t>(first_block + other) * 2 * S::kPart + (other ? 0 : skip);
    };
    auto* const factors = reinterpret_cast<float (*)[S::kRows]>(shared.meet);
    for (int row = warp; row < rows; row += S::kWarps) {
        const auto of = [&](int other) {
            return __ldcg(reinterpret_cast<const float2*>(part_of(other) + S::kRows * D + 2 * row));
        };
        float highest = kNothing, weight = 0.0f;
        for (int other = lane; other < count; other += 32) highest = fmaxf(highest, of(other).x);
#pragma unroll
        for (int by = 16; by > 0; by /= 2) {
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, by));
        }
        for (int other = lane; other < count; other += 32) {
            const float2 part = of(other);
            factors[other][row] = ptx::exp2_approx(part.x - highest);
            weight += factors[other][row] * part.y;
        }
        weight = sum_lanes<32>(weight);
        if (lane == 0) shared.most[0][row] = highest, shared.total[0][row] = weight;
    }
    __syncthreads();
    // Neighbouring threads share the parts of one place of the output.
    const int items = rows * (D / 4);
    int ways = 1;
    while (2 * ways * items <= kThreads && ways < 32) ways *= 2;
    const int way = threadIdx.x % ways;
    for (int first = 0; first < items; first += kThreads / ways) {
        const int i = first + threadIdx.x / ways;
        const int row = min(i, items - 1) / (D / 4), d = i % (D / 4) * 4;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        constexpr int kAtOnce = 8;
        for (int from = way; from < count; from += kAtOnce * ways) {
            float4 v[kAtOnce];
#pragma unroll
            for (int u = 0; u < kAtOnce; ++u) {
                const int other = min(from + u * ways, count - 1);
                v[u] = __ldcg(reinterpret_cast<const float4*>(part_of(other) + row * D + d));
            }
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
            write_out<T, D>(call, b, head, row, d, sum, shared.total[0][row], shared.most[0][row]);
    }
}

template <typename T, int D, int NT>
__global__ void __launch_bounds__(Shape<D, NT>::kThreads, Shape<D, NT>::kBlocks)
    attention_kv4_kernel(const __grid_constant__ Call<T> call) {
    using S = Shape<D, NT>;
    constexpr int kThreads = S::kThreads;
    extern __shared__ __align__(16) unsigned char memory[];
    auto& shared = *reinterpret_cast<Shared<T, D, NT>*>(memory);
    ptx::launch_dependents();
    const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int group = call.heads / call.kv_heads, rows = group * call.tokens;
    if (!call.early) ptx::wait_for_predecessor();

    if (warp == 0) {
        for (int b = lane; b < call.batch; b += 32) {
            const int* from = call.segments + 3 * b;
            shared.list.segments[b] = {ptx::load_int(from), ptx::load_int(from + 1), ptx::load_int(from + 2)};
        }
        __syncwarp();
        const int padded = shared.list.count(lane, call.batch, call.kv_heads, S::kWarps);
        if (padded > static_cast<int>(gridDim.x) * S::kWarps) shared.list.count(lane, call.batch, call.kv_heads, 1);
    }
    __syncthreads();
    const int units = shared.list.ends[call.batch - 1];
    const int blocks = min(static_cast<int>(gridDim.x), (units + S::kWarps - 1) / S::kWarps);
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

    Warp<T, D, NT> mine{call, shared, lane, lane / 4, lane % 4};
    Walk walk;
    walk.start(shared.list, begin, end, call.batch);
    if (lane == 0) shared.ahead[warp] = {walk, walk.from + warp, true, false};
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
        for (int i = 0; i < S::kStages; ++i) ptx::barrier_init(&shared.full[warp][i], 1);
        ptx::barrier_init_fence();
    }
    __syncwarp();
#endif
    for (int stage = 0; stage < S::kStages; ++stage) mine.fetch(warp, stage);
    if (call.early) ptx::wait_for_predecessor();

    const Expand expand;
    int stage = 0;
    uint32_t parity = 0;
    bool again;
    do {
        for (int i = threadIdx.x; i < NT * S::kPieces * 32; i += kThreads) {
            const int l = i % 32, j = i / 32 % S::kPieces, n = i / (32 * S::kPieces), row = 8 * n + l / 4;
            uint32_t v[2] = {};
            if (row < rows) {
                const T* from = call.q + walk.b * call.q_batch + row / group * call.q_token +
                                static_cast<int64_t>(walk.head * group + row % group) * D + 16 * j + 2 * (l % 4);
                v[0] = static_cast<uint32_t>(ptx::load_int(reinterpret_cast<const int*>(from)));
                v[1] = static_cast<uint32_t>(ptx::load_int(reinterpret_cast<const int*>(from + 8)));
            }
            shared.q[n][j][l] = make_uint2(v[0], v[1]);
            const float by = call.scale, by_16 = 16 * call.scale;
            shared.q_codes[n][j][l] =
                make_uint2(pack2(by * Magic<T>::low(v[0]), by * Magic<T>::high(v[0]), __half{}),
                           pack2(by_16 * Magic<T>::low(v[1]), by_16 * Magic<T>::high(v[1]), __half{}));
        }
        __syncthreads();

        mine.reset();
        for (int unit = walk.from + warp; unit < walk.stop; unit += S::kWarps) {
            const auto arrived = [&] {
#if __CUDA_ARCH__ >= 900
                ptx::barrier_wait(&shared.full[warp][stage], parity);
#else
                ptx::copy_async_wait<S::kStages - 1>();
                __syncwarp();
#endif
                return shared.ring[warp][stage];
            };
            const auto done = [&] {  // the stage is read by all lanes
                __syncwarp();
                mine.fetch(warp, stage);
                if (++stage == S::kStages) stage = 0, parity ^= 1;
            };
            const unsigned char* const keys = arrived();
            const auto next = [&] {
                done();
                return arrived();
            };
            const Segments of = shared.list.segments[walk.b];
            const int body = unit - of.prompt_tiles(), late = body - of.pages;
            if (body >= 0 && late < 0) {
                mine.page(keys, next, of.prompt + kPageTokens * body, of.length, expand);
            } else {
                const int position = body < 0 ? kTileTokens * unit : of.window_start() + kTileTokens * late;
                mine.tile(keys, next, position, of.length, body < 0 ? of.prompt : of.length);
            }
            done();
        }
        mine.meet(warp);

        // Which blocks share this head. Only the first of them can have begun its run before the head, and so have left
        // a part of another head too.
        const int head_units = shared.list.units(shared.list.segments[walk.b]);
        const int head_begin = (walk.b ? shared.list.ends[walk.b - 1] : 0) + walk.head * head_units;
        const bool whole = walk.from == 0 && walk.to == head_units;
        float* const part = call.parts + (static_cast<int64_t>(block) * 2 + (begin >= head_begin ? 0 : 1)) * S::kPart;
        for (int i = threadIdx.x; i < rows * (D / 4); i += kThreads) {
            const int row = i / (D / 4), d = i % (D / 4) * 4;
            float highest = shared.most[0][row];
#pragma unroll
            for (int w = 1; w < S::kHalf; ++w) highest = fmaxf(highest, shared.most[w][row]);
            float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            float weight = 0.0f;
#pragma unroll
            for (int w = 0; w < S::kHalf; ++w) {
                const float factor = ptx::exp2_approx(shared.most[w][row] - highest);
                add(sum, factor, *reinterpret_cast<const float4*>(&shared.meet[w].sums[row][d]));
                weight += factor * shared.total[w][row];
            }
            if (whole) {
                write_out<T, D>(call, walk.b, walk.head, row, d, sum, weight, highest);
            } else {
                *reinterpret_cast<float4*>(part + row * D + d) = sum;
                if (d == 0) *reinterpret_cast<float2*>(part + S::kRows * D + 2 * row) = make_float2(highest, weight);
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
                add_up<T, D, NT>(call, shared, first_block, last_block - first_block + 1, skip, walk.b, walk.head);
            }
        }
        again = walk.next(shared.list);
        __syncthreads();  // q and the sums are read
    } while (again);
}

template <typename T, int D, int NT>
void launch(const Call<T>& call, cudaStream_t stream) {
    using S = Shape<D, NT>;
    constexpr auto kernel = attention_kv4_kernel<T, D, NT>;
    allow_shared_memory<kernel>("attention_kv4");
    const Device device = current_device();
    // As many blocks as fit, while the last of a head can hold a factor for each.
    constexpr int kMostParts = sizeof(Shared<T, D, NT>::meet) / (4 * S::kRows);
    const int blocks = std::min(device.multiprocessors * S::kBlocks, kMostParts);
    launch_programmatic("attention_kv4", kernel, dim3(static_cast<unsigned>(blocks)), S::kThreads,
                        sizeof(Shared<T, D, NT>), 1, device.major, stream, call);
}

template <typename T, int D>
void with_rows(const Call<T>& call, int rows, cudaStream_t stream) {
    if (rows <= 8) return launch<T, D, 1>(call, stream);
    if (rows <= 16) return launch<T, D, 2>(call, stream);
    if constexpr (D <= 128) return launch<T, D, 4>(call, stream);
}

}  // namespace

int64_t attention_kv4_workspace(int64_t head_size, int multiprocessors) {
    return kCounters * 4 + int64_t{2} * 2 * multiprocessors * 32 * (head_size + 2) * 4;
}

void attention_kv4(const Kv4Arguments& a, cudaStream_t stream) {
    if (a.batch == 0 || a.tokens == 0) return;
    const int64_t group = a.kv_heads ? a.heads / a.kv_heads : 0, rows = group * a.tokens, d = a.head_size;
    require(a.dtype == 0 || a.dtype == 1, "attention_kv4: q must be bf16 or fp16");
    require(
        group * a.kv_heads == a.heads && group > 0,
        "attention_kv4: " + std::to_string(a.heads) + " query heads do not divide over " + std::to_string(a.kv_heads));
    require(rows <= (d > 128 ? 16 : 32), "attention_kv4: " + std::to_string(group) + " query heads a KV head times " +
                                             std::to_string(a.tokens) + " tokens are too many rows");
    require(a.batch <= kMaxBatch && a.batch * a.kv_heads <= kCounters,
            "attention_kv4: at most " + std::to_string(kMaxBatch) + " sequences and " + std::to_string(kCounters) +
                " KV heads of all of them");
    const auto run = [&](auto type) {
        using T = decltype(type);
        constexpr float kLog2e = 1.4426950408889634f;
        const bool capped = a.softcap > 0.0f;
        char* const space = static_cast<char*>(a.workspace);
        const Call<T> call{static_cast<const T*>(a.q),
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
                           capped ? a.scaling / a.softcap : a.scaling * kLog2e,
                           capped ? a.softcap * kLog2e : 0.0f,
                           static_cast<int>(a.batch),
                           static_cast<int>(a.tokens),
                           static_cast<int>(a.heads),
                           static_cast<int>(a.kv_heads),
                           static_cast<int>(a.prompt_tiles),
                           static_cast<int>(a.page_capacity),
                           static_cast<int>(a.ring_tiles),
                           a.early};
        const int r = static_cast<int>(rows);
        with_head_size(d, "attention_kv4", [&](auto size) { with_rows<T, decltype(size)::value>(call, r, stream); });
    };
    a.dtype == 0 ? run(__nv_bfloat16{}) : run(__half{});
}

}  // namespace pyquant
