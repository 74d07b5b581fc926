// Attention of one instruction set, from the `Vec` of the including file. See tiles.h.
#pragma once

#include "attention.h"

namespace freeexport {
namespace {

constexpr int kWide = 16;  // values next to each other that are summed apart
constexpr int kParts = kWide / Vec::kLanes;

// x / sqrt(mean(x^2) + epsilon) * norm, then turned by the position; in place.
inline void norm_and_turn(const Attention& a, const float* norm, int64_t position, float* x) {
  const int64_t size = a.size, half = size / 2;
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

// Keys and values of a row to the cache.
inline void store_row(const Attention& a, const Place& place) {
  const size_t bytes = static_cast<size_t>(a.size) * sizeof(float);
  const float* keys = a.input + place.row * a.width + a.heads * a.size;
  for (int64_t head = 0; head < a.kv_heads; head++) {
    const int64_t at = ((place.sequence * a.kv_heads + head) * a.capacity + place.position) * a.size;
    std::memcpy(a.key + at, keys + head * a.size, bytes);
    norm_and_turn(a, a.key_norm, place.position, a.key + at);
    std::memcpy(a.value + at, keys + (a.kv_heads + head) * a.size, bytes);
  }
}

// scores[q][t] = queries[q] . keys[t], with `stride` between the scores of two queries.
template <int Q>
inline void dots(const float* queries, const float* keys, int64_t size, int64_t count, float* scores, int64_t stride) {
  for (int64_t t = 0; t < count; t++) {
    typename Vec::Float sums[Q][kParts];
    for (int q = 0; q < Q; q++)
      for (int p = 0; p < kParts; p++) sums[q][p] = Vec::zero();
    for (int64_t at = 0; at < size; at += kWide)
      for (int p = 0; p < kParts; p++) {
        const typename Vec::Float key = Vec::floats(keys + t * size + at + p * Vec::kLanes);
        for (int q = 0; q < Q; q++)
          sums[q][p] = Vec::add_product(Vec::floats(queries + q * size + at + p * Vec::kLanes), key, sums[q][p]);
      }
    for (int q = 0; q < Q; q++) scores[q * stride + t] = Vec::fold(sums[q]);
  }
}

// out[q] = sum over t of weights[q][t] values[t], for `Wide` * 16 of the values' size.
template <int Q, int Wide>
inline void weigh(const float* weights, int64_t stride, const float* values, int64_t size, int64_t count, float* out,
                  int64_t apart) {
  constexpr int kAll = Wide * kParts;
  typename Vec::Float sums[Q][kAll];
  for (int q = 0; q < Q; q++)
    for (int p = 0; p < kAll; p++) sums[q][p] = Vec::zero();
  for (int64_t t = 0; t < count; t++)
    for (int p = 0; p < kAll; p++) {
      const typename Vec::Float value = Vec::floats(values + t * size + p * Vec::kLanes);
      for (int q = 0; q < Q; q++)
        sums[q][p] = Vec::add_product(Vec::set(weights[q * stride + t]), value, sums[q][p]);
    }
  for (int q = 0; q < Q; q++)
    for (int p = 0; p < kAll; p++) Vec::store(out + q * apart + p * Vec::kLanes, sums[q][p]);
}

// e^(x - largest) in place, and the sum of these: 16 next to each other are summed apart.
inline float exponentials(float* x, int64_t count) {
  float largest[kWide], sums[kWide] = {};
  for (int j = 0; j < kWide; j++) largest[j] = x[0];
  int64_t i = 0;
  for (; i + kWide <= count; i += kWide)
    for (int j = 0; j < kWide; j++) largest[j] = x[i + j] > largest[j] ? x[i + j] : largest[j];
  for (int j = 0; i < count; i++, j++) largest[j] = x[i] > largest[j] ? x[i] : largest[j];
  for (int j = 1; j < kWide; j++) largest[0] = largest[j] > largest[0] ? largest[j] : largest[0];
  for (i = 0; i < count; i++) x[i] = exponential(x[i] - largest[0]);
  for (i = 0; i + kWide <= count; i += kWide)
    for (int j = 0; j < kWide; j++) sums[j] += x[i + j];
  for (int j = 0; i < count; i++, j++) sums[j] += x[i];
  for (int half = kWide / 2; half > 0; half /= 2)
    for (int j = 0; j < half; j++) sums[j] += sums[j + half];
  return sums[0];
}

inline void scale_and_bias(const Attention& a, int64_t head, int64_t begin, int64_t position, float* scores,
                           int64_t count) {
  for (int64_t t = 0; t < count; t++) scores[t] *= a.scale;
  if (a.bias == nullptr) return;
  for (int64_t t = 0; t < count; t++) {
    const int64_t distance = position - (begin + t);
    scores[t] += a.bias[(distance < a.reach ? distance : a.reach) * a.heads + head];
  }
}

// Q heads from `head` on, which share the keys of `kv_head`.
template <int Q>
inline void attend_heads(const Attention& a, const Place& place, int64_t head, int64_t kv_head, float* room) {
  const int64_t size = a.size, end = place.position + 1, begin = a.window && end > a.window ? end - a.window : 0;
  const int64_t count = end - begin, stride = a.capacity;
  const int64_t at = ((place.sequence * a.kv_heads + kv_head) * a.capacity + begin) * size;
  float *queries = room, *scores = room + kSharing * size;
  const float* input = a.input + place.row * a.width + head * size;
  std::memcpy(queries, input, static_cast<size_t>(Q * size) * sizeof(float));
  for (int q = 0; q < Q; q++) norm_and_turn(a, a.query_norm, place.position, queries + q * size);
  dots<Q>(queries, a.key + at, size, count, scores, stride);
  float sums[Q];
  for (int q = 0; q < Q; q++) {
    scale_and_bias(a, head + q, begin, place.position, scores + q * stride, count);
    sums[q] = exponentials(scores + q * stride, count);
  }
  float* y = a.y + (place.row * a.heads + head) * size;
  // As many sums as there are registers for.
  constexpr int kWideSums = Vec::kLanes == 16 || Q == 1 ? 4 : 1;
  int64_t from = 0;
  for (; from + kWideSums * kWide <= size; from += kWideSums * kWide)
    weigh<Q, kWideSums>(scores, stride, a.value + at + from, size, count, y + from, size);
  for (; from < size; from += kWide) weigh<Q, 1>(scores, stride, a.value + at + from, size, count, y + from, size);
  for (int q = 0; q < Q; q++)
    for (int64_t i = 0; i < size; i++) y[q * size + i] /= sums[q];
}

// All heads of a group, for one row. `room` is of attention_room.
inline void attend(const Attention& a, const Place& place, int64_t kv_head, float* room) {
  const int64_t group = a.heads / a.kv_heads, first = kv_head * group;
  if (place.position < 0) {  // there is nothing to attend to
    float* y = a.y + (place.row * a.heads + first) * a.size;
    std::memset(y, 0, static_cast<size_t>(group * a.size) * sizeof(float));
    return;
  }
  for (int64_t g = 0; g < group; g += kSharing) {
    const int64_t left = group - g;
    if (left >= 4)
      attend_heads<4>(a, place, first + g, kv_head, room);
    else if (left == 3)
      attend_heads<3>(a, place, first + g, kv_head, room);
    else if (left == 2)
      attend_heads<2>(a, place, first + g, kv_head, room);
    else
      attend_heads<1>(a, place, first + g, kv_head, room);
  }
}

}  // namespace
}  // namespace freeexport
