// Norms before a product and activations after it, with the `Vec` of the including file. See
// tiles.h.
#pragma once

#include <cstring>

#include "packed_linear.h"

namespace freeexport {
namespace {

// Computes 16 neighboring sums, then their total. The order is the same for every width of
// registers.
template <typename Term>
inline float sum_of(const float* x, int64_t count, const Term& term) {
  float sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int j = 0; j < 16; j++) sums[j] += term(x[i + j]);
  for (int j = 0; i < count; i++, j++) sums[j] += term(x[i]);
  for (int half = 8; half > 0; half /= 2)
    for (int j = 0; j < half; j++) sums[j] += sums[j + half];
  return sums[0];
}

inline float sum_of_squares(const float* x, int64_t count) {
  return sum_of(x, count, [](float value) { return value * value; });
}

inline float root(float value) { return __builtin_sqrtf(value); }

// e^x, with a relative error of about 1e-7: 2^n times a polynomial (from Cephes), with the same
// operations on every instruction set. x is limited to -87..88.
inline Vec::Float exponential(Vec::Float x) {
  const auto both = [](Vec::Float a, Vec::Float b, float c) {
    return Vec::add_product(a, b, Vec::set(c));
  };
  x = Vec::smaller(Vec::set(88.0f), Vec::larger(Vec::set(-87.0f), x));  // NaN stays NaN
  const Vec::Float rounded = both(x, Vec::set(1.44269504088896341f), 12582912.0f);
  const Vec::Float n = Vec::minus(rounded, Vec::set(12582912.0f));
  const Vec::Float near = Vec::add_product(n, Vec::set(-0.693359375f), x);
  const Vec::Float r = Vec::add_product(n, Vec::set(2.12194440e-4f), near);
  Vec::Float p = both(Vec::set(1.9875691500e-4f), r, 1.3981999507e-3f);
  p = both(p, r, 8.3334519073e-3f);
  p = both(p, r, 4.1665795894e-2f);
  p = both(p, r, 1.6666665459e-1f);
  p = both(p, r, 5.0000001201e-1f);
  p = Vec::added(Vec::add_product(p, Vec::times(r, r), r), Vec::set(1.0f));
  return Vec::times_power(p, n, rounded);
}

// Computes e^x in place.
inline void exponentials(float* x, int64_t count) {
  for (; count >= Vec::kLanes; count -= Vec::kLanes, x += Vec::kLanes)
    Vec::store(x, exponential(Vec::floats(x)));
  if (count <= 0) return;
  float rest[Vec::kLanes] = {};
  for (int64_t i = 0; i < count; i++) rest[i] = x[i];
  Vec::store(rest, exponential(Vec::floats(rest)));
  for (int64_t i = 0; i < count; i++) x[i] = rest[i];
}

// Computes x / (1 + e^-inner(x)) in place, kAtOnce values at a time. The result is 0 where the
// power is limited, because the quotient of -1e38, for example, would not be 0.
template <typename Inner>
inline void times_sigmoid(float* x, int64_t count, const Inner& inner) {
  constexpr int64_t kAtOnce = 64;
  float powers[kAtOnce];
  for (int64_t at = 0; at < count; at += kAtOnce, x += kAtOnce) {
    const int64_t size = count - at < kAtOnce ? count - at : kAtOnce;
    for (int64_t i = 0; i < size; i++) powers[i] = -inner(x[i]);
    exponentials(powers, size);
    for (int64_t i = 0; i < size; i++)
      x[i] = powers[i] > 1.6e38f ? 0.0f : x[i] / (1.0f + powers[i]);
  }
}

// Computes x times the cumulative normal distribution at x, in place: erfc(z) = (a t + b t^2 + ...)
// e^(-z^2) with t = 1 / (1 + p z) (Abramowitz and Stegun, 7.1.26), with an error of at most 1.5e-7.
inline void gelu(float* x, int64_t count) {
  constexpr int64_t kAtOnce = 64;
  float powers[kAtOnce];
  for (int64_t at = 0; at < count; at += kAtOnce, x += kAtOnce) {
    const int64_t size = count - at < kAtOnce ? count - at : kAtOnce;
    for (int64_t i = 0; i < size; i++) powers[i] = -0.5f * (x[i] * x[i]);
    exponentials(powers, size);
    for (int64_t i = 0; i < size; i++) {
      const float t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * __builtin_fabsf(x[i]));
      const float p =
          (((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t +
          0.254829592f;
      const float tail = 0.5f * x[i] * (p * t * powers[i]);
      x[i] = x[i] < 0.0f ? tail : x[i] - tail;
    }
  }
}

inline void activate(int activation, float* x, int64_t count) {
  if (activation == kRelu) {
    for (int64_t i = 0; i < count; i++) x[i] = x[i] < 0.0f ? 0.0f : x[i];
  } else if (activation == kSilu) {
    times_sigmoid(x, count, [](float value) { return value; });
  } else if (activation == kGeluTanh) {
    times_sigmoid(x, count, [](float value) {
      return 2.0f * (0.7978845608f * (value + 0.044715f * (value * value * value)));
    });
  } else if (activation == kGelu) {
    gelu(x, count);
  }
}

// Returns the input row of the product: x, the sum, or the norm of either. `normed` [inputs] is
// memory for the norm.
inline const float* normed_row(const Product& product, int64_t row, float* normed) {
  const int64_t inputs = product.weight.inputs;
  const float* x = product.x + row * inputs;
  if (product.skip != nullptr) {
    float* total = product.total + row * inputs;
    for (int64_t i = 0; i < inputs; i++) total[i] = x[i] + product.skip[row * inputs + i];
    x = total;
  }
  if (product.norm == nullptr) return x;
  if (product.keeps_norm) normed = product.total + row * inputs;
  if (product.layer) {
    const float middle =
        sum_of(x, inputs, [](float value) { return value; }) / static_cast<float>(inputs);
    for (int64_t i = 0; i < inputs; i++) normed[i] = x[i] - middle;
    x = normed;
  }
  const float mean = sum_of_squares(x, inputs) / static_cast<float>(inputs);
  const float scale = 1.0f / root(mean + product.epsilon);
  for (int64_t i = 0; i < inputs; i++) normed[i] = (x[i] * scale) * product.norm[i];
  if (product.shift != nullptr)
    for (int64_t i = 0; i < inputs; i++) normed[i] += product.shift[i];
  return normed;
}

}  // namespace
}  // namespace freeexport
