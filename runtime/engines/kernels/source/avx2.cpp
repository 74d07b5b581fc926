// AVX2, FMA and F16C, without dot products of bytes.
#include "quads.h"
#include "vec256.h"

namespace freeexport {
namespace {

struct Vec : Vec256 {
  static constexpr bool kFetches = true;
  static constexpr int kRows = 4;
  static constexpr bool kWide = true;
  static Int pairs(Int weights, Int a) { return _mm256_maddubs_epi16(weights, a); }
  static Int sum_pairs(Int a, Int b) { return _mm256_add_epi16(a, b); }
  static Int widen_pairs(Int a, int16_t factor) {
    return _mm256_madd_epi16(a, _mm256_set1_epi16(factor));
  }
  static Int sum(Int a, Int b) { return _mm256_add_epi32(a, b); }

  // Adds products in 16 bits, as in avx512.cpp. The upper halves of 8-bit weights are multiplied
  // after all lower ones, so that the sums of four rows with both registers of a panel fit in 16
  // registers. Weights are then read once.
  template <int Bits>
  struct Quads {
    template <int M>
    static constexpr int kWide = 2;

    template <int M, int Wide, typename Start, typename Take>
    static FREEEXPORT_INLINE void multiply(const uint8_t* data, int64_t apart, const Group* rows,
                                           const Start& start, const Take& take) {
      Int dots[M][Wide];
#pragma GCC unroll 2
      for (int half = 0; half < Bits / 4; half++) {
        asm("" : "+r"(rows));  // otherwise GCC keeps the inputs in memory for the second half
        Int sums[M][Wide];
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
          Int quads[Wide];
#pragma GCC unroll 2
          for (int w = 0; w < Wide; w++) {
            const Int bytes = load(data + 64 * (Bits == 8 ? j : j / 2) + apart * w);
            quads[w] = (Bits == 8 ? half : j % 2) ? high(bytes) : low(bytes);
          }
#pragma GCC unroll 8
          for (int m = 0; m < M; m++) {
            const Int a = quad(rows[m].values, j);
#pragma GCC unroll 2
            for (int w = 0; w < Wide; w++) {
              const Int products = pairs(quads[w], a);
              sums[m][w] = j == 0 ? products : sum_pairs(sums[m][w], products);
              // Otherwise GCC keeps products in memory and adds them later.
              asm("" : "+v"(sums[m][w]));
            }
          }
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 2
          for (int w = 0; w < Wide; w++)
            dots[m][w] =
                sum(half ? dots[m][w] : start(m, w), widen_pairs(sums[m][w], half ? 16 : 1));
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int w = 0; w < Wide; w++) take(m, w, dots[m][w]);
    }
  };
  // Unpacks groups of 8-bit weights of a panel to [groups][pairs of inputs][16 outputs][2].
  static void widen(const uint8_t* data, int64_t groups, int16_t* to) {
    const Int byte = all(0xff);
    for (int64_t quad = 0; quad < groups * kGroup / 4; quad++, to += 64)
      for (int half = 0; half < 2; half++, data += 32) {
        const Int bytes = load(data);
        const auto pair = [&](Int even, Int odd) {
          return _mm256_or_si256(even, _mm256_slli_epi32(odd, 16));
        };
        const Int first = pair(_mm256_and_si256(bytes, byte),
                               _mm256_and_si256(_mm256_srli_epi32(bytes, 8), byte));
        const Int last = pair(_mm256_and_si256(_mm256_srli_epi32(bytes, 16), byte),
                              _mm256_srli_epi32(bytes, 24));
        _mm256_store_si256(reinterpret_cast<Int*>(to + 16 * half), first);
        _mm256_store_si256(reinterpret_cast<Int*>(to + 32 + 16 * half), last);
      }
  }
  // Adds the products of a group of such weights, for kRows rows.
  static FREEEXPORT_INLINE void add_wide_products(const int16_t* rows, const int16_t* weights,
                                                  Int (&dots)[2][kRows]) {
#pragma GCC unroll 16
    for (int pair = 0; pair < kGroup / 2; pair++) {
      const auto* both = reinterpret_cast<const Int*>(weights + 32 * pair);
      const Int first = _mm256_load_si256(both);
      const Int last = _mm256_load_si256(both + 1);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; m++) {
        int32_t two;
        std::memcpy(&two, rows + m * kGroup + 2 * pair, 4);
        dots[0][m] = sum(dots[0][m], _mm256_madd_epi16(first, all(two)));
        dots[1][m] = sum(dots[1][m], _mm256_madd_epi16(last, all(two)));
        asm("" : "+v"(dots[0][m]), "+v"(dots[1][m]));  // as above
      }
    }
  }
  template <int Bits>
  using Unpacked = PairGroup<Vec, Bits>;
};

}  // namespace
}  // namespace freeexport

#include "tiles.h"

#include "attention_encoder.h"
#include "attention_rows.h"
#include "best_two_tiles.h"

namespace freeexport {

const Kernels kAvx2 = {
    "avx2",         [] { return kProcessor.avx2; },
    prepare,        panels,
    prepare_floats, float_panels,
    store_row,      attend,
    attend_rows,    attend_encoder,
    join,           piece,
};

}  // namespace freeexport
