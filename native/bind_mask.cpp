// Python's view of the kernels of pads and masks. Arrays are checked here, once; the lock of the interpreter is released
// while a kernel runs.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>
#include <vector>

#include "bind.h"

namespace cloister {

namespace {

using F32 = Array<const float, 1>;
using U64 = Array<const uint64_t, 1>;

Ring ring_of(int code) {
  require(code == 0 || code == 1, "a ring is 0 (faithful) or 1 (fast)");
  return static_cast<Ring>(code);
}

size_t planes_of(Ring ring) { return ring == Ring::faithful ? 4 : 3; }

template <typename A>
bool has_shape(const A &array, std::initializer_list<size_t> shape) {
  size_t axis = 0;
  for (const size_t n : shape)
    if (array.shape(axis++) != n) return false;
  return axis == array.ndim();
}

template <typename A>
auto data_or_null(const std::optional<A> &array) { return array ? array->data() : nullptr; }

template <typename A>
void zero(const A &array) { std::memset(array.data(), 0, array.nbytes()); }

std::vector<uint32_t> replace_rejected(Array<uint8_t, 1> row, uint32_t modulus, Array<const uint8_t, 1> spares) {
  const size_t n_groups = (row.shape(0) + 1023) / 1024;
  require(modulus >= 129 && modulus <= 255, "bytes are rejected for a modulus of 129 to 255");
  require(spares.shape(0) == n_groups * 64, "there are 64 spares for each group of 1024");
  std::vector<uint32_t> lacking(n_groups);
  {
    nb::gil_scoped_release unlocked;
    lacking.resize(kernels().replace_rejected(row.data(), row.shape(0), static_cast<uint8_t>(modulus), spares.data(),
                                              lacking.data()));
  }
  return lacking;
}

bool mask(Array<const float, 2> x, std::optional<F32> fold, double room, Array<const uint8_t, 3> r, int code, U64 v,
          Array<int8_t, 3> planes, Array<double, 1> scales, Array<uint64_t, 1> sums) {
  const Ring ring = ring_of(code);
  const size_t tokens = x.shape(0), d = x.shape(1);
  require(room >= 1 && room <= 2147483647.0, "room is 1 to 2^31 - 1");  // so that x_q fits 32 bits
  require(!fold || has_shape(*fold, {d}), "fold is [features]");
  require(has_shape(r, {planes_of(ring), tokens, d}), "r is [planes, tokens, features]");
  require(has_shape(v, {d}), "v is [features]");
  require(has_shape(planes, {planes_of(ring), tokens, d}), "planes is [planes, tokens, features]");
  require(has_shape(scales, {tokens}) && has_shape(sums, {tokens}), "scales and sums are [tokens]");
  nb::gil_scoped_release unlocked;
  const bool is_finite = kernels().mask(x.data(), data_or_null(fold), room, r.data(), ring, v.data(), tokens, d,
                                        planes.data(), scales.data(), sums.data());
  if (!is_finite) {
    zero(planes);
    zero(scales);
    zero(sums);
  }
  return is_finite;
}

bool unmask(Array<const uint32_t, 2> answer, Array<const uint32_t, 2> u, int code, Array<const double, 1> scales,
            std::optional<F32> channel, std::optional<F32> bias, U64 rho, U64 expected, Array<float, 2> y) {
  const Ring ring = ring_of(code);
  const size_t tokens = answer.shape(0), out = answer.shape(1);
  require(has_shape(u, {tokens, out}), "u is [tokens, out]");
  require(has_shape(scales, {tokens}) && has_shape(expected, {tokens}), "scales and expected are [tokens]");
  require(!channel || has_shape(*channel, {out}), "channel is [out]");
  require(!bias || has_shape(*bias, {out}), "bias is [out]");
  require(has_shape(rho, {out}), "rho is [out]");
  require(has_shape(y, {tokens, out}), "y is [tokens, out]");
  nb::gil_scoped_release unlocked;
  const bool is_right = kernels().unmask(answer.data(), u.data(), ring, scales.data(), data_or_null(channel),
                                         data_or_null(bias), rho.data(), expected.data(), tokens, out, y.data());
  if (!is_right) zero(y);
  return is_right;
}

void encode_pad(Array<const uint8_t, 2> r, int code, Array<int8_t, 2> planes) {
  const Ring ring = ring_of(code);
  const size_t n = r.shape(1);
  require(has_shape(r, {planes_of(ring), n}), "r is [planes, n]");
  require(has_shape(planes, {planes_of(ring), n}), "planes is [planes, n]");
  nb::gil_scoped_release unlocked;
  kernels().encode_pad(r.data(), ring, n, planes.data());
}

void combine(Array<const int32_t, 2> acc, int code, Array<uint32_t, 1> out) {
  const Ring ring = ring_of(code);
  const size_t n = out.shape(0);
  require(has_shape(acc, {planes_of(ring), n}), "acc is [planes, n]");
  nb::gil_scoped_release unlocked;
  kernels().combine(acc.data(), ring, n, out.data());
}

}  // namespace

void bind_mask(nb::module_ &module) {
  module.def("replace_rejected", &replace_rejected, nb::arg("row").noconvert(), nb::arg("modulus"),
             nb::arg("spares").noconvert());
  module.def("mask", &mask, nb::arg("x").noconvert(), nb::arg("fold").noconvert().none(), nb::arg("room"),
             nb::arg("r").noconvert(), nb::arg("ring"), nb::arg("v").noconvert(), nb::arg("planes").noconvert(),
             nb::arg("scales").noconvert(), nb::arg("sums").noconvert());
  module.def("unmask", &unmask, nb::arg("answer").noconvert(), nb::arg("u").noconvert(), nb::arg("ring"),
             nb::arg("scales").noconvert(), nb::arg("channel").noconvert().none(), nb::arg("bias").noconvert().none(),
             nb::arg("rho").noconvert(), nb::arg("expected").noconvert(), nb::arg("y").noconvert());
  module.def("encode_pad", &encode_pad, nb::arg("r").noconvert(), nb::arg("ring"), nb::arg("planes").noconvert());
  module.def("combine", &combine, nb::arg("acc").noconvert(), nb::arg("ring"), nb::arg("out").noconvert());
}

}  // namespace cloister
