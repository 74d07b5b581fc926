// What the library offers: operators for ONNX Runtime, and a few functions for Python and tests.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "ort_api.h"
#include "packed_linear.h"
#include "version.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace freeexport {
namespace {

enum Input : size_t { kX, kData, kScales, kZeros, kBias, kInputs };

// One PackedLinear of a session.
struct Kernel {
  const ort::Api* api;
  const Kernels* kernels;
  Weight sizes;     // without its tensors, which are asked for in each call
  bool given[kInputs];
};

__attribute__((format(printf, 3, 4))) ort::Status* fail(const ort::Api* api, int code, const char* format, ...) {
  char text[300] = "freeexport.PackedLinear: ";
  constexpr size_t kBegun = 25;
  std::va_list values;
  va_start(values, format);
  std::vsnprintf(text + kBegun, sizeof(text) - kBegun, format, values);
  va_end(values);
  return api->CreateStatus(code, text);
}

#define RETURN_IF_ERROR(call) \
  if (ort::Status* status = (call)) return status

ort::Status* elements_of(const ort::Api* api, const ort::Value* value, int64_t* count, int* type) {
  ort::TypeAndShape* info = nullptr;
  RETURN_IF_ERROR(api->GetTensorTypeAndShape(value, &info));
  size_t elements = 0;
  ort::Status* status = api->GetTensorShapeElementCount(info, &elements);
  if (status == nullptr) status = api->GetTensorElementType(info, type);
  api->ReleaseTensorTypeAndShapeInfo(info);
  *count = static_cast<int64_t>(elements);
  return status;
}

// Weights are constants, so they are looked at once.
ort::Status* check_constant(const ort::Api* api, const ort::KernelInfo* info, size_t input, int type, int64_t expected,
                            bool* given) {
  static const char* const kNames[] = {"x", "data", "scales", "zero points", "bias"};
  size_t inputs = 0, name = 0;
  RETURN_IF_ERROR(api->KernelInfo_GetInputCount(info, &inputs));
  // An optional input that is left out has an empty name.
  if (input < inputs) RETURN_IF_ERROR(api->KernelInfo_GetInputName(info, input, nullptr, &name));
  *given = name > 1;
  if (!*given) return nullptr;
  int constant = 0, found_type = 0;
  const ort::Value* value = nullptr;
  RETURN_IF_ERROR(api->KernelInfoGetConstantInput_tensor(info, input, &constant, &value));
  if (!constant) return fail(api, ort::kInvalidGraph, "%s are no constant of the graph", kNames[input]);
  int64_t count = 0;
  RETURN_IF_ERROR(elements_of(api, value, &count, &found_type));
  if (count == expected && found_type == type) return nullptr;
  return fail(api, ort::kInvalidGraph, "%s have %lld elements, N, K, bits and block_size want %lld", kNames[input],
              static_cast<long long>(count), static_cast<long long>(expected));
}

ort::Status* read_sizes(const ort::Api* api, const ort::KernelInfo* info, Weight* weight) {
  int64_t bits = 0, block = 0;
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_int64(info, "N", &weight->outputs));
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_int64(info, "K", &weight->inputs));
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_int64(info, "bits", &bits));
  RETURN_IF_ERROR(api->KernelInfoGetAttribute_int64(info, "block_size", &block));
  if (const char* problem = check_sizes(weight->outputs, weight->inputs, bits, block))
    return fail(api, ort::kInvalidGraph, "%s", problem);
  weight->bits = static_cast<int>(bits);
  weight->block = static_cast<int>(block);
  return nullptr;
}

ort::Status* create_kernel(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info, void** out) {
  const char* problem = nullptr;
  Kernel kernel = {api, choose_kernels(&problem), {}, {}};
  if (kernel.kernels == nullptr) return fail(api, ort::kEngineError, "%s", problem);
  Weight& w = kernel.sizes;
  RETURN_IF_ERROR(read_sizes(api, info, &w));
  const int64_t scales = w.panels() * w.blocks() * kPanel;
  bool* given = kernel.given;
  const int64_t bytes = w.panels() * w.groups() * w.group_bytes();
  RETURN_IF_ERROR(check_constant(api, info, kData, ort::kUint8, bytes, &given[kData]));
  RETURN_IF_ERROR(check_constant(api, info, kScales, ort::kFloat, scales, &given[kScales]));
  RETURN_IF_ERROR(check_constant(api, info, kZeros, ort::kUint8, scales, &given[kZeros]));
  RETURN_IF_ERROR(check_constant(api, info, kBias, ort::kFloat, w.outputs, &given[kBias]));
  // Without C++'s own allocation the library needs nothing but the C library, of any version.
  auto* kept = static_cast<Kernel*>(std::malloc(sizeof(Kernel)));
  if (kept == nullptr) return fail(api, ort::kEngineError, "no memory");
  *kept = kernel;
  *out = kept;
  return nullptr;
}

ort::Status* input_of(const Kernel& kernel, const ort::KernelContext* context, size_t input, const void** data) {
  *data = nullptr;
  if (!kernel.given[input]) return nullptr;
  const ort::Value* value = nullptr;
  RETURN_IF_ERROR(kernel.api->KernelContext_GetInput(context, input, &value));
  return kernel.api->GetTensorMutableData(const_cast<ort::Value*>(value), const_cast<void**>(data));
}

// The shape of x with the outputs in place of the inputs, and how many rows that is.
ort::Status* output_shape(const Kernel& kernel, const ort::Value* x, int64_t* shape, size_t* rank, int64_t* rows) {
  constexpr size_t kMostRank = 8;
  const ort::Api* api = kernel.api;
  ort::TypeAndShape* info = nullptr;
  RETURN_IF_ERROR(api->GetTensorTypeAndShape(x, &info));
  ort::Status* status = api->GetDimensionsCount(info, rank);
  if (status == nullptr && (*rank < 1 || *rank > kMostRank))
    status = fail(api, ort::kInvalidArgument, "x has no dimension, or more than 8");
  if (status == nullptr) status = api->GetDimensions(info, shape, *rank);
  api->ReleaseTensorTypeAndShapeInfo(info);
  if (status != nullptr) return status;
  int64_t& last = shape[*rank - 1];
  if (last != kernel.sizes.inputs)
    return fail(api, ort::kInvalidArgument, "rows of x have %lld values, K is %lld", static_cast<long long>(last),
                static_cast<long long>(kernel.sizes.inputs));
  last = kernel.sizes.outputs;
  *rows = 1;
  for (size_t i = 0; i + 1 < *rank; i++) *rows *= shape[i];
  return nullptr;
}

struct Session {
  const ort::Api* api;
  const ort::KernelContext* context;
  ort::Status* status;
};

// On the session's own threads.
void parallel_for(void* context, void (*task)(void*, size_t), size_t total, void* data) {
  auto* session = static_cast<Session*>(context);
  if (session->status != nullptr) return;
  session->status = session->api->KernelContext_ParallelFor(session->context, task, total, 0, data);
}

ort::Status* compute(void* op, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(op);
  const ort::Api* api = kernel.api;
  const ort::Value* x = nullptr;
  RETURN_IF_ERROR(api->KernelContext_GetInput(context, kX, &x));
  int64_t shape[8], rows = 0;
  size_t rank = 0;
  RETURN_IF_ERROR(output_shape(kernel, x, shape, &rank, &rows));
  ort::Value* y = nullptr;
  RETURN_IF_ERROR(api->KernelContext_GetOutput(context, 0, shape, rank, &y));
  void *from = nullptr, *to = nullptr;
  RETURN_IF_ERROR(api->GetTensorMutableData(const_cast<ort::Value*>(x), &from));
  RETURN_IF_ERROR(api->GetTensorMutableData(y, &to));
  const void* constants[kInputs] = {};
  for (size_t input = kData; input < kInputs; input++)
    RETURN_IF_ERROR(input_of(kernel, context, input, &constants[input]));
  Weight weight = kernel.sizes;
  weight.data = static_cast<const uint8_t*>(constants[kData]);
  weight.scales = static_cast<const float*>(constants[kScales]);
  weight.zeros = static_cast<const uint8_t*>(constants[kZeros]);
  weight.bias = static_cast<const float*>(constants[kBias]);
  Session session = {api, context, nullptr};
  if (!packed_linear(*kernel.kernels, static_cast<const float*>(from), rows, weight, static_cast<float*>(to),
                     parallel_for, &session))
    return fail(api, ort::kEngineError, "no memory for the rows of a call");
  return session.status;
}

constexpr ort::CustomOp packed_linear_op() {
  ort::CustomOp op = {};
  op.version = ort::kApiVersion;
  op.GetName = [](const ort::CustomOp*) { return "PackedLinear"; };
  op.GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return nullptr; };
  op.GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return kInputs; };
  op.GetInputType = [](const ort::CustomOp*, size_t input) {
    return input == kData || input == kZeros ? ort::kUint8 : ort::kFloat;
  };
  op.GetInputCharacteristic = [](const ort::CustomOp*, size_t input) {
    return input == kZeros || input == kBias ? ort::kOptional : ort::kRequired;
  };
  op.GetInputMemoryType = [](const ort::CustomOp*, size_t) { return 0; };
  op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
  op.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  op.GetVariadicInputMinArity = op.GetVariadicInputHomogeneity = [](const ort::CustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = op.GetVariadicOutputHomogeneity = [](const ort::CustomOp*) { return 0; };
  op.GetStartVersion = [](const ort::CustomOp*) { return 1; };
  op.GetEndVersion = [](const ort::CustomOp*) { return 0x7fffffff; };
  op.CreateKernelV2 = create_kernel;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = [](void* kernel) { std::free(kernel); };
  return op;
}

void serial(void*, void (*task)(void*, size_t), size_t total, void* data) {
  for (size_t i = 0; i < total; i++) task(data, i);
}

}  // namespace
}  // namespace freeexport

// What ONNX Runtime calls when a session's options name the library.
EXPORT freeexport::ort::Status* RegisterCustomOps(freeexport::ort::SessionOptions* options,
                                                  const freeexport::ort::ApiBase* base) {
  using namespace freeexport;
  // A runtime that is older has no interface of this version; it logs that, and a graph then lacks its operators.
  const ort::Api* api = base->GetApi(ort::kApiVersion);
  if (api == nullptr) return nullptr;
  const char* problem = nullptr;
  if (choose_kernels(&problem) == nullptr) return fail(api, ort::kEngineError, "%s", problem);
  static constexpr ort::CustomOp op = packed_linear_op();
  // ONNX Runtime keeps pointers to both, for sessions that may outlive any owner here.
  ort::CustomOpDomain* domain = nullptr;
  RETURN_IF_ERROR(api->CreateCustomOpDomain("freeexport", &domain));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &op));
  return api->AddCustomOpDomain(options, domain);
}

EXPORT int freeexport_kernels_version() { return FREEEXPORT_KERNELS_VERSION; }

// The instruction set that would be used, or null; `problem` then says why.
EXPORT const char* freeexport_instructions(const char** problem) {
  const freeexport::Kernels* kernels = freeexport::choose_kernels(problem);
  return kernels ? kernels->name : nullptr;
}

// Whether this processor has an instruction set; -1 where the library has no kernels of that name.
EXPORT int freeexport_supports(const char* instructions) {
  const freeexport::Kernels* kernels = freeexport::find_kernels(instructions);
  return kernels ? kernels->supported() : -1;
}

// PackedLinear on one thread, for tests. Null, or what is wrong.
EXPORT const char* freeexport_packed_linear(const char* instructions, const float* x, int64_t rows, int64_t outputs,
                                            int64_t inputs, int bits, int block, const uint8_t* data,
                                            const float* scales, const uint8_t* zeros, const float* bias, float* y) {
  using namespace freeexport;
  const Kernels* kernels = find_kernels(instructions);
  if (kernels == nullptr || !kernels->supported()) return "no such instructions here";
  if (const char* problem = check_sizes(outputs, inputs, bits, block)) return problem;
  const Weight weight = {outputs, inputs, bits, block, data, scales, zeros, bias};
  return packed_linear(*kernels, x, rows, weight, y, serial, nullptr) ? nullptr : "no memory";
}
