// linear_w4a8 on Hopper for int8 codes and weights with zeros.
#include "linear_w4a8.cuh"

namespace pyquant {

bool linear_w4a8_zeros(const LinearA8Call& call, int tile, int cut, int multiprocessors, cudaStream_t stream) {
    const bool fine = (call.group_size > 0 && call.group_size < kStageK) || call.act_group_size > 0;
    return launch_tile<Kind::zeros>(call, fine, tile, cut, multiprocessors, stream);
}

}  // namespace pyquant
