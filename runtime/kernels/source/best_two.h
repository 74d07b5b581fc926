// The two largest of many logits, and the logarithm of the sum of their exponentials: what a prediction and its confidence
// are made of, in one pass.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"

namespace freeexport {

constexpr int64_t kPiece = 4096;  // logits of a piece: pieces are summed up in order, so that threads change no bit

// Of a piece, or of what was joined of pieces.
struct BestTwo {
  float best, second;
  int64_t best_index, second_index;
  float sum;  // of e^(x - best)
};

struct Logits {
  int64_t rows, count;  // at least two a row
  const float* values;  // [rows, count]
  int64_t* top;         // [rows, 2]
  float* log_sum;       // [rows]
};

// False where there is no memory for it.
bool best_two(const Kernels& kernels, const Logits& logits, Parallel parallel, void* context);

}  // namespace freeexport
