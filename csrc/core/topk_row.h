// Exact top-k of short fp32 rows by counting: a threshold t with count(row >= t) == k is searched by interpolation
// and bisection, then one compress pass writes what passes it. Order: value descending, then index ascending; the
// output is in index order. Nothing is sorted. Rows given here hold numbers and -inf (absent) only, no NaN.
#pragma once

#include "core/simd.h"

namespace hivilt::HIVILT_ISA {

HIVILT_INLINE int32_t ordered_bits(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits < 0 ? static_cast<int32_t>(0x80000000u - static_cast<uint32_t>(bits)) : bits;
}
HIVILT_INLINE float from_ordered_bits(int32_t bits) {
  if (bits < 0) bits = static_cast<int32_t>(0x80000000u - static_cast<uint32_t>(bits));
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// What is known of one row's threshold: count(row >= low) = count_low >= k > count_high = count(row >= high), where
// high may lie above every value.
struct Bracket {
  float low, high;
  int32_t count_low, count_high;
};

HIVILT_INLINE int32_t count_ge(const float* row, int64_t vecs, float threshold) {
  const Vec t = splat(threshold);
  int32_t n = 0;
  for (int64_t v = 0; v < vecs; ++v) n += popcount(mask_ge(load(row + v * kLanes), t));
  return n;
}

// Bracket of a whole row from its extremes. `present` = number of values that are not -inf, at least 1.
HIVILT_INLINE Bracket extremes(const float* row, int64_t vecs, int32_t present) {
  const Vec absent = splat(-kInf), top = splat(kInf);
  Vec low = top, high = absent;
  for (int64_t v = 0; v < vecs; ++v) {
    const Vec x = load(row + v * kLanes);
    high = max(high, x);
    low = min(low, above_or(x, absent, top));
  }
  return {min_of(low), from_ordered_bits(ordered_bits(max_of(high)) + 1), present, 0};
}

// Narrows until count_low - k <= slack, or until no float lies between low and high (then values equal to low tie).
HIVILT_INLINE void narrow_bracket(const float* row, int64_t vecs, int32_t k, int32_t slack, Bracket& b) {
  for (int step = 0; b.count_low - k > slack; ++step) {
    float t;
    if (step < 12 && step % 3 != 2) {
      // Counts fall roughly linearly within a bracket: aim where the line through both ends meets k.
      const float part = (static_cast<float>(b.count_low - k) - 0.5f * static_cast<float>(slack)) /
                         static_cast<float>(b.count_low - b.count_high);
      t = b.low + (b.high - b.low) * part;
    } else if (step < 12) {
      t = 0.5f * b.low + 0.5f * b.high;
    } else {
      // Guaranteed: halves the number of floats between the ends.
      const int64_t low = ordered_bits(b.low), high = ordered_bits(b.high);
      t = from_ordered_bits(static_cast<int32_t>(low + (high - low) / 2));
    }
    if (!(t > b.low && t < b.high)) {
      const int64_t low = ordered_bits(b.low), high = ordered_bits(b.high);
      if (high - low <= 1) return;
      t = from_ordered_bits(static_cast<int32_t>(low + (high - low) / 2));
    }
    const int32_t n = count_ge(row, vecs, t);
    if (n >= k) {
      b.low = t;
      b.count_low = n;
    } else {
      b.high = t;
      b.count_high = n;
    }
  }
}

// Writes the k best of a row whose bracket was narrowed with slack 0: values and indices, in index order. `index` may
// be null: then element p has index p. Both outputs have room for a whole vector behind the k-th element.
HIVILT_INLINE int32_t take_best(const float* row, const int32_t* index, int64_t vecs, int32_t k, const Bracket& b,
                                float* values, int32_t* indices) {
  const Vec low = splat(b.low);
  int32_t n = 0;
  if (b.count_low == k) {
    for (int64_t v = 0; v < vecs; ++v) {
      const Vec x = load(row + v * kLanes);
      const uint32_t bits = mask_ge(x, low);
      compress(values + n, x, bits);
      if (index) {
        compress_index(indices + n, index + v * kLanes, bits);
      } else {
        compress_iota(indices + n, static_cast<int32_t>(v * kLanes), bits);
      }
      n += popcount(bits);
    }
    return n;
  }
  // More values equal to low than places left: all above it, and the first of the ties.
  int32_t ties = k - b.count_high;
  for (int64_t p = 0; p < vecs * kLanes; ++p) {
    const bool tie = row[p] == b.low;
    if (!(row[p] > b.low) && !(tie && ties > 0)) continue;
    ties -= tie;
    values[n] = row[p];
    indices[n++] = index ? index[p] : static_cast<int32_t>(p);
  }
  return n;
}

// All that reach the threshold, in order; whole vectors are written past the returned count.
HIVILT_INLINE int32_t take_above(const float* row, int64_t vecs, float threshold, int32_t first_index, float* values,
                                 int32_t* indices) {
  const Vec t = splat(threshold);
  int32_t n = 0;
  for (int64_t v = 0; v < vecs; ++v) {
    const Vec x = load(row + v * kLanes);
    const uint32_t bits = mask_ge(x, t);
    compress(values + n, x, bits);
    compress_iota(indices + n, first_index + static_cast<int32_t>(v * kLanes), bits);
    n += popcount(bits);
  }
  return n;
}

// The same choice for rows that hold NaN or +inf, which are rare and end as NaN rows: one at a time, no vectors.
// NaN ranks below every number but above absent ones.
HIVILT_INLINE int32_t take_best_slowly(const float* row, int64_t n, int32_t k, int32_t first_index, float* values,
                                       int32_t* indices) {
  int32_t kept = 0, worst = 0;
  const auto before = [](float a, float b) { return a > b || (a == a && b != b); };
  const auto find_worst = [&] {  // the last of the lowest
    worst = 0;
    for (int32_t q = 1; q < kept; ++q) {
      if (!before(values[q], values[worst])) worst = q;
    }
  };
  for (int64_t p = 0; p < n; ++p) {
    const float x = row[p];
    if (x == -kInf) continue;
    if (kept == k) {
      if (!before(x, values[worst])) continue;
      --kept;
      for (int32_t q = worst; q < kept; ++q) {
        values[q] = values[q + 1];
        indices[q] = indices[q + 1];
      }
    }
    values[kept] = x;
    indices[kept++] = first_index + static_cast<int32_t>(p);
    if (kept == k) find_worst();
  }
  return kept;
}

}  // namespace hivilt::HIVILT_ISA
