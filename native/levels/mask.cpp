// Activations to masked planes; spec/pad.md sections 1.2 and 2.2.
#include "level.h"
#include "residues.h"

namespace cloister {
namespace CLOISTER_LEVEL {

namespace {

constexpr size_t block = 256;  // features at a time, so that what lies between two steps stays in the first cache

// Added to a number of at most 2^51, this rounds it to the nearest integer, ties to even, and leaves it in the low bits.
constexpr double rounder = 6755399441055744.0;  // 1.5 * 2^52

// What leaves the multiplication by `fold`, which is null or has one factor for each feature: binary32.
inline float folded(const float *x, const float *fold, size_t i) { return fold == nullptr ? x[i] : x[i] * fold[i]; }

// In 8 partial sums, feature i to sum i mod 8: the order of additions is part of the result. A square is exact.
double norm_of(const float *x, const float *fold, size_t d) {
  double sums[8] = {};
  size_t i = 0;
  for (; i + 8 <= d; i += 8) {
    for (size_t j = 0; j < 8; ++j) {
      const double e = folded(x, fold, i + j);
      sums[j] += e * e;
    }
  }
  for (size_t j = 0; i + j < d; ++j) {
    const double e = folded(x, fold, i + j);
    sums[j] += e * e;
  }
  return __builtin_sqrt(((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7])));
}

// 1 for 0, and 0 for what is above: of the bits, since a comparison would become a branch.
inline double one_if_zero(double norm) {
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &norm, sizeof bits);
  bits = (0 - ((bits - 1) >> 63)) & 0x3ff0000000000000;
  __builtin_memcpy(&norm, &bits, sizeof bits);
  return norm;
}

// x_q = rint(x / scale) of one block, and the sum of v * x_q mod 2^64.
uint64_t quantize(const float *x, const float *fold, double scale, const uint64_t *v, size_t n, int32_t *x_q) {
  uint64_t sum = 0;
  for (size_t i = 0; i < n; ++i) {
    const double shifted = static_cast<double>(folded(x, fold, i)) / scale + rounder;
    int64_t bits = 0;
    __builtin_memcpy(&bits, &shifted, sizeof bits);
    const int64_t whole = bits - 0x4338000000000000;  // the bits of `rounder`
    sum += v[i] * static_cast<uint64_t>(whole);
    x_q[i] = static_cast<int32_t>(whole);
  }
  return sum;
}

void add_pad_faithful(const int32_t *__restrict x_q, const uint8_t *__restrict r, size_t stride, size_t n,
                      int8_t *__restrict planes) {
  for (size_t i = 0; i < n; ++i) planes[i] = static_cast<int8_t>(static_cast<uint32_t>(x_q[i]) + r[i]);
  for (size_t i = 0; i < n; ++i) planes[stride + i] = static_cast<int8_t>(balanced<255>(x_q[i], r[stride + i]));
  for (size_t i = 0; i < n; ++i) planes[2 * stride + i] = static_cast<int8_t>(balanced<253>(x_q[i], r[2 * stride + i]));
  for (size_t i = 0; i < n; ++i) planes[3 * stride + i] = static_cast<int8_t>(balanced<251>(x_q[i], r[3 * stride + i]));
}

void add_pad_fast(const int32_t *__restrict x_q, const uint8_t *__restrict r, size_t stride, size_t n,
                  int8_t *__restrict planes) {
  for (size_t i = 0; i < n; ++i) {
    const uint32_t pad = r[i] + 256u * r[stride + i] + 65536u * r[2 * stride + i];
    const uint32_t limbs = balanced_limbs(static_cast<uint32_t>(x_q[i]) + pad);
    planes[i] = static_cast<int8_t>(limbs);
    planes[stride + i] = static_cast<int8_t>(limbs >> 8);
    planes[2 * stride + i] = static_cast<int8_t>(limbs >> 16);
  }
}

}  // namespace

bool mask(const float *x, const float *fold, double room, const uint8_t *r, Ring ring, const uint64_t *v, size_t tokens,
          size_t d, int8_t *planes, double *scales, uint64_t *sums) {
  const size_t stride = tokens * d;
  // All norms first: nothing is written into `planes`, which the accelerator can read, unless all of it can be.
  bool is_finite = true;
  for (size_t t = 0; t < tokens; ++t) {
    const double norm = norm_of(x + t * d, fold, d);
    is_finite &= norm <= __DBL_MAX__;  // NaN compares as false
    scales[t] = norm / room;  // 0 for a row of zeros: its output is 0, whatever rounding a pad adds
  }
  for (size_t t = 0; t < tokens && is_finite; ++t) {
    uint64_t sum = 0;
    const double divisor = scales[t] + one_if_zero(scales[t]);
    for (size_t i = 0; i < d; i += block) {
      int32_t x_q[block];
      const size_t n = d - i < block ? d - i : block;
      const size_t at = t * d + i;
      sum += quantize(x + at, fold == nullptr ? fold : fold + i, divisor, v + i, n, x_q);
      (ring == Ring::faithful ? add_pad_faithful : add_pad_fast)(x_q, r + at, stride, n, planes + at);
    }
    sums[t] = sum;
  }
  return is_finite;
}

}  // namespace CLOISTER_LEVEL
}  // namespace cloister
