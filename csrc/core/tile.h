// The register tile that does all dense arithmetic: acc[r][v] (+)= sum_k a[r][k] * b[k][v], k ascending, one
// accumulator per element. So every element is one chain of fused multiply-adds in k order, whatever the blocking:
// results do not depend on tile position, batch, threads or padding.
#pragma once

#include "core/pack.h"

namespace hivilt::HIVILT_ISA {

// a[r][k] at a + r * a_row + k * a_step (broadcast); b[k] at b + k * b_step (kVecs vectors: kTileVecs, or 1 at an
// edge); acc = dot(a, b, acc).
template <class Acc, int kVecs, class Dot>
HIVILT_INLINE void tile_product(int64_t steps, const float* a, int64_t a_row, int64_t a_step, const float* b,
                                int64_t b_step, Acc (&acc)[kTileRows][kVecs], Dot dot) {
  for (int64_t k = 0; k < steps; ++k) {
    Vec column[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) column[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const Vec x = splat(a[r * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[r][v] = dot(x, column[v], acc[r][v]);
    }
    a += a_step;
    b += b_step;
  }
}
template <bool kPairs, int kVecs>
HIVILT_INLINE void tile_product(int64_t steps, const float* a, int64_t a_row, int64_t a_step, const float* b,
                                int64_t b_step, Vec (&acc)[kTileRows][kVecs]) {
  tile_product(steps, a, a_row, a_step, b, b_step, acc, [](const Vec& x, const Vec& y, const Vec& c) {
#if defined(HIVILT_SIMD_BF16_DOT)
    if constexpr (kPairs) return dot_bf16(x, y, c);
#endif
    return fma(x, y, c);
  });
}

// Fetches the rows of a tile `ahead` rows behind this one's. A product reads kTileRows short rows side by side, in
// which no processor sees that one long stretch of memory is read.
HIVILT_INLINE void prefetch_tile(const float* a, int64_t a_row, int64_t steps, int64_t ahead = kTileRows) {
  for (int64_t r = ahead; r < ahead + kTileRows; ++r) prefetch_row<false>(a + r * a_row, steps * 4);
}

template <int kVecs>
HIVILT_INLINE void tile_zero(Vec (&acc)[kTileRows][kVecs]) {
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) acc[r][v] = splat(0.0f);
  }
}

template <int kVecs>
HIVILT_INLINE void tile_add(float* c, int64_t c_row, const Vec (&acc)[kTileRows][kVecs]) {
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      float* to = c + r * c_row + v * kLanes;
      store(to, add(load(to), acc[r][v]));
    }
  }
}

template <int kVecs>
HIVILT_INLINE void tile_store(float* c, int64_t c_row, const Vec (&acc)[kTileRows][kVecs]) {
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(c + r * c_row + v * kLanes, acc[r][v]);
  }
}

// acc = sum_k a[k] b[k], the chain over k cut into links that are summed in order: rounding errors grow with the length
// of a chain.
template <bool kPairs>
HIVILT_INLINE void tile_links(int64_t steps, int64_t link, const float* a, int64_t a_row, int64_t a_step,
                              const float* b, int64_t b_step, Vec (&acc)[kTileRows][kTileVecs]) {
  tile_zero(acc);
  tile_product<kPairs>(smaller(steps, link), a, a_row, a_step, b, b_step, acc);
  if (steps <= link) return;
  alignas(64) float total[kTileRows * kPanel];
  for (int64_t k = link; k < steps; k += link) {
    tile_store(total, kPanel, acc);
    tile_zero(acc);
    tile_product<kPairs>(smaller(steps - k, link), a + k * a_step, a_row, a_step, b + k * b_step, b_step, acc);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVecs; ++v) acc[r][v] = add(load(total + r * kPanel + v * kLanes), acc[r][v]);
    }
  }
}

// An error of a score is an error of a probability, so short links are worth their additions.
constexpr int64_t kScoreLink = 16;

template <bool kPairs>
HIVILT_INLINE void tile_scores(int64_t steps, const float* a, int64_t a_row, const float* b,
                               Vec (&acc)[kTileRows][kTileVecs]) {
  tile_links<kPairs>(steps, kScoreLink, a, a_row, 1, b, kPanel, acc);
}

template <int kVecs>
struct Vecs {
  static constexpr int value = kVecs;
};

// body(panel, Vecs<n>) for every panel of `columns` columns; the last needs one vector where no more are left.
template <class Body>
HIVILT_INLINE void each_panel(int64_t columns, Body body) {
  for (int64_t panel = 0; panel * kPanel < columns; ++panel) {
    if (columns - panel * kPanel > kLanes) {
      body(panel, Vecs<kTileVecs>());
    } else {
      body(panel, Vecs<1>());
    }
  }
}

}  // namespace hivilt::HIVILT_ISA
