// The kernel table for this processor: the widest compiled ISA that it supports, capped by HIVILT_ISA.
#pragma once

#include "core/attention_problem.h"

namespace hivilt {

const Kernels& kernels();

}  // namespace hivilt
