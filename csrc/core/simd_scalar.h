// Portable: any compiler target. What the operations mean is said here; the other files spell them in intrinsics.
#pragma once

namespace hivilt::HIVILT_ISA {

struct Vec {
  float lane[16];
};
constexpr int kLanes = 16;
constexpr int kTileRows = 2;
constexpr int kTileVecs = 2;
constexpr int kGatherVecs = 2;
constexpr bool kBf16Dot = false;

template <class F>
HIVILT_INLINE Vec map(F f) {
  Vec r;
  for (int l = 0; l < kLanes; ++l) r.lane[l] = f(l);
  return r;
}
template <class F>
HIVILT_INLINE uint32_t bits_where(F f) {
  uint32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= static_cast<uint32_t>(f(l)) << l;
  return bits;
}
HIVILT_INLINE Vec load(const float* p) {
  Vec r;
  std::memcpy(r.lane, p, sizeof r.lane);
  return r;
}
HIVILT_INLINE void store(float* p, Vec v) {
  std::memcpy(p, v.lane, sizeof v.lane);
}
HIVILT_INLINE Vec splat(float x) {
  return map([&](int) { return x; });
}
HIVILT_INLINE Vec add(const Vec& a, const Vec& b) {
  return map([&](int l) { return a.lane[l] + b.lane[l]; });
}
HIVILT_INLINE Vec sub(const Vec& a, const Vec& b) {
  return map([&](int l) { return a.lane[l] - b.lane[l]; });
}
HIVILT_INLINE Vec mul(const Vec& a, const Vec& b) {
  return map([&](int l) { return a.lane[l] * b.lane[l]; });
}
HIVILT_INLINE Vec fma(const Vec& a, const Vec& b, const Vec& c) {
  return map([&](int l) { return a.lane[l] * b.lane[l] + c.lane[l]; });
}
// max and min return the second operand when either is NaN.
HIVILT_INLINE Vec max(const Vec& a, const Vec& b) {
  return map([&](int l) { return a.lane[l] > b.lane[l] ? a.lane[l] : b.lane[l]; });
}
HIVILT_INLINE Vec min(const Vec& a, const Vec& b) {
  return map([&](int l) { return a.lane[l] < b.lane[l] ? a.lane[l] : b.lane[l]; });
}
HIVILT_INLINE uint32_t mask_ge(const Vec& a, const Vec& b) {
  return bits_where([&](int l) { return a.lane[l] >= b.lane[l]; });
}
HIVILT_INLINE uint32_t mask_gt(const Vec& a, const Vec& b) {
  return bits_where([&](int l) { return a.lane[l] > b.lane[l]; });
}
// Also where either is NaN.
HIVILT_INLINE uint32_t mask_not_le(const Vec& a, const Vec& b) {
  return bits_where([&](int l) { return !(a.lane[l] <= b.lane[l]); });
}
HIVILT_INLINE uint32_t mask_nan(const Vec& a) {
  return bits_where([&](int l) { return a.lane[l] != a.lane[l]; });
}
// Lane l of a where the byte m[l] is non-zero, of b elsewhere.
HIVILT_INLINE Vec blend_bytes(const uint8_t* m, const Vec& a, const Vec& b) {
  return map([&](int l) { return m[l] ? a.lane[l] : b.lane[l]; });
}
// a where a > floor, otherwise (NaN included) b.
HIVILT_INLINE Vec above_or(const Vec& a, const Vec& floor, const Vec& b) {
  return map([&](int l) { return a.lane[l] > floor.lane[l] ? a.lane[l] : b.lane[l]; });
}
// c where a < floor, otherwise (NaN included) b.
HIVILT_INLINE Vec below_or(const Vec& a, const Vec& floor, const Vec& b, const Vec& c) {
  return map([&](int l) { return a.lane[l] < floor.lane[l] ? c.lane[l] : b.lane[l]; });
}
HIVILT_INLINE float sum(const Vec& v) {
  float r = 0;
  for (int l = 0; l < kLanes; ++l) r += v.lane[l];
  return r;
}
// Lane i of the result is the sum of the lanes of a[i].
HIVILT_INLINE Vec lane_sums(const Vec (&a)[kLanes]) {
  return map([&](int i) { return sum(a[i]); });
}
HIVILT_INLINE float max_of(const Vec& v) {
  float r = v.lane[0];
  for (int l = 1; l < kLanes; ++l) r = larger(r, v.lane[l]);
  return r;
}
// Per-lane counters.
using Count = Vec;
HIVILT_INLINE Count no_count() {
  return splat(0.0f);
}
HIVILT_INLINE Count count_ge(const Count& n, const Vec& a, const Vec& b) {
  return map([&](int l) { return n.lane[l] + (a.lane[l] >= b.lane[l] ? 1.0f : 0.0f); });
}
HIVILT_INLINE Vec as_floats(const Count& n) {
  return n;
}
// x where a >= b, otherwise (NaN included) y.
HIVILT_INLINE Vec where_ge(const Vec& a, const Vec& b, const Vec& x, const Vec& y) {
  return map([&](int l) { return a.lane[l] >= b.lane[l] ? x.lane[l] : y.lane[l]; });
}
HIVILT_INLINE Vec div(const Vec& a, const Vec& b) {
  return map([&](int l) { return a.lane[l] / b.lane[l]; });
}
// Elsewhere whole vectors are written: lanes behind the popcount are garbage for the next write to cover.
HIVILT_INLINE void compress(float* p, const Vec& v, uint32_t bits) {
  for (int l = 0; l < kLanes; ++l) {
    if (bits >> l & 1) *p++ = v.lane[l];
  }
}
HIVILT_INLINE void compress_iota(int32_t* p, int32_t base, uint32_t bits) {
  for (int l = 0; l < kLanes; ++l) {
    if (bits >> l & 1) *p++ = base + l;
  }
}
HIVILT_INLINE void compress_index(int32_t* p, const int32_t* index, uint32_t bits) {
  for (int l = 0; l < kLanes; ++l) {
    if (bits >> l & 1) *p++ = index[l];
  }
}
HIVILT_INLINE Vec round_even(const Vec& v) {
  return map([&](int l) { return __builtin_rintf(v.lane[l]); });
}
// 2^n for whole n in [-126, 127].
HIVILT_INLINE Vec power_of_two(const Vec& n) {
  return map([&](int l) {
    // A NaN exponent only ever scales a NaN, but converting it would be undefined.
    const int32_t bits = (n.lane[l] == n.lane[l] ? static_cast<int32_t>(n.lane[l]) + 127 : 0) * (1 << 23);
    float r;
    std::memcpy(&r, &bits, sizeof r);
    return r;
  });
}
// x = mantissa * 2^exponent with a mantissa in [1, 2), for positive normal x.
HIVILT_INLINE Vec exponent_of(const Vec& v) {
  return map([&](int l) {
    uint32_t bits;
    std::memcpy(&bits, &v.lane[l], sizeof bits);
    return static_cast<float>(static_cast<int32_t>(bits >> 23) - 127);
  });
}
HIVILT_INLINE Vec mantissa_of(const Vec& v) {
  return map([&](int l) {
    uint32_t bits;
    std::memcpy(&bits, &v.lane[l], sizeof bits);
    bits = (bits & 0x7fffff) | 0x3f800000;
    float r;
    std::memcpy(&r, &bits, sizeof r);
    return r;
  });
}
HIVILT_INLINE float widen_bf16(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float r;
  std::memcpy(&r, &bits, sizeof r);
  return r;
}
HIVILT_INLINE float widen_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t exponent = h >> 10 & 31, fraction = h & 1023;
  uint32_t bits;
  if (exponent == 0) {
    const float tiny = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
    std::memcpy(&bits, &tiny, sizeof bits);
    bits |= sign;
  } else {
    bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
  }
  float r;
  std::memcpy(&r, &bits, sizeof r);
  return r;
}
HIVILT_INLINE Vec load_bf16(const uint16_t* p) {
  return map([&](int l) { return widen_bf16(p[l]); });
}
// Unsigned integers.
HIVILT_INLINE Vec load_u16(const uint16_t* p) {
  return map([&](int l) { return static_cast<float>(p[l]); });
}
HIVILT_INLINE Vec load_f16(const uint16_t* p) {
  return map([&](int l) { return widen_f16(p[l]); });
}
HIVILT_INLINE uint16_t narrow_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}
HIVILT_INLINE uint16_t narrow_f16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x47800000 - 0x1000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {
    // Subnormal: adding 2^-1 * 2^-14 * 2^24-scaled one lets the fp32 adder round to the half's grid.
    float tiny;
    std::memcpy(&tiny, &magnitude, sizeof tiny);
    const float shifted = tiny + 0.5f;
    uint32_t grid;
    std::memcpy(&grid, &shifted, sizeof grid);
    return sign | static_cast<uint16_t>(grid - 0x3f000000);
  }
  return sign | static_cast<uint16_t>((magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13);
}
// To nearest, ties to even; NaN stays NaN.
HIVILT_INLINE void store_bf16(uint16_t* p, const Vec& v) {
  for (int l = 0; l < kLanes; ++l) p[l] = narrow_bf16(v.lane[l]);
}
HIVILT_INLINE void store_f16(uint16_t* p, const Vec& v) {
  for (int l = 0; l < kLanes; ++l) p[l] = narrow_f16(v.lane[l]);
}
// Whole numbers of at most 127; of NaN anything.
HIVILT_INLINE void store_bytes(int8_t* p, const Vec& v) {
  for (int l = 0; l < kLanes; ++l) {
    p[l] = static_cast<int8_t>(v.lane[l] >= -127.0f && v.lane[l] <= 127.0f ? v.lane[l] : 0.0f);
  }
}

}  // namespace hivilt::HIVILT_ISA
