// Attention of an encoder's rows, which all see every key of their prompt.
//
// Both products multiply a tile of queries with two registers: of keys, then of values. Sums keep
// the order of their terms, so the bits of a row depend neither on the rows beside it nor on the
// size of a register. A row joins pieces of keys in order.
#pragma once

#include "attention_turned.h"
#include "platform.h"

namespace freeexport {
namespace {

// Queries of a tile, limited by the number of registers.
constexpr int kTileQueries = Vec::kLanes == 16 ? 12 : 6;
constexpr float kLowest = -1e30f;  // initial value of the largest score

// Multiplies a [kTileQueries, depth], whose rows are `a_apart`, with b [depth, kScored], whose rows
// are `b_apart`. Starts from sums [kTileQueries][kScored] times `factors`, or from 0 without them.
inline void multiply_tile(const float* a, int64_t a_apart, const float* b, int64_t b_apart,
                          int64_t depth, const float* factors, float* sums, int64_t apart) {
  typename Vec::Float all[kTileQueries][kScoreKeys];
#pragma GCC unroll 16
  for (int q = 0; q < kTileQueries; q++)
#pragma GCC unroll 2
    for (int k = 0; k < kScoreKeys; k++)
      all[q][k] = factors ? Vec::times(Vec::floats(sums + q * apart + k * Vec::kLanes),
                                       Vec::set(factors[q]))
                          : Vec::zero();
#pragma GCC unroll 4
  for (int64_t i = 0; i < depth; i++) {
    typename Vec::Float right[kScoreKeys];
#pragma GCC unroll 2
    for (int k = 0; k < kScoreKeys; k++) right[k] = Vec::floats(b + i * b_apart + k * Vec::kLanes);
#pragma GCC unroll 16
    for (int q = 0; q < kTileQueries; q++) {
      const typename Vec::Float left = Vec::set(a[q * a_apart + i]);
#pragma GCC unroll 2
      for (int k = 0; k < kScoreKeys; k++) all[q][k] = Vec::add_product(left, right[k], all[q][k]);
    }
  }
#pragma GCC unroll 16
  for (int q = 0; q < kTileQueries; q++)
#pragma GCC unroll 2
    for (int k = 0; k < kScoreKeys; k++) Vec::store(sums + q * apart + k * Vec::kLanes, all[q][k]);
}

// Converts `count` scores of a piece to weights, e^(score + bias - largest score so far). `largest`
// and `sum` are of all pieces so far. Returns the factor of earlier results.
inline float weights_of(float* x, int64_t count, const float* bias, float* largest, float* sum) {
  const int64_t last = (count + kWide - 1) / kWide * kWide;
  for (int64_t i = 0; bias != nullptr && i < last; i += Vec::kLanes)
    Vec::store(x + i, Vec::added(Vec::floats(x + i), Vec::floats(bias + i)));
  for (int64_t i = count; i < last; i++) x[i] = x[0];
  typename Vec::Float parts[kParts];
  for (int p = 0; p < kParts; p++) parts[p] = Vec::floats(x + p * Vec::kLanes);
  for (int64_t i = kWide; i < last; i += kWide)
    for (int p = 0; p < kParts; p++)
      parts[p] = Vec::larger(Vec::floats(x + i + p * Vec::kLanes), parts[p]);
  const float most = Vec::largest(parts);
  float factor = 1.0f;
  if (!(most <= *largest)) {
    factor = *largest - most;
    exponentials(&factor, 1);
    *largest = most;
  }
  const typename Vec::Float all = Vec::set(*largest);
  for (int p = 0; p < kParts; p++) parts[p] = Vec::zero();
  for (int64_t i = 0; i < last; i += kWide) {
    for (int p = 0; p < kParts; p++)
      Vec::store(x + i + p * Vec::kLanes,
                 exponential(Vec::minus(Vec::floats(x + i + p * Vec::kLanes), all)));
    for (int64_t after = count; after < i + kWide; after++)
      x[after] = 0.0f;  // in the last registers
    for (int p = 0; p < kParts; p++)
      parts[p] = Vec::added(parts[p], Vec::floats(x + i + p * Vec::kLanes));
  }
  *sum = *sum * factor + Vec::fold(parts);
  return factor;
}

// Memory of a block of queries and one head. All rows are whole tiles.
struct EncoderRoom {
  float* queries;  // [rows, size], scaled
  float* outputs;  // [rows, width], where `width` is the size in whole tiles
  float* largest;  // [rows]
  float* sums;     // [rows]
  float* keys;     // a piece, transposed
  float* bias;     // of key - query, from -(E - 1) on
  int64_t width;
};

// Attends to a piece of `count` keys with one tile of queries, the first being row `row` of the
// block. `bias` is that of the first query and key.
inline void attend_encoder_tile(const Attention& a, const EncoderRoom& room, int64_t row,
                                const float* values, int64_t count, const float* bias) {
  alignas(64) float scores[kTileQueries * kPieceRows];
  float factors[kTileQueries];
  for (int64_t t = 0; t < count; t += kScored)
    multiply_tile(room.queries + row * a.size, a.size, room.keys + t * a.size, kScored, a.size,
                  nullptr, scores + t, kPieceRows);
  for (int64_t q = 0; q < kTileQueries; q++)
    factors[q] = weights_of(scores + q * kPieceRows, count, bias == nullptr ? nullptr : bias - q,
                            room.largest + row + q, room.sums + row + q);
  for (int64_t i = 0; i < room.width; i += kScored)
    multiply_tile(scores, kPieceRows, values + i, a.size, count, factors,
                  room.outputs + row * room.width + i, room.width);
}

// Attends to all pieces with `count` consecutive rows of a prompt and one group of heads.
inline bool attend_encoder(const Attention& a, const Place* places, int64_t count,
                           int64_t kv_head) {
  const int64_t size = a.size;
  const int64_t group = a.heads / a.kv_heads;
  const int64_t end = places[0].position + 1;
  const int64_t rows = (count + kTileQueries - 1) / kTileQueries * kTileQueries;
  const int64_t first = places[0].row % a.capacity;
  EncoderRoom room = {};
  room.width = (size + kScored - 1) / kScored * kScored;
  const int64_t distances = a.bias ? rows + a.capacity + kPieceRows : 0;
  const int64_t floats = rows * (size + room.width + 2) + kPieceRows * size + distances;
  auto* memory = static_cast<float*>(allocate(static_cast<size_t>(floats) * sizeof(float)));
  if (memory == nullptr) return false;
  room.keys = memory;
  room.queries = room.keys + kPieceRows * size;
  room.outputs = room.queries + rows * size;
  room.largest = room.outputs + rows * room.width;
  room.sums = room.largest + rows;
  room.bias = room.sums + rows;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
    for (int64_t i = 0; i < rows; i++) {  // rows after the last repeat it
      const float* query = queries_of(a, places[least(i, count - 1)]) + head * size;
      for (int64_t j = 0; j < size; j++) room.queries[i * size + j] = query[j] * a.scale;
      room.largest[i] = kLowest;
      room.sums[i] = 0.0f;
    }
    std::memset(room.outputs, 0, static_cast<size_t>(rows * room.width) * sizeof(float));
    // The last query of the block and key 0 have the least distance.
    const int64_t least_distance = -(first + rows - 1);
    for (int64_t i = 0; i < distances; i++) {
      const int64_t distance = least_distance + i;
      const int64_t limited = distance > a.reach ? a.reach : distance;
      room.bias[i] = a.bias[((limited < -a.reach ? -a.reach : limited) + a.reach) * a.heads + head];
    }
    for (int64_t begin = 0; begin < end; begin += kPieceRows) {
      const int64_t here = least(kPieceRows, end - begin);
      const int64_t at = keys_at(a, places[0], kv_head, begin);
      turn_keys(static_cast<const float*>(a.key) + at, size, here, a.capacity - begin, room.keys);
      for (int64_t row = 0; row < rows; row += kTileQueries)
        attend_encoder_tile(a, room, row, static_cast<const float*>(a.value) + at, here,
                            a.bias ? room.bias + (rows - 1 - row) + begin : nullptr);
    }
    for (int64_t i = 0; i < count; i++) {
      float* y = a.y + (places[i].row * a.heads + head) * size;
      const float by = 1.0f / room.sums[i];
      for (int64_t j = 0; j < size; j++) y[j] = room.outputs[i * room.width + j] * by;
    }
  }
  release(memory);
  return true;
}

}  // namespace
}  // namespace freeexport
