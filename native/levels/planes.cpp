// Planes of pads, and elements from accumulators; spec/pad.md sections 1.2 and 1.3.
#include "level.h"
#include "residues.h"

namespace cloister {
namespace CLOISTER_LEVEL {

namespace {

template <int modulus>
void balance(const uint8_t *__restrict r, size_t n, int8_t *__restrict plane) {
  for (size_t i = 0; i < n; ++i) plane[i] = static_cast<int8_t>(r[i] - (r[i] > (modulus - 1) / 2 ? modulus : 0));
}

// Chinese remainders: the sum of b_i N_i M_i modulo m, with b_i = a_i mod m_i, balanced.
//
// Over the reals, N_i M_i / m = N_i / m_i, so the nearest whole number to the sum of b_i N_i / m_i tells how often m is
// in the sum. It is computed to within 0.001, in units of 2^-20: then the rest is within 0.501 m, which is below 2^31.
// So 32 bits hold it, and its sign says whether it is below 0.
inline uint32_t element_faithful(int32_t a_0, int32_t a_1, int32_t a_2, int32_t a_3) {
  const int32_t b_0 = static_cast<int32_t>((static_cast<uint32_t>(a_0) + 128u) & 0xff) - 128, b_1 = balanced<255>(a_1, 0),
                b_2 = balanced<253>(a_2, 0), b_3 = balanced<251>(a_3, 0);
  const uint32_t sum =
      static_cast<uint32_t>(b_0) * (17u * 16193265u) + static_cast<uint32_t>(b_1) * (32u * 16256768u) +
      static_cast<uint32_t>(b_2) * (21u * 16385280u) + static_cast<uint32_t>(b_3) * (182u * 16515840u);
  // round(2^20 N_i / m_i)
  const int32_t times = (b_0 * 69632 + b_1 * 131586 + b_2 * 87036 + b_3 * 760322 + (1 << 19)) >> 20;
  const uint32_t rest = sum - static_cast<uint32_t>(times) * modulus_faithful;
  return rest + (modulus_faithful & (0u - (rest >> 31)));
}

}  // namespace

void encode_pad(const uint8_t *__restrict r, Ring ring, size_t n, int8_t *__restrict planes) {
  if (ring == Ring::faithful) {
    balance<256>(r, n, planes);
    balance<255>(r + n, n, planes + n);
    balance<253>(r + 2 * n, n, planes + 2 * n);
    balance<251>(r + 3 * n, n, planes + 3 * n);
    return;
  }
  for (size_t i = 0; i < n; ++i) {
    const uint32_t limbs = balanced_limbs(r[i] + 256u * r[n + i] + 65536u * r[2 * n + i]);
    planes[i] = static_cast<int8_t>(limbs);
    planes[n + i] = static_cast<int8_t>(limbs >> 8);
    planes[2 * n + i] = static_cast<int8_t>(limbs >> 16);
  }
}

void combine(const int32_t *__restrict acc, Ring ring, size_t n, uint32_t *__restrict out) {
  if (ring == Ring::faithful) {
    for (size_t i = 0; i < n; ++i) out[i] = element_faithful(acc[i], acc[n + i], acc[2 * n + i], acc[3 * n + i]);
    return;
  }
  for (size_t i = 0; i < n; ++i) {
    const uint32_t low = static_cast<uint32_t>(acc[i]), middle = static_cast<uint32_t>(acc[n + i]),
                   high = static_cast<uint32_t>(acc[2 * n + i]);
    out[i] = (low + (middle << 8) + (high << 16)) & 0xffffff;
  }
}

}  // namespace CLOISTER_LEVEL
}  // namespace cloister
