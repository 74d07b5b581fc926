// What the operators share: errors, inputs and outputs, and threads.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "ort_api.h"
#include "packed_linear.h"

namespace freeexport {

extern const ort::CustomOp kPackedLinearOp, kPackedRowsOp, kCachedAttentionOp, kCappedAttentionOp, kHalfAttentionOp;
extern const ort::CustomOp kCrossAttentionOp, kHalfCrossAttentionOp, kBestTwoOp, kPredictOp, kWholeVocabularyOp;
extern const ort::CustomOp kCountedRowsOp;

// Whether the engine call that this thread runs reads a prompt: ONNX Runtime calls operators on the thread that runs a
// session, as its sequential executor does, and only their tasks on others.
extern thread_local bool reading_prompt;
// Whether its caller reads logits of the whole vocabulary: else WholeVocabulary leaves them as they are.
extern thread_local bool spreading_logits;

__attribute__((format(printf, 3, 4))) inline ort::Status* fail(const ort::Api* api, int code, const char* format, ...) {
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

inline ort::Status* elements_of(const ort::Api* api, const ort::Value* value, int64_t* count, int* type) {
  ort::TypeAndShape* info = nullptr;
  RETURN_IF_ERROR(api->GetTensorTypeAndShape(value, &info));
  size_t elements = 0;
  ort::Status* status = api->GetTensorShapeElementCount(info, &elements);
  if (status == nullptr) status = api->GetTensorElementType(info, type);
  api->ReleaseTensorTypeAndShapeInfo(info);
  *count = static_cast<int64_t>(elements);
  return status;
}

// Which of an operator's inputs are there: an optional one that is left out has an empty name.
inline ort::Status* find_inputs(const ort::Api* api, const ort::KernelInfo* info, size_t count, bool* given) {
  size_t inputs = 0;
  RETURN_IF_ERROR(api->KernelInfo_GetInputCount(info, &inputs));
  for (size_t input = 0; input < count; input++) {
    size_t name = 0;
    if (input < inputs) RETURN_IF_ERROR(api->KernelInfo_GetInputName(info, input, nullptr, &name));
    given[input] = name > 1;
  }
  return nullptr;
}

// Null where the input is not there.
inline ort::Status* input_of(const ort::Api* api, const ort::KernelContext* context, size_t input, bool given,
                             const void** data) {
  *data = nullptr;
  if (!given) return nullptr;
  const ort::Value* value = nullptr;
  RETURN_IF_ERROR(api->KernelContext_GetInput(context, input, &value));
  return api->GetTensorMutableData(const_cast<ort::Value*>(value), const_cast<void**>(data));
}

constexpr size_t kMostRank = 8;

inline ort::Status* shape_of(const ort::Api* api, const ort::Value* value, const char* name, int64_t* shape,
                             size_t* rank) {
  ort::TypeAndShape* info = nullptr;
  RETURN_IF_ERROR(api->GetTensorTypeAndShape(value, &info));
  ort::Status* status = api->GetDimensionsCount(info, rank);
  if (status == nullptr && (*rank < 1 || *rank > kMostRank))
    status = fail(api, ort::kInvalidArgument, "%s has no dimension, or more than 8", name);
  if (status == nullptr) status = api->GetDimensions(info, shape, *rank);
  api->ReleaseTensorTypeAndShapeInfo(info);
  return status;
}

// A kernel as ONNX Runtime keeps it. Without C++'s own allocation the library needs nothing but the C library, of any
// version.
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

// On the session's own threads.
inline void parallel_for(void* context, void (*task)(void*, size_t), size_t total, void* data) {
  auto* session = static_cast<Session*>(context);
  if (session->status != nullptr) return;
  session->status = session->api->KernelContext_ParallelFor(session->context, task, total, 0, data);
}

// What is the same of all operators, for kernels that `keep` kept.
constexpr ort::CustomOp common_callbacks() {
  ort::CustomOp op = {};
  op.version = ort::kApiVersion;
  op.GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return nullptr; };
  op.GetInputMemoryType = [](const ort::CustomOp*, size_t) { return 0; };
  op.GetOutputType = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
  op.GetVariadicInputMinArity = op.GetVariadicInputHomogeneity = [](const ort::CustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = op.GetVariadicOutputHomogeneity = [](const ort::CustomOp*) { return 0; };
  op.GetStartVersion = [](const ort::CustomOp*) { return 1; };
  op.GetEndVersion = [](const ort::CustomOp*) { return 0x7fffffff; };
  op.KernelDestroy = [](void* kernel) { std::free(kernel); };
  return op;
}

}  // namespace freeexport
