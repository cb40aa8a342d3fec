// Element types of the callers' tensors.
#pragma once

#include <cstdint>

#include "core/inline.h"

namespace hivilt {

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

HIVILT_INLINE int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

}  // namespace hivilt
