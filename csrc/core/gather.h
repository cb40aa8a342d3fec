// The two sparse primitives: dot products of one row with listed rows, and a weighted sum of listed rows. Forward,
// backward to queries and backward to keys and values are made of nothing else.
#pragma once

#include "core/simd.h"

namespace hivilt::HIVILT_ISA {

// out[t] = <x, rows[list[t]]>, eight rows at a time; up to seven elements behind out[n - 1] are overwritten. Lane sums
// first, then across lanes: the order depends on the width alone.
HIVILT_INLINE void gather_dots(const float* x, const float* rows, int64_t stride, const int32_t* list, int64_t n,
                               float* out) {
  for (int64_t t = 0; t < n; t += 8) {
    const float* row[8];
#pragma GCC unroll 8
    for (int64_t r = 0; r < 8; ++r) row[r] = rows + list[smaller(t + r, n - 1)] * stride;
    Vec acc[8];
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) acc[r] = splat(0.0f);
    for (int64_t k = 0; k < stride; k += kLanes) {
      const Vec v = load(x + k);
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) acc[r] = fma(v, load(row[r] + k), acc[r]);
    }
    sum8(acc, out + t);
  }
}

template <int kVecs>
HIVILT_INLINE void gather_sum_block(const float* weights, const float* rows, int64_t stride, const int32_t* list,
                                    int64_t n, float* out, bool accumulate) {
  Vec acc[kVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) acc[v] = accumulate ? load(out + v * kLanes) : splat(0.0f);
  for (int64_t t = 0; t < n; ++t) {
    const float* row = rows + list[t] * stride;
    const Vec w = splat(weights[t]);
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[v] = fma(w, load(row + v * kLanes), acc[v]);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) store(out + v * kLanes, acc[v]);
}

// out (+)= sum_t weights[t] * rows[list[t]], t ascending in one chain per element. `stride` is a multiple of kLanes.
inline void gather_sum(const float* weights, const float* rows, int64_t stride, const int32_t* list, int64_t n,
                       float* out, bool accumulate) {
  int64_t k = 0;
  for (; k + kGatherVecs * kLanes <= stride; k += kGatherVecs * kLanes) {
    gather_sum_block<kGatherVecs>(weights, rows + k, stride, list, n, out + k, accumulate);
  }
  if constexpr (kGatherVecs > 4) {
    for (; k + 4 * kLanes <= stride; k += 4 * kLanes) {
      gather_sum_block<4>(weights, rows + k, stride, list, n, out + k, accumulate);
    }
  }
  if constexpr (kGatherVecs > 2) {
    for (; k + 2 * kLanes <= stride; k += 2 * kLanes) {
      gather_sum_block<2>(weights, rows + k, stride, list, n, out + k, accumulate);
    }
  }
  for (; k < stride; k += kLanes) gather_sum_block<1>(weights, rows + k, stride, list, n, out + k, accumulate);
}

}  // namespace hivilt::HIVILT_ISA
