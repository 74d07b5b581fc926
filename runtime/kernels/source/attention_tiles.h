// Attention of one instruction set, from the `Vec` of the including file. See tiles.h.
#pragma once

#include "attention.h"

namespace freeexport {
namespace {

constexpr int kWide = 16;  // values next to each other that are summed apart
constexpr int kParts = kWide / Vec::kLanes;
// A head's size is a multiple of 8, so half of `kWide` may be left: so many registers, the last of them half full where
// one holds `kWide`.
constexpr int kHalf = kWide / 2, kHalfParts = (kParts + 1) / 2;

template <typename V, bool Half>
inline typename V::Float values_at(const float* from) {
  if constexpr (Half && V::kLanes > kHalf)
    return V::eight(from);
  else
    return V::floats(from);
}

template <typename V, bool Half>
inline void put_values(float* to, typename V::Float values) {
  if constexpr (Half && V::kLanes > kHalf)
    V::store_eight(to, values);
  else
    V::store(to, values);
}

// x / sqrt(mean(x^2) + epsilon) * norm, then turned by the position; in place.
__attribute__((noinline)) void norm_and_turn(const Attention& a, const float* norm, int64_t position, float* x) {
  const int64_t size = a.size, half = a.turned;
  if (norm != nullptr) {
    const float scale = 1.0f / root(sum_of_squares(x, size) / static_cast<float>(size) + a.epsilon);
    for (int64_t i = 0; i < size; i++) x[i] = (x[i] * scale) * norm[i];
  }
  if (a.cosine == nullptr) return;
  const float *cosine = a.cosine + position * half, *sine = a.sine + position * half;
  for (int64_t i = 0; i < half; i++) {
    const float low = x[i], high = x[i + half];
    x[i] = low * cosine[i] - high * sine[i];
    x[i + half] = high * cosine[i] + low * sine[i];
  }
}

// Whether queries are not as they stand in the input. `store_row` then leaves them in y.
inline bool turned(const Attention& a) { return a.cosine != nullptr || a.query_norm != nullptr; }

// All queries of a row.
inline const float* queries_of(const Attention& a, const Place& place) {
  return turned(a) ? a.y + place.row * a.heads * a.size : a.input + place.row * a.width;
}

// Keys of the piece that begins at a position that a row sees.
inline int64_t keys_seen(const Place& place, int64_t begin) {
  const int64_t left = place.position + 1 - begin;
  return left < kPieceRows ? left : kPieceRows;
}

// Keys and values of a row to the cache, and its queries to y.
inline void store_row(const Attention& a, const Place& place) {
  const size_t bytes = static_cast<size_t>(a.size) * sizeof(float);
  const float* keys = a.input + place.row * a.width + a.heads * a.size;
  for (int64_t head = 0; head < a.kv_heads; head++) {
    const int64_t at = ((place.sequence * a.kv_heads + head) * a.capacity + place.position) * a.size;
    std::memcpy(a.key + at, keys + head * a.size, bytes);
    norm_and_turn(a, a.key_norm, place.position, a.key + at);
    std::memcpy(a.value + at, keys + (a.kv_heads + head) * a.size, bytes);
  }
  if (!turned(a)) return;
  float* queries = a.y + place.row * a.heads * a.size;
  std::memcpy(queries, a.input + place.row * a.width, bytes * static_cast<size_t>(a.heads));
  for (int64_t head = 0; head < a.heads; head++)
    norm_and_turn(a, a.query_norm, place.position, queries + head * a.size);
}

// Adds the products of `Parts` registers of 4 keys and Q queries to sums. `Half`: of 8 values.
template <int Q, int Parts, bool Half>
inline void add_four(const float* queries, const float* keys, int64_t size, typename Vec::Float (&sums)[Q][4][kParts]) {
#pragma GCC unroll 16
  for (int p = 0; p < Parts; p++) {
    typename Vec::Float query[Q];
#pragma GCC unroll 16
    for (int q = 0; q < Q; q++) query[q] = values_at<Vec, Half>(queries + q * size + p * Vec::kLanes);
#pragma GCC unroll 16
    for (int k = 0; k < 4; k++) {
      const typename Vec::Float key = values_at<Vec, Half>(keys + k * size + p * Vec::kLanes);
#pragma GCC unroll 16
      for (int q = 0; q < Q; q++) sums[q][k][p] = Vec::add_product(query[q], key, sums[q][k][p]);
    }
  }
}

// Of 4 keys and Q queries: scores[q][0..3]. Meanwhile the rows of `ahead` are fetched.
template <int Q>
inline void dot_four(const float* queries, const float* keys, int64_t size, float* scores, const float* ahead) {
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

// scores[q][t] = queries[q] . keys[t]. Meanwhile `values` are fetched.
template <int Q>
inline void dots(const float* queries, const float* keys, const float* values, int64_t size, int64_t count,
                 float* scores) {
  constexpr int kTogether = kParts == 1 ? Q : 1;  // as many sums as there are registers for
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
                                     Vec::floats(keys + t * size + at + p * Vec::kLanes), sums[p]);
      if (at < size)
        for (int p = 0; p < kHalfParts; p++)
          sums[p] = Vec::add_product(values_at<Vec, true>(queries + q * size + at + p * Vec::kLanes),
                                     values_at<Vec, true>(keys + t * size + at + p * Vec::kLanes), sums[p]);
      scores[q * kPieceRows + t] = Vec::fold(sums);
    }
}

// out[q] = sum over t of weights[q][t] values[t], for `Parts` registers of the values' size from `from` on, or 8 of it
// where `Half`; `stride` between the weights of two q, `apart` between their sums. Meanwhile the rows of `ahead` are
// fetched.
template <int Q, int Parts, bool Half = false>
inline void weigh(const float* weights, int64_t stride, const float* values, int64_t size, int64_t count, int64_t from,
                  float* out, int64_t apart, const Ahead& ahead) {
  typename Vec::Float sums[Q][Parts];
  for (int q = 0; q < Q; q++)
    for (int p = 0; p < Parts; p++) sums[q][p] = Vec::zero();
  for (int64_t t = 0; t < count; t++) {
    if (t < ahead.rows)
      for (int w = 0; w < Parts * Vec::kLanes; w += kWide) __builtin_prefetch(ahead.keys + t * size + from + w);
    for (int p = 0; p < Parts; p++) {
      const typename Vec::Float value = values_at<Vec, Half>(values + t * size + from + p * Vec::kLanes);
      for (int q = 0; q < Q; q++)
        sums[q][p] = Vec::add_product(Vec::set(weights[q * stride + t]), value, sums[q][p]);
    }
  }
  for (int q = 0; q < Q; q++)
    for (int p = 0; p < Parts; p++) put_values<Vec, Half>(out + q * apart + from + p * Vec::kLanes, sums[q][p]);
}

// e^(x - largest) in place, the largest, and the sum of these: 16 next to each other are summed apart. What x has room
// for behind its end, up to the next multiple of 16, is written to.
inline void exponentials(float* x, int64_t count, float* most, float* sum) {
  float largest[kWide], sums[kWide] = {};
  const int64_t end = (count + kWide - 1) / kWide * kWide;
  for (int64_t i = count; i < end; i++) x[i] = x[0];
  for (int j = 0; j < kWide; j++) largest[j] = x[j];
  for (int64_t i = kWide; i < end; i += kWide)
    for (int j = 0; j < kWide; j++) largest[j] = x[i + j] > largest[j] ? x[i + j] : largest[j];
  for (int half = kWide / 2; half > 0; half /= 2)
    for (int j = 0; j < half; j++) largest[j] = largest[j + half] > largest[j] ? largest[j + half] : largest[j];
  for (int64_t i = 0; i < end; i++) x[i] -= largest[0];
  exponentials(x, end);
  for (int64_t i = count; i < end; i++) x[i] = 0.0f;
  for (int64_t i = 0; i < end; i += kWide)
    for (int j = 0; j < kWide; j++) sums[j] += x[i + j];
  for (int half = kWide / 2; half > 0; half /= 2)
    for (int j = 0; j < half; j++) sums[j] += sums[j + half];
  *most = largest[0];
  *sum = sums[0];
}

// most * tanh(x / most) in place, of at most kPieceRows numbers.
inline void cap(float* x, int64_t count, float most) {
  float powers[kPieceRows];
  for (int64_t t = 0; t < count; t++) powers[t] = (x[t] < 0.0f ? x[t] : -x[t]) * (2.0f / most);
  exponentials(powers, count);
  for (int64_t t = 0; t < count; t++) {
    const float size = most * ((1.0f - powers[t]) / (1.0f + powers[t]));
    x[t] = x[t] < 0.0f ? -size : size;
  }
}

// `begin` is the position of the first key, `position` that of the row.
inline void scale_and_bias(const Attention& a, int64_t head, int64_t begin, int64_t position, float* scores,
                           int64_t count) {
  for (int64_t t = 0; t < count; t++) scores[t] *= a.scale;
  if (a.softcap > 0.0f) cap(scores, count, a.softcap);
  if (a.bias == nullptr) return;
  for (int64_t t = 0; t < count; t++) {
    const int64_t distance = position - (begin + t);
    scores[t] += a.bias[(distance < a.reach ? distance : a.reach) * a.heads + head];
  }
}

// The same for all of the values' size, as much at once as there are registers for.
template <int Q>
inline void weigh_all(const float* weights, int64_t stride, const float* values, int64_t size, int64_t count,
                      float* out, int64_t apart, const Ahead& ahead) {
  constexpr int kWideSums = Vec::kLanes == 16 || Q == 1 ? 4 : Q < 4 ? 2 : 1;
  int64_t from = 0;
  for (; from + kWideSums * kWide <= size; from += kWideSums * kWide)
    weigh<Q, kWideSums * kParts>(weights, stride, values, size, count, from, out, apart, ahead);
  for (; from + kWide <= size; from += kWide)
    weigh<Q, kParts>(weights, stride, values, size, count, from, out, apart, ahead);
  if (from < size) weigh<Q, kHalfParts, true>(weights, stride, values, size, count, from, out, apart, ahead);
}

// Of a piece, Q heads from that of number `within` of its group on.
template <int Q>
inline void attend_heads(const Attention& a, const Place& place, int64_t kv_head, int64_t piece, int64_t within,
                         const Ahead& ahead, float* room) {
  const int64_t size = a.size, group = a.heads / a.kv_heads, head = kv_head * group + within;
  const int64_t begin = first_position(a, place) + piece * kPieceRows, pieces = pieces_of(a, place);
  const int64_t count = keys_seen(place, begin), at = keys_at(a, place, kv_head, begin);
  float scores[Q * kPieceRows];
  dots<Q>(queries_of(a, place) + head * size, a.key + at, a.value + at, size, count, scores);
  float* outputs = room + (within * pieces + piece) * size;
  const int64_t padded = padded_pieces(pieces);
  float* largest = room + group * pieces * size + within * padded + piece;
  for (int q = 0; q < Q; q++) {
    scale_and_bias(a, head + q, begin, place.position, scores + q * kPieceRows, count);
    exponentials(scores + q * kPieceRows, count, largest + q * padded, largest + (group + q) * padded);
  }
  weigh_all<Q>(scores, kPieceRows, a.value + at, size, count, outputs, pieces * size, ahead);
}

// A piece of what a row sees, for all heads of a group. `room` is of attention_room.
inline void attend(const Attention& a, const Place& place, int64_t kv_head, int64_t piece, const Ahead& ahead,
                   float* room) {
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t g = 0; g < group; g += kSharing) {
    const int64_t left = group - g;
    if (left >= 4)
      attend_heads<4>(a, place, kv_head, piece, g, ahead, room);
    else if (left == 3)
      attend_heads<3>(a, place, kv_head, piece, g, ahead, room);
    else if (left == 2)
      attend_heads<2>(a, place, kv_head, piece, g, ahead, room);
    else
      attend_heads<1>(a, place, kv_head, piece, g, ahead, room);
  }
}

// The pieces of a row, weighed by what they have of the whole, to y.
inline void join(const Attention& a, const Place& place, int64_t kv_head, float* room) {
  const int64_t size = a.size, group = a.heads / a.kv_heads, pieces = pieces_of(a, place);
  const int64_t padded = padded_pieces(pieces);
  float *largest = room + group * pieces * size, *sums = largest + group * padded;
  for (int64_t g = 0; g < group; g++, largest += padded, sums += padded, room += pieces * size) {
    float* y = a.y + (place.row * a.heads + kv_head * group + g) * size;
    if (pieces == 0) {  // there is nothing to attend to
      std::memset(y, 0, static_cast<size_t>(size) * sizeof(float));
      continue;
    }
    const float* joined = room;
    float sum = sums[0];
    if (pieces > 1) {
      float most, all;
      exponentials(largest, pieces, &most, &all);
      sum = 0.0f;
      for (int64_t p = 0; p < pieces; p++) sum += sums[p] * largest[p];
      weigh_all<1>(largest, 0, room, size, pieces, y, 0, {room, 0});
      joined = y;
    }
    for (int64_t i = 0; i < size; i++) y[i] = joined[i] / sum;
  }
}

}  // namespace
}  // namespace freeexport
