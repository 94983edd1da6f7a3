// The lattice pad: secrets, and one block of pads with what takes them off and corrects the check;
// spec/pad.md, "Homomorphic pads".
//
// With r = round(p v / Q) and e = Q r - p v: |e| < Q / 2, so e is the representative of -p v modulo Q of least size.
// And Q = 1 modulo p, so r = e modulo p. The transform is scaled to give -p v: rounding is then one comparison, and e
// is what the correction is made of.
#include "level.h"

namespace cloister {
namespace CLOISTER_LEVEL {

namespace {

constexpr size_t n = lattice_degree, lanes = lattice_lanes, wide = lattice_group * lanes;

inline uint32_t montgomery(uint32_t a, uint32_t b, const LatticePrime &prime) {
  const uint64_t t = uint64_t{a} * b;
  const uint32_t m = static_cast<uint32_t>(t) * prime.negative_inverse;
  const uint32_t moved = static_cast<uint32_t>((t + uint64_t{m} * prime.q) >> 32) - prime.q;
  return moved + (prime.q & (0u - (moved >> 31)));
}

// Sets memory to zero, also where the compiler sees that nobody reads it again.
inline void wipe(void *at, size_t bytes) {
  __builtin_memset(at, 0, bytes);
  __asm__ volatile("" : : "r"(at) : "memory");
}

// Rows of the last token and check keys lie where the functions before had their variables.
__attribute__((noinline)) void wipe_stack() {
  uint8_t below[8192];
  wipe(below, sizeof below);
}

// All ones where x is above bound, else zero. By the sign, so that no compiler makes a branch of it.
inline int32_t above(int32_t x, int32_t bound) { return (bound - x) >> 31; }
inline int64_t above(int64_t x, int64_t bound) { return (bound - x) >> 63; }

// Z_2^24, Q = 45 * 2^24 + 1.
struct Fast {
  static constexpr size_t n_primes = 1, n_planes = 3;
  static constexpr int32_t q = 754974721, half = (q - 1) / 2;
  using Error = int32_t;

  static Error centre(uint32_t x, uint32_t) {
    const int32_t signed_x = static_cast<int32_t>(x);
    return signed_x - (q & above(signed_x, half));
  }
  // The one value of 46 that are rounded to 2^23.
  static bool is_excluded(Error e) { return e == half; }
  // v + noise is rounded in the place of v, so e lies about p noise and not about 0. The noise is nine times a byte
  // modulo 5 plus one modulo 9, less 22; quotients of bytes by multiplication are exact.
  static Error centre(uint32_t x, uint8_t low, uint8_t high, uint32_t &n_excluded) {
    const int32_t rest_9 = low - 9 * ((low * 7282) >> 16), rest_5 = high - 5 * ((high * 13108) >> 16);
    const int32_t shift = (rest_9 + 9 * rest_5 - 22) * (1 << 24);
    const Error moved = static_cast<int32_t>(x) - shift;  // from -q / 2 to 3 q / 2
    const Error e = moved - (q & above(moved, half));
    n_excluded += is_excluded(e);
    return e + shift;
  }
  static uint32_t element(Error e) { return static_cast<uint32_t>(e) & 0xffffff; }
  static void split(const uint32_t *elements, uint8_t (&planes)[n_planes][wide]) {
    for (size_t i = 0; i < wide; ++i) planes[0][i] = static_cast<uint8_t>(elements[i]);
    for (size_t i = 0; i < wide; ++i) planes[1][i] = static_cast<uint8_t>(elements[i] >> 8);
    for (size_t i = 0; i < wide; ++i) planes[2][i] = static_cast<uint8_t>(elements[i] >> 16);
  }
  static constexpr uint64_t product = q;
};

// Residues 256, 255, 253 and 251; Q of two primes, Q = 133909048 p + 1.
struct Faithful {
  static constexpr size_t n_primes = 2, n_planes = 4;
  static constexpr uint64_t q_0 = 545253377, q_1 = 1018089473, p = 4145475840, product = q_0 * q_1;
  static constexpr int64_t q = product, half = (q - 1) / 2;
  using Error = int64_t;

  // Chinese remainders: x_0 q_1 + x_1 q_0 is below 2 Q < 2^60.
  static Error centre(uint32_t x_0, uint32_t x_1) {
    int64_t e = static_cast<int64_t>(x_0 * q_1 + x_1 * q_0);
    e -= q & above(e, half);
    return e - (q & above(e, half));
  }
  // (Q - 1) / 2 is a multiple of p, so e + (Q - 1) / 2, which is from 0 to Q - 1 < 2^59, has the rest of e. The
  // quotient from its upper 32 bits and 32 bits of 1 / p is right or 1 too low: 2^27 / p + 2^32 / 2^36 < 1/8 is lost.
  static uint32_t element(Error e) {
    constexpr uint64_t inverse = (uint64_t{1} << 63) / p;
    const uint64_t x = static_cast<uint64_t>(e + half), quotient = ((x >> 27) * inverse) >> 36;
    const int64_t rest = static_cast<int64_t>(x - quotient * p);
    return static_cast<uint32_t>(rest - (static_cast<int64_t>(p) & above(rest, p - 1)));
  }
  // Folded at 2^16 and 2^8 to below 33536; with M = 2^24 / m rounded up, floor(x M / 2^24) is then the quotient, since
  // x (M m - 2^24) < 33536 * 251 < 2^24.
  template <uint32_t m>
  static void residues(const uint32_t *elements, uint8_t (&plane)[wide]) {
    for (size_t i = 0; i < wide; ++i) {
      const uint32_t longer = (elements[i] & 0xffff) + (elements[i] >> 16) * (65536 % m);
      const uint32_t x = (longer & 0xff) + (longer >> 8) * (256 % m);
      plane[i] = static_cast<uint8_t>(x - ((x * ((1u << 24) / m + 1)) >> 24) * m);
    }
  }
  static void split(const uint32_t *elements, uint8_t (&planes)[n_planes][wide]) {
    for (size_t i = 0; i < wide; ++i) planes[0][i] = static_cast<uint8_t>(elements[i]);
    residues<255>(elements, planes[1]);
    residues<253>(elements, planes[2]);
    residues<251>(elements, planes[3]);
  }
};

// The transforms of lattice_group blocks of features from block `first`: x[prime][block][n][16], zeros beyond the last.
template <typename Rounding>
void transform(const LatticeBlock &block, const uint32_t *keys, size_t n_features, size_t first, const uint32_t *a,
               uint32_t *x) {
  const size_t size = block.rank * n;
  for (size_t prime = 0; prime < Rounding::n_primes; ++prime) {
    for (size_t i = first; i < first + lattice_group; ++i, x += n * lanes) {
      if (i * lanes < n_features) {
        const uint32_t *own = keys + (i * Rounding::n_primes + prime) * size * lanes;
        lattice_inverse(block.primes[prime], own, a + prime * size, block.rank, x);
      } else {
        __builtin_memset(x, 0, n * lanes * sizeof(uint32_t));
      }
    }
  }
}

// The transforms of one token, a row for each prime; features beyond the last have zeros.
template <typename Rounding>
inline void gather(const uint32_t *x, size_t t, uint32_t (&rows)[2][wide]) {
  for (size_t prime = 0; prime < Rounding::n_primes; ++prime) {
    for (size_t b = 0; b < lattice_group; ++b) {
      const uint32_t *from = x + ((prime * lattice_group + b) * n + t) * lanes;
      __builtin_memcpy(rows[prime] + b * lanes, from, lanes * sizeof(uint32_t));
    }
  }
}

template <typename Error>
inline uint64_t dot(const uint64_t (&keys)[wide], const Error (&e)[wide]) {
  uint64_t sum = 0;
  for (size_t i = 0; i < wide; ++i) sum += keys[i] * static_cast<uint64_t>(int64_t{e[i]});
  return sum;
}

// Copies `width` words, mostly all of them, which is then a few instructions.
template <typename T>
inline void put(T *to, const T (&from)[wide], size_t width) {
  if (width == wide) __builtin_memcpy(to, from, sizeof from);
  else __builtin_memcpy(to, from, width * sizeof(T));
}

inline size_t width_of(size_t n_features, size_t first) {
  return n_features - first * lanes < wide ? n_features - first * lanes : wide;
}

// r and its part of the correction, for the features from 16 `first`. Whether all values may be used.
template <typename Rounding, bool has_noise>
bool finish_r(const LatticeBlock &block, size_t first, const uint32_t *x) {
  uint64_t keys[wide] = {};
  const size_t width = width_of(block.n_in, first);
  __builtin_memcpy(keys, block.v + first * lanes, width * sizeof(uint64_t));
  uint32_t n_excluded = 0;
  for (size_t t = 0; t < n; ++t) {
    uint32_t rows[2][wide], elements[wide];
    gather<Rounding>(x, t, rows);
    typename Rounding::Error e[wide];
    if constexpr (has_noise) {
      uint8_t low[wide] = {}, high[wide] = {};
      const uint8_t *from = block.noise + t * block.n_in + first * lanes;
      __builtin_memcpy(low, from, width);
      __builtin_memcpy(high, from + n * block.n_in, width);
      for (size_t i = 0; i < wide; ++i) e[i] = Rounding::centre(rows[0][i], low[i], high[i], n_excluded);
    } else {
      for (size_t i = 0; i < wide; ++i) e[i] = Rounding::centre(rows[0][i], rows[1][i]);
      if constexpr (Rounding::n_primes == 1)
        for (size_t i = 0; i < wide; ++i) n_excluded += Rounding::is_excluded(e[i]);
    }
    block.correction[t] += dot(keys, e);
    for (size_t i = 0; i < wide; ++i) elements[i] = Rounding::element(e[i]);
    uint8_t planes[Rounding::n_planes][wide];
    Rounding::split(elements, planes);
    uint8_t *to = block.r + t * block.n_in + first * lanes;
    for (size_t plane = 0; plane < Rounding::n_planes; ++plane) put(to + plane * block.r_plane, planes[plane], width);
  }
  return n_excluded == 0;
}

// u and its part of the correction, for the features from 16 `first`.
template <typename Rounding>
void finish_u(const LatticeBlock &block, size_t first, const uint32_t *x) {
  uint64_t keys[wide] = {};
  const size_t width = width_of(block.n_out, first);
  __builtin_memcpy(keys, block.rho + first * lanes, width * sizeof(uint64_t));
  for (size_t t = 0; t < n; ++t) {
    uint32_t rows[2][wide], elements[wide];
    gather<Rounding>(x, t, rows);
    typename Rounding::Error e[wide];
    for (size_t i = 0; i < wide; ++i) e[i] = Rounding::centre(rows[0][i], rows[1][i]);
    block.correction[t] -= dot(keys, e);
    for (size_t i = 0; i < wide; ++i) elements[i] = Rounding::element(e[i]);
    put(block.u + t * block.n_out + first * lanes, elements, width);
  }
}

// 1 / q modulo 2^64 for odd q: each step doubles the number of right bits, of which q itself has 3.
constexpr uint64_t inverse_of(uint64_t q) {
  uint64_t found = q;
  for (int step = 0; step < 5; ++step) found *= 2 - q * found;
  return found;
}

template <typename Rounding>
__attribute__((noinline)) bool run(const LatticeBlock &block) {
  uint32_t *a = block.work, *x = block.work + 2 * 3 * n;
  for (size_t prime = 0; prime < Rounding::n_primes; ++prime) {
    for (size_t i = 0; i < block.rank * n; ++i) {
      size_t reversed = 0;
      for (size_t bit = 1; bit < n; bit *= 2) reversed = reversed * 2 + (i / bit) % 2;
      const size_t start = prime * block.rank * n;
      a[start + i / n * n + reversed] = montgomery(block.a[start + i], block.primes[prime].scale, block.primes[prime]);
    }
  }
  __builtin_memset(block.correction, 0, n * sizeof(uint64_t));
  bool is_usable = true;
  for (size_t first = 0; first * lanes < block.n_in && is_usable; first += lattice_group) {
    transform<Rounding>(block, block.s, block.n_in, first, a, x);
    if constexpr (Rounding::n_primes == 1) {
      is_usable = block.noise != nullptr ? finish_r<Rounding, true>(block, first, x)
                                         : finish_r<Rounding, false>(block, first, x);
    } else {
      is_usable = finish_r<Rounding, false>(block, first, x);
    }
  }
  for (size_t first = 0; first * lanes < block.n_out && is_usable; first += lattice_group) {
    transform<Rounding>(block, block.z, block.n_out, first, a, x);
    finish_u<Rounding>(block, first, x);
  }
  for (size_t t = 0; t < n; ++t) block.correction[t] *= inverse_of(Rounding::product);
  wipe(block.work, lattice_work * sizeof(uint32_t));
  return is_usable;
}

}  // namespace

// Five digits of base 3, less 1, from each byte below 243, lowest first; `n_digits` in all.
void lattice_digits(const uint8_t *__restrict bytes, size_t n_digits, int8_t *__restrict digits) {
  for (size_t i = 0; i < n_digits; ++i) {
    // floor(x / 3^k) by multiplication, exact below 243.
    constexpr uint32_t inverses[5] = {1 << 16, 21846, 7282, 2428, 810};
    const uint32_t x = (bytes[i / 5] * inverses[i % 5]) >> 16;
    digits[i] = static_cast<int8_t>(x - 3 * ((x * 21846) >> 16)) - 1;
  }
}

// Reduces and transforms `n_columns` (at most 16) columns of values[n][stride], each below 2^34 in size: x [n][16].
void lattice_encode(const LatticePrime &prime, const int64_t *values, size_t stride, size_t n_columns, uint32_t *x) {
  for (size_t i = 0; i < n; ++i) {
    for (size_t column = 0; column < lanes; ++column) {
      const uint64_t value = column < n_columns ? static_cast<uint64_t>(values[i * stride + column]) : 0;
      const uint64_t positive = value + uint64_t{64} * prime.q;  // 64 q > 2^34; the sum is below 2^37
      const uint32_t high = montgomery(static_cast<uint32_t>(positive >> 32), prime.square, prime);  // times 2^32
      const uint32_t low = montgomery(montgomery(static_cast<uint32_t>(positive), 1, prime), prime.square, prime);
      const uint32_t sum = high + low - prime.q;
      x[i * lanes + column] = sum + (prime.q & (0u - (sum >> 31)));
    }
  }
  lattice_forward(prime, x);
}

// One block of pads. False where a value is the excluded one: r is then unfinished, and a is to be drawn again.
bool lattice_block(const LatticeBlock &block) {
  const bool is_usable = block.ring == Ring::fast ? run<Fast>(block) : run<Faithful>(block);
  wipe_stack();
  return is_usable;
}

// Every v of `fast` is rounded as lattice_block does it, and by the definition; counts[r] gets how many are rounded to
// r, without the excluded one. Whether both agree on all of them, and on Q r - p v.
bool lattice_preimages(const LatticePrime &prime, uint8_t *counts) {
  const uint32_t minus_p = montgomery(prime.q - (1u << 24), prime.square, prime);
  uint32_t n_different = 0;
  for (uint32_t start = 0; start < prime.q; start += wide) {
    uint32_t rounded[wide];
    uint8_t is_counted[wide];
    for (uint32_t i = 0; i < wide; ++i) {
      const uint32_t v = start + i, is_there = v < prime.q;
      const int32_t e = Fast::centre(montgomery(v, minus_p, prime), 0);
      const int64_t estimate = (v * uint64_t{95443717}) >> 32;  // v / 45
      const int64_t t = (int64_t{v} << 24) - estimate * Fast::q;
      const int64_t r = estimate + (2 * t > Fast::q) - (2 * t < -Fast::q);
      rounded[i] = r & 0xffffff;
      is_counted[i] = is_there & !Fast::is_excluded(e);
      n_different += is_there & ((rounded[i] != Fast::element(e)) | (e != r * Fast::q - (int64_t{v} << 24)));
    }
    for (uint32_t i = 0; i < wide; ++i) counts[rounded[i]] = static_cast<uint8_t>(counts[rounded[i]] + is_counted[i]);
  }
  return n_different == 0;
}

}  // namespace CLOISTER_LEVEL
}  // namespace cloister
