// Products with weights that are not quantized, in float16, bfloat16 or fp32, included by tiles.h.
// Rows and sums are fp32. Products are added in the order of inputs, so the bits of a row depend
// only on the row and the weight.

// Returns the distance of prefetching in bytes. With one row, hardware prefetching alone is 17 %
// faster on Zen 4. From three rows on it no longer keeps up. Not measured on other processors.
template <int M>
inline int64_t floats_ahead() {
  if (Vec::kFetches || kProcessor.intel) return 4096;
  return M > 2 ? 8192 : 0;
}

struct Bfloats {
  using Value = uint16_t;
  static Vec::Float read(const Value* from) { return Vec::bfloats(from); }
};
struct Halves {
  using Value = uint16_t;
  static Vec::Float read(const Value* from) { return Vec::halves(from); }
};
struct Singles {
  using Value = float;
  static Vec::Float read(const Value* from) { return Vec::floats(from); }
};

// Stores a row of a product, after its norm, for `float_panels`.
inline void prepare_floats(const Product& product, int64_t row, float* normed, float* rows) {
  const float* x = normed_row(product, row, normed);
  const int64_t inputs = product.weight.inputs;
  const int64_t padded = product.weight.groups() * kGroup;
  const int64_t tile = row / Vec::kRows * Vec::kRows;
  const int64_t stride = rows_of_tile(tile, product.rows);
  float* to = rows + tile * padded + (row - tile);
  for (int64_t i = 0; i < inputs; i++) to[i * stride] = x[i];
  for (int64_t i = inputs; i < padded; i++) to[i * stride] = 0.0f;
}

// Adds the products of M rows with `Wide` registers of outputs, which are `apart`, to `sums`.
// `data` has kPanel outputs of each input, and is prefetched `ahead` bytes before it is read, in
// both panels if there are two.
template <typename Type, int M, int Wide>
inline void add_floats(const float* rows, const typename Type::Value* data, int64_t inputs,
                       int64_t ahead, Vec::Float (&sums)[Wide][M], int64_t apart = Vec::kLanes) {
  const int64_t panels = apart > kPanel ? Wide : 1;
  for (int64_t i = 0; i < inputs; i += 2) {
    const char* next = reinterpret_cast<const char*>(data) + ahead;
    for (size_t at = 0; at < 2 * kPanel * sizeof(*data) && ahead; at += 64)
      for (int64_t p = 0; p < panels; p++)
        __builtin_prefetch(next + at + p * apart * static_cast<int64_t>(sizeof(*data)));
#pragma GCC unroll 2
    for (int each = 0; each < 2; each++, data += kPanel, rows += M) {
      Vec::Float values[Wide];
#pragma GCC unroll 4
      for (int w = 0; w < Wide; w++) values[w] = Type::read(data + w * apart);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const Vec::Float row = Vec::set(rows[m]);
#pragma GCC unroll 4
        for (int w = 0; w < Wide; w++) sums[w][m] = Vec::add_product(row, values[w], sums[w][m]);
      }
    }
  }
}

template <int M, int Wide>
inline void clear(Vec::Float (&sums)[Wide][M]) {
#pragma GCC unroll 4
  for (int w = 0; w < Wide; w++)
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sums[w][m] = Vec::zero();
}

// Registers of a panel that are multiplied at a time.
constexpr int kFloatsWide = Vec::kLanes * 2 == kPanel ? 2 : 1;

// Stores the sums of M rows with the outputs of a panel from `lane` on.
template <int M>
inline void put_floats(const Vec::Float (&sums)[kFloatsWide][M], const Weight& weight,
                       int64_t panel, int lane, float* y, int64_t stride) {
#pragma GCC unroll 4
  for (int w = 0; w < kFloatsWide; w++) {
    const int from = lane + w * Vec::kLanes;
    put(sums[w], weight, panel * kPanel + from, y + from, stride, 0);
  }
}

// Multiplies M rows with all outputs of a panel.
template <typename Type, int M>
inline void float_panel(const float* rows, const Weight& weight, int64_t panel, float* y,
                        int64_t stride) {
  const int64_t inputs = weight.groups() * kGroup;
  const auto* data =
      reinterpret_cast<const typename Type::Value*>(weight.data) + panel * inputs * kPanel;
  for (int lane = 0; lane < kPanel && panel * kPanel + lane < weight.outputs;
       lane += kFloatsWide * Vec::kLanes) {
    Vec::Float sums[kFloatsWide][M];
    clear(sums);
    // The first outputs of a panel prefetch for all others.
    add_floats<Type>(rows, data + lane, inputs, lane > 0 ? 0 : floats_ahead<M>(), sums);
    put_floats(sums, weight, panel, lane, y, stride);
  }
}

// True if many rows are multiplied with two panels at a time, which must fit a register each. A row
// is then read once for both: with one panel, reading takes longer than multiplying where two
// products start per cycle. On Zen 5, 64 rows take 4 to 15 % less time. Not measured on Intel's
// processors. Zen 4 starts one product.
inline bool multiplies_in_two() {
  return Vec::kLanes == kPanel && (kProcessor.zen5 || kProcessor.intel);
}

// Multiplies Vec::kRows rows with a panel and the next one, whose outputs are `apart` in y.
template <typename Type>
inline void two_float_panels(const float* rows, const Weight& weight, int64_t panel, float* y,
                             int64_t stride, int64_t apart) {
  const int64_t values = weight.groups() * kGroup * kPanel;
  const auto* data = reinterpret_cast<const typename Type::Value*>(weight.data) + panel * values;
  Vec::Float sums[2][Vec::kRows];
  clear(sums);
  add_floats<Type>(rows, data, values / kPanel, floats_ahead<Vec::kRows>(), sums, values);
  for (int w = 0; w < 2; w++) put(sums[w], weight, (panel + w) * kPanel, y + w * apart, stride, 0);
}

using FloatTile = void (*)(const float*, const Weight&, int64_t, float*, int64_t);
using TwoFloatTiles = void (*)(const float*, const Weight&, int64_t, float*, int64_t, int64_t);

// Functions for 1 to Vec::kRows rows, and for Vec::kRows rows and two panels, or null.
struct FloatTiles {
  FloatTile of[Vec::kRows + 1] = {};
  TwoFloatTiles of_two = nullptr;
};

template <typename Type>
struct FloatTilesOf : FloatTiles {
  constexpr FloatTilesOf() {
    if constexpr (Vec::kLanes == kPanel) of_two = two_float_panels<Type>;
    fill<Vec::kRows>();
  }
  template <int M>
  constexpr void fill() {
    of[M] = float_panel<Type, M>;
    if constexpr (M > 1) fill<M - 1>();
  }
};

inline const FloatTiles& float_tiles_of(const Weight& weight) {
  static constexpr FloatTilesOf<Bfloats> bfloats{};
  static constexpr FloatTilesOf<Halves> halves{};
  static constexpr FloatTilesOf<Singles> singles{};
  if (weight.bits == 32) return singles;
  return weight.bfloat16 ? static_cast<const FloatTiles&>(bfloats) : halves;
}

// Multiplies rows first..last with panels panel..end. y begins at row `first` and the first output.
inline void multiply_floats(const float* rows, int64_t first, int64_t last, const Weight& weight,
                            int64_t panel, int64_t end, float* y, int64_t stride, int64_t apart) {
  const FloatTiles& tiles = float_tiles_of(weight);
  const int64_t inputs = weight.groups() * kGroup;
  // With fewer rows, reading the weights takes longer than multiplying, and is faster one panel
  // after the other.
  const bool pairs = multiplies_in_two() && last - first >= 3 * Vec::kRows;
  for (; panel < end; panel += 2, y += 2 * apart) {
    const int64_t panels = least(2, end - panel);
    int64_t in_pairs = first;
    if (pairs && panels == 2)
      for (; in_pairs + Vec::kRows <= last; in_pairs += Vec::kRows)
        tiles.of_two(rows + in_pairs * inputs, weight, panel, y + (in_pairs - first) * stride,
                     stride, apart);
    for (int64_t p = 0; p < panels; p++)
      for (int64_t m = in_pairs; m < last; m += Vec::kRows)
        tiles.of[rows_of_tile(m, last)](rows + m * inputs, weight, panel + p,
                                        y + p * apart + (m - first) * stride, stride);
  }
}
