// AVX-512 (F, BW, DQ, VL), with HIVILT_SIMD_BF16_DOT also its dot products of bf16 and of bytes. Names are explained in
// simd_scalar.h.
#pragma once

namespace hivilt::HIVILT_ISA {

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
HIVILT_INLINE uint32_t mask_not_le(Vec a, Vec b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ);
}
HIVILT_INLINE uint32_t mask_nan(Vec a) {
  return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
}
HIVILT_INLINE Vec blend_bytes(const uint8_t* m, Vec a, Vec b) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(m));
  return _mm512_mask_blend_ps(_mm_test_epi8_mask(bytes, bytes), b, a);
}
HIVILT_INLINE Vec above_or(Vec a, Vec floor, Vec b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, floor, _CMP_GT_OQ), b, a);
}
HIVILT_INLINE Vec below_or(Vec a, Vec floor, Vec b, Vec c) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, floor, _CMP_LT_OQ), b, c);
}
HIVILT_INLINE float sum(Vec v) {
  return _mm512_reduce_add_ps(v);
}
// A transposing tree costs a fifth of sixteen single sums.
HIVILT_INLINE Vec lane_sums(const Vec (&a)[kLanes]) {
  Vec quad[4];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const Vec* x = a + 4 * q;
    const Vec low = add(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const Vec high = add(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    quad[q] = add(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xee));
  }
  const Vec low = add(_mm512_shuffle_f32x4(quad[0], quad[1], 0x88), _mm512_shuffle_f32x4(quad[0], quad[1], 0xdd));
  const Vec high = add(_mm512_shuffle_f32x4(quad[2], quad[3], 0x88), _mm512_shuffle_f32x4(quad[2], quad[3], 0xdd));
  return add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}
HIVILT_INLINE float max_of(Vec v) {
  return _mm512_reduce_max_ps(v);
}
using Ints = __m512i;
using Count = Ints;
HIVILT_INLINE Count no_count() {
  return _mm512_setzero_si512();
}
HIVILT_INLINE Count count_ge(Count n, Vec a, Vec b) {
  return _mm512_mask_add_epi32(n, _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), n, _mm512_set1_epi32(1));
}
HIVILT_INLINE Vec as_floats(Count n) {
  return _mm512_cvtepi32_ps(n);
}
HIVILT_INLINE Vec where_ge(Vec a, Vec b, Vec x, Vec y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), y, x);
}
HIVILT_INLINE Vec div(Vec a, Vec b) {
  return _mm512_div_ps(a, b);
}
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
HIVILT_INLINE Vec power_of_two(Vec n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
HIVILT_INLINE Vec exponent_of(Vec v) {
  return _mm512_getexp_ps(v);
}
HIVILT_INLINE Vec mantissa_of(Vec v) {
  return _mm512_getmant_ps(v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
}
HIVILT_INLINE Vec load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
HIVILT_INLINE Vec load_u16(const uint16_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
HIVILT_INLINE Vec load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// The instruction of AVX512_BF16 takes subnormals for zero; see store_bf16_flushed.
HIVILT_INLINE void store_bf16(uint16_t* p, Vec v) {
  const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
  const __m512i half = _mm512_mask_blend_epi32(nan, _mm512_srli_epi32(up, 16), quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(half));
}
HIVILT_INLINE void store_f16(uint16_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
HIVILT_INLINE void store_bytes(int8_t* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
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
// store_bf16 in one instruction; what is subnormal, before or after, becomes zero.
HIVILT_INLINE void store_bf16_flushed(uint16_t* p, Vec v) {
  const __m256bh half = _mm512_cvtneps_pbh(v);
  std::memcpy(p, &half, 32);
}
// c + the sum of four products, unsigned bytes of a times signed bytes of b, per 32-bit lane.
HIVILT_INLINE Ints dot_bytes(Vec a, Vec b, Ints c) {
  // Not the intrinsic: GCC 12 keeps old and new sums apart, and a tile of them no longer fits the registers.
  asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  return c;
}
HIVILT_INLINE Ints splat_int(int32_t x) {
  return _mm512_set1_epi32(x);
}
#else
constexpr bool kBf16Dot = false;
#endif

}  // namespace hivilt::HIVILT_ISA
