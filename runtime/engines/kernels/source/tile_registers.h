// AMX tile registers, 16 rows of 64 bytes each, in inline assembly, because GCC's intrinsics do not
// tell the compiler that they access memory. `Vec` are the registers of AVX-512.
#pragma once

#include "vec512.h"

namespace freeexport {
namespace {

using Vec = Vec512;

}  // namespace
}  // namespace freeexport

#include "fused.h"

namespace freeexport {
namespace {

struct alignas(64) TileConfiguration {
  uint8_t palette = 1;
  uint8_t unused[15] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Configures the tiles of the thread during its lifetime.
struct Tiles {
  Tiles() {
    const TileConfiguration configuration;
    asm volatile("ldtilecfg %0" ::"m"(configuration) : "memory");
  }
  ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
};

template <int Tile>
FREEEXPORT_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
template <int Tile>
FREEEXPORT_INLINE void load_tile(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(Tile) : "memory");
}
template <int Tile>
FREEEXPORT_INLINE void store_tile(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(Tile) : "memory");
}
// sums[m][n] += sum over k of a[m][2k] b[k][2n] + a[m][2k + 1] b[k][2n + 1]. Values are
// bfloat16, sums fp32.
template <int Sums, int A, int B>
FREEEXPORT_INLINE void add_tile_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(A), "i"(B));
}

// Adds the products of R (1 or 2) tiles of rows and P (1 or 2) tiles of columns to tiles 2 r + p,
// for `count` consecutive tiles of each. Two tiles of rows, or of columns, are `apart`.
template <int R, int P>
FREEEXPORT_INLINE void add_products(const uint16_t* a, int64_t a_apart, const uint16_t* b,
                                    int64_t b_apart, int64_t count) {
  for (int64_t i = 0; i < count; i++, a += kTileValues, b += kTileValues) {
    load_tile<4>(a, 64);
    load_tile<6>(b, 64);
    if constexpr (R > 1) load_tile<5>(a + a_apart, 64);
    if constexpr (P > 1) load_tile<7>(b + b_apart, 64);
    add_tile_product<0, 4, 6>();
    if constexpr (P > 1) add_tile_product<1, 4, 7>();
    if constexpr (R > 1) add_tile_product<2, 5, 6>();
    if constexpr (R > 1 && P > 1) add_tile_product<3, 5, 7>();
  }
}

}  // namespace
}  // namespace freeexport
