// Number-theoretic transforms of polynomials modulo X^1024 + 1 and a prime; spec/pad.md, "Homomorphic pads".
//
// 16 polynomials at a time, [coefficient][lane]: a lane is a feature, and every lane does the same. The transformed
// side is in bit-reversed order. Bounds: values enter a stage below 2 q and leave it so, and 4 q < 2^32.
#include "lattice_vector.h"

namespace cloister {
namespace CLOISTER_LEVEL {

namespace {

constexpr size_t n = lattice_degree;
constexpr size_t lanes = lattice_lanes;
constexpr size_t n_passes = sizeof passes / sizeof passes[0];

// `levels` stages of the inverse transform on 2^levels vectors `distance` apart, of which `group` is the index among
// n / (distance 2^levels): Gentleman and Sande's x, y -> x + y, (x - y) w.
template <size_t levels>
inline __attribute__((always_inline)) void inverse_stages(Vector (&x)[1 << levels], size_t distance, size_t group,
                                                          const LatticeRoot *roots, const Field &field) {
  repeat<levels>([&](auto stage) __attribute__((always_inline)) {
    constexpr size_t s = decltype(stage)::value, n_pairs = 1 << s, n_roots = 1 << (levels - 1 - s);
    const LatticeRoot *root = roots + ((n / (2 * distance)) >> s) + group * n_roots;
    repeat<n_roots>([&](auto which) __attribute__((always_inline)) {
      constexpr size_t i = decltype(which)::value;
      const Vector w = all(root[i].w), w_prime = all(root[i].w_prime);
      repeat<n_pairs>([&](auto pair) __attribute__((always_inline)) {
        constexpr size_t low = i * 2 * n_pairs + decltype(pair)::value, high = low + n_pairs;
        const Vector sum = add(x[low], x[high]), difference = add(sub(x[low], x[high]), field.two_q);
        x[low] = below(sum, field.two_q);
        x[high] = field.times(difference, w, w_prime);
      });
    });
  });
}

template <size_t levels>
void inverse_pass(uint32_t *x, size_t distance, const LatticeRoot *roots, const Field &field, bool is_last) {
  for (size_t group = 0; group < n / (distance << levels); ++group) {
    for (size_t offset = 0; offset < distance * lanes; offset += vector_lanes) {
      uint32_t *at = x + group * (distance << levels) * lanes + offset;
      Vector v[1 << levels];
      repeat<1 << levels>([&](auto i) __attribute__((always_inline)) {
        v[decltype(i)::value] = load(at + decltype(i)::value * distance * lanes);
      });
      inverse_stages<levels>(v, distance, group, roots, field);
      repeat<1 << levels>([&](auto i) __attribute__((always_inline)) {
        constexpr size_t at_i = decltype(i)::value;
        store(at + at_i * distance * lanes, is_last ? below(v[at_i], field.q) : v[at_i]);
      });
    }
  }
}

// The first stages, on the sums over j of a_j s_j. Below q^2 rank < q R, a sum reduces to below 2 q.
template <size_t rank, size_t levels>
void first_pass(const LatticePrime &prime, const uint32_t *keys, const uint32_t *a, uint32_t *x, const Field &field) {
  for (size_t group = 0; group < n >> levels; ++group) {
    for (size_t offset = 0; offset < lanes; offset += vector_lanes) {
      const size_t start = group << levels;
      Vector v[1 << levels];
      repeat<1 << levels>([&](auto i) __attribute__((always_inline)) {
        const size_t at = start + decltype(i)::value;
        Sum total = multiply(load(keys + at * lanes + offset), all(a[at]));
        repeat<rank - 1>([&](auto before) __attribute__((always_inline)) {
          const size_t at_j = (decltype(before)::value + 1) * n + at;
          total = add(total, multiply(load(keys + at_j * lanes + offset), all(a[at_j])));
        });
        v[decltype(i)::value] = field.reduce(total);
      });
      inverse_stages<levels>(v, 1, group, prime.inverse, field);
      repeat<1 << levels>([&](auto i) __attribute__((always_inline)) {
        store(x + (start + decltype(i)::value) * lanes + offset, v[decltype(i)::value]);
      });
    }
  }
}

}  // namespace

// x = the inverse transform, without its factor 1/1024, of the sum over j < rank of keys_j a_j; all below q.
// a is [rank][n] in Montgomery's form, keys are [rank][n][16].
void lattice_inverse(const LatticePrime &prime, const uint32_t *keys, const uint32_t *a, size_t rank, uint32_t *x) {
  const Field field(prime);
  if (rank == 2) {
    first_pass<2, passes[0]>(prime, keys, a, x, field);
  } else {
    first_pass<3, passes[0]>(prime, keys, a, x, field);
  }
  size_t distance = size_t{1} << passes[0];
  repeat<n_passes - 1>([&](auto which) __attribute__((always_inline)) {
    constexpr size_t i = decltype(which)::value + 1;
    inverse_pass<passes[i]>(x, distance, prime.inverse, field, i + 1 == n_passes);
    distance <<= passes[i];
  });
}

// The transform of x [n][16], in place; all below q. Cooley and Tukey's x, y -> x + y w, x - y w.
void lattice_forward(const LatticePrime &prime, uint32_t *x) {
  const Field field(prime);
  for (size_t n_groups = 1, distance = n / 2; distance > 0; n_groups *= 2, distance /= 2) {
    for (size_t group = 0; group < n_groups; ++group) {
      const LatticeRoot &root = prime.forward[n_groups + group];
      const Vector w = all(root.w), w_prime = all(root.w_prime);
      uint32_t *low = x + group * 2 * distance * lanes, *high = low + distance * lanes;
      for (size_t i = 0; i < distance * lanes; i += vector_lanes) {
        const Vector a = load(low + i), b = field.times(load(high + i), w, w_prime);
        store(low + i, below(add(a, b), field.two_q));
        store(high + i, below(add(sub(a, b), field.two_q), field.two_q));
      }
    }
  }
  for (size_t i = 0; i < n * lanes; i += vector_lanes) store(x + i, below(load(x + i), field.q));
}

}  // namespace CLOISTER_LEVEL
}  // namespace cloister
