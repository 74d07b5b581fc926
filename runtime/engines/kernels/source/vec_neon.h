// Operations on 8 outputs in two NEON registers, except the products of bytes, which differ.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "packed_linear.h"

namespace freeexport {
namespace {

struct VecNeon {
  struct Int {
    int32x4_t low;
    int32x4_t high;
  };
  struct Float {
    float32x4_t low;
    float32x4_t high;
  };
  static constexpr int kLanes = 8;
  static constexpr int kRows = 4;
  static constexpr bool kFetches = false;
  static constexpr bool kWide = false;
  static constexpr int32_t kNothing = 0;

  static Int load(const uint8_t* from) {
    return {vreinterpretq_s32_u8(vld1q_u8(from)), vreinterpretq_s32_u8(vld1q_u8(from + 16))};
  }
  static Int low(Int bytes) {
    const int32x4_t mask = vdupq_n_s32(0x0f0f0f0f);
    return {vandq_s32(bytes.low, mask), vandq_s32(bytes.high, mask)};
  }
  static Int high(Int bytes) {
    return low({vshrq_n_s32(bytes.low, 4), vshrq_n_s32(bytes.high, 4)});
  }
  template <int Shift>
  static Int with_bits(Int bytes, Int bits, int mask) {
    const auto both = [&](int32x4_t one, int32x4_t other) {
      return vreinterpretq_s32_u8(
          with_bits<Shift>(vreinterpretq_u8_s32(one), vreinterpretq_u8_s32(other), mask));
    };
    return {both(bytes.low, bits.low), both(bytes.high, bits.high)};
  }
  // Converts byte `Byte` of each lane.
  template <int Byte, bool Small>
  static Float byte(Int lanes) {
    const auto four = [](int32x4_t lane) {
      uint32x4_t moved = vreinterpretq_u32_s32(lane);
      if constexpr (Byte > 0) moved = vshrq_n_u32(moved, 8 * Byte);
      return vcvtq_f32_u32(vandq_u32(moved, vdupq_n_u32(255)));
    };
    return {four(lanes.low), four(lanes.high)};
  }
  static Float set(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }
  // Sums 16 values by repeatedly adding the upper half to the lower.
  static float fold(const Float (&parts)[2]) {
    const float32x4_t four =
        vaddq_f32(vaddq_f32(parts[0].low, parts[1].low), vaddq_f32(parts[0].high, parts[1].high));
    return vaddv_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
  }
  // Computes four such sums with the same additions.
  static void fold_four(const Float (&parts)[4][2], float* to) {
    const auto two = [&](int a, int b) {  // two partial sums of each
      float64x2_t four[2];
      for (int i = 0; i < 2; i++) {
        const Float(&of)[2] = parts[i == 0 ? a : b];
        four[i] = vreinterpretq_f64_f32(
            vaddq_f32(vaddq_f32(of[0].low, of[1].low), vaddq_f32(of[0].high, of[1].high)));
      }
      return vaddq_f32(vreinterpretq_f32_f64(vtrn1q_f64(four[0], four[1])),
                       vreinterpretq_f32_f64(vtrn2q_f64(four[0], four[1])));
    };
    vst1q_f32(to, vpaddq_f32(two(0, 1), two(2, 3)));
  }
  static float32x4_t four(const float* from) { return vld1q_f32(from); }
  static float32x4_t four(const uint16_t* from) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
  }
  // Transposes four values of kLanes rows, which are `size` apart, to four rows of `to`, which are
  // `apart`.
  template <typename C>
  static void turn_four(const C* from, int64_t size, float* to, int64_t apart) {
    for (int half = 0; half < 2; half++, from += 4 * size, to += 4) {
      float64x2_t pairs[4];
      for (int i = 0; i < 2; i++) {
        const float32x4_t first = four(from + 2 * i * size);
        const float32x4_t second = four(from + (2 * i + 1) * size);
        pairs[i] = vreinterpretq_f64_f32(vzip1q_f32(first, second));
        pairs[2 + i] = vreinterpretq_f64_f32(vzip2q_f32(first, second));
      }
      for (int i = 0; i < 2; i++) {
        vst1q_f32(to + 2 * i * apart,
                  vreinterpretq_f32_f64(vzip1q_f64(pairs[2 * i], pairs[2 * i + 1])));
        vst1q_f32(to + (2 * i + 1) * apart,
                  vreinterpretq_f32_f64(vzip2q_f64(pairs[2 * i], pairs[2 * i + 1])));
      }
    }
  }
  static Float added(Float a, Float b) {
    return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)};
  }
  static Float minus(Float a, Float b) {
    return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)};
  }
  static Float times(Float a, Float b) {
    return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)};
  }
  // b if either is NaN.
  static float32x4_t larger(float32x4_t a, float32x4_t b) {
    return vbslq_f32(vcgtq_f32(a, b), a, b);
  }
  static float32x4_t smaller(float32x4_t a, float32x4_t b) {
    return vbslq_f32(vcltq_f32(a, b), a, b);
  }
  static Float larger(Float a, Float b) { return {larger(a.low, b.low), larger(a.high, b.high)}; }
  static Float smaller(Float a, Float b) {
    return {smaller(a.low, b.low), smaller(a.high, b.high)};
  }
  static float largest(const Float (&parts)[2]) {
    return vmaxvq_f32(
        larger(larger(parts[0].low, parts[1].low), larger(parts[0].high, parts[1].high)));
  }
  // a * 2^n, where `rounded` is 1.5 * 2^23 + n.
  static float32x4_t times_power(float32x4_t a, float32x4_t rounded) {
    const int32x4_t exponent =
        vaddq_s32(vreinterpretq_s32_f32(rounded), vdupq_n_s32(127 - 0x4b400000));
    return vmulq_f32(a, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
  }
  static Float times_power(Float a, Float, Float rounded) {
    return {times_power(a.low, rounded.low), times_power(a.high, rounded.high)};
  }
  static Float zero() { return set(0.0f); }
  static Int all(int32_t value) { return {vdupq_n_s32(value), vdupq_n_s32(value)}; }
  static Float floats(const float* from) { return {vld1q_f32(from), vld1q_f32(from + 4)}; }
  static Float bfloats(const uint16_t* from) {
    const uint16x8_t eight = vld1q_u16(from);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(eight), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(eight, 16))};
  }
  static Float halves(const uint16_t* from) {
    const float16x8_t half = vreinterpretq_f16_u16(vld1q_u16(from));
    return {vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half)};
  }
  static void put_halves(uint16_t* to, const float* from) {
    const float16x8_t halves =
        vcvt_high_f16_f32(vcvt_f16_f32(vld1q_f32(from)), vld1q_f32(from + 4));
    vst1q_u16(to, vreinterpretq_u16_f16(halves));
  }
  static Float bytes(const int8_t* from) {
    const int16x8_t wide = vmovl_s8(vld1_s8(from));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide))};
  }
  // 16-bit integers of 16 bytes, their products with those of `b`, and the products of 8 bytes.
  using Shorts = Int;
  static Shorts shorts(const int8_t* from) {
    const int8x16_t all = vld1q_s8(from);
    return {vreinterpretq_s32_s16(vmovl_s8(vget_low_s8(all))),
            vreinterpretq_s32_s16(vmovl_high_s8(all))};
  }
  static Int add_products(Shorts a, const int16_t* b, Int sum) {
    return add_shorts(vreinterpretq_s16_s32(a.high), b + 8,
                      add_shorts(vreinterpretq_s16_s32(a.low), b, sum));
  }
  static Int add_eight(const int8_t* a, const int16_t* b, Int sum) {
    return add_shorts(vmovl_s8(vld1_s8(a)), b, sum);
  }
  static Int add_shorts(int16x8_t a, const int16_t* b, Int sum) {
    const int16x8_t other = vld1q_s16(b);
    return {vmlal_s16(sum.low, vget_low_s16(a), vget_low_s16(other)),
            vmlal_high_s16(sum.high, a, other)};
  }
  // Converts four sums of 8 values.
  static void fold_four(const Int (&parts)[4], float* to) {
    const auto four = [&](int i) { return vaddq_s32(parts[i].low, parts[i].high); };
    const int32x4_t sums = vpaddq_s32(vpaddq_s32(four(0), four(1)), vpaddq_s32(four(2), four(3)));
    vst1q_f32(to, vcvtq_f32_s32(sums));
  }
  // Adds the products of pairs of 16-bit integers with one pair.
  static Int add_pair(Float pairs, const int16_t* pair, Int sum) {
    int32_t both;
    std::memcpy(&both, pair, sizeof(both));
    const int16x8_t other = vreinterpretq_s16_s32(vdupq_n_s32(both));
    const auto added = [&](float32x4_t four, int32x4_t to) {
      const int16x8_t shorts = vreinterpretq_s16_f32(four);
      const int32x4_t low = vmull_s16(vget_low_s16(shorts), vget_low_s16(other));
      return vaddq_s32(to, vpaddq_s32(low, vmull_high_s16(shorts, other)));
    };
    return {added(pairs.low, sum.low), added(pairs.high, sum.high)};
  }
  static Float converted(Int value) {
    return {vcvtq_f32_s32(value.low), vcvtq_f32_s32(value.high)};
  }
  static Int widened(const uint8_t* from) {
    const uint16x8_t wide = vmovl_u8(vld1_u8(from));
    return {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide))),
            vreinterpretq_s32_u32(vmovl_high_u16(wide))};
  }
  static Int counted(Int zero) { return zero; }
  static Int start(Int zero, const int16_t* sum) {
    return {vmulq_n_s32(zero.low, *sum), vmulq_n_s32(zero.high, *sum)};
  }
  static Int start(Int zero, const Group& group) { return start(zero, &group.minus_sum); }
  using Scale = Float;
  static Scale scale(Float by) {  // NaN if infinite, as with kCounter
    return {vaddq_f32(by.low, vsubq_f32(by.low, by.low)),
            vaddq_f32(by.high, vsubq_f32(by.high, by.high))};
  }
  static Scale scale(const uint16_t* from) { return scale(halves(from)); }
  static Float times(Float a, const int8_t* b) { return times(a, bytes(b)); }
  // Shifts `bits` to the left (right if negative), and sets those in `mask` in `bytes`.
  template <int Shift>
  static uint8x16_t with_bits(uint8x16_t bytes, uint8x16_t bits, int mask) {
    if constexpr (Shift < 0)
      bits = vshrq_n_u8(bits, -Shift);
    else
      bits = vshlq_n_u8(bits, Shift);
    return vorrq_u8(bytes, vandq_u8(bits, vdupq_n_u8(static_cast<uint8_t>(mask))));
  }
  static Float scaled(Int sum, const Scale& by) {
    return {vmulq_f32(vcvtq_f32_s32(sum.low), by.low), vmulq_f32(vcvtq_f32_s32(sum.high), by.high)};
  }
  static Float add_product(Float a, Float b, Float c) {
    return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
  }
  static void store(float* to, Float value) {
    vst1q_f32(to, value.low);
    vst1q_f32(to + 4, value.high);
  }
};

// The 8 quads of a group for 8 outputs, which `V::dot_quad<i>` multiplies with inputs 4i to 4i + 3
// in lane i of a register. `V::kFlip` converts 8-bit weights for it.
template <typename V, int Bits>
struct NeonQuads {
  uint8x16_t low[8];
  uint8x16_t high[8];

  explicit NeonQuads(const uint8_t* data) {
    for (int j = 0; j < (Bits == 8 ? 8 : 4); j++) {
      const uint8x16_t first = vld1q_u8(data + 64 * j);
      const uint8x16_t second = vld1q_u8(data + 64 * j + 16);
      if constexpr (Bits < 8) {
        low[2 * j] = vandq_u8(first, vdupq_n_u8(15));
        high[2 * j] = vandq_u8(second, vdupq_n_u8(15));
        low[2 * j + 1] = vshrq_n_u8(first, 4);
        high[2 * j + 1] = vshrq_n_u8(second, 4);
      } else {
        low[j] = veorq_u8(first, vdupq_n_u8(V::kFlip));
        high[j] = veorq_u8(second, vdupq_n_u8(V::kFlip));
      }
    }
    if constexpr (Bits == 5 || Bits == 6)
      each_quad([&](auto quad) {
        using At = Plane<Bits, quad>;
        low[quad] =
            V::template with_bits<At::kShift>(low[quad], vld1q_u8(data + At::kByte), At::kMask);
        high[quad] = V::template with_bits<At::kShift>(high[quad], vld1q_u8(data + At::kByte + 16),
                                                       At::kMask);
      });
  }

  // Returns `start` plus the products of part `Part` of `Parts` of the group.
  template <int Part, int Parts>
  typename V::Int dot_part(const int8_t* a, typename V::Int start) const {
    if constexpr (Parts == 1) return dot(a, start);
    const int8x16_t four = vld1q_s8(a + 16 * Part);
    typename V::Int odd = V::all(0);
    add<4 * Part>(four, start);
    add<4 * Part + 1>(four, odd);
    add<4 * Part + 2>(four, start);
    add<4 * Part + 3>(four, odd);
    return {vaddq_s32(start.low, odd.low), vaddq_s32(start.high, odd.high)};
  }

  typename V::Int dot(const int8_t* a, typename V::Int start) const {
    const int8x16_t first = vld1q_s8(a);
    const int8x16_t second = vld1q_s8(a + 16);
    if constexpr (Bits == 8) start = V::unflipped(first, second, start);
    typename V::Int odd = V::all(0);
    add<0>(first, start);
    add<1>(first, odd);
    add<2>(first, start);
    add<3>(first, odd);
    add<4>(second, start);
    add<5>(second, odd);
    add<6>(second, start);
    add<7>(second, odd);
    return {vaddq_s32(start.low, odd.low), vaddq_s32(start.high, odd.high)};
  }

 private:
  template <int Quad>
  void add(int8x16_t a, typename V::Int& sum) const {
    sum.low = V::template dot_quad<Quad % 4>(sum.low, low[Quad], a);
    sum.high = V::template dot_quad<Quad % 4>(sum.high, high[Quad], a);
  }
};

}  // namespace
}  // namespace freeexport
