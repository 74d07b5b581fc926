#include "packed_linear.h"

#include <cstdlib>
#include <cstring>

namespace freeexport {
namespace {

// Minimum number of bytes that a task reads, so that a thread is worth its overhead.
constexpr int64_t kTaskBytes = 24 << 10;
// A weight is read in longer streams, up to kStreamBytes, as long as each core has kTasksOfCore
// tasks. A token takes 2 to 4 % less time (Zen 4, 2 threads).
constexpr int64_t kStreamBytes = 96 << 10;
constexpr int64_t kTasksOfCore = 4;
// If all rows have more inputs than kManyInputs, they are prepared in parallel, kPreparedRows per
// task.
constexpr int64_t kManyInputs = 64 << 10;
constexpr int64_t kPreparedRows = 8;
// Bytes of prepared rows that are kept on the stack. Allocating them takes as long as quantizing a
// row.
constexpr size_t kFewBytes = 16 << 10;

// Best first.
const Kernels* const kAll[] = {
#if defined(__x86_64__)
    &kAmx,    &kAvx512Bf16, &kAvx512Vnni, &kAvx512, &kAvx2Vnni, &kAvx2,
#elif defined(__aarch64__)
    &kNeonI8mm, &kNeon,
#endif
    &kScalar, &kScalarBf16,
};

struct Call {
  const Kernels& kernels;
  const Product& product;
  Group* quantized;  // quantized rows, or null
  float* floats;     // rows in fp32, or null
  uint16_t* prompt;  // a prompt's rows in tiles, or null
  float* normed;     // memory for a row [inputs] per task, if there is a norm
  int64_t task_panels;
  int64_t task_rows;
  int64_t row_blocks;
};

int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// Returns true for a head, a weight with many more outputs than inputs. A prompt needs only one row
// of its result, so unpacking the weight would take longer.
bool is_head(const Product& product) {
  return product.weight.outputs > 16 * product.weight.inputs && !product.up.data &&
         product.activation == kNone;
}

void prepare_rows(const Call& call, int64_t first, int64_t last) {
  float* normed =
      call.normed ? call.normed + first / kPreparedRows * call.product.weight.inputs : nullptr;
  for (int64_t row = first; row < last; row++) {
    if (call.prompt)
      call.kernels.prepare_prompt(call.product, row, normed, call.prompt);
    else if (call.floats)
      call.kernels.prepare_floats(call.product, row, normed, call.floats);
    else
      call.kernels.prepare(call.product, row, normed, call.quantized);
  }
}

void prepare_task(void* data, size_t index) {
  const Call& call = *static_cast<Call*>(data);
  const int64_t first = static_cast<int64_t>(index) * kPreparedRows;
  prepare_rows(call, first, least(first + kPreparedRows, call.product.rows));
}

void panel_task(void* data, size_t index) {
  const Call& call = *static_cast<Call*>(data);
  const int64_t first = static_cast<int64_t>(index) % call.row_blocks * call.task_rows;
  const int64_t last = least(first + call.task_rows, call.product.rows);
  const int64_t panel = static_cast<int64_t>(index) / call.row_blocks * call.task_panels;
  const int64_t end = least(panel + call.task_panels, call.product.panels());
  if (call.prompt)
    call.kernels.prompt_panels(call.product, call.prompt, first, last, panel, end);
  else if (call.floats)
    call.kernels.float_panels(call.product, call.floats, first, last, panel, end);
  else
    call.kernels.panels(call.product, call.quantized, first, last, panel, end);
}

void run(Parallel parallel, void* context, void (*task)(void*, size_t), int64_t total, Call& call) {
  if (total == 1)
    task(&call, 0);
  else
    parallel(context, task, static_cast<size_t>(total), &call);
}

}  // namespace

bool packed_linear(const Kernels& kernels, const Product& product, Parallel parallel,
                   void* context) {
  const Weight& weight = product.weight;
  const int64_t rows = product.rows;
  if (rows == 0) return true;
  const bool floats = weight.float_rows();
  const bool tiles = product.prompt && kernels.prompt_panels && !is_head(product) && !floats;
  const int64_t quantized = product.quantized_rows();
  const int64_t all = tiles ? parts(rows, kTileRows) * kTileRows : quantized;
  const auto groups = static_cast<size_t>(all * weight.groups());
  const auto inputs = static_cast<size_t>(parts(rows, kPreparedRows) * weight.inputs);
  const size_t wide = has_wide_rows(product) ? kGroup * sizeof(int16_t) : 0;
  const size_t of_group = tiles    ? kGroup * sizeof(uint16_t)
                          : floats ? kGroup * sizeof(float)
                                   : sizeof(Group) + wide;
  const size_t prepared = groups * of_group;
  const size_t normed = product.norm && !product.keeps_norm ? inputs * sizeof(float) : 0;
  const bool few = prepared + normed <= kFewBytes;
  alignas(64) char own[kFewBytes];
  char* memory = few ? own : static_cast<char*>(allocate(prepared + normed));
  if (memory == nullptr) return false;
  const int64_t task_rows = tiles ? kPromptRows : kTaskRows >> weight.pairs;
  Call call = {kernels, product, nullptr, nullptr, nullptr, nullptr, 0, task_rows, 0};
  if (floats)
    call.floats = reinterpret_cast<float*>(memory);
  else if (tiles)
    call.prompt = reinterpret_cast<uint16_t*>(memory);
  else
    call.quantized = reinterpret_cast<Group*>(memory);
  if (normed) call.normed = reinterpret_cast<float*>(memory + prepared);
  int64_t panel_bytes = weight.groups() * weight.group_bytes();
  if (product.up.data != nullptr && !product.beside)
    panel_bytes += weight.groups() * product.up.group_bytes();
  call.row_blocks = parts(rows, call.task_rows);
  int64_t task_bytes = kTaskBytes;
  if (call.row_blocks == 1) {
    const int64_t share = panel_bytes * product.panels() / (kTasksOfCore * kCores);
    task_bytes = share < kTaskBytes ? kTaskBytes : least(share, kStreamBytes);
  }
  call.task_panels = panel_bytes < task_bytes ? task_bytes / panel_bytes : 1;
  // Multiplied in pairs.
  if (quantized > 1 || tiles || weight.exact) call.task_panels += call.task_panels % 2;
  if (quantized * weight.inputs > kManyInputs)
    run(parallel, context, prepare_task, parts(rows, kPreparedRows), call);
  else
    prepare_rows(call, 0, rows);
  run(parallel, context, panel_task, parts(product.panels(), call.task_panels) * call.row_blocks,
      call);
  if (!few) release(memory);
  return true;
}

const Kernels* find_kernels(const char* name) {
  for (const Kernels* kernels : kAll)
    if (std::strcmp(kernels->name, name) == 0) return kernels;
  return nullptr;
}

const Kernels* choose_kernels(const char** problem) {
  const char* wanted = std::getenv("FREEEXPORT_INSTRUCTIONS");
  if (wanted == nullptr || *wanted == '\0') {
    for (const Kernels* kernels : kAll)
      if (kernels->supported()) return kernels;
  }
  const Kernels* found = find_kernels(wanted);
  if (found == nullptr) {
    *problem =
        "FREEEXPORT_INSTRUCTIONS names no instruction set of freeexport's kernels; choose scalar, "
#if defined(__x86_64__)
        "avx2, avx2-vnni, avx512, avx512-vnni, avx512-bf16 or amx, or unset it";
#elif defined(__aarch64__)
        "neon or neon-i8mm, or unset it";
#else
        "or unset it";
#endif
  } else if (!found->supported()) {
    *problem =
        "FREEEXPORT_INSTRUCTIONS names instructions that this processor lacks, or that its system "
        "refuses; unset it";
    found = nullptr;
  }
  return found;
}

const char* check_sizes(int64_t outputs, int64_t inputs, int64_t bits, int64_t block) {
  constexpr int64_t kMost = int64_t{1} << 28;
  if (outputs < 1 || outputs > kMost || inputs < 1 || inputs > kMost)
    return "N or K is out of range";
  if (bits == 16 || bits == 32)
    return block == kGroup ? nullptr : "block_size of 16 and 32 bits is not 32";
  if (bits != 4 && bits != 5 && bits != 6 && bits != 8) return "bits is not 4, 5, 6, 8, 16 or 32";
  if (bits == 6) return block == kGroup / 2 ? nullptr : "block_size of 6 bits is not 16";
  if (block < kGroup || block > kMost || block % kGroup != 0)
    return "block_size is no multiple of 32";
  return nullptr;
}

const char* check_form(const Weight& weight, bool scales, bool zeros, bool offsets,
                       bool multiples) {
  if (scales == weight.floats())
    return "scales go with weights of at most 8 bits, and these with scales";
  if (weight.floats())
    return zeros || offsets || multiples
               ? "16 and 32 bits go with no zero points, offsets or multiples"
               : nullptr;
  if (offsets && (weight.bits > 5 || zeros))
    return "offsets go with 4 and 5 bits, and with no zero points";
  if (zeros && weight.bits != 4 && weight.bits != 8) return "zero points go with 4 and 8 bits";
  if (multiples != (weight.bits == 6) && !(multiples && offsets && weight.block == kGroup))
    return "multiples go with 6 bits, or with offsets and a block_size of 32";
  if (multiples && weight.inputs % kSuper != 0)
    return "K is no multiple of 256, as multiples want it";
  return nullptr;
}

}  // namespace freeexport
