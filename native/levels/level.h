// What the files of one level share: declarations of its kernels.
#pragma once

#include "kernels.h"

namespace cloister {
namespace CLOISTER_LEVEL {

size_t replace_rejected(uint8_t *row, size_t n, uint8_t modulus, const uint8_t *spares, uint32_t *lacking);
bool mask(const float *x, const float *fold, double room, const uint8_t *r, Ring ring, const uint64_t *v, size_t tokens,
          size_t d, int8_t *planes, double *scales, uint64_t *sums);
bool unmask(const uint32_t *answer, const uint32_t *u, Ring ring, const double *scales, const float *channel,
            const float *bias, const uint64_t *rho, const uint64_t *expected, size_t tokens, size_t out, float *y);
void encode_pad(const uint8_t *r, Ring ring, size_t n, int8_t *planes);
void combine(const int32_t *acc, Ring ring, size_t n, uint32_t *out);
void lattice_forward(const LatticePrime &prime, uint32_t *x);
void lattice_inverse(const LatticePrime &prime, const uint32_t *keys, const uint32_t *a, size_t rank, uint32_t *x);
void lattice_digits(const uint8_t *bytes, size_t n, int8_t *digits);
void lattice_encode(const LatticePrime &prime, const int64_t *values, size_t stride, size_t n, uint32_t *x);
bool lattice_block(const LatticeBlock &block);
bool lattice_preimages(const LatticePrime &prime, uint8_t *counts);

}  // namespace CLOISTER_LEVEL
}  // namespace cloister
