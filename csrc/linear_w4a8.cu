// linear_w4a8: checks what the kernels take for granted, and picks one.
//
//   Hopper            linear_w4a8.cuh, one of four kinds, with the tile and cut that cost least
//   others            linear_w4a8_mma.cu
#include <algorithm>
#include <cmath>
#include <string>

#include "act8.cuh"
#include "ops.h"
#include "programmatic.cuh"

namespace pyquant {

bool linear_w4a8_symmetric(const LinearA8Call& call, int tile, int cut, int multiprocessors, cudaStream_t stream);
bool linear_w4a8_grouped(const LinearA8Call& call, int tile, int cut, int multiprocessors, cudaStream_t stream);
bool linear_w4a8_zeros(const LinearA8Call& call, int tile, int cut, int multiprocessors, cudaStream_t stream);
bool linear_w4a8_e4m3(const LinearA8Call& call, int tile, int cut, int multiprocessors, cudaStream_t stream);

namespace {

// A tile by its name (tokens, and rows before them where they are not 128), and what it costs by the way the work is
// cut: whole tiles, or stream-K over one or two blocks a multiprocessor. Nanoseconds for 128 columns of a tile on a
// multiprocessor, and microseconds for the ends of a launch; 0: not so. Lines through the times of symmetric weights on
// an H200 (benchmarks/NOTES.md); the other kinds take longer, by much the same factor at every tile.
struct Way {
    int name, rows, tokens, blocks;  // blocks of a multiprocessor
    bool plain;                      // for symmetric weights with one scale a token only
    double stage[3], ends[3];
};
constexpr Way kWays[] = {
    {16, 128, 16, 2, false, {262, 378, 261}, {4, 5, 7.5}},    //
    {32, 128, 32, 2, true, {298, 413, 307}, {4.5, 4, 5.5}},   //
    {64, 128, 64, 2, false, {405, 495, 376}, {8, 5.5, 8.5}},  //
    {192064, 192, 64, 1, true, {600, 620}, {2.5, 6}},         //
    {192128, 192, 128, 1, false, {820, 825}, {3.5, 9}},       //
    {256, 128, 256, 1, true, {975, 1010}, {5, 14}},           //
};

struct Choice {
    int tile, cut;
};

// kind 0 symmetric, 1 others, 2 others with groups below 128.
Choice choose(const LinearA8Call& call, int kind, int multiprocessors, int force_tile, int force_cut) {
    if (force_tile > 0) return {force_tile, std::max(force_cut, 0)};
    Choice best{};
    double least = 0;
    for (const Way& way : kWays) {
        if ((way.plain && kind > 0) || (kind == 2 && way.tokens > 64)) continue;
        if (kind == 0 && way.tokens > 16 && way.tokens >= 2 * call.m) continue;
        const double tiles = static_cast<double>(ceil_div(call.n, way.rows) * ceil_div(call.m, way.tokens));
        for (int cut = 0; cut < 3; ++cut) {
            // Fewer whole tiles than multiprocessors leave those alone that the costs take for shared.
            const bool uneven = cut == 0 && way.blocks > 1 && tiles < multiprocessors;
            if (way.stage[cut] == 0) continue;
            if (force_cut >= 0 ? cut != force_cut : call.workspace == nullptr ? cut > 0 : uneven) continue;
            const double turns = cut ? tiles / multiprocessors : std::ceil(tiles / multiprocessors);
            const double time =
                turns * static_cast<double>(ceil_div(call.k, 128)) * way.stage[cut] * 1e-3 + way.ends[cut];
            if (least == 0 || time < least) least = time, best = {way.name, cut};
        }
    }
    return best;
}

}  // namespace

int64_t linear_w4a8_workspace(int multiprocessors) {
    int64_t most = 0;
    for (const Way& way : kWays)
        most = std::max(most, int64_t{way.blocks} * way.rows * way.tokens * 4 * multiprocessors);
    return 4096 + most;  // flags first: stream_k.cuh
}

void linear_w4a8(const LinearA8Call& call, int tokens, int variant, cudaStream_t stream) {
    if (call.m == 0 || call.n == 0) return;
    require(call.scale_dtype == 0 || call.scale_dtype == 1, "linear_w4a8: scales must be bf16 or fp16");
    require(call.y_dtype == call.scale_dtype || call.y_dtype == 2,
            "linear_w4a8: y must be of the scales' dtype or fp32");
    for (const int64_t group : {call.group_size, call.act_group_size}) {
        require(group == -1 || group == 32 || group == 64 || group == 128,
                "linear_w4a8: groups of " + std::to_string(group) + " must be of 32, 64, 128 or -1");
    }
    require(std::max({call.m, call.n, call.k}) < (1 << 30) && call.n * call.k < (int64_t{1} << 36),
            "linear_w4a8: M=" + std::to_string(call.m) + " N=" + std::to_string(call.n) +
                " K=" + std::to_string(call.k) + " is too large");
    for (const void* p : {call.codes, static_cast<const void*>(call.act_scale), static_cast<const void*>(call.sums),
                          static_cast<const void*>(call.qweight), call.scale, static_cast<const void*>(call.zero),
                          static_cast<const void*>(call.y)}) {
        require(reinterpret_cast<uintptr_t>(p) % 16 == 0, "linear_w4a8: tensors must begin at multiples of 16 bytes");
    }
    const bool plain =
        !call.fp8 && call.zero == nullptr && call.act_group_size < 0 && (call.group_size < 0 || call.group_size == 128);
    const Device device = current_device();
    if (device.major != 9 || tokens == 8) {
        require(!call.fp8, "linear_w4a8: e4m3 codes need a Hopper GPU");
        return linear_w4a8_mma(call, stream);
    }
    const bool sums = call.fp8 || call.zero != nullptr;
    require(!sums || call.sums != nullptr, "linear_w4a8: weights with zeros, and e4m3 codes, need the sums of codes");
    const auto small = [](int64_t group) { return group > 0 && group < 128; };
    const bool fine = small(call.group_size) || (sums ? call.act_group_size > 0 : small(call.act_group_size));
    const int kind = plain ? 0 : fine ? 2 : 1;
    const Choice choice = choose(call, kind, device.multiprocessors, tokens, variant);
    const auto run = plain      ? linear_w4a8_symmetric
                     : call.fp8 ? linear_w4a8_e4m3
                     : sums     ? linear_w4a8_zeros
                                : linear_w4a8_grouped;
    const bool done = run(call, choice.tile, choice.cut, device.multiprocessors, stream);
    require(done, "linear_w4a8: no kernel with tile " + std::to_string(choice.tile) + " for these arguments");
}

}  // namespace pyquant
