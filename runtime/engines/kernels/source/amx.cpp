// Products of a prompt's rows in AMX tiles. Rows and weights are rounded to bfloat16, sums are
// fp32.
//
// A task multiplies many rows with two panels. It unpacks a piece of the panels' inputs to tiles
// once for all rows, multiplies, and continues with the next piece. The sums of a row depend
// neither on the other rows nor on their number.
#include "amx.h"
#include "quads.h"
#include "tile_registers.h"

namespace freeexport {
namespace {

// Groups of inputs that are unpacked at once. Two panels of kPieceGroups fit in the L1 cache. If
// all sums stay in registers between pieces, smaller pieces suffice, and leave space for a second
// thread of the core.
constexpr int64_t kPieceGroups = 20;
constexpr int64_t kKeptPieceGroups = 4;
constexpr int64_t kKeptTiles = 2;
constexpr int64_t kMostTiles = kPromptRows / kTileRows;

// Byte orders that expand a quad of 16 outputs, [16][4], to pairs of inputs: inputs 0 and 1 of the
// first 8 outputs, then of the last 8, then inputs 2 and 3 of both. Each byte becomes the lowest of
// four.
struct Order {
  uint8_t at[4][64] = {};
  constexpr Order() {
    for (int part = 0; part < 4; part++)
      for (int i = 0; i < 16; i++)
        at[part][4 * i] = static_cast<uint8_t>(4 * (part % 2 * 8 + i / 2) + part / 2 * 2 + i % 2);
  }
};

// Scales and offsets of a panel: those of the first 8 outputs and those of the last 8, each twice,
// for pairs of inputs.
struct Factors {
  __m512 scale[2];
  __m512 offset[2];

  Factors(__m512 by, __m512 plus) {
    const __m512i twice = _mm512_srli_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 1);
    for (int half = 0; half < 2; half++) {
      const __m512i lanes = _mm512_add_epi32(twice, _mm512_set1_epi32(8 * half));
      scale[half] = _mm512_permutexvar_ps(lanes, by);
      offset[half] = _mm512_permutexvar_ps(lanes, plus);
    }
  }
};

// Returns the factors of a block, which has its own scale or a multiple of a super-block's.
FREEEXPORT_INLINE Factors factors_of(const Weight& weight, int64_t block, int64_t scale_of) {
  const __m512 whole = Vec::halves(weight.scales + scale_of * kPanel);
  const int8_t* multiples =
      weight.multiples ? weight.multiples + block * (weight.offsets ? 2 : 1) * kPanel : nullptr;
  const __m512 scale = multiples ? Vec::times(whole, multiples) : whole;
  if (weight.offsets) {
    const __m512 offset = Vec::halves(weight.offsets + scale_of * kPanel);
    return {scale, multiples ? Vec::times(offset, multiples + kPanel) : offset};
  }
  const __m512i zero =
      weight.zeros ? Vec::widened(weight.zeros + block * kPanel) : Vec::all(1 << (weight.bits - 1));
  return {scale, _mm512_mul_ps(_mm512_cvtepi32_ps(zero), _mm512_sub_ps(Vec::zero(), scale))};
}

// Unpacks groups first..last of a panel to tiles [groups][16 pairs of inputs][16 outputs][2].
template <int Bits>
void unpack(const Weight& weight, int64_t panel, int64_t first, int64_t last, uint16_t* to) {
  static constexpr Order kOrder{};
  const __m512i order[4] = {_mm512_loadu_si512(kOrder.at[0]), _mm512_loadu_si512(kOrder.at[1]),
                            _mm512_loadu_si512(kOrder.at[2]), _mm512_loadu_si512(kOrder.at[3])};
  constexpr int64_t kBytes = kGroup * kPanel * Bits / 8;
  const uint8_t* data = weight.data + (panel * weight.groups() + first) * kBytes;
  const int64_t groups_of_block = Bits == 6 ? 1 : weight.block / kGroup;
  const int64_t blocks = panel * weight.blocks();
  const int64_t scales = panel * weight.scales_of_panel();
  int64_t block = first / groups_of_block;
  int64_t next = first;
  Factors low(Vec::zero(), Vec::zero()), high = low;
  for (int64_t g = first; g < last; g++, data += kBytes, to += kTileValues) {
    for (int64_t at = 0; at < kBytes; at += 64) __builtin_prefetch(data + at + 4096);
    const VnniQuads<Vec, Bits> quads(data);
    if (g == next) {
      const int64_t scale_of = scales + (weight.multiples ? g / (kSuper / kGroup) : block);
      low = high = factors_of(weight, blocks + (Bits == 6 ? 2 * block : block), scale_of);
      if constexpr (Bits == 6) high = factors_of(weight, blocks + 2 * block + 1, scale_of);
      next = ++block * groups_of_block;
    }
    each_quad([&](auto quad) {
      const Factors& by = quad < 4 ? low : high;
#pragma GCC unroll 2
      for (int pair = 0; pair < 2; pair++) {
        __m512 halves[2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
          const __m512i value = _mm512_maskz_permutexvar_epi8(
              0x1111111111111111, order[2 * pair + half], quads.quads[quad]);
          halves[half] =
              _mm512_fmadd_ps(_mm512_cvtepi32_ps(value), by.scale[half], by.offset[half]);
        }
        _mm512_store_si512(to + 32 * (2 * quad + pair),
                           (__m512i)_mm512_cvtne2ps_pbh(halves[1], halves[0]));
      }
    });
  }
}

using Unpack = void (*)(const Weight&, int64_t, int64_t, int64_t, uint16_t*);

// A panel of a product's outputs: its weight, its number there, and y of its first output in row 0.
struct Panel {
  const Weight* weight;
  int64_t number;
  float* y;

  FREEEXPORT_INLINE int64_t outputs() const {
    const int64_t left = weight->outputs - number * kPanel;
    return left < kPanel ? left : kPanel;
  }
};

using Sums = float[2][kTileRows * kPanel];  // of a tile of rows, for two panels

struct alignas(64) Scratch {
  uint16_t weights[2][kPieceGroups * kTileValues];
  Sums sums[kMostTiles];  // between pieces
  Sums tiles[2];
  float bias[2][kPanel];
};

template <int Tile>
FREEEXPORT_INLINE void begin_tile(const float* bias, const float* sums) {
  if (sums != nullptr)
    load_tile<Tile>(sums, 64);
  else
    load_tile<Tile>(bias, 0);
}

// Adds the products of a piece, for R tiles of rows and P panels, to `from`, or to the bias in the
// first piece, and stores them in `to`. `kept` sums stay in registers from the first piece to the
// last.
template <int R, int P>
void multiply_piece(Scratch& scratch, const uint16_t* rows, int64_t apart, int64_t count,
                    bool begins, bool ends, bool kept, Sums* from, Sums* to) {
  const auto sums = [&](int r, int p) { return begins ? nullptr : from[r][p]; };
  if (begins || !kept) {
    begin_tile<0>(scratch.bias[0], sums(0, 0));
    if constexpr (P > 1) begin_tile<1>(scratch.bias[1], sums(0, 1));
    if constexpr (R > 1) begin_tile<2>(scratch.bias[0], sums(1, 0));
    if constexpr (R > 1 && P > 1) begin_tile<3>(scratch.bias[1], sums(1, 1));
  }
  add_products<R, P>(rows, apart, scratch.weights[0], kPieceGroups * kTileValues, count);
  if (kept && !ends) return;
  store_tile<0>(to[0][0], 64);
  if constexpr (P > 1) store_tile<1>(to[0][1], 64);
  if constexpr (R > 1) store_tile<2>(to[1][0], 64);
  if constexpr (R > 1 && P > 1) store_tile<3>(to[1][1], 64);
}

// x / (1 + e^-x), with a relative error of about 1e-5, which is small compared with that of
// bfloat16. 0 below -87.
FREEEXPORT_INLINE __m512 silu(__m512 x) {
  const __m512 power = _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504088896341f));
  const __m512 sum = _mm512_add_ps(Vec::power_of_two(power), _mm512_set1_ps(1.0f));
  const __m512 near = _mm512_rcp14_ps(sum);
  const __m512 inverse = _mm512_mul_ps(near, _mm512_fnmadd_ps(sum, near, _mm512_set1_ps(2.0f)));
  return _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(power, _mm512_set1_ps(126.0f), _CMP_NGE_UQ), x,
                             inverse);
}

// Multiplies all rows with one or two panels. `gated`: the second one's result multiplies the
// first's.
void multiply_panels(const Product& product, const uint16_t* rows, int64_t first, int64_t last,
                     const Panel* panels, int count, bool gated, Scratch& scratch) {
  const int64_t groups = product.weight.groups();
  const int64_t stride = product.outputs();
  const int columns = gated ? 1 : count;  // panels in y
  for (int p = 0; p < count; p++) {
    const float* bias = panels[p].weight->bias;
    for (int64_t i = 0; i < kPanel; i++)
      scratch.bias[p][i] =
          bias != nullptr && i < panels[p].outputs() ? bias[panels[p].number * kPanel + i] : 0.0f;
  }
  const int64_t tiles = (last - first + kTileRows - 1) / kTileRows;
  const bool kept = tiles <= kKeptTiles;
  const int64_t most = kept ? kKeptPieceGroups : kPieceGroups;
  const int64_t pieces = (groups + most - 1) / most;
  for (int64_t piece = 0; piece < pieces; piece++) {
    const int64_t begin = groups * piece / pieces;
    const int64_t end = groups * (piece + 1) / pieces;
    for (int p = 0; p < count; p++) {
      const int bits = panels[p].weight->bits;
      const Unpack to_tiles = bits == 4   ? unpack<4>
                              : bits == 5 ? unpack<5>
                              : bits == 6 ? unpack<6>
                                          : unpack<8>;
      to_tiles(*panels[p].weight, panels[p].number, begin, end, scratch.weights[p]);
    }
    for (int64_t tile = 0; tile < tiles; tile += 2) {
      const bool ends = piece + 1 == pieces;
      const bool two = tile + 1 < tiles;
      const int64_t row = first + tile * kTileRows;
      const int64_t behind = least(last, row + (two ? 2 : 1) * kTileRows);
      for (int64_t m = row; ends && m < behind; m++)  // prefetch the output
        for (int p = 0; p < columns; p++) __builtin_prefetch(panels[p].y + m * stride, 1);
      const uint16_t* from = rows + ((first / kTileRows + tile) * groups + begin) * kTileValues;
      const auto multiply = two ? (count == 2 ? multiply_piece<2, 2> : multiply_piece<2, 1>)
                                : (count == 2 ? multiply_piece<1, 2> : multiply_piece<1, 1>);
      Sums* sums = scratch.sums + tile;
      multiply(scratch, from, groups * kTileValues, end - begin, piece == 0, ends, kept, sums,
               ends ? scratch.tiles : sums);
      if (!ends) continue;
      if (product.activation != kNone && product.activation != kSilu)
        for (int p = 0; p < columns; p++)
          for (int r = 0; r <= two; r++)
            activate(product.activation, scratch.tiles[r][p], kTileRows * kPanel);
      for (int64_t m = row; m < behind; m++)
        for (int p = 0; p < columns; p++) {
          const Sums& sums = scratch.tiles[(m - row) / kTileRows];
          const int64_t at = (m - row) % kTileRows * kPanel;
          __m512 y = _mm512_load_ps(sums[p] + at);
          if (product.activation == kSilu) y = silu(y);
          if (gated) y = _mm512_mul_ps(y, _mm512_load_ps(sums[1] + at));
          _mm512_mask_storeu_ps(panels[p].y + m * stride,
                                static_cast<__mmask16>((1 << panels[p].outputs()) - 1), y);
        }
    }
  }
}

}  // namespace

void amx_prepare(const Product& product, int64_t row, float* normed, uint16_t* rows) {
  const int64_t inputs = product.weight.inputs;
  const int64_t groups = product.weight.groups();
  const float* x = normed_row(product, row, normed);
  uint16_t* to = rows + row / kTileRows * groups * kTileValues + row % kTileRows * kGroup;
  const auto values = [&](int64_t at) {
    const int64_t left = inputs - at;
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(left >= 16 ? 0xffff
                                                        : left > 0 ? (1 << left) - 1
                                                                   : 0),
                                 x + at);
  };
  for (int64_t g = 0; g < groups; g++, to += kTileValues)
    _mm512_storeu_si512(to,
                        (__m512i)_mm512_cvtne2ps_pbh(values(g * kGroup + 16), values(g * kGroup)));
}

void amx_panels(const Product& product, const uint16_t* rows, int64_t first, int64_t last,
                int64_t panel, int64_t end) {
  const Tiles tiles;
  Scratch scratch;
  const bool gated = product.up.data != nullptr && !product.beside;
  const auto at = [&](int64_t number) -> Panel {
    const int64_t behind = number - product.weight.panels();
    if (behind < 0) return {&product.weight, number, product.y + number * kPanel};
    return {&product.up, behind, product.y + product.weight.outputs + behind * kPanel};
  };
  for (; panel < end; panel += gated ? 1 : 2) {
    Panel panels[2] = {at(panel), {}};
    if (gated)
      panels[1] = {&product.up, panel, nullptr};
    else if (panel + 1 < end)
      panels[1] = at(panel + 1);
    multiply_panels(product, rows, first, last, panels, panels[1].weight ? 2 : 1, gated, scratch);
  }
}

}  // namespace freeexport
