// Tiles of many rows with weights in 8 bits, which are first unpacked to 16 bits. Products of pairs
// then add up in 32 bits without being split into halves. Sums are exact, so the bits are those of
// the other tiles. Part of tiles.h.

constexpr int64_t kWideGroups = 32;  // unpacked at a time: 32 KB, and whole blocks of scales
constexpr int64_t kGroupValues = int64_t{kGroup} * kPanel;

// Adds the products of `count` groups to the sums of Vec::kRows rows. `factors` are at the first.
// Prefetches as many groups from `next` on, unless it is null.
template <typename V, From Where>
inline void wide_tile(const Group* rows, const int16_t* wide, Factors<8, Where> (&factors)[2],
                      const int16_t* weights, const uint8_t* next, int64_t count,
                      typename V::Float (&sums)[2][V::kRows]) {
  constexpr int kRows = V::kRows;
  for (int64_t g = 0; g < count;
       g++, rows += kRows, wide += kRows * kGroup, weights += kGroupValues) {
    for (int64_t at = 0; next && at < kGroupValues; at += 64)
      __builtin_prefetch(next + g * kGroupValues + at, 0, 2);
    typename V::Int dots[2][kRows];
#pragma GCC unroll 2
    for (int w = 0; w < 2; w++) {
      factors[w].next(false);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; m++) dots[w][m] = factors[w].start(rows[m]);
    }
    V::add_wide_products(wide, weights, dots);
#pragma GCC unroll 2
    for (int w = 0; w < 2; w++)
#pragma GCC unroll 8
      for (int m = 0; m < kRows; m++)
        sums[w][m] = factors[w].added(dots[w][m], rows[m], sums[w][m]);
  }
}

// Multiplies whole tiles of rows first..last with the outputs of a panel.
template <typename V, From Where>
inline void wide_panel(const Group* rows, const int16_t* wide, int64_t first, int64_t last,
                       const Weight& weight, int64_t panel, float* y, int64_t stride) {
  constexpr int64_t kRows = V::kRows;
  const int64_t groups = weight.groups();
  alignas(64) int16_t unpacked[kWideGroups * kGroupValues];
  typename V::Float sums[kTaskRows / kRows][2][kRows];
  for (int64_t tile = 0; tile < (last - first) / kRows; tile++)
    for (int m = 0; m < kRows; m++) sums[tile][0][m] = sums[tile][1][m] = V::zero();
  for (int64_t g = 0; g < groups; g += kWideGroups) {
    const int64_t count = least(kWideGroups, groups - g);
    const uint8_t* data = weight.data + (panel * groups + g) * kGroupValues;
    V::widen(data, count, unpacked);
    for (int64_t m = first; m < last; m += kRows) {
      Factors<8, Where> factors[2];
      for (int w = 0; w < 2; w++)
        factors[w].begin(weight, panel, w * V::kLanes, g * kGroup / weight.block);
      const int64_t at = m * groups + g * kRows;
      const uint8_t* next = m == first ? data + count * kGroupValues : nullptr;
      wide_tile<V>(rows + at, wide + at * kGroup, factors, unpacked, next, count,
                   sums[(m - first) / kRows]);
    }
  }
  for (int64_t m = first; m < last; m += kRows)
    for (int w = 0; w < 2; w++)
      put(sums[(m - first) / kRows][w], weight, panel * kPanel + w * V::kLanes,
          y + ((m - first) >> weight.pairs) * stride + w * V::kLanes, stride, weight.pairs);
}

// Multiplies whole tiles with the outputs of a panel if that is faster. Returns the first row that
// is left. `V` is Vec, but for most instruction sets without these operations.
template <typename V>
inline int64_t wide_rows(const Group* rows, const int16_t* wide, int64_t first, int64_t last,
                         const Weight& weight, int64_t panel, float* y, int64_t stride) {
  if constexpr (V::kWide) {
    if (weight.bits == 8 && last - first >= kManyRows && kWideGroups * kGroup % weight.block == 0) {
      last = first + (last - first) / V::kRows * V::kRows;
      const auto panel_of =
          weight.zeros ? wide_panel<V, From::kZero> : wide_panel<V, From::kMiddle>;
      panel_of(rows, wide, first, last, weight, panel, y, stride);
      return last;
    }
  }
  return first;
}
