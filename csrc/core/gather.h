// The sparse primitives: dot products of one row with listed rows, a weighted sum of listed rows, and its transpose,
// which adds one row to listed rows. Forward and backward of listed pairs are made of nothing else.
#pragma once

#include "core/simd.h"

namespace hivilt::HIVILT_ISA {

// out[t] = <x, rows[list[t]]>, eight rows at a time; up to seven elements behind out[n - 1] are overwritten. Lane sums
// first, then across lanes: the order depends on the width alone.
HIVILT_INLINE void gather_dots(const float* x, const float* rows, int64_t stride, const int32_t* list, int64_t n,
                               float* out) {
  int32_t tail[8];
  for (int64_t t = 0; t < n; t += 8) {
    const int32_t* eight = list + t;
    if (n - t < 8) {
      for (int64_t r = 0; r < 8; ++r) tail[r] = eight[smaller(r, n - t - 1)];
      eight = tail;
    }
    const float* row[8];
#pragma GCC unroll 8
    for (int64_t r = 0; r < 8; ++r) row[r] = rows + eight[r] * stride;
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
HIVILT_INLINE void scatter_sum_block(const float* weights, const float* x, const int32_t* list, int64_t n, float* rows,
                                     int64_t stride) {
  Vec part[kVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) part[v] = load(x + v * kLanes);
  for (int64_t t = 0; t < n; ++t) {
    float* row = rows + list[t] * stride;
    const Vec w = splat(weights[t]);
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) store(row + v * kLanes, fma(w, part[v], load(row + v * kLanes)));
  }
}

// rows[list[t]] += weights[t] * x for each t.
inline void scatter_sum(const float* weights, const float* x, const int32_t* list, int64_t n, float* rows,
                        int64_t stride) {
  int64_t k = 0;
  for (; k + kGatherVecs * kLanes <= stride; k += kGatherVecs * kLanes) {
    scatter_sum_block<kGatherVecs>(weights, x + k, list, n, rows + k, stride);
  }
  if constexpr (kGatherVecs > 4) {
    for (; k + 4 * kLanes <= stride; k += 4 * kLanes) scatter_sum_block<4>(weights, x + k, list, n, rows + k, stride);
  }
  for (; k < stride; k += kLanes) scatter_sum_block<1>(weights, x + k, list, n, rows + k, stride);
}

// Long sums are cut into links that are summed in order: rounding errors grow with the length of a chain.
constexpr int64_t kGatherLink = 32;

template <int kVecs>
HIVILT_INLINE void gather_sum_block(const float* weights, const float* rows, int64_t stride, const int32_t* list,
                                    int64_t n, float* out, bool accumulate) {
  for (int64_t first = 0; first < n || !accumulate; first += kGatherLink, accumulate = true) {
    Vec acc[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[v] = splat(0.0f);
    for (int64_t t = first; t < smaller(first + kGatherLink, n); ++t) {
      const float* row = rows + list[t] * stride;
      const Vec w = splat(weights[t]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[v] = fma(w, load(row + v * kLanes), acc[v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      store(out + v * kLanes, accumulate ? add(load(out + v * kLanes), acc[v]) : acc[v]);
    }
  }
}

// out (+)= sum_t weights[t] * rows[list[t]], t ascending in links of kGatherLink. `stride` is a multiple of kLanes.
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
