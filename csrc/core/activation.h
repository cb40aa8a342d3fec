// Activations and their derivatives, a vector at a time.
#pragma once

#include "core/fusion_problem.h"
#include "core/simd.h"

namespace hivilt::HIVILT_ISA {

HIVILT_INLINE Vec abs(Vec x) {
  return max(sub(splat(0.0f), x), x);
}

// 1 / (1 + e^-x).
HIVILT_INLINE Vec sigmoid(Vec x) {
  return div(splat(1.0f), add(splat(1.0f), exp(sub(splat(0.0f), x))));
}

// The distribution function of the normal distribution, to 2e-7 of its value up to |x| = 13, and e^(-x^2 / 2).
// P(-t) = e^(-t^2/2) r(t) for t >= 0, r a polynomial of degree 8 in 1 / (1 + 0.3 t), fitted for the least relative
// error on [0, 14] (6e-8).
struct Normal {
  Vec distribution, bell;
};
HIVILT_INLINE Normal normal(Vec x) {
  const Vec t = abs(x), u = div(splat(1.0f), fma(splat(0.3f), t, splat(1.0f)));
  Vec r = splat(0.038378290832042694f);
  r = fma(r, u, splat(-0.16916611790657043f));
  r = fma(r, u, splat(0.22866007685661316f));
  r = fma(r, u, splat(-0.07650648057460785f));
  r = fma(r, u, splat(0.1425355225801468f));
  r = fma(r, u, splat(0.09468352049589157f));
  r = fma(r, u, splat(0.12192033976316452f));
  r = fma(r, u, splat(0.1194876879453659f));
  r = fma(r, u, splat(7.168875981733436e-06f));
  const Vec bell = exp(mul(mul(splat(-0.5f), t), t)), tail = mul(bell, r);
  return {where_ge(x, splat(0.0f), sub(splat(1.0f), tail), tail), bell};
}

// About 1 ulp: x + x^3 P(x^2) up to 1, P of degree 6 fitted for the least relative error (5e-9), and 1 - 2 / (e^(2x) +
// 1) above, where an error of the quotient counts a quarter.
HIVILT_INLINE Vec tanh(Vec x) {
  const Vec z = mul(x, x);
  Vec p = splat(-3.4973901347257197e-4f);
  p = fma(p, z, splat(2.273018704727292e-3f));
  p = fma(p, z, splat(-7.910237647593021e-3f));
  p = fma(p, z, splat(2.146446518599987e-2f));
  p = fma(p, z, splat(-5.387290939688683e-2f));
  p = fma(p, z, splat(0.13332246243953705f));
  p = fma(p, z, splat(-0.333332896232605f));
  const Vec near = fma(mul(p, z), x, x);
  const Vec size = abs(x), far = sub(splat(1.0f), div(splat(2.0f), add(exp(add(size, size)), splat(1.0f))));
  return below_or(size, splat(1.0f), where_ge(x, splat(0.0f), far, sub(splat(0.0f), far)), near);
}

constexpr float kTanhGelu = 0.7978845608028654f;  // sqrt(2 / pi)
constexpr float kTanhCube = 0.044715f;

template <Activation kActivation>
HIVILT_INLINE Vec activate(Vec x) {
  if constexpr (kActivation == Activation::kGelu) {
    return mul(x, normal(x).distribution);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    const Vec inner = mul(splat(2 * kTanhGelu), fma(mul(splat(kTanhCube), x), mul(x, x), x));
    return mul(x, sigmoid(inner));
  } else if constexpr (kActivation == Activation::kRelu) {
    return max(splat(0.0f), x);  // operand order: NaN stays
  } else if constexpr (kActivation == Activation::kSilu) {
    return mul(x, sigmoid(x));
  } else {
    return x;
  }
}

template <Activation kActivation>
HIVILT_INLINE Vec slope(Vec x) {
  const Vec one = splat(1.0f);
  if constexpr (kActivation == Activation::kGelu) {
    const Normal n = normal(x);
    return fma(mul(splat(0.3989422804014327f), x), n.bell, n.distribution);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    const Vec square = mul(x, x), s = sigmoid(mul(splat(2 * kTanhGelu), fma(mul(splat(kTanhCube), x), square, x)));
    const Vec inner = mul(splat(2 * kTanhGelu), fma(splat(3 * kTanhCube), square, one));
    return fma(mul(x, inner), mul(s, sub(one, s)), s);
  } else if constexpr (kActivation == Activation::kRelu) {
    return where_ge(splat(0.0f), x, splat(0.0f), one);
  } else if constexpr (kActivation == Activation::kSilu) {
    const Vec s = sigmoid(x);
    return fma(mul(x, s), sub(one, s), s);
  } else {
    return one;
  }
}

}  // namespace hivilt::HIVILT_ISA
