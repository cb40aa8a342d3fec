// AVX2 with FMA and F16C. Names are explained in simd_scalar.h.
#pragma once

namespace hivilt::HIVILT_ISA {

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
HIVILT_INLINE uint32_t mask_not_le(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)));
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
HIVILT_INLINE Vec lane_sums(const Vec (&a)[kLanes]) {
  const Vec low = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  const Vec high = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
  return add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}
HIVILT_INLINE float max_of(Vec v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
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
HIVILT_INLINE Vec exponent_of(Vec v) {
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(_mm256_castps_si256(v), 23), _mm256_set1_epi32(127)));
}
HIVILT_INLINE Vec mantissa_of(Vec v) {
  return _mm256_or_ps(_mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffff))), splat(1.0f));
}
HIVILT_INLINE Vec load_bf16(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
HIVILT_INLINE Vec load_u16(const uint16_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
HIVILT_INLINE Vec load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
HIVILT_INLINE void store_bf16(uint16_t* p, Vec v) {
  const __m256i bits = _mm256_castps_si256(v), high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i half = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), quiet, nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
HIVILT_INLINE void store_f16(uint16_t* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
HIVILT_INLINE void store_bytes(int8_t* p, Vec v) {
  const __m256i whole = _mm256_cvtps_epi32(v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

}  // namespace hivilt::HIVILT_ISA
