// BestTwo as an operator of ONNX Runtime.
#include "best_two.h"
#include "operators.h"

namespace freeexport {
namespace {

struct Kernel {
  const ort::Api* api;
  const Kernels* kernels;
};

ort::Status* create_kernel(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo*, void** out) {
  const char* problem = nullptr;
  const Kernel kernel = {api, choose_kernels(&problem)};
  if (kernel.kernels == nullptr) return fail(api, ort::kEngineError, "%s", problem);
  return keep(api, kernel, out);
}

ort::Status* compute(void* op, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(op);
  const ort::Api* api = kernel.api;
  const ort::Value* value = nullptr;
  RETURN_IF_ERROR(api->KernelContext_GetInput(context, 0, &value));
  int64_t shape[kMostRank];
  size_t rank = 0;
  RETURN_IF_ERROR(shape_of(api, value, "logits", shape, &rank));
  if (rank != 2 || shape[1] < 2)
    return fail(api, ort::kInvalidArgument, "logits are no rows of two or more");
  Logits logits = {shape[0], shape[1], nullptr, nullptr, nullptr};
  const void* values = nullptr;
  RETURN_IF_ERROR(input_of(api, context, 0, true, &values));
  logits.values = static_cast<const float*>(values);
  shape[1] = 2;
  ort::Value *top = nullptr, *log_sum = nullptr;
  RETURN_IF_ERROR(api->KernelContext_GetOutput(context, 0, shape, 2, &top));
  RETURN_IF_ERROR(api->KernelContext_GetOutput(context, 1, shape, 1, &log_sum));
  RETURN_IF_ERROR(api->GetTensorMutableData(top, reinterpret_cast<void**>(&logits.top)));
  RETURN_IF_ERROR(api->GetTensorMutableData(log_sum, reinterpret_cast<void**>(&logits.log_sum)));
  Session session = {api, context, nullptr};
  if (!best_two(*kernel.kernels, logits, parallel_for, &session))
    return fail(api, ort::kEngineError, "no memory for the logits of a call");
  return session.status;
}

constexpr ort::CustomOp best_two_op() {
  ort::CustomOp op = common_callbacks();
  op.GetName = [](const ort::CustomOp*) { return "BestTwo"; };
  op.GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return 1; };
  op.GetInputType = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
  op.GetInputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 2; };
  op.GetOutputType = [](const ort::CustomOp*, size_t output) { return output == 0 ? ort::kInt64 : ort::kFloat; };
  op.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  op.CreateKernelV2 = create_kernel;
  op.KernelComputeV2 = compute;
  return op;
}

}  // namespace

constexpr ort::CustomOp kBestTwoOp = best_two_op();

}  // namespace freeexport
