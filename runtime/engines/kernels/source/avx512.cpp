// AVX-512 (F, BW, DQ, VL), without dot products of bytes.
#include "quads.h"
#include "vec512.h"

namespace freeexport {
namespace {

struct Vec : Vec512 {
  static constexpr int kRows = 8;
  static Int pairs(Int weights, Int a) { return _mm512_maddubs_epi16(weights, a); }
  static Int sum_pairs(Int a, Int b) { return _mm512_add_epi16(a, b); }
  static Int widen_pairs(Int a, int16_t factor) {
    return _mm512_madd_epi16(a, _mm512_set1_epi16(factor));
  }
  static Int sum(Int a, Int b) { return _mm512_add_epi32(a, b); }
  // Adds products in 16 bits. 17 products of 4 by 8 bits (15 * 127) fit, and a group has 16 per
  // lane. 8-bit weights are split into two times 4 bits.
  template <int Bits>
  struct Quads {
    template <int M>
    static constexpr int kWide = 1;

    template <int M, int Wide, typename Start, typename Take>
    static FREEEXPORT_INLINE void multiply(const uint8_t* data, int64_t, const Group* rows,
                                           const Start& start, const Take& take) {
      static_assert(Wide == 1, "a register holds a whole panel");
      // For 4 bits, all products are in `low`.
      Int low[M];
      Int high[M];
#pragma GCC unroll 8
      for (int j = 0; j < Bits; j++) {
        const Int bytes = load(data + 64 * j);
        const Int lows = Vec512::low(bytes);
        const Int highs = Vec512::high(bytes);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          const Int first = quad(rows[m].values, Bits == 4 ? 2 * j : j);
          const Int second = Bits == 4 ? quad(rows[m].values, 2 * j + 1) : first;
          const Int a = pairs(lows, first);
          const Int b = pairs(highs, second);
          if constexpr (Bits == 4) {
            low[m] = j == 0 ? sum_pairs(a, b) : sum_pairs(sum_pairs(low[m], a), b);
          } else {
            low[m] = j == 0 ? a : sum_pairs(low[m], a);
            high[m] = j == 0 ? b : sum_pairs(high[m], b);
            asm("" : "+v"(high[m]));  // otherwise GCC keeps products in memory and adds them later
          }
          asm("" : "+v"(low[m]));
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const Int dot = sum(start(m, 0), widen_pairs(low[m], 1));
        take(m, 0, Bits == 4 ? dot : sum(dot, widen_pairs(high[m], 16)));
      }
    }
  };
  template <int Bits>
  using Unpacked = PairGroup<Vec, Bits>;
};

bool supported() { return kProcessor.avx512; }

}  // namespace
}  // namespace freeexport

#include "tiles.h"

#include "attention_encoder.h"
#include "attention_rows.h"
#include "best_two_tiles.h"

namespace freeexport {

const Kernels kAvx512 = {
    "avx512",  supported, prepare,     panels,         prepare_floats, float_panels,
    store_row, attend,    attend_rows, attend_encoder, join,           piece,
};

}  // namespace freeexport
