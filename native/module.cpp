// The module: which levels there are, which is in use, and the kernels of each binding file.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "bind.h"

namespace cloister {

namespace portable { extern const Kernels kernels; }
#ifdef CLOISTER_HAS_avx2
namespace avx2 { extern const Kernels kernels; }
#endif
#ifdef CLOISTER_HAS_avx512
namespace avx512 { extern const Kernels kernels; }
#endif

namespace {

// Best first; only what this machine has.
std::vector<const Kernels *> available() {
  std::vector<const Kernels *> found;
#ifdef CLOISTER_HAS_avx512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2"))
    found.push_back(&avx512::kernels);
#endif
#ifdef CLOISTER_HAS_avx2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    found.push_back(&avx2::kernels);
#endif
  found.push_back(&portable::kernels);
  return found;
}

const Kernels *current = available().front();

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (const Kernels *level : available()) names.emplace_back(level->name);
  return names;
}

void use_level(const std::string &name) {
  for (const Kernels *level : available()) {
    if (name == level->name) {
      current = level;
      return;
    }
  }
  throw std::invalid_argument("no such level on this machine: " + name);
}

}  // namespace

const Kernels &kernels() { return *current; }

}  // namespace cloister

NB_MODULE(_native, module) {
  using namespace cloister;
  module.doc() = "Kernels of the enclave. Shapes, types and who may see what: _native.pyi.";
  module.def("levels", &levels);
  module.def("level", [] { return std::string(kernels().name); });
  module.def("use_level", &use_level, nb::arg("name"));
  bind_mask(module);
  bind_lattice(module);
}
