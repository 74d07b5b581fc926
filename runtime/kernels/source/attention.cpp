#include "attention.h"

#include <cstdlib>
#include <cstring>

#include "packed_linear.h"

namespace freeexport {
namespace {

// Rows whose pieces one task attends with, as they may share keys: of few rows, and of many.
constexpr int64_t kFewPlaces = 8, kManyPlaces = 32;
// Queries that share keys from which on a piece of these is turned.
constexpr int64_t kTurnedFor = 12;
// Floats of the rooms of a task, at most, where it has many rows.
constexpr int64_t kManyRooms = 4 << 20;
// With fewer tasks than these each piece is a task of its own.
constexpr int64_t kFewTasks = 16;
// Values of keys that are seen, below which one thread does all.
constexpr int64_t kLittle = 6 << 10;
// Values of rows that are stored by one task.
constexpr int64_t kStoredValues = 16 << 10;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct Call {
  const Kernels& kernels;
  const Attention& attention;
  const Place* places;
  int64_t count;          // of places
  int64_t stored_places;  // that one task stores
  int64_t pieces;         // of the row that has most
  int64_t task_places;    // that share a task
  int64_t blocks;         // of so many places
  int64_t seen;           // positions, of all places
  int64_t room;           // of the pieces of a row and group of heads
  float* rooms;           // [kv_heads, places] of these, or null, where one task does all pieces
  bool failed;            // for want of memory
};

void store_task(void* data, size_t index) {
  const Call& call = *static_cast<Call*>(data);
  const int64_t first = static_cast<int64_t>(index) * call.stored_places;
  for (int64_t i = first; i < least(first + call.stored_places, call.count); i++)
    call.kernels.store_row(call.attention, call.places[i]);
}

// The keys of a piece; those of the next group of heads where there is no such piece, and none behind the last group.
Ahead keys_of(const Attention& a, const Place& place, int64_t kv_head, int64_t piece) {
  if (piece >= pieces_of(a, place)) {
    if (++kv_head == a.kv_heads) return {a.key, 0};
    piece = 0;
  }
  const int64_t position = first_position(a, place) + piece * kPieceRows;
  return {a.key + keys_at(a, place, kv_head, position), least(place.position + 1 - position, kPieceRows)};
}

// Whether the first keys that two rows see are the same. Of a sequence, later rows stand further behind.
bool begin_alike(const Attention& a, const Place& one, const Place& other) {
  return one.sequence == other.sequence && first_position(a, one) == first_position(a, other);
}

// A piece of all places of a block; of room i that of the block's place i.
void attend_block(const Call& call, int64_t block, int64_t kv_head, int64_t piece, float* rooms) {
  const int64_t first = block * call.task_places, last = least(first + call.task_places, call.count);
  const Attention& a = call.attention;
  const bool turns = call.kernels.attend_rows != nullptr && a.size <= kTurnedSize;
  for (int64_t i = first, end = first; i < last; i++) {
    const Place& place = call.places[i];
    if (piece >= pieces_of(a, place)) continue;
    for (end = i + 1; turns && end < last && begin_alike(a, place, call.places[end]);) end++;
    if ((end - i) * a.heads >= kTurnedFor * a.kv_heads) {
      call.kernels.attend_rows(a, &place, end - i, kv_head, piece, rooms + (i - first) * call.room, call.room);
      i = end - 1;
      continue;
    }
    Ahead ahead = {a.key, 0};
    if (i + 1 == last)
      ahead = keys_of(a, call.places[first], kv_head, piece + 1);
    else if (call.places[i + 1].sequence != place.sequence)
      ahead = keys_of(a, call.places[i + 1], kv_head, piece);
    call.kernels.attend(a, place, kv_head, piece, ahead, rooms + (i - first) * call.room);
  }
}

void join_block(const Call& call, int64_t block, int64_t kv_head, float* rooms) {
  const int64_t first = block * call.task_places, last = least(first + call.task_places, call.count);
  for (int64_t i = first; i < last; i++)
    call.kernels.join(call.attention, call.places[i], kv_head, rooms + (i - first) * call.room);
}

// One piece of a block.
void piece_task(void* data, size_t index) {
  const Call& call = *static_cast<Call*>(data);
  const int64_t piece = static_cast<int64_t>(index) % call.pieces, at = static_cast<int64_t>(index) / call.pieces;
  const int64_t block = at / call.attention.kv_heads, kv_head = at % call.attention.kv_heads;
  attend_block(call, block, kv_head, piece, call.rooms + (kv_head * call.count + block * call.task_places) * call.room);
}

// All pieces of a block.
void block_task(void* data, size_t index) {
  Call& call = *static_cast<Call*>(data);
  const int64_t block = static_cast<int64_t>(index) / call.attention.kv_heads;
  const int64_t kv_head = static_cast<int64_t>(index) % call.attention.kv_heads;
  auto* rooms = static_cast<float*>(std::malloc(static_cast<size_t>(call.task_places * call.room) * sizeof(float)));
  if (rooms == nullptr) {
    __atomic_store_n(&call.failed, true, __ATOMIC_RELAXED);
    return;
  }
  for (int64_t piece = 0; piece < call.pieces; piece++) attend_block(call, block, kv_head, piece, rooms);
  join_block(call, block, kv_head, rooms);
  std::free(rooms);
}

void run(Parallel parallel, void* context, void (*task)(void*, size_t), int64_t total, Call& call) {
  if (parallel == nullptr || total == 1)
    for (int64_t i = 0; i < total; i++) task(&call, static_cast<size_t>(i));
  else if (total > 1)
    parallel(context, task, static_cast<size_t>(total), &call);
}

// Few rows: threads share the pieces, which one of them joins.
void attend_few(Parallel parallel, void* context, Call& call) {
  const Attention& a = call.attention;
  const int64_t rooms = a.kv_heads * call.count;
  call.rooms = static_cast<float*>(std::malloc(static_cast<size_t>(rooms * call.room) * sizeof(float)));
  if (call.rooms == nullptr) {
    call.failed = true;
    return;
  }
  const bool little = call.seen * a.kv_heads * a.size < kLittle;
  run(little ? nullptr : parallel, context, piece_task, call.blocks * a.kv_heads * call.pieces, call);
  for (int64_t i = 0; i < rooms; i++)
    call.kernels.join(a, call.places[i % call.count], i / call.count, call.rooms + i * call.room);
  std::free(call.rooms);
}

const char* check_lengths(const Attention& a) {
  int64_t counted = 0;
  for (int64_t b = 0; b < a.batch; b++) {
    const int64_t query = a.query_lengths[b];
    const int64_t past = a.cross_lengths ? a.cross_lengths[b] : a.past_lengths[b];
    if (past < 0 || query < 0) return "a length is negative";
    if (a.cross_lengths && past > a.capacity) return "cross_lengths go beyond the keys";
    if (!a.cross_lengths && past + query > a.capacity) return "past_lengths and query_lengths go beyond the cache";
    if (a.cosine != nullptr && past + query > a.positions) return "positions go beyond the rotary tables";
    if (!a.packed && query * a.batch > a.rows) return "query_lengths go beyond the rows of a sequence";
    counted += query;
  }
  return a.packed && counted != a.rows ? "query_lengths do not add up to the rows" : nullptr;
}

// The rows that count, in order. The others are 0 in y.
int64_t find_places(const Attention& a, Place* places) {
  const int64_t width = a.heads * a.size, rows = a.batch ? a.rows / a.batch : 0;
  int64_t count = 0;
  for (int64_t b = 0; b < a.batch; b++) {
    const int64_t query = a.query_lengths[b], first = a.packed ? count : b * rows;
    for (int64_t i = 0; i < query; i++, count++)
      places[count] = {first + i, b, a.cross_lengths ? a.cross_lengths[b] - 1 : a.past_lengths[b] + i};
    if (!a.packed && query < rows)
      std::memset(a.y + (first + query) * width, 0, static_cast<size_t>((rows - query) * width) * sizeof(float));
  }
  return count;
}

// Where the cache is not extended in place.
void copy_past(const Attention& a) {
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t head = 0; head < a.kv_heads; head++) {
      const int64_t at = (b * a.kv_heads + head) * a.capacity * a.size;
      const size_t bytes = static_cast<size_t>(a.past_lengths[b] * a.size) * sizeof(float);
      if (a.key != a.past_key) std::memcpy(a.key + at, a.past_key + at, bytes);
      if (a.value != a.past_value) std::memcpy(a.value + at, a.past_value + at, bytes);
    }
}

}  // namespace

const char* attention(const Kernels& kernels, const Attention& a, Parallel parallel, void* context) {
  if (const char* problem = check_lengths(a)) return problem;
  auto* places = static_cast<Place*>(std::malloc(static_cast<size_t>(a.rows + 1) * sizeof(Place)));
  if (places == nullptr) return "no memory for the rows of a call";
  const int64_t count = find_places(a, places);
  if (!a.cross_lengths) copy_past(a);
  int64_t pieces = 0, seen = 0;
  for (int64_t i = 0; i < count; i++) {
    pieces = most(pieces, pieces_of(a, places[i]));
    seen += places[i].position + 1 - first_position(a, places[i]);
  }
  const int64_t values = a.kv_heads * a.size * 2, room = attention_room(a, pieces);
  const bool many = count >= 2 * kManyPlaces && kManyPlaces * room <= kManyRooms;
  const int64_t task_places = many ? kManyPlaces : kFewPlaces, blocks = (count + task_places - 1) / task_places;
  Call call = {kernels, a, places, count, kStoredValues / values + 1, pieces, task_places, blocks, seen, room, nullptr, false};
  if (!a.cross_lengths)
    run(parallel, context, store_task, (count + call.stored_places - 1) / call.stored_places, call);
  if (blocks * a.kv_heads < kFewTasks && pieces > 0)
    attend_few(parallel, context, call);
  else
    run(parallel, context, block_task, blocks * a.kv_heads, call);
  std::free(places);
  return call.failed ? "no memory for the scores of a row" : nullptr;
}

}  // namespace freeexport
