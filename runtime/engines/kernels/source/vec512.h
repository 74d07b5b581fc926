// Operations on 16 outputs in 512-bit registers, except the products of bytes, which differ.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "packed_linear.h"

namespace freeexport {
namespace {

struct Vec512 {
  using Int = __m512i;
  using Float = __m512;
  static constexpr int kLanes = 16;
  static constexpr bool kFetches = false;
  static constexpr bool kWide = false;
  static constexpr int32_t kNothing = kCounter * -32768;

  static Float set(float value) { return _mm512_set1_ps(value); }
  // Sums 16 values by repeatedly adding the upper half to the lower.
  static float fold(const Float (&parts)[1]) {
    const __m256 high = _mm512_extractf32x8_ps(parts[0], 1);
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(parts[0]), high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  // Computes four such sums with the same additions.
  static void fold_four(const Float (&parts)[4][1], float* to) {
    // A blend instead of a second shuffle. Shuffles take twice as long.
    const auto halves_added = [](Float a, Float b) {
      return _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
    };
    const __m512 ab = halves_added(parts[0][0], parts[1][0]);
    const __m512 cd = halves_added(parts[2][0], parts[3][0]);
    const __m512i others =
        _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
    const __m512 four =
        _mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, ab, cd), _mm512_permutex2var_ps(ab, others, cd));
    const __m512 two = _mm512_add_ps(four, _mm512_permute_ps(four, 0x4e));
    const __m512 one = _mm512_add_ps(two, _mm512_permute_ps(two, 0xb1));
    const __m512i firsts = _mm512_castsi128_si512(_mm_setr_epi32(0, 8, 4, 12));
    _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, one)));
  }
  // Loads four values of every fourth row.
  static Float every_fourth(const float* from, int64_t size) {
    __m512 row = _mm512_castps128_ps512(_mm_loadu_ps(from));
    row = _mm512_insertf32x4(row, _mm_loadu_ps(from + 4 * size), 1);
    row = _mm512_insertf32x4(row, _mm_loadu_ps(from + 8 * size), 2);
    return _mm512_insertf32x4(row, _mm_loadu_ps(from + 12 * size), 3);
  }
  static Float every_fourth(const uint16_t* from, int64_t size) {
    const auto four = [&](int64_t row) {
      return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + row * size));
    };
    const __m128i low = _mm_unpacklo_epi64(four(0), four(4));
    const __m128i high = _mm_unpacklo_epi64(four(8), four(12));
    return _mm512_cvtph_ps(_mm256_set_m128i(high, low));
  }
  // Transposes four values of kLanes rows, which are `size` apart, to four rows of `to`, which are
  // `apart`.
  template <typename C>
  static void turn_four(const C* from, int64_t size, float* to, int64_t apart) {
    __m512d pairs[4];
    __m512 rows[4];
    for (int i = 0; i < 4; i++) rows[i] = every_fourth(from + i * size, size);
    for (int i = 0; i < 2; i++) {
      pairs[i] = _mm512_castps_pd(_mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]));
      pairs[2 + i] = _mm512_castps_pd(_mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]));
    }
    for (int i = 0; i < 2; i++) {
      store(to + 2 * i * apart,
            _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[2 * i], pairs[2 * i + 1])));
      store(to + (2 * i + 1) * apart,
            _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[2 * i], pairs[2 * i + 1])));
    }
  }
  // See PlainInputs.
  static int32_t peak_bits(const float* inputs) {
    const __m512i size = all(INT32_MAX);
    const __m512i low = _mm512_and_si512(_mm512_castps_si512(floats(inputs)), size);
    const __m512i high = _mm512_and_si512(_mm512_castps_si512(floats(inputs + 16)), size);
    return _mm512_reduce_max_epi32(_mm512_max_epi32(low, high));
  }
  static void round(const float* inputs, float factor, int8_t* values, int32_t* sums) {
    for (int i = 0; i < 2; i++) {
      const __m128i rounded =
          _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(times(floats(inputs + 16 * i), set(factor))));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(values + 16 * i), rounded);
      const __m128i counted =
          _mm_sad_epu8(_mm_xor_si128(rounded, _mm_set1_epi8(-128)), _mm_setzero_si128());
      sums[i] = _mm_cvtsi128_si32(counted) + _mm_extract_epi32(counted, 2) - 16 * 128;
    }
  }
  static Float zero() { return _mm512_setzero_ps(); }
  static Int all(int32_t value) { return _mm512_set1_epi32(value); }
  static Float floats(const float* from) { return _mm512_loadu_ps(from); }
  // Loads 8 values, followed by zeros.
  static Float eight(const float* from) { return _mm512_zextps256_ps512(_mm256_loadu_ps(from)); }
  static Float eight(const uint16_t* from) {
    return _mm512_zextps256_ps512(
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static Float halves(const uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Float bfloats(const uint16_t* from) {
    const __m512i wide =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static Float bytes(const int8_t* from) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static Float eight(const int8_t* from) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
  // 16-bit integers of 32 bytes, their products with those of `b`, and the products of 8 bytes.
  using Shorts = __m512i;
  static Shorts shorts(const int8_t* from) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Int add_products(Shorts a, const int16_t* b, Int sum) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, _mm512_loadu_si512(b)));
  }
  static Int add_eight(const int8_t* a, const int16_t* b, Int sum) {
    const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(a)));
    const __m128i products =
        _mm_madd_epi16(wide, _mm_loadu_si128(reinterpret_cast<const __m128i*>(b)));
    return _mm512_add_epi32(sum, _mm512_zextsi128_si512(products));
  }
  // Converts four sums of 16 values.
  static void fold_four(const Int (&parts)[4], float* to) {
    __m256i eight[4];
    for (int i = 0; i < 4; i++)
      eight[i] = _mm256_add_epi32(_mm512_castsi512_si256(parts[i]),
                                  _mm512_extracti64x4_epi64(parts[i], 1));
    const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(eight[0], eight[1]),
                                          _mm256_hadd_epi32(eight[2], eight[3]));
    const __m128i sums =
        _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    _mm_storeu_ps(to, _mm_cvtepi32_ps(sums));
  }
  // Adds the products of pairs of 16-bit integers with one pair.
  static Int add_pair(Float pairs, const int16_t* pair, Int sum) {
    int32_t both;
    std::memcpy(&both, pair, sizeof(both));
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_castps_si512(pairs), all(both)));
  }
  static Float converted(Int value) { return _mm512_cvtepi32_ps(value); }
  // Converts 8 values to float16, rounded to nearest, ties to even.
  static void put_halves(uint16_t* to, const float* from) {
    const __m128i halves =
        _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
  }
  static Int widened(const uint8_t* from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  // Pairs 16-bit zero points with -32768, so that one operation computes the start of a sum.
  static Int counted(Int zero) { return _mm512_or_si512(zero, all(INT32_MIN)); }
  static Int start(Int zero, const int16_t* sum) {
    int32_t pair;
    std::memcpy(&pair, sum, 4);
    return _mm512_madd_epi16(zero, all(pair));
  }
  static Int start(Int zero, const Group& group) { return start(zero, &group.minus_sum); }
  struct Scale {
    Float by;
    Float counted;
  };
  static Scale scale(Float by) { return {by, _mm512_mul_ps(by, set(-kCounted))}; }
  static Scale scale(const uint16_t* from) { return scale(halves(from)); }
  static Float scaled(Int sum, const Scale& scale) {
    return _mm512_fnmadd_ps(_mm512_castsi512_ps(sum), scale.by, scale.counted);
  }
  static Float added(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float minus(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float times(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float larger(Float a, Float b) { return _mm512_max_ps(a, b); }  // b if either is NaN
  static Float smaller(Float a, Float b) { return _mm512_min_ps(a, b); }
  static float largest(const Float (&parts)[1]) { return _mm512_reduce_max_ps(parts[0]); }
  // a * 2^n, where `rounded` is 1.5 * 2^23 + n.
  static Float times_power(Float a, Float n, Float) { return _mm512_scalef_ps(a, n); }
  // 2^a, with a relative error of about 3e-6, exactly 1 for 0.
  static Float power_of_two(Float a) {
    const Float r = _mm512_reduce_ps(a, 1);  // distance from the next lower integer
    Float p = add_product(set(1.342669028e-2f), r, set(5.224246456e-2f));
    p = add_product(p, r, set(2.412802093e-1f));
    p = add_product(p, r, set(6.930448443e-1f));
    return _mm512_scalef_ps(add_product(p, r, set(1.0f)), a);
  }
  static Float times(Float a, const int8_t* b) { return _mm512_mul_ps(a, bytes(b)); }
  static Float add_product(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static void store(float* to, Float value) { _mm512_storeu_ps(to, value); }
  static void store_eight(float* to, Float value) {
    _mm256_storeu_ps(to, _mm512_castps512_ps256(value));
  }

  static Int load(const uint8_t* from) { return _mm512_loadu_si512(from); }
  static Int low(Int bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
  static Int high(Int bytes) { return low(_mm512_srli_epi16(bytes, 4)); }
  // Shifts `bits` to the left (right if negative), and sets those in `mask` in `bytes`.
  template <int Shift>
  static Int with_bits(Int bytes, Int bits, int mask) {
    const Int moved = Shift < 0 ? _mm512_srli_epi16(bits, Shift < 0 ? -Shift : 0)
                                : _mm512_slli_epi16(bits, Shift < 0 ? 0 : Shift);
    return _mm512_ternarylogic_epi32(bytes, moved, _mm512_set1_epi8(static_cast<char>(mask)), 0xf8);
  }
  // Converts byte `Byte` of each lane. `Small` bytes are less than 16.
  template <int Byte, bool Small>
  static Float byte(Int lanes) {
    const Int moved = Byte ? _mm512_srli_epi32(lanes, 8 * Byte) : lanes;
    // A permutation reads the lower 4 bits only. Byte 3 is converted, which other execution units
    // do.
    if constexpr (Small && Byte != 3) {
      const Float values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      return _mm512_permutexvar_ps(moved, values);
    }
    return _mm512_cvtepi32_ps(Byte == 3 ? moved : _mm512_and_si512(moved, all(255)));
  }
  static Int quad(const int8_t* a, int index) {
    int32_t four;
    std::memcpy(&four, a + 4 * index, 4);
    return all(four);
  }
};

}  // namespace
}  // namespace freeexport
