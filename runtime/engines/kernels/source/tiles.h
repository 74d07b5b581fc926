// Kernels of one instruction set, with a `Vec` that the including file defines. All names are local
// to the file, because code compiled for one instruction set must not be linked into code for
// another.
#pragma once

#include <cstring>

#include "fused.h"

namespace freeexport {
namespace {

constexpr int kQuads = kGroup / 4;

inline void quantize_group(const float* x, Group* to) {
  constexpr int32_t kInfinite = 0x7f800000;
  const int32_t bits = Vec::peak_bits(x);
  float peak;
  std::memcpy(&peak, &bits, sizeof(peak));
  float scale = peak / 127.0f;
  int32_t sums[2] = {0, 0};
  if (bits >= kInfinite || peak < 1e-30f) {
    // NaN and infinite inputs must show in the result. Tiny inputs become 0.
    std::memset(to->values, 0, kGroup);
    if (bits >= kInfinite) {
      const int32_t nan = 0x7fc00000;
      std::memcpy(&scale, &nan, sizeof(scale));
    } else {
      scale = 0.0f;
    }
  } else {
    Vec::round(x, 127.0f / peak, to->values, sums);
  }
  const int32_t sum = sums[0] + sums[1];
  to->scale = scale;
  to->minus_sum = static_cast<int16_t>(-sum);
  to->counter = kCounter;
  to->scaled_sum = scale * static_cast<float>(sum);
  for (int i = 0; i < 2; i++) {
    to->halves[i][0] = static_cast<int16_t>(-sums[i]);
    to->halves[i][1] = kCounter;
    to->starts[i] = Vec::kNothing - sum * (i == 0 ? 8 : 128);
  }
}

// Quantizes a row to groups that are `stride` apart. With `pairs`, its remainders are the next row.
inline void quantize(const float* x, int64_t inputs, Group* to, int64_t stride, int pairs) {
  const int64_t groups = (inputs + kGroup - 1) / kGroup;
  float padded[kGroup];
  float rest[kGroup];
  for (int64_t g = 0; g < groups; g++, x += kGroup, to += stride) {
    if (inputs - g * kGroup < kGroup) {  // pad with zeros
      std::memset(padded, 0, sizeof(padded));
      std::memcpy(padded, x, static_cast<size_t>(inputs - g * kGroup) * sizeof(float));
      x = padded;
    }
    quantize_group(x, to);
    if (!pairs) continue;
    for (int i = 0; i < kGroup; i++) rest[i] = x[i] - to->scale * static_cast<float>(to->values[i]);
    quantize_group(rest, to + 1);
  }
}

inline int64_t rows_of_tile(int64_t first, int64_t last) {
  return last - first < Vec::kRows ? last - first : Vec::kRows;
}

inline void prepare(const Product& product, int64_t row, float* normed, Group* rows) {
  static_assert(Vec::kRows % 2 == 0, "a pair of rows is in one tile");
  const float* x = normed_row(product, row, normed);
  const int pairs = product.weight.pairs;
  const int64_t quantized = row << pairs;
  const int64_t tile = quantized / Vec::kRows * Vec::kRows;
  const int64_t groups = product.weight.groups();
  const int64_t first = tile * groups + (quantized - tile);
  const int64_t stride = rows_of_tile(tile, product.quantized_rows());
  quantize(x, product.weight.inputs, rows + first, stride, pairs);
  if (!Vec::kWide || !has_wide_rows(product)) return;
  int16_t* wide = wide_rows_of(product, rows);
  for (int64_t at = first; at < first + groups * stride; at += stride)
    for (int64_t part = at; part <= at + pairs; part++)
      for (int i = 0; i < kGroup; i++) wide[part * kGroup + i] = rows[part].values[i];
}

// Adds the bias to the sums of M rows, for outputs from `output`, and stores them in y, whose rows
// are `stride` apart. With `pairs`, first adds the sums of each pair of rows.
template <int M>
inline void put(const Vec::Float (&sums)[M], const Weight& weight, int64_t output, float* y,
                int64_t stride, int pairs) {
  if constexpr (M % 2 == 0) {
    if (pairs) {
      Vec::Float both[M / 2];
#pragma GCC unroll 4
      for (int m = 0; m < M / 2; m++) both[m] = Vec::added(sums[2 * m], sums[2 * m + 1]);
      return put(both, weight, output, y, stride, 0);
    }
  }
  const int64_t left = weight.outputs - output;
  if (left <= 0) return;
  if (left >= Vec::kLanes) {
    const Vec::Float bias = weight.bias ? Vec::floats(weight.bias + output) : Vec::zero();
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
      Vec::store(y + m * stride, Vec::add_product(sums[m], Vec::set(1.0f), bias));
    return;
  }
  float all[M][Vec::kLanes];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) Vec::store(all[m], sums[m]);
  for (int m = 0; m < M; m++)
    for (int i = 0; i < left; i++)
      y[m * stride + i] = all[m][i] + (weight.bias ? weight.bias[output + i] : 0.0f);
}

// True if weights should be evicted from the caches first, so that keys, values and the caller's
// data stay there. With 8 bits, a token then takes 7 to 10 % less time, and with 4 bits up to 5 %
// less (Zen 5, not measured on others). False for Vec::kRows rows: they may be a part of a larger
// call, which reads the weights again.
template <int M>
inline bool reads_once() {
  return kProcessor.zen5 && M < Vec::kRows;
}

// Prefetches `bytes` bytes, to be evicted first if they are read `once`.
FREEEXPORT_INLINE void fetch(const void* data, int64_t bytes, bool once) {
  const char* from = static_cast<const char*>(data);
  if (once) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 0);
  } else {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at);
  }
}

// Reference of a weight's values: the middle, a zero point, or an offset that is added.
enum class From { kMiddle, kZero, kOffset };

// Number of factors of 4 bits that are prefetched ahead. One row takes 1 to 6 % less time (Zen 4).
constexpr int64_t kFactorsAhead = 256;

// Factors of a panel's blocks, starting at output `lane`.
template <int Bits, From Where>
struct Factors {
  int64_t left = 0;
  int64_t groups_of_block;
  const uint16_t* scales;
  const uint16_t* offsets;
  const uint8_t* zeros;
  Vec::Int zero = {};
  Vec::Scale scale = {};
  Vec::Float offset = {};

  void begin(const Weight& weight, int64_t panel, int lane, int64_t block = 0) {
    groups_of_block = weight.block / kGroup;
    const int64_t at = (panel * weight.blocks() + block) * kPanel + lane;
    scales = weight.scales + at;
    zeros = Where == From::kZero ? weight.zeros + at : nullptr;
    offsets = Where == From::kOffset ? weight.offsets + at : nullptr;
  }
  // Must be called before each group.
  void next(bool once) {
    if (left-- > 0) return;
    left = groups_of_block - 1;
    if (Bits == 4) fetch(scales + kFactorsAhead, 1, once);
    scale = Vec::scale(scales);
    scales += kPanel;
    if constexpr (Where == From::kOffset) {
      if (Bits == 4) fetch(offsets + kFactorsAhead, 1, once);
      offset = Vec::halves(offsets);
      offsets += kPanel;
    } else if constexpr (Where == From::kZero) {
      zero = Vec::counted(Vec::widened(zeros));
      zeros += kPanel;
    }
  }
  // Returns the initial value of a group's integer sum.
  Vec::Int start(const Group& group) const {
    if constexpr (Where == From::kOffset) return Vec::all(Vec::kNothing);
    if constexpr (Where == From::kMiddle) return Vec::all(group.starts[Bits == 8]);
    return Vec::start(zero, group);
  }
  // Returns the sum of earlier groups plus that of this one.
  Vec::Float added(Vec::Int dot, const Group& group, Vec::Float sum) const {
    sum = Vec::add_product(Vec::scaled(dot, scale), Vec::set(group.scale), sum);
    if constexpr (Where == From::kOffset)
      sum = Vec::add_product(offset, Vec::set(group.scaled_sum), sum);
    return sum;
  }
};

// Returns the distance of prefetching in bytes. 4 bits always gain from it. With 8 bits, hardware
// prefetching alone is 20 % faster on Zen 4, as long as it keeps up. It is 15 % slower on Emerald
// Rapids with one row and 30 % with four, and 30 % slower with one row on Zen 3, which lacks the
// newer instructions. On Zen 5, 8 and 16 rows take 3 to 4 % less time with 4096 bytes than with
// 2048.
template <int Bits, int M>
inline int64_t bytes_ahead() {
  if (Bits == 4 || Vec::kFetches || kProcessor.zen5) return 4096;
  if (kProcessor.intel) return 2048;
  return M > 4 ? 2048 : 0;
}

// Multiplies M rows with `Wide` registers of outputs of a panel, starting at output `lane`, or with
// as many panels if a register holds a panel. The rows of y are `stride` apart, its panels `apart`.
template <int Bits, From Where, int M, int Wide>
inline void tile(const Group* rows, const Weight& weight, int64_t panel, int lane, float* y,
                 int64_t stride, int64_t apart) {
  constexpr bool kWhole = Vec::kLanes == kPanel;
  using Quads = typename Vec::template Quads<Bits>;
  const int64_t groups = weight.groups();
  const int64_t bytes = weight.group_bytes();
  const uint8_t* data = weight.data + panel * groups * bytes + lane * 4;
  // The first outputs of a panel prefetch for all others.
  const int64_t ahead = lane > 0 ? 0 : bytes_ahead<Bits, M>();
  const bool once = reads_once<M>();
  const int64_t bytes_apart = kWhole ? groups * bytes : 4 * Vec::kLanes;
  Factors<Bits, Where> factors[Wide];
  Vec::Float sums[Wide][M];
#pragma GCC unroll 2
  for (int w = 0; w < Wide; w++) {
    factors[w].begin(weight, panel + (kWhole ? w : 0), lane + (kWhole ? 0 : w * Vec::kLanes));
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sums[w][m] = Vec::zero();
  }
  for (int64_t g = 0; g < groups; g++, data += bytes, rows += M) {
    // Skips the second of two panels after the end of the first, because it is already being read.
    const uint8_t* next =
        data + ahead + (kWhole && Wide > 1 && g * bytes + ahead >= bytes_apart ? bytes_apart : 0);
#pragma GCC unroll 2
    for (int w = 0; w < (kWhole ? Wide : 1) && ahead; w++)
      fetch(next + w * bytes_apart, bytes, once);
#pragma GCC unroll 2
    for (int w = 0; w < Wide; w++) factors[w].next(once);
    Quads::template multiply<M, Wide>(
        data, bytes_apart, rows, [&](int m, int w) { return factors[w].start(rows[m]); },
        [&](int m, int w, Vec::Int dot) {
          sums[w][m] = factors[w].added(dot, rows[m], sums[w][m]);
        });
  }
#pragma GCC unroll 2
  for (int w = 0; w < Wide; w++)
    put(sums[w], weight, panel * kPanel + lane + w * Vec::kLanes,
        y + lane + w * (kWhole ? apart : Vec::kLanes), stride, weight.pairs);
}

// Multiplies with all outputs of a panel.
template <int Bits, From Where, int M>
inline void tiles_of_panel(const Group* rows, const Weight& weight, int64_t panel, float* y,
                           int64_t stride) {
  constexpr int kBest = Vec::template Quads<Bits>::template kWide<M>;
  constexpr int kWide = Vec::kLanes == kPanel ? 1 : kBest;
  for (int lane = 0; lane < kPanel && panel * kPanel + lane < weight.outputs;
       lane += kWide * Vec::kLanes)
    tile<Bits, Where, M, kWide>(rows, weight, panel, lane, y, stride, 0);
}

// Multiplies with two panels, at the same time if that is faster.
template <int Bits, From Where, int M>
inline void tiles_of_two(const Group* rows, const Weight& weight, int64_t panel, float* y,
                         int64_t stride, int64_t apart) {
  if constexpr (Vec::kLanes == kPanel && Vec::template Quads<Bits>::template kWide<M> == 2) {
    tile<Bits, Where, M, 2>(rows, weight, panel, 0, y, stride, apart);
  } else {
    tiles_of_panel<Bits, Where, M>(rows, weight, panel, y, stride);
    tiles_of_panel<Bits, Where, M>(rows, weight, panel + 1, y + apart, stride);
  }
}

using Tile = void (*)(const Group*, const Weight&, int64_t, float*, int64_t);
using TwoTiles = void (*)(const Group*, const Weight&, int64_t, float*, int64_t, int64_t);

// Functions for 1 to Vec::kRows rows.
struct Tiles {
  Tile of[Vec::kRows + 1] = {};
  TwoTiles of_two[Vec::kRows + 1] = {};
};

template <int Bits, From Where>
struct TilesOf : Tiles {
  constexpr TilesOf() { fill<Vec::kRows>(); }
  template <int M>
  constexpr void fill() {
    of[M] = tiles_of_panel<Bits, Where, M>;
    of_two[M] = tiles_of_two<Bits, Where, M>;
    if constexpr (M > 1) fill<M - 1>();
  }
};

inline const Tiles& tiles_of(const Weight& weight) {
  static constexpr TilesOf<4, From::kMiddle> in_4_bits{};
  static constexpr TilesOf<4, From::kZero> in_4_bits_from_zeros{};
  static constexpr TilesOf<4, From::kOffset> in_4_bits_with_offsets{};
  static constexpr TilesOf<8, From::kMiddle> in_8_bits{};
  static constexpr TilesOf<8, From::kZero> in_8_bits_from_zeros{};
  if (weight.bits == 8)
    return weight.zeros ? static_cast<const Tiles&>(in_8_bits_from_zeros) : in_8_bits;
  if (weight.offsets) return in_4_bits_with_offsets;
  return weight.zeros ? static_cast<const Tiles&>(in_4_bits_from_zeros) : in_4_bits;
}

#include "file_tiles.h"
#include "float_tiles.h"
#include "exact_tiles.h"
#include "wide_tiles.h"

// Multiplies rows first..last with panels panel..end. y begins at row `first` and the first output.
inline void multiply(const Group* rows, const int16_t* wide, int64_t first, int64_t last,
                     const Weight& weight, int64_t panel, int64_t end, float* y, int64_t stride,
                     int64_t apart) {
  const bool file = weight.multiples || weight.bits == 5;
  first <<= weight.pairs;
  last <<= weight.pairs;
  // On Zen 4, reading two panels at a time is slower: 2 rows take up to 1.7 times as long as one,
  // instead of 1.06 (docs/precision.md, "Rows"). On Zen 5, 16 rows in 8 bits gain 17 %.
  const int64_t rows_of_two = kProcessor.intel ? 2 : kProcessor.zen5 ? 16 : INT64_MAX;
  if (Vec::kLanes == kPanel && last - first >= rows_of_two && !file) {
    const TwoTiles* two = tiles_of(weight).of_two;
    for (; panel + 1 < end; panel += 2, y += 2 * apart)
      for (int64_t m = first; m < last; m += Vec::kRows)
        two[rows_of_tile(m, last)](rows + m * weight.groups(), weight, panel,
                                   y + ((m - first) >> weight.pairs) * stride, stride, apart);
  }
  const Tile* tiles = file ? tiles_of_file(weight) : tiles_of(weight).of;
  for (; panel < end; panel++, y += apart)
    for (int64_t m = wide_rows<Vec>(rows, wide, first, last, weight, panel, y, stride); m < last;
         m += Vec::kRows)
      tiles[rows_of_tile(m, last)](rows + m * weight.groups(), weight, panel,
                                   y + ((m - first) >> weight.pairs) * stride, stride);
}

constexpr int64_t kGatedRows = 2 * kTaskRows;  // for all panels together

// Computes all gates, then all ups, of the panels. Memory is then read in longer streams.
template <typename Row>
inline void gated_panels(const Product& product, const Row* rows, const int16_t* wide,
                         int64_t first, int64_t last, int64_t panel, int64_t end) {
  const Weight& weight = product.weight;
  const int64_t values = (last - first) * kPanel;  // of a panel
  const int64_t all = (end - panel) * values;      // of all panels
  float gate[kGatedRows * kPanel];
  float up[kGatedRows * kPanel];
  if (weight.outputs < end * kPanel) {  // the last panel is incomplete
    std::memset(gate, 0, static_cast<size_t>(all) * sizeof(float));
    std::memset(up, 0, static_cast<size_t>(all) * sizeof(float));
  }
  multiply(rows, wide, first, last, weight, panel, end, gate, kPanel, values);
  activate(product.activation, gate, all);
  multiply(rows, wide, first, last, product.up, panel, end, up, kPanel, values);
  for (int64_t i = 0; i < all; i++) gate[i] *= up[i];
  for (int64_t p = panel; p < end; p++) {
    const int64_t left = weight.outputs - p * kPanel;
    const size_t bytes = static_cast<size_t>(left < kPanel ? left : kPanel) * sizeof(float);
    for (int64_t m = first; m < last; m++)
      std::memcpy(product.y + m * weight.outputs + p * kPanel,
                  gate + (p - panel) * values + (m - first) * kPanel, bytes);
  }
}

template <typename Row>
inline void panels_of(const Product& product, const Row* rows, const int16_t* wide, int64_t first,
                      int64_t last, int64_t panel, int64_t end) {
  const Weight& weight = product.weight;
  if (product.beside || product.up.data == nullptr) {
    const int64_t own = weight.panels();
    const int64_t stride = product.outputs();
    const int64_t behind = panel > own ? panel - own : 0;
    float* y = product.y + first * stride;
    float* beside = y + weight.outputs + behind * kPanel;
    multiply(rows, wide, first, last, weight, panel, least(end, own), y + panel * kPanel, stride,
             kPanel);
    multiply(rows, wide, first, last, product.up, behind, end - own, beside, stride, kPanel);
    if (product.activation == kNone) return;
    const int64_t count = least(end * kPanel, weight.outputs) - panel * kPanel;
    for (int64_t m = 0; m < last - first; m++)
      activate(product.activation, y + m * stride + panel * kPanel, count);
    return;
  }
  const int64_t most = kGatedRows / (last - first);
  for (; panel < end; panel += most)
    gated_panels(product, rows, wide, first, last, panel, end - panel < most ? end : panel + most);
}

inline void panels(const Product& product, const Group* rows, int64_t first, int64_t last,
                   int64_t panel, int64_t end) {
  panels_of(product, rows, wide_rows_of(product, rows), first, last, panel, end);
}

inline void float_panels(const Product& product, const float* rows, int64_t first, int64_t last,
                         int64_t panel, int64_t end) {
  panels_of(product, rows, nullptr, first, last, panel, end);
}

}  // namespace
}  // namespace freeexport
