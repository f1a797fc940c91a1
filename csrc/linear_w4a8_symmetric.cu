// linear_w4a8 on Hopper for symmetric weights, int8 codes with one scale a token. One file a kind, so that they compile
// side by side.
#include "linear_w4a8.cuh"

namespace pyquant {

bool linear_w4a8_symmetric(const LinearA8Call& call, int tile, int cut, int multiprocessors, cudaStream_t stream) {
    return launch_tile<Kind::symmetric>(call, false, tile, cut, multiprocessors, stream);
}

}  // namespace pyquant
