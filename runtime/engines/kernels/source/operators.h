// Helpers of all operators: errors, inputs and outputs, and threads.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "ort_api.h"
#include "packed_linear.h"

namespace freeexport {

extern const ort::CustomOp kPackedLinearOp, kPackedRowsOp, kCachedAttentionOp, kCappedAttentionOp;
extern const ort::CustomOp kHalfAttentionOp, kInt8AttentionOp;
extern const ort::CustomOp kCrossAttentionOp, kHalfCrossAttentionOp, kCappedCrossAttentionOp;
extern const ort::CustomOp kInt8CrossAttentionOp, kHalfPromptCacheOp, kInt8PromptCacheOp;
extern const ort::CustomOp kBestTwoOp, kPredictOp, kWholeVocabularyOp;
extern const ort::CustomOp kCountedRowsOp, kEncoderAttentionOp;

// True while this thread runs a call that reads a prompt. ONNX Runtime's sequential executor calls
// operators on the thread that runs the session, and only their tasks on others.
extern thread_local bool reading_prompt;
// True if the caller reads logits of the whole vocabulary. Otherwise WholeVocabulary does not fill
// them.
extern thread_local bool spreading_logits;

__attribute__((format(printf, 3, 4))) inline ort::Status* fail(const ort::Api* api, int code,
                                                               const char* format, ...) {
  char text[300] = "freeexport: ";
  constexpr size_t kBegun = 12;
  std::va_list values;
  va_start(values, format);
  std::vsnprintf(text + kBegun, sizeof(text) - kBegun, format, values);
  va_end(values);
  return api->CreateStatus(code, text);
}

#define RETURN_IF_ERROR(call) \
  if (ort::Status* status = (call)) return status

inline ort::Status* elements_of(const ort::Api* api, const ort::Value* value, int64_t* count,
                                int* type) {
  ort::TypeAndShape* info = nullptr;
  RETURN_IF_ERROR(api->GetTensorTypeAndShape(value, &info));
  size_t elements = 0;
  ort::Status* status = api->GetTensorShapeElementCount(info, &elements);
  if (status == nullptr) status = api->GetTensorElementType(info, type);
  api->ReleaseTensorTypeAndShapeInfo(info);
  *count = static_cast<int64_t>(elements);
  return status;
}

// Finds which inputs an operator has. Optional inputs that are left out have an empty name.
inline ort::Status* find_inputs(const ort::Api* api, const ort::KernelInfo* info, size_t count,
                                bool* given) {
  size_t inputs = 0;
  RETURN_IF_ERROR(api->KernelInfo_GetInputCount(info, &inputs));
  for (size_t input = 0; input < count; input++) {
    size_t name = 0;
    if (input < inputs) RETURN_IF_ERROR(api->KernelInfo_GetInputName(info, input, nullptr, &name));
    given[input] = name > 1;
  }
  return nullptr;
}

// Reads the data of an input. Null if the operator does not have it.
inline ort::Status* input_of(const ort::Api* api, const ort::KernelContext* context, size_t input,
                             bool given, const void** data) {
  *data = nullptr;
  if (!given) return nullptr;
  const ort::Value* value = nullptr;
  RETURN_IF_ERROR(api->KernelContext_GetInput(context, input, &value));
  return api->GetTensorMutableData(const_cast<ort::Value*>(value), const_cast<void**>(data));
}

// Returns an optional attribute, or `otherwise`.
inline int64_t integer_of(const ort::Api* api, const ort::KernelInfo* info, const char* name,
                          int64_t otherwise = 0) {
  int64_t value = 0;
  ort::Status* status = api->KernelInfoGetAttribute_int64(info, name, &value);
  if (status != nullptr) api->ReleaseStatus(status);
  return status == nullptr ? value : otherwise;
}

constexpr size_t kMostRank = 8;

inline ort::Status* shape_of(const ort::Api* api, const ort::Value* value, const char* name,
                             int64_t* shape, size_t* rank) {
  ort::TypeAndShape* info = nullptr;
  RETURN_IF_ERROR(api->GetTensorTypeAndShape(value, &info));
  ort::Status* status = api->GetDimensionsCount(info, rank);
  if (status == nullptr && (*rank < 1 || *rank > kMostRank))
    status = fail(api, ort::kInvalidArgument, "%s has no dimension, or more than 8", name);
  if (status == nullptr) status = api->GetDimensions(info, shape, *rank);
  api->ReleaseTensorTypeAndShapeInfo(info);
  return status;
}

// Allocates a kernel for ONNX Runtime. `malloc` instead of `new` avoids a dependency on the C++
// library.
template <typename Kernel>
ort::Status* keep(const ort::Api* api, const Kernel& kernel, void** out) {
  auto* kept = static_cast<Kernel*>(std::malloc(sizeof(Kernel)));
  if (kept == nullptr) return fail(api, ort::kEngineError, "no memory");
  *kept = kernel;
  *out = kept;
  return nullptr;
}

struct Session {
  const ort::Api* api;
  const ort::KernelContext* context;
  ort::Status* status;
};

// Runs tasks on the threads of the session.
inline void parallel_for(void* context, void (*task)(void*, size_t), size_t total, void* data) {
  auto* session = static_cast<Session*>(context);
  if (session->status != nullptr) return;
  session->status = session->api->KernelContext_ParallelFor(session->context, task, total, 0, data);
}

// Callbacks shared by all operators, for kernels from `keep`.
constexpr ort::CustomOp common_callbacks() {
  ort::CustomOp op = {};
  op.version = ort::kApiVersion;
  op.GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return nullptr; };
  op.GetInputMemoryType = [](const ort::CustomOp*, size_t) { return 0; };
  op.GetOutputType = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
  op.GetVariadicInputMinArity =
      op.GetVariadicInputHomogeneity = [](const ort::CustomOp*) { return 0; };
  op.GetVariadicOutputMinArity =
      op.GetVariadicOutputHomogeneity = [](const ort::CustomOp*) { return 0; };
  op.GetStartVersion = [](const ort::CustomOp*) { return 1; };
  op.GetEndVersion = [](const ort::CustomOp*) { return 0x7fffffff; };
  op.KernelDestroy = [](void* kernel) { std::free(kernel); };
  return op;
}

}  // namespace freeexport
