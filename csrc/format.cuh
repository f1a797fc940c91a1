// The tiled order of a 4-bit weight in C++. pyquant/formats/int4.py is the norm and has the pictures; a test compares
// both.
//
//   qweight int32 [N/64 strips, K/64 units, 128 threads, 4 words]
//   scale   T     [N/64 strips, groups, 64]      zero uint8, same order
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PYQUANT_HD __host__ __device__
#else
#define PYQUANT_HD
#endif

namespace pyquant {

constexpr int kStrip = 64;         // rows of a unit
constexpr int kUnitK = 64;         // columns of a unit
constexpr int kUnitWords = 512;    // int32 words of a unit
constexpr int kUnitThreads = 128;  // threads that share a unit, 4 words each
constexpr int kSymmetricZero = 8;  // the zero of a weight without zeros

// Index (0..511) inside a unit of the word that holds (row, col), both 0..63.
PYQUANT_HD constexpr int unit_word(int row, int col) {
    const int warp = row / 16, g = row % 8, c = (col % 8) / 2, step = col / 16;
    return (warp * 32 + g * 4 + c) * 4 + step;
}

// Bit (0, 4, .. 28) inside that word at which its code begins.
PYQUANT_HD constexpr int unit_shift(int row, int col) {
    const int h = (row / 8) % 2, upper = (col / 8) % 2, second = col % 2;
    return 4 * (4 * second + 2 * upper + h);
}

// Position (0..63) of a strip's row inside a tiled group of scales or zeros.
PYQUANT_HD constexpr int scale_position(int row) { return 2 * (8 * (row / 16) + row % 8) + (row / 8) % 2; }

PYQUANT_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Groups along K of the padded weight; group_size -1 is one group per row.
PYQUANT_HD constexpr int64_t tiled_groups(int64_t k, int64_t group_size) {
    return group_size < 0 ? 1 : ceil_div(ceil_div(k, kUnitK) * kUnitK, group_size);
}

}  // namespace pyquant
