// Everything that one instruction set offers.
#pragma once

#include "core/attention_problem.h"
#include "core/bank_problem.h"
#include "core/contrast_problem.h"
#include "core/fusion_problem.h"
#include "core/pool_problem.h"

namespace hivilt {

struct KernelTables {
  const char* name;
  AttentionKernels attention;
  FusionKernels fusion;
  PoolKernels pool;
  BankKernels bank;
  ContrastKernels contrast;
};

}  // namespace hivilt
