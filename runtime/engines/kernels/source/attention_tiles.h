// Attention for one instruction set, with the `Vec` of the including file. See tiles.h.
#pragma once

#include "attention_bytes.h"

namespace freeexport {
namespace {

constexpr int kWide = 16;  // neighboring values with separate sums
constexpr int kParts = kWide / Vec::kLanes;
// A head's size is a multiple of 8, so half of `kWide` may remain. It takes kHalfParts registers,
// of which the last is half full if a register holds `kWide` values.
constexpr int kHalf = kWide / 2;
constexpr int kHalfParts = (kParts + 1) / 2;

template <typename V, bool Half, typename C>
inline typename V::Float values_at(const C* from) {
  if constexpr (Half && V::kLanes > kHalf)
    return V::eight(from);
  else if constexpr (sizeof(C) == sizeof(float))
    return V::floats(from);
  else if constexpr (sizeof(C) == 1)
    return V::bytes(from);
  else
    return V::halves(from);
}

template <typename V, bool Half>
inline void put_values(float* to, typename V::Float values) {
  if constexpr (Half && V::kLanes > kHalf)
    V::store_eight(to, values);
  else
    V::store(to, values);
}

// Computes x / sqrt(mean(x^2) + epsilon) * norm, then rotates x by its position, in place.
__attribute__((noinline)) void norm_and_turn(const Attention& a, const float* norm,
                                             int64_t position, float* x) {
  const int64_t size = a.size;
  const int64_t half = a.turned;
  if (norm != nullptr) {
    const float scale = 1.0f / root(sum_of_squares(x, size) / static_cast<float>(size) + a.epsilon);
    for (int64_t i = 0; i < size; i++) x[i] = (x[i] * scale) * norm[i];
  }
  if (a.cosine == nullptr) return;
  const float* cosine = a.cosine + position * half;
  const float* sine = a.sine + position * half;
  for (int64_t i = 0; i < half; i++) {
    const float low = x[i];
    const float high = x[i + half];
    x[i] = low * cosine[i] - high * sine[i];
    x[i + half] = high * cosine[i] + low * sine[i];
  }
}

// Returns true if queries are normalized, rotated or quantized. `store_row` then leaves them in y.
inline bool turned(const Attention& a) {
  return a.cosine != nullptr || a.query_norm != nullptr || a.cache == kBytes;
}

// Returns all queries of a row.
inline const float* queries_of(const Attention& a, const Place& place) {
  return turned(a) ? a.y + place.row * a.heads * a.size : a.input + place.row * a.width;
}

inline Seen seen_of(const Attention& a, const Place& place, int64_t piece) {
  const int64_t from = first_position(a, place) - piece * kPieceRows;
  const int64_t end = place.position + 1 - piece * kPieceRows;
  return {from > 0 ? from : 0, end < kPieceRows ? end : kPieceRows};
}

inline void put_in_cache(float* to, const float* from, int64_t size) {
  std::memcpy(to, from, static_cast<size_t>(size) * sizeof(float));
}
inline void put_in_cache(uint16_t* to, const float* from, int64_t size) {
  for (int64_t i = 0; i < size; i += 8) Vec::put_halves(to + i, from + i);
}
inline void put_in_cache(int8_t* to, const float* from, int64_t size) {
  const float scale = quantize_head<int8_t>(from, size, INT8_MAX, to);
  std::memcpy(to + size, &scale, sizeof(scale));
}

// Stores keys and values of a row in the cache, which has type C, and its queries in y. Rows of
// cross-attention have queries only, those of a prompt keys and values only.
template <typename C>
inline void store_row_as(const Attention& a, const Place& place) {
  const size_t bytes = static_cast<size_t>(a.size) * sizeof(float);
  const float* keys = a.input + place.row * a.width + a.heads * a.size;
  float* queries = a.y + place.row * a.heads * a.size;
  const bool stores = !a.cross_lengths || a.encoder;
  const bool turns = a.key_norm != nullptr || a.cosine != nullptr;
  for (int64_t head = 0; stores && head < a.kv_heads; head++) {
    const int64_t at = keys_at(a, place, head, place.position);
    const float* key = keys + head * a.size;
    if (turns) {
      std::memcpy(queries, key, bytes);  // temporary memory for a key
      norm_and_turn(a, a.key_norm, place.position, queries);
      key = queries;
    }
    put_in_cache(static_cast<C*>(a.key) + at, key, a.size);
    put_in_cache(static_cast<C*>(a.value) + at, keys + (a.kv_heads + head) * a.size, a.size);
  }
  if (!turned(a) || a.heads == 0) return;
  std::memcpy(queries, a.input + place.row * a.width, bytes * static_cast<size_t>(a.heads));
  for (int64_t head = 0; head < a.heads; head++) {
    norm_and_turn(a, a.query_norm, place.position, queries + head * a.size);
    if (a.cache == kBytes) shorten_query(a, queries + head * a.size);
  }
}

inline void store_row(const Attention& a, const Place& place) {
  a.cache == kBytes    ? store_row_as<int8_t>(a, place)
  : a.cache == kHalves ? store_row_as<uint16_t>(a, place)
                       : store_row_as<float>(a, place);
}

// Adds the products of 4 keys and Q queries to sums, for `Parts` registers, or 8 values if `Half`.
template <int Q, int Parts, bool Half, typename C>
inline void add_four(const float* queries, const C* keys, int64_t size,
                     typename Vec::Float (&sums)[Q][4][kParts]) {
#pragma GCC unroll 16
  for (int p = 0; p < Parts; p++) {
    typename Vec::Float query[Q];
#pragma GCC unroll 16
    for (int q = 0; q < Q; q++)
      query[q] = values_at<Vec, Half>(queries + q * size + p * Vec::kLanes);
#pragma GCC unroll 16
    for (int k = 0; k < 4; k++) {
      const typename Vec::Float key = values_at<Vec, Half>(keys + k * size + p * Vec::kLanes);
#pragma GCC unroll 16
      for (int q = 0; q < Q; q++) sums[q][k][p] = Vec::add_product(query[q], key, sums[q][k][p]);
    }
  }
}

// Computes scores[q][0..3] of 4 keys and Q queries. Prefetches the rows of `ahead`.
template <int Q, typename C>
inline void dot_four(const float* queries, const C* keys, int64_t size, float* scores,
                     const C* ahead) {
  typename Vec::Float sums[Q][4][kParts];
#pragma GCC unroll 16
  for (int q = 0; q < Q; q++)
#pragma GCC unroll 16
    for (int k = 0; k < 4; k++)
#pragma GCC unroll 16
      for (int p = 0; p < kParts; p++) sums[q][k][p] = Vec::zero();
  int64_t at = 0;
  for (; at + kWide <= size; at += kWide) {
#pragma GCC unroll 16
    for (int k = 0; k < 4; k++) __builtin_prefetch(ahead + k * size + at);
    add_four<Q, kParts, false>(queries + at, keys + at, size, sums);
  }
  if (at < size) add_four<Q, kHalfParts, true>(queries + at, keys + at, size, sums);
#pragma GCC unroll 16
  for (int q = 0; q < Q; q++) Vec::fold_four(sums[q], scores + q * kPieceRows);
}

// Computes scores[q][t] = queries[q] . keys[t]. Prefetches `values`.
template <int Q, typename C>
inline void dots(const float* queries, const C* keys, const C* values, int64_t size, int64_t count,
                 float* scores) {
  constexpr int kTogether = kParts == 1 ? Q : 1;  // limited by the number of registers
  int64_t t = 0;
  for (; t + 4 <= count; t += 4)
    for (int q = 0; q < Q; q += kTogether)
      dot_four<kTogether>(queries + q * size, keys + t * size, size, scores + q * kPieceRows + t,
                          values + t * size);
  for (; t < count; t++)
    for (int q = 0; q < Q; q++) {
      typename Vec::Float sums[kParts];
      for (int p = 0; p < kParts; p++) sums[p] = Vec::zero();
      int64_t at = 0;
      for (; at + kWide <= size; at += kWide)
        for (int p = 0; p < kParts; p++)
          sums[p] = Vec::add_product(Vec::floats(queries + q * size + at + p * Vec::kLanes),
                                     values_at<Vec, false>(keys + t * size + at + p * Vec::kLanes),
                                     sums[p]);
      if (at < size)
        for (int p = 0; p < kHalfParts; p++)
          sums[p] = Vec::add_product(
              values_at<Vec, true>(queries + q * size + at + p * Vec::kLanes),
              values_at<Vec, true>(keys + t * size + at + p * Vec::kLanes), sums[p]);
      scores[q * kPieceRows + t] = Vec::fold(sums);
    }
}

// Computes out[q] = sum over t of weights[q][t] values[t], for `Parts` registers of the values'
// size starting at `from`, or for 8 values if `Half`. The values of two t are `width` apart, the
// weights of two q `stride`, their sums `apart`. Prefetches the rows of `ahead`.
template <int Q, int Parts, bool Half = false, typename C>
inline void weigh(const float* weights, int64_t stride, const C* values, int64_t width,
                  int64_t count, int64_t from, float* out, int64_t apart, const Ahead& ahead) {
  constexpr int kFetched = sizeof(C) == 1 ? 64 : kWide;  // neighboring values per prefetch
  typename Vec::Float sums[Q][Parts];
  for (int q = 0; q < Q; q++)
    for (int p = 0; p < Parts; p++) sums[q][p] = Vec::zero();
  for (int64_t t = 0; t < count; t++) {
    if (t < ahead.rows)
      for (int w = 0; w < Parts * Vec::kLanes; w += kFetched)
        __builtin_prefetch(static_cast<const C*>(ahead.keys) + t * width + from + w);
    for (int p = 0; p < Parts; p++) {
      const typename Vec::Float value =
          values_at<Vec, Half>(values + t * width + from + p * Vec::kLanes);
      for (int q = 0; q < Q; q++)
        sums[q][p] = Vec::add_product(Vec::set(weights[q * stride + t]), value, sums[q][p]);
    }
  }
  for (int q = 0; q < Q; q++)
    for (int p = 0; p < Parts; p++)
      put_values<Vec, Half>(out + q * apart + from + p * Vec::kLanes, sums[q][p]);
}

// Computes e^(x - largest) of x[from]..x[end] in place, the largest x, and the sum, with separate
// sums for 16 neighboring values. At both ends x has memory for whole groups of 16, which becomes
// 0.
inline void exponentials(float* x, int64_t from, int64_t end, float* most, float* sum) {
  const int64_t first = from / kWide * kWide;
  const int64_t last = (end + kWide - 1) / kWide * kWide;
  for (int64_t i = first; i < from; i++) x[i] = x[from];
  for (int64_t i = end; i < last; i++) x[i] = x[from];
  typename Vec::Float parts[kParts];
  for (int p = 0; p < kParts; p++) parts[p] = Vec::floats(x + first + p * Vec::kLanes);
  for (int64_t i = first + kWide; i < last; i += kWide)
    for (int p = 0; p < kParts; p++)
      parts[p] = Vec::larger(Vec::floats(x + i + p * Vec::kLanes), parts[p]);
  *most = Vec::largest(parts);
  const typename Vec::Float all = Vec::set(*most);
  for (int p = 0; p < kParts; p++) parts[p] = Vec::zero();
  const bool whole = first == from && last == end;
  for (int64_t i = first; i < last; i += kWide)
    for (int p = 0; p < kParts; p++) {
      float* at = x + i + p * Vec::kLanes;
      const typename Vec::Float power = exponential(Vec::minus(Vec::floats(at), all));
      if (whole) parts[p] = Vec::added(parts[p], power);
      Vec::store(at, power);
    }
  if (!whole) {
    for (int64_t i = first; i < from; i++) x[i] = 0.0f;
    for (int64_t i = end; i < last; i++) x[i] = 0.0f;
    for (int64_t i = first; i < last; i += kWide)
      for (int p = 0; p < kParts; p++)
        parts[p] = Vec::added(parts[p], Vec::floats(x + i + p * Vec::kLanes));
  }
  *sum = Vec::fold(parts);
}

// Computes most * tanh(x / most) in place, for at most kPieceRows values.
inline void cap(float* x, int64_t count, float most) {
  float powers[kPieceRows];
  for (int64_t t = 0; t < count; t++) powers[t] = (x[t] < 0.0f ? x[t] : -x[t]) * (2.0f / most);
  exponentials(powers, count);
  for (int64_t t = 0; t < count; t++) {
    const float size = most * ((1.0f - powers[t]) / (1.0f + powers[t]));
    x[t] = x[t] < 0.0f ? -size : size;
  }
}

// Caps scaled scores and adds the bias. `begin` is the position of the first key, `position` that
// of the row.
inline void cap_and_bias(const Attention& a, int64_t head, int64_t begin, int64_t position,
                         float* scores, int64_t count) {
  if (a.softcap > 0.0f) cap(scores, count, a.softcap);
  if (a.bias == nullptr) return;
  for (int64_t t = 0; t < count; t++) {
    const int64_t distance = position - (begin + t);
    scores[t] += a.bias[(distance < a.reach ? distance : a.reach) * a.heads + head];
  }
}

// Calls `weigh` for the whole size of the values, as much at a time as registers permit.
template <int Q, typename C>
inline void weigh_all(const float* weights, int64_t stride, const C* values, int64_t size,
                      int64_t width, int64_t count, float* out, int64_t apart, const Ahead& ahead) {
  constexpr int kWideSums = Vec::kLanes == 16 || Q == 1 ? 4 : Q < 4 ? 2 : 1;
  int64_t from = 0;
  for (; from + kWideSums * kWide <= size; from += kWideSums * kWide)
    weigh<Q, kWideSums * kParts>(weights, stride, values, width, count, from, out, apart, ahead);
  for (; from + kWide <= size; from += kWide)
    weigh<Q, kParts>(weights, stride, values, width, count, from, out, apart, ahead);
  if (from < size)
    weigh<Q, kHalfParts, true>(weights, stride, values, width, count, from, out, apart, ahead);
}

// Results of a head so far: outputs, largest score, and sum of exponentials.
struct Part {
  float* out;
  float* largest;
  float* sum;
};
inline Part part_of(const Attention& a, const Room& room, int64_t within, int64_t slot) {
  const int64_t group = a.heads / a.kv_heads;
  const int64_t padded = padded_slots(room.slots);
  float* largest = room.values + group * room.slots * a.size + within * padded + slot;
  return {room.values + (within * room.slots + slot) * a.size, largest, largest + group * padded};
}

// Returns minus the distance of two largest scores. Its exponential is the factor of the smaller
// one's share.
inline float distance_of(float a, float b) { return a > b ? b - a : a - b; }

// Joins a later piece to earlier ones. `power` is e^distance_of their largest scores.
inline void join_piece(const Part& to, const Part& piece, float power, int64_t size) {
  const bool more = *piece.largest > *to.largest;
  const float own = more ? power : 1.0f;
  const float other = more ? 1.0f : power;
  const auto joined = [&](typename Vec::Float values, typename Vec::Float others) {
    return Vec::add_product(values, Vec::set(own), Vec::times(others, Vec::set(other)));
  };
  int64_t i = 0;
  for (; i + Vec::kLanes <= size; i += Vec::kLanes)
    Vec::store(to.out + i, joined(Vec::floats(to.out + i), Vec::floats(piece.out + i)));
  if (i < size)
    put_values<Vec, true>(
        to.out + i, joined(values_at<Vec, true>(to.out + i), values_at<Vec, true>(piece.out + i)));
  *to.sum = *to.sum * own + *piece.sum * other;
  if (more) *to.largest = *piece.largest;
}

// Attends to a piece with Q heads of a group, starting at number `within`.
template <int Q, typename C>
inline void attend_heads(const Attention& a, const Place& place, int64_t kv_head, int64_t piece,
                         int64_t within, const Ahead& ahead, const Room& room) {
  const int64_t size = a.size;
  const int64_t head = kv_head * (a.heads / a.kv_heads) + within;
  const int64_t begin = piece * kPieceRows;
  const Seen seen = seen_of(a, place, piece);
  const int64_t at = keys_at(a, place, kv_head, begin);
  const int64_t width = cache_width(a);
  const int64_t count = seen.end - seen.from;
  const int64_t slot = room.running ? piece > first_piece(a, place) : piece - first_piece(a, place);
  float scores[Q * kPieceRows];
  float value_scales[kPieceRows] = {};
  const C* keys = static_cast<const C*>(a.key) + at;
  const C* values = static_cast<const C*>(a.value) + at;
  if constexpr (sizeof(C) == 1) {
    byte_scores<Q>(a, place, head, keys, values, seen, scores);
    scales_of(values, size, seen, value_scales);
  } else {
    const int64_t first = seen.from * size;
    dots<Q>(queries_of(a, place) + head * size, keys + first, values + first, size, count,
            scores + seen.from);
  }
  for (int q = 0; q < Q; q++) {
    float* own = scores + q * kPieceRows;
    const Part part = part_of(a, room, within + q, slot);
    for (int64_t t = seen.from; t < seen.end && sizeof(C) > 1; t++) own[t] *= a.scale;
    cap_and_bias(a, head + q, begin + seen.from, place.position, own + seen.from, count);
    exponentials(own, seen.from, seen.end, part.largest, part.sum);
    if constexpr (sizeof(C) == 1) times_scales(own, value_scales, seen, 1.0f);
  }
  weigh_all<Q>(scores + seen.from, kPieceRows, values + seen.from * width, size, width, count,
               part_of(a, room, within, slot).out, room.slots * size, ahead);
}

// Attends to a piece with all heads of a group, for one row.
template <typename C>
inline void attend_as(const Attention& a, const Place& place, int64_t kv_head, int64_t piece,
                      const Ahead& ahead, const Room& room) {
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t g = 0; g < group; g += kSharing) {
    const int64_t left = group - g;
    if (left >= 4)
      attend_heads<4, C>(a, place, kv_head, piece, g, ahead, room);
    else if (left == 3)
      attend_heads<3, C>(a, place, kv_head, piece, g, ahead, room);
    else if (left == 2)
      attend_heads<2, C>(a, place, kv_head, piece, g, ahead, room);
    else
      attend_heads<1, C>(a, place, kv_head, piece, g, ahead, room);
  }
  if (!room.running || piece == first_piece(a, place)) return;
  for (int64_t g = 0; g < group; g++) {
    const Part to = part_of(a, room, g, 0);
    const Part part = part_of(a, room, g, 1);
    float power = distance_of(*to.largest, *part.largest);
    exponentials(&power, 1);
    join_piece(to, part, power, a.size);
  }
}

inline void attend(const Attention& a, const Place& place, int64_t kv_head, int64_t piece,
                   const Ahead& ahead, const Room& room) {
  a.cache == kBytes    ? attend_as<int8_t>(a, place, kv_head, piece, ahead, room)
  : a.cache == kHalves ? attend_as<uint16_t>(a, place, kv_head, piece, ahead, room)
                       : attend_as<float>(a, place, kv_head, piece, ahead, room);
}

// Joins all pieces of a row, divides by the sum of exponentials, and stores y.
inline void join(const Attention& a, const Place& place, int64_t kv_head, const Room& room) {
  const int64_t size = a.size;
  const int64_t group = a.heads / a.kv_heads;
  const int64_t pieces = end_piece(place) - first_piece(a, place);
  for (int64_t g = 0; g < group; g++) {
    float* y = a.y + (place.row * a.heads + kv_head * group + g) * size;
    if (pieces == 0) {  // the row sees no keys
      std::memset(y, 0, static_cast<size_t>(size) * sizeof(float));
      continue;
    }
    const Part all = part_of(a, room, g, 0);
    for (int64_t first = 1; first < pieces && !room.running; first += kPieceRows) {
      const int64_t count = pieces - first < kPieceRows ? pieces - first : kPieceRows;
      float powers[kPieceRows];
      float most = *all.largest;
      for (int64_t p = 0; p < count; p++) {
        const float next = all.largest[first + p];
        powers[p] = distance_of(most, next);
        most = next > most ? next : most;
      }
      exponentials(powers, count);
      for (int64_t p = 0; p < count; p++)
        join_piece(all, part_of(a, room, g, first + p), powers[p], size);
    }
    const float by = 1.0f / *all.sum;
    for (int64_t i = 0; i < size; i++) y[i] = all.out[i] * by;
  }
}

}  // namespace
}  // namespace freeexport
