// Weighted sums of rows: what interpolation does.
#pragma once

#include "core/pack.h"

namespace hivilt::HIVILT_ISA {

constexpr int kTaps = 9;  // rows that are summed at a time: a bias and two scales of an image

template <DType kDType>
HIVILT_INLINE Vec load_as(const char* row, int64_t c) {
  if constexpr (kDType == DType::kFloat32) return load(reinterpret_cast<const float*>(row) + c);
  const auto* half = reinterpret_cast<const uint16_t*>(row) + c;
  return kDType == DType::kBFloat16 ? load_bf16(half) : load_f16(half);
}

// Sums rows of `width` elements into a row of floats that is as wide in whole vectors. Rows are remembered until there
// are kTaps of them. Reads nothing behind `readable` elements of a row (a multiple of kLanes, or width).
class RowSum {
 public:
  RowSum(float* sum, int64_t width, int64_t readable, DType dtype)
      : sum_(sum),
        width_(width),
        vectors_(readable >= round_up(width, kLanes) ? round_up(width, kLanes) : width / kLanes * kLanes),
        dtype_(dtype) {}

  // The sum starts from this row (floats, whole vectors), or from zero.
  void start(const float* first) {
    from_ = first;
    fresh_ = true;
  }
  HIVILT_INLINE void add(const char* row, float weight) {
    taps_[n_] = {row, weight};
    if (++n_ == kTaps) flush();
  }
  // Everything that was added is in the sum.
  void finish() {
    if (n_ || fresh_) flush();
  }

 private:
  // A pair lies apart from the next: rows side by side would be read two in a vector, which waits until both single
  // stores have left the store buffer.
  struct Tap {
    const char* row;
    float weight;
  };

  void flush() {
    switch (dtype_) {
      case DType::kFloat32:
        flush_as<DType::kFloat32>();
        break;
      case DType::kBFloat16:
        flush_as<DType::kBFloat16>();
        break;
      default:
        flush_as<DType::kFloat16>();
    }
    from_ = sum_;
    n_ = 0;
    fresh_ = false;
  }
  template <DType kDType>
  HIVILT_INLINE void flush_as() {
    switch (n_) {
      case 0:
        sum_rows<kDType, 0>();
        break;
      case 1:
        sum_rows<kDType, 1>();
        break;
      case 2:
        sum_rows<kDType, 2>();
        break;
      case 3:
        sum_rows<kDType, 3>();
        break;
      case 4:
        sum_rows<kDType, 4>();
        break;
      case 5:
        sum_rows<kDType, 5>();
        break;
      case 6:
        sum_rows<kDType, 6>();
        break;
      case 7:
        sum_rows<kDType, 7>();
        break;
      case 8:
        sum_rows<kDType, 8>();
        break;
      default:
        sum_rows<kDType, kTaps>();
    }
    if (vectors_ < width_) sum_tail();
  }
  template <DType kDType, int kRows>
  HIVILT_INLINE void sum_rows() {
    const char* rows[kRows + 1];
    Vec weights[kRows + 1];
#pragma GCC unroll 9
    for (int t = 0; t < kRows; ++t) {
      rows[t] = taps_[t].row;
      weights[t] = splat(taps_[t].weight);
    }
    const float* from = from_;
    float* to = sum_;
    const int64_t vectors = vectors_;
    for (int64_t c = 0; c < vectors; c += kLanes) {
      Vec total = from ? load(from + c) : splat(0.0f);
#pragma GCC unroll 9
      for (int t = 0; t < kRows; ++t) total = fma(weights[t], load_as<kDType>(rows[t], c), total);
      store(to + c, total);
    }
  }
  // The last elements of rows that end with them.
  void sum_tail() {
    alignas(64) float wide[kLanes];
    Vec total = from_ ? load(from_ + vectors_) : splat(0.0f);
    for (int t = 0; t < n_; ++t) {
      widen(taps_[t].row + vectors_ * bytes_of(dtype_), dtype_, width_ - vectors_, wide, kLanes);
      total = fma(splat(taps_[t].weight), load(wide), total);
    }
    store(sum_ + vectors_, total);
  }

  float* sum_;
  int64_t width_, vectors_;  // elements; those that are read in whole vectors
  DType dtype_;
  const float* from_ = nullptr;
  bool fresh_ = true;
  int n_ = 0;
  Tap taps_[kTaps];
};

}  // namespace hivilt::HIVILT_ISA
