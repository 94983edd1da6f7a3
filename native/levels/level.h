// What the files of one level share: declarations of its kernels.
#pragma once

#include "kernels.h"

namespace cloister {
namespace CLOISTER_LEVEL {

size_t replace_rejected(uint8_t *row, size_t n, uint32_t modulus, const uint8_t *spares, uint32_t *lacking);

}  // namespace CLOISTER_LEVEL
}  // namespace cloister
