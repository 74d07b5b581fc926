// Finds the best two of a piece of logits. See tiles.h.
#pragma once

#include "attention_tiles.h"
#include "best_two.h"

namespace freeexport {
namespace {

inline void take(float value, int64_t index, BestTwo* two) {
  if (value > two->best) {
    two->second = two->best;
    two->second_index = two->best_index;
    two->best = value;
    two->best_index = index;
  } else if (value > two->second) {
    two->second = value;
    two->second_index = index;
  }
}

// Updates the best two with `Size` logits. Most blocks are skipped with one comparison.
template <int Size>
inline void look(const float* x, int64_t first, BestTwo* two) {
  typename Vec::Float largest[kParts];
  for (int p = 0; p < kParts; p++) largest[p] = Vec::floats(x + p * Vec::kLanes);
  for (int i = kWide; i < Size; i += kWide)
    for (int p = 0; p < kParts; p++)
      largest[p] = Vec::larger(Vec::floats(x + i + p * Vec::kLanes), largest[p]);
  if (!(Vec::largest(largest) > two->second)) return;
  for (int i = 0; i<Size; i += Size> kWide ? Size / 4 : 1) {
    if constexpr (Size > kWide)
      look<Size / 4>(x + i, first + i, two);
    else
      take(x[i], first + i, two);
  }
}

// Finds the best two of `count` logits (at least 1), which start at index `first`. If logits are
// equal, the first wins.
inline void piece(const float* x, int64_t first, int64_t count, BestTwo* two) {
  constexpr int kBlock = 16 * kWide;
  *two = {x[0], -__builtin_inff(), first, first, 0.0f};
  int64_t i = 1;
  for (; i < count && i < kWide; i++) take(x[i], first + i, two);
  for (; i + kWide <= count && i < kBlock; i += kWide) look<kWide>(x + i, first + i, two);
  for (; i + kBlock <= count; i += kBlock) look<kBlock>(x + i, first + i, two);
  for (; i < count; i++) take(x[i], first + i, two);
  const typename Vec::Float best = Vec::set(two->best);
  typename Vec::Float sums[kParts];
  for (int p = 0; p < kParts; p++) sums[p] = Vec::zero();
  for (i = 0; i + kWide <= count; i += kWide)
    for (int p = 0; p < kParts; p++)
      sums[p] =
          Vec::added(sums[p], exponential(Vec::minus(Vec::floats(x + i + p * Vec::kLanes), best)));
  float rest[kWide] = {};
  for (int64_t j = 0; i + j < count; j++) rest[j] = x[i + j] - two->best;
  exponentials(rest, count - i);
  for (int p = 0; p < kParts; p++)
    sums[p] = Vec::added(sums[p], Vec::floats(rest + p * Vec::kLanes));
  two->sum = Vec::fold(sums);
}

}  // namespace
}  // namespace freeexport
