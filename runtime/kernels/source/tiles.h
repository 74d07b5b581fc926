// The kernels of one instruction set, from a `Vec` that the including file defines. All names are local to the file:
// what the compiler makes here for one processor must not be linked into code for another.
#pragma once

#include <cstring>

#include "packed_linear.h"

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

inline void quantize(const float* x, int64_t inputs, const Rows& rows, int64_t row) {
  constexpr int32_t kInfinite = 0x7f800000;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: added and taken away, it rounds to the nearest even
  const int64_t groups = (inputs + kGroup - 1) / kGroup;
  for (int64_t g = 0; g < groups; g++) {
    float group[kGroup], peak;
    read_group(x + g * kGroup, inputs - g * kGroup, group);
    const int32_t bits = peak_bits(group);
    std::memcpy(&peak, &bits, sizeof(peak));
    int8_t* values = rows.values + (row * groups + g) * kGroup;
    float scale = peak / 127.0f;
    int32_t sum = 0;
    if (bits >= kInfinite || peak < 1e-30f) {
      // What is no number must be seen in the result; what is next to nothing has no scale.
      std::memset(values, 0, kGroup);
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
      for (int i = 0; i < kGroup; i++) values[i] = static_cast<int8_t>(quantized[i]);
      for (int i = 0; i < kGroup; i++) sum += quantized[i];
    }
    rows.scales[row * groups + g] = scale;
    rows.minus_sums[row * groups + g] = -sum;
  }
}

// Rows `first`.. of a tile of M, times `Vec::kLanes` outputs of a panel from `lane` on.
template <int Bits, int M>
inline void tile(const Rows& rows, int64_t first, const Weight& weight, int64_t panel, int lane, float* y) {
  const int64_t groups = weight.groups(), blocks = weight.blocks(), bytes = weight.group_bytes();
  const int64_t groups_of_block = weight.block / kGroup;
  const uint8_t* data = weight.data + panel * groups * bytes + lane * 4;
  const float* scales = weight.scales + panel * blocks * kPanel + lane;
  const uint8_t* zeros = weight.zeros ? weight.zeros + panel * blocks * kPanel + lane : nullptr;
  const int8_t* values = rows.values + first * groups * kGroup;
  const float* row_scales = rows.scales + first * groups;
  const int32_t* minus_sums = rows.minus_sums + first * groups;

  Vec::Float sums[M];
  for (int m = 0; m < M; m++) sums[m] = Vec::zero();
  Vec::Int zero = Vec::all(Bits == 4 ? 8 : 128);
  Vec::Float scale = Vec::zero();
  int64_t next = 0;
  for (int64_t g = 0; g < groups; g++, data += bytes) {
    if (g == next) {
      scale = Vec::floats(scales);
      scales += kPanel;
      if (zeros) {
        zero = Vec::widened(zeros);
        zeros += kPanel;
      }
      next += groups_of_block;
    }
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(data + at + 2048);
    const typename Vec::template Quads<Bits> quads(data);
    for (int m = 0; m < M; m++) {
      const int64_t at = m * groups + g;
      const Vec::Int start = Vec::times_small(zero, minus_sums[at]);
      const Vec::Int dot = quads.dot(values + at * kGroup, start);
      sums[m] = Vec::add_product(Vec::times(dot, row_scales[at]), scale, sums[m]);
    }
  }

  const int64_t output = panel * kPanel + lane;
  const int64_t left = weight.outputs - output;
  const int count = left < Vec::kLanes ? static_cast<int>(left) : Vec::kLanes;
  for (int m = 0; m < M; m++) {
    float out[Vec::kLanes];
    Vec::store(out, sums[m]);
    if (weight.bias)
      for (int i = 0; i < count; i++) out[i] += weight.bias[output + i];
    std::memcpy(y + (first + m) * weight.outputs + output, out, static_cast<size_t>(count) * sizeof(float));
  }
}

using Tile = void (*)(const Rows&, int64_t, const Weight&, int64_t, int, float*);

// Of 1 to Vec::kRows rows.
template <int Bits>
struct Tiles {
  Tile of[9] = {};
  constexpr Tiles() { fill<Vec::kRows>(); }
  template <int M>
  constexpr void fill() {
    of[M] = tile<Bits, M>;
    if constexpr (M > 1) fill<M - 1>();
  }
};

inline void panel_rows(const Rows& rows, int64_t first, int64_t last, const Weight& weight, int64_t panel, float* y) {
  static constexpr Tiles<4> in_4_bits{};
  static constexpr Tiles<8> in_8_bits{};
  const Tile* tiles = weight.bits == 4 ? in_4_bits.of : in_8_bits.of;
  for (int lane = 0; lane < kPanel && panel * kPanel + lane < weight.outputs; lane += Vec::kLanes)
    for (int64_t m = first; m < last; m += Vec::kRows)
      tiles[last - m < Vec::kRows ? last - m : Vec::kRows](rows, m, weight, panel, lane, y);
}

}  // namespace
}  // namespace freeexport
