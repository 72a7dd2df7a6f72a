// dyndepth._C: importing it registers the ops of csrc/cpu under torch.ops.dyndepth_cpp (static initialisers in those
// files); the module itself only tells how it was built.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <string>

#include "common/simd.h"
#include "cpu/amx.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// What DYN_BEST (csrc/common/simd.h) and the bf16 products (csrc/cpu/amx.h) pick on this machine.
std::string instruction_set() {
  const std::string tiles = dyndepth::amx_usable() ? ", AMX tiles for bfloat16" : "";
  switch (dyndepth::simd_level()) {
    case 5:
      return "x86-64-v4 (AVX-512) with bfloat16 dot products" + tiles;
    case 4:
      return "x86-64-v4 (AVX-512)" + tiles;
    case 3:
      return "x86-64-v3 (AVX2)" + tiles;
    default:
      return "baseline of the build target" + tiles;
  }
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ providers of dyndepth's ops (torch.ops.dyndepth_cpp) and facts about this build.";
  module.def("build_facts", [] {
    py::dict facts;
    facts["compiler"] = compiler();
    facts["instruction_set"] = instruction_set();
    facts["multiplies_bfloat16"] = dyndepth::amx_usable() || dyndepth::simd_level() == 5;
    facts["torch_built_with"] = std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR) + "." +
                                std::to_string(TORCH_VERSION_PATCH);
    facts["torch_abi_target"] = "2.10 (stable ABI)";
    return facts;
  });
}
