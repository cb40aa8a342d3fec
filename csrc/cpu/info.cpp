// What torch can ask about the library.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/isa.h"

namespace hivilt {
namespace {

std::string isa() {
  return kernels().name;
}

}  // namespace
}  // namespace hivilt

STABLE_TORCH_LIBRARY_IMPL(hivilt, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&hivilt::isa));
}
