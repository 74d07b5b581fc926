// Keys and values in 8 bits for one instruction set. A position and head has `size` values from
// -127 to 127, followed by their scale in fp32: the largest magnitude / 127. A position is
// quantized alone, so that its bits do not depend on the call that writes it.
//
// Queries are rounded to 16 bits. Products with keys are summed in integers, which is exact in any
// order. Values are converted to fp32, and their scales are multiplied with the weights.
#pragma once

#include <cstring>

#include "attention.h"

namespace freeexport {
namespace {

// Range of the keys of a piece that a row sees, from `from` to `end` of 64.
struct Seen {
  int64_t from;
  int64_t end;
};

constexpr int64_t kShorts = 2 * Vec::kLanes;  // 16-bit values of a register

// Quantizes x to integers of type Q from -limit to limit, and returns their scale. Values that are
// all tiny become 0. If one is infinite or NaN, the scale is NaN. `to` may be the memory of x.
template <typename Q>
inline float quantize_head(const float* x, int64_t size, int32_t limit, void* to) {
  constexpr int32_t kInfinite = 0x7f800000;
  int32_t bits = 0;
  for (int64_t i = 0; i < size; i++) {
    int32_t magnitude;
    std::memcpy(&magnitude, x + i, sizeof(magnitude));
    magnitude &= INT32_MAX;
    bits = magnitude > bits ? magnitude : bits;
  }
  float peak;
  std::memcpy(&peak, &bits, sizeof(peak));
  const bool usable = bits < kInfinite && peak >= 1e-30f;
  const float factor = usable ? static_cast<float>(limit) / peak : 0.0f;
  for (int64_t i = 0; i < size; i += 8) {
    Q eight[8];
    for (int64_t j = 0; j < 8; j++) {
      const float rounded = usable ? (x[i + j] * factor + kCounted) - kCounted : 0.0f;
      eight[j] = static_cast<Q>(static_cast<int32_t>(rounded));
    }
    std::memcpy(static_cast<Q*>(to) + i, eight, sizeof(eight));
  }
  return usable ? peak / static_cast<float>(limit) : bits < kInfinite ? 0.0f : __builtin_nanf("");
}

// Returns the scale that follows the values of a position or query.
template <typename Q>
inline float scale_after(const Q* values, int64_t size) {
  float scale;
  std::memcpy(&scale, values + size, sizeof(scale));
  return scale;
}

// Quantizes a query to 16 bits in place. Its factor, which follows, includes that of all scores.
inline void shorten_query(const Attention& a, float* query) {
  const int64_t most = INT32_MAX / (127 * a.size);  // sums must fit in 32 bits
  const float scale =
      quantize_head<int16_t>(query, a.size, static_cast<int32_t>(least(INT16_MAX, most)), query);
  const float by = scale * a.scale;
  std::memcpy(reinterpret_cast<int16_t*>(query) + a.size, &by, sizeof(by));
}

// Copies the scales of positions from..end.
inline void scales_of(const int8_t* rows, int64_t size, const Seen& seen, float* scales) {
  const int64_t width = size + static_cast<int64_t>(sizeof(float));
  for (int64_t t = seen.from; t < seen.end; t++) scales[t] = scale_after(rows + t * width, size);
}

// x[t] *= scales[t] * by, for t from..end, extended to whole registers.
inline void times_scales(float* x, const float* scales, const Seen& seen, float by) {
  for (int64_t t = seen.from / Vec::kLanes * Vec::kLanes; t < seen.end; t += Vec::kLanes)
    Vec::store(x + t,
               Vec::times(Vec::floats(x + t), Vec::times(Vec::floats(scales + t), Vec::set(by))));
}

// Computes scores[q][t] of the keys of a piece that a row sees, for Q heads from `head`. Prefetches
// `values`.
template <int Q>
inline void byte_scores(const Attention& a, const Place& place, int64_t head, const int8_t* keys,
                        const int8_t* values, const Seen& seen, float* scores) {
  const int64_t size = a.size;
  const int64_t width = cache_width(a);
  const int16_t* queries[Q];
  for (int q = 0; q < Q; q++)
    queries[q] = reinterpret_cast<const int16_t*>(a.y + (place.row * a.heads + head + q) * size);
  for (int64_t t = seen.from / 4 * 4; t < seen.end; t += 4) {
    typename Vec::Int sums[Q][4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      const int64_t at = least(t + k, seen.end - 1) * width;
      __builtin_prefetch(values + at);
#pragma GCC unroll 4
      for (int q = 0; q < Q; q++) sums[q][k] = Vec::all(0);
      int64_t i = 0;
      for (; i + kShorts <= size; i += kShorts) {
        const typename Vec::Shorts key = Vec::shorts(keys + at + i);
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) sums[q][k] = Vec::add_products(key, queries[q] + i, sums[q][k]);
      }
      for (; i < size; i += 8)
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++)
          sums[q][k] = Vec::add_eight(keys + at + i, queries[q] + i, sums[q][k]);
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++) Vec::fold_four(sums[q], scores + q * kPieceRows + t);
  }
  float scales[kPieceRows] = {};
  scales_of(keys, size, seen, scales);
  for (int q = 0; q < Q; q++)
    times_scales(scores + q * kPieceRows, scales, seen, scale_after(queries[q], size));
}

}  // namespace
}  // namespace freeexport
