#include "attention.h"

#include <cstdlib>
#include <cstring>

#include "packed_linear.h"

namespace freeexport {
namespace {

// Rows per task, which may share keys: if there are few rows, and at most.
constexpr int64_t kFewPlaces = 8;
constexpr int64_t kManyPlaces = 64;
// Number of tasks per KV head for many rows, until tasks have kManyPlaces rows.
constexpr int64_t kTasksOfMany = 16;
// The same for a prompt's rows in tiles. A task may have more rows until it has kPromptQueries
// queries, because it converts the keys and values.
constexpr int64_t kBlocksOfPrompt = 4;
constexpr int64_t kPromptPlaces = 128;
constexpr int64_t kPromptQueries = 384;
// Rows per task of an encoder: whole tiles of all instruction sets, and at most.
constexpr int64_t kEncoderStep = 12;
constexpr int64_t kEncoderPlaces = 96;
// Minimum number of queries, or of rows, that share keys for which a piece of keys is transposed.
// Fewer take less time one by one if the keys are not in the processor's cache (Zen 4).
constexpr int64_t kTurnedFor = 16;
constexpr int64_t kTurnedRows = 6;
// With fewer tasks, every piece is a separate task.
constexpr int64_t kFewTasks = 16;
// With fewer values in the visible keys, one thread does everything.
constexpr int64_t kLittle = 6 << 10;
// Values of rows that one task stores.
constexpr int64_t kStoredValues = 16 << 10;

int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct Call {
  const Kernels& kernels;
  const Attention& attention;
  const Place* places;
  int64_t count;            // number of places
  int64_t pieces = 0;       // of the block with the most pieces
  int64_t task_places = 0;  // places per task
  int64_t blocks = 0;       // of task_places places each
  int64_t seen = 0;         // positions, summed over all places
  int64_t slots = 0;        // pieces per row and group of heads
  int64_t room = 0;         // floats for them
  float* rooms = nullptr;   // [kv_heads, places] rooms, or null if one task does all pieces
  bool failed = false;      // out of memory
  // Attends to all pieces with a block of a prompt's rows. Or null.
  bool (*attend_prompt)(const Attention&, const Place*, int64_t, int64_t) = nullptr;
};

// Returns the number of places that one task stores.
int64_t stored_places(const Attention& a) { return kStoredValues / (a.kv_heads * a.size * 2) + 1; }

void store_task(void* data, size_t index) {
  const Call& call = *static_cast<Call*>(data);
  const int64_t step = stored_places(call.attention);
  const int64_t first = static_cast<int64_t>(index) * step;
  for (int64_t i = first; i < least(first + step, call.count); i++) {
    Place place = call.places[i];
    if (call.attention.encoder) place.position = place.row % call.attention.capacity;
    call.kernels.store_row(call.attention, place);
  }
}

// Returns the keys of a piece. After the last piece these are the keys of the next group of heads,
// and none after the last group.
Ahead keys_of(const Attention& a, const Place& place, int64_t kv_head, int64_t piece) {
  if (piece >= end_piece(place)) {
    if (++kv_head == a.kv_heads) return {a.key, 0};
    piece = first_piece(a, place);
  }
  const int64_t position = most(first_position(a, place), piece * kPieceRows);
  return {static_cast<const char*>(a.key) + keys_at(a, place, kv_head, position) * element_bytes(a),
          least(place.position + 1, (piece + 1) * kPieceRows) - position};
}

bool sees(const Attention& a, const Place& place, int64_t piece) {
  return first_piece(a, place) <= piece && piece < end_piece(place);
}

// Places of a block, and the range of pieces that they see.
struct Block {
  const Place* first;
  const Place* last;
  int64_t piece;
  int64_t end;
};

Block block_of(const Attention& a, const Place* places, int64_t count, int64_t task_places,
               int64_t block) {
  Block found = {places + block * task_places, places + least((block + 1) * task_places, count),
                 INT64_MAX, 0};
  for (const Place* place = found.first; place < found.last; place++) {
    found.piece = least(found.piece, first_piece(a, *place));
    found.end = most(found.end, end_piece(*place));
  }
  return found;
}

// Attends to a piece with all places of a block that see it. `room` belongs to the first place.
void attend_block(const Call& call, const Block& block, int64_t kv_head, int64_t piece, Room room) {
  const Attention& a = call.attention;
  const bool turns = call.kernels.attend_rows != nullptr && a.size <= kTurnedSize;
  float* const rooms = room.values;
  for (const Place *place = block.first, *end = place; place < block.last; place = end) {
    end = place + 1;
    if (!sees(a, *place, piece)) continue;
    while (turns && end < block.last && end->sequence == place->sequence && sees(a, *end, piece))
      end++;
    room.values = rooms + (place - block.first) * room.apart;
    if (end - place >= kTurnedRows || (end - place) * a.heads >= kTurnedFor * a.kv_heads) {
      call.kernels.attend_rows(a, place, end - place, kv_head, piece, room);
      continue;
    }
    end = place + 1;
    Ahead ahead = {a.key, 0};
    if (end == block.last)
      ahead = keys_of(a, *block.first, kv_head, piece + 1);
    else if (end->sequence != place->sequence)
      ahead = keys_of(a, *end, kv_head, piece);
    call.kernels.attend(a, *place, kv_head, piece, ahead, room);
  }
}

// Attends to one piece with a block.
void piece_task(void* data, size_t index) {
  const Call& call = *static_cast<Call*>(data);
  const int64_t piece = static_cast<int64_t>(index) % call.pieces;
  const int64_t at = static_cast<int64_t>(index) / call.pieces;
  const int64_t kv_head = at % call.attention.kv_heads;
  const int64_t number = at / call.attention.kv_heads;
  const Block block = block_of(call.attention, call.places, call.count, call.task_places, number);
  if (block.piece + piece >= block.end) return;
  float* rooms = call.rooms + (kv_head * call.count + number * call.task_places) * call.room;
  attend_block(call, block, kv_head, block.piece + piece, {rooms, call.slots, call.room, false});
}

// Attends to all pieces with a block. Alternates between first and last blocks, because the last
// ones see most.
void block_task(void* data, size_t index) {
  Call& call = *static_cast<Call*>(data);
  const Attention& a = call.attention;
  const int64_t turn = static_cast<int64_t>(index) / a.kv_heads;
  const int64_t kv_head = static_cast<int64_t>(index) % a.kv_heads;
  const int64_t number = turn % 2 ? call.blocks - 1 - turn / 2 : turn / 2;
  const Block block = block_of(a, call.places, call.count, call.task_places, number);
  auto* rooms = static_cast<float*>(
      std::malloc(static_cast<size_t>(call.task_places * call.room) * sizeof(float)));
  if (rooms == nullptr) {
    __atomic_store_n(&call.failed, true, __ATOMIC_RELAXED);
    return;
  }
  for (int64_t piece = block.piece; piece < block.end; piece++)
    attend_block(call, block, kv_head, piece, {rooms, call.slots, call.room, true});
  for (const Place* place = block.first; place < block.last; place++)
    call.kernels.join(a, *place, kv_head,
                      {rooms + (place - block.first) * call.room, call.slots, call.room, true});
  std::free(rooms);
}

// Attends to all pieces with a block of a prompt's rows.
void prompt_task(void* data, size_t index) {
  Call& call = *static_cast<Call*>(data);
  const Attention& a = call.attention;
  const int64_t turn = static_cast<int64_t>(index) / a.kv_heads;
  const int64_t kv_head = static_cast<int64_t>(index) % a.kv_heads;
  const int64_t number = turn % 2 ? call.blocks - 1 - turn / 2 : turn / 2;
  const Place* last = call.places + least((number + 1) * call.task_places, call.count);
  for (const Place *place = call.places + number * call.task_places, *end = place; place < last;
       place = end) {
    while (end < last && end->sequence == place->sequence) end++;
    if (!call.attend_prompt(a, place, end - place, kv_head))
      __atomic_store_n(&call.failed, true, __ATOMIC_RELAXED);
  }
}

// Returns the first position whose rows are computed in tiles, if any are. This depends only on the
// kind of the call and the model's sizes. Encoders have no decoding steps, so all their rows are.
int64_t first_in_tiles(const Kernels& kernels, const Attention& a) {
  const bool own = a.encoder || !a.cross_lengths;
  const bool fits = !a.bias && a.size <= kTurnedSize && a.scale > 0.0f && a.cache != kBytes;
  if (!a.prompt || !kernels.attend_prompt || !own || !fits) return INT64_MAX;
  return a.encoder ? 0 : kernels.prompt_from;
}

// Moves places from position `first` on behind the others, in order, to `late`. Returns the number
// of the others.
int64_t split_places(Place* places, int64_t count, int64_t first, Place* late) {
  int64_t early = 0;
  for (int64_t i = 0; i < count; i++) {
    if (places[i].position < first)
      places[early++] = places[i];
    else
      late[i - early] = places[i];
  }
  return early;
}

void run(Parallel parallel, void* context, void (*task)(void*, size_t), int64_t total, Call& call) {
  if (parallel == nullptr || total == 1)
    for (int64_t i = 0; i < total; i++) task(&call, static_cast<size_t>(i));
  else if (total > 1)
    parallel(context, task, static_cast<size_t>(total), &call);
}

// Attends with few rows: threads share the pieces, and one of them joins the results.
void attend_few(Parallel parallel, void* context, Call& call) {
  const Attention& a = call.attention;
  const int64_t rooms = a.kv_heads * call.count;
  call.rooms =
      static_cast<float*>(std::malloc(static_cast<size_t>(rooms * call.room) * sizeof(float)));
  if (call.rooms == nullptr) {
    call.failed = true;
    return;
  }
  const bool little = call.seen * a.kv_heads * a.size < kLittle;
  run(little ? nullptr : parallel, context, piece_task, call.blocks * a.kv_heads * call.pieces,
      call);
  for (int64_t i = 0; i < rooms; i++)
    call.kernels.join(a, call.places[i % call.count], i / call.count,
                      {call.rooms + i * call.room, call.slots, call.room, false});
  std::free(call.rooms);
}

// Returns the index of a sequence's keys and values.
int64_t prompt_of(const Attention& a, int64_t sequence) { return sequence / (a.batch / a.prompts); }

const char* check_lengths(const Attention& a) {
  int64_t counted = 0;
  for (int64_t b = 0; b < a.batch; b++) {
    const int64_t query = a.query_lengths[b];
    const int64_t past = a.cross_lengths ? a.cross_lengths[prompt_of(a, b)] : a.past_lengths[b];
    if (past < 0 || query < 0) return "a length is negative";
    if (a.cross_lengths && past > a.capacity) return "cross_lengths go beyond the keys";
    if (!a.cross_lengths && past + query > a.capacity)
      return "past_lengths and query_lengths go beyond the cache";
    if (a.cosine != nullptr && past + query > a.positions)
      return "positions go beyond the rotary tables";
    if (!a.packed && query * a.batch > a.rows)
      return "query_lengths go beyond the rows of a sequence";
    counted += query;
  }
  return a.packed && counted != a.rows ? "query_lengths do not add up to the rows" : nullptr;
}

// Lists the valid rows in order and returns their number. Sets y of all other rows to 0.
int64_t find_places(const Attention& a, Place* places) {
  const int64_t width = a.heads * a.size;
  const int64_t rows = a.batch ? a.rows / a.batch : 0;
  int64_t count = 0;
  for (int64_t b = 0; b < a.batch; b++) {
    const int64_t query = a.query_lengths[b];
    const int64_t first = a.packed ? count : b * rows;
    const int64_t prompt = prompt_of(a, b);
    for (int64_t i = 0; i < query; i++, count++)
      places[count] = {first + i, prompt,
                       a.cross_lengths ? a.cross_lengths[prompt] - 1 : a.past_lengths[b] + i};
    if (!a.packed && query < rows)
      std::memset(a.y + (first + query) * width, 0,
                  static_cast<size_t>((rows - query) * width) * sizeof(float));
  }
  return count;
}

// Copies past keys and values if the cache is not extended in place.
void copy_past(const Attention& a) {
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t head = 0; head < a.kv_heads; head++) {
      const int64_t row_bytes = cache_width(a) * element_bytes(a);
      const int64_t at = (b * a.kv_heads + head) * a.capacity * row_bytes;
      const auto bytes = static_cast<size_t>(a.past_lengths[b] * row_bytes);
      const auto copy = [&](void* to, const void* from) {
        if (to != from)
          std::memcpy(static_cast<char*>(to) + at, static_cast<const char*>(from) + at, bytes);
      };
      copy(a.key, a.past_key);
      copy(a.value, a.past_value);
    }
}

// Attends with some places of a call. Returns false if out of memory.
bool attend_places(const Kernels& kernels, const Attention& a, const Place* places, int64_t count,
                   bool tiles, Parallel parallel, void* context) {
  const auto attend_prompt = tiles       ? kernels.attend_prompt
                             : a.encoder ? kernels.attend_encoder
                                         : nullptr;
  const auto blocks_of = [&](int64_t step, int64_t most_places) {
    return most(step, least(count / kBlocksOfPrompt / step * step, most_places));
  };
  const int64_t prompt_places = most(kPromptPlaces, kPromptQueries * a.kv_heads / a.heads);
  const int64_t task_places = tiles       ? blocks_of(16, prompt_places)
                              : a.encoder ? blocks_of(kEncoderStep, kEncoderPlaces)
                              : count < kTasksOfMany * kFewPlaces
                                  ? kFewPlaces
                                  : least(count / kTasksOfMany / 8 * 8, kManyPlaces);
  Call call = {kernels, a, places, count};
  call.task_places = task_places;
  call.blocks = (count + task_places - 1) / task_places;
  call.attend_prompt = attend_prompt;
  for (int64_t block = 0; block < call.blocks; block++) {
    const Block all = block_of(a, places, count, task_places, block);
    call.pieces = most(call.pieces, all.end - all.piece);
  }
  for (int64_t i = 0; i < count; i++) {
    call.slots = most(call.slots, end_piece(places[i]) - first_piece(a, places[i]));
    call.seen += places[i].position + 1 - first_position(a, places[i]);
  }
  const bool few = !attend_prompt && call.blocks * a.kv_heads < kFewTasks && call.pieces > 0;
  if (!few) call.slots = kRunningSlots;
  call.room = attention_room(a, call.slots);
  if (attend_prompt)
    run(parallel, context, prompt_task, call.blocks * a.kv_heads, call);
  else if (few)
    attend_few(parallel, context, call);
  else
    run(parallel, context, block_task, call.blocks * a.kv_heads, call);
  return !call.failed;
}

// Stores the keys and values of a call's rows in the cache.
void store(const Kernels& kernels, const Attention& a, const Place* places, int64_t count,
           Parallel parallel, void* context) {
  Call call = {kernels, a, places, count};
  const int64_t step = stored_places(a);
  run(parallel, context, store_task, (count + step - 1) / step, call);
}

Place* places_of(const Attention& a) {
  return static_cast<Place*>(std::malloc(static_cast<size_t>(2 * a.rows + 1) * sizeof(Place)));
}

constexpr const char* kNoPlaces = "no memory for the rows of a call";

}  // namespace

const char* store_prompts(const Kernels& kernels, const Attention& a, Parallel parallel,
                          void* context) {
  Place* places = places_of(a);
  if (places == nullptr) return kNoPlaces;
  for (int64_t row = 0; row < a.rows; row++)
    places[row] = {row, row / a.capacity, row % a.capacity};
  store(kernels, a, places, a.rows, parallel, context);
  std::free(places);
  return nullptr;
}

const char* attention(const Kernels& kernels, const Attention& a, Parallel parallel,
                      void* context) {
  if (const char* problem = check_lengths(a)) return problem;
  Place* places = places_of(a);
  if (places == nullptr) return kNoPlaces;
  const int64_t count = find_places(a, places);
  if (!a.cross_lengths) copy_past(a);
  // Queries of a cache in 8 bits are quantized.
  if (!a.cross_lengths || a.encoder || a.cache == kBytes)
    store(kernels, a, places, count, parallel, context);
  Place* late = places + count;
  const int64_t early = split_places(places, count, first_in_tiles(kernels, a), late);
  bool done = early == 0 || attend_places(kernels, a, places, early, false, parallel, context);
  if (done && early < count)
    done = attend_places(kernels, a, late, count - early, true, parallel, context);
  std::free(places);
  return done ? nullptr : "no memory for the scores of a row";
}

}  // namespace freeexport
