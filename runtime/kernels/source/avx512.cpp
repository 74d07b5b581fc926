// AVX-512 (F, BW, DQ, VL), without dot products of bytes.
#include "quads.h"
#include "vec512.h"

namespace freeexport {
namespace {

struct Vec : Vec512 {
  static constexpr int kRows = 8;
  static Int pairs(Int weights, Int a) { return _mm512_maddubs_epi16(weights, a); }
  static Int sum_pairs(Int a, Int b) { return _mm512_add_epi16(a, b); }
  static Int widen_pairs(Int a, int16_t factor) { return _mm512_madd_epi16(a, _mm512_set1_epi16(factor)); }
  static Int sum(Int a, Int b) { return _mm512_add_epi32(a, b); }
  template <int Bits>
  using Quads = PairQuads<Vec, Bits>;
  template <int Bits>
  using Unpacked = PairGroup<Vec, Bits>;
};

bool supported() {
  return kProcessor.avx512;
}

}  // namespace
}  // namespace freeexport

#include "tiles.h"

#include "attention_encoder.h"
#include "attention_rows.h"
#include "best_two_tiles.h"

namespace freeexport {

const Kernels kAvx512 = {"avx512", supported, prepare, panels,
                       store_row, attend, attend_rows, attend_encoder, join, piece};

}  // namespace freeexport
