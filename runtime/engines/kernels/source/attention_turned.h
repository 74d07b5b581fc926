// Keys of a piece, transposed, so that a register has the same value of neighboring keys.
#pragma once

#include "attention_tiles.h"

namespace freeexport {
namespace {

constexpr int kScoreKeys = 2;  // registers of keys that are multiplied together
constexpr int64_t kScored = kScoreKeys * Vec::kLanes;

// Transposes keys [count, size] to [kPieceRows / kScored][size][kScored] in fp32. The cache has
// memory for `room` keys. Values after the last key, up to whole registers, are unspecified.
template <typename C>
inline void turn_keys(const C* keys, int64_t size, int64_t count, int64_t room, float* turned) {
  const int64_t end = (count + kScored - 1) / kScored * kScored;
  const int64_t whole = least(end, room) / Vec::kLanes * Vec::kLanes;
  const auto at = [&](int64_t t) { return turned + t / kScored * kScored * size + t % kScored; };
  for (int64_t t = 0; t < whole; t += Vec::kLanes)
    for (int64_t i = 0; i < size; i += 4)
      Vec::turn_four(keys + t * size + i, size, at(t) + i * kScored, kScored);
  for (int64_t t = whole; t < end; t++)
    for (int64_t i = 0; i < size; i += kHalf) {
      float values[kWide] = {};
      if (t < count) put_values<Vec, false>(values, values_at<Vec, true>(keys + t * size + i));
      for (int64_t j = 0; j < kHalf; j++) at(t)[(i + j) * kScored] = values[j];
    }
}

}  // namespace
}  // namespace freeexport
