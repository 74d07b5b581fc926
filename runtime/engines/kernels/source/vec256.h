// Operations on 8 outputs in 256-bit registers, except the products of bytes, which differ.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "packed_linear.h"

namespace freeexport {
namespace {

struct Vec256 {
  using Int = __m256i;
  using Float = __m256;
  static constexpr int kLanes = 8;
  static constexpr bool kFetches = false;
  static constexpr bool kWide = false;
  static constexpr int32_t kNothing = kCounter * -32768;

  static Float set(float value) { return _mm256_set1_ps(value); }
  // Sums 16 values by repeatedly adding the upper half to the lower.
  static float fold(const Float (&parts)[2]) {
    const __m256 eight = _mm256_add_ps(parts[0], parts[1]);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  // Computes four such sums with the same additions.
  static void fold_four(const Float (&parts)[4][2], float* to) {
    const auto halves_added = [&](int a, int b) {
      const __m256 first = _mm256_add_ps(parts[a][0], parts[a][1]);
      const __m256 second = _mm256_add_ps(parts[b][0], parts[b][1]);
      return _mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20),
                           _mm256_permute2f128_ps(first, second, 0x31));
    };
    const __m256d ac = _mm256_castps_pd(halves_added(0, 2));
    const __m256d bd = _mm256_castps_pd(halves_added(1, 3));
    const __m256 two = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ac, bd)),
                                     _mm256_castpd_ps(_mm256_unpackhi_pd(ac, bd)));
    const __m128 ab = _mm256_castps256_ps128(two);
    const __m128 cd = _mm256_extractf128_ps(two, 1);
    _mm_storeu_ps(to, _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd)));
  }
  // Loads four values of every fourth row.
  static Float every_fourth(const float* from, int64_t size) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from)),
                                _mm_loadu_ps(from + 4 * size), 1);
  }
  static Float every_fourth(const uint16_t* from, int64_t size) {
    const auto four = [](const uint16_t* row) {
      return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row));
    };
    return _mm256_cvtph_ps(_mm_unpacklo_epi64(four(from), four(from + 4 * size)));
  }
  // Transposes four values of kLanes rows, which are `size` apart, to four rows of `to`, which are
  // `apart`.
  template <typename C>
  static void turn_four(const C* from, int64_t size, float* to, int64_t apart) {
    __m256d pairs[4];
    __m256 rows[4];
    for (int i = 0; i < 4; i++) rows[i] = every_fourth(from + i * size, size);
    for (int i = 0; i < 2; i++) {
      pairs[i] = _mm256_castps_pd(_mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]));
      pairs[2 + i] = _mm256_castps_pd(_mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]));
    }
    for (int i = 0; i < 2; i++) {
      store(to + 2 * i * apart,
            _mm256_castpd_ps(_mm256_unpacklo_pd(pairs[2 * i], pairs[2 * i + 1])));
      store(to + (2 * i + 1) * apart,
            _mm256_castpd_ps(_mm256_unpackhi_pd(pairs[2 * i], pairs[2 * i + 1])));
    }
  }
  // See PlainInputs.
  static int32_t peak_bits(const float* inputs) {
    __m256i most = all(0);
    for (int i = 0; i < kGroup; i += 8)
      most = _mm256_max_epi32(
          most, _mm256_and_si256(_mm256_castps_si256(floats(inputs + i)), all(INT32_MAX)));
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
  }
  static void round(const float* inputs, float factor, int8_t* values, int32_t* sums) {
    for (int i = 0; i < 2; i++) {
      const auto eight = [&](int from) {
        return _mm256_cvtps_epi32(times(floats(inputs + 16 * i + from), set(factor)));
      };
      const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32(eight(0), eight(8)), 0xd8);
      const __m128i rounded =
          _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(values + 16 * i), rounded);
      const __m128i counted =
          _mm_sad_epu8(_mm_xor_si128(rounded, _mm_set1_epi8(-128)), _mm_setzero_si128());
      sums[i] = _mm_cvtsi128_si32(counted) + _mm_extract_epi32(counted, 2) - 16 * 128;
    }
  }
  static Float zero() { return _mm256_setzero_ps(); }
  static Int all(int32_t value) { return _mm256_set1_epi32(value); }
  static Float floats(const float* from) { return _mm256_loadu_ps(from); }
  static Float bfloats(const uint16_t* from) {
    const __m256i wide =
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static Float halves(const uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Float bytes(const int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight(from)));
  }
  // 16-bit integers of 16 bytes, their products with those of `b`, and the products of 8 bytes.
  using Shorts = __m256i;
  static Shorts shorts(const int8_t* from) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Int add_products(Shorts a, const int16_t* b, Int sum) {
    return _mm256_add_epi32(
        sum, _mm256_madd_epi16(a, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b))));
  }
  static Int add_eight(const int8_t* a, const int16_t* b, Int sum) {
    const __m128i products = _mm_madd_epi16(_mm_cvtepi8_epi16(eight(a)),
                                            _mm_loadu_si128(reinterpret_cast<const __m128i*>(b)));
    return _mm256_add_epi32(sum, _mm256_zextsi128_si256(products));
  }
  // Converts four sums of 8 values.
  static void fold_four(const Int (&parts)[4], float* to) {
    const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(parts[0], parts[1]),
                                          _mm256_hadd_epi32(parts[2], parts[3]));
    const __m128i sums =
        _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    _mm_storeu_ps(to, _mm_cvtepi32_ps(sums));
  }
  // Adds the products of pairs of 16-bit integers with one pair.
  static Int add_pair(Float pairs, const int16_t* pair, Int sum) {
    int32_t both;
    std::memcpy(&both, pair, sizeof(both));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_castps_si256(pairs), all(both)));
  }
  static Float converted(Int value) { return _mm256_cvtepi32_ps(value); }
  // Converts 8 values to float16, rounded to nearest, ties to even.
  static void put_halves(uint16_t* to, const float* from) {
    const __m128i halves =
        _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
  }
  static Int widened(const uint8_t* from) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  }
  // Pairs 16-bit zero points with -32768, so that one operation computes the start of a sum.
  static Int counted(Int zero) { return _mm256_or_si256(zero, all(INT32_MIN)); }
  static Int start(Int zero, const int16_t* sum) {
    int32_t pair;
    std::memcpy(&pair, sum, 4);
    return _mm256_madd_epi16(zero, all(pair));
  }
  static Int start(Int zero, const Group& group) { return start(zero, &group.minus_sum); }
  struct Scale {
    Float by;
    Float counted;
  };
  static Scale scale(Float by) { return {by, _mm256_mul_ps(by, set(-kCounted))}; }
  static Scale scale(const uint16_t* from) { return scale(halves(from)); }
  static Float scaled(Int sum, const Scale& scale) {
    return _mm256_fnmadd_ps(_mm256_castsi256_ps(sum), scale.by, scale.counted);
  }
  static Float added(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float minus(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float times(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float larger(Float a, Float b) { return _mm256_max_ps(a, b); }  // b if either is NaN
  static Float smaller(Float a, Float b) { return _mm256_min_ps(a, b); }
  static float largest(const Float (&parts)[2]) {
    const __m256 eight = larger(parts[0], parts[1]);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  // a * 2^n, where `rounded` is 1.5 * 2^23 + n.
  static Float times_power(Float a, Float, Float rounded) {
    const __m256i exponent = _mm256_add_epi32(_mm256_castps_si256(rounded), all(127 - 0x4b400000));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static Float times(Float a, const int8_t* b) { return _mm256_mul_ps(a, bytes(b)); }
  static Float add_product(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static void store(float* to, Float value) { _mm256_storeu_ps(to, value); }

  static Int load(const uint8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static Int low(Int bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
  static Int high(Int bytes) { return low(_mm256_srli_epi16(bytes, 4)); }
  // Shifts `bits` to the left (right if negative), and sets those in `mask` in `bytes`.
  template <int Shift>
  static Int with_bits(Int bytes, Int bits, int mask) {
    const Int moved = Shift < 0 ? _mm256_srli_epi16(bits, Shift < 0 ? -Shift : 0)
                                : _mm256_slli_epi16(bits, Shift < 0 ? 0 : Shift);
    return _mm256_or_si256(bytes,
                           _mm256_and_si256(moved, _mm256_set1_epi8(static_cast<char>(mask))));
  }
  // Converts byte `Byte` of each lane.
  template <int Byte, bool Small>
  static Float byte(Int lanes) {
    const Int moved = Byte ? _mm256_srli_epi32(lanes, 8 * Byte) : lanes;
    return _mm256_cvtepi32_ps(Byte == 3 ? moved : _mm256_and_si256(moved, all(255)));
  }
  static Int quad(const int8_t* a, int index) {
    int32_t four;
    std::memcpy(&four, a + 4 * index, 4);
    return all(four);
  }

 private:
  static __m128i eight(const int8_t* from) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  }
};

}  // namespace
}  // namespace freeexport
