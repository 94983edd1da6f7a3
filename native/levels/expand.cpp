// Residues from key stream bytes; spec/pad.md section 3.
#include "level.h"

namespace cloister {
namespace CLOISTER_LEVEL {

constexpr size_t group_positions = 1024;
constexpr size_t round_spares = 64;

// Replaces each byte of `row` that is not below `modulus`: the k-th of a group by the k-th good spare of that group.
// Returns how many groups have more rejected bytes than good spares; their indices are in `lacking` (as many as there
// are groups), and their remaining bytes are left as they are. Time depends on which bytes are rejected, only.
size_t replace_rejected(uint8_t *row, size_t n, uint32_t modulus, const uint8_t *spares, uint32_t *lacking) {
  size_t n_lacking = 0;
  for (size_t group = 0; group * group_positions < n; ++group) {
    uint8_t *at = row + group * group_positions;
    const size_t size = n - group * group_positions < group_positions ? n - group * group_positions : group_positions;
    const uint8_t *own = spares + group * round_spares;
    size_t spare = 0;
    bool is_lacking = false;
    for (size_t start = 0; start < size; start += 64) {
      const size_t stop = start + 64 < size ? start + 64 : size;
      uint64_t rejected = 0;
      for (size_t i = start; i < stop; ++i) rejected |= static_cast<uint64_t>(at[i] >= modulus) << (i - start);
      for (; rejected != 0; rejected &= rejected - 1) {
        while (spare < round_spares && own[spare] >= modulus) ++spare;
        if (spare == round_spares) {
          is_lacking = true;
          break;
        }
        at[start + static_cast<size_t>(__builtin_ctzll(rejected))] = own[spare++];
      }
    }
    if (is_lacking) lacking[n_lacking++] = static_cast<uint32_t>(group);
  }
  return n_lacking;
}

}  // namespace CLOISTER_LEVEL
}  // namespace cloister
