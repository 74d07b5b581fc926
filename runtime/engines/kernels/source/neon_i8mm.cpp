// NEON with dot products of unsigned and signed bytes (ARMv8.6 I8MM).
#include "quads.h"
#include "vec_neon.h"

namespace freeexport {
namespace {

struct Vec : VecNeon, PlainInputs {
  static constexpr uint8_t kFlip = 0;
  static Int unflipped(int8x16_t, int8x16_t, Int start) { return start; }
  template <int Lane>
  static int32x4_t dot_quad(int32x4_t sum, uint8x16_t weights, int8x16_t a) {
    return vusdotq_laneq_s32(sum, weights, a, Lane);
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

const Kernels kNeonI8mm = {
    "neon-i8mm",    [] { return kProcessor.i8mm; },
    prepare,        panels,
    prepare_floats, float_panels,
    store_row,      attend,
    attend_rows,    attend_encoder,
    join,           piece,
};

}  // namespace freeexport
