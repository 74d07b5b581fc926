// NEON with dot products of signed bytes (ARMv8.2 DotProd).
#include "quads.h"
#include "vec_neon.h"

namespace freeexport {
namespace {

struct Vec : VecNeon, PlainInputs {
  // 8-bit weights are read as signed, 128 lower. 128 times the sum of the group is then added back.
  static constexpr uint8_t kFlip = 128;
  static Int unflipped(int8x16_t first, int8x16_t second, Int start) {
    const int8x16_t ones = vdupq_n_s8(1);
    const int32_t sum = vaddvq_s32(vdotq_s32(vdotq_s32(vdupq_n_s32(0), first, ones), second, ones));
    const int32x4_t missing = vdupq_n_s32(sum * 128);
    return {vaddq_s32(start.low, missing), vaddq_s32(start.high, missing)};
  }
  template <int Lane>
  static int32x4_t dot_quad(int32x4_t sum, uint8x16_t weights, int8x16_t a) {
    return vdotq_laneq_s32(sum, vreinterpretq_s8_u8(weights), a, Lane);
  }
  template <int Bits>
  using Quads = RowByRow<NeonQuads<Vec, Bits>>;
  template <int Bits>
  using Unpacked = NeonQuads<Vec, Bits>;
};

}  // namespace
}  // namespace freeexport

#include "tiles.h"

#include "attention_encoder.h"
#include "attention_rows.h"
#include "best_two_tiles.h"

namespace freeexport {

const Kernels kNeon = {
    "neon",         [] { return kProcessor.dot_products; },
    prepare,        panels,
    prepare_floats, float_panels,
    store_row,      attend,
    attend_rows,    attend_encoder,
    join,           piece,
};

}  // namespace freeexport
