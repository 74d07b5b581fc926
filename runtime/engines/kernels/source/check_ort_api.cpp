// Compiles only if ort_api.h agrees with the official header. Not part of the library.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "ort_api.h"

namespace official {
#include <onnxruntime_c_api.h>
}

namespace ours = freeexport::ort;

#define ENTRY(name) \
  static_assert(offsetof(ours::Api, name) == offsetof(official::OrtApi, name), #name)
ENTRY(CreateStatus);
ENTRY(CreateCustomOpDomain);
ENTRY(CustomOpDomain_Add);
ENTRY(AddCustomOpDomain);
ENTRY(GetTensorMutableData);
ENTRY(GetTensorElementType);
ENTRY(GetDimensionsCount);
ENTRY(GetDimensions);
ENTRY(GetTensorShapeElementCount);
ENTRY(GetTensorTypeAndShape);
ENTRY(KernelInfoGetAttribute_float);
ENTRY(KernelInfoGetAttribute_int64);
ENTRY(KernelInfoGetAttribute_string);
ENTRY(KernelContext_GetInput);
ENTRY(KernelContext_GetOutput);
ENTRY(ReleaseStatus);
ENTRY(ReleaseTensorTypeAndShapeInfo);
ENTRY(KernelInfo_GetInputCount);
ENTRY(KernelInfo_GetInputName);
ENTRY(KernelInfoGetConstantInput_tensor);
ENTRY(KernelContext_ParallelFor);

#define BASE(name) \
  static_assert(offsetof(ours::ApiBase, name) == offsetof(official::OrtApiBase, name), #name)
BASE(GetApi);
BASE(GetVersionString);

#define CALLBACK(name) \
  static_assert(offsetof(ours::CustomOp, name) == offsetof(official::OrtCustomOp, name), #name)
CALLBACK(version);
CALLBACK(CreateKernel);
CALLBACK(GetName);
CALLBACK(GetExecutionProviderType);
CALLBACK(GetInputType);
CALLBACK(GetInputTypeCount);
CALLBACK(GetOutputType);
CALLBACK(GetOutputTypeCount);
CALLBACK(KernelCompute);
CALLBACK(KernelDestroy);
CALLBACK(GetInputCharacteristic);
CALLBACK(GetOutputCharacteristic);
CALLBACK(GetInputMemoryType);
CALLBACK(GetVariadicInputMinArity);
CALLBACK(GetVariadicInputHomogeneity);
CALLBACK(GetVariadicOutputMinArity);
CALLBACK(GetVariadicOutputHomogeneity);
CALLBACK(CreateKernelV2);
CALLBACK(KernelComputeV2);
CALLBACK(InferOutputShapeFn);
CALLBACK(GetStartVersion);
CALLBACK(GetEndVersion);
CALLBACK(GetMayInplace);
CALLBACK(ReleaseMayInplace);
CALLBACK(GetAliasMap);
CALLBACK(ReleaseAliasMap);
static_assert(sizeof(ours::CustomOp) == sizeof(official::OrtCustomOp),
              "OrtCustomOp has other members");

static_assert(ours::kApiVersion <= ORT_API_VERSION,
              "the header is older than what the library asks for");
static_assert(ours::kInvalidArgument == official::ORT_INVALID_ARGUMENT);
static_assert(ours::kInvalidGraph == official::ORT_INVALID_GRAPH);
static_assert(ours::kEngineError == official::ORT_RUNTIME_EXCEPTION);
static_assert(ours::kFloat == official::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
static_assert(ours::kUint8 == official::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
static_assert(ours::kInt8 == official::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8);
static_assert(ours::kInt64 == official::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
static_assert(ours::kFloat16 == official::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
static_assert(ours::kInt32 == official::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
static_assert(ours::kRequired == official::INPUT_OUTPUT_REQUIRED);
static_assert(ours::kOptional == official::INPUT_OUTPUT_OPTIONAL);
