// Finds the two largest logits and the logarithm of the sum of exponentials in one pass.
// Predictions and their confidences are computed from these.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"

namespace freeexport {

// Logits of a piece. Pieces are joined in order, so results do not depend on threads.
constexpr int64_t kPiece = 4096;

// Result for a piece, or for joined pieces.
struct BestTwo {
  float best;
  float second;
  int64_t best_index;
  int64_t second_index;
  float sum;  // of e^(x - best)
};

struct Logits {
  int64_t rows;
  int64_t count;        // logits of a row, at least 2
  const float* values;  // [rows, count]
  int64_t* top;         // [rows, 2]
  float* log_sum;       // [rows]
};

// Returns false if out of memory.
bool best_two(const Kernels& kernels, const Logits& logits, Parallel parallel, void* context);

}  // namespace freeexport
