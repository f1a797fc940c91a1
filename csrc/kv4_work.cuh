// What attention_kv4 works on: the units of all sequences and KV heads as one list, cut into runs of blocks.
#pragma once

#include "pieces.cuh"

namespace pyquant {
namespace {

constexpr int kPageTokens = 64, kTileTokens = 16;
constexpr int kMaxBatch = 256;

// Of one sequence. `skip`: so many of its first units are older than what a query sees (a sliding window).
struct alignas(16) Segments {
    int prompt, pages, length, skip;
    __device__ int prompt_tiles() const { return (prompt + kTileTokens - 1) / kTileTokens; }
    __device__ int window_start() const { return prompt + kPageTokens * pages; }
    __device__ int window_tiles() const { return (length - window_start() + kTileTokens - 1) / kTileTokens; }
    __device__ int units() const { return length <= 0 ? 0 : prompt_tiles() + pages + window_tiles() - skip; }

    // As they lie at `from`; queries see nothing before position `length - reach`.
    __device__ static Segments read(const int* from, int reach) {
        Segments s{ptx::load_int(from), ptx::load_int(from + 1), ptx::load_int(from + 2), 0};
        const int first = max(s.length - reach, 0), in_body = first - s.prompt, in_window = first - s.window_start();
        if (in_body < 0) {
            s.skip = first / kTileTokens;
        } else if (in_window < 0) {
            s.skip = s.prompt_tiles() + in_body / kPageTokens;
        } else {
            s.skip = s.prompt_tiles() + s.pages + in_window / kTileTokens;
        }
        return s;
    }
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

// The first unit of a block's run, and the block whose run holds a unit.
__device__ __forceinline__ int run_begin(int block, int blocks, int units) {
    return static_cast<int>(static_cast<int64_t>(units) * block / blocks);
}

__device__ __forceinline__ int block_of(int unit, int blocks, int units) {
    return static_cast<int>((static_cast<int64_t>(unit + 1) * blocks - 1) / units);
}

}  // namespace
}  // namespace pyquant
