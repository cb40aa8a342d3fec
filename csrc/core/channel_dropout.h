// Dropout of channels: one Philox call (core/philox.h) for eight neighbours, of which each takes 16 bits.
#pragma once

#include <cstdint>

namespace hivilt {

struct ChannelDropout {
  bool active = false;
  uint32_t threshold = 0;  // 16 bits below it are dropped
  float scale = 1.0f;      // of a kept element: the reciprocal of the exact keep probability
  uint32_t key_lo = 0, key_hi = 0;
};

}  // namespace hivilt
