// The kernels that exist once for each instruction set, as a table of functions.
//
// Rules for levels/*.cpp: include nothing of the C++ library that has inline functions (two levels would define them
// twice, and the linker keeps one); no branch and no address depends on a secret, except on which bytes of a key stream
// are rejected (spec/pad.md section 3); the same bits on every level. Callers have checked every shape.
#pragma once

#include <cstddef>
#include <cstdint>

#define CLOISTER_MAX_PLANES 4

namespace cloister {

// A ring of spec/pad.md section 1: residue planes (`faithful`) or limbs of 8 bits (`fast`).
enum class Ring : int { faithful = 0, fast = 1 };

struct Kernels {
  const char *name;
  // spec/pad.md section 3; see expand.cpp.
  size_t (*replace_rejected)(uint8_t *row, size_t n, uint32_t modulus, const uint8_t *spares, uint32_t *lacking);
};

}  // namespace cloister
