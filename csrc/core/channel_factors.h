// The factors 0 or `scale` of a row of channels: vectors of Philox counters at a time.
#pragma once

#include "core/channel_dropout.h"
#include "core/simd.h"

namespace hivilt::HIVILT_ISA {

constexpr int64_t kCounters = 16;
constexpr int64_t kFactorStep = 8 * kCounters;  // channels drawn at a time

// factors of channels [0, width) of token n of image b, written in steps of kFactorStep.
inline void channel_factors(const ChannelDropout& dropout, int64_t b, int64_t n, int64_t width, float* factors) {
  const Vec threshold = splat(static_cast<float>(dropout.threshold)), scale = splat(dropout.scale);
  for (int64_t first = 0; first < width; first += kFactorStep) {
    // Counter (channel / 8, n, 0, b).
    alignas(64) uint32_t x0[kCounters], x1[kCounters], x2[kCounters], x3[kCounters];
    for (int64_t l = 0; l < kCounters; ++l) {
      x0[l] = static_cast<uint32_t>(first / 8 + l);
      x1[l] = static_cast<uint32_t>(n);
      x2[l] = 0;
      x3[l] = static_cast<uint32_t>(b);
    }
    uint32_t k0 = dropout.key_lo, k1 = dropout.key_hi;
    for (int round = 0; round < 10; ++round) {
      for (int64_t l = 0; l < kCounters; ++l) {
        const uint64_t p0 = uint64_t{0xD2511F53} * x0[l], p1 = uint64_t{0xCD9E8D57} * x2[l];
        x0[l] = static_cast<uint32_t>(p1 >> 32) ^ x1[l] ^ k0;
        x1[l] = static_cast<uint32_t>(p1);
        x2[l] = static_cast<uint32_t>(p0 >> 32) ^ x3[l] ^ k1;
        x3[l] = static_cast<uint32_t>(p0);
      }
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    // Word w of counter l serves channels 8 l + 2 w (its low half) and 8 l + 2 w + 1.
    alignas(64) uint16_t halves[kFactorStep];
    for (int64_t l = 0; l < kCounters; ++l) {
      const uint32_t words[4] = {x0[l], x1[l], x2[l], x3[l]};
      for (int64_t w = 0; w < 4; ++w) {
        halves[8 * l + 2 * w] = static_cast<uint16_t>(words[w]);
        halves[8 * l + 2 * w + 1] = static_cast<uint16_t>(words[w] >> 16);
      }
    }
    for (int64_t c = 0; c < kFactorStep; c += kLanes) {
      store(factors + first + c, where_ge(load_u16(halves + c), threshold, scale, splat(0.0f)));
    }
  }
}

}  // namespace hivilt::HIVILT_ISA
