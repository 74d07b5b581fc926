// Plain C++ for any processor. Reference for all other kernels.
#include <cmath>
#include <cstring>

#include "packed_linear.h"
#include "quads.h"

namespace freeexport {
namespace {

struct Vec : PlainInputs {
  using Int = int32_t;
  using Float = float;
  static constexpr int kLanes = 1;
  static constexpr int kRows = 2;
  static constexpr bool kFetches = false;
  static constexpr bool kWide = false;
  static constexpr int32_t kNothing = 0;

  static Float set(float value) { return value; }
  static float fold(const Float (&parts)[16]) {
    float sums[16];
    for (int j = 0; j < 16; j++) sums[j] = parts[j];
    for (int half = 8; half > 0; half /= 2)
      for (int j = 0; j < half; j++) sums[j] += sums[j + half];
    return sums[0];
  }
  static void fold_four(const Float (&parts)[4][16], float* to) {
    for (int i = 0; i < 4; i++) to[i] = fold(parts[i]);
  }
  static Float added(Float a, Float b) { return a + b; }
  static Float minus(Float a, Float b) { return a - b; }
  static Float times(Float a, Float b) { return a * b; }
  static Float larger(Float a, Float b) { return a > b ? a : b; }
  static Float smaller(Float a, Float b) { return a < b ? a : b; }
  static float largest(const Float (&parts)[16]) {
    float most = parts[0];
    for (float part : parts) most = larger(part, most);
    return most;
  }
  static Float times_power(Float a, Float n, Float) {
    return a * std::ldexp(1.0f, n == n ? static_cast<int>(n) : 0);
  }
  static Float zero() { return 0.0f; }
  static Int all(int32_t value) { return value; }
  static Float floats(const float* from) { return *from; }
  static Float bfloats(const uint16_t* from) {
    const uint32_t bits = static_cast<uint32_t>(*from) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  static Float halves(const uint16_t* from) {
    const int exponent = *from >> 10 & 31;
    const int fraction = *from & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                       : exponent
                           ? std::ldexp(1024.0f + static_cast<float>(fraction), exponent - 25)
                           : std::ldexp(static_cast<float>(fraction), -24);
    return *from & 0x8000 ? -size : size;
  }
  static void put_halves(uint16_t* to, const float* from) {
    for (int i = 0; i < 8; i++) {
      uint32_t bits;
      std::memcpy(&bits, from + i, sizeof(bits));
      uint32_t size = bits & 0x7fffffff;
      if (size > 0x7f800000)  // NaN
        size = 0x7e00 | (size >> 13 & 0x1ff);
      else if (size >= 0x477ff000)  // rounds to more than 65504
        size = 0x7c00;
      else if (size < 0x38800000)  // below the smallest normal float16
        size = static_cast<uint32_t>(std::nearbyint(std::ldexp(std::fabs(from[i]), 24)));
      else
        size = (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13;
      to[i] = static_cast<uint16_t>((bits >> 16 & 0x8000) | size);
    }
  }
  static Float bytes(const int8_t* from) { return static_cast<float>(*from); }
  using Shorts = const int8_t*;
  static Shorts shorts(const int8_t* from) { return from; }
  static Int add_products(Shorts a, const int16_t* b, Int sum) {
    return sum + a[0] * b[0] + a[1] * b[1];
  }
  // A head has whole pairs.
  static Int add_eight(const int8_t*, const int16_t*, Int sum) { return sum; }
  static void fold_four(const Int (&parts)[4], float* to) {
    for (int i = 0; i < 4; i++) to[i] = static_cast<float>(parts[i]);
  }
  static Float converted(Int value) { return static_cast<float>(value); }
  static Int widened(const uint8_t* from) { return *from; }
  static Int counted(Int zero) { return zero; }
  static Int start(Int zero, const int16_t* sum) { return zero * *sum; }
  static Int start(Int zero, const Group& group) { return start(zero, &group.minus_sum); }
  using Scale = Float;
  static Scale scale(Float by) { return by + (by - by); }  // NaN if infinite, as with kCounter
  static Scale scale(const uint16_t* from) { return scale(halves(from)); }
  static Float times(Float a, const int8_t* b) { return a * bytes(b); }
  static Float scaled(Int sum, Scale by) { return static_cast<float>(sum) * by; }
  static Float add_product(Float a, Float b, Float c) { return std::fma(a, b, c); }
  static void store(float* to, Float value) { *to = value; }
  // Four bytes.
  static Int load(const uint8_t* from) {
    Int four;
    std::memcpy(&four, from, sizeof(four));
    return four;
  }
  static Int low(Int four) { return four & 0x0f0f0f0f; }
  static Int high(Int four) { return low(four >> 4); }
  template <int Shift>
  static Int with_bits(Int four, Int bits, int mask) {
    const auto lanes = static_cast<uint32_t>(bits);
    return four | static_cast<Int>((Shift < 0 ? lanes >> -Shift : lanes << Shift) &
                                   0x01010101u * static_cast<uint32_t>(mask));
  }
  template <int Byte, bool Small>
  static Float byte(Int four) {
    return static_cast<float>(four >> 8 * Byte & 255);
  }
  static void turn_four(const float* from, int64_t, float* to, int64_t apart) {
    for (int i = 0; i < 4; i++) to[i * apart] = from[i];
  }

  template <int Bits>
  struct Output {
    const uint8_t* data;
    explicit Output(const uint8_t* from) : data(from) {}
    Int dot(const int8_t* a, Int sum) const { return dot_part<0, 1>(a, sum); }
    template <int Part, int Parts>
    Int dot_part(const int8_t* a, Int sum) const {
      for (int i = Part * kGroup / Parts; i < (Part + 1) * kGroup / Parts; i++)
        sum += value_of(data, Bits, i) * a[i];
      return sum;
    }
  };
  template <int Bits>
  using Unpacked = Output<Bits>;
  template <int Bits>
  using Quads = RowByRow<Output<Bits>>;
};

}  // namespace
}  // namespace freeexport

#include "tiles.h"

#include "attention_encoder.h"
#include "best_two_tiles.h"
#include "scalar_prompt.h"

namespace freeexport {

const Kernels kScalar = {
    "scalar", [] { return true; }, prepare, panels, prepare_floats, float_panels, store_row, attend,
    nullptr,  attend_encoder,      join,    piece,
};
const Kernels kScalarBf16 = {
    "scalar-bf16",  [] { return true; }, prepare,       panels,
    prepare_floats, float_panels,        store_row,     attend,
    nullptr,        attend_encoder,      join,          piece,
    prepare_prompt, prompt_panels,       attend_prompt, 0,
};

}  // namespace freeexport
