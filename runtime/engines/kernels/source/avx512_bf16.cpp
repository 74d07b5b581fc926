// AVX-512 with dot products of bytes (VNNI) and of pairs in bfloat16, which attention to long
// prompts uses.
#include "avx512_bf16.h"
#include "vec512.h"

namespace freeexport {
namespace {

using Vec = Vec512;

struct Products {
  // A value of a row is read once for two tiles. With one, reading takes as long as multiplying
  // (Zen 4).
  static constexpr int kTiles = 2;

  template <int P, int T, bool kAdds>
  static void multiply(const uint16_t* a, int64_t a_apart, const uint16_t* b, int64_t b_apart,
                       int64_t count, float* sums, int64_t sums_apart) {
    for (int p = 0; p < P; p++, a += a_apart, sums += kTileSums)
      for (int64_t row = 0; row < kTileRows; row += kTileRows / T)
        multiply_rows<T, kAdds>(a + row * kGroup, b, b_apart, count, sums + row * kPanel,
                                sums_apart);
  }

 private:
  template <int T, bool kAdds>
  static void multiply_rows(const uint16_t* a, const uint16_t* b, int64_t b_apart, int64_t count,
                            float* sums, int64_t sums_apart) {
    constexpr int kRows = kTileRows / T;
    __m512 all[T][kRows];
#pragma GCC unroll 2
    for (int t = 0; t < T; t++)
#pragma GCC unroll 16
      for (int row = 0; row < kRows; row++)
        all[t][row] =
            kAdds ? _mm512_load_ps(sums + t * sums_apart + row * kPanel) : _mm512_setzero_ps();
    for (int64_t tile = 0; tile < count; tile++, a += kTileValues, b += kTileValues)
      for (int64_t pair = 0; pair < kGroup / 2; pair++) {
        __m512bh queries[T];
#pragma GCC unroll 2
        for (int t = 0; t < T; t++)
          queries[t] = (__m512bh)_mm512_load_si512(b + t * b_apart + pair * 2 * kPanel);
#pragma GCC unroll 16
        for (int row = 0; row < kRows; row++) {
          int32_t both;
          std::memcpy(&both, a + row * kGroup + 2 * pair, sizeof(both));
          const auto values = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 2
          for (int t = 0; t < T; t++)
            all[t][row] = _mm512_dpbf16_ps(all[t][row], queries[t], values);
        }
      }
#pragma GCC unroll 2
    for (int t = 0; t < T; t++)
#pragma GCC unroll 16
      for (int row = 0; row < kRows; row++)
        _mm512_store_ps(sums + t * sums_apart + row * kPanel, all[t][row]);
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
