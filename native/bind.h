// What the binding files share: array types, their checks, and the level in use.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

#include "kernels.h"

namespace nb = nanobind;

namespace cloister {

// C-contiguous numpy views. Bind each with .noconvert(): a converted copy would take what a kernel writes with it.
template <typename T, size_t n_dims>
using Array = nb::ndarray<T, nb::numpy, nb::ndim<n_dims>, nb::c_contig, nb::device::cpu>;

// The kernels of the level in use.
const Kernels &kernels();

inline void require(bool condition, const char *what) {
  if (!condition) throw std::invalid_argument(what);
}

void bind_mask(nb::module_ &module);
void bind_lattice(nb::module_ &module);

}  // namespace cloister
