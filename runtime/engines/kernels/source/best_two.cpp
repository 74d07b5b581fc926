#include "best_two.h"

#include <cmath>
#include <cstdlib>

#include "packed_linear.h"

namespace freeexport {
namespace {

struct Call {
  const Kernels& kernels;
  const Logits& logits;
  int64_t pieces;  // per row
  BestTwo* found;  // [rows, pieces]
};

void piece_task(void* data, size_t index) {
  const Call& call = *static_cast<Call*>(data);
  const int64_t row = static_cast<int64_t>(index) / call.pieces;
  const int64_t first = static_cast<int64_t>(index) % call.pieces * kPiece;
  const int64_t left = call.logits.count - first;
  const float* x = call.logits.values + row * call.logits.count + first;
  call.kernels.best_of_piece(x, first, left < kPiece ? left : kPiece, &call.found[index]);
}

// Joins two results. Logits of `a` come first, so they win if logits are equal.
BestTwo joined(const BestTwo& a, const BestTwo& b) {
  BestTwo two = a;
  if (b.best > a.best) {
    two.best = b.best;
    two.best_index = b.best_index;
    const bool from_b = b.second > a.best;
    two.second = from_b ? b.second : a.best;
    two.second_index = from_b ? b.second_index : a.best_index;
  } else if (b.best > a.second) {
    two.second = b.best;
    two.second_index = b.best_index;
  }
  two.sum = a.sum * std::exp(a.best - two.best) + b.sum * std::exp(b.best - two.best);
  return two;
}

}  // namespace

bool best_two(const Kernels& kernels, const Logits& logits, Parallel parallel, void* context) {
  const int64_t pieces = (logits.count + kPiece - 1) / kPiece;
  const int64_t total = logits.rows * pieces;
  if (total == 0) return true;
  auto* found = static_cast<BestTwo*>(std::malloc(static_cast<size_t>(total) * sizeof(BestTwo)));
  if (found == nullptr) return false;
  Call call = {kernels, logits, pieces, found};
  if (total == 1)
    piece_task(&call, 0);
  else
    parallel(context, piece_task, static_cast<size_t>(total), &call);
  for (int64_t row = 0; row < logits.rows; row++) {
    BestTwo two = found[row * pieces];
    for (int64_t i = 1; i < pieces; i++) two = joined(two, found[row * pieces + i]);
    logits.top[2 * row] = two.best_index;
    logits.top[2 * row + 1] = two.second_index;
    logits.log_sum[row] = two.best + std::log(two.sum);
  }
  std::free(found);
  return true;
}

}  // namespace freeexport
