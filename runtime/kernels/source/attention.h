// Attention of a decoder over its KV cache, which it extends in place: every row of a call sees what stands before it in
// its sequence, and itself; or, with `cross_lengths`, over the keys and values of a prompt.
//
// A row is summed in an order that is its own, whatever else is in the call: what it sees is cut into pieces, each with
// a largest score and sums of its own, which threads may share; they are joined one after the other.
#pragma once

#include <cstddef>
#include <cstdint>

namespace freeexport {

struct Attention {
  int64_t batch, rows;  // sequences, and rows of all of them
  int64_t heads, kv_heads, size, capacity;
  int64_t width;              // of a row of input: (heads + 2 kv_heads) * size, or heads * size of cross-attention
  float scale;
  float softcap;              // scores become softcap * tanh(score / softcap); 0 for none
  int64_t window;             // newest positions that a row sees, itself included; 0 for all
  const float* input;         // [rows, width]: query, key, value
  bool halves;                // keys and values are in float16, else in fp32
  const void* past_key;       // [batch, kv_heads, capacity, size], as the next three
  const void* past_value;
  void* key;                  // what is attended to: the same memory as the past's, or another that is filled
  void* value;
  const int32_t* cross_lengths;  // [batch]: valid positions of keys that all rows see; or null
  const int32_t* past_lengths;   // [batch]: valid positions before the call
  const int32_t* query_lengths;  // [batch]: rows that count
  bool packed;                // rows that count stand side by side; else each sequence has rows / batch of them
  const float* cosine;        // [positions, turned] of rotary halves, or null
  const float* sine;
  int64_t positions, turned;  // pairs of a head that are turned: at most size / 2
  const float* bias;          // [reach + 1, heads] by distance, the last for all that is further; or null
  int64_t reach;
  const float* query_norm;    // [size], or null: each head's own norm
  const float* key_norm;
  float epsilon;
  float* y;                   // [rows, heads * size]; rows that do not count are 0
  int prompt;                 // rows of a prompt: these may have bits of their own, see `attend_prompt`
};

// A row that counts: where it stands in the call, and in which sequence at which position, the last that it sees.
struct Place {
  int64_t row, sequence, position;
};

// Heads of a group that are summed side by side: they share keys and values.
constexpr int kSharing = 4;
// Positions that are weighed together.
constexpr int64_t kPieceRows = 64;
// Size of heads, at most, whose keys are turned for many rows.
constexpr int64_t kTurnedSize = 256;

#define FREEEXPORT_ATTENTION __attribute__((always_inline)) inline

FREEEXPORT_ATTENTION int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

FREEEXPORT_ATTENTION int64_t first_position(const Attention& a, const Place& place) {
  return a.window && place.position >= a.window ? place.position + 1 - a.window : 0;
}
// Pieces begin at every 64th position, so that all rows of a sequence share them; those that a row sees.
FREEEXPORT_ATTENTION int64_t first_piece(const Attention& a, const Place& place) {
  return first_position(a, place) / kPieceRows;
}
FREEEXPORT_ATTENTION int64_t end_piece(const Place& place) { return (place.position + kPieceRows) / kPieceRows; }
// Where the key and the value of a position stand in the cache, in values.
FREEEXPORT_ATTENTION int64_t keys_at(const Attention& a, const Place& place, int64_t kv_head, int64_t position) {
  return ((place.sequence * a.kv_heads + kv_head) * a.capacity + position) * a.size;
}
FREEEXPORT_ATTENTION int64_t value_bytes(const Attention& a) { return a.halves ? 2 : 4; }

// Keys of a later piece, which are fetched meanwhile.
struct Ahead {
  const void* keys;
  int64_t rows;
};

// Room for one row and group of heads, of floats: [heads of the group][slots][size] of outputs, and [heads of the group]
// [padded slots] of largest scores and of sums of exponentials. Each piece has a slot; or, in a room that is `running`,
// all that come first have slot 0, which the next one joins. Rooms of rows stand `apart`.
struct Room {
  float* values;
  int64_t slots, apart;
  bool running;
};
constexpr int64_t kRunningSlots = 2;

FREEEXPORT_ATTENTION int64_t padded_slots(int64_t slots) { return (slots + 15) / 16 * 16; }
FREEEXPORT_ATTENTION int64_t attention_room(const Attention& a, int64_t slots) {
  return a.heads / a.kv_heads * (slots * a.size + 2 * padded_slots(slots));
}

struct Kernels;
// Calls task(data, i) for i in 0..total, in any order, on any threads.
using Parallel = void (*)(void* context, void (*task)(void*, size_t), size_t total, void* data);

// Null, or what is wrong with the lengths or the memory.
const char* attention(const Kernels& kernels, const Attention& attention, Parallel parallel, void* context);

}  // namespace freeexport
