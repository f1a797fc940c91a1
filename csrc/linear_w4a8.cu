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

bool linear_w4a8_symmetric(const LinearA8Call& call, int tokens, int cut, int multiprocessors, cudaStream_t stream);
bool linear_w4a8_grouped(const LinearA8Call& call, int tokens, int cut, int multiprocessors, cudaStream_t stream);
bool linear_w4a8_zeros(const LinearA8Call& call, int tokens, int cut, int multiprocessors, cudaStream_t stream);
bool linear_w4a8_e4m3(const LinearA8Call& call, int tokens, int cut, int multiprocessors, cudaStream_t stream);

namespace {

// What a tile of 128 rows costs: cycles for a stage of 128 columns on a multiprocessor, and the ends of a launch in
// nanoseconds where tiles are cut.
struct Cost {
    int tokens;
    double cycles, cut_ends;
};
constexpr Cost kCosts[] = {{16, 300, 5000}, {32, 320, 6000}, {64, 380, 7000}, {128, 620, 9000}, {256, 1130, 20000}};
constexpr double kWholeEnds = 2500;

struct Choice {
    int tokens, cut;  // cut 0: whole tiles, else stream-K over this many blocks a multiprocessor
};

int blocks_on(int tokens) { return tokens >= 128 ? 1 : 2; }  // a multiprocessor

// kind 0 symmetric, 1 others, 2 others with groups below 128.
bool exists(int tokens, int kind) { return kind == 0 || (tokens != 32 && (kind == 1 || tokens <= 64)); }

Choice choose(const LinearA8Call& call, int kind, int multiprocessors, int force_tokens, int force_cut) {
    if (force_tokens > 0) return {force_tokens, std::max(force_cut, 0)};
    Choice best{};
    double least = 0;
    for (const Cost& cost : kCosts) {
        const int tokens = cost.tokens;
        if (!exists(tokens, kind) || (tokens > 16 && exists(tokens / 2, kind) && tokens >= 2 * call.m)) continue;
        const double tiles = static_cast<double>(ceil_div(call.n, 128) * ceil_div(call.m, tokens));
        const double bytes = 0.52 * call.n * call.k + 1.0 * call.m * call.k + 2.0 * call.m * call.n;
        for (int cut = 0; cut <= blocks_on(tokens); ++cut) {
            const bool uneven = cut == 0 && blocks_on(tokens) > 1 && tiles < multiprocessors;
            if (force_cut >= 0 ? cut != force_cut : call.workspace == nullptr ? cut > 0 : uneven) continue;
            const double turns = cut ? tiles / multiprocessors : std::ceil(tiles / multiprocessors);
            const double cycles = cost.cycles * static_cast<double>(ceil_div(call.k, 128));
            const double time =
                std::max(bytes / 4400, turns * cycles / 1.6) + (cut ? cost.cut_ends + (cut - 1) * 1500 : kWholeEnds);
            if (least == 0 || time < least) least = time, best = {tokens, cut};
        }
    }
    return best;
}

}  // namespace

int64_t linear_w4a8_workspace(int multiprocessors) {
    int64_t most = 0;
    for (const int tokens : {16, 32, 64, 128, 256}) {
        most = std::max(most, int64_t{multiprocessors} * blocks_on(tokens) * 128 * tokens * 4);
    }
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
    const bool done = run(call, choice.tokens, choice.cut, device.multiprocessors, stream);
    require(done,
            "linear_w4a8: no kernel with tiles of " + std::to_string(choice.tokens) + " tokens for these arguments");
}

}  // namespace pyquant
