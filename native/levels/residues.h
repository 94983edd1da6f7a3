// Arithmetic of single elements of the rings, for loops that the compiler makes vectors of; spec/pad.md section 1.
#pragma once

#include "level.h"

namespace cloister {
namespace CLOISTER_LEVEL {

constexpr uint32_t modulus_faithful = 4145475840;  // 256 * 255 * 253 * 251

// The balanced residue of x + pad modulo 255, 253 or 251, for any x and 0 <= pad < 2^16.
//
// 2^16 is small modulo m, so folding there makes x shorter without changing it modulo m: 20 bits, which a binary32 holds.
// That times 1/m is off by less than 0.0005, while quotients of whole numbers stay 1/(2 m) = 0.0019 away from where
// rounding changes, since m is odd. Adding 1.5 * 2^23 rounds, and leaves the whole number in the low bits.
template <int modulus>
inline int32_t balanced(int32_t x, int32_t pad) {
  constexpr int fold = 65536 % modulus;
  const int32_t shorter = (x & 0xffff) + (x >> 16) * fold + pad;
  const float shifted = static_cast<float>(shorter) * (1.0f / modulus) + 12582912.0f;
  int32_t bits = 0;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  return shorter - (bits - 0x4b400000) * modulus;
}

// The three balanced limbs of an element mod 2^24 in its lowest bytes: a byte that is 128 too high, less 128.
inline uint32_t balanced_limbs(uint32_t element) { return (element + 0x808080u) ^ 0x808080u; }

}  // namespace CLOISTER_LEVEL
}  // namespace cloister
