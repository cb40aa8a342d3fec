// Philox4x32-10 (Salmon et al., SC'11): the keep-or-drop decision of dropout is a pure function of
// (seed, b, h, i, j), so forward, backward, any thread count and any batch neighbour agree on it.
#pragma once

#include <cstdint>

#include "core/inline.h"

namespace hivilt {

struct Dropout {
  bool active = false;
  uint64_t threshold = 0;  // a word below it is dropped; floor(p * 2^32)
  float scale = 1.0f;      // of a kept probability: 1 / (1 - p)
  uint32_t key_lo = 0, key_hi = 0;

  // Factors of keys 4 * (j / 4) ... + 3: 0 or `scale`. Counter (j / 4, i, h, b), one output word a key.
  HIVILT_INLINE void block(int64_t b, int64_t h, int64_t i, int64_t j, float* factors) const {
    auto x0 = static_cast<uint32_t>(j >> 2), x1 = static_cast<uint32_t>(i), x2 = static_cast<uint32_t>(h),
         x3 = static_cast<uint32_t>(b);
    uint32_t k0 = key_lo, k1 = key_hi;
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = uint64_t{0xD2511F53} * x0, p1 = uint64_t{0xCD9E8D57} * x2;
      x0 = static_cast<uint32_t>(p1 >> 32) ^ x1 ^ k0;
      x1 = static_cast<uint32_t>(p1);
      x2 = static_cast<uint32_t>(p0 >> 32) ^ x3 ^ k1;
      x3 = static_cast<uint32_t>(p0);
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    factors[0] = x0 >= threshold ? scale : 0.0f;
    factors[1] = x1 >= threshold ? scale : 0.0f;
    factors[2] = x2 >= threshold ? scale : 0.0f;
    factors[3] = x3 >= threshold ? scale : 0.0f;
  }
  // factors[t] of keys[t]: neighbours in the same block of four are drawn together.
  HIVILT_INLINE void factors(int64_t b, int64_t h, int64_t i, const int32_t* keys, int64_t n, float* out) const {
    float four[4] = {};
    int64_t drawn = -1;
    for (int64_t t = 0; t < n; ++t) {
      if (keys[t] >> 2 != drawn) {
        drawn = keys[t] >> 2;
        block(b, h, i, keys[t], four);
      }
      out[t] = four[keys[t] & 3];
    }
  }
};

}  // namespace hivilt
