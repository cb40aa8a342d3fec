// From the caller's rows (fp32, bf16 or fp16, any token stride) to what the inner loops read: compact fp32 rows, or
// column panels [k][kPanel] of the right-hand side of a score product. Only rows that take part are ever read.
#pragma once

#include "core/dtype.h"
#include "core/simd.h"

namespace hivilt::HIVILT_ISA {

constexpr int kPanel = kTileVecs * kLanes;

// Hands out aligned pieces of a scratch block; with a null base it only counts bytes.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(p);
  }
  size_t used() const { return static_cast<size_t>(used_); }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Rows of the caller are passed once, in order, each a while after the last: too far apart for the processor to see a
// stream. An address behind the last row does no harm.
constexpr int64_t kAhead = 16;
template <bool kWrite>
HIVILT_INLINE void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(row) + at, kWrite);
}

// n elements to fp32, zeros up to `padded`.
inline void widen(const char* src, DType dtype, int64_t n, float* dst, int64_t padded) {
  int64_t i = 0;
  if (dtype == DType::kFloat32) {
    const auto* wide = reinterpret_cast<const float*>(src);
    for (; i + kLanes <= n; i += kLanes) store(dst + i, load(wide + i));
    for (; i < n; ++i) dst[i] = wide[i];
  } else {
    const auto* half = reinterpret_cast<const uint16_t*>(src);
    const bool bf16 = dtype == DType::kBFloat16;
    for (; i + kLanes <= n; i += kLanes) store(dst + i, bf16 ? load_bf16(half + i) : load_f16(half + i));
    if (i < n) {
      uint16_t tail[kLanes] = {};
      float wide[kLanes];
      std::memcpy(tail, half + i, static_cast<size_t>(n - i) * 2);
      store(wide, bf16 ? load_bf16(tail) : load_f16(tail));
      std::memcpy(dst + i, wide, static_cast<size_t>(n - i) * 4);
      i = n;
    }
  }
  for (; i < padded; ++i) dst[i] = 0.0f;
}

inline void narrow(const float* src, DType dtype, int64_t n, char* dst) {
  if (dtype == DType::kFloat32) {
    std::memcpy(dst, src, static_cast<size_t>(n) * 4);
    return;
  }
  auto* half = reinterpret_cast<uint16_t*>(dst);
  const bool bf16 = dtype == DType::kBFloat16;
  const auto put = [&](uint16_t* to, Vec v) { bf16 ? store_bf16(to, v) : store_f16(to, v); };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) put(half + i, load(src + i));
  if (i == n) return;
  float tail[kLanes] = {};
  uint16_t narrowed[kLanes];
  std::memcpy(tail, src + i, static_cast<size_t>(n - i) * 4);
  put(narrowed, load(tail));
  std::memcpy(half + i, narrowed, static_cast<size_t>(n - i) * 2);
}

// Rows of the caller as fp32, in place where that is what they are.

// A row to read, zeros up to `padded`.
HIVILT_INLINE const float* wide_row(const char* row, DType dtype, int64_t width, int64_t padded, float* buffer) {
  if (dtype == DType::kFloat32 && width == padded) return reinterpret_cast<const float*>(row);
  widen(row, dtype, width, buffer, padded);
  return buffer;
}
// Where a row of results is computed; finish_row brings it to its place.
HIVILT_INLINE float* wide_target(char* row, DType dtype, int64_t width, int64_t padded, float* buffer) {
  return dtype == DType::kFloat32 && width == padded ? reinterpret_cast<float*>(row) : buffer;
}
HIVILT_INLINE void finish_row(const float* wide, DType dtype, int64_t width, char* row) {
  if (reinterpret_cast<const char*>(wide) != row) narrow(wide, dtype, width, row);
}

// dst[c][r] = rows[r][first + c] for an 8 x 8 block of 32-bit words.
HIVILT_INLINE void transpose8_rows(const float* const (&rows)[8], int64_t first, float* dst, int64_t dst_stride) {
#if defined(HIVILT_SIMD_AVX2) || defined(HIVILT_SIMD_AVX512)
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(rows[i] + first);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(dst + i * dst_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(dst + (i + 4) * dst_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
#else
  for (int c = 0; c < 8; ++c) {
    for (int i = 0; i < 8; ++i) dst[c * dst_stride + i] = rows[i][first + c];
  }
#endif
}

// The right-hand side of a score product, as panels: panel p, step k, lane c is element k of column p * kPanel + c.
// Columns past n are zero. With pairs, a step is two bf16 elements in one 32-bit word (for dot_bf16).
struct Panels {
  float* data = nullptr;
  float* rows = nullptr;  // kPanel rows in flight
  int64_t width = 0, steps = 0, row_words = 0;
  bool pairs = false;

  Panels() = default;
  Panels(Arena& arena, int64_t columns, int64_t width_, DType dtype) : width(width_) {
    pairs = kBf16Dot && dtype == DType::kBFloat16;
    steps = pairs ? (width + 1) / 2 : width;
    row_words = round_up(steps, 8);
    rows = arena.take<float>(kPanel * row_words);
    data = arena.take<float>(round_up(columns, kPanel) * row_words);
  }
  const float* panel(int64_t p) const { return data + p * kPanel * row_words; }

  // row(c) gives the address of column c.
  template <class Row>
  void fill(int64_t n, DType dtype, Row row) {
    for (int64_t first = 0, p = 0; first < n; first += kPanel, ++p) {
      for (int64_t c = 0; c < kPanel; ++c) {
        float* dst = rows + c * row_words;
        if (first + c >= n) {
          std::memset(dst, 0, static_cast<size_t>(row_words) * 4);
        } else {
          load_row(row(first + c), dtype, dst);
        }
      }
      float* out = data + p * kPanel * row_words;
      for (int64_t c = 0; c < kPanel; c += 8) {
        const float* from[8];
        for (int64_t r = 0; r < 8; ++r) from[r] = rows + (c + r) * row_words;
        for (int64_t k = 0; k < row_words; k += 8) transpose8_rows(from, k, out + k * kPanel + c, kPanel);
      }
    }
  }
  // One row of the left-hand side, in the words that a step reads.
  void load_row(const char* src, DType dtype, float* dst) const {
    if (pairs) {
      std::memset(dst, 0, static_cast<size_t>(row_words) * 4);
      std::memcpy(dst, src, static_cast<size_t>(width) * 2);
    } else {
      widen(src, dtype, width, dst, row_words);
    }
  }
};

// Rows as compact fp32, each padded with zeros to whole vectors (or whole tiles).
struct WideRows {
  float* data = nullptr;
  int64_t width = 0, stride = 0;

  WideRows() = default;
  WideRows(Arena& arena, int64_t rows, int64_t width_, int64_t multiple = kLanes)
      : width(width_), stride(round_up(width_, multiple)), own_(arena.take<float>(rows * stride)) {
    data = own_;
  }
  float* row(int64_t r) const { return data + r * stride; }
  template <class Row>
  void fill(int64_t n, DType dtype, Row source) {
    data = own_;
    for (int64_t r = 0; r < n; ++r) widen(source(r), dtype, width, row(r), stride);
  }
  // The same to read only: rows that lie like this already, token_stride elements apart, are used where they are.
  template <class Row>
  void fill_or_view(int64_t n, DType dtype, int64_t token_stride, Row source) {
    if (n > 0 && dtype == DType::kFloat32 && width == stride && token_stride == stride) {
      data = reinterpret_cast<float*>(source(0));
      constexpr int64_t kNear = 512 << 10;  // more would push itself out of a second-level cache
      prefetch_row<false>(data, smaller(n * stride * 4, kNear));
    } else {
      fill(n, dtype, source);
    }
  }

 private:
  float* own_ = nullptr;
};

// The tokens of one side that take part, in order: all of them, or those that a mask names.
struct Tokens {
  int32_t* index = nullptr;
  int64_t count = 0;

  Tokens() = default;
  Tokens(Arena& arena, int64_t most) : index(arena.take<int32_t>(most)) {}
  void fill(const uint8_t* mask, int64_t n) {
    count = 0;
    for (int64_t t = 0; t < n; ++t) {
      if (!mask || mask[t]) index[count++] = static_cast<int32_t>(t);
    }
  }
};

}  // namespace hivilt::HIVILT_ISA
