// Functions of ONNX Runtime's C API that the library uses, as of API version 18. Later versions
// keep them. check_ort_api.cpp compares them with the official header.
#pragma once

#include <cstddef>
#include <cstdint>

namespace freeexport::ort {

constexpr uint32_t kApiVersion = 18;
// Values of OrtErrorCode.
constexpr int kInvalidArgument = 2;
constexpr int kInvalidGraph = 10;
constexpr int kEngineError = 6;
// Values of ONNXTensorElementDataType.
constexpr int kFloat = 1;
constexpr int kUint8 = 2;
constexpr int kInt8 = 3;
constexpr int kInt32 = 6;
constexpr int kInt64 = 7;
constexpr int kFloat16 = 10;
// Values of OrtCustomOpInputOutputCharacteristic.
constexpr int kRequired = 0;
constexpr int kOptional = 1;

struct Status;
struct Value;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct CustomOpDomain;
struct TypeAndShape;
struct CustomOp;

struct Api {
  Status* (*CreateStatus)(int code, const char* message);
  void* unused_1[25];
  Status* (*CreateCustomOpDomain)(const char* name, CustomOpDomain** out);
  Status* (*CustomOpDomain_Add)(CustomOpDomain* domain, const CustomOp* op);
  Status* (*AddCustomOpDomain)(SessionOptions* options, CustomOpDomain* domain);
  void* unused_2[22];
  Status* (*GetTensorMutableData)(Value* value, void** out);
  void* unused_3[8];
  Status* (*GetTensorElementType)(const TypeAndShape* info, int* out);
  Status* (*GetDimensionsCount)(const TypeAndShape* info, size_t* out);
  Status* (*GetDimensions)(const TypeAndShape* info, int64_t* dimensions, size_t count);
  void* unused_4[1];
  Status* (*GetTensorShapeElementCount)(const TypeAndShape* info, size_t* out);
  Status* (*GetTensorTypeAndShape)(const Value* value, TypeAndShape** out);
  void* unused_5[19];
  Status* (*KernelInfoGetAttribute_float)(const KernelInfo* info, const char* name, float* out);
  Status* (*KernelInfoGetAttribute_int64)(const KernelInfo* info, const char* name, int64_t* out);
  Status* (*KernelInfoGetAttribute_string)(const KernelInfo* info, const char* name, char* out,
                                           size_t* size);
  void* unused_6[2];
  Status* (*KernelContext_GetInput)(const KernelContext* context, size_t index, const Value** out);
  Status* (*KernelContext_GetOutput)(KernelContext* context, size_t index, const int64_t* shape,
                                     size_t rank, Value** out);
  void* unused_7[1];
  void (*ReleaseStatus)(Status* status);
  void* unused_8[5];
  void (*ReleaseTensorTypeAndShapeInfo)(TypeAndShape* info);
  void* unused_9[130];
  Status* (*KernelInfo_GetInputCount)(const KernelInfo* info, size_t* out);
  void* unused_10[1];
  Status* (*KernelInfo_GetInputName)(const KernelInfo* info, size_t index, char* out, size_t* size);
  void* unused_11[16];
  Status* (*KernelInfoGetConstantInput_tensor)(const KernelInfo* info, size_t index, int* constant,
                                               const Value** out);
  void* unused_12[24];
  Status* (*KernelContext_ParallelFor)(const KernelContext* context, void (*task)(void*, size_t),
                                       size_t total, size_t batches, void* data);
};

struct ApiBase {
  const Api* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp* op, const Api* api, const KernelInfo* info);
  const char* (*GetName)(const CustomOp* op);
  const char* (*GetExecutionProviderType)(const CustomOp* op);
  int (*GetInputType)(const CustomOp* op, size_t index);
  size_t (*GetInputTypeCount)(const CustomOp* op);
  int (*GetOutputType)(const CustomOp* op, size_t index);
  size_t (*GetOutputTypeCount)(const CustomOp* op);
  void (*KernelCompute)(void* kernel, KernelContext* context);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const CustomOp* op, size_t index);
  int (*GetOutputCharacteristic)(const CustomOp* op, size_t index);
  int (*GetInputMemoryType)(const CustomOp* op, size_t index);
  int (*GetVariadicInputMinArity)(const CustomOp* op);
  int (*GetVariadicInputHomogeneity)(const CustomOp* op);
  int (*GetVariadicOutputMinArity)(const CustomOp* op);
  int (*GetVariadicOutputHomogeneity)(const CustomOp* op);
  Status* (*CreateKernelV2)(const CustomOp* op, const Api* api, const KernelInfo* info,
                            void** kernel);
  Status* (*KernelComputeV2)(void* kernel, KernelContext* context);
  Status* (*InferOutputShapeFn)(const CustomOp* op, void* context);
  int (*GetStartVersion)(const CustomOp* op);
  int (*GetEndVersion)(const CustomOp* op);
  size_t (*GetMayInplace)(int** inputs, int** outputs);
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  size_t (*GetAliasMap)(int** inputs, int** outputs);
  void (*ReleaseAliasMap)(int* inputs, int* outputs);
};

}  // namespace freeexport::ort
