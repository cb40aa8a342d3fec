// Makes scores absent (-inf) or biased as attn_mask says; key and query masks never get here, they choose the rows and
// columns that are scored at all.
#pragma once

#include "core/pack.h"

namespace hivilt::HIVILT_ISA {

// How the score of (row, column) becomes valid, biased or absent: strides are along rows and columns of the block.
struct ScoreMask {
  MaskKind kind = MaskKind::kNone;
  const char* data = nullptr;
  int64_t row_stride = 0, column_stride = 0;
  bool only_presence = false;  // a float mask decides who is present (not -inf) but adds nothing

  HIVILT_INLINE float bias(int64_t row, int64_t column) const {
    const int64_t at = row * row_stride + column * column_stride;
    if (kind == MaskKind::kFloat32) {
      float x;
      std::memcpy(&x, data + at * 4, 4);
      return x;
    }
    uint16_t half[kLanes] = {};
    std::memcpy(half, data + at * 2, 2);
    float wide[kLanes];
    store(wide, kind == MaskKind::kBFloat16 ? load_bf16(half) : load_f16(half));
    return wide[0];
  }
  HIVILT_INLINE bool allows(int64_t row, int64_t column) const {
    return data[row * row_stride + column * column_stride] != 0;
  }
};

inline ScoreMask mask_of(const Problem& p, int64_t b, int64_t h) {
  if (p.mask_kind == MaskKind::kNone) return {};
  const bool by_query = p.axis == 0;
  return {p.mask_kind, p.mask_at(b, h, 0, 0), p.mask_stride[by_query ? 2 : 3], p.mask_stride[by_query ? 3 : 2], false};
}

class Masker {
 public:
  Masker() = default;
  Masker(Arena& arena, int64_t most_columns)
      : bias_(arena.take<float>(most_columns)), allowed_(arena.take<uint8_t>(most_columns)) {}

  // What a float mask adds to the scores of row_token against column[0..width).
  const float* biases(const ScoreMask& mask, int64_t row_token, const int32_t* column, int64_t width) {
    if (mask.kind == MaskKind::kFloat32 && in_order(mask, column, width)) {
      return reinterpret_cast<const float*>(mask.data) + row_token * mask.row_stride + column[0];
    }
    for (int64_t i = 0; i < width; ++i) bias_[i] = mask.bias(row_token, column[i]);
    return bias_;
  }

  // Scores row[0..width) of row_token against the columns column[0..width).
  void apply(const ScoreMask& mask, int64_t row_token, const int32_t* column, int64_t width, float* row) {
    const Vec absent = splat(-kInf);
    int64_t c = 0;
    if (mask.kind == MaskKind::kBool) {
      const auto* allowed = reinterpret_cast<const uint8_t*>(mask.data) + row_token * mask.row_stride + column[0];
      if (!in_order(mask, column, width)) {
        for (int64_t i = 0; i < width; ++i) allowed_[i] = mask.allows(row_token, column[i]);
        allowed = allowed_;
      }
      for (; c + kLanes <= width; c += kLanes) store(row + c, blend_bytes(allowed + c, load(row + c), absent));
      for (; c < width; ++c) row[c] = allowed[c] ? row[c] : -kInf;
      return;
    }
    const float* bias = biases(mask, row_token, column, width);
    for (; c + kLanes <= width; c += kLanes) {
      // A bias of -inf means absent even where the score is NaN.
      const Vec x = load(bias + c), s = mask.only_presence ? load(row + c) : add(load(row + c), x);
      store(row + c, below_or(x, splat(kLowest), s, absent));
    }
    for (; c < width; ++c) {
      if (bias[c] == -kInf) {
        row[c] = -kInf;
      } else if (!mask.only_presence) {
        row[c] += bias[c];
      }
    }
  }

 private:
  static bool in_order(const ScoreMask& mask, const int32_t* column, int64_t width) {
    return mask.column_stride == 1 && column[width - 1] - column[0] == width - 1;
  }

  float* bias_ = nullptr;
  uint8_t* allowed_ = nullptr;
};

}  // namespace hivilt::HIVILT_ISA
