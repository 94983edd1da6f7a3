// Python's view of the kernels of the lattice pad, and the tables of its primes; spec/pad.md, "Homomorphic pads".
#include <nanobind/stl/optional.h>

#include <array>
#include <memory>
#include <new>
#include <optional>

#include "bind.h"

namespace cloister {

namespace {

constexpr size_t n = lattice_degree;

uint32_t power(uint64_t base, uint64_t exponent, uint64_t q) {
  uint64_t found = 1;
  for (; exponent != 0; exponent /= 2, base = base * base % q) {
    if (exponent % 2) found = found * base % q;
  }
  return static_cast<uint32_t>(found);
}

uint32_t inverse(uint64_t x, uint32_t q) { return power(x % q, q - 2, q); }

LatticeRoot root(uint64_t value, const LatticePrime &prime) {
  const uint32_t w = static_cast<uint32_t>((value << 32) % prime.q);
  return {w, w * prime.negative_inverse};
}

// `other` is the other prime of Q, or 1.
LatticePrime make_prime(uint32_t q, uint32_t psi, uint64_t p, uint32_t other) {
  LatticePrime prime{};
  prime.q = q;
  uint32_t found = q;
  for (int step = 0; step < 4; ++step) found *= 2 - q * found;
  prime.negative_inverse = 0u - found;
  const uint64_t word = (uint64_t{1} << 32) % q;
  prime.square = static_cast<uint32_t>(word * word % q);
  const uint64_t positive = p % q * inverse(n, q) % q * inverse(other, q) % q;
  prime.scale = static_cast<uint32_t>((q - positive) * prime.square % q);
  for (size_t i = 0; i < n; ++i) {
    size_t reversed = 0;
    for (size_t bit = 1; bit < n; bit *= 2) reversed = reversed * 2 + (i / bit) % 2;
    const uint32_t value = power(psi, reversed, q);
    prime.forward[i] = root(value, prime);
    prime.inverse[i] = root(inverse(value, q), prime);
  }
  return prime;
}

// The least psi with psi^1024 = -1 modulo each prime.
const std::array<LatticePrime, 1> fast_primes = {make_prime(754974721, 119670, 1 << 24, 1)};
const std::array<LatticePrime, 2> faithful_primes = {make_prime(545253377, 342519, 4145475840, 1018089473),
                                                     make_prime(1018089473, 206569, 4145475840, 545253377)};

struct Primes { Ring ring; const LatticePrime *first; size_t count, n_planes; };

Primes primes_of(int ring) {
  require(ring == 0 || ring == 1, "a ring is 0 or 1");
  if (ring == static_cast<int>(Ring::fast)) return {Ring::fast, fast_primes.data(), 1, 3};
  return {Ring::faithful, faithful_primes.data(), 2, 4};
}

using Polynomials = Array<const uint32_t, 3>;
using Keys = Array<const uint32_t, 5>;

template <typename A>
void require_keys(const A &keys, const Primes &primes, size_t rank, size_t n_features) {
  require(rank == 2 || rank == 3, "the rank is 2 or 3");
  require(keys.shape(0) == (n_features + lattice_lanes - 1) / lattice_lanes && keys.shape(1) == primes.count &&
              keys.shape(2) == rank && keys.shape(3) == n && keys.shape(4) == lattice_lanes,
          "keys are [blocks of 16 features, primes, rank, 1024, 16]");
}

void lattice_digits(Array<const uint8_t, 1> bytes, Array<int8_t, 1> digits) {
  require(digits.shape(0) <= 5 * bytes.shape(0), "a byte has five digits");
  nb::gil_scoped_release unlocked;
  kernels().lattice_digits(bytes.data(), digits.shape(0), digits.data());
}

void lattice_encode(Array<const int64_t, 2> values, int ring, Array<uint32_t, 5> keys) {
  const Primes primes = primes_of(ring);
  const size_t n_features = values.shape(1), rank = values.shape(0) / n;
  require(values.shape(0) % n == 0, "values are [rank * 1024, features]");
  require_keys(keys, primes, rank, n_features);
  nb::gil_scoped_release unlocked;
  uint32_t *to = keys.data();
  for (size_t first = 0; first < n_features; first += lattice_lanes) {
    const size_t here = n_features - first < lattice_lanes ? n_features - first : lattice_lanes;
    for (size_t prime = 0; prime < primes.count; ++prime) {
      for (size_t j = 0; j < rank; ++j, to += n * lattice_lanes) {
        const int64_t *from = values.data() + j * n * n_features + first;
        kernels().lattice_encode(primes.first[prime], from, n_features, here, to);
      }
    }
  }
}

struct Freed {
  void operator()(uint32_t *at) const { ::operator delete[](at, std::align_val_t{64}); }
};

bool lattice_block(int ring, Polynomials a, Keys s, Keys z, Array<const uint64_t, 1> v, Array<const uint64_t, 1> rho,
                   std::optional<Array<const uint8_t, 3>> noise, Array<uint8_t, 3> r, Array<uint32_t, 2> u,
                   Array<uint64_t, 1> correction, size_t first) {
  const Primes primes = primes_of(ring);
  const size_t rank = a.shape(1), n_in = v.shape(0), n_out = rho.shape(0), n_tokens = r.shape(1);
  require(a.shape(0) == primes.count && a.shape(2) == n, "a is [primes, rank, 1024]");
  require_keys(s, primes, rank, n_in);
  require_keys(z, primes, rank, n_out);
  require(r.shape(0) == primes.n_planes && r.shape(2) == n_in, "r is [planes, tokens, in]");
  require(u.shape(0) == n_tokens && u.shape(1) == n_out, "u is [tokens, out]");
  require(correction.shape(0) == n_tokens, "the correction is [tokens]");
  require(first <= n_tokens && n_tokens - first >= n, "a block has 1024 tokens");
  require(!noise || (primes.ring == Ring::fast && noise->shape(0) == 2 && noise->shape(1) == n &&
                     noise->shape(2) == n_in),
          "noise is [2, 1024, in], of the ring fast only");
  uint32_t n_above = 0;
  for (size_t prime = 0; prime < primes.count; ++prime) {
    for (size_t i = 0; i < rank * n; ++i) n_above += a.data()[prime * rank * n + i] >= primes.first[prime].q;
  }
  require(n_above == 0, "a is below the prime");
  nb::gil_scoped_release unlocked;
  const std::unique_ptr<uint32_t[], Freed> work(new (std::align_val_t{64}) uint32_t[lattice_work]);
  return kernels().lattice_block({primes.ring, primes.first, rank, n_in, n_out, a.data(), s.data(), z.data(), v.data(),
                                  rho.data(), noise ? noise->data() : nullptr, r.data() + first * n_in, n_tokens * n_in,
                                  u.data() + first * n_out, correction.data() + first, work.get()});
}

bool lattice_preimages(Array<uint8_t, 1> counts) {
  require(counts.shape(0) == 1 << 24, "a count for each element");
  nb::gil_scoped_release unlocked;
  return kernels().lattice_preimages(fast_primes[0], counts.data());
}

}  // namespace

void bind_lattice(nb::module_ &module) {
  module.def("lattice_digits", &lattice_digits, nb::arg("stream").noconvert(), nb::arg("digits").noconvert());
  module.def("lattice_encode", &lattice_encode, nb::arg("values").noconvert(), nb::arg("ring"),
             nb::arg("keys").noconvert());
  module.def("lattice_block", &lattice_block, nb::arg("ring"), nb::arg("a").noconvert(), nb::arg("s").noconvert(),
             nb::arg("z").noconvert(), nb::arg("v").noconvert(), nb::arg("rho").noconvert(),
             nb::arg("noise").noconvert().none(), nb::arg("r").noconvert(), nb::arg("u").noconvert(),
             nb::arg("correction").noconvert(), nb::arg("first"));
  module.def("lattice_preimages", &lattice_preimages, nb::arg("counts").noconvert());
}

}  // namespace cloister
