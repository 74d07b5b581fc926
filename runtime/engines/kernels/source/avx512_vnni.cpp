// AVX-512 (F, BW, DQ, VL) with dot products of bytes (VNNI).
#include "quads.h"
#include "vec512.h"

namespace freeexport {
namespace {

struct Vec : Vec512 {
  static constexpr int kRows = 8;
  static Int dot_quad(Int sum, Int weights, Int a) { return _mm512_dpbusd_epi32(sum, weights, a); }
  static Int sum(Int a, Int b) { return _mm512_add_epi32(a, b); }
  template <int Bits>
  using Quads = TwoPanels<Vec, Bits>;
  template <int Bits>
  using Unpacked = VnniQuads<Vec, Bits>;
};

}  // namespace
}  // namespace freeexport

#include "tiles.h"

#include "amx.h"
#include "avx512_bf16.h"
#include "attention_encoder.h"
#include "attention_rows.h"
#include "best_two_tiles.h"

namespace freeexport {

const Kernels kAvx512Vnni = {
    "avx512-vnni",  [] { return kProcessor.avx512_vnni; },
    prepare,        panels,
    prepare_floats, float_panels,
    store_row,      attend,
    attend_rows,    attend_encoder,
    join,           piece,
};
// Long prompts gain more from attention in bfloat16 than chats lose, which read answers beyond this
// position again (docs/precision.md, "Prompts with AVX-512").
constexpr int64_t kLongPrompt = 256;
const Kernels kAvx512Bf16 = {
    "avx512-bf16",
    [] { return kProcessor.avx512_bf16; },
    prepare,
    panels,
    prepare_floats,
    float_panels,
    store_row,
    attend,
    attend_rows,
    attend_encoder,
    join,
    piece,
    nullptr,
    nullptr,
    avx512_bf16_attend,
    kLongPrompt,
};
const Kernels kAmx = {
    "amx",          [] { return kProcessor.amx && request_tiles(); },
    prepare,        panels,
    prepare_floats, float_panels,
    store_row,      attend,
    attend_rows,    attend_encoder,
    join,           piece,
    amx_prepare,    amx_panels,
    amx_attend,     0,
};

}  // namespace freeexport
