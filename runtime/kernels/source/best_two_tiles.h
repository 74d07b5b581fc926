// The best two of a piece of logits. See tiles.h.
#pragma once

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

inline float largest_of(const float* x) {
  float largest[16];
  for (int j = 0; j < 16; j++) largest[j] = x[j];
  for (int i = 16; i < 64; i += 16)
    for (int j = 0; j < 16; j++) largest[j] = x[i + j] > largest[j] ? x[i + j] : largest[j];
  for (int half = 8; half > 0; half /= 2)
    for (int j = 0; j < half; j++) largest[j] = largest[j + half] > largest[j] ? largest[j + half] : largest[j];
  return largest[0];
}

// Of `count` logits, at least one, the first of which has number `first`. Of equals the first is taken.
inline void piece(const float* x, int64_t first, int64_t count, BestTwo* two) {
  *two = {x[0], -__builtin_inff(), first, first, 0.0f};
  int64_t i = 1;
  for (; i < count && i % 64 != 0; i++) take(x[i], first + i, two);
  for (; i + 64 <= count; i += 64)
    if (largest_of(x + i) > two->second)  // which is rare
      for (int j = 0; j < 64; j++) take(x[i + j], first + i + j, two);
  for (; i < count; i++) take(x[i], first + i, two);
  float sums[16] = {}, powers[64];
  for (i = 0; i < count; i += 64) {
    const int64_t size = count - i < 64 ? count - i : 64;
    for (int64_t j = 0; j < size; j++) powers[j] = x[i + j] - two->best;
    exponentials(powers, size);
    for (int64_t j = size; j < 64; j++) powers[j] = 0.0f;
    for (int k = 0; k < 64; k += 16)
      for (int j = 0; j < 16; j++) sums[j] += powers[k + j];
  }
  for (int half = 8; half > 0; half /= 2)
    for (int j = 0; j < half; j++) sums[j] += sums[j + half];
  two->sum = sums[0];
}

}  // namespace
}  // namespace freeexport
