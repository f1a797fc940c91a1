// linear_w4a8 on Hopper for e4m3 codes.
#include "linear_w4a8.cuh"

namespace pyquant {

bool linear_w4a8_e4m3(const LinearA8Call& call, int tokens, int cut, int multiprocessors, cudaStream_t stream) {
    constexpr Kind kKind = Kind::e4m3;
    const bool fine = (call.group_size > 0 && call.group_size < kStageK) || call.act_group_size > 0;
    switch (tokens) {
        case 16:
            (fine ? launch<16, 16, 1, kKind, 32> : launch<16, 16, 1, kKind, 128>)(call, cut, multiprocessors, stream);
            return true;
        case 64:
            (fine ? launch<64, 64, 1, kKind, 32> : launch<64, 64, 1, kKind, 128>)(call, cut, multiprocessors, stream);
            return true;
        case 128:
            if (fine) return false;
            launch<128, 64, 2, kKind, 128>(call, cut, multiprocessors, stream);
            return true;
        case 256:
            if (fine) return false;
            launch<256, 64, 2, kKind, 128>(call, cut, multiprocessors, stream);
            return true;
        default:
            return false;
    }
}

}  // namespace pyquant
