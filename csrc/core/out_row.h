// How a finished, an empty and a poisoned query row leave: out in the caller's dtype, log-sum-exp in fp32.
#pragma once

#include "core/attention_problem.h"
#include "core/gather.h"
#include "core/pack.h"
#include "core/softmax.h"

namespace hivilt::HIVILT_ISA {

inline void store_out(const Problem& p, int64_t b, int64_t h, int64_t i, const float* row, float lse) {
  finish_row(row, p.dtype, p.e, p.query_row(p.out, b, h, i));
  p.lse[p.query_offset(b, h) + i] = lse;
}

inline void store_empty(const Problem& p, int64_t b, int64_t h, int64_t i) {
  std::memset(p.query_row(p.out, b, h, i), 0, static_cast<size_t>(p.e * p.element_bytes()));
  p.lse[p.query_offset(b, h) + i] = -kInf;
}

inline void store_poisoned(const Problem& p, int64_t b, int64_t h, int64_t i, float* row) {
  for (int64_t k = 0; k < p.e; ++k) row[k] = __builtin_nanf("");
  store_out(p, b, h, i, row, __builtin_nanf(""));
}

// Probabilities after dropout; keys[t] names the key.
inline void drop(const Problem& p, int64_t b, int64_t h, int64_t i, const int32_t* keys, const ScoreRow& row,
                 float* factors) {
  if (!p.dropout.active) return;
  p.dropout.factors(b, h, i, keys, row.count, factors);
  for (int64_t t = 0; t < row.count; ++t) row.scores[t] *= factors[t];
}

// out row = sum_t weights[t] * values[rows[t]].
inline void gather_row(const Problem& p, int64_t b, int64_t h, int64_t i, const float* weights, int64_t n,
                       const int32_t* rows, float lse, const WideRows& values, float* result) {
  float* out = wide_target(p.query_row(p.out, b, h, i), p.dtype, p.e, values.stride, result);
  gather_sum<false>(weights, values.data, values.stride, rows, n, 1.0f, out);
  store_out(p, b, h, i, out, lse);
}

}  // namespace hivilt::HIVILT_ISA
