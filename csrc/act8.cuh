// 8-bit activations in C++: pyquant/formats/act8.py is the norm and says why; a test compares both.
//
//   codes  int8 or e4m3 [M, K padded to 64], each 16 columns in the order of act8_column
//   scale  fp32 [groups, M padded to 4], sums likewise
#pragma once

#include "format.cuh"

namespace pyquant {

// Column (0..15) whose code stands at this position (0..15) of 16.
PYQUANT_HD constexpr int act8_column(int position) {
    return 2 * (position / 4) + 8 * (position % 2) + position % 4 / 2;
}

constexpr int kActBlock = 16;  // columns that are put in order together

PYQUANT_HD constexpr int64_t act8_columns(int64_t k) { return ceil_div(k, kUnitK) * kUnitK; }
PYQUANT_HD constexpr int64_t act8_rows(int64_t m) { return ceil_div(m, 4) * 4; }

}  // namespace pyquant
