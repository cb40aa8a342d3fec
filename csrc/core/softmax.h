// Softmax of rows of kept scores, several rows at a time: the sums of kLanes rows meet in one vector, so that neither
// a sum across lanes nor a logarithm waits for a single row.
#pragma once

#include "core/simd.h"

namespace hivilt::HIVILT_ISA {

// A row of scores, whose last vector may be overwritten to its end and one vector behind. `top` is its maximum.
struct ScoreRow {
  float* scores = nullptr;
  int64_t count = 0;
  float top = 0.0f;
};

HIVILT_INLINE ScoreRow score_row(float* scores, int64_t count) {
  store(scores + count, splat(-kInf));
  Vec top = splat(-kInf);
  for (int64_t t = 0; t < count; t += kLanes) top = max(load(scores + t), top);
  return {scores, count, max_of(top)};
}

// Scores become probabilities; lse[l] = log of the sum of exp(score) over row l. Rows [0, n), n <= kLanes; what comes
// back of a row without scores is unused.
inline void softmax_rows(const ScoreRow* rows, int64_t n, float* lse) {
  Vec sums[kLanes];
  float top[kLanes], share[kLanes], lse_of[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) {
    sums[l] = splat(0.0f);
    const ScoreRow row = l < n ? rows[l] : ScoreRow{};
    top[l] = row.top;
    if (row.count == 0) continue;
    store(row.scores + row.count, splat(-kInf));
    const Vec shift = splat(row.top);
    for (int64_t t = 0; t < row.count; t += kLanes) {
      const Vec w = exp(sub(load(row.scores + t), shift));
      store(row.scores + t, w);
      sums[l] = add(sums[l], w);
    }
  }
  const Vec total = lane_sums(sums);
  store(lse_of, add(load(top), log(total)));
  store(share, div(splat(1.0f), total));
  for (int64_t l = 0; l < n; ++l) {
    lse[l] = lse_of[l];
    // Before the values are summed, not after: their sum might overflow where their mean does not.
    const Vec part = splat(share[l]);
    for (int64_t t = 0; t < rows[l].count; t += kLanes) {
      store(rows[l].scores + t, mul(load(rows[l].scores + t), part));
    }
  }
}

}  // namespace hivilt::HIVILT_ISA
