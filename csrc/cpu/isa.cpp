// One cpuid look at first use; HIVILT_ISA (scalar | avx2 | avx512 | avx512_bf16) caps the choice.
#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace hivilt {

namespace scalar {
extern const KernelTables kernels;
}
namespace avx2 {
extern const KernelTables kernels;
}
namespace avx512 {
extern const KernelTables kernels;
}
namespace avx512_bf16 {
extern const KernelTables kernels;
}

namespace {

struct Candidate {
  const char* name;
  const KernelTables* table;  // null: not compiled
  bool supported;
};

const KernelTables& choose() {
  bool has_avx2 = false, has_avx512 = false, has_bf16 = false;
#if defined(__x86_64__)
  has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
             __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#endif
  const KernelTables *avx2_table = nullptr, *avx512_table = nullptr, *bf16_table = nullptr;
#if defined(HIVILT_HAVE_AVX2)
  avx2_table = &avx2::kernels;
#endif
#if defined(HIVILT_HAVE_AVX512)
  avx512_table = &avx512::kernels;
#endif
#if defined(HIVILT_HAVE_AVX512_BF16)
  bf16_table = &avx512_bf16::kernels;
#endif
  const Candidate candidates[] = {
      {"scalar", &scalar::kernels, true},
      {"avx2", avx2_table, has_avx2},
      {"avx512", avx512_table, has_avx512},
      {"avx512_bf16", bf16_table, has_bf16},
  };
  const char* cap = std::getenv("HIVILT_ISA");
  if (cap && !*cap) cap = nullptr;
  const KernelTables* best = nullptr;
  bool known = cap == nullptr;
  for (const Candidate& c : candidates) {
    if (c.table && c.supported) best = c.table;
    if (cap && std::strcmp(cap, c.name) == 0) {
      known = true;
      break;
    }
  }
  if (!known) {
    throw std::runtime_error(std::string("hivilt.ValueError: HIVILT_ISA: expected scalar, avx2, avx512 or avx512_bf16,"
                                         " got ") +
                             cap);
  }
  return *best;
}

}  // namespace

const KernelTables& kernels() {
  static const KernelTables& table = choose();
  return table;
}

}  // namespace hivilt
