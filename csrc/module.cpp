// hivilt._C: what this build holds and what this CPU offers. Host-side facts only: no operators, no tensors, no torch.
// Nothing depends on it: without it `python -m hivilt.info` reads _build_info.json and says less about the CPU.
#include <pybind11/pybind11.h>

#include <string>
#include <string_view>

namespace py = pybind11;

namespace {

py::list split(std::string_view text, char separator) {
  py::list parts;
  while (!text.empty()) {
    const size_t end = text.find(separator);
    parts.append(py::str(std::string(text.substr(0, end))));
    if (end == std::string_view::npos) break;
    text.remove_prefix(end + 1);
  }
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = HIVILT_VERSION;
  info["torch_target"] = HIVILT_TORCH_TARGET;
#if defined(__clang__)
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["isas"] = split(HIVILT_ISAS, ',');
  info["flags"] = split(HIVILT_FLAGS, ' ');
  info["cuda_archs"] = py::list();
  return info;
}

py::list cpu_features() {
  py::list features;
#if defined(__x86_64__) && defined(__GNUC__)
  // __builtin_cpu_supports takes a literal only, and also asks whether the operating system saves the wide registers.
#define HIVILT_FEATURE(name) \
  if (__builtin_cpu_supports(name)) features.append(py::str(name))
  HIVILT_FEATURE("avx2");
  HIVILT_FEATURE("fma");
  HIVILT_FEATURE("f16c");
  HIVILT_FEATURE("bmi");
  HIVILT_FEATURE("bmi2");
  HIVILT_FEATURE("popcnt");
  HIVILT_FEATURE("avx512f");
  HIVILT_FEATURE("avx512bw");
  HIVILT_FEATURE("avx512dq");
  HIVILT_FEATURE("avx512vl");
  HIVILT_FEATURE("avx512vnni");
  HIVILT_FEATURE("avx512bf16");
#undef HIVILT_FEATURE
#endif
  return features;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build information and CPU features of hivilt.";
  module.def("build_info", &build_info,
             "What this build holds: version, torch target, compiler, isas, flags, cuda_archs.");
  module.def("cpu_features", &cpu_features, "Instruction set extensions of this CPU that the kernels know, by name.");
}
