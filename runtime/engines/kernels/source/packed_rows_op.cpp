// ONNX Runtime operator PackedRows: returns rows of a weight packed for PackedLinear, without zero
// points. A head that is tied to the embedding then needs no second copy.
#include <cstring>

#include "operators.h"

namespace freeexport {
namespace {

enum Input : size_t { kIndices, kData, kScales, kOffsets, kMultiples, kInputs };

struct Kernel {
  const ort::Api* api;
  Weight weight;  // without tensors
  bool given[kInputs];
};

// Converts a finite float16. Its shifted bits are those of a float that is 2^-112 times as large.
float widened(uint16_t half) {
  const uint32_t bits = (half & 0x8000u) << 16 | (half & 0x7fffu) << 13;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value * 0x1p112f;
}

float widened_bfloat(uint16_t bfloat) {
  const uint32_t bits = static_cast<uint32_t>(bfloat) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

void read_floats(const Weight& weight, int64_t row, float* y) {
  const int64_t first = row / kPanel * weight.groups() * kGroup * kPanel + row % kPanel;
  const auto* floats = reinterpret_cast<const float*>(weight.data) + first;
  const auto* halves = reinterpret_cast<const uint16_t*>(weight.data) + first;
  for (int64_t i = 0; i < weight.inputs; i++, floats += kPanel, halves += kPanel)
    y[i] = weight.bits == 32 ? *floats
           : weight.bfloat16 ? widened_bfloat(*halves)
                             : widened(*halves);
}

void read_row(const Weight& weight, int64_t row, float* y) {
  if (weight.floats()) return read_floats(weight, row, y);
  const int64_t panel = row / kPanel;
  const int64_t lane = row % kPanel;
  const uint8_t* data = weight.data + panel * weight.groups() * weight.group_bytes() + lane * 4;
  const int64_t first_scale = panel * weight.scales_of_panel() * kPanel + lane;
  const int64_t inputs_of_scale = weight.multiples ? kSuper : weight.block;
  const int64_t parts = weight.offsets ? 2 : 1;
  const int8_t* multiples = weight.multiples
                                ? weight.multiples + panel * weight.blocks() * parts * kPanel + lane
                                : nullptr;
  const int zero = weight.offsets ? 0 : 1 << (weight.bits - 1);
  for (int64_t first = 0; first < weight.inputs; first += weight.block) {
    const int64_t end = first + weight.block < weight.inputs ? first + weight.block : weight.inputs;
    const int64_t at = first_scale + first / inputs_of_scale * kPanel;
    float scale = widened(weight.scales[at]);
    float offset = weight.offsets ? widened(weight.offsets[at]) : 0.0f;
    if (multiples) {
      scale *= static_cast<float>(*multiples);
      if (weight.offsets) offset *= static_cast<float>(multiples[kPanel]);
      multiples += parts * kPanel;
    }
    for (int64_t i = first; i < end; i++) {
      const uint8_t* group = data + i / kGroup * weight.group_bytes();
      y[i] = static_cast<float>(value_of(group, weight.bits, static_cast<int>(i % kGroup)) - zero) *
                 scale +
             offset;
    }
  }
}

ort::Status* check_constant(const ort::Api* api, const ort::KernelInfo* info, const Kernel& kernel,
                            size_t input, int type, int64_t expected) {
  if (!kernel.given[input]) return nullptr;
  int constant = 0;
  int found_type = 0;
  const ort::Value* value = nullptr;
  RETURN_IF_ERROR(api->KernelInfoGetConstantInput_tensor(info, input, &constant, &value));
  if (!constant)
    return fail(api, ort::kInvalidGraph, "input %zu of PackedRows is no constant of the graph",
                input);
  int64_t count = 0;
  RETURN_IF_ERROR(elements_of(api, value, &count, &found_type));
  if (count == expected && found_type == type) return nullptr;
  return fail(api, ort::kInvalidGraph,
              "input %zu of PackedRows has %lld elements, N, K, bits and block_size want %lld",
              input, static_cast<long long>(count), static_cast<long long>(expected));
}

ort::Status* create_kernel(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info,
                           void** out) {
  Kernel kernel = {api, {}, {}};
  Weight& weight = kernel.weight;
  int64_t block = 0;
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_int64(info, "N", &weight.outputs));
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_int64(info, "K", &weight.inputs));
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_int64(info, "block_size", &block));
  const int64_t bits = integer_of(api, info, "bits", 8);
  RETURN_IF_ERROR(find_inputs(api, info, kInputs, kernel.given));
  const bool offsets = kernel.given[kOffsets];
  const bool multiples = kernel.given[kMultiples];
  const char* problem = check_sizes(weight.outputs, weight.inputs, bits, block);
  weight.bits = static_cast<int>(bits);
  weight.block = static_cast<int>(block);
  weight.bfloat16 = integer_of(api, info, "bfloat16") != 0;
  if (problem == nullptr)
    problem = check_form(weight, kernel.given[kScales], false, offsets, multiples);
  if (problem != nullptr) return fail(api, ort::kInvalidGraph, "%s", problem);
  const int64_t blocks = weight.panels() * weight.blocks() * kPanel;
  const int64_t scales = multiples ? weight.panels() * (weight.inputs / kSuper) * kPanel : blocks;
  const int64_t bytes = weight.panels() * weight.groups() * weight.group_bytes();
  RETURN_IF_ERROR(check_constant(api, info, kernel, kData, ort::kUint8, bytes));
  RETURN_IF_ERROR(check_constant(api, info, kernel, kScales, ort::kFloat16, scales));
  RETURN_IF_ERROR(check_constant(api, info, kernel, kOffsets, ort::kFloat16, scales));
  RETURN_IF_ERROR(
      check_constant(api, info, kernel, kMultiples, ort::kInt8, offsets ? 2 * blocks : blocks));
  return keep(api, kernel, out);
}

ort::Status* compute(void* op, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(op);
  const ort::Api* api = kernel.api;
  Weight weight = kernel.weight;
  const ort::Value* indices = nullptr;
  RETURN_IF_ERROR(api->KernelContext_GetInput(context, kIndices, &indices));
  int64_t shape[kMostRank + 1];
  int64_t count = 1;
  size_t rank = 0;
  RETURN_IF_ERROR(shape_of(api, indices, "indices", shape, &rank));
  for (size_t i = 0; i < rank; i++) count *= shape[i];
  shape[rank] = weight.inputs;
  const void* inputs[kInputs] = {};
  for (size_t input = 0; input < kInputs; input++)
    RETURN_IF_ERROR(input_of(api, context, input, kernel.given[input], &inputs[input]));
  weight.data = static_cast<const uint8_t*>(inputs[kData]);
  weight.scales = static_cast<const uint16_t*>(inputs[kScales]);
  weight.offsets = static_cast<const uint16_t*>(inputs[kOffsets]);
  weight.multiples = static_cast<const int8_t*>(inputs[kMultiples]);
  ort::Value* value = nullptr;
  float* y = nullptr;
  RETURN_IF_ERROR(api->KernelContext_GetOutput(context, 0, shape, rank + 1, &value));
  RETURN_IF_ERROR(api->GetTensorMutableData(value, reinterpret_cast<void**>(&y)));
  for (int64_t i = 0; i < count; i++) {
    const int64_t row = static_cast<const int64_t*>(inputs[kIndices])[i];
    if (row < 0 || row >= weight.outputs)
      return fail(api, ort::kInvalidArgument, "index %lld is no row of %lld",
                  static_cast<long long>(row), static_cast<long long>(weight.outputs));
    read_row(weight, row, y + i * weight.inputs);
  }
  return nullptr;
}

constexpr ort::CustomOp packed_rows_op() {
  ort::CustomOp op = common_callbacks();
  op.GetName = [](const ort::CustomOp*) { return "PackedRows"; };
  op.GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return kInputs; };
  op.GetInputType = [](const ort::CustomOp*, size_t input) {
    static constexpr int kTypes[kInputs] = {ort::kInt64, ort::kUint8, ort::kFloat16, ort::kFloat16,
                                            ort::kInt8};
    return kTypes[input];
  };
  op.GetInputCharacteristic = [](const ort::CustomOp*, size_t input) {
    return input <= kData ? ort::kRequired : ort::kOptional;
  };
  op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 1; };
  op.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  op.CreateKernelV2 = create_kernel;
  op.KernelComputeV2 = compute;
  return op;
}

}  // namespace

constexpr ort::CustomOp kPackedRowsOp = packed_rows_op();

}  // namespace freeexport
