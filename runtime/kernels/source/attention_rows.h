// Attention of many rows that share keys: a piece of these is turned once, so that a register has the scores of
// neighbouring keys and no score is folded from a register. Every sum has the operations of attention_tiles.h in the
// same order, so a row gets the bits that it gets alone.
#pragma once

#include "attention_tiles.h"

namespace freeexport {
namespace {

constexpr int kQueries = 16;  // queries whose scores are kept at once

// A head of a row, and where its share of a piece goes.
struct Query {
  const float* values;
  float *out, *largest, *sum;
  int64_t seen;  // keys of the piece
};

// As many queries and registers of keys as there are registers for.
constexpr int kScoreQueries = Vec::kLanes == 16 ? 4 : 2, kScoreKeys = 2;

// Keys [count, size] to turned [size, kPieceRows]; behind them zeros, as far as scores are computed.
inline void turn_keys(const float* keys, int64_t size, int64_t count, float* turned) {
  constexpr int64_t kScored = kScoreKeys * Vec::kLanes;
  const int64_t whole = count / Vec::kLanes * Vec::kLanes, end = (count + kScored - 1) / kScored * kScored;
  for (int64_t t = 0; t < whole; t += Vec::kLanes)
    for (int64_t i = 0; i < size; i += 4)
      Vec::turn_four(keys + t * size + i, size, turned + i * kPieceRows + t, kPieceRows);
  for (int64_t i = 0; i < size; i++)
    for (int64_t t = whole; t < end; t++) turned[i * kPieceRows + t] = t < count ? keys[t * size + i] : 0.0f;
}

// Adds the products of values first, first + 16, ... of the size, one after the other: what a lane has of a row alone.
template <int Q>
FREEEXPORT_INLINE void add_lane(const Query* queries, const float* turned, int64_t size, int64_t first,
                                typename Vec::Float (&sums)[Q][kScoreKeys]) {
#pragma GCC unroll 4
  for (int q = 0; q < Q; q++)
#pragma GCC unroll 2
    for (int k = 0; k < kScoreKeys; k++) sums[q][k] = Vec::zero();
  for (int64_t i = first; i < size; i += kWide) {
    typename Vec::Float keys[kScoreKeys];
#pragma GCC unroll 2
    for (int k = 0; k < kScoreKeys; k++) keys[k] = Vec::floats(turned + i * kPieceRows + k * Vec::kLanes);
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++) {
      const typename Vec::Float value = Vec::set(queries[q].values[i]);
#pragma GCC unroll 2
      for (int k = 0; k < kScoreKeys; k++) sums[q][k] = Vec::add_product(value, keys[k], sums[q][k]);
    }
  }
}

// scores[q][t] of `count` keys, and more up to the next registers. Lanes are added as a row alone folds them.
template <int Q>
inline void score(const Query* queries, const float* turned, int64_t size, int64_t count, float* scores) {
  for (int64_t t = 0; t < count; t += kScoreKeys * Vec::kLanes) {
    typename Vec::Float halves[kHalf][Q][kScoreKeys];
    for (int lane = 0; lane < kHalf; lane++) {
      typename Vec::Float low[Q][kScoreKeys], high[Q][kScoreKeys];
      add_lane<Q>(queries, turned + t, size, lane, low);
      add_lane<Q>(queries, turned + t, size, lane + kHalf, high);
#pragma GCC unroll 4
      for (int q = 0; q < Q; q++)
#pragma GCC unroll 2
        for (int k = 0; k < kScoreKeys; k++) halves[lane][q][k] = Vec::added(low[q][k], high[q][k]);
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 2
      for (int k = 0; k < kScoreKeys; k++) {
        const auto four = [&](int lane) { return Vec::added(halves[lane][q][k], halves[lane + 4][q][k]); };
        const auto sum = Vec::added(Vec::added(four(0), four(2)), Vec::added(four(1), four(3)));
        Vec::store(scores + q * kPieceRows + t + k * Vec::kLanes, sum);
      }
  }
}

// Values weighed, for `Parts` registers of their size from `from` on: of all queries as far as all see, then of each.
template <int Q, int Parts, bool Half = false>
inline void weigh_rows(const Query* queries, const float* weights, const float* values, int64_t size, int64_t from) {
  typename Vec::Float sums[Q][Parts];
#pragma GCC unroll 8
  for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
    for (int p = 0; p < Parts; p++) sums[q][p] = Vec::zero();
  int64_t all = queries[0].seen;
  for (int q = 1; q < Q; q++) all = queries[q].seen < all ? queries[q].seen : all;
  for (int64_t t = 0; t < all; t++) {
    typename Vec::Float value[Parts];
#pragma GCC unroll 4
    for (int p = 0; p < Parts; p++) value[p] = values_at<Vec, Half>(values + t * size + from + p * Vec::kLanes);
#pragma GCC unroll 8
    for (int q = 0; q < Q; q++) {
      const typename Vec::Float weight = Vec::set(weights[q * kPieceRows + t]);
#pragma GCC unroll 4
      for (int p = 0; p < Parts; p++) sums[q][p] = Vec::add_product(weight, value[p], sums[q][p]);
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < Q; q++) {
    for (int64_t t = all; t < queries[q].seen; t++)
#pragma GCC unroll 4
      for (int p = 0; p < Parts; p++)
        sums[q][p] = Vec::add_product(Vec::set(weights[q * kPieceRows + t]),
                                      values_at<Vec, Half>(values + t * size + from + p * Vec::kLanes), sums[q][p]);
#pragma GCC unroll 4
    for (int p = 0; p < Parts; p++) put_values<Vec, Half>(queries[q].out + from + p * Vec::kLanes, sums[q][p]);
  }
}

template <int Q>
inline void weigh_size(const Query* queries, const float* weights, const float* values, int64_t size) {
  constexpr int kRegisters = Vec::kLanes == 16 || Q == 1 ? 4 : 2;  // of a tile of values
  int64_t from = 0;
  for (; from + kRegisters * Vec::kLanes <= size; from += kRegisters * Vec::kLanes)
    weigh_rows<Q, kRegisters>(queries, weights, values, size, from);
  for (; from + kWide <= size; from += kWide) weigh_rows<Q, kParts>(queries, weights, values, size, from);
  if (from < size) weigh_rows<Q, kHalfParts, true>(queries, weights, values, size, from);
}

// A piece, for all heads of a group and `count` rows of a sequence that begin to see at one position, the next one
// behind the other. `room` lies between those of two rows.
inline void attend_rows(const Attention& a, const Place* places, int64_t count, int64_t kv_head, int64_t piece,
                        float* rooms, int64_t room) {
  const int64_t size = a.size, group = a.heads / a.kv_heads;
  const int64_t begin = first_position(a, places[0]) + piece * kPieceRows, at = keys_at(a, places[0], kv_head, begin);
  alignas(64) float keys[kTurnedSize * kPieceRows], scores[kQueries * kPieceRows];
  const int64_t most = keys_seen(places[count - 1], begin);
  turn_keys(a.key + at, size, most, keys);
  for (int64_t first = 0; first < count * group; first += kQueries) {
    Query queries[kQueries];
    const int64_t left = count * group - first, here = left < kQueries ? left : kQueries;
    for (int64_t q = 0; q < here; q++) {
      const int64_t row = (first + q) / group, within = (first + q) % group, head = kv_head * group + within;
      const Place& place = places[row];
      const int64_t pieces = pieces_of(a, place), padded = padded_pieces(pieces);
      float *own = rooms + row * room, *largest = own + group * pieces * size + within * padded + piece;
      queries[q] = {queries_of(a, place) + head * size, own + (within * pieces + piece) * size, largest,
                    largest + group * padded, keys_seen(place, begin)};
    }
    int64_t q = 0;
    for (; q + kScoreQueries <= here; q += kScoreQueries)
      score<kScoreQueries>(queries + q, keys, size, most, scores + q * kPieceRows);
    for (; q < here; q++) score<1>(queries + q, keys, size, most, scores + q * kPieceRows);
    for (q = 0; q < here; q++) {
      const int64_t head = kv_head * group + (first + q) % group;
      scale_and_bias(a, head, begin, places[(first + q) / group].position, scores + q * kPieceRows, queries[q].seen);
      exponentials(scores + q * kPieceRows, queries[q].seen, queries[q].largest, queries[q].sum);
    }
    for (q = 0; q + 4 <= here; q += 4) weigh_size<4>(queries + q, scores + q * kPieceRows, a.value + at, size);
    for (; q < here; q++) weigh_size<1>(queries + q, scores + q * kPieceRows, a.value + at, size);
  }
}

}  // namespace
}  // namespace freeexport
