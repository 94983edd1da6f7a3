// Residues from key stream bytes; spec/pad.md section 3.
#include "level.h"

#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace cloister {
namespace CLOISTER_LEVEL {

namespace {

constexpr size_t group_positions = 1024;
constexpr size_t n_spares = 64;  // of a group, in a round

// Bit i: byte i of the 64 is not below `modulus` (129 to 255).
inline uint64_t not_below(const uint8_t *bytes, uint8_t modulus) {
#if defined(__AVX512BW__)
  return _mm512_cmpge_epu8_mask(_mm512_loadu_si512(bytes), _mm512_set1_epi8(static_cast<char>(modulus)));
#elif defined(__AVX2__)
  const __m256i bound = _mm256_set1_epi8(static_cast<char>(modulus));
  uint64_t found = 0;
  for (int half = 0; half < 2; ++half) {
    const __m256i part = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(bytes + 32 * half));
    const __m256i is = _mm256_cmpeq_epi8(_mm256_max_epu8(part, bound), part);
    found |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(is))) << (32 * half);
  }
  return found;
#else
  uint64_t found = 0;
  for (int i = 0; i < 64; ++i) found |= static_cast<uint64_t>(bytes[i] >= modulus) << i;
  return found;
#endif
}

}  // namespace

// Replaces each byte of `row` that is not below `modulus`: the k-th of a group by the k-th good spare of that group.
// Returns how many groups have more rejected bytes than good spares; their indices are in `lacking` (as many as there
// are groups), and their remaining bytes are left as they are. Time depends on which bytes are rejected, only.
size_t replace_rejected(uint8_t *row, size_t n, uint8_t modulus, const uint8_t *spares, uint32_t *lacking) {
  size_t n_lacking = 0;
  for (size_t group = 0; group * group_positions < n; ++group) {
    const size_t end = n - group * group_positions < group_positions ? n : (group + 1) * group_positions;
    const uint8_t *own = spares + group * n_spares;
    uint64_t good = ~not_below(own, modulus);
    bool is_lacking = false;
    for (size_t start = group * group_positions; start < end; start += 64) {
      uint64_t rejected = 0;
      if (end - start >= 64) {
        rejected = not_below(row + start, modulus);
      } else {
        for (size_t i = start; i < end; ++i) rejected |= static_cast<uint64_t>(row[i] >= modulus) << (i - start);
      }
      for (; rejected != 0 && good != 0; rejected &= rejected - 1, good &= good - 1)
        row[start + static_cast<size_t>(__builtin_ctzll(rejected))] = own[__builtin_ctzll(good)];
      is_lacking |= rejected != 0;
    }
    if (is_lacking) lacking[n_lacking++] = static_cast<uint32_t>(group);
  }
  return n_lacking;
}

}  // namespace CLOISTER_LEVEL
}  // namespace cloister
