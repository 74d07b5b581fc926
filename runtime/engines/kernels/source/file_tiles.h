// Tiles of weights in formats of GGUF files: 5 and 6 bits, and scales and offsets that are
// multiples of those of a super-block. Part of tiles.h.

// Factors of a panel's groups, starting at output `lane`. In 6 bits, 16 inputs share a scale.
template <int Bits, bool Offset, bool Multiples>
struct FileFactors {
  static constexpr int kParts = Bits == 6 ? 2 : 1;
  int64_t left = 0;
  int64_t groups_of_scale;
  const uint16_t* scales;
  const uint16_t* offsets;
  const int8_t* multiples;
  Vec::Int zero = Vec::counted(Vec::all(1 << (Bits - 1)));
  Vec::Float whole = Vec::zero();
  Vec::Float whole_offset = Vec::zero();
  Vec::Float offset = Vec::zero();
  Vec::Scale scale[kParts] = {};

  void begin(const Weight& weight, int64_t panel, int lane) {
    groups_of_scale = (Multiples ? kSuper : weight.block) / kGroup;
    const int64_t at = panel * weight.scales_of_panel() * kPanel + lane;
    scales = weight.scales + at;
    offsets = Offset ? weight.offsets + at : nullptr;
    multiples = Multiples
                    ? weight.multiples + panel * weight.blocks() * kPanel * (Offset ? 2 : 1) + lane
                    : nullptr;
  }
  // Must be called before each group.
  void next() {
    if (left-- <= 0) {
      left = groups_of_scale - 1;
      whole = Vec::halves(scales);
      scales += kPanel;
      if constexpr (Offset) whole_offset = Vec::halves(offsets), offsets += kPanel;
      if constexpr (!Multiples) scale[0] = Vec::scale(whole), offset = whole_offset;
    }
    if constexpr (Multiples) {
      for (int part = 0; part < kParts; part++, multiples += kPanel)
        scale[part] = Vec::scale(Vec::times(whole, multiples));
      if constexpr (Offset) offset = Vec::times(whole_offset, multiples), multiples += kPanel;
    }
  }
  template <int Part>
  Vec::Float added(const Vec::Unpacked<Bits>& weights, const Group& group, Vec::Float sum) const {
    Vec::Int start = Vec::all(Vec::kNothing);
    if constexpr (!Offset)
      start = Vec::start(zero, kParts == 1 ? &group.minus_sum : group.halves[Part]);
    const Vec::Int dot = weights.template dot_part<Part, kParts>(group.values, start);
    sum = Vec::add_product(Vec::scaled(dot, scale[Part]), Vec::set(group.scale), sum);
    if constexpr (Offset) sum = Vec::add_product(offset, Vec::set(group.scaled_sum), sum);
    if constexpr (Part + 1 < kParts) sum = added<Part + 1>(weights, group, sum);
    return sum;
  }
};

template <int Bits, bool Offset, bool Multiples, int M>
inline void file_tile(const Group* rows, const Weight& weight, int64_t panel, float* y,
                      int64_t stride) {
  constexpr int64_t kAhead = 4096;  // distance of prefetching, in bytes
  const int64_t groups = weight.groups();
  const int64_t bytes = weight.group_bytes();
  for (int lane = 0; lane < kPanel && panel * kPanel + lane < weight.outputs; lane += Vec::kLanes) {
    const uint8_t* data = weight.data + panel * groups * bytes + lane * 4;
    FileFactors<Bits, Offset, Multiples> factors;
    factors.begin(weight, panel, lane);
    Vec::Float sums[M];
    for (int m = 0; m < M; m++) sums[m] = Vec::zero();
    for (int64_t g = 0; g < groups; g++, data += bytes) {
      for (int64_t at = 0; at < bytes && lane == 0; at += 64)
        __builtin_prefetch(data + at + kAhead);
      factors.next();
      const Vec::Unpacked<Bits> weights(data);
#pragma GCC unroll 8  // otherwise sums of many rows are kept in memory
      for (int m = 0; m < M; m++)
        sums[m] = factors.template added<0>(weights, rows[g * M + m], sums[m]);
    }
    put(sums, weight, panel * kPanel + lane, y + lane, stride, weight.pairs);
  }
}

template <int Bits, bool Offset, bool Multiples>
struct FileTiles {
  Tile of[Vec::kRows + 1] = {};
  constexpr FileTiles() { fill<Vec::kRows>(); }
  template <int M>
  constexpr void fill() {
    of[M] = file_tile<Bits, Offset, Multiples, M>;
    if constexpr (M > 1) fill<M - 1>();
  }
};

// Returns the functions for 1 to Vec::kRows rows. The formats are those that `check_form` accepts.
inline const Tile* tiles_of_file(const Weight& weight) {
  static constexpr FileTiles<4, true, true> q4_k{};
  static constexpr FileTiles<5, false, false> q5_0{};
  static constexpr FileTiles<5, true, false> q5_1{};
  static constexpr FileTiles<5, true, true> q5_k{};
  static constexpr FileTiles<6, false, true> q6_k{};
  if (weight.bits == 6) return q6_k.of;
  if (weight.multiples) return weight.bits == 4 ? q4_k.of : q5_k.of;
  return weight.offsets ? q5_1.of : q5_0.of;
}
