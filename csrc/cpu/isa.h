// The kernel tables for this processor: the widest compiled ISA that it supports, capped by HIVILT_ISA.
#pragma once

#include "core/kernel_tables.h"

namespace hivilt {

const KernelTables& kernels();

}  // namespace hivilt
