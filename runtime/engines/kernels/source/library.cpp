// Exports of the library: operators for ONNX Runtime, and functions for Python and tests.
#include "operators.h"
#include "version.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace freeexport {

thread_local bool reading_prompt = false;
thread_local bool spreading_logits = true;

namespace {

void serial(void*, void (*task)(void*, size_t), size_t total, void* data) {
  for (size_t i = 0; i < total; i++) task(data, i);
}

}  // namespace
}  // namespace freeexport

// ONNX Runtime calls this when a session's options name the library.
EXPORT freeexport::ort::Status* RegisterCustomOps(freeexport::ort::SessionOptions* options,
                                                  const freeexport::ort::ApiBase* base) {
  using namespace freeexport;
  const ort::Api* api = base->GetApi(ort::kApiVersion);
  if (api == nullptr)  // ONNX Runtime logs this, and API version 1 can return the error
    return fail(base->GetApi(1), ort::kEngineError,
                "ONNX Runtime %s is too old for these kernels; install 1.%u or later",
                base->GetVersionString(), ort::kApiVersion);
  const char* problem = nullptr;
  if (choose_kernels(&problem) == nullptr) return fail(api, ort::kEngineError, "%s", problem);
  // Never freed: ONNX Runtime keeps pointers to it, for sessions that may outlive any owner here.
  ort::CustomOpDomain* domain = nullptr;
  RETURN_IF_ERROR(api->CreateCustomOpDomain("freeexport", &domain));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kPackedLinearOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kPackedRowsOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kCachedAttentionOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kCappedAttentionOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kCrossAttentionOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kHalfAttentionOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kInt8AttentionOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kHalfCrossAttentionOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kCappedCrossAttentionOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kInt8CrossAttentionOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kHalfPromptCacheOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kInt8PromptCacheOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kEncoderAttentionOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kBestTwoOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kPredictOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kWholeVocabularyOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kCountedRowsOp));
  return api->AddCustomOpDomain(options, domain);
}

EXPORT int freeexport_kernels_version() { return FREEEXPORT_KERNELS_VERSION; }

// Returns the name of the instruction set that is used. Otherwise returns null and sets `problem`.
EXPORT const char* freeexport_instructions(const char** problem) {
  const freeexport::Kernels* kernels = freeexport::choose_kernels(problem);
  return kernels ? kernels->name : nullptr;
}

// Returns the first position at which the kernels that are used may compute a prompt's row with
// other bits than a step's, or -1 if there is none.
EXPORT int64_t freeexport_prompt_differs_from() {
  const char* problem = nullptr;
  const freeexport::Kernels* kernels = freeexport::choose_kernels(&problem);
  return kernels && kernels->attend_prompt ? kernels->prompt_from : -1;
}

// Sets whether this thread's calls read a prompt, and returns the previous setting.
EXPORT int freeexport_read_prompt(int reads) {
  const bool before = freeexport::reading_prompt;
  freeexport::reading_prompt = reads != 0;
  return before;
}

// Sets whether this thread's calls fill the logits of the whole vocabulary, and returns the
// previous setting.
EXPORT int freeexport_spread_logits(int spreads) {
  const bool before = freeexport::spreading_logits;
  freeexport::spreading_logits = spreads != 0;
  return before;
}

// Returns 1 if this processor has an instruction set, 0 if not, -1 if the library has no such
// kernels.
EXPORT int freeexport_supports(const char* instructions) {
  const freeexport::Kernels* kernels = freeexport::find_kernels(instructions);
  return kernels ? kernels->supported() : -1;
}

// Runs PackedLinear on one thread, for tests. Returns null or an error.
EXPORT const char* freeexport_packed_linear(const char* instructions,
                                            const freeexport::Product* product) {
  using namespace freeexport;
  const Kernels* kernels = find_kernels(instructions);
  if (kernels == nullptr || !kernels->supported()) return "no such instructions here";
  const Weight& w = product->weight;
  if (const char* problem = check_sizes(w.outputs, w.inputs, w.bits, w.block)) return problem;
  if (const char* problem = check_form(w, w.scales, w.zeros, w.offsets, w.multiples))
    return problem;
  if (product->beside && product->activation != kNone)
    return "an activation of products beside each other";
  return packed_linear(*kernels, *product, serial, nullptr) ? nullptr : "no memory";
}

// Runs CachedAttention on one thread, for tests. Returns null or an error.
EXPORT const char* freeexport_attention(const char* instructions,
                                        const freeexport::Attention* call) {
  using namespace freeexport;
  const Kernels* kernels = find_kernels(instructions);
  if (kernels == nullptr || !kernels->supported()) return "no such instructions here";
  return attention(*kernels, *call, serial, nullptr);
}
