// Attention of a prompt's rows in AMX tiles. See attention_bfloat16.h.
#include "amx.h"
#include "tile_registers.h"

namespace freeexport {
namespace {

struct Products {
  static constexpr int kTiles = 1;
  const Tiles configured;

  template <int P, int T, bool kAdds>
  static void multiply(const uint16_t* a, int64_t apart, const uint16_t* b, int64_t, int64_t count,
                       float* sums, int64_t) {
    static_assert(T == 1, "the other registers hold rows and sums");
    if constexpr (kAdds) {
      load_tile<0>(sums, 64);
      if constexpr (P > 1) load_tile<1>(sums + kTileSums, 64);
      if constexpr (P > 2) load_tile<2>(sums + 2 * kTileSums, 64);
      if constexpr (P > 3) load_tile<3>(sums + 3 * kTileSums, 64);
    } else {
      clear_tile<0>();
      if constexpr (P > 1) clear_tile<1>();
      if constexpr (P > 2) clear_tile<2>();
      if constexpr (P > 3) clear_tile<3>();
    }
    for (int64_t i = 0; i < count; i++, a += kTileValues, b += kTileValues) {
      load_tile<4>(b, 64);
      load_tile<5>(a, 64);
      add_tile_product<0, 5, 4>();
      if constexpr (P > 1) load_tile<6>(a + apart, 64), add_tile_product<1, 6, 4>();
      if constexpr (P > 2) load_tile<5>(a + 2 * apart, 64), add_tile_product<2, 5, 4>();
      if constexpr (P > 3) load_tile<6>(a + 3 * apart, 64), add_tile_product<3, 6, 4>();
    }
    store_tile<0>(sums, 64);
    if constexpr (P > 1) store_tile<1>(sums + kTileSums, 64);
    if constexpr (P > 2) store_tile<2>(sums + 2 * kTileSums, 64);
    if constexpr (P > 3) store_tile<3>(sums + 3 * kTileSums, 64);
  }
};

}  // namespace
}  // namespace freeexport

#include "attention_bfloat16.h"

namespace freeexport {

bool amx_attend(const Attention& a, const Place* places, int64_t count, int64_t kv_head) {
  return attend_in_bfloat16(a, places, count, kv_head);
}

}  // namespace freeexport
