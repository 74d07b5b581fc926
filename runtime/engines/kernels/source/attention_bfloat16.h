// Attention of a prompt's rows in bfloat16: queries, keys, values and weights are rounded to it,
// and sums are fp32. The including file defines `Products`, with
//
//   static constexpr int kTiles;  // of queries that are multiplied together
//   template <int P, int T, bool kAdds>
//   static void multiply(const uint16_t* a, int64_t a_apart, const uint16_t* b, int64_t b_apart,
//                        int64_t count, float* sums, int64_t sums_apart);
//
// which multiplies P tiles of rows, each `count` tiles [16 rows][32 values], with T times `count`
// tiles [16 pairs of values][16 queries][2] to T times sums [P][16 rows][16 queries], or adds the
// products to them. T is 1 or kTiles. A Products object exists while they are used.
//
// The rows of a tile are keys. Its columns are 16 queries, the heads of a group for one row after
// the other. A register then has one score per query, and needs no horizontal sum. A query joins
// its pieces in order, and keys that it does not see have weight 0, so its bits do not depend on
// the queries beside it.
#pragma once

#include "fused.h"

#include "attention_tiles.h"

namespace freeexport {
namespace {

constexpr int64_t kKeyTiles = kPieceRows / kTileRows;
constexpr int64_t kKeySteps = kPieceRows / kGroup;
constexpr float kNothingYet = -1e30f;  // initial value of the largest score

// Transposes 16 rows of 16 32-bit values.
FREEEXPORT_INLINE void turn(__m512i (&rows)[16]) {
  __m512i halves[16];
  for (int i = 0; i < 16; i += 2) {
    halves[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    halves[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      rows[i + 2 * j] = _mm512_unpacklo_epi64(halves[i + j], halves[i + 2 + j]);
      rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(halves[i + j], halves[i + 2 + j]);
    }
  for (int i = 0; i < 4; i++) {
    const __m512i low = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0x88);
    const __m512i next = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0xdd);
    const __m512i far = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0x88);
    const __m512i last = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0xdd);
    halves[i] = _mm512_shuffle_i32x4(low, far, 0x88);
    halves[8 + i] = _mm512_shuffle_i32x4(low, far, 0xdd);
    halves[4 + i] = _mm512_shuffle_i32x4(next, last, 0x88);
    halves[12 + i] = _mm512_shuffle_i32x4(next, last, 0xdd);
  }
  for (int i = 0; i < 16; i++) rows[i] = halves[i];
}

// Loads 16 of `size` values, starting at `at`, with zeros after the last.
FREEEXPORT_INLINE __mmask16 left_of(int64_t left) {
  return static_cast<__mmask16>(left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0);
}
FREEEXPORT_INLINE __m512 values_of(const float* from, int64_t at, int64_t size) {
  return _mm512_maskz_loadu_ps(left_of(size - at), from + at);
}
FREEEXPORT_INLINE __m512 values_of(const uint16_t* from, int64_t at, int64_t size) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(left_of(size - at), from + at));
}
// Loads 32 values and rounds them to bfloat16.
template <typename C>
FREEEXPORT_INLINE __m512i rounded(const C* from, int64_t at, int64_t size) {
  return (__m512i)_mm512_cvtne2ps_pbh(values_of(from, at + 16, size), values_of(from, at, size));
}
// Rounds both to bfloat16 and interleaves them.
FREEEXPORT_INLINE __m512i paired(__m512 first, __m512 second) {
  const __m512i order = _mm512_add_epi32(
      _mm512_set1_epi32(16 << 16),
      _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_epi32(0x10001)));
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

// State of 16 queries: visible positions, largest scores and sums of weights so far.
struct alignas(64) Lanes {
  int32_t first[16];  // position
  int32_t last[16];   // position
  float largest[16];
  float sums[16];
};

struct Memory {
  int64_t tiles;  // of queries
  int64_t steps;  // of 32 values of a head
  int64_t parts;  // of 16 values of a head
  Lanes* lanes;
  float* outputs;     // [tiles][parts][16 values][16 queries]
  uint16_t* queries;  // [tiles][steps][16 pairs of values][16 queries][2]
  uint16_t* keys;     // [key tiles][steps][16 keys][32 values]
  uint16_t* values;   // [parts][key steps][16 values][32 keys]
  float* scores;      // [kTiles][64 keys][16 queries]
  uint16_t* weights;  // [kTiles][key steps][16 pairs of keys][16 queries][2]
  bool odd;           // a value is infinite or NaN
};

// Reads the keys and values of a piece from the cache. Missing ones are 0.
template <typename C>
void read_piece(const Attention& a, int64_t at, int64_t count, Memory& room) {
  const C* keys = static_cast<const C*>(a.key) + at;
  const C* values = static_cast<const C*>(a.value) + at;
  const int64_t size = a.size;
  for (int64_t t = 0; t < kPieceRows; t++)
    for (int64_t s = 0; s < room.steps; s++) {
      uint16_t* to =
          room.keys + ((t / kTileRows * room.steps + s) * kTileRows + t % kTileRows) * kGroup;
      _mm512_store_si512(
          to, t < count ? rounded(keys + t * size, s * kGroup, size) : _mm512_setzero_si512());
    }
  __mmask16 odd = 0;
  for (int64_t part = 0; part < room.parts; part++)
    for (int64_t step = 0; step < kKeySteps; step++) {
      __m512i pairs[16];
      const auto value = [&](int64_t t) {
        const __m512 found =
            t < count ? values_of(values + t * size, part * kPanel, size) : _mm512_setzero_ps();
        const __mmask16 wrong = _mm512_fpclass_ps_mask(found, 0x99);  // see `see_odd`
        odd |= wrong;
        return _mm512_maskz_mov_ps(static_cast<__mmask16>(~wrong), found);
      };
      for (int i = 0; i < 16; i++)
        pairs[i] = paired(value(step * kGroup + 2 * i), value(step * kGroup + 2 * i + 1));
      turn(pairs);
      uint16_t* to = room.values + (part * kKeySteps + step) * kTileValues;
      for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * kGroup, pairs[i]);
    }
  room.odd = odd != 0;
}

// Positions of a piece that 16 queries see, relative to the piece.
struct Sight {
  __m512i first;
  __m512i last;
  bool whole;  // all queries see all keys
  FREEEXPORT_INLINE __mmask16 of(int64_t t) const {
    if (whole) return 0xffff;
    const __m512i key = _mm512_set1_epi32(static_cast<int32_t>(t));
    return _mm512_cmple_epi32_mask(first, key) & _mm512_cmple_epi32_mask(key, last);
  }
};

// Converts scores to weights, 2^(score - largest score so far). Returns the factors by which
// earlier results shrink.
__m512 weigh(const Attention& a, const Sight& sight, float* scores, uint16_t* weights,
             Lanes& lanes) {
  constexpr float kLog2E = 1.44269504088896341f;
  float by = a.scale * kLog2E;
  if (a.softcap > 0.0f) {
    const __m512 cap = _mm512_set1_ps(a.softcap);
    const __m512 twice = _mm512_set1_ps(2.0f * a.scale / a.softcap);
    const __m512 one = _mm512_set1_ps(1.0f);
    for (int64_t t = 0; t < kPieceRows; t++) {  // softcap tanh(score / softcap)
      const __m512 power = exponential(_mm512_mul_ps(_mm512_load_ps(scores + t * 16), twice));
      const __m512 share = _mm512_div_ps(_mm512_sub_ps(power, one), _mm512_add_ps(power, one));
      _mm512_store_ps(scores + t * 16, _mm512_mul_ps(cap, share));
    }
    by = kLog2E;
  }
  const __m512 before = _mm512_load_ps(lanes.largest);
  const __m512 times = _mm512_set1_ps(by);
  __m512 most[4] = {before, before, before, before};
  __m512 sums[4] = {};
  for (int64_t t = 0; t < kPieceRows; t += 4)
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; i++)
      most[i] = _mm512_mask_max_ps(most[i], sight.of(t + i), most[i],
                                   _mm512_mul_ps(_mm512_load_ps(scores + (t + i) * 16), times));
  const __m512 largest =
      _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
  for (int64_t t = 0; t < kPieceRows; t += 4) {
    __m512 powers[4];
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; i++) {
      const __m512 score = _mm512_load_ps(scores + (t + i) * 16);
      powers[i] = _mm512_maskz_mov_ps(sight.of(t + i),
                                      Vec::power_of_two(_mm512_fmsub_ps(score, times, largest)));
      sums[i] = _mm512_add_ps(sums[i], powers[i]);
    }
    _mm512_store_si512(weights + t * 16, paired(powers[0], powers[1]));
    _mm512_store_si512(weights + (t + 2) * 16, paired(powers[2], powers[3]));
  }
  const __m512 shrink = Vec::power_of_two(_mm512_sub_ps(before, largest));
  const __m512 sum =
      _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
  _mm512_store_ps(lanes.largest, largest);
  _mm512_store_ps(lanes.sums, _mm512_fmadd_ps(_mm512_load_ps(lanes.sums), shrink, sum));
  return shrink;
}

// Adds infinite values and NaN to the outputs of the queries that see their keys. As part of a tile
// they would reach all queries, because 0 times infinity is NaN.
void see_odd(const Attention& a, int64_t at, int64_t count, const Sight& sight, float* outputs) {
  for (int64_t t = 0; t < count; t++)
    for (int64_t i = 0; i < a.size; i++) {
      const int64_t place = at + t * a.size + i;
      const float value = a.cache == kHalves
                              ? _cvtsh_ss(static_cast<const uint16_t*>(a.value)[place])
                              : static_cast<const float*>(a.value)[place];
      if (value - value == 0.0f) continue;
      const __m512 now = _mm512_load_ps(outputs + i * 16);
      _mm512_store_ps(outputs + i * 16,
                      _mm512_mask_add_ps(now, sight.of(t), now, _mm512_set1_ps(value)));
    }
}

// Returns what the queries of a tile see of a piece that starts at `begin`.
Sight sight_of(const Lanes& lanes, int64_t begin) {
  const __m512i first = _mm512_load_si512(lanes.first);
  const __m512i last = _mm512_load_si512(lanes.last);
  const __m512i from = _mm512_set1_epi32(static_cast<int32_t>(begin));
  const int32_t least_last = _mm512_reduce_min_epi32(last);
  const int32_t most_first = _mm512_reduce_max_epi32(first);
  const bool whole = least_last >= begin + kPieceRows - 1 && most_first <= begin;
  return {_mm512_sub_epi32(first, from), _mm512_sub_epi32(last, from), whole};
}

// Returns true if a query of a tile sees the piece.
bool sees(const Lanes& lanes, int64_t begin) {
  return _mm512_reduce_max_epi32(_mm512_load_si512(lanes.last)) >= begin &&
         _mm512_reduce_min_epi32(_mm512_load_si512(lanes.first)) < begin + kPieceRows;
}

// Attends to a piece with T tiles of queries, which see it.
template <int T>
void attend_tiles(const Attention& a, int64_t begin, int64_t at, int64_t count, int64_t tile,
                  Memory& room) {
  constexpr int64_t kScores = kKeyTiles * kTileSums;
  constexpr int64_t kWeights = kKeySteps * kTileValues;
  const int64_t queries = room.steps * kTileValues;
  const int64_t sums = room.parts * kTileSums;
  float* outputs = room.outputs + tile * sums;
  Products::multiply<kKeyTiles, T, false>(room.keys, queries, room.queries + tile * queries,
                                          queries, room.steps, room.scores, kScores);
  Sight sights[T];
  for (int t = 0; t < T; t++) {
    Lanes& lanes = room.lanes[tile + t];
    sights[t] = sight_of(lanes, begin);
    const __m512 shrink =
        weigh(a, sights[t], room.scores + t * kScores, room.weights + t * kWeights, lanes);
    if (_mm512_cmpneq_ps_mask(shrink, _mm512_set1_ps(1.0f)))
      for (float* value = outputs + t * sums; value < outputs + (t + 1) * sums; value += kPanel)
        _mm512_store_ps(value, _mm512_mul_ps(_mm512_load_ps(value), shrink));
  }
  int64_t part = 0;
  for (; part + 4 <= room.parts; part += 4)
    Products::multiply<4, T, true>(room.values + part * kWeights, kWeights, room.weights, kWeights,
                                   kKeySteps, outputs + part * kTileSums, sums);
  for (; part < room.parts; part++)
    Products::multiply<1, T, true>(room.values + part * kWeights, kWeights, room.weights, kWeights,
                                   kKeySteps, outputs + part * kTileSums, sums);
  if (!room.odd) return;
  for (int t = 0; t < T; t++) see_odd(a, at, count, sights[t], outputs + t * sums);
}

// Attends to a piece with all tiles.
void attend_piece(const Attention& a, int64_t begin, int64_t at, int64_t count, Memory& room) {
  constexpr int kTiles = Products::kTiles;
  for (int64_t tile = 0; tile < room.tiles; tile += kTiles) {
    const int64_t end = least(tile + kTiles, room.tiles);
    int64_t seeing = 0;
    for (int64_t one = tile; one < end; one++) seeing += sees(room.lanes[one], begin);
    if (seeing == kTiles) {
      attend_tiles<kTiles>(a, begin, at, count, tile, room);
      continue;
    }
    for (int64_t one = tile; one < end; one++)
      if (sees(room.lanes[one], begin)) attend_tiles<1>(a, begin, at, count, one, room);
  }
}

inline bool attend_in_bfloat16(const Attention& a, const Place* places, int64_t count,
                               int64_t kv_head) {
  const int64_t group = a.heads / a.kv_heads;
  const int64_t size = a.size;
  const int64_t queries = count * group;
  Memory room = {};
  room.tiles = (queries + 15) / 16;
  room.steps = (size + kGroup - 1) / kGroup;
  room.parts = (size + 15) / 16;
  const auto bytes = [&](int64_t lanes, int64_t sums, int64_t tiles) {
    return lanes * static_cast<int64_t>(sizeof(Lanes)) + (sums + tiles) * 1024;
  };
  constexpr int64_t kTiles = Products::kTiles;
  const int64_t tiles =
      room.tiles * room.steps + kKeyTiles * room.steps + (room.parts + kTiles) * kKeySteps;
  const int64_t sums = room.tiles * room.parts + kTiles * kKeyTiles;
  auto* memory = static_cast<char*>(allocate(static_cast<size_t>(bytes(room.tiles, sums, tiles))));
  if (memory == nullptr) return false;
  room.lanes = reinterpret_cast<Lanes*>(memory);
  room.outputs = reinterpret_cast<float*>(memory + bytes(room.tiles, 0, 0));
  room.scores = room.outputs + room.tiles * room.parts * kTileSums;
  room.queries = reinterpret_cast<uint16_t*>(room.scores + kTiles * kKeyTiles * kTileSums);
  room.keys = room.queries + room.tiles * room.steps * kTileValues;
  room.values = room.keys + kKeyTiles * room.steps * kTileValues;
  room.weights = room.values + room.parts * kKeySteps * kTileValues;
  const auto head_of = [&](int64_t query) { return kv_head * group + query % group; };
  for (int64_t tile = 0; tile < room.tiles; tile++) {
    Lanes& lanes = room.lanes[tile];
    for (int lane = 0; lane < 16; lane++) {
      const int64_t query = tile * 16 + lane;
      lanes.last[lane] =
          query < queries ? static_cast<int32_t>(places[query / group].position) : -1;
      lanes.first[lane] =
          query < queries ? static_cast<int32_t>(first_position(a, places[query / group])) : 0;
      lanes.largest[lane] = kNothingYet;
      lanes.sums[lane] = 0.0f;
    }
    for (int64_t s = 0; s < room.steps; s++) {
      __m512i rows[16];
      for (int64_t query = tile * 16; query < tile * 16 + 16; query++) {
        rows[query % 16] = _mm512_setzero_si512();
        if (query < queries)
          rows[query % 16] = rounded(queries_of(a, places[query / group]) + head_of(query) * size,
                                     s * kGroup, size);
      }
      turn(rows);
      uint16_t* to = room.queries + (tile * room.steps + s) * kTileValues;
      for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * kGroup, rows[i]);
    }
  }
  std::memset(room.outputs, 0,
              static_cast<size_t>(room.tiles * room.parts * kTileSums) * sizeof(float));
  {
    const Products products;
    const int64_t end = places[count - 1].position + 1;
    for (int64_t piece = first_piece(a, places[0]); piece < end_piece(places[count - 1]); piece++) {
      const int64_t begin = piece * kPieceRows;
      const int64_t here = end - begin < kPieceRows ? end - begin : kPieceRows;
      const int64_t at = keys_at(a, places[0], kv_head, begin);
      a.cache == kHalves ? read_piece<uint16_t>(a, at, here, room)
                         : read_piece<float>(a, at, here, room);
      attend_piece(a, begin, at, here, room);
    }
  }
  for (int64_t tile = 0; tile < room.tiles; tile++) {
    const __m512 by = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_load_ps(room.lanes[tile].sums));
    for (int64_t part = 0; part < room.parts; part++) {
      __m512i rows[16];
      const float* from = room.outputs + (tile * room.parts + part) * kTileSums;
      for (int i = 0; i < 16; i++)
        rows[i] = (__m512i)_mm512_mul_ps(_mm512_load_ps(from + i * 16), by);
      turn(rows);
      const __mmask16 inside = size - part * 16 >= 16 ? 0xffff : 0xff;
      for (int64_t query = tile * 16; query < tile * 16 + 16 && query < queries; query++)
        _mm512_mask_storeu_ps(
            a.y + (places[query / group].row * a.heads + head_of(query)) * size + part * 16, inside,
            (__m512)rows[query % 16]);
    }
  }
  release(memory);
  return true;
}

}  // namespace
}  // namespace freeexport
