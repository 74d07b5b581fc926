// Products with weights that are not quantized, in float16, bfloat16 or fp32, included by tiles.h.
// Rows and sums are fp32. Products are added in the order of inputs, so the bits of a row depend
// only on the row and the weight.

// Returns the distance of prefetching in bytes. With one row, hardware prefetching alone is 17 % faster
// on Zen 4. From three rows on it no longer keeps up. Not measured on other processors.
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
  const int64_t inputs = product.weight.inputs, padded = product.weight.groups() * kGroup;
  const int64_t tile = row / Vec::kRows * Vec::kRows, stride = rows_of_tile(tile, product.rows);
  float* to = rows + tile * padded + (row - tile);
  for (int64_t i = 0; i < inputs; i++) to[i * stride] = x[i];
  for (int64_t i = inputs; i < padded; i++) to[i * stride] = 0.0f;
}

// Adds the products of M rows with `Wide` registers of outputs to `sums`. `data` has kPanel outputs of each input,
// and is prefetched `ahead` bytes before it is read.
template <typename Type, int M, int Wide>
inline void add_floats(const float* rows, const typename Type::Value* data, int64_t inputs, int64_t ahead,
                       Vec::Float (&sums)[Wide][M]) {
  for (int64_t i = 0; i < inputs; i += 2) {
    const char* next = reinterpret_cast<const char*>(data) + ahead;
    for (size_t at = 0; at < 2 * kPanel * sizeof(*data) && ahead; at += 64) __builtin_prefetch(next + at);
#pragma GCC unroll 2
    for (int each = 0; each < 2; each++, data += kPanel, rows += M) {
      Vec::Float values[Wide];
#pragma GCC unroll 4
      for (int w = 0; w < Wide; w++) values[w] = Type::read(data + w * Vec::kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int w = 0; w < Wide; w++) sums[w][m] = Vec::add_product(Vec::set(rows[m]), values[w], sums[w][m]);
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
inline void put_floats(const Vec::Float (&sums)[kFloatsWide][M], const Weight& weight, int64_t panel, int lane, float* y,
                       int64_t stride) {
#pragma GCC unroll 4
  for (int w = 0; w < kFloatsWide; w++) {
    const int from = lane + w * Vec::kLanes;
    put(sums[w], weight, panel * kPanel + from, y + from, stride, 0);
  }
}

// Multiplies M rows with all outputs of a panel.
template <typename Type, int M>
inline void float_panel(const float* rows, const Weight& weight, int64_t panel, float* y, int64_t stride) {
  const int64_t inputs = weight.groups() * kGroup;
  const auto* data = reinterpret_cast<const typename Type::Value*>(weight.data) + panel * inputs * kPanel;
  for (int lane = 0; lane < kPanel && panel * kPanel + lane < weight.outputs; lane += kFloatsWide * Vec::kLanes) {
    Vec::Float sums[kFloatsWide][M];
    clear(sums);
    // The first outputs of a panel prefetch for all others.
    add_floats<Type>(rows, data + lane, inputs, lane > 0 ? 0 : floats_ahead<M>(), sums);
    put_floats(sums, weight, panel, lane, y, stride);
  }
}

using FloatTile = void (*)(const float*, const Weight&, int64_t, float*, int64_t);

// Functions for 1 to Vec::kRows rows.
template <typename Type>
struct FloatTiles {
  FloatTile of[Vec::kRows + 1] = {};
  constexpr FloatTiles() { fill<Vec::kRows>(); }
  template <int M>
  constexpr void fill() {
    of[M] = float_panel<Type, M>;
    if constexpr (M > 1) fill<M - 1>();
  }
};

inline const FloatTile* float_tiles_of(const Weight& weight) {
  static constexpr FloatTiles<Bfloats> bfloats{};
  static constexpr FloatTiles<Halves> halves{};
  static constexpr FloatTiles<Singles> singles{};
  if (weight.bits == 32) return singles.of;
  return weight.bfloat16 ? bfloats.of : halves.of;
}
