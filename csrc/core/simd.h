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

}  // namespace hivilt::HIVILT_ISA

#if defined(HIVILT_SIMD_AVX512)
#include "core/simd_avx512.h"
#elif defined(HIVILT_SIMD_AVX2)
#include "core/simd_avx2.h"
#else
#include "core/simd_scalar.h"
#endif

namespace hivilt::HIVILT_ISA {

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

// log x of positive normal x, within 2 ulp; NaN in gives NaN out. x = m 2^n with m in [1/sqrt(2), sqrt(2)), then a
// degree-8 minimax polynomial for (log(1 + f) - f + f^2/2) / f^3, f = m - 1 (Cephes logf).
HIVILT_INLINE Vec log(Vec x) {
  const Vec root2 = splat(1.41421356f), one = splat(1.0f), half = splat(0.5f);
  Vec m = mantissa_of(x), n = exponent_of(x);
  n = where_ge(m, root2, add(n, one), n);
  m = where_ge(m, root2, mul(m, half), m);
  const Vec f = sub(m, one), f2 = mul(f, f);
  Vec p = splat(7.0376836292e-2f);
  p = fma(p, f, splat(-1.1514610310e-1f));
  p = fma(p, f, splat(1.1676998740e-1f));
  p = fma(p, f, splat(-1.2420140846e-1f));
  p = fma(p, f, splat(1.4249322787e-1f));
  p = fma(p, f, splat(-1.6668057665e-1f));
  p = fma(p, f, splat(2.0000714765e-1f));
  p = fma(p, f, splat(-2.4999993993e-1f));
  p = fma(p, f, splat(3.3333331174e-1f));
  p = mul(mul(p, f), f2);
  p = fma(n, splat(-2.12194440e-4f), p);
  p = fma(f2, splat(-0.5f), p);
  return add(fma(n, splat(0.693359375f), add(f, p)), sub(x, x));
}

}  // namespace hivilt::HIVILT_ISA
