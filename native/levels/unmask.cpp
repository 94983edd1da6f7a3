// Masked answers to activations, and the check of them; spec/pad.md sections 1.3, 2.2 and 5.
#include "level.h"
#include "residues.h"

namespace cloister {
namespace CLOISTER_LEVEL {

namespace {

constexpr size_t block = 256;

// The representative of answer - u in (-m/2, m/2], for any two 32-bit numbers.
//
// Without its last 8 bits the difference is known to within 256 and fits 32 bits, so it tells how often m goes into it
// but for a last step; what is left then fits 32 bits too, as m/2 + 256 < 2^31, and the last step is exact.
inline int32_t difference_faithful(uint32_t answer, uint32_t u) {
  constexpr int32_t half = modulus_faithful / 2;
  const int32_t about = static_cast<int32_t>(answer >> 8) - static_cast<int32_t>(u >> 8);
  const int32_t times = (about > half / 256) - (about < -(half / 256));
  const uint32_t rest = answer - u - static_cast<uint32_t>(times) * modulus_faithful;
  const int32_t near = static_cast<int32_t>(rest);
  const int32_t last = (near > half) - (near <= -half);
  return static_cast<int32_t>(rest - static_cast<uint32_t>(last) * modulus_faithful);
}

inline int32_t difference_fast(uint32_t answer, uint32_t u) {
  constexpr uint32_t half = 1u << 23;
  return static_cast<int32_t>((answer - u + half - 1) & 0xffffff) - static_cast<int32_t>(half - 1);
}

void difference(const uint32_t *answer, const uint32_t *u, Ring ring, size_t n, int32_t *y) {
  uint32_t own[block];
  for (size_t i = 0; i < n; ++i) own[i] = answer[i];
  // The accelerator may write into `answer` meanwhile: from here on only the copy is read.
  __asm__ volatile("" : : : "memory");
  if (ring == Ring::faithful) {
    for (size_t i = 0; i < n; ++i) y[i] = difference_faithful(own[i], u[i]);
  } else {
    for (size_t i = 0; i < n; ++i) y[i] = difference_fast(own[i], u[i]);
  }
}

uint64_t checksum(const int32_t *y, const uint64_t *rho, size_t n) {
  uint64_t sum = 0;
  for (size_t i = 0; i < n; ++i) sum += rho[i] * static_cast<uint64_t>(static_cast<int64_t>(y[i]));
  return sum;
}

void scale(const int32_t *y, double token, const float *channel, const float *bias, size_t n, float *out) {
  if (channel == nullptr) {
    for (size_t i = 0; i < n; ++i) out[i] = static_cast<float>(y[i] * token);
  } else {
    for (size_t i = 0; i < n; ++i) out[i] = static_cast<float>(y[i] * token * static_cast<double>(channel[i]));
  }
  if (bias != nullptr)
    for (size_t i = 0; i < n; ++i) out[i] += bias[i];
}

}  // namespace

bool unmask(const uint32_t *answer, const uint32_t *u, Ring ring, const double *scales, const float *channel,
            const float *bias, const uint64_t *rho, const uint64_t *expected, size_t tokens, size_t out, float *y) {
  uint64_t wrong = 0;
  for (size_t t = 0; t < tokens; ++t) {
    uint64_t sum = 0;
    for (size_t i = 0; i < out; i += block) {
      int32_t whole[block];
      const size_t n = out - i < block ? out - i : block;
      const size_t at = t * out + i;
      difference(answer + at, u + at, ring, n, whole);
      sum += checksum(whole, rho + i, n);
      scale(whole, scales[t], channel == nullptr ? channel : channel + i, bias == nullptr ? bias : bias + i, n, y + at);
    }
    wrong |= sum ^ expected[t];
  }
  return wrong == 0;
}

}  // namespace CLOISTER_LEVEL
}  // namespace cloister
