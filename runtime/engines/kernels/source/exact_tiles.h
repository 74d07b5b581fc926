// Products of fp32 rows with quantized weights, included by tiles.h. A weight is widened in
// registers to v * scale + offset, rounded once. For scales and offsets in float16 these are the
// values of the dequantized weight. Products are added in the order of inputs, so results are those
// of float_tiles.h in fp32.

// Factors in fp32 of a panel's groups, for a register of outputs that starts at `lane`.
struct WideFactors {
  int64_t left = 0;
  int64_t groups_of_scale;
  const uint16_t* scales;
  const uint16_t* offsets;
  const uint8_t* zeros;
  const int8_t* multiples;
  Vec::Float middle;
  Vec::Float whole = Vec::zero();
  Vec::Float whole_offset = Vec::zero();
  Vec::Float scale[2];   // of the first and the last 16 inputs
  Vec::Float offset[2];  // of the first and the last 16 inputs

  void begin(const Weight& weight, int64_t panel, int lane) {
    const int64_t at = panel * weight.scales_of_panel() * kPanel + lane;
    groups_of_scale = (weight.multiples ? kSuper : weight.block) / kGroup;
    scales = weight.scales + at;
    offsets = weight.offsets ? weight.offsets + at : nullptr;
    zeros = weight.zeros ? weight.zeros + at : nullptr;
    multiples = weight.multiples
                    ? weight.multiples + panel * weight.blocks() * kPanel * (offsets ? 2 : 1) + lane
                    : nullptr;
    middle = Vec::set(static_cast<float>(-(1 << (weight.bits - 1))));
  }
  // Must be called before each group of `Bits` bits.
  template <int Bits>
  void next() {
    if (left-- <= 0) {
      left = groups_of_scale - 1;
      whole = Vec::halves(scales);
      scales += kPanel;
      if (offsets) {
        whole_offset = Vec::halves(offsets);
        offsets += kPanel;
      } else if (zeros) {
        whole_offset =
            Vec::times(Vec::minus(Vec::zero(), Vec::converted(Vec::widened(zeros))), whole);
        zeros += kPanel;
      } else {
        whole_offset = Vec::times(middle, whole);
      }
      scale[0] = scale[1] = whole;
      offset[0] = offset[1] = whole_offset;
    }
    if (!multiples) return;
    for (int part = 0; part < (Bits == 6 ? 2 : 1); part++, multiples += kPanel) {
      scale[part] = Vec::times(whole, multiples);
      if (offsets) multiples += kPanel;
      offset[part] = Vec::times(whole_offset, multiples);
    }
    if (Bits == 6) return;
    scale[1] = scale[0];
    offset[1] = offset[0];
  }
  // Returns the weights of input `Each` of a quad's bytes, from `quad_of`.
  template <int Bits, int Quad, int Each>
  FREEEXPORT_INLINE Vec::Float widened(Vec::Int four) const {
    return Vec::add_product(Vec::template byte<Each, Bits == 4>(four), scale[Quad / 4],
                            offset[Quad / 4]);
  }
};

// Multiplies M rows with `Wide` registers of outputs, starting at output `lane` of a panel. Its
// panels in y are `apart`.
template <int Bits, int M, int Wide>
inline void exact_tile(const float* rows, const Weight& weight, int64_t panel, int lane, float* y,
                       int64_t stride, int64_t apart) {
  constexpr int64_t kAhead = 4096;  // distance of prefetching, in bytes
  constexpr int kOfPanel = kPanel / Vec::kLanes;
  const int64_t groups = weight.groups();
  const int64_t bytes = weight.group_bytes();
  const int64_t of_panel = groups * bytes;
  const int64_t panels = Wide > kOfPanel ? 2 : 1;
  const uint8_t* data = weight.data + panel * of_panel;
  WideFactors factors[Wide];
  Vec::Float sums[Wide][M];
  clear(sums);
#pragma GCC unroll 4
  for (int w = 0; w < Wide; w++)
    factors[w].begin(weight, panel + w / kOfPanel, lane + w % kOfPanel * Vec::kLanes);
  for (int64_t g = 0; g < groups; g++, data += bytes, rows += M * kGroup) {
    // Skips the second of two panels after the end of the first, because it is already being read.
    const uint8_t* next =
        data + kAhead + (panels > 1 && g * bytes + kAhead >= of_panel ? of_panel : 0);
    for (int64_t at = 0; at < bytes && lane == 0; at += 64)
      for (int64_t p = 0; p < panels; p++) __builtin_prefetch(next + at + p * of_panel);
#pragma GCC unroll 4
    for (int w = 0; w < Wide; w++) factors[w].template next<Bits>();
    each_quad([&](auto quad) {
      Vec::Int four[Wide];
#pragma GCC unroll 4
      for (int w = 0; w < Wide; w++)
        four[w] = quad_of<Vec, Bits, quad>(data + w / kOfPanel * of_panel +
                                           (lane + w % kOfPanel * Vec::kLanes) * 4);
      each_quad<0, 4>([&](auto each) {
        Vec::Float values[Wide];
#pragma GCC unroll 4
        for (int w = 0; w < Wide; w++)
          values[w] = factors[w].template widened<Bits, quad, each>(four[w]);
        const float* inputs = rows + (4 * quad + each) * M;
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
          for (int w = 0; w < Wide; w++)
            sums[w][m] = Vec::add_product(Vec::set(inputs[m]), values[w], sums[w][m]);
      });
    });
  }
#pragma GCC unroll 4
  for (int w = 0; w < Wide; w++) {
    const int from = lane + w % kOfPanel * Vec::kLanes;
    put(sums[w], weight, (panel + w / kOfPanel) * kPanel + from, y + w / kOfPanel * apart + from,
        stride, 0);
  }
}

// Multiplies M rows with a panel, or with two. One row takes 20 % less time with two panels at a
// time (Zen 4), because the additions to a sum wait for each other. From two rows on, reading one
// panel is faster, but not on Zen 5: there, two rows take 13 % less time with two panels, and three
// 4 %.
template <int Bits, int M>
inline void exact_panels(const float* rows, const Weight& weight, int64_t panels, int64_t panel,
                         float* y, int64_t stride, int64_t apart) {
  constexpr int kOne = kPanel / Vec::kLanes;
  if constexpr ((M == 1 && kOne <= 2) || (M <= 4 && kOne == 1)) {
    if (panels == 2 && (M == 1 || kProcessor.zen5))
      return exact_tile<Bits, M, 2 * kOne>(rows, weight, panel, 0, y, stride, apart);
  }
  for (int64_t p = 0; p < panels; p++)
    for (int lane = 0; lane < kPanel; lane += kFloatsWide * Vec::kLanes)
      exact_tile<Bits, M, kFloatsWide>(rows, weight, panel + p, lane, y + p * apart, stride, 0);
}

// With so many rows, a weight is widened once for all of them, kWidenedInputs at a time: 16 KB.
// With fewer, that takes longer than it saves (Zen 4, AVX-512 and AVX2).
constexpr int64_t kWidenedRows = 4 * Vec::kRows;
constexpr int64_t kWidenedInputs = 256;

// Widens `count` inputs of a register of outputs. Rows of `to` have kPanel outputs.
template <int Bits>
inline void widen(const uint8_t* data, int64_t bytes, int64_t count, WideFactors& factors,
                  float* to) {
  for (int64_t i = 0; i < count; i += kGroup, data += bytes, to += kGroup * kPanel) {
    factors.template next<Bits>();
    each_quad([&](auto quad) {
      const Vec::Int four = quad_of<Vec, Bits, quad>(data);
      each_quad<0, 4>([&](auto each) {
        Vec::store(to + (4 * quad + each) * kPanel,
                   factors.template widened<Bits, quad, each>(four));
      });
    });
  }
}

// Multiplies whole tiles of rows first..last with `Panels` panels, see `two_float_panels`.
template <int Bits, int Panels>
inline void exact_rows(const float* rows, int64_t first, int64_t last, const Weight& weight,
                       int64_t panel, float* y, int64_t stride, int64_t apart) {
  constexpr int kOne = kPanel / Vec::kLanes;
  constexpr int kRows = Vec::kRows;
  constexpr int kAll = Panels * kOne;
  constexpr int kWide = Panels == 2 ? 2 : kFloatsWide;
  static_assert(Panels == 1 || kOne == 1, "a register holds a panel");
  constexpr int64_t kPart = kWidenedInputs * kPanel;
  constexpr int64_t kApart = Panels == 2 ? kPart : Vec::kLanes;
  const int64_t groups = weight.groups();
  const int64_t bytes = weight.group_bytes();
  const int64_t inputs = groups * kGroup;
  alignas(64) float values[Panels * kPart];
  Vec::Float sums[kTaskRows / kRows][kAll / kWide][kWide][kRows];
  WideFactors factors[kAll];
  for (int w = 0; w < kAll; w++) factors[w].begin(weight, panel + w / kOne, w % kOne * Vec::kLanes);
  for (auto& tile : sums)
    for (auto& part : tile) clear(part);
  for (int64_t i = 0; i < inputs; i += kWidenedInputs) {
    const int64_t count = least(kWidenedInputs, inputs - i);
    for (int w = 0; w < kAll; w++) {
      const uint8_t* data = weight.data + ((panel + w / kOne) * groups + i / kGroup) * bytes;
      widen<Bits>(data + w % kOne * Vec::kLanes * 4, bytes, count, factors[w], values + w * kApart);
    }
    for (int64_t m = first; m < last; m += kRows)
      for (int part = 0; part < kAll / kWide; part++)
        add_floats<Singles>(rows + m * inputs + i * kRows, values + part * kWide * Vec::kLanes,
                            count, 0, sums[(m - first) / kRows][part], kApart);
  }
  for (int64_t m = first; m < last; m += kRows)
    for (int w = 0; w < kAll; w++) {
      const int lane = w % kOne * Vec::kLanes;
      put(sums[(m - first) / kRows][w / kWide][w % kWide], weight,
          (panel + w / kOne) * kPanel + lane, y + w / kOne * apart + (m - first) * stride + lane,
          stride, 0);
    }
}

using ExactPanels = void (*)(const float*, const Weight&, int64_t, int64_t, float*, int64_t,
                             int64_t);
using ExactRows = void (*)(const float*, int64_t, int64_t, const Weight&, int64_t, float*, int64_t,
                           int64_t);

// Functions for 1 to Vec::kRows rows, and for whole tiles of many rows with one panel and with two,
// or null.
struct ExactTiles {
  ExactPanels of[Vec::kRows + 1] = {};
  ExactRows of_many = nullptr;
  ExactRows of_many_in_two = nullptr;
};

template <int Bits>
struct ExactTilesOf : ExactTiles {
  constexpr ExactTilesOf() {
    of_many = exact_rows<Bits, 1>;
    if constexpr (Vec::kLanes == kPanel) of_many_in_two = exact_rows<Bits, 2>;
    fill<Vec::kRows>();
  }
  template <int M>
  constexpr void fill() {
    of[M] = exact_panels<Bits, M>;
    if constexpr (M > 1) fill<M - 1>();
  }
};

inline const ExactTiles& exact_tiles_of(const Weight& weight) {
  static constexpr ExactTilesOf<4> in_4_bits{};
  static constexpr ExactTilesOf<5> in_5_bits{};
  static constexpr ExactTilesOf<6> in_6_bits{};
  static constexpr ExactTilesOf<8> in_8_bits{};
  if (weight.bits == 8) return in_8_bits;
  if (weight.bits == 4) return in_4_bits;
  return weight.bits == 5 ? static_cast<const ExactTiles&>(in_5_bits) : in_6_bits;
}

inline void multiply_exact(const float* rows, int64_t first, int64_t last, const Weight& weight,
                           int64_t panel, int64_t end, float* y, int64_t stride, int64_t apart) {
  const ExactTiles& tiles = exact_tiles_of(weight);
  const int64_t inputs = weight.groups() * kGroup;
  for (; panel < end; panel += 2, y += 2 * apart) {
    const int64_t panels = least(2, end - panel);
    int64_t m = first;
    if (last - first >= kWidenedRows) {
      m += (last - first) / Vec::kRows * Vec::kRows;
      if (panels == 2 && multiplies_in_two())
        tiles.of_many_in_two(rows, first, m, weight, panel, y, stride, apart);
      else
        for (int64_t p = 0; p < panels; p++)
          tiles.of_many(rows, first, m, weight, panel + p, y + p * apart, stride, 0);
    }
    for (; m < last; m += Vec::kRows)
      tiles.of[rows_of_tile(m, last)](rows + m * inputs, weight, panels, panel,
                                      y + (m - first) * stride, stride, apart);
  }
}

// Like `multiply` of quantized rows, for all weights with rows in fp32.
inline void multiply(const float* rows, const int16_t*, int64_t first, int64_t last,
                     const Weight& weight, int64_t panel, int64_t end, float* y, int64_t stride,
                     int64_t apart) {
  const auto multiply_all = weight.exact ? multiply_exact : multiply_floats;
  multiply_all(rows, first, last, weight, panel, end, y, stride, apart);
}
