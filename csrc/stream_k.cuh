// Work that persistent blocks share: whole tiles in turn, or equal pieces of the line of all tiles' stages (stream-K).
// linear_wgmma.cuh says how; it has the same text.
#pragma once

#include <cstdint>

namespace pyquant {
namespace {

struct Tiles {
    int row_blocks, token_blocks;
    int steps;  // stages along K
    bool cut;   // stream-K; otherwise whole tiles
};

// Workspace: a flag for each block, then its partial tile. The flags are 0 between launches.
constexpr int kFlagBytes = 4096;
constexpr int kMaxBlocks = kFlagBytes / 4;

// The stretches of K of single tiles that a block works on. A block that takes a piece of the line goes through it from
// its end, so that the tile it owns comes last.
// Whole warps (WARPS) read the numbers off lane 0, so that the compiler sees they are uniform and keeps what depends on
// them, such as the place in the ring, out of the vector registers.
template <bool WARPS>
struct Work {
    int tile, begin, end;  // stages
    int line, line_end;

    static __device__ __forceinline__ int uniform(int v) { return WARPS ? __shfl_sync(0xffffffff, v, 0) : v; }

    static __device__ __forceinline__ int line_of(int block, const Tiles& p) {
        const int64_t all = static_cast<int64_t>(p.row_blocks) * p.token_blocks * p.steps;
        return static_cast<int>(all * block / static_cast<int>(gridDim.x));
    }
    // The block whose piece holds this place of the line: line_of(block) <= line < line_of(block + 1).
    static __device__ __forceinline__ int block_of(int line, const Tiles& p) {
        const int64_t all = static_cast<int64_t>(p.row_blocks) * p.token_blocks * p.steps;
        return uniform(static_cast<int>(((line + int64_t{1}) * static_cast<int>(gridDim.x) - 1) / all));
    }
    __device__ __forceinline__ explicit Work(const Tiles& p) {
        line = uniform(p.cut ? line_of(static_cast<int>(blockIdx.x), p) : static_cast<int>(blockIdx.x) * p.steps);
        line_end =
            uniform(p.cut ? line_of(static_cast<int>(blockIdx.x) + 1, p) : p.row_blocks * p.token_blocks * p.steps);
        aim(p);
    }
    __device__ __forceinline__ bool more() const { return line < line_end; }
    __device__ __forceinline__ void aim(const Tiles& p) {
        if (p.cut) {
            tile = uniform((line_end - 1) / p.steps);
            end = line_end - tile * p.steps, begin = max(line - tile * p.steps, 0);
        } else {
            tile = uniform(line / p.steps);
            begin = 0, end = p.steps;
        }
    }
    __device__ __forceinline__ void next(const Tiles& p) {
        if (p.cut) {
            line_end -= end - begin;
        } else {
            line += static_cast<int>(gridDim.x) * p.steps;
        }
        aim(p);
    }
};

// Tile number -> (row block, token block): 8 token blocks beside each other, so that weights and x of the tiles in
// flight stay in L2.
__device__ __forceinline__ int2 tile_at(int tile, const Tiles& p) {
    constexpr int kWide = 8;
    const int band = tile / (kWide * p.row_blocks), width = min(kWide, p.token_blocks - band * kWide);
    const int within = tile - band * kWide * p.row_blocks;
    return make_int2(within / width, band * kWide + within % width);
}

// A place in the ring of stages.
template <int STAGES>
struct Cursor {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

}  // namespace
}  // namespace pyquant
