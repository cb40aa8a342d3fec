// One vector of fp32 per instruction set, under one set of names, so that every kernel body is written once.
// Each file in cpu/isa/ defines HIVILT_ISA (a namespace) and one HIVILT_SIMD_* switch before including this.
// Masks travel as plain bit sets (bit l = lane l): they popcount, compress and branch alike everywhere.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/inline.h"

#if defined(HIVILT_SIMD_AVX2) || defined(HIVILT_SIMD_AVX512)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own _mm512_undefined_ps and friends trip this (gcc.gnu.org bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#endif

namespace hivilt::HIVILT_ISA {

constexpr float kInf = __builtin_inff();
constexpr float kLowest = -3.402823466e+38f;

HIVILT_INLINE int popcount(uint32_t bits) {
  return __builtin_popcount(bits);
}

template <class T>
HIVILT_INLINE T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
HIVILT_INLINE T larger(T a, T b) {
  return a < b ? b : a;
}
HIVILT_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

#if defined(HIVILT_SIMD_AVX512) || defined(HIVILT_SIMD_AVX2)
// Eight horizontal sums at once: a transposing tree costs a third of eight single ones.
HIVILT_INLINE void sum8_halves(const __m256 (&a)[8], float* out) {
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
  _mm256_storeu_ps(out,
                   _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)));
}
#endif

#if defined(HIVILT_SIMD_AVX512)
// 16 lanes, 32 registers
using Vec = __m512;
constexpr int kLanes = 16;
constexpr int kTileRows = 12;  // 12 x 2 accumulators + 2 operands + 1 broadcast of 32 registers
constexpr int kTileVecs = 2;
constexpr int kGatherVecs = 8;

HIVILT_INLINE Vec load(const float* p) {
  return _mm512_loadu_ps(p);
}
HIVILT_INLINE void store(float* p, Vec v) {
  _mm512_storeu_ps(p, v);
}
HIVILT_INLINE Vec splat(float x) {
  return _mm512_set1_ps(x);
}
HIVILT_INLINE Vec add(Vec a, Vec b) {
  return _mm512_add_ps(a, b);
}
HIVILT_INLINE Vec sub(Vec a, Vec b) {
  return _mm512_sub_ps(a, b);
}
HIVILT_INLINE Vec mul(Vec a, Vec b) {
  return _mm512_mul_ps(a, b);
}
HIVILT_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return _mm512_fmadd_ps(a, b, c);
}
// max and min return the second operand when either is NaN.
HIVILT_INLINE Vec max(Vec a, Vec b) {
  return _mm512_max_ps(a, b);
}
HIVILT_INLINE Vec min(Vec a, Vec b) {
  return _mm512_min_ps(a, b);
}
HIVILT_INLINE uint32_t mask_ge(Vec a, Vec b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
}
HIVILT_INLINE uint32_t mask_gt(Vec a, Vec b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
}
HIVILT_INLINE uint32_t mask_nan(Vec a) {
  return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
}
// Lane l of a where the byte m[l] is non-zero, of b elsewhere.
HIVILT_INLINE Vec blend_bytes(const uint8_t* m, Vec a, Vec b) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(m));
  return _mm512_mask_blend_ps(_mm_test_epi8_mask(bytes, bytes), b, a);
}
// a where a > floor, otherwise (NaN included) b.
HIVILT_INLINE Vec above_or(Vec a, Vec floor, Vec b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, floor, _CMP_GT_OQ), b, a);
}
// c where a < floor, otherwise (NaN included) b.
HIVILT_INLINE Vec below_or(Vec a, Vec floor, Vec b, Vec c) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, floor, _CMP_LT_OQ), b, c);
}
HIVILT_INLINE float sum(Vec v) {
  return _mm512_reduce_add_ps(v);
}
// out[i] = sum of the lanes of a[i].
HIVILT_INLINE void sum8(const Vec (&a)[8], float* out) {
  __m256 r[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_add_ps(_mm512_castps512_ps256(a[i]), _mm512_extractf32x8_ps(a[i], 1));
  sum8_halves(r, out);
}
HIVILT_INLINE float max_of(Vec v) {
  return _mm512_reduce_max_ps(v);
}
HIVILT_INLINE float min_of(Vec v) {
  return _mm512_reduce_min_ps(v);
}
// Per-lane counters.
using Count = __m512i;
HIVILT_INLINE Count no_count() {
  return _mm512_setzero_si512();
}
HIVILT_INLINE Count count_ge(Count n, Vec a, Vec b) {
  return _mm512_mask_add_epi32(n, _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), n, _mm512_set1_epi32(1));
}
HIVILT_INLINE Vec as_floats(Count n) {
  return _mm512_cvtepi32_ps(n);
}
// x where a >= b, otherwise (NaN included) y.
HIVILT_INLINE Vec where_ge(Vec a, Vec b, Vec x, Vec y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), y, x);
}
HIVILT_INLINE Vec div(Vec a, Vec b) {
  return _mm512_div_ps(a, b);
}
// Whole vectors are written; the lanes behind the popcount are garbage for the next write to cover.
// Compressing in a register and storing that: the memory form is microcoded on Zen 4.
HIVILT_INLINE void compress(float* p, Vec v, uint32_t bits) {
  _mm512_storeu_ps(p, _mm512_mask_compress_ps(v, static_cast<__mmask16>(bits), v));
}
HIVILT_INLINE void compress_iota(int32_t* p, int32_t base, uint32_t bits) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32(base));
  _mm512_storeu_si512(p, _mm512_mask_compress_epi32(index, static_cast<__mmask16>(bits), index));
}
HIVILT_INLINE void compress_index(int32_t* p, const int32_t* index, uint32_t bits) {
  const __m512i v = _mm512_loadu_si512(index);
  _mm512_storeu_si512(p, _mm512_mask_compress_epi32(v, static_cast<__mmask16>(bits), v));
}
HIVILT_INLINE Vec round_even(Vec v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// 2^n for whole n in [-126, 127].
HIVILT_INLINE Vec power_of_two(Vec n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
HIVILT_INLINE Vec load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
HIVILT_INLINE Vec load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
HIVILT_INLINE void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}
#if defined(HIVILT_SIMD_BF16_DOT)
constexpr bool kBf16Dot = true;
// c + a.lo * b.lo + a.hi * b.hi per lane, the operands being pairs of bf16 in one 32-bit lane.
HIVILT_INLINE Vec dot_bf16(Vec a, Vec b, Vec c) {
  __m512bh x, y;
  std::memcpy(&x, &a, 64);
  std::memcpy(&y, &b, 64);
  return _mm512_dpbf16_ps(c, x, y);
}
#else
constexpr bool kBf16Dot = false;
#endif

#elif defined(HIVILT_SIMD_AVX2)
// 8 lanes, 16 registers
using Vec = __m256;
constexpr int kLanes = 8;
constexpr int kTileRows = 6;  // 6 x 2 accumulators + 2 operands + 1 broadcast of 16 registers
constexpr int kTileVecs = 2;
constexpr int kGatherVecs = 8;
constexpr bool kBf16Dot = false;

HIVILT_INLINE Vec load(const float* p) {
  return _mm256_loadu_ps(p);
}
HIVILT_INLINE void store(float* p, Vec v) {
  _mm256_storeu_ps(p, v);
}
HIVILT_INLINE Vec splat(float x) {
  return _mm256_set1_ps(x);
}
HIVILT_INLINE Vec add(Vec a, Vec b) {
  return _mm256_add_ps(a, b);
}
HIVILT_INLINE Vec sub(Vec a, Vec b) {
  return _mm256_sub_ps(a, b);
}
HIVILT_INLINE Vec mul(Vec a, Vec b) {
  return _mm256_mul_ps(a, b);
}
HIVILT_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return _mm256_fmadd_ps(a, b, c);
}
HIVILT_INLINE Vec max(Vec a, Vec b) {
  return _mm256_max_ps(a, b);
}
HIVILT_INLINE Vec min(Vec a, Vec b) {
  return _mm256_min_ps(a, b);
}
HIVILT_INLINE uint32_t mask_ge(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ));
}
HIVILT_INLINE uint32_t mask_gt(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
HIVILT_INLINE uint32_t mask_nan(Vec a) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}
HIVILT_INLINE Vec blend_bytes(const uint8_t* m, Vec a, Vec b) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(m)));
  return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_cmpeq_epi32(wide, _mm256_setzero_si256())));
}
HIVILT_INLINE Vec above_or(Vec a, Vec floor, Vec b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(a, floor, _CMP_GT_OQ));
}
HIVILT_INLINE Vec below_or(Vec a, Vec floor, Vec b, Vec c) {
  return _mm256_blendv_ps(b, c, _mm256_cmp_ps(a, floor, _CMP_LT_OQ));
}
HIVILT_INLINE float sum(Vec v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
HIVILT_INLINE void sum8(const Vec (&a)[8], float* out) {
  sum8_halves(a, out);
}
HIVILT_INLINE float max_of(Vec v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
HIVILT_INLINE float min_of(Vec v) {
  __m128 x = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_min_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_min_ss(x, _mm_movehdup_ps(x)));
}
using Count = __m256i;
HIVILT_INLINE Count no_count() {
  return _mm256_setzero_si256();
}
HIVILT_INLINE Count count_ge(Count n, Vec a, Vec b) {
  return _mm256_sub_epi32(n, _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}
HIVILT_INLINE Vec as_floats(Count n) {
  return _mm256_cvtepi32_ps(n);
}
HIVILT_INLINE Vec where_ge(Vec a, Vec b, Vec x, Vec y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GE_OQ));
}
HIVILT_INLINE Vec div(Vec a, Vec b) {
  return _mm256_div_ps(a, b);
}

// Row b lists the set bits of the byte b, one byte each: AVX2 has no compress instruction.
struct CompressTable {
  uint64_t row[256];
  constexpr CompressTable() : row{} {
    for (int b = 0; b < 256; ++b) {
      int n = 0;
      for (int l = 0; l < 8; ++l) {
        if (b >> l & 1) row[b] |= static_cast<uint64_t>(l) << (8 * n++);
      }
    }
  }
};
static constexpr CompressTable kCompress;

HIVILT_INLINE __m256i compress_order(uint32_t bits) {
  return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(kCompress.row[bits])));
}
HIVILT_INLINE void compress(float* p, Vec v, uint32_t bits) {
  _mm256_storeu_ps(p, _mm256_permutevar8x32_ps(v, compress_order(bits)));
}
HIVILT_INLINE void compress_iota(int32_t* p, int32_t base, uint32_t bits) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_add_epi32(compress_order(bits), _mm256_set1_epi32(base)));
}
HIVILT_INLINE void compress_index(int32_t* p, const int32_t* index, uint32_t bits) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(v, compress_order(bits)));
}
HIVILT_INLINE Vec round_even(Vec v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
HIVILT_INLINE Vec power_of_two(Vec n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
HIVILT_INLINE Vec load_bf16(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
HIVILT_INLINE Vec load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
HIVILT_INLINE void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}

#else
// Portable: any compiler target, 16 lanes as AVX-512
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
HIVILT_INLINE uint32_t mask_nan(const Vec& a) {
  return bits_where([&](int l) { return a.lane[l] != a.lane[l]; });
}
HIVILT_INLINE Vec blend_bytes(const uint8_t* m, const Vec& a, const Vec& b) {
  return map([&](int l) { return m[l] ? a.lane[l] : b.lane[l]; });
}
HIVILT_INLINE Vec above_or(const Vec& a, const Vec& floor, const Vec& b) {
  return map([&](int l) { return a.lane[l] > floor.lane[l] ? a.lane[l] : b.lane[l]; });
}
HIVILT_INLINE Vec below_or(const Vec& a, const Vec& floor, const Vec& b, const Vec& c) {
  return map([&](int l) { return a.lane[l] < floor.lane[l] ? c.lane[l] : b.lane[l]; });
}
HIVILT_INLINE float sum(const Vec& v) {
  float r = 0;
  for (int l = 0; l < kLanes; ++l) r += v.lane[l];
  return r;
}
HIVILT_INLINE void sum8(const Vec (&a)[8], float* out) {
  for (int i = 0; i < 8; ++i) out[i] = sum(a[i]);
}
HIVILT_INLINE float max_of(const Vec& v) {
  float r = v.lane[0];
  for (int l = 1; l < kLanes; ++l) r = larger(r, v.lane[l]);
  return r;
}
HIVILT_INLINE float min_of(const Vec& v) {
  float r = v.lane[0];
  for (int l = 1; l < kLanes; ++l) r = smaller(r, v.lane[l]);
  return r;
}
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
HIVILT_INLINE Vec where_ge(const Vec& a, const Vec& b, const Vec& x, const Vec& y) {
  return map([&](int l) { return a.lane[l] >= b.lane[l] ? x.lane[l] : y.lane[l]; });
}
HIVILT_INLINE Vec div(const Vec& a, const Vec& b) {
  return map([&](int l) { return a.lane[l] / b.lane[l]; });
}
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
HIVILT_INLINE Vec power_of_two(const Vec& n) {
  return map([&](int l) {
    // A NaN exponent only ever scales a NaN, but converting it would be undefined.
    const int32_t bits = (n.lane[l] == n.lane[l] ? static_cast<int32_t>(n.lane[l]) + 127 : 0) * (1 << 23);
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
HIVILT_INLINE Vec load_f16(const uint16_t* p) {
  return map([&](int l) { return widen_f16(p[l]); });
}
HIVILT_INLINE void prefetch(const void*) {}
#endif

// e^x, within 2 ulp; 0 below -87.33 (so e^-inf = 0 exactly), NaN in gives NaN out.
// Cody-Waite reduction by ln 2 in two parts, then a degree-5 minimax polynomial for (e^r - 1 - r) / r^2.
HIVILT_INLINE Vec exp(Vec x) {
  const Vec floor = splat(-87.33f);
  const Vec y = min(splat(88.37f), x);  // operand order: NaN stays
  const Vec z = max(floor, y);
  const Vec n = round_even(mul(z, splat(1.44269504088896341f)));
  Vec r = fma(n, splat(-0.693359375f), z);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), splat(1.0f));
  return below_or(y, floor, mul(p, power_of_two(n)), splat(0.0f));
}

}  // namespace hivilt::HIVILT_ISA
