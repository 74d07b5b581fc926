// Byte products of a group, with dot products in 32 bits (VNNI) or without.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "packed_linear.h"

namespace freeexport {
namespace {

// Operations on 32 inputs without special instructions.
struct PlainInputs {
  // Returns the bits of the largest magnitude. Without the sign, bits have the order of values, NaN
  // last.
  static FREEEXPORT_INLINE int32_t peak_bits(const float* inputs) {
    int32_t bits[kGroup];
    int32_t peak = 0;
    std::memcpy(bits, inputs, sizeof(bits));
    for (int i = 0; i < kGroup; i++) {
      const int32_t magnitude = bits[i] & 0x7fffffff;
      peak = magnitude > peak ? magnitude : peak;
    }
    return peak;
  }
  // Multiplies inputs with `factor`, to at most 127, and rounds them to nearest, ties to even. Also
  // returns the sums of the first and the last 16.
  static FREEEXPORT_INLINE void round(const float* inputs, float factor, int8_t* values,
                                      int32_t* sums) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds
    int32_t rounded[kGroup];
    for (int i = 0; i < kGroup; i++)
      rounded[i] = static_cast<int32_t>((inputs[i] * factor + kRound) - kRound);
    for (int i = 0; i < kGroup; i++) values[i] = static_cast<int8_t>(rounded[i]);
    sums[0] = sums[1] = 0;
    for (int i = 0; i < kGroup / 2; i++) sums[0] += rounded[i], sums[1] += rounded[kGroup / 2 + i];
  }
};

// Location of the upper bits, beyond four, of a quad's weights: offset in the group's bytes, shift
// to the left, and mask after the shift.
template <int Bits, int Quad>
struct Plane {
  static constexpr int kEach = Bits - 4;
  static constexpr int kPerByte = kEach > 0 ? 8 / kEach : 8;
  static constexpr int kByte = 256 + 64 * (Quad / kPerByte);
  static constexpr int kShift = 4 - kEach * (Quad % kPerByte);
  static constexpr int kMask = ((1 << kEach) - 1) << 4;
};

template <int First = 0, int Last = 8, typename Do>
FREEEXPORT_INLINE void each_quad(const Do& apply) {
  if constexpr (First < Last) {
    apply(std::integral_constant<int, First>{});
    each_quad<First + 1, Last>(apply);
  }
}

// `multiply` passes the product of a group, of row `m` with register `w` of V::kLanes outputs, to
// `take(m, w, dot)`. It begins with `start(m, w)`. There are M rows and `Wide` registers, whose
// bytes are `apart`. `kWide<M>` is the best number of registers.

// Multiplies row by row. `Quads` reads the weights once for all rows.
template <typename Quads>
struct RowByRow {
  template <int M>
  static constexpr int kWide = 1;

  template <int M, int Wide, typename Start, typename Take>
  static FREEEXPORT_INLINE void multiply(const uint8_t* data, int64_t, const Group* rows,
                                         const Start& start, const Take& take) {
    const Quads quads(data);
#pragma GCC unroll 8  // otherwise sums of many rows are kept in memory
    for (int m = 0; m < M; m++) take(m, 0, quads.dot(rows[m].values, start(m, 0)));
  }
};

// Returns inputs 4 Quad to 4 Quad + 3 of each output.
template <typename V, int Bits, int Quad>
FREEEXPORT_INLINE typename V::Int quad_of(const uint8_t* data) {
  if constexpr (Bits == 8) return V::load(data + 64 * Quad);
  const typename V::Int bytes = V::load(data + 64 * (Quad / 2));
  const typename V::Int four = Quad % 2 ? V::high(bytes) : V::low(bytes);
  using At = Plane<Bits, Quad>;
  if constexpr (Bits > 4)
    return V::template with_bits<At::kShift>(four, V::load(data + At::kByte), At::kMask);
  return four;
}

template <typename V, int Bits>
struct VnniQuads {
  typename V::Int quads[8];
  explicit VnniQuads(const uint8_t* data) {
    each_quad([&](auto quad) { quads[quad] = quad_of<V, Bits, quad>(data); });
  }
  // Returns `start` plus the products of part `Part` of `Parts` of the group.
  template <int Part, int Parts>
  typename V::Int dot_part(const int8_t* a, typename V::Int start) const {
    typename V::Int even = start, odd = V::all(0);
    for (int j = Part * 8 / Parts; j < (Part + 1) * 8 / Parts; j += 2) {
      even = V::dot_quad(even, quads[j], V::quad(a, j));
      odd = V::dot_quad(odd, quads[j + 1], V::quad(a, j + 1));
    }
    return V::sum(even, odd);
  }
  typename V::Int dot(const int8_t* a, typename V::Int start) const {
    typename V::Int even = start, odd = V::all(0);
    for (int j = 0; j < 8; j += 2) {
      even = V::dot_quad(even, quads[j], V::quad(a, j));
      odd = V::dot_quad(odd, quads[j + 1], V::quad(a, j + 1));
    }
    return V::sum(even, odd);
  }
};

// Multiplies two panels at a time, quad by quad. A quad of a row is read once for both, and sums
// stay in registers.
template <typename V, int Bits>
struct TwoPanels {
  template <int M>
  static constexpr int kWide = M > 1 ? 2 : 1;

  template <int M, int Wide, typename Start, typename Take>
  static FREEEXPORT_INLINE void multiply(const uint8_t* data, int64_t apart, const Group* rows,
                                         const Start& start, const Take& take) {
    if constexpr (Wide == 1) {
      RowByRow<VnniQuads<V, Bits>>::template multiply<M, 1>(data, apart, rows, start, take);
    } else {
      typename V::Int dots[M][Wide];
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int w = 0; w < Wide; w++) dots[m][w] = start(m, w);
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) {
        typename V::Int quads[Wide];
#pragma GCC unroll 2
        for (int w = 0; w < Wide; w++) {
          const typename V::Int bytes =
              V::load(data + (Bits == 8 ? 64 * j : 64 * (j / 2)) + apart * w);
          quads[w] = Bits == 8 ? bytes : j % 2 == 0 ? V::low(bytes) : V::high(bytes);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          const typename V::Int a = V::quad(rows[m].values, j);
#pragma GCC unroll 2
          for (int w = 0; w < Wide; w++) dots[m][w] = V::dot_quad(dots[m][w], quads[w], a);
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int w = 0; w < Wide; w++) take(m, w, dots[m][w]);
    }
  }
};

// Adds products in 16 bits, for weights in 4 to 6 bits that are unpacked once for all rows.
// Products of four quads of 5 bits fit in 16 bits, or of two quads of 6 bits.
template <typename V, int Bits>
struct PairGroup : VnniQuads<V, Bits> {
  using VnniQuads<V, Bits>::VnniQuads;

  template <int Part, int Parts>
  typename V::Int dot_part(const int8_t* a, typename V::Int dot) const {
    constexpr int kFull = Bits == 4 ? 8 : Bits == 5 ? 4 : 2;
    constexpr int kCount = 8 / Parts;
    each_quad<0, kCount / (kFull < kCount ? kFull : kCount)>([&](auto piece) {
      constexpr int kFirst = Part * kCount + piece * kFull;
      constexpr int kLast = kFirst + (kFull < kCount ? kFull : kCount);
      typename V::Int sum = V::pairs(this->quads[kFirst], V::quad(a, kFirst));
#pragma GCC unroll 8
      for (int j = kFirst + 1; j < kLast; j++)
        sum = V::sum_pairs(sum, V::pairs(this->quads[j], V::quad(a, j)));
      dot = V::sum(dot, V::widen_pairs(sum, 1));
    });
    return dot;
  }
};

}  // namespace
}  // namespace freeexport
