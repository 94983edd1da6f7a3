// Vectors of 32-bit words modulo a prime, one feature in each lane, for the transforms of the lattice pad.
//
// Montgomery's form with R = 2^32: reduce(T) = T / R mod q. For T < q R it lies in [0, 2 q), since T + m q < 2 q R.
#pragma once

#include "level.h"

#if defined(__AVX512F__) || defined(__AVX2__)
// GCC 12 takes what its own header leaves undefined on purpose for a mistake (bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace cloister {
namespace CLOISTER_LEVEL {

#if defined(__AVX512F__)

constexpr size_t vector_lanes = 16;
constexpr size_t passes[] = {4, 3, 3};  // stages of the inverse transform that are done on what the registers hold
using Vector = __m512i;
struct Sum { __m512i even, odd; };  // of products: 64 bits a lane

inline Vector load(const uint32_t *p) { return _mm512_loadu_si512(p); }
inline void store(uint32_t *p, Vector x) { _mm512_storeu_si512(p, x); }
inline Vector all(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline Vector add(Vector a, Vector b) { return _mm512_add_epi32(a, b); }
inline Vector sub(Vector a, Vector b) { return _mm512_sub_epi32(a, b); }
// x - bound where x >= bound, else x: the difference wraps around to a large number.
inline Vector below(Vector x, Vector bound) { return _mm512_min_epu32(x, _mm512_sub_epi32(x, bound)); }
inline Sum multiply(Vector a, Vector b) {
  return {_mm512_mul_epu32(a, b), _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b)};
}
inline Sum add(Sum a, Sum b) { return {_mm512_add_epi64(a.even, b.even), _mm512_add_epi64(a.odd, b.odd)}; }
inline Sum multiply_low(Sum a, Vector b) { return {_mm512_mul_epu32(a.even, b), _mm512_mul_epu32(a.odd, b)}; }
inline Vector high(Sum a) {
  return _mm512_castps_si512(
      _mm512_mask_movehdup_ps(_mm512_castsi512_ps(a.odd), 0x5555, _mm512_castsi512_ps(a.even)));
}

#elif defined(__AVX2__)

constexpr size_t vector_lanes = 8;
constexpr size_t passes[] = {2, 3, 3, 2};
using Vector = __m256i;
struct Sum { __m256i even, odd; };

inline Vector load(const uint32_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
inline void store(uint32_t *p, Vector x) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), x); }
inline Vector all(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline Vector add(Vector a, Vector b) { return _mm256_add_epi32(a, b); }
inline Vector sub(Vector a, Vector b) { return _mm256_sub_epi32(a, b); }
inline Vector below(Vector x, Vector bound) { return _mm256_min_epu32(x, _mm256_sub_epi32(x, bound)); }
inline Sum multiply(Vector a, Vector b) {
  return {_mm256_mul_epu32(a, b), _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b)};
}
inline Sum add(Sum a, Sum b) { return {_mm256_add_epi64(a.even, b.even), _mm256_add_epi64(a.odd, b.odd)}; }
inline Sum multiply_low(Sum a, Vector b) { return {_mm256_mul_epu32(a.even, b), _mm256_mul_epu32(a.odd, b)}; }
inline Vector high(Sum a) { return _mm256_blend_epi32(_mm256_srli_epi64(a.even, 32), a.odd, 0xAA); }

#else

constexpr size_t vector_lanes = 4;
constexpr size_t passes[] = {2, 2, 2, 2, 2};
struct Vector { uint32_t lane[vector_lanes]; };
struct Sum { uint64_t lane[vector_lanes]; };

#define CLOISTER_LANES(expression) \
  for (size_t i = 0; i < vector_lanes; ++i) out.lane[i] = (expression); \
  return out

inline Vector load(const uint32_t *p) { Vector out; CLOISTER_LANES(p[i]); }
inline void store(uint32_t *p, Vector x) { for (size_t i = 0; i < vector_lanes; ++i) p[i] = x.lane[i]; }
inline Vector all(uint32_t x) { Vector out; CLOISTER_LANES(x); }
inline Vector add(Vector a, Vector b) { Vector out; CLOISTER_LANES(a.lane[i] + b.lane[i]); }
inline Vector sub(Vector a, Vector b) { Vector out; CLOISTER_LANES(a.lane[i] - b.lane[i]); }
// Here by the sign of the difference, which is above -2^31 and below 2^31 as x and the bound are at most 2^31 apart.
inline Vector below(Vector x, Vector bound) {
  Vector out;
  CLOISTER_LANES(x.lane[i] - bound.lane[i] + (bound.lane[i] & (0u - ((x.lane[i] - bound.lane[i]) >> 31))));
}
inline Sum multiply(Vector a, Vector b) { Sum out; CLOISTER_LANES(uint64_t{a.lane[i]} * b.lane[i]); }
inline Sum add(Sum a, Sum b) { Sum out; CLOISTER_LANES(a.lane[i] + b.lane[i]); }
inline Sum multiply_low(Sum a, Vector b) {
  Sum out;
  CLOISTER_LANES(uint64_t{static_cast<uint32_t>(a.lane[i])} * b.lane[i]);
}
inline Vector high(Sum a) { Vector out; CLOISTER_LANES(static_cast<uint32_t>(a.lane[i] >> 32)); }

#undef CLOISTER_LANES

#endif

// One prime in every lane.
struct Field {
  Vector q, two_q, negative_inverse;
  explicit Field(const LatticePrime &prime)
      : q(all(prime.q)), two_q(all(2 * prime.q)), negative_inverse(all(prime.negative_inverse)) {}
  Vector reduce(Sum t) const { return high(add(t, multiply_low(multiply_low(t, negative_inverse), q))); }
  // a w, for w in Montgomery's form and w' = -w / q mod R; a is any word, the product below 2 q.
  Vector times(Vector a, Vector w, Vector w_prime) const {
    return high(add(multiply(a, w), multiply_low(multiply(a, w_prime), q)));
  }
};

template <size_t i>
struct Index { static constexpr size_t value = i; };

// f(Index<0>), ..., f(Index<n - 1>), written out, so that arrays indexed by them become registers.
template <size_t n, size_t i = 0, typename Function>
inline __attribute__((always_inline)) void repeat(Function f) {
  if constexpr (i < n) {
    f(Index<i>{});
    repeat<n, i + 1>(f);
  }
}

}  // namespace CLOISTER_LEVEL
}  // namespace cloister
