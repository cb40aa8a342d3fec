// Weighted sums of rows: what interpolation does.
#pragma once

#include "core/pack.h"

namespace hivilt::HIVILT_ISA {

constexpr int kTaps = 8;  // rows that are summed at a time: as many streams as registers and prefetchers like

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
      : sum_(sum), width_(width), whole_(readable >= round_up(width, kLanes)), dtype_(dtype) {}

  // The sum starts from this row (floats, whole vectors), or from zero.
  void start(const float* first) {
    first_ = first;
    fresh_ = true;
  }
  HIVILT_INLINE void add(const char* row, float weight) {
    rows_[n_] = row;
    weights_[n_] = weight;
    if (++n_ == kTaps) flush();
  }
  // Everything that was added is in the sum.
  void finish() {
    if (n_ || fresh_) flush();
  }

 private:
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
    n_ = 0;
    fresh_ = false;
  }
  template <DType kDType>
  void flush_as() {
    switch (n_) {
      case 0:
        return sum_rows<kDType, 0>();
      case 1:
        return sum_rows<kDType, 1>();
      case 2:
        return sum_rows<kDType, 2>();
      case 3:
        return sum_rows<kDType, 3>();
      case 4:
        return sum_rows<kDType, 4>();
      case 5:
        return sum_rows<kDType, 5>();
      case 6:
        return sum_rows<kDType, 6>();
      case 7:
        return sum_rows<kDType, 7>();
      default:
        return sum_rows<kDType, kTaps>();
    }
  }
  template <DType kDType, int kRows>
  void sum_rows() {
    const char* rows[kRows + 1];
    Vec weights[kRows + 1];
    for (int t = 0; t < kRows; ++t) {
      rows[t] = rows_[t];
      weights[t] = splat(weights_[t]);
    }
    const float* from = fresh_ ? first_ : sum_;
    const int64_t vectors = whole_ ? round_up(width_, kLanes) : width_ / kLanes * kLanes;
    for (int64_t c = 0; c < vectors; c += kLanes) {
      Vec total = from ? load(from + c) : splat(0.0f);
#pragma GCC unroll 8
      for (int t = 0; t < kRows; ++t) total = fma(weights[t], load_as<kDType>(rows[t], c), total);
      store(sum_ + c, total);
    }
    if (vectors >= width_) return;
    // The last elements of rows that end with them.
    alignas(64) float total[kLanes], wide[kLanes];
    store(total, from ? load(from + vectors) : splat(0.0f));
    for (int t = 0; t < kRows; ++t) {
      widen(rows[t] + vectors * bytes_of(kDType), kDType, width_ - vectors, wide, kLanes);
      store(total, fma(weights[t], load(wide), load(total)));
    }
    store(sum_ + vectors, load(total));
  }

  float* sum_;
  int64_t width_;
  bool whole_;
  DType dtype_;
  const float* first_ = nullptr;
  bool fresh_ = true;
  int n_ = 0;
  const char* rows_[kTaps];
  float weights_[kTaps];
};

}  // namespace hivilt::HIVILT_ISA
