// linear_w4a8 on Hopper for symmetric weights and int8 codes with scales of groups: of tokens, or of the weight below
// 128 columns.
#include "linear_w4a8.cuh"

namespace pyquant {

bool linear_w4a8_grouped(const LinearA8Call& call, int tokens, int cut, int multiprocessors, cudaStream_t stream) {
    constexpr Kind kKind = Kind::grouped;
    const auto small = [](int64_t group) { return group > 0 && group < kStageK; };
    const bool fine = small(call.group_size) || small(call.act_group_size);
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
