// ONNX Runtime operators for attention: CachedAttention, its variants with capped scores and with a
// cache in float16 or in 8 bits, CrossAttention and its variants, PromptCache, which stores the
// keys and values for it, and EncoderAttention.
#include "operators.h"
#include "platform.h"

namespace freeexport {
namespace {

enum Input : size_t {
  kRows,
  kPastKey,
  kPastValue,
  kPastLengths,
  kQueryLengths,
  kCosine,
  kSine,
  kBias,
  kQueryNorm,
  kKeyNorm,
  kInputs
};
enum Output : size_t { kY, kKey, kValue, kOutputs };
// Inputs of CrossAttention, which also has kRows, kQueryLengths, and the prompt's keys and values
// as kPastKey and kPastValue.
constexpr size_t kCrossLengths = kPastLengths;
constexpr size_t kCrossInputs = kQueryLengths + 1;
// Inputs of EncoderAttention, which also has kRows.
constexpr size_t kLengths = 1;
constexpr size_t kDistances = 2;
constexpr size_t kEncoderInputs = 3;
// Inputs and outputs of PromptCache.
constexpr size_t kPromptInputs = 1;
constexpr size_t kPromptOutputs = 2;

// One node of a session: its attributes, without tensors.
struct Kernel {
  const ort::Api* api;
  const Kernels* kernels;
  Attention attention;
  bool given[kInputs];
  bool exact;  // prompts have the bits of other rows
};

constexpr int64_t kMostHeads = 1 << 16;

// Reads the sizes of keys and values.
ort::Status* read_key_sizes(const ort::Api* api, const ort::KernelInfo* info, Attention* a) {
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_int64(info, "kv_num_heads", &a->kv_heads));
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_int64(info, "head_size", &a->size));
  if (a->kv_heads < 1 || a->kv_heads > kMostHeads)
    return fail(api, ort::kInvalidGraph, "kv_num_heads is out of range");
  if (a->size < 16 || a->size > kMostHeads || a->size % 8 != 0)
    return fail(api, ort::kInvalidGraph, "head_size is no multiple of 8 from 16 on");
  return nullptr;
}

ort::Status* read_sizes(const ort::KernelInfo* info, Kernel* kernel) {
  const ort::Api* api = kernel->api;
  Attention& a = kernel->attention;
  RETURN_IF_ERROR(read_key_sizes(api, info, &a));
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_int64(info, "num_heads", &a.heads));
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_float(info, "scale", &a.scale));
  if (a.heads < 1 || a.heads > kMostHeads || a.heads % a.kv_heads != 0)
    return fail(api, ort::kInvalidGraph, "num_heads is no multiple of kv_num_heads");
  return nullptr;
}

ort::Status* read_packed(const ort::KernelInfo* info, Kernel* kernel) {
  int64_t packed = 0;
  RETURN_IF_ERROR(kernel->api->KernelInfoGetAttribute_int64(info, "packed", &packed));
  kernel->attention.packed = packed != 0;
  return nullptr;
}

ort::Status* read_attributes(const ort::KernelInfo* info, Kernel* kernel) {
  const ort::Api* api = kernel->api;
  Attention& a = kernel->attention;
  RETURN_IF_ERROR(read_packed(info, kernel));
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_int64(info, "window", &a.window));
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_float(info, "epsilon", &a.epsilon));
  a.width = (a.heads + 2 * a.kv_heads) * a.size;
  if (a.window < 0) return fail(api, ort::kInvalidGraph, "window is negative");
  if (kernel->given[kCosine] != kernel->given[kSine])
    return fail(api, ort::kInvalidGraph, "cosine goes with sine");
  return nullptr;
}

ort::Status* begin_kernel(const ort::Api* api, const ort::KernelInfo* info, size_t inputs,
                          Kernel* kernel) {
  const char* problem = nullptr;
  *kernel = {api, choose_kernels(&problem), {}, {}, integer_of(api, info, "exact") != 0};
  if (kernel->kernels == nullptr) return fail(api, ort::kEngineError, "%s", problem);
  return find_inputs(api, info, inputs, kernel->given);
}

ort::Status* create_cached(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info,
                           void** out) {
  Kernel kernel;
  RETURN_IF_ERROR(begin_kernel(api, info, kInputs, &kernel));
  RETURN_IF_ERROR(read_sizes(info, &kernel));
  RETURN_IF_ERROR(read_attributes(info, &kernel));
  return keep(api, kernel, out);
}

ort::Status* create_capped(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info,
                           void** out) {
  Kernel kernel;
  RETURN_IF_ERROR(begin_kernel(api, info, kInputs, &kernel));
  RETURN_IF_ERROR(read_sizes(info, &kernel));
  RETURN_IF_ERROR(read_attributes(info, &kernel));
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_float(info, "softcap", &kernel.attention.softcap));
  if (!(kernel.attention.softcap > 0.0f))
    return fail(api, ort::kInvalidGraph, "softcap is not above 0");
  return keep(api, kernel, out);
}

// Creates a node with a cache of another type than fp32.
ort::Status* create_typed(const ort::Api* api, const ort::KernelInfo* info, Cache cache,
                          void** out) {
  Kernel kernel;
  RETURN_IF_ERROR(begin_kernel(api, info, kInputs, &kernel));
  RETURN_IF_ERROR(read_sizes(info, &kernel));
  RETURN_IF_ERROR(read_attributes(info, &kernel));
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_float(info, "softcap", &kernel.attention.softcap));
  if (!(kernel.attention.softcap >= 0.0f))
    return fail(api, ort::kInvalidGraph, "softcap is negative");
  kernel.attention.cache = cache;
  return keep(api, kernel, out);
}

ort::Status* create_half(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info,
                         void** out) {
  return create_typed(api, info, kHalves, out);
}

ort::Status* create_int8(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info,
                         void** out) {
  return create_typed(api, info, kBytes, out);
}

ort::Status* create_cross(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info,
                          void** out) {
  Kernel kernel;
  RETURN_IF_ERROR(begin_kernel(api, info, kCrossInputs, &kernel));
  RETURN_IF_ERROR(read_sizes(info, &kernel));
  RETURN_IF_ERROR(read_packed(info, &kernel));
  kernel.attention.width = kernel.attention.heads * kernel.attention.size;
  return keep(api, kernel, out);
}

ort::Status* create_half_cross(const ort::CustomOp* op, const ort::Api* api,
                               const ort::KernelInfo* info, void** out) {
  RETURN_IF_ERROR(create_cross(op, api, info, out));
  static_cast<Kernel*>(*out)->attention.cache = kHalves;
  return nullptr;
}

ort::Status* create_int8_cross(const ort::CustomOp* op, const ort::Api* api,
                               const ort::KernelInfo* info, void** out) {
  float softcap = 0.0f;
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_float(info, "softcap", &softcap));
  if (!(softcap >= 0.0f)) return fail(api, ort::kInvalidGraph, "softcap is negative");
  RETURN_IF_ERROR(create_cross(op, api, info, out));
  static_cast<Kernel*>(*out)->attention.cache = kBytes;
  static_cast<Kernel*>(*out)->attention.softcap = softcap;
  return nullptr;
}

ort::Status* create_capped_cross(const ort::CustomOp* op, const ort::Api* api,
                                 const ort::KernelInfo* info, void** out) {
  float softcap = 0.0f;
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_float(info, "softcap", &softcap));
  if (!(softcap > 0.0f)) return fail(api, ort::kInvalidGraph, "softcap is not above 0");
  RETURN_IF_ERROR(create_half_cross(op, api, info, out));
  static_cast<Kernel*>(*out)->attention.softcap = softcap;
  return nullptr;
}

ort::Status* create_prompt(const ort::Api* api, const ort::KernelInfo* info, Cache cache,
                           void** out) {
  Kernel kernel;
  RETURN_IF_ERROR(begin_kernel(api, info, kPromptInputs, &kernel));
  Attention& a = kernel.attention;
  RETURN_IF_ERROR(read_key_sizes(api, info, &a));
  a.width = 2 * a.kv_heads * a.size;
  a.cache = cache;
  return keep(api, kernel, out);
}

ort::Status* create_encoder(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info,
                            void** out) {
  Kernel kernel;
  RETURN_IF_ERROR(begin_kernel(api, info, kEncoderInputs, &kernel));
  RETURN_IF_ERROR(read_sizes(info, &kernel));
  Attention& a = kernel.attention;
  a.width = (a.heads + 2 * a.kv_heads) * a.size;
  a.encoder = true;
  return keep(api, kernel, out);
}

// Checks the shape of an input. -1 in `expected` permits any size, and is replaced by it.
ort::Status* check_shape(const Kernel& kernel, const ort::KernelContext* context, size_t input,
                         const char* name, size_t rank, int64_t* expected) {
  if (!kernel.given[input]) return nullptr;
  const ort::Value* value = nullptr;
  RETURN_IF_ERROR(kernel.api->KernelContext_GetInput(context, input, &value));
  int64_t shape[kMostRank];
  size_t found = 0;
  RETURN_IF_ERROR(shape_of(kernel.api, value, name, shape, &found));
  if (found != rank)
    return fail(kernel.api, ort::kInvalidArgument, "%s has %zu dimensions, not %zu", name, found,
                rank);
  for (size_t i = 0; i < rank; i++) {
    if (expected[i] == -1) expected[i] = shape[i];
    if (shape[i] != expected[i])
      return fail(kernel.api, ort::kInvalidArgument, "dimension %zu of %s is %lld, not %lld", i,
                  name, static_cast<long long>(shape[i]), static_cast<long long>(expected[i]));
  }
  return nullptr;
}

ort::Status* check_shapes(const Kernel& kernel, const ort::KernelContext* context, bool cross,
                          Attention* a) {
  int64_t rows[2] = {-1, a->width};
  int64_t cache[4] = {-1, a->kv_heads, -1, cache_width(*a)};
  int64_t sequences[1] = {-1};
  int64_t tables[2] = {-1, -1};
  int64_t bias[2] = {-1, a->heads};
  int64_t norm[1] = {a->size};
  RETURN_IF_ERROR(check_shape(kernel, context, kRows, "rows", 2, rows));
  RETURN_IF_ERROR(check_shape(kernel, context, kPastKey, "past_key", 4, cache));
  RETURN_IF_ERROR(check_shape(kernel, context, kPastValue, "past_value", 4, cache));
  RETURN_IF_ERROR(check_shape(kernel, context, kPastLengths, "past_lengths", 1, cache));
  RETURN_IF_ERROR(
      check_shape(kernel, context, kQueryLengths, "query_lengths", 1, cross ? sequences : cache));
  RETURN_IF_ERROR(check_shape(kernel, context, kCosine, "cosine", 2, tables));
  RETURN_IF_ERROR(check_shape(kernel, context, kSine, "sine", 2, tables));
  RETURN_IF_ERROR(check_shape(kernel, context, kBias, "bias", 2, bias));
  RETURN_IF_ERROR(check_shape(kernel, context, kQueryNorm, "query_norm", 1, norm));
  RETURN_IF_ERROR(check_shape(kernel, context, kKeyNorm, "key_norm", 1, norm));
  a->rows = rows[0];
  a->prompts = cache[0];
  a->batch = cross ? sequences[0] : a->prompts;
  if (a->prompts == 0 ? a->batch != 0 : a->batch % a->prompts != 0)
    return fail(kernel.api, ort::kInvalidArgument,
                "query_lengths of %lld sequences do not share %lld prompts",
                static_cast<long long>(a->batch), static_cast<long long>(a->prompts));
  a->capacity = cache[2];
  a->positions = tables[0];
  a->turned = kernel.given[kCosine] ? tables[1] : 0;
  if (a->turned > a->size / 2)
    return fail(kernel.api, ort::kInvalidArgument, "cosine is wider than half a head");
  a->reach = bias[0] - 1;
  if (kernel.given[kBias] && a->reach < 0)
    return fail(kernel.api, ort::kInvalidArgument, "bias has no rows");
  if (!a->packed && (a->batch == 0 ? a->rows != 0 : a->rows % a->batch != 0))
    return fail(kernel.api, ort::kInvalidArgument, "rows are no multiple of the sequences");
  return nullptr;
}

ort::Status* make_outputs(const Kernel& kernel, ort::KernelContext* context, size_t outputs,
                          Attention* a) {
  const int64_t y[2] = {a->rows, a->heads * a->size};
  const int64_t cache[4] = {a->batch, a->kv_heads, a->capacity, cache_width(*a)};
  void** const data[kOutputs] = {reinterpret_cast<void**>(&a->y), &a->key, &a->value};
  for (size_t output = kY; output < outputs; output++) {
    ort::Value* value = nullptr;
    RETURN_IF_ERROR(kernel.api->KernelContext_GetOutput(context, output, output == kY ? y : cache,
                                                        output == kY ? 2 : 4, &value));
    if (value == nullptr) return fail(kernel.api, ort::kInvalidGraph, "an output is missing");
    RETURN_IF_ERROR(kernel.api->GetTensorMutableData(value, data[output]));
  }
  return nullptr;
}

// Checks shapes, allocates outputs, and sets all tensors except the lengths of the keys.
ort::Status* begin_call(const Kernel& kernel, ort::KernelContext* context, size_t outputs,
                        const void** inputs, Attention* a) {
  RETURN_IF_ERROR(check_shapes(kernel, context, outputs == kKey, a));
  for (size_t input = kRows; input < kInputs; input++)
    RETURN_IF_ERROR(input_of(kernel.api, context, input, kernel.given[input], &inputs[input]));
  a->past_key = inputs[kPastKey];
  a->past_value = inputs[kPastValue];
  const float** const tensors[kInputs] = {&a->input,      nullptr,     nullptr,  nullptr,
                                          nullptr,        &a->cosine,  &a->sine, &a->bias,
                                          &a->query_norm, &a->key_norm};
  for (size_t input = kRows; input < kInputs; input++)
    if (tensors[input] != nullptr) *tensors[input] = static_cast<const float*>(inputs[input]);
  a->prompt = reading_prompt && !kernel.exact;
  a->query_lengths = static_cast<const int32_t*>(inputs[kQueryLengths]);
  return make_outputs(kernel, context, outputs, a);
}

ort::Status* run(const Kernel& kernel, const ort::KernelContext* context, const Attention& a) {
  Session session = {kernel.api, context, nullptr};
  const char* problem = attention(*kernel.kernels, a, parallel_for, &session);
  if (problem != nullptr) return fail(kernel.api, ort::kInvalidArgument, "%s", problem);
  return session.status;
}

ort::Status* compute_cached(void* op, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(op);
  Attention a = kernel.attention;
  const void* inputs[kInputs] = {};
  RETURN_IF_ERROR(begin_call(kernel, context, kOutputs, inputs, &a));
  a.past_lengths = static_cast<const int32_t*>(inputs[kPastLengths]);
  return run(kernel, context, a);
}

ort::Status* compute_cross(void* op, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(op);
  Attention a = kernel.attention;
  const void* inputs[kInputs] = {};
  RETURN_IF_ERROR(begin_call(kernel, context, kKey, inputs, &a));
  a.cross_lengths = static_cast<const int32_t*>(inputs[kCrossLengths]);
  a.key = const_cast<void*>(a.past_key);  // never written to
  a.value = const_cast<void*>(a.past_value);
  return run(kernel, context, a);
}

ort::Status* compute_encoder(void* op, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(op);
  Attention a = kernel.attention;
  int64_t rows[2] = {-1, a.width};
  int64_t lengths[1] = {-1};
  int64_t bias[2] = {-1, a.heads};
  RETURN_IF_ERROR(check_shape(kernel, context, kRows, "rows", 2, rows));
  RETURN_IF_ERROR(check_shape(kernel, context, kLengths, "lengths", 1, lengths));
  RETURN_IF_ERROR(check_shape(kernel, context, kDistances, "bias", 2, bias));
  a.rows = rows[0];
  a.batch = a.prompts = lengths[0];
  if (a.batch == 0 ? a.rows != 0 : a.rows % a.batch != 0)
    return fail(kernel.api, ort::kInvalidArgument, "rows are no multiple of the sequences");
  if (kernel.given[kDistances] && bias[0] % 2 == 0)
    return fail(kernel.api, ort::kInvalidArgument, "bias has an even number of distances");
  a.capacity = a.batch ? a.rows / a.batch : 0;
  a.reach = bias[0] / 2;
  a.prompt = reading_prompt && !kernel.exact;
  const void* inputs[kEncoderInputs] = {};
  for (size_t input = kRows; input < kEncoderInputs; input++)
    RETURN_IF_ERROR(input_of(kernel.api, context, input, kernel.given[input], &inputs[input]));
  a.input = static_cast<const float*>(inputs[kRows]);
  a.query_lengths = a.cross_lengths = static_cast<const int32_t*>(inputs[kLengths]);
  a.bias = static_cast<const float*>(inputs[kDistances]);
  RETURN_IF_ERROR(make_outputs(kernel, context, kKey, &a));
  const int64_t values = a.rows * a.kv_heads * a.size + kBehind;
  auto* memory = static_cast<float*>(allocate(static_cast<size_t>(2 * values) * sizeof(float)));
  if (memory == nullptr)
    return fail(kernel.api, ort::kEngineError, "no memory for keys and values");
  a.key = memory;
  a.value = memory + values;
  ort::Status* status = run(kernel, context, a);
  release(memory);
  return status;
}

ort::Status* compute_prompt(void* op, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(op);
  Attention a = kernel.attention;
  int64_t rows[3] = {-1, -1, a.width};
  RETURN_IF_ERROR(check_shape(kernel, context, kRows, "rows", 3, rows));
  a.batch = a.prompts = rows[0];
  a.capacity = rows[1];
  a.rows = a.batch * a.capacity;
  const void* input = nullptr;
  RETURN_IF_ERROR(input_of(kernel.api, context, kRows, true, &input));
  a.input = static_cast<const float*>(input);
  const int64_t cache[4] = {a.batch, a.kv_heads, a.capacity, cache_width(a)};
  void** const data[kPromptOutputs] = {&a.key, &a.value};
  for (size_t output = 0; output < kPromptOutputs; output++) {
    ort::Value* value = nullptr;
    RETURN_IF_ERROR(kernel.api->KernelContext_GetOutput(context, output, cache, 4, &value));
    if (value == nullptr) return fail(kernel.api, ort::kInvalidGraph, "an output is missing");
    RETURN_IF_ERROR(kernel.api->GetTensorMutableData(value, data[output]));
  }
  Session session = {kernel.api, context, nullptr};
  const char* problem = store_prompts(*kernel.kernels, a, parallel_for, &session);
  if (problem != nullptr) return fail(kernel.api, ort::kEngineError, "%s", problem);
  return session.status;
}

constexpr ort::CustomOp common_attention() {
  ort::CustomOp op = common_callbacks();
  op.GetInputType = [](const ort::CustomOp*, size_t input) {
    return input == kPastLengths || input == kQueryLengths ? ort::kInt32 : ort::kFloat;
  };
  op.GetInputCharacteristic = [](const ort::CustomOp*, size_t input) {
    return input <= kQueryLengths ? ort::kRequired : ort::kOptional;
  };
  op.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  return op;
}

constexpr ort::CustomOp cached_attention_op() {
  ort::CustomOp op = common_attention();
  op.GetName = [](const ort::CustomOp*) { return "CachedAttention"; };
  op.GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return kInputs; };
  op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return kOutputs; };
  op.CreateKernelV2 = create_cached;
  op.KernelComputeV2 = compute_cached;
  return op;
}

constexpr ort::CustomOp capped_attention_op() {
  ort::CustomOp op = cached_attention_op();
  op.GetName = [](const ort::CustomOp*) { return "CappedAttention"; };
  op.CreateKernelV2 = create_capped;
  return op;
}

// Changes the type of the keys and values that are read.
template <int Type>
constexpr ort::CustomOp with_cache(ort::CustomOp op) {
  op.GetInputType = [](const ort::CustomOp*, size_t input) -> int {
    if (input == kPastKey || input == kPastValue) return Type;
    return input == kPastLengths || input == kQueryLengths ? ort::kInt32 : ort::kFloat;
  };
  return op;
}

constexpr ort::CustomOp half_attention_op() {
  ort::CustomOp op = with_cache<ort::kFloat16>(cached_attention_op());
  op.GetName = [](const ort::CustomOp*) { return "HalfAttention"; };
  op.GetOutputType = [](const ort::CustomOp*, size_t output) {
    return output == kY ? ort::kFloat : ort::kFloat16;
  };
  op.CreateKernelV2 = create_half;
  return op;
}

// Keys and values in 8 bits, each position and head followed by its scale.
constexpr ort::CustomOp int8_attention_op() {
  ort::CustomOp op = with_cache<ort::kInt8>(cached_attention_op());
  op.GetName = [](const ort::CustomOp*) { return "Int8Attention"; };
  op.GetOutputType = [](const ort::CustomOp*, size_t output) {
    return output == kY ? ort::kFloat : ort::kInt8;
  };
  op.CreateKernelV2 = create_int8;
  return op;
}

constexpr ort::CustomOp cross_attention_op() {
  ort::CustomOp op = common_attention();
  op.GetName = [](const ort::CustomOp*) { return "CrossAttention"; };
  op.GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return kCrossInputs; };
  op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 1; };
  op.CreateKernelV2 = create_cross;
  op.KernelComputeV2 = compute_cross;
  return op;
}

constexpr ort::CustomOp half_cross_op() {
  ort::CustomOp op = with_cache<ort::kFloat16>(cross_attention_op());
  op.GetName = [](const ort::CustomOp*) { return "HalfCrossAttention"; };
  op.CreateKernelV2 = create_half_cross;
  return op;
}

constexpr ort::CustomOp int8_cross_op() {
  ort::CustomOp op = with_cache<ort::kInt8>(cross_attention_op());
  op.GetName = [](const ort::CustomOp*) { return "Int8CrossAttention"; };
  op.CreateKernelV2 = create_int8_cross;
  return op;
}

// Scores are capped, and keys and values float16.
constexpr ort::CustomOp capped_cross_op() {
  ort::CustomOp op = half_cross_op();
  op.GetName = [](const ort::CustomOp*) { return "CappedCrossAttention"; };
  op.CreateKernelV2 = create_capped_cross;
  return op;
}

// Stores keys and values of prompts, [B, E, 2 kv_heads * size], as cross-attention reads them.
constexpr ort::CustomOp half_prompt_op() {
  ort::CustomOp op = common_callbacks();
  op.GetName = [](const ort::CustomOp*) { return "HalfPromptCache"; };
  op.GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return kPromptInputs; };
  op.GetInputType = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
  op.GetInputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return kPromptOutputs; };
  op.GetOutputType = [](const ort::CustomOp*, size_t) { return ort::kFloat16; };
  op.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  op.CreateKernelV2 = [](const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info,
                         void** out) { return create_prompt(api, info, kHalves, out); };
  op.KernelComputeV2 = compute_prompt;
  return op;
}

constexpr ort::CustomOp int8_prompt_op() {
  ort::CustomOp op = half_prompt_op();
  op.GetName = [](const ort::CustomOp*) { return "Int8PromptCache"; };
  op.GetOutputType = [](const ort::CustomOp*, size_t) { return ort::kInt8; };
  op.CreateKernelV2 = [](const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info,
                         void** out) { return create_prompt(api, info, kBytes, out); };
  return op;
}

constexpr ort::CustomOp encoder_attention_op() {
  ort::CustomOp op = common_attention();
  op.GetName = [](const ort::CustomOp*) { return "EncoderAttention"; };
  op.GetInputType = [](const ort::CustomOp*, size_t input) {
    return input == kLengths ? ort::kInt32 : ort::kFloat;
  };
  op.GetInputCharacteristic = [](const ort::CustomOp*, size_t input) {
    return input == kDistances ? ort::kOptional : ort::kRequired;
  };
  op.GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return kEncoderInputs; };
  op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 1; };
  op.CreateKernelV2 = create_encoder;
  op.KernelComputeV2 = compute_encoder;
  return op;
}

}  // namespace

constexpr ort::CustomOp kCachedAttentionOp = cached_attention_op();
constexpr ort::CustomOp kCappedAttentionOp = capped_attention_op();
constexpr ort::CustomOp kHalfAttentionOp = half_attention_op();
constexpr ort::CustomOp kInt8AttentionOp = int8_attention_op();
constexpr ort::CustomOp kCrossAttentionOp = cross_attention_op();
constexpr ort::CustomOp kHalfCrossAttentionOp = half_cross_op();
constexpr ort::CustomOp kCappedCrossAttentionOp = capped_cross_op();
constexpr ort::CustomOp kInt8CrossAttentionOp = int8_cross_op();
constexpr ort::CustomOp kHalfPromptCacheOp = half_prompt_op();
constexpr ort::CustomOp kInt8PromptCacheOp = int8_prompt_op();
constexpr ort::CustomOp kEncoderAttentionOp = encoder_attention_op();

}  // namespace freeexport
