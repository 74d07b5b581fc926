// Attention of many rows that share keys. A piece of keys is transposed once, so that a register
// has the scores of neighboring keys, and needs no horizontal sum. Every sum has the operations of
// attention_tiles.h in the same order, so a row has the same bits as alone.
#pragma once

#include "attention_turned.h"

namespace freeexport {
namespace {

constexpr int kQueries = 16;  // queries with scores in memory at the same time

// A query of one head and row: its values, the results for a piece, and the keys that it sees.
struct Query {
  const float* values;
  Part part;
  Seen seen;
};

// Queries that are multiplied together, limited by the number of registers.
constexpr int kScoreQueries = 4;

template <int Q>
struct Sums {
  typename Vec::Float of[Q][kScoreKeys];
};
template <int Q>
FREEEXPORT_ATTENTION Sums<Q> added(Sums<Q> a, const Sums<Q>& b) {
#pragma GCC unroll 8
  for (int q = 0; q < Q; q++)
#pragma GCC unroll 2
    for (int k = 0; k < kScoreKeys; k++) a.of[q][k] = Vec::added(a.of[q][k], b.of[q][k]);
  return a;
}

// Sums the products of values lane, lane + 16, ... in order.
template <int Q, int64_t Size>
FREEEXPORT_ATTENTION Sums<Q> products(const float* const (&queries)[Q], const float* keys,
                                      int64_t size, int64_t lane) {
  Sums<Q> sums;
#pragma GCC unroll 8
  for (int q = 0; q < Q; q++)
#pragma GCC unroll 2
    for (int k = 0; k < kScoreKeys; k++) sums.of[q][k] = Vec::zero();
  const auto add = [&](int64_t i) __attribute__((always_inline)) {
    typename Vec::Float key[kScoreKeys];
#pragma GCC unroll 2
    for (int k = 0; k < kScoreKeys; k++) key[k] = Vec::floats(keys + i * kScored + k * Vec::kLanes);
#pragma GCC unroll 8
    for (int q = 0; q < Q; q++) {
      const typename Vec::Float value = Vec::set(queries[q][i]);
#pragma GCC unroll 2
      for (int k = 0; k < kScoreKeys; k++)
        sums.of[q][k] = Vec::add_product(value, key[k], sums.of[q][k]);
    }
  };
  if constexpr (Size > 0) {
#pragma GCC unroll 4
    for (int64_t step = 0; step < Size / kWide; step++) add(lane + step * kWide);
  } else {
    for (int64_t i = lane; i < size; i += kWide) add(i);
  }
  return sums;
}

// Computes scaled scores[q][t] of keys from..end, extended to whole registers. Lanes are added in
// the order of a single row, four at a time, because there are no registers for more. `Size`: size
// of a head, or 0 if unknown.
template <int Q, int64_t Size>
inline void score_size(const Query* rows, const float* turned, int64_t size, int64_t from,
                       int64_t end, float scale, float* scores) {
  const float* queries[Q];
#pragma GCC unroll 8
  for (int q = 0; q < Q; q++) queries[q] = rows[q].values;
  for (int64_t t = from / kScored * kScored; t < end; t += kScored) {
    const float* keys = turned + t * size;
    const auto of = [&](int64_t lane) __attribute__((always_inline)) {
      return products<Q, Size>(queries, keys, size, lane);
    };
    Sums<Q> fours[4];
    for (int64_t lane = 0; lane < 4; lane++)
      fours[lane] = added(added(of(lane), of(lane + 8)), added(of(lane + 4), of(lane + 12)));
    const Sums<Q> all = added(added(fours[0], fours[2]), added(fours[1], fours[3]));
#pragma GCC unroll 8
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 2
      for (int k = 0; k < kScoreKeys; k++)
        Vec::store(scores + q * kPieceRows + t + k * Vec::kLanes,
                   Vec::times(all.of[q][k], Vec::set(scale)));
  }
}

template <int Q>
inline void score(const Query* rows, const float* turned, int64_t size, int64_t from, int64_t end,
                  float scale, float* scores) {
  size == 64 ? score_size<Q, 64>(rows, turned, size, from, end, scale, scores)
             : score_size<Q, 0>(rows, turned, size, from, end, scale, scores);
}

// The same for keys in 8 bits, as pairs of 16-bit integers, and queries in 16.
template <int Q>
inline void score_bytes(const Query* rows, const float* turned, const float* scales, int64_t size,
                        int64_t from, int64_t end, float* scores) {
  const int16_t* queries[Q];
  typename Vec::Float by[Q];
#pragma GCC unroll 8
  for (int q = 0; q < Q; q++) {
    queries[q] = reinterpret_cast<const int16_t*>(rows[q].values);
    by[q] = Vec::set(scale_after(queries[q], size));
  }
  for (int64_t t = from / kScored * kScored; t < end; t += kScored) {
    const float* keys = turned + t * (size / 2);
    typename Vec::Int sums[Q][kScoreKeys];
#pragma GCC unroll 8
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 2
      for (int k = 0; k < kScoreKeys; k++) sums[q][k] = Vec::all(0);
    for (int64_t i = 0; i < size; i += 2, keys += kScored) {
      const typename Vec::Float pairs[kScoreKeys] = {Vec::floats(keys),
                                                     Vec::floats(keys + Vec::kLanes)};
#pragma GCC unroll 8
      for (int q = 0; q < Q; q++)
#pragma GCC unroll 2
        for (int k = 0; k < kScoreKeys; k++)
          sums[q][k] = Vec::add_pair(pairs[k], queries[q] + i, sums[q][k]);
    }
#pragma GCC unroll 8
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 2
      for (int k = 0; k < kScoreKeys; k++) {
        const int64_t at = t + k * Vec::kLanes;
        const typename Vec::Float scale = Vec::times(Vec::floats(scales + at), by[q]);
        Vec::store(scores + q * kPieceRows + at, Vec::times(Vec::converted(sums[q][k]), scale));
      }
  }
}

// Sums weighted values, for `Parts` registers of their size starting at `from`. Keys that all
// queries see are processed for all together, those before and after for each query alone.
template <int Q, int Parts, bool Half = false>
inline void weigh_rows(const Query* queries, const float* weights, const float* values,
                       int64_t size, int64_t from) {
  typename Vec::Float sums[Q][Parts];
#pragma GCC unroll 8
  for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
    for (int p = 0; p < Parts; p++) sums[q][p] = Vec::zero();
  Seen all = queries[0].seen;
  for (int q = 1; q < Q; q++) {
    all.from = queries[q].seen.from > all.from ? queries[q].seen.from : all.from;
    all.end = queries[q].seen.end < all.end ? queries[q].seen.end : all.end;
  }
  if (all.end < all.from) all.end = all.from;
  const auto add_alone = [&](int64_t begin, int64_t end, int q) {
    for (int64_t t = begin; t < end; t++)
#pragma GCC unroll 4
      for (int p = 0; p < Parts; p++)
        sums[q][p] = Vec::add_product(
            Vec::set(weights[q * kPieceRows + t]),
            values_at<Vec, Half>(values + t * size + from + p * Vec::kLanes), sums[q][p]);
  };
#pragma GCC unroll 8
  for (int q = 0; q < Q; q++)
    add_alone(queries[q].seen.from, all.from < queries[q].seen.end ? all.from : queries[q].seen.end,
              q);
  for (int64_t t = all.from; t < all.end; t++) {
    typename Vec::Float value[Parts];
#pragma GCC unroll 4
    for (int p = 0; p < Parts; p++)
      value[p] = values_at<Vec, Half>(values + t * size + from + p * Vec::kLanes);
#pragma GCC unroll 8
    for (int q = 0; q < Q; q++) {
      const typename Vec::Float weight = Vec::set(weights[q * kPieceRows + t]);
#pragma GCC unroll 4
      for (int p = 0; p < Parts; p++) sums[q][p] = Vec::add_product(weight, value[p], sums[q][p]);
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < Q; q++) {
    add_alone(all.end, queries[q].seen.end, q);
#pragma GCC unroll 4
    for (int p = 0; p < Parts; p++)
      put_values<Vec, Half>(queries[q].part.out + from + p * Vec::kLanes, sums[q][p]);
  }
}

template <int Q>
inline void weigh_size(const Query* queries, const float* weights, const float* values,
                       int64_t size) {
  constexpr int kRegisters = Vec::kLanes == 16 || Q == 1 ? 4 : 2;  // per tile of values
  int64_t from = 0;
  for (; from + kRegisters * Vec::kLanes <= size; from += kRegisters * Vec::kLanes)
    weigh_rows<Q, kRegisters>(queries, weights, values, size, from);
  for (; from + kWide <= size; from += kWide)
    weigh_rows<Q, kParts>(queries, weights, values, size, from);
  if (from < size) weigh_rows<Q, kHalfParts, true>(queries, weights, values, size, from);
}

// Converts `count` neighboring values to fp32.
template <typename C>
inline void widen(const C* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kWide <= count; i += kWide)
    for (int p = 0; p < kParts; p++)
      Vec::store(to + i + p * Vec::kLanes, values_at<Vec, false>(from + i + p * Vec::kLanes));
  if (i < count)
    for (int p = 0; p < kHalfParts; p++)
      put_values<Vec, true>(to + i + p * Vec::kLanes,
                            values_at<Vec, true>(from + i + p * Vec::kLanes));
}

// Returns the values [count, size] of a piece in fp32, without scales. `room` is memory to convert
// to.
inline const float* widened(const Attention& a, int64_t at, int64_t count, float* room) {
  if (a.cache == kFloats) return static_cast<const float*>(a.value) + at;
  if (a.cache == kHalves) widen(static_cast<const uint16_t*>(a.value) + at, count * a.size, room);
  const int8_t* bytes = static_cast<const int8_t*>(a.value) + at;
  for (int64_t t = 0; t < count && a.cache == kBytes; t++)
    widen(bytes + t * cache_width(a), a.size, room + t * a.size);
  return room;
}

// Transposes keys in 8 bits as pairs of 16-bit integers. `room` is memory for them.
inline void turn_bytes(const Attention& a, const int8_t* keys, int64_t count, float* room,
                       float* turned) {
  for (int64_t t = 0; t < count; t++)
    for (int64_t i = 0; i < a.size; i += 8) {
      int16_t eight[8];
      for (int64_t j = 0; j < 8; j++) eight[j] = keys[t * cache_width(a) + i + j];
      std::memcpy(room + (t * a.size + i) / 2, eight, sizeof(eight));
    }
  turn_keys(room, a.size / 2, count, kPieceRows, turned);
}

// Attends to a piece with all heads of a group and `count` consecutive rows of a sequence that see
// it. `room` belongs to the first row.
inline void attend_rows(const Attention& a, const Place* places, int64_t count, int64_t kv_head,
                        int64_t piece, const Room& room) {
  const int64_t size = a.size;
  const int64_t group = a.heads / a.kv_heads;
  const int64_t begin = piece * kPieceRows;
  const int64_t at = keys_at(a, places[0], kv_head, begin);
  alignas(64) float keys[kTurnedSize * kPieceRows];
  alignas(64) float scores[kQueries * kPieceRows];
  alignas(64) float outputs[kQueries * kTurnedSize];
  float largest[kQueries];
  float sums[kQueries];
  float powers[kQueries];
  alignas(64) float room_of_values[kTurnedSize * kPieceRows];
  const int64_t end_of_all = seen_of(a, places[count - 1], piece).end;
  float key_scales[kPieceRows] = {};
  float value_scales[kPieceRows] = {};
  if (a.cache == kBytes) {
    scales_of(static_cast<const int8_t*>(a.key) + at, size, {0, end_of_all}, key_scales);
    scales_of(static_cast<const int8_t*>(a.value) + at, size, {0, end_of_all}, value_scales);
    turn_bytes(a, static_cast<const int8_t*>(a.key) + at, end_of_all, room_of_values, keys);
  } else if (a.cache == kHalves) {
    turn_keys(static_cast<const uint16_t*>(a.key) + at, size, end_of_all, a.capacity - begin, keys);
  } else {
    turn_keys(static_cast<const float*>(a.key) + at, size, end_of_all, a.capacity - begin, keys);
  }
  const float* all_values = widened(a, at, end_of_all, room_of_values);
  const auto values_of = [&](int64_t query) {
    return queries_of(a, places[query / group]) + (kv_head * group + query % group) * size;
  };
  for (int64_t first = 0; first < count * group; first += kQueries) {
    Query queries[kQueries];
    Part parts[kQueries];
    const int64_t left = count * group - first;
    const int64_t here = left < kQueries ? left : kQueries;
    for (int64_t q = 0; q < here; q++) {
      for (int64_t i = 0; i < size && kQueries + q < left; i += kWide)
        __builtin_prefetch(values_of(first + kQueries + q) + i);
      const int64_t row = (first + q) / group;
      const int64_t within = (first + q) % group;
      const Place& place = places[row];
      const int64_t before = piece - first_piece(a, place);
      const Room own = {room.values + row * room.apart, room.slots, room.apart, room.running};
      parts[q] = part_of(a, own, within, room.running ? 0 : before);
      const bool joins = room.running && before > 0;
      queries[q] = {values_of(first + q),
                    joins ? Part{outputs + q * size, largest + q, sums + q} : parts[q],
                    seen_of(a, place, piece)};
    }
    const int64_t from = queries[0].seen.from;
    const int64_t end = queries[here - 1].seen.end;
    int64_t q = 0;
    for (; q + kScoreQueries <= here; q += kScoreQueries) {
      float* to = scores + q * kPieceRows;
      a.cache == kBytes
          ? score_bytes<kScoreQueries>(queries + q, keys, key_scales, size, from, end, to)
          : score<kScoreQueries>(queries + q, keys, size, from, end, a.scale, to);
    }
    for (; q < here; q++) {
      float* to = scores + q * kPieceRows;
      a.cache == kBytes ? score_bytes<1>(queries + q, keys, key_scales, size, from, end, to)
                        : score<1>(queries + q, keys, size, from, end, a.scale, to);
    }
    for (q = 0; q < here; q++) {
      const Seen seen = queries[q].seen;
      float* own = scores + q * kPieceRows;
      cap_and_bias(a, kv_head * group + (first + q) % group, begin + seen.from,
                   places[(first + q) / group].position, own + seen.from, seen.end - seen.from);
      exponentials(own, seen.from, seen.end, queries[q].part.largest, queries[q].part.sum);
      if (a.cache == kBytes) times_scales(own, value_scales, seen, 1.0f);
    }
    for (q = 0; q + 4 <= here; q += 4)
      weigh_size<4>(queries + q, scores + q * kPieceRows, all_values, size);
    for (; q < here; q++) weigh_size<1>(queries + q, scores + q * kPieceRows, all_values, size);
    if (!room.running) continue;
    for (q = 0; q < here; q++) powers[q] = distance_of(*parts[q].largest, *queries[q].part.largest);
    exponentials(powers, here);
    for (q = 0; q < here; q++)
      if (queries[q].part.out != parts[q].out)
        join_piece(parts[q], queries[q].part, powers[q], size);
  }
}

}  // namespace
}  // namespace freeexport
