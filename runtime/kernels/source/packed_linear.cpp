#include "packed_linear.h"

#include <cstdlib>
#include <cstring>

namespace freeexport {
namespace {

// What one task does at least, so that handing it to a thread is worth while: bytes of weights, and rows of a block.
constexpr int64_t kTaskBytes = 24 << 10, kTaskRows = 64;
// Inputs of all rows beyond which they are quantized in parallel, so many rows a task.
constexpr int64_t kManyInputs = 64 << 10, kQuantizedRows = 8;

const Kernels* const kAll[] = {  // the best first
#if defined(__x86_64__)
    &kAvx512Vnni, &kAvx512, &kAvx2Vnni, &kAvx2,
#endif
    &kScalar,
};

struct Call {
  const Kernels& kernels;
  const float* x;
  int64_t rows;
  const Weight& weight;
  float* y;
  Rows quantized;
  int64_t task_panels, row_blocks;
};

int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

void quantize_task(void* data, size_t index) {
  const Call& call = *static_cast<Call*>(data);
  const int64_t first = static_cast<int64_t>(index) * kQuantizedRows;
  for (int64_t row = first; row < least(first + kQuantizedRows, call.rows); row++)
    call.kernels.quantize(call.x + row * call.weight.inputs, call.weight.inputs, call.quantized, row);
}

void panel_task(void* data, size_t index) {
  const Call& call = *static_cast<Call*>(data);
  const int64_t first = static_cast<int64_t>(index) % call.row_blocks * kTaskRows;
  const int64_t panel = static_cast<int64_t>(index) / call.row_blocks * call.task_panels;
  for (int64_t p = panel; p < least(panel + call.task_panels, call.weight.panels()); p++)
    call.kernels.panel(call.quantized, first, least(first + kTaskRows, call.rows), call.weight, p, call.y);
}

void run(Parallel parallel, void* context, void (*task)(void*, size_t), int64_t total, Call& call) {
  if (total == 1)
    task(&call, 0);
  else
    parallel(context, task, static_cast<size_t>(total), &call);
}

}  // namespace

bool packed_linear(const Kernels& kernels, const float* x, int64_t rows, const Weight& weight, float* y,
                   Parallel parallel, void* context) {
  if (rows == 0) return true;
  const size_t groups = static_cast<size_t>(rows * weight.groups());
  auto* memory = static_cast<int8_t*>(std::malloc(groups * (kGroup + sizeof(float) + sizeof(int32_t))));
  if (memory == nullptr) return false;
  auto* scales = reinterpret_cast<float*>(memory + groups * kGroup);
  const Rows quantized = {memory, scales, reinterpret_cast<int32_t*>(scales + groups)};
  const int64_t panel_bytes = weight.groups() * weight.group_bytes();
  const int64_t task_panels = panel_bytes < kTaskBytes ? kTaskBytes / panel_bytes : 1;
  Call call = {kernels, x, rows, weight, y, quantized, task_panels, parts(rows, kTaskRows)};
  if (rows * weight.inputs > kManyInputs) {
    run(parallel, context, quantize_task, parts(rows, kQuantizedRows), call);
  } else {
    for (int64_t row = 0; row < rows; row++) kernels.quantize(x + row * weight.inputs, weight.inputs, quantized, row);
  }
  run(parallel, context, panel_task, parts(weight.panels(), task_panels) * call.row_blocks, call);
  std::free(memory);
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
    *problem = "FREEEXPORT_INSTRUCTIONS names no instruction set of freeexport's kernels; choose scalar, avx2, "
               "avx2-vnni, avx512 or avx512-vnni, or unset it";
  } else if (!found->supported()) {
    *problem = "FREEEXPORT_INSTRUCTIONS names instructions that this processor lacks; unset it";
    found = nullptr;
  }
  return found;
}

const char* check_sizes(int64_t outputs, int64_t inputs, int64_t bits, int64_t block) {
  constexpr int64_t kMost = int64_t{1} << 28;
  if (outputs < 1 || outputs > kMost || inputs < 1 || inputs > kMost) return "N or K is out of range";
  if (bits != 4 && bits != 8) return "bits is not 4 or 8";
  if (block < kGroup || block > kMost || block % kGroup != 0) return "block_size is no multiple of 32";
  return nullptr;
}

}  // namespace freeexport
