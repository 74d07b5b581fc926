// Operators before and after a decoder's layers: selection of valid rows, and predictions from
// logits. Each replaces about a dozen nodes of ONNX Runtime, which take a large part of a step of a
// small model.
#include <cmath>
#include <cstring>

#include "best_two.h"
#include "operators.h"

namespace freeexport {
namespace {

constexpr size_t kMostInputs = 3;

struct Kernel {
  const ort::Api* api;
  const Kernels* kernels;
  bool given[kMostInputs];
  int64_t margin;      // attribute of Predict
  int64_t other;       // attribute of Predict
  int64_t vocabulary;  // attributes of WholeVocabulary
  float unknown;
};

ort::Status* begin(const ort::Api* api, const ort::KernelInfo* info, Kernel* kernel) {
  const char* problem = nullptr;
  *kernel = {api, choose_kernels(&problem), {}, 0, 0, 0, 0};
  if (kernel->kernels == nullptr) return fail(api, ort::kEngineError, "%s", problem);
  return find_inputs(api, info, kMostInputs, kernel->given);
}

ort::Status* output_of(const ort::Api* api, ort::KernelContext* context, size_t output,
                       const int64_t* shape, size_t rank, void** data) {
  ort::Value* value = nullptr;
  RETURN_IF_ERROR(api->KernelContext_GetOutput(context, output, shape, rank, &value));
  return api->GetTensorMutableData(value, data);
}

// Reads the shape of an input and checks its rank.
ort::Status* input_shape(const ort::Api* api, ort::KernelContext* context, size_t input,
                         const char* name, size_t rank, int64_t* shape) {
  const ort::Value* value = nullptr;
  size_t found = 0;
  RETURN_IF_ERROR(api->KernelContext_GetInput(context, input, &value));
  RETURN_IF_ERROR(shape_of(api, value, name, shape, &found));
  if (found == rank) return nullptr;
  return fail(api, ort::kInvalidArgument, "%s has %zu dimensions, not %zu", name, found, rank);
}

ort::Status* logits_of(const Kernel& kernel, ort::KernelContext* context, int64_t* shape,
                       Logits* logits) {
  const ort::Value* value = nullptr;
  const void* values = nullptr;
  size_t rank = 0;
  RETURN_IF_ERROR(kernel.api->KernelContext_GetInput(context, 0, &value));
  RETURN_IF_ERROR(shape_of(kernel.api, value, "logits", shape, &rank));
  if (rank != 2 || shape[1] < 2)
    return fail(kernel.api, ort::kInvalidArgument, "logits are no rows of two or more");
  RETURN_IF_ERROR(input_of(kernel.api, context, 0, true, &values));
  *logits = {shape[0], shape[1], static_cast<const float*>(values), nullptr, nullptr};
  return nullptr;
}

ort::Status* find_best(const Kernel& kernel, ort::KernelContext* context, const Logits& logits) {
  Session session = {kernel.api, context, nullptr};
  if (!best_two(*kernel.kernels, logits, parallel_for, &session))
    return fail(kernel.api, ort::kEngineError, "no memory for the logits of a call");
  return session.status;
}

// BestTwo, for bundles up to version 3: logits [R, V] -> indices of the best two, int64 [R, 2], and
// log-sum-exp [R].
ort::Status* best_two_call(void* op, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(op);
  int64_t shape[kMostRank];
  Logits logits = {};
  RETURN_IF_ERROR(logits_of(kernel, context, shape, &logits));
  shape[1] = 2;
  RETURN_IF_ERROR(
      output_of(kernel.api, context, 0, shape, 2, reinterpret_cast<void**>(&logits.top)));
  RETURN_IF_ERROR(
      output_of(kernel.api, context, 1, shape, 1, reinterpret_cast<void**>(&logits.log_sum)));
  return find_best(kernel, context, logits);
}

// Predict: logits [R, C], optional emitted tokens, int64 [R], and optional known tokens of the
// head, int64 [N] -> token int64 [R], confidence [R], and nll [R] in nats of the emitted token, or
// else of the best class.
//
// `margin`: the confidence is the best probability minus the second. `other`: the last of N + 1
// classes is any other token. If it is the best, the confidence is 0 and the second best is
// returned.
ort::Status* predict(void* op, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(op);
  const ort::Api* api = kernel.api;
  int64_t shape[kMostRank];
  int64_t other_shape[kMostRank];
  Logits logits = {};
  RETURN_IF_ERROR(logits_of(kernel, context, shape, &logits));
  const void* emitted = nullptr;
  const void* known = nullptr;
  RETURN_IF_ERROR(input_of(api, context, 1, kernel.given[1], &emitted));
  RETURN_IF_ERROR(input_of(api, context, 2, kernel.given[2], &known));
  if (emitted != nullptr) RETURN_IF_ERROR(input_shape(api, context, 1, "emitted", 1, other_shape));
  if (emitted != nullptr && other_shape[0] != logits.rows)
    return fail(api, ort::kInvalidArgument, "%lld emitted tokens for %lld rows",
                static_cast<long long>(other_shape[0]), static_cast<long long>(logits.rows));
  if (known != nullptr)
    RETURN_IF_ERROR(input_shape(api, context, 2, "known tokens", 1, other_shape));
  if (known != nullptr && other_shape[0] + kernel.other != logits.count)
    return fail(api, ort::kInvalidArgument, "%lld logits for %lld known tokens",
                static_cast<long long>(logits.count), static_cast<long long>(other_shape[0]));
  int64_t* token = nullptr;
  float* confidence = nullptr;
  float* nll = nullptr;
  RETURN_IF_ERROR(output_of(api, context, 0, shape, 1, reinterpret_cast<void**>(&token)));
  RETURN_IF_ERROR(output_of(api, context, 1, shape, 1, reinterpret_cast<void**>(&confidence)));
  RETURN_IF_ERROR(output_of(api, context, 2, shape, 1, reinterpret_cast<void**>(&nll)));
  if (logits.rows == 0) return nullptr;
  const size_t rows = static_cast<size_t>(logits.rows);
  auto* found = static_cast<int64_t*>(std::malloc(rows * (2 * sizeof(int64_t) + sizeof(float))));
  if (found == nullptr) return fail(api, ort::kEngineError, "no memory for the logits of a call");
  logits.top = found;
  logits.log_sum = reinterpret_cast<float*>(found + 2 * rows);
  ort::Status* status = find_best(kernel, context, logits);
  for (int64_t row = 0; row < logits.rows && status == nullptr; row++) {
    const float* values = logits.values + row * logits.count;
    const int64_t best = found[2 * row];
    const int64_t second = found[2 * row + 1];
    const float log_sum = logits.log_sum[row];
    if (best < 0 || best >= logits.count || second < 0 || second >= logits.count) {
      status = fail(api, ort::kInvalidArgument, "logits are no numbers");
      break;
    }
    const bool is_other = kernel.other && best == logits.count - 1;
    float sure = std::exp(values[best] - log_sum);
    if (kernel.margin) sure -= std::exp(values[second] - log_sum);
    // Rounding may exceed the range, results must not.
    confidence[row] = is_other || sure < 0 ? 0 : sure > 1 ? 1 : sure;
    const int64_t place = is_other ? second : best;
    token[row] = known == nullptr ? place : static_cast<const int64_t*>(known)[place];
    const int64_t said = emitted == nullptr ? best : static_cast<const int64_t*>(emitted)[row];
    if (said < 0 || said >= logits.count)
      status = fail(api, ort::kInvalidArgument, "emitted token %lld is none of %lld",
                    static_cast<long long>(said), static_cast<long long>(logits.count));
    else
      nll[row] = log_sum - values[said];
  }
  std::free(found);
  return status;
}

// WholeVocabulary: logits [R, C] and known tokens, int64 [N], N <= C -> logits [R, vocabulary],
// which are `unknown` for all other tokens. Without `spreading_logits` the output is left
// undefined, because filling it takes a tenth of an exit's call, and ONNX Runtime does not report
// if it is read.
ort::Status* whole_vocabulary(void* op, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(op);
  const ort::Api* api = kernel.api;
  int64_t shape[kMostRank];
  int64_t count[kMostRank];
  Logits logits = {};
  RETURN_IF_ERROR(logits_of(kernel, context, shape, &logits));
  RETURN_IF_ERROR(input_shape(api, context, 1, "known tokens", 1, count));
  const void* input = nullptr;
  RETURN_IF_ERROR(input_of(api, context, 1, true, &input));
  const auto* known = static_cast<const int64_t*>(input);
  bool fit = count[0] <= logits.count;
  for (int64_t i = 0; i < count[0] && fit; i++) fit = known[i] >= 0 && known[i] < kernel.vocabulary;
  if (!fit)
    return fail(api, ort::kInvalidArgument,
                "the known tokens do not fit the logits or the vocabulary");
  float* y = nullptr;
  shape[1] = kernel.vocabulary;
  RETURN_IF_ERROR(output_of(api, context, 0, shape, 2, reinterpret_cast<void**>(&y)));
  for (int64_t row = 0; row < logits.rows && spreading_logits; row++, y += kernel.vocabulary) {
    const float* values = logits.values + row * logits.count;
    for (int64_t i = 0; i < kernel.vocabulary; i++) y[i] = kernel.unknown;
    for (int64_t i = 0; i < count[0]; i++) y[known[i]] = values[i];
  }
  return nullptr;
}

// CountedRows: x [B, k, d] and the number of valid rows of each sequence, int32 [B] -> the valid
// rows [N, d], and the index of each row of x among them, int64 [B * k]. Padding has the index of
// the valid row before it.
ort::Status* counted_rows(void* op, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(op);
  const ort::Api* api = kernel.api;
  int64_t shape[kMostRank];
  int64_t batch[kMostRank];
  RETURN_IF_ERROR(input_shape(api, context, 0, "x", 3, shape));
  RETURN_IF_ERROR(input_shape(api, context, 1, "lengths", 1, batch));
  const void* x = nullptr;
  const void* input = nullptr;
  RETURN_IF_ERROR(input_of(api, context, 0, true, &x));
  RETURN_IF_ERROR(input_of(api, context, 1, true, &input));
  const auto* lengths = static_cast<const int32_t*>(input);
  const int64_t most = shape[1];
  const int64_t width = shape[2];
  const int64_t all = shape[0] * most;
  int64_t total = 0;
  for (int64_t i = 0; i < shape[0]; i++) {
    if (batch[0] != shape[0] || lengths[i] < 0 || lengths[i] > most)
      return fail(api, ort::kInvalidArgument, "lengths do not fit %lld sequences of %lld rows",
                  static_cast<long long>(shape[0]), static_cast<long long>(most));
    total += lengths[i];
  }
  const int64_t packed_shape[2] = {total, width};
  float* packed = nullptr;
  int64_t* rows = nullptr;
  RETURN_IF_ERROR(output_of(api, context, 0, packed_shape, 2, reinterpret_cast<void**>(&packed)));
  RETURN_IF_ERROR(output_of(api, context, 1, &all, 1, reinterpret_cast<void**>(&rows)));
  int64_t next = 0;
  for (int64_t i = 0; i < shape[0]; i++) {
    const size_t bytes = static_cast<size_t>(lengths[i] * width) * sizeof(float);
    if (bytes)
      std::memcpy(packed + next * width, static_cast<const float*>(x) + i * most * width, bytes);
    for (int64_t row = 0; row < most; row++) {
      next += row < lengths[i];
      *rows++ = next ? next - 1 : 0;
    }
  }
  return nullptr;
}

ort::Status* create_plain(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info,
                          void** out) {
  Kernel kernel;
  RETURN_IF_ERROR(begin(api, info, &kernel));
  return keep(api, kernel, out);
}

ort::Status* create_predict(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info,
                            void** out) {
  Kernel kernel;
  RETURN_IF_ERROR(begin(api, info, &kernel));
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_int64(info, "margin", &kernel.margin));
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_int64(info, "other", &kernel.other));
  return keep(api, kernel, out);
}

ort::Status* create_vocabulary(const ort::CustomOp*, const ort::Api* api,
                               const ort::KernelInfo* info, void** out) {
  Kernel kernel;
  RETURN_IF_ERROR(begin(api, info, &kernel));
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_int64(info, "vocabulary", &kernel.vocabulary));
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_float(info, "unknown", &kernel.unknown));
  return keep(api, kernel, out);
}

constexpr ort::CustomOp decoder_end_op() {
  ort::CustomOp op = common_callbacks();
  op.GetInputCharacteristic =
      op.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  op.GetInputTypeCount = op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 2; };
  op.CreateKernelV2 = create_plain;
  return op;
}

constexpr ort::CustomOp best_two_op() {
  ort::CustomOp op = decoder_end_op();
  op.GetName = [](const ort::CustomOp*) { return "BestTwo"; };
  op.GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return 1; };
  op.GetInputType = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
  op.GetOutputType = [](const ort::CustomOp*, size_t output) {
    return output == 0 ? ort::kInt64 : ort::kFloat;
  };
  op.KernelComputeV2 = best_two_call;
  return op;
}

constexpr ort::CustomOp predict_op() {
  ort::CustomOp op = decoder_end_op();
  op.GetName = [](const ort::CustomOp*) { return "Predict"; };
  op.GetInputTypeCount = op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 3; };
  op.GetInputType = [](const ort::CustomOp*, size_t input) {
    return input == 0 ? ort::kFloat : ort::kInt64;
  };
  op.GetInputCharacteristic = [](const ort::CustomOp*, size_t input) {
    return input == 0 ? ort::kRequired : ort::kOptional;
  };
  op.GetOutputType = [](const ort::CustomOp*, size_t output) {
    return output == 0 ? ort::kInt64 : ort::kFloat;
  };
  op.CreateKernelV2 = create_predict;
  op.KernelComputeV2 = predict;
  return op;
}

constexpr ort::CustomOp whole_vocabulary_op() {
  ort::CustomOp op = decoder_end_op();
  op.GetName = [](const ort::CustomOp*) { return "WholeVocabulary"; };
  op.GetInputType = [](const ort::CustomOp*, size_t input) {
    return input == 0 ? ort::kFloat : ort::kInt64;
  };
  op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 1; };
  op.CreateKernelV2 = create_vocabulary;
  op.KernelComputeV2 = whole_vocabulary;
  return op;
}

constexpr ort::CustomOp counted_rows_op() {
  ort::CustomOp op = decoder_end_op();
  op.GetName = [](const ort::CustomOp*) { return "CountedRows"; };
  op.GetInputType = [](const ort::CustomOp*, size_t input) {
    return input == 0 ? ort::kFloat : ort::kInt32;
  };
  op.GetOutputType = [](const ort::CustomOp*, size_t output) {
    return output == 0 ? ort::kFloat : ort::kInt64;
  };
  op.KernelComputeV2 = counted_rows;
  return op;
}

}  // namespace

constexpr ort::CustomOp kBestTwoOp = best_two_op();
constexpr ort::CustomOp kPredictOp = predict_op();
constexpr ort::CustomOp kWholeVocabularyOp = whole_vocabulary_op();
constexpr ort::CustomOp kCountedRowsOp = counted_rows_op();

}  // namespace freeexport
