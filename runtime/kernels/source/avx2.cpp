// AVX2, FMA and F16C, without dot products of bytes.
#include "quads.h"
#include "vec256.h"

namespace freeexport {
namespace {

struct Vec : Vec256 {
  static constexpr bool kFetches = true;
  static constexpr int kRows = 4;
  static Int pairs(Int weights, Int a) { return _mm256_maddubs_epi16(weights, a); }
  static Int sum_pairs(Int a, Int b) { return _mm256_add_epi16(a, b); }
  static Int widen_pairs(Int a, int16_t factor) { return _mm256_madd_epi16(a, _mm256_set1_epi16(factor)); }
  static Int sum(Int a, Int b) { return _mm256_add_epi32(a, b); }
  template <int Bits>
  using Quads = PairQuads<Vec, Bits>;
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

const Kernels kAvx2 = {"avx2", [] { return kProcessor.avx2; }, prepare, panels,
                       store_row, attend, attend_rows, attend_encoder, join, piece};

}  // namespace freeexport
