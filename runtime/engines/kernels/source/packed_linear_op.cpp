// ONNX Runtime operator PackedLinear.
#include <cstring>

#include "operators.h"

namespace freeexport {
namespace {

enum Input : size_t {
  kX,
  kData,
  kScales,
  kZeros,
  kBias,
  kSkip,
  kNorm,
  kUpData,
  kUpScales,
  kUpZeros,
  kOffsets,
  kUpOffsets,
  kMultiples,
  kUpMultiples,
  kShift,
  kInputs
};
enum Output : size_t { kY, kTotal, kOutputs };

// One node of a session: its attributes and constants. Reading a tensor through ONNX Runtime's API
// takes 0.1 us, so that of constants in each call would take as long as quantizing a row.
struct Kernel {
  const ort::Api* api;
  const Kernels* kernels;
  Product product;
  bool given[kInputs];
};

// Checks a constant of the graph and returns its data, which ONNX Runtime keeps as long as the
// session. Null if the node does not have it.
template <typename T>
ort::Status* read_constant(const Kernel& kernel, const ort::KernelInfo* info, size_t input,
                           int type, int64_t expected, const T** data) {
  static const char* const kNames[] = {
      "x",       "data",         "scales",    "zero points",    "bias",
      "skip",    "norms",        "up's data", "up's scales",    "up's zero points",
      "offsets", "up's offsets", "multiples", "up's multiples", "shifts"};
  const ort::Api* api = kernel.api;
  *data = nullptr;
  if (!kernel.given[input]) return nullptr;
  int constant = 0;
  int found_type = 0;
  const ort::Value* value = nullptr;
  RETURN_IF_ERROR(api->KernelInfoGetConstantInput_tensor(info, input, &constant, &value));
  if (!constant)
    return fail(api, ort::kInvalidGraph, "%s are no constant of the graph", kNames[input]);
  int64_t count = 0;
  RETURN_IF_ERROR(elements_of(api, value, &count, &found_type));
  if (count != expected || found_type != type)
    return fail(api, ort::kInvalidGraph,
                "%s have %lld elements, N, K, bits and block_size want %lld", kNames[input],
                static_cast<long long>(count), static_cast<long long>(expected));
  return api->GetTensorMutableData(const_cast<ort::Value*>(value),
                                   reinterpret_cast<void**>(const_cast<T**>(data)));
}

// Reads the tensors of a weight: those that begin at input `data`, offsets and multiples.
ort::Status* read_weight(const Kernel& kernel, const ort::KernelInfo* info, size_t data,
                         size_t offsets, size_t multiples, Weight* weight) {
  Weight& w = *weight;
  const bool has_offsets = kernel.given[offsets];
  const bool has_multiples = kernel.given[multiples];
  if (const char* problem =
          check_form(w, kernel.given[data + 1], kernel.given[data + 2], has_offsets, has_multiples))
    return fail(kernel.api, ort::kInvalidGraph, "%s", problem);
  const int64_t blocks = w.panels() * w.blocks() * kPanel;
  const int64_t scales = has_multiples ? w.panels() * (w.inputs / kSuper) * kPanel : blocks;
  const int64_t bytes = w.panels() * w.groups() * w.group_bytes();
  RETURN_IF_ERROR(read_constant(kernel, info, data, ort::kUint8, bytes, &w.data));
  RETURN_IF_ERROR(read_constant(kernel, info, data + 1, ort::kFloat16, scales, &w.scales));
  RETURN_IF_ERROR(read_constant(kernel, info, data + 2, ort::kUint8, blocks, &w.zeros));
  RETURN_IF_ERROR(read_constant(kernel, info, multiples, ort::kInt8,
                                has_offsets ? 2 * blocks : blocks, &w.multiples));
  return read_constant(kernel, info, offsets, ort::kFloat16, scales, &w.offsets);
}

ort::Status* read_sizes(const ort::Api* api, const ort::KernelInfo* info, const char* outputs_name,
                        const char* bits_name, const char* block_name, const char* bfloat16_name,
                        Weight* weight) {
  int64_t bits = 0;
  int64_t block = 0;
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_int64(info, outputs_name, &weight->outputs));
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_int64(info, "K", &weight->inputs));
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_int64(info, bits_name, &bits));
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_int64(info, block_name, &block));
  if (const char* problem = check_sizes(weight->outputs, weight->inputs, bits, block))
    return fail(api, ort::kInvalidGraph, "%s", problem);
  const int64_t activation_bits = integer_of(api, info, "activation_bits");
  if (activation_bits != 0 && activation_bits != 8 && activation_bits != 16 &&
      activation_bits != 32)
    return fail(api, ort::kInvalidGraph, "activation_bits is not 8, 16 or 32");
  weight->bits = static_cast<int>(bits);
  weight->block = static_cast<int>(block);
  weight->bfloat16 = integer_of(api, info, bfloat16_name) != 0;
  weight->pairs = activation_bits == 16;
  if (weight->pairs && weight->floats())
    return fail(api, ort::kInvalidGraph, "activation_bits 16 go with weights of at most 8 bits");
  weight->exact = activation_bits == 32 && !weight->floats();
  return nullptr;
}

ort::Status* read_activation(const ort::Api* api, const ort::KernelInfo* info, int* activation) {
  static const char* const kNames[kActivations] = {"none", "relu", "silu", "gelu-tanh", "gelu"};
  char name[32] = "none";
  size_t size = sizeof(name);
  if (ort::Status* status = api->KernelInfoGetAttribute_string(info, "activation", name, &size))
    api->ReleaseStatus(status);  // the attribute is optional
  for (*activation = 0; *activation < kActivations; ++*activation)
    if (std::strcmp(kNames[*activation], name) == 0) return nullptr;
  return fail(api, ort::kInvalidGraph,
              "activation is none of none, relu, silu, gelu-tanh and gelu");
}

ort::Status* read_product(const ort::KernelInfo* info, Kernel* kernel) {
  const ort::Api* api = kernel->api;
  Product& product = kernel->product;
  const bool* given = kernel->given;
  RETURN_IF_ERROR(read_sizes(api, info, "N", "bits", "block_size", "bfloat16", &product.weight));
  RETURN_IF_ERROR(read_weight(*kernel, info, kData, kOffsets, kMultiples, &product.weight));
  RETURN_IF_ERROR(
      read_constant(*kernel, info, kNorm, ort::kFloat, product.weight.inputs, &product.norm));
  RETURN_IF_ERROR(read_activation(api, info, &product.activation));
  if (given[kNorm])
    RETURN_IF_ERROR(api->KernelInfoGetAttribute_float(info, "epsilon", &product.epsilon));
  if (given[kSkip] && !given[kNorm]) return fail(api, ort::kInvalidGraph, "skip goes with a norm");
  product.layer = integer_of(api, info, "layer") != 0;
  product.keeps_norm = integer_of(api, info, "keeps_norm") != 0;
  if (given[kShift] && !product.layer)
    return fail(api, ort::kInvalidGraph, "shifts go with a layer norm");
  if (product.layer && !given[kNorm])
    return fail(api, ort::kInvalidGraph, "a layer norm goes with norms");
  if (product.keeps_norm && !given[kSkip])
    return fail(api, ort::kInvalidGraph, "keeps_norm goes with skip");
  RETURN_IF_ERROR(
      read_constant(*kernel, info, kShift, ort::kFloat, product.weight.inputs, &product.shift));
  product.beside = integer_of(api, info, "up_N") != 0;
  if (product.beside && (!given[kUpData] || product.activation != kNone))
    return fail(api, ort::kInvalidGraph, "up_N goes with up's data, and with no activation");
  if (given[kUpData]) {
    const char* outputs = product.beside ? "up_N" : "N";
    RETURN_IF_ERROR(
        read_sizes(api, info, outputs, "up_bits", "up_block_size", "up_bfloat16", &product.up));
    if (product.up.float_rows() != product.weight.float_rows())
      return fail(api, ort::kInvalidGraph, "up has floats, or the other weight has, but not both");
    RETURN_IF_ERROR(read_weight(*kernel, info, kUpData, kUpOffsets, kUpMultiples, &product.up));
  }
  const float*& bias = product.weight.bias;
  RETURN_IF_ERROR(read_constant(*kernel, info, kBias, ort::kFloat, product.outputs(), &bias));
  if (product.beside && bias) product.up.bias = bias + product.weight.outputs;
  return nullptr;
}

ort::Status* create_kernel(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info,
                           void** out) {
  const char* problem = nullptr;
  Kernel kernel = {api, choose_kernels(&problem), {}, {}};
  if (kernel.kernels == nullptr) return fail(api, ort::kEngineError, "%s", problem);
  RETURN_IF_ERROR(find_inputs(api, info, kInputs, kernel.given));
  RETURN_IF_ERROR(read_product(info, &kernel));
  return keep(api, kernel, out);
}

// Reads the shape and the number of rows of x.
ort::Status* rows_of(const Kernel& kernel, const ort::Value* x, int64_t* shape, size_t* rank,
                     int64_t* rows) {
  RETURN_IF_ERROR(shape_of(kernel.api, x, "x", shape, rank));
  if (shape[*rank - 1] != kernel.product.weight.inputs)
    return fail(kernel.api, ort::kInvalidArgument, "rows of x have %lld values, K is %lld",
                static_cast<long long>(shape[*rank - 1]),
                static_cast<long long>(kernel.product.weight.inputs));
  *rows = 1;
  for (size_t i = 0; i + 1 < *rank; i++) *rows *= shape[i];
  return nullptr;
}

ort::Status* check_skip(const Kernel& kernel, const ort::KernelContext* context, int64_t expected) {
  const ort::Value* skip = nullptr;
  int64_t count = 0;
  int type = 0;
  RETURN_IF_ERROR(kernel.api->KernelContext_GetInput(context, kSkip, &skip));
  RETURN_IF_ERROR(elements_of(kernel.api, skip, &count, &type));
  if (count == expected) return nullptr;
  return fail(kernel.api, ort::kInvalidArgument, "skip has %lld values, x has %lld",
              static_cast<long long>(count), static_cast<long long>(expected));
}

ort::Status* output_of(const Kernel& kernel, ort::KernelContext* context, size_t output,
                       const int64_t* shape, size_t rank, float** data) {
  ort::Value* value = nullptr;
  RETURN_IF_ERROR(kernel.api->KernelContext_GetOutput(context, output, shape, rank, &value));
  if (value == nullptr)
    return fail(kernel.api, ort::kInvalidGraph, "skip goes with a second output, the sum");
  return kernel.api->GetTensorMutableData(value, reinterpret_cast<void**>(data));
}

ort::Status* compute(void* op, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(op);
  const ort::Api* api = kernel.api;
  Product product = kernel.product;
  const ort::Value* x = nullptr;
  const void* rows = nullptr;
  const void* skip = nullptr;
  RETURN_IF_ERROR(api->KernelContext_GetInput(context, kX, &x));
  int64_t shape[kMostRank];
  size_t rank = 0;
  RETURN_IF_ERROR(rows_of(kernel, x, shape, &rank, &product.rows));
  if (kernel.given[kSkip]) {
    RETURN_IF_ERROR(check_skip(kernel, context, product.rows * product.weight.inputs));
    RETURN_IF_ERROR(output_of(kernel, context, kTotal, shape, rank, &product.total));
  }
  shape[rank - 1] = product.outputs();
  RETURN_IF_ERROR(output_of(kernel, context, kY, shape, rank, &product.y));
  RETURN_IF_ERROR(input_of(api, context, kX, true, &rows));
  RETURN_IF_ERROR(input_of(api, context, kSkip, kernel.given[kSkip], &skip));
  product.x = static_cast<const float*>(rows);
  product.skip = static_cast<const float*>(skip);
  product.prompt = reading_prompt;
  Session session = {api, context, nullptr};
  if (!packed_linear(*kernel.kernels, product, parallel_for, &session))
    return fail(api, ort::kEngineError, "no memory for the rows of a call");
  return session.status;
}

constexpr ort::CustomOp packed_linear_op() {
  ort::CustomOp op = common_callbacks();
  op.GetName = [](const ort::CustomOp*) { return "PackedLinear"; };
  op.GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return kInputs; };
  op.GetInputType = [](const ort::CustomOp*, size_t input) {
    if (input == kScales || input == kUpScales || input == kOffsets || input == kUpOffsets)
      return ort::kFloat16;
    if (input == kMultiples || input == kUpMultiples) return ort::kInt8;
    const bool bytes = input == kData || input == kZeros || input == kUpData || input == kUpZeros;
    return bytes ? ort::kUint8 : ort::kFloat;
  };
  op.GetInputCharacteristic = [](const ort::CustomOp*, size_t input) {
    return input <= kData ? ort::kRequired : ort::kOptional;
  };
  op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return kOutputs; };
  op.GetOutputCharacteristic = [](const ort::CustomOp*, size_t output) {
    return output == kY ? ort::kRequired : ort::kOptional;
  };
  op.CreateKernelV2 = create_kernel;
  op.KernelComputeV2 = compute;
  return op;
}

}  // namespace

constexpr ort::CustomOp kPackedLinearOp = packed_linear_op();

}  // namespace freeexport
