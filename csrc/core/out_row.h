// How a finished, an empty and a poisoned query row leave: out in the caller's dtype, log-sum-exp in fp32.
#pragma once

#include "core/pack.h"

namespace hivilt::HIVILT_ISA {

inline void store_out(const Problem& p, int64_t b, int64_t h, int64_t i, const float* row, float lse) {
  narrow(row, p.dtype, p.e, p.query_row(p.out, b, h, i));
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

}  // namespace hivilt::HIVILT_ISA
