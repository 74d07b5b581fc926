// The kernels of one instruction set, from a `Vec` that the including file defines. All names are local to the file:
// what the compiler makes here for one processor must not be linked into code for another.
#pragma once

#include <cstring>

#include "fused.h"

namespace freeexport {
namespace {

constexpr int kQuads = kGroup / 4;

// Of x [inputs] the next group, behind its end zeros.
inline void read_group(const float* x, int64_t count, float* group) {
  if (count >= kGroup) {
    std::memcpy(group, x, kGroup * sizeof(float));
    return;
  }
  std::memset(group, 0, kGroup * sizeof(float));
  std::memcpy(group, x, static_cast<size_t>(count) * sizeof(float));
}

// The largest magnitude, as its bits: of floats without sign these are in the order of their values, NaN last.
inline int32_t peak_bits(const float* group) {
  int32_t bits[kGroup], peak = 0;
  std::memcpy(bits, group, sizeof(bits));
  for (int i = 0; i < kGroup; i++) {
    const int32_t magnitude = bits[i] & 0x7fffffff;
    peak = magnitude > peak ? magnitude : peak;
  }
  return peak;
}

// To the groups of a row, which stand `stride` apart.
inline void quantize(const float* x, int64_t inputs, Group* to, int64_t stride) {
  constexpr int32_t kInfinite = 0x7f800000;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: added and taken away, it rounds to the nearest even
  const int64_t groups = (inputs + kGroup - 1) / kGroup;
  for (int64_t g = 0; g < groups; g++, to += stride) {
    float group[kGroup], peak;
    read_group(x + g * kGroup, inputs - g * kGroup, group);
    const int32_t bits = peak_bits(group);
    std::memcpy(&peak, &bits, sizeof(peak));
    float scale = peak / 127.0f;
    int32_t sum = 0, first = 0;
    if (bits >= kInfinite || peak < 1e-30f) {
      // What is no number must be seen in the result; what is next to nothing has no scale.
      std::memset(to->values, 0, kGroup);
      if (bits >= kInfinite) {
        const int32_t nan = 0x7fc00000;
        std::memcpy(&scale, &nan, sizeof(scale));
      } else {
        scale = 0.0f;
      }
    } else {
      const float inverse = 127.0f / peak;
      int32_t quantized[kGroup];
      for (int i = 0; i < kGroup; i++) quantized[i] = static_cast<int32_t>((group[i] * inverse + kRound) - kRound);
      for (int i = 0; i < kGroup; i++) to->values[i] = static_cast<int8_t>(quantized[i]);
      for (int i = 0; i < kGroup; i++) sum += quantized[i];
      for (int i = 0; i < kGroup / 2; i++) first += quantized[i];
    }
    to->scale = scale;
    to->minus_sum = static_cast<int16_t>(-sum);
    to->counter = kCounter;
    to->scaled_sum = scale * static_cast<float>(sum);
    to->halves[0][0] = static_cast<int16_t>(-first);
    to->halves[1][0] = static_cast<int16_t>(first - sum);
    to->halves[0][1] = to->halves[1][1] = kCounter;
  }
}

inline int64_t rows_of_tile(int64_t first, int64_t last) { return last - first < Vec::kRows ? last - first : Vec::kRows; }

inline void prepare(const Product& product, int64_t row, float* normed, Group* rows) {
  const float* x = normed_row(product, row, normed);
  const int64_t tile = row / Vec::kRows * Vec::kRows;
  quantize(x, product.weight.inputs, rows + tile * product.weight.groups() + (row - tile), rows_of_tile(tile, product.rows));
}

// The sums of M rows, for outputs from `output` on, to y of rows `stride` apart.
template <int M>
inline void put(const Vec::Float (&sums)[M], const Weight& weight, int64_t output, float* y, int64_t stride) {
  const int64_t left = weight.outputs - output;
  if (left <= 0) return;
  if (left >= Vec::kLanes) {
    const Vec::Float bias = weight.bias ? Vec::floats(weight.bias + output) : Vec::zero();
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) Vec::store(y + m * stride, Vec::add_product(sums[m], Vec::set(1.0f), bias));
    return;
  }
  float all[M][Vec::kLanes];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) Vec::store(all[m], sums[m]);
  for (int m = 0; m < M; m++)
    for (int i = 0; i < left; i++) y[m * stride + i] = all[m][i] + (weight.bias ? weight.bias[output + i] : 0.0f);
}

// What the blocks of a panel's groups have to be multiplied with, from output `lane` on.
template <int Bits, bool Offset>
struct Factors {
  int64_t left = 0, groups_of_block;
  const uint16_t *scales, *offsets;
  const uint8_t* zeros;
  Vec::Int zero = Vec::counted(Vec::all(Bits == 4 ? 8 : 128));
  Vec::Scale scale = {};
  Vec::Float offset = {};

  void begin(const Weight& weight, int64_t panel, int lane) {
    groups_of_block = weight.block / kGroup;
    const int64_t at = panel * weight.blocks() * kPanel + lane;
    scales = weight.scales + at;
    zeros = weight.zeros ? weight.zeros + at : nullptr;
    offsets = Offset ? weight.offsets + at : nullptr;
  }
  // To be called before each group.
  void next() {
    if (left-- > 0) return;
    left = groups_of_block - 1;
    scale = Vec::scale(scales);
    scales += kPanel;
    if constexpr (Offset) {
      offset = Vec::halves(offsets);
      offsets += kPanel;
    } else if (zeros) {
      zero = Vec::counted(Vec::widened(zeros));
      zeros += kPanel;
    }
  }
  // What the products of a group, in integers, are added to.
  Vec::Int start(const Group& group) const {
    if constexpr (Offset) return Vec::all(Vec::kNothing);
    return Vec::start(zero, group);
  }
  // These, added to those of the groups before it.
  Vec::Float added(Vec::Int dot, const Group& group, Vec::Float sum) const {
    sum = Vec::add_product(Vec::scaled(dot, scale), Vec::set(group.scale), sum);
    if constexpr (Offset) sum = Vec::add_product(offset, Vec::set(group.scaled_sum), sum);
    return sum;
  }
};

// Bytes ahead of those that are multiplied, to be fetched. 4 bits always gain. Zen 4 reads 8 bits 20 % faster by its own
// prefetching, as long as that keeps up. An Emerald Rapids is 15 % slower by its own with one row, 30 % with four, and a
// Zen 3, which has none of the newer instructions, 30 % with one.
template <int Bits, int M>
inline int64_t bytes_ahead() {
  if (Bits == 4 || Vec::kFetches) return 4096;
#if defined(__x86_64__)
  if (__builtin_cpu_is("intel")) return 2048;
#endif
  return M > 4 ? 2048 : 0;
}

// A tile of M rows times `Wide` registers of outputs of a panel from `lane` on, or of as many panels where a register has
// one, to y of rows `stride` and panels `apart` from each other.
template <int Bits, bool Offset, int M, int Wide>
inline void tile(const Group* rows, const Weight& weight, int64_t panel, int lane, float* y, int64_t stride,
                 int64_t apart) {
  constexpr bool kWhole = Vec::kLanes == kPanel;
  using Quads = typename Vec::template Quads<Bits>;
  const int64_t groups = weight.groups(), bytes = weight.group_bytes();
  const uint8_t* data = weight.data + panel * groups * bytes + lane * 4;
  // The first outputs of a panel fetch for those that follow.
  const int64_t ahead = lane > 0 ? 0 : bytes_ahead<Bits, M>();
  const int64_t bytes_apart = kWhole ? groups * bytes : 4 * Vec::kLanes;
  Factors<Bits, Offset> factors[Wide];
  Vec::Float sums[Wide][M];
#pragma GCC unroll 2
  for (int w = 0; w < Wide; w++) {
    factors[w].begin(weight, panel + (kWhole ? w : 0), lane + (kWhole ? 0 : w * Vec::kLanes));
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sums[w][m] = Vec::zero();
  }
  for (int64_t g = 0; g < groups; g++, data += bytes, rows += M) {
    // Behind the end of one of two panels begins the other, which is read already.
    const uint8_t* next = data + ahead + (kWhole && Wide > 1 && g * bytes + ahead >= bytes_apart ? bytes_apart : 0);
    for (int64_t at = 0; at < bytes && ahead; at += 64)
#pragma GCC unroll 2
      for (int w = 0; w < (kWhole ? Wide : 1); w++) __builtin_prefetch(next + at + w * bytes_apart);
#pragma GCC unroll 2
    for (int w = 0; w < Wide; w++) factors[w].next();
    Quads::template multiply<M, Wide>(
        data, bytes_apart, rows, [&](int m, int w) { return factors[w].start(rows[m]); },
        [&](int m, int w, Vec::Int dot) { sums[w][m] = factors[w].added(dot, rows[m], sums[w][m]); });
  }
#pragma GCC unroll 2
  for (int w = 0; w < Wide; w++)
    put(sums[w], weight, panel * kPanel + lane + w * Vec::kLanes, y + lane + w * (kWhole ? apart : Vec::kLanes), stride);
}

// All outputs of a panel.
template <int Bits, bool Offset, int M>
inline void tiles_of_panel(const Group* rows, const Weight& weight, int64_t panel, float* y, int64_t stride) {
  constexpr int kBest = Vec::template Quads<Bits>::template kWide<M>, kWide = Vec::kLanes == kPanel ? 1 : kBest;
  for (int lane = 0; lane < kPanel && panel * kPanel + lane < weight.outputs; lane += kWide * Vec::kLanes)
    tile<Bits, Offset, M, kWide>(rows, weight, panel, lane, y, stride, 0);
}

// Of two panels, where that is faster.
template <int Bits, bool Offset, int M>
inline void tiles_of_two(const Group* rows, const Weight& weight, int64_t panel, float* y, int64_t stride, int64_t apart) {
  if constexpr (Vec::kLanes == kPanel && Vec::template Quads<Bits>::template kWide<M> == 2) {
    tile<Bits, Offset, M, 2>(rows, weight, panel, 0, y, stride, apart);
  } else {
    tiles_of_panel<Bits, Offset, M>(rows, weight, panel, y, stride);
    tiles_of_panel<Bits, Offset, M>(rows, weight, panel + 1, y + apart, stride);
  }
}

using Tile = void (*)(const Group*, const Weight&, int64_t, float*, int64_t);
using TwoTiles = void (*)(const Group*, const Weight&, int64_t, float*, int64_t, int64_t);

// Of 1 to Vec::kRows rows.
template <int Bits, bool Offset>
struct Tiles {
  Tile of[Vec::kRows + 1] = {};
  TwoTiles of_two[Vec::kRows + 1] = {};
  constexpr Tiles() { fill<Vec::kRows>(); }
  template <int M>
  constexpr void fill() {
    of[M] = tiles_of_panel<Bits, Offset, M>;
    of_two[M] = tiles_of_two<Bits, Offset, M>;
    if constexpr (M > 1) fill<M - 1>();
  }
};

#include "file_tiles.h"

// Of rows first..last and panels panel..end to y, whose first value is that of row `first` and the first output.
inline void multiply(const Group* rows, int64_t first, int64_t last, const Weight& weight, int64_t panel, int64_t end,
                     float* y, int64_t stride, int64_t apart) {
  static constexpr Tiles<4, false> in_4_bits{};
  static constexpr Tiles<4, true> with_offsets{};
  static constexpr Tiles<8, false> in_8_bits{};
  const bool file = weight.multiples || weight.bits == 5;
  const Tile* tiles = weight.bits == 8 ? in_8_bits.of : weight.offsets ? with_offsets.of : in_4_bits.of;
  if (file) tiles = tiles_of_file(weight);
  if (Vec::kLanes == kPanel && last - first > 1 && !file) {
    const TwoTiles* two = weight.bits == 8 ? in_8_bits.of_two : weight.offsets ? with_offsets.of_two : in_4_bits.of_two;
    for (; panel + 1 < end; panel += 2, y += 2 * apart)
      for (int64_t m = first; m < last; m += Vec::kRows)
        two[rows_of_tile(m, last)](rows + m * weight.groups(), weight, panel, y + (m - first) * stride, stride, apart);
  }
  for (; panel < end; panel++, y += apart)
    for (int64_t m = first; m < last; m += Vec::kRows)
      tiles[rows_of_tile(m, last)](rows + m * weight.groups(), weight, panel, y + (m - first) * stride, stride);
}

constexpr int64_t kGatedRows = 2 * kTaskRows;  // of all panels

// Of as many panels as there is room for all gates, then all ups: memory is read in longer streams.
inline void gated_panels(const Product& product, const Group* rows, int64_t first, int64_t last, int64_t panel,
                         int64_t end) {
  const Weight& weight = product.weight;
  const int64_t values = (last - first) * kPanel, all = (end - panel) * values;  // of a panel, of all
  float gate[kGatedRows * kPanel], up[kGatedRows * kPanel];
  if (weight.outputs < end * kPanel) {  // the last is not full
    std::memset(gate, 0, static_cast<size_t>(all) * sizeof(float));
    std::memset(up, 0, static_cast<size_t>(all) * sizeof(float));
  }
  multiply(rows, first, last, weight, panel, end, gate, kPanel, values);
  activate(product.activation, gate, all);
  if (product.up.data != nullptr) {
    multiply(rows, first, last, product.up, panel, end, up, kPanel, values);
    for (int64_t i = 0; i < all; i++) gate[i] *= up[i];
  }
  for (int64_t p = panel; p < end; p++) {
    const int64_t left = weight.outputs - p * kPanel;
    const size_t bytes = static_cast<size_t>(left < kPanel ? left : kPanel) * sizeof(float);
    for (int64_t m = first; m < last; m++)
      std::memcpy(product.y + m * weight.outputs + p * kPanel, gate + (p - panel) * values + (m - first) * kPanel, bytes);
  }
}

inline void panels(const Product& product, const Group* rows, int64_t first, int64_t last, int64_t panel,
                   int64_t end) {
  const Weight& weight = product.weight;
  if (product.beside || (product.activation == kNone && product.up.data == nullptr)) {
    float* y = product.y + first * product.outputs();
    const int64_t own = weight.panels(), stride = product.outputs(), behind = panel > own ? panel - own : 0;
    multiply(rows, first, last, weight, panel, end < own ? end : own, y + panel * kPanel, stride, kPanel);
    multiply(rows, first, last, product.up, behind, end - own, y + weight.outputs + behind * kPanel, stride, kPanel);
    return;
  }
  const int64_t most = kGatedRows / (last - first);
  for (; panel < end; panel += most)
    gated_panels(product, rows, first, last, panel, end - panel < most ? end : panel + most);
}

}  // namespace
}  // namespace freeexport
