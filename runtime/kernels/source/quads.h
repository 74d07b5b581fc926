// Products of bytes of a group, with dot products in 32 bits (VNNI) or without.
#pragma once

#include <cstdint>

namespace freeexport {
namespace {

// The 8 quads of a group, for V::kLanes outputs: `quads[i]` has inputs 4i to 4i + 3 of each.
template <typename V, int Bits>
struct Unpacked {
  typename V::Int quads[8];
  explicit Unpacked(const uint8_t* data) {
    for (int j = 0; j < Bits; j++) {
      const typename V::Int bytes = V::load(data + 64 * j);
      if constexpr (Bits == 4) {
        quads[2 * j] = V::low(bytes);
        quads[2 * j + 1] = V::high(bytes);
      } else {
        quads[j] = bytes;
      }
    }
  }
};

template <typename V, int Bits>
struct VnniQuads : Unpacked<V, Bits> {
  using Unpacked<V, Bits>::Unpacked;
  typename V::Int dot(const int8_t* a, typename V::Int start) const {
    typename V::Int even = start, odd = V::all(0);
    for (int j = 0; j < 8; j += 2) {
      even = V::dot_quad(even, this->quads[j], V::quad(a, j));
      odd = V::dot_quad(odd, this->quads[j + 1], V::quad(a, j + 1));
    }
    return V::sum(even, odd);
  }
};

// Pairs of products are added in 16 bits. Of 4 bits times 8 (15 * 127) 17 fit there, and a group has 16 of a lane; 8
// bits are taken as two times 4.
template <typename V, int Bits>
struct PairQuads : Unpacked<V, Bits> {
  using Unpacked<V, Bits>::Unpacked;
  typename V::Int dot(const int8_t* a, typename V::Int start) const {
    typename V::Int low = V::all(0), high = V::all(0);
    for (int j = 0; j < 8; j++) {
      const typename V::Int quad = V::quad(a, j);
      if constexpr (Bits == 4) {
        low = V::sum_pairs(low, V::pairs(this->quads[j], quad));
      } else {
        low = V::sum_pairs(low, V::pairs(V::low(this->quads[j]), quad));
        high = V::sum_pairs(high, V::pairs(V::high(this->quads[j]), quad));
      }
    }
    typename V::Int dot = V::sum(start, V::widen_pairs(low, 1));
    return Bits == 4 ? dot : V::sum(dot, V::widen_pairs(high, 16));
  }
};

}  // namespace
}  // namespace freeexport
