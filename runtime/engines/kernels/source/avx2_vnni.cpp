// AVX2 with dot products of bytes (AVX-VNNI).
#include "quads.h"
#include "vec256.h"

namespace freeexport {
namespace {

struct Vec : Vec256 {
  static constexpr int kRows = 4;
  static Int dot_quad(Int sum, Int weights, Int a) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, weights, a);
#else  // AVX-512 encoding of the same instruction, for tests without AVX-VNNI
    return _mm256_dpbusd_epi32(sum, weights, a);
#endif
  }
  static Int sum(Int a, Int b) { return _mm256_add_epi32(a, b); }
  template <int Bits>
  using Quads = RowByRow<VnniQuads<Vec, Bits>>;
  template <int Bits>
  using Unpacked = VnniQuads<Vec, Bits>;
};

bool supported() {
#if defined(__AVXVNNI__)
  return kProcessor.avx_vnni;
#else
  return kProcessor.avx512_vnni;
#endif
}

}  // namespace
}  // namespace freeexport

#include "tiles.h"

#include "attention_encoder.h"
#include "attention_rows.h"
#include "best_two_tiles.h"

namespace freeexport {

const Kernels kAvx2Vnni = {
    "avx2-vnni", supported, prepare,     panels,         prepare_floats, float_panels,
    store_row,   attend,    attend_rows, attend_encoder, join,           piece,
};

}  // namespace freeexport
