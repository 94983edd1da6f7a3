// Python's view of the kernels. Arrays are checked here, once; the interpreter's lock is released while a kernel runs.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;

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

using Bytes = nb::ndarray<uint8_t, nb::numpy, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const uint8_t, nb::numpy, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const char *what) {
  if (!condition) throw std::invalid_argument(what);
}

std::vector<uint32_t> replace_rejected(Bytes row, uint32_t modulus, ConstBytes spares) {
  const size_t n_groups = (row.shape(0) + 1023) / 1024;
  require(modulus >= 129 && modulus <= 256, "modulus");
  require(spares.shape(0) == n_groups * 64, "spares");
  std::vector<uint32_t> lacking(n_groups);
  size_t n_lacking = 0;
  {
    nb::gil_scoped_release unlocked;
    n_lacking = current->replace_rejected(row.data(), row.shape(0), modulus, spares.data(), lacking.data());
  }
  lacking.resize(n_lacking);
  return lacking;
}

}  // namespace
}  // namespace cloister

NB_MODULE(_native, module) {
  using namespace cloister;
  module.doc() = "Kernels of the enclave. Shapes, types and who may see what: _native.pyi.";
  module.def("levels", &levels);
  module.def("level", [] { return std::string(current->name); });
  module.def("use_level", &use_level, nb::arg("name"));
  module.def("replace_rejected", &replace_rejected, nb::arg("row"), nb::arg("modulus"), nb::arg("spares"));
}
