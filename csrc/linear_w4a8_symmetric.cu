// linear_w4a8 on Hopper for symmetric weights, int8 codes with one scale a token. One file a kind, so that they compile
// side by side.
#include "linear_w4a8.cuh"

namespace pyquant {

bool linear_w4a8_symmetric(const LinearA8Call& call, int tokens, int cut, int multiprocessors, cudaStream_t stream) {
    constexpr Kind kKind = Kind::symmetric;
    switch (tokens) {
        case 16:
            launch<16, 16, 1, kKind, 128>(call, cut, multiprocessors, stream);
            return true;
        case 32:
            launch<32, 32, 1, kKind, 128>(call, cut, multiprocessors, stream);
            return true;
        case 64:
            launch<64, 64, 1, kKind, 128>(call, cut, multiprocessors, stream);
            return true;
        case 128:
            launch<128, 64, 2, kKind, 128>(call, cut, multiprocessors, stream);
            return true;
        case 256:
            launch<256, 64, 2, kKind, 128>(call, cut, multiprocessors, stream);
            return true;
        case 1128:  // other ways to do the same, for measurements
            launch<128, 128, 1, kKind, 128>(call, cut, multiprocessors, stream);
            return true;
        case 1256:
            launch<256, 128, 1, kKind, 128>(call, cut, multiprocessors, stream);
            return true;
        case 2128:
            launch<128, 64, 2, kKind, 128, 2>(call, cut, multiprocessors, stream);
            return true;
        case 2256:
            launch<256, 64, 2, kKind, 128, 2>(call, cut, multiprocessors, stream);
            return true;
        case 3256:
            launch<256, 128, 1, kKind, 128, 2>(call, cut, multiprocessors, stream);
            return true;
        default:
            return false;
    }
}

}  // namespace pyquant
