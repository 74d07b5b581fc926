#include "attention.h"

#include <cstdlib>
#include <cstring>

#include "packed_linear.h"

namespace freeexport {
namespace {

// Products of one task at least, so that handing it to a thread is worth while.
constexpr int64_t kTaskProducts = 32 << 10;
// Values of rows that are stored by one task.
constexpr int64_t kStoredValues = 16 << 10;

struct Call {
  const Kernels& kernels;
  const Attention& attention;
  const Place* places;
  int64_t count;         // of places
  int64_t stored_places;  // that one task stores
  int64_t task_units;    // that one task attends with: places times groups of heads
  bool failed;           // for want of memory
};

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

void store_task(void* data, size_t index) {
  const Call& call = *static_cast<Call*>(data);
  const int64_t first = static_cast<int64_t>(index) * call.stored_places;
  for (int64_t i = first; i < least(first + call.stored_places, call.count); i++)
    call.kernels.store_row(call.attention, call.places[i]);
}

void attend_task(void* data, size_t index) {
  Call& call = *static_cast<Call*>(data);
  const Attention& a = call.attention;
  auto* room = static_cast<float*>(std::malloc(static_cast<size_t>(attention_room(a)) * sizeof(float)));
  if (room == nullptr) {
    __atomic_store_n(&call.failed, true, __ATOMIC_RELAXED);
    return;
  }
  const int64_t first = static_cast<int64_t>(index) * call.task_units;
  for (int64_t unit = first; unit < least(first + call.task_units, call.count * a.kv_heads); unit++)
    call.kernels.attend(a, call.places[unit / a.kv_heads], unit % a.kv_heads, room);
  std::free(room);
}

void run(Parallel parallel, void* context, void (*task)(void*, size_t), int64_t total, Call& call) {
  if (total == 1)
    task(&call, 0);
  else if (total > 1)
    parallel(context, task, static_cast<size_t>(total), &call);
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
    if (!a.packed)
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
  int64_t longest = 1;
  for (int64_t i = 0; i < count; i++) longest = longest < places[i].position ? places[i].position : longest;
  const int64_t products = a.heads / a.kv_heads * longest * a.size * 2, values = a.kv_heads * a.size * 2;
  Call call = {kernels, a, places, count, kStoredValues / values + 1, kTaskProducts / products + 1, false};
  if (!a.cross_lengths)
    run(parallel, context, store_task, (count + call.stored_places - 1) / call.stored_places, call);
  run(parallel, context, attend_task, (count * a.kv_heads + call.task_units - 1) / call.task_units, call);
  std::free(places);
  return call.failed ? "no memory for the scores of a row" : nullptr;
}

}  // namespace freeexport
