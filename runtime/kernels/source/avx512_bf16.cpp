// AVX-512 with dot products of bytes (VNNI) and of pairs in bfloat16, which attention to long prompts
// uses.
#include "avx512_bf16.h"
#include "vec512.h"

namespace freeexport {
namespace {

using Vec = Vec512;

struct Products {
  template <int P, bool kAdds>
  static void multiply(const uint16_t* a, int64_t apart, const uint16_t* b, int64_t count, float* sums) {
    for (int p = 0; p < P; p++, a += apart, sums += kTileSums) multiply_tile<kAdds>(a, b, count, sums);
  }

 private:
  template <bool kAdds>
  static void multiply_tile(const uint16_t* a, const uint16_t* b, int64_t count, float* sums) {
    __m512 all[kTileRows];
#pragma GCC unroll 16
    for (int row = 0; row < kTileRows; row++) all[row] = kAdds ? _mm512_load_ps(sums + row * kPanel) : _mm512_setzero_ps();
    for (int64_t tile = 0; tile < count; tile++, a += kTileValues, b += kTileValues)
      for (int64_t pair = 0; pair < kGroup / 2; pair++) {
        const auto queries = (__m512bh)_mm512_load_si512(b + pair * 2 * kPanel);
#pragma GCC unroll 16
        for (int row = 0; row < kTileRows; row++) {
          int32_t both;
          std::memcpy(&both, a + row * kGroup + 2 * pair, sizeof(both));
          all[row] = _mm512_dpbf16_ps(all[row], queries, (__m512bh)_mm512_set1_epi32(both));
        }
      }
#pragma GCC unroll 16
    for (int row = 0; row < kTileRows; row++) _mm512_store_ps(sums + row * kPanel, all[row]);
  }
};

}  // namespace
}  // namespace freeexport

#include "attention_bfloat16.h"

namespace freeexport {

bool avx512_bf16_attend(const Attention& a, const Place* places, int64_t count, int64_t kv_head) {
  return attend_in_bfloat16(a, places, count, kv_head);
}

}  // namespace freeexport
