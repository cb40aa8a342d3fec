// Exact top-k of fp32 rows by counting: a threshold t with count(row >= t) == k is searched by interpolation and
// halving, then one compress pass writes what passes it. Order: value descending, then index ascending; the
// output is in index order. Nothing is sorted. Rows given here hold numbers and -inf (absent) only, no NaN.
#pragma once

#include "core/pack.h"

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

// kLanes rows at once, one a lane, so that counting needs no sum across lanes and no branch: rows are transposed into
// `elements` (length x kLanes, length a multiple of 8) and searched together by interpolation; the few lanes that this
// leaves open are finished one by one by halving the number of floats in between, which always ends.
class RowBrackets {
 public:
  // row(l) is lane l's row, readable up to `length`; values behind its own end are -inf.
  template <class Row>
  void load_rows(float* elements, int64_t length, Row row) {
    elements_ = elements;
    length_ = length;
    for (int64_t half = 0; half < kLanes; half += 8) {
      const float* from[8];
      for (int64_t l = 0; l < 8; ++l) from[l] = row(half + l);
      for (int64_t e = 0; e < length; e += 8) transpose8_rows(from, e, elements + e * kLanes + half, kLanes);
    }
    const Vec absent = splat(-kInf), top = splat(kInf), present = splat(kLowest);
    Vec low = top, high = absent;
    Count n = no_count();
    for (int64_t e = 0; e < length; ++e) {
      const Vec x = load(elements + e * kLanes);
      high = max(x, high);  // operand order: NaN is passed over
      low = min(low, above_or(x, absent, top));
      n = count_ge(n, x, present);
    }
    store(low_, low);
    store(high_, high);
    store(top_, high);
    store(count_low_, as_floats(n));
  }
  // The largest value of lane l.
  float top(int64_t l) const { return top_[l]; }
  // How many values of lane l are present (not -inf).
  int32_t present(int64_t l) const { return static_cast<int32_t>(count_low_[l]); }

  // For lanes with more than k values present: narrows to count_low - k <= slack, or to a tie at `low`.
  void search(int32_t k, int32_t slack) {
    for (int64_t l = 0; l < kLanes; ++l) {
      high_[l] = from_ordered_bits(ordered_bits(high_[l]) + 1);
      count_high_[l] = 0.0f;
    }
    const Vec wanted = splat(static_cast<float>(k)), enough = splat(static_cast<float>(k + slack));
    const Vec aim = splat(static_cast<float>(k) + 0.5f * static_cast<float>(slack)), half = splat(0.5f);
    Vec low = load(low_), high = load(high_), count_low = load(count_low_), count_high = load(count_high_);
    for (int step = 0; step < 12; ++step) {
      if (!mask_gt(count_low, enough)) break;
      const Vec middle = fma(half, low, mul(half, high));
      Vec t = middle;
      if (step % 3 != 2) {
        // Counts fall roughly linearly within a bracket: aim where the line through both ends meets k.
        t = fma(sub(high, low), div(sub(count_low, aim), sub(count_low, count_high)), low);
        t = where_ge(low, t, middle, where_ge(t, high, middle, t));
      }
      // Lanes that are done, or have nothing in between, stand still.
      t = where_ge(enough, count_low, low, t);
      t = where_ge(t, low, where_ge(t, high, low, t), low);
      Count n = no_count(), m = no_count();
      for (int64_t e = 0; e < length_; e += 2) {
        n = count_ge(n, load(elements_ + e * kLanes), t);
        m = count_ge(m, load(elements_ + (e + 1) * kLanes), t);
      }
      const Vec count = add(as_floats(n), as_floats(m));
      high = where_ge(count, wanted, high, t);
      count_high = where_ge(count, wanted, count_high, count);
      low = where_ge(count, wanted, t, low);
      count_low = where_ge(count, wanted, count, count_low);
    }
    store(low_, low);
    store(high_, high);
    store(count_low_, count_low);
    store(count_high_, count_high);
    for (uint32_t open = mask_gt(count_low, enough); open;) open = halve(open, k, slack);
  }
  Bracket lane(int64_t l) const {
    return {low_[l], high_[l], static_cast<int32_t>(count_low_[l]), static_cast<int32_t>(count_high_[l])};
  }

 private:
  // Halves the number of floats between low and high in the open lanes; returns those that stay open.
  uint32_t halve(uint32_t open, int32_t k, int32_t slack) {
    float middle[kLanes], count[kLanes], above[kLanes], below[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t low = ordered_bits(low_[l]), high = ordered_bits(high_[l]);
      middle[l] = open >> l & 1 ? from_ordered_bits(static_cast<int32_t>(low + (high - low) / 2)) : kInf;
    }
    const Vec t = load(middle), most = splat(kInf), least = splat(-kInf);
    Vec lowest_above = most, highest_below = least;
    Count n = no_count();
    for (int64_t e = 0; e < length_; ++e) {
      const Vec x = load(elements_ + e * kLanes);
      n = count_ge(n, x, t);
      lowest_above = min(lowest_above, where_ge(x, t, x, most));
      highest_below = max(where_ge(x, t, least, x), highest_below);
    }
    store(count, as_floats(n));
    store(above, lowest_above);
    store(below, highest_below);
    for (int64_t l = 0; l < kLanes; ++l) {
      if (!(open >> l & 1)) continue;
      const float low = low_[l], high = high_[l];
      // A count jumps over many floats at a time where values repeat: move to values that occur.
      if (count[l] >= static_cast<float>(k)) {
        low_[l] = above[l];  // nothing lies between the middle and the least value that reaches it
        count_low_[l] = count[l];
      } else {
        high_[l] = from_ordered_bits(ordered_bits(larger(below[l], low_[l])) + 1);
        count_high_[l] = count[l];
      }
      const bool enough = count_low_[l] - static_cast<float>(k) <= static_cast<float>(slack);
      // What reaches `low` but not `high` equals `low` once no float lies in between.
      const bool tie = static_cast<int64_t>(ordered_bits(high_[l])) - ordered_bits(low_[l]) <= 1;
      // Where subnormals count as zeros a bracket may stop moving.
      const bool stuck = low_[l] == low && ordered_bits(high_[l]) == ordered_bits(high);
      if (enough || tie || stuck) open &= ~(1u << l);
    }
    return open;
  }

  float* elements_ = nullptr;
  int64_t length_ = 0;
  float low_[kLanes], high_[kLanes], top_[kLanes], count_low_[kLanes], count_high_[kLanes];
};

// Writes the k best of a row whose bracket was narrowed with slack 0: values and indices, in index order. `index` may
// be null: then element p has index p. Both outputs have room for a whole vector behind the k-th element.
HIVILT_INLINE int32_t take_best(const float* row, const int32_t* index, int64_t vecs, int32_t k, const Bracket& b,
                                float* values, int32_t* indices) {
  const Vec low = splat(b.low);
  // Where more values equal low than there are places left, the first of them get in.
  int32_t n = 0, ties = b.count_low == k ? k : k - b.count_high;
  for (int64_t v = 0; v < vecs; ++v) {
    const Vec x = load(row + v * kLanes);
    const uint32_t more = mask_gt(x, low);
    uint32_t equal = mask_ge(x, low) & ~more;
    while (popcount(equal) > ties) equal &= ~(1u << (31 - __builtin_clz(equal)));
    ties -= popcount(equal);
    const uint32_t bits = more | equal;
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
