// Attention of a decoder over its KV cache, which is extended in place. Every row of a call sees
// the earlier positions of its sequence and itself. With `cross_lengths`, rows see the keys and
// values of a prompt instead, which neighboring sequences may share. In an encoder, these are the
// keys and values of all rows of the sequence.
//
// The order of a row's sums does not depend on the rest of the call. The keys that it sees are
// divided into pieces, each with its own largest score and sums. Threads may share the pieces,
// which are joined in order.
#pragma once

#include <cstddef>
#include <cstdint>

namespace freeexport {

// Types of keys and values.
enum Cache : int32_t {
  kFloats,
  kHalves,
  kBytes,  // 8 bits, followed by the scale of the position and head in fp32
};

struct Attention {
  int64_t batch;    // number of sequences
  int64_t rows;     // number of rows of all sequences
  int64_t prompts;  // of cross-attention: batch / prompts sequences share each. Otherwise batch
  int64_t heads;    // 0: keys and values are only stored
  int64_t kv_heads;
  int64_t size;
  int64_t capacity;
  int64_t width;  // of input rows: (heads + 2 kv_heads) * size, or heads * size (cross)
  float scale;
  float softcap;         // scores become softcap * tanh(score / softcap). 0: none
  int64_t window;        // newest positions that a row sees, including itself. 0: all
  const float* input;    // [rows, width]: query, key, value
  Cache cache;           // type of keys and values
  const void* past_key;  // [prompts, kv_heads, capacity, cache_width], like the next three
  const void* past_value;
  void* key;  // filled and attended to: the memory of past_key, or another
  void* value;
  const int32_t* cross_lengths;  // [prompts]: valid keys, which all rows see. Or null
  const int32_t* past_lengths;   // [batch]: valid positions before the call
  const int32_t* query_lengths;  // [batch]: valid rows
  bool packed;          // valid rows are contiguous, else each sequence has rows / batch rows
  const float* cosine;  // [positions, turned], or null without rotary positions
  const float* sine;
  int64_t positions;  // number of rows of the tables
  int64_t turned;     // rotated pairs of a head, at most size / 2
  // [reach + 1, heads] by distance, the last for larger ones. In an encoder [2 reach + 1, heads] by
  // key - query, from -reach on. Or null
  const float* bias;
  int64_t reach;
  const float* query_norm;  // [size]: norm of each head. Or null
  const float* key_norm;
  float epsilon;
  float* y;    // [rows, heads * size], 0 in rows that are not valid
  int prompt;  // rows of a prompt, which may have other bits, see `attend_prompt`
  // Keys and values are those of the rows, which are not packed, with `capacity` rows each. `key`
  // and `value` are memory for them, each with kBehind values after the last.
  bool encoder;
};

// A valid row: its index in the call, the sequence or prompt whose keys it sees, and its position,
// which is the last that it sees.
struct Place {
  int64_t row;
  int64_t sequence;
  int64_t position;
};

// Heads of a group that are computed together, because they share keys and values.
constexpr int kSharing = 4;
// Positions of a piece.
constexpr int64_t kPieceRows = 64;
// Maximum size of heads whose keys are transposed for many rows.
constexpr int64_t kTurnedSize = 256;
// Values after those of an encoder, which may be read in whole registers.
constexpr int64_t kBehind = 32;

#define FREEEXPORT_ATTENTION __attribute__((always_inline)) inline

FREEEXPORT_ATTENTION int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

FREEEXPORT_ATTENTION int64_t first_position(const Attention& a, const Place& place) {
  return a.window && place.position >= a.window ? place.position + 1 - a.window : 0;
}
// The pieces that a row sees are first_piece to end_piece. Pieces begin at multiples of 64, so that
// all rows of a sequence share them.
FREEEXPORT_ATTENTION int64_t first_piece(const Attention& a, const Place& place) {
  return first_position(a, place) / kPieceRows;
}
FREEEXPORT_ATTENTION int64_t end_piece(const Place& place) {
  return (place.position + kPieceRows) / kPieceRows;
}
// Returns the elements of a position and head in the cache.
FREEEXPORT_ATTENTION int64_t cache_width(const Attention& a) {
  return a.cache == kBytes ? a.size + static_cast<int64_t>(sizeof(float)) : a.size;
}
// Returns the offset of a position's key and value in the cache, in elements.
FREEEXPORT_ATTENTION int64_t keys_at(const Attention& a, const Place& place, int64_t kv_head,
                                     int64_t position) {
  return ((place.sequence * a.kv_heads + kv_head) * a.capacity + position) * cache_width(a);
}
FREEEXPORT_ATTENTION int64_t element_bytes(const Attention& a) {
  return a.cache == kFloats ? 4 : a.cache == kHalves ? 2 : 1;
}

// Keys of a later piece, which are prefetched.
struct Ahead {
  const void* keys;
  int64_t rows;
};

// Memory for one row and group of heads, in floats: outputs [heads of the group][slots][size], then
// largest scores and sums of exponentials, each [heads of the group][padded slots]. Every piece has
// a slot. In a `running` room slot 0 has all earlier pieces, which the next one joins. The rooms of
// two rows are `apart`.
struct Room {
  float* values;
  int64_t slots;
  int64_t apart;
  bool running;
};
constexpr int64_t kRunningSlots = 2;

FREEEXPORT_ATTENTION int64_t padded_slots(int64_t slots) { return (slots + 15) / 16 * 16; }
FREEEXPORT_ATTENTION int64_t attention_room(const Attention& a, int64_t slots) {
  return a.heads / a.kv_heads * (slots * a.size + 2 * padded_slots(slots));
}

struct Kernels;
// Calls task(data, i) for i in 0..total, in any order and on any threads.
using Parallel = void (*)(void* context, void (*task)(void*, size_t), size_t total, void* data);

// Stores the keys and values of prompts of `capacity` rows each. Returns null, or an error about
// the memory.
const char* store_prompts(const Kernels& kernels, const Attention& attention, Parallel parallel,
                          void* context);

// Returns null, or an error about the lengths or the memory.
const char* attention(const Kernels& kernels, const Attention& attention, Parallel parallel,
                      void* context);

}  // namespace freeexport
