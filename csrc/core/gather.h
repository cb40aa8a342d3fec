// The sparse primitives: dot products of one row with listed rows, a weighted sum of listed rows, and its transpose,
// which adds one row to listed rows. Forward and backward of listed pairs are made of nothing else.
#pragma once

#include "core/simd.h"

namespace hivilt::HIVILT_ISA {

// The address is computed once, here: GCC would otherwise keep and add one per vector of the row.
template <class T>
HIVILT_INLINE T* row_at(T* rows, int64_t stride, int64_t r) {
  T* row = rows + r * stride;
  asm("" : "+r"(row));
  return row;
}

// acc[r] += x * rows[list[r]], lane by lane, over kVecs vectors of both.
template <int kVecs, int kRows>
HIVILT_INLINE void add_products(const float* x, const float* rows, int64_t stride, const int32_t* list,
                                Vec (&acc)[kLanes]) {
  Vec part[kVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) part[v] = load(x + v * kLanes);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const float* row = row_at(rows, stride, list[r]);
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[r] = fma(part[v], load(row + v * kLanes), acc[r]);
  }
}

template <int kRows>
HIVILT_INLINE Vec dots_of(const float* x, const float* rows, int64_t stride, const int32_t* list) {
  constexpr int kVecs = 4;
  Vec acc[kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) acc[r] = splat(0.0f);
  if (stride == kVecs * kLanes) {  // by far the most frequent width
    add_products<kVecs, kRows>(x, rows, stride, list, acc);
    return lane_sums(acc);
  }
  int64_t k = 0;
  for (; k + kVecs * kLanes <= stride; k += kVecs * kLanes) {
    add_products<kVecs, kRows>(x + k, rows + k, stride, list, acc);
  }
  for (; k < stride; k += kLanes) add_products<1, kRows>(x + k, rows + k, stride, list, acc);
  return lane_sums(acc);
}

// out[t] = <x, rows[list[t]]>; the vector of out[n - 1] is overwritten to its end. Lane sums first, then across lanes:
// the order depends on the width alone.
HIVILT_INLINE void gather_dots(const float* x, const float* rows, int64_t stride, const int32_t* list, int64_t n,
                               float* out) {
  int64_t t = 0;
  for (; t + kLanes <= n; t += kLanes) store(out + t, dots_of<kLanes>(x, rows, stride, list + t));
  if (t == n) return;
  int32_t tail[kLanes];
  for (int64_t r = 0; r < kLanes; ++r) tail[r] = list[smaller(t + r, n - 1)];
  store(out + t,
        n - t > kLanes / 2 ? dots_of<kLanes>(x, rows, stride, tail) : dots_of<kLanes / 2>(x, rows, stride, tail));
}

template <int kVecs>
HIVILT_INLINE void scatter_sum_block(const float* weights, const float* x, const int32_t* list, int64_t n, float* rows,
                                     int64_t stride) {
  Vec part[kVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) part[v] = load(x + v * kLanes);
  for (int64_t t = 0; t < n; ++t) {
    float* row = row_at(rows, stride, list[t]);
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
HIVILT_INLINE void add_row(float weight, const float* row, Vec (&acc)[kVecs]) {
  const Vec w = splat(weight);
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) acc[v] = fma(w, load(row + v * kLanes), acc[v]);
}

template <int kVecs, bool kAdd>
HIVILT_INLINE void gather_sum_block(const float* weights, const float* rows, int64_t stride, const int32_t* list,
                                    int64_t n, float factor, float* out) {
  // Two chains, even and odd t, where one alone would wait for its own additions.
  constexpr int kChains = kVecs <= 4 ? 2 : 1;
  Vec total[kVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) total[v] = kAdd ? load(out + v * kLanes) : splat(0.0f);
  for (int64_t first = 0; first < n; first += kGatherLink) {
    const int64_t end = smaller(first + kGatherLink, n);
    Vec acc[kChains][kVecs];
#pragma GCC unroll 2
    for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[c][v] = splat(0.0f);
    }
    int64_t t = first;
    for (; t + kChains <= end; t += kChains) {
      add_row(weights[t], row_at(rows, stride, list[t]), acc[0]);
      if constexpr (kChains == 2) add_row(weights[t + 1], row_at(rows, stride, list[t + 1]), acc[1]);
    }
    if (t < end) add_row(weights[t], row_at(rows, stride, list[t]), acc[0]);
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      total[v] = add(total[v], kChains == 2 ? add(acc[0][v], acc[kChains - 1][v]) : acc[0][v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) store(out + v * kLanes, kAdd ? total[v] : mul(total[v], splat(factor)));
}

// out = factor * sum_t weights[t] * rows[list[t]], or with kAdd out += the sum; links of kGatherLink, t ascending.
// `stride` is a multiple of kLanes.
template <bool kAdd>
HIVILT_INLINE void gather_sum(const float* weights, const float* rows, int64_t stride, const int32_t* list, int64_t n,
                              float factor, float* out) {
  int64_t k = 0;
  for (; k + kGatherVecs * kLanes <= stride; k += kGatherVecs * kLanes) {
    gather_sum_block<kGatherVecs, kAdd>(weights, rows + k, stride, list, n, factor, out + k);
  }
  if constexpr (kGatherVecs > 4) {
    for (; k + 4 * kLanes <= stride; k += 4 * kLanes) {
      gather_sum_block<4, kAdd>(weights, rows + k, stride, list, n, factor, out + k);
    }
  }
  if constexpr (kGatherVecs > 2) {
    for (; k + 2 * kLanes <= stride; k += 2 * kLanes) {
      gather_sum_block<2, kAdd>(weights, rows + k, stride, list, n, factor, out + k);
    }
  }
  for (; k < stride; k += kLanes) gather_sum_block<1, kAdd>(weights, rows + k, stride, list, n, factor, out + k);
}

}  // namespace hivilt::HIVILT_ISA
