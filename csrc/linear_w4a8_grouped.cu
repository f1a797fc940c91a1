// linear_w4a8 on Hopper for symmetric weights and int8 codes with scales of groups: of tokens, or of the weight below
// 128 columns.
#include "linear_w4a8.cuh"

namespace pyquant {

bool linear_w4a8_grouped(const LinearA8Call& call, int tile, int cut, int multiprocessors, cudaStream_t stream) {
    const auto small = [](int64_t group) { return group > 0 && group < kStageK; };
    const bool fine = small(call.group_size) || small(call.act_group_size);
    return launch_tile<Kind::grouped>(call, fine, tile, cut, multiprocessors, stream);
}

}  // namespace pyquant
