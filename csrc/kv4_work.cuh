// What attention_kv4 works on: the units of all sequences and KV heads as one list, cut into runs of blocks.
#pragma once

#include "pieces.cuh"

namespace pyquant {
namespace {

constexpr int kPageTokens = 64, kTileTokens = 16;
constexpr int kMaxBatch = 256;

// Of one sequence. Pages are one unit each, or two (halves 1). `skip`: so many of its first units are older than what a
// query sees (a sliding window).
struct alignas(16) Segments {
    int prompt, pages, length, skip;
    __device__ int prompt_tiles() const { return (prompt + kTileTokens - 1) / kTileTokens; }
    __device__ int window_start() const { return prompt + kPageTokens * pages; }
    __device__ int window_tiles() const { return (length - window_start() + kTileTokens - 1) / kTileTokens; }
    __device__ int units(int halves) const {
        return length <= 0 ? 0 : prompt_tiles() + (pages << halves) + window_tiles() - skip;
    }

    // As they lie at `from`, for halves; queries see nothing before position `length - reach`.
    __device__ static Segments read(const int* from, int reach) {
        Segments s{ptx::load_int(from), ptx::load_int(from + 1), ptx::load_int(from + 2), 0};
        const int first = max(s.length - reach, 0), in_body = first - s.prompt, in_window = first - s.window_start();
        if (in_body < 0) {
            s.skip = first / kTileTokens;
        } else if (in_window < 0) {
            s.skip = s.prompt_tiles() + in_body / (kPageTokens / 2);
        } else {
            s.skip = s.prompt_tiles() + 2 * s.pages + in_window / kTileTokens;
        }
        return s;
    }
    // From halves to whole pages.
    __device__ void join_halves() {
        const int in_body = min(skip - prompt_tiles(), 2 * pages);
        if (in_body > 0) skip -= in_body - in_body / 2;
    }
};

// The list of all units: where those of each sequence end. Heads are padded to whole runs of blocks where that costs
// little, so that no block has to work on two of them, one after the other.
struct List {
    int ends[kMaxBatch];
    Segments segments[kMaxBatch];
    int halves;  // whether a page is two units
    int run;     // what the units of a head are rounded up to; 1: blocks take equal shares, whatever head
    int runs[32];
    __device__ const Segments& of(int b) const { return segments[b]; }
    __device__ int units(const Segments& s) const { return (s.units(halves) + run - 1) / run * run; }

    // Blocks for every head, where each takes `length` units of one; by a warp.
    __device__ int blocks_of(int length, int pages_halves, int lane, int batch, int kv_heads) const {
        int sum = 0;
        for (int b = lane; b < batch; b += 32) sum += (segments[b].units(pages_halves) + length - 1) / length;
        return kv_heads * __reduce_add_sync(0xffffffff, sum);
    }

    // By all WARPS warps, the segments being there as they are for halves; ends with a barrier. Pages are halved where
    // there is so little work that every warp has no more than one unit then (HALVES 1), never (0) or always (2). `run`
    // is the smallest of a few lengths, each a little more than equal shares of all, of which the grid has enough
    // blocks for every head.
    template <int WARPS, int HALVES>
    __device__ void plan(int warp, int lane, int batch, int kv_heads, int blocks) {
        const bool halve = HALVES == 2 || (HALVES == 1 && blocks_of(WARPS, 1, lane, batch, kv_heads) <= blocks);
        if (!halve) {
            __syncthreads();
            for (int b = 32 * warp + lane; b < batch; b += 32 * WARPS) segments[b].join_halves();
            __syncthreads();
        }
        const int all = blocks_of(1, halve, lane, batch, kv_heads);
        int length = (all + blocks - 1) / blocks;
        length += length * (8 * warp / WARPS) / 64;
        if (length < 8 * WARPS) length = max(1, (length + WARPS - 1) / WARPS) * WARPS;  // warps of a block go in step
        const int wanted = blocks_of(length, halve, lane, batch, kv_heads);
        if (lane == 0) runs[warp] = wanted <= blocks ? length : 0;
        __syncthreads();
        if (warp == 0) {
            const int mine = lane < WARPS ? runs[lane] : 0;
            const unsigned some = __ballot_sync(0xffffffff, mine > 0);
            if (lane == 0) run = some ? runs[__ffs(some) - 1] : 1, halves = halve;
            __syncwarp();
            count(lane, batch, kv_heads);
        }
        __syncthreads();
    }

    __device__ void count(int lane, int batch, int kv_heads) {
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
    }
};

// Where a block works on one head only.
struct OneList {
    Segments segments;
    int halves;
    __device__ const Segments& of(int) const { return segments; }
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
        if (list.run > 1) {  // equal shares for the blocks of this head, which pad it to whole runs
            const int own = list.segments[b].units(list.halves), blocks = units / list.run, block = from / list.run;
            from = block * own / blocks;
            to = stop = (block + 1) * own / blocks;
        } else {
            cut(list, units);
        }
    }
    __device__ void cut(const List& list, int units) {
        to = min(units, from + end - at);
        stop = min(to, list.segments[b].units(list.halves));
    }
    // To the next head; false after the last.
    __device__ bool next(const List& list) {
        at += list.run > 1 ? list.run : to - from;
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
    static constexpr int kPage = 0, kTile = 1, kHalf = 2;  // and 3 the second half
    Walk walk;
    int first, unit, step;  // of a run, the next that is not known yet, the distance
    int count, kind;  // `count` units from `from` on, `step` pages apart, which are fetched without looking at the list
    bool more;
    const unsigned char* from;
};

// The first unit of a block's run, and the block whose run holds a unit.
__device__ __forceinline__ int run_begin(int block, int blocks, int units) {
    return static_cast<int>(static_cast<int64_t>(units) * block / blocks);
}

__device__ __forceinline__ int block_of(int unit, int blocks, int units) {
    return static_cast<int>((static_cast<int64_t>(unit + 1) * blocks - 1) / units);
}

}  // namespace
}  // namespace pyquant
