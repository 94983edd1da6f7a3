// The kernels that exist once for each instruction set, as a table of functions.
//
// Rules for levels/*.cpp: include nothing of the C++ library that has inline functions (two levels would define them
// twice, and the linker keeps one); no branch and no address depends on a secret, except on which bytes of a key stream
// are rejected (spec/pad.md section 3); the same bits on every level. Callers have checked every shape.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cloister {

// A ring of spec/pad.md section 1: residue planes (`faithful`) or limbs of 8 bits (`fast`).
enum class Ring : int { faithful = 0, fast = 1 };

// The lattice pad (spec/pad.md, "Homomorphic pads"): polynomials of lattice_degree coefficients modulo a prime,
// lattice_lanes of them at once.
constexpr size_t lattice_degree = 1024, lattice_lanes = 16;

// A root of unity w in Montgomery's form, and -w / q modulo 2^32.
struct LatticeRoot { uint32_t w, w_prime; };

struct LatticePrime {
  uint32_t q, negative_inverse;  // -1 / q modulo 2^32
  uint32_t square;               // 2^64 modulo q: what brings a number into Montgomery's form
  uint32_t scale;                // what a is multiplied by: -p / 1024, over the other prime where there is one
  LatticeRoot forward[lattice_degree], inverse[lattice_degree];  // psi to the bit-reversed indices, and its inverses
};

// One block: lattice_degree tokens of one layer and direction. Blocks of features are of 16, filled up with zeros.
struct LatticeBlock {
  Ring ring;
  const LatticePrime *primes;  // two for faithful, one for fast
  size_t rank, n_in, n_out;
  const uint32_t *a;                // [primes][rank][1024], below the prime: values at psi^(2 i + 1)
  const uint32_t *s, *z;            // [blocks of features][primes][rank][1024][16]
  const uint64_t *v, *rho;          // [n_in], [n_out]
  const uint8_t *noise;             // [2][1024][n_in] below 252 and 255, or null
  uint8_t *r;                       // [planes][tokens][n_in], from the first token of the block
  size_t r_plane;                   // bytes from plane to plane
  uint32_t *u;                      // [1024][n_out]
  uint64_t *correction;             // [1024]
  uint32_t *work;                   // lattice_work words, zeroed before return
};

constexpr size_t lattice_group = 4;  // blocks of features at a time: a cache line of bytes for each token
constexpr size_t lattice_work = 2 * 3 * lattice_degree + 2 * lattice_group * lattice_degree * lattice_lanes;

// What each does, and who may see what: _native.pyi, and the files of levels/.
struct Kernels {
  const char *name;
  size_t (*replace_rejected)(uint8_t *row, size_t n, uint8_t modulus, const uint8_t *spares, uint32_t *lacking);
  bool (*mask)(const float *x, const float *fold, double room, const uint8_t *r, Ring ring, const uint64_t *v,
               size_t tokens, size_t d, int8_t *planes, double *scales, uint64_t *sums);
  bool (*unmask)(const uint32_t *answer, const uint32_t *u, Ring ring, const double *scales, const float *channel,
                 const float *bias, const uint64_t *rho, const uint64_t *expected, size_t tokens, size_t out, float *y);
  void (*encode_pad)(const uint8_t *r, Ring ring, size_t n, int8_t *planes);
  void (*combine)(const int32_t *acc, Ring ring, size_t n, uint32_t *out);
  void (*lattice_digits)(const uint8_t *bytes, size_t n, int8_t *digits);
  void (*lattice_encode)(const LatticePrime &prime, const int64_t *values, size_t stride, size_t n, uint32_t *x);
  bool (*lattice_block)(const LatticeBlock &block);
  bool (*lattice_preimages)(const LatticePrime &prime, uint8_t *counts);
};

}  // namespace cloister
