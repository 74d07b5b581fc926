// What the library offers: operators for ONNX Runtime, and a few functions for Python and tests.
#include "operators.h"
#include "version.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace freeexport {

thread_local bool reading_prompt = false;
thread_local bool spreading_logits = true;

namespace {

void serial(void*, void (*task)(void*, size_t), size_t total, void* data) {
  for (size_t i = 0; i < total; i++) task(data, i);
}

}  // namespace
}  // namespace freeexport

// What ONNX Runtime calls when a session's options name the library.
EXPORT freeexport::ort::Status* RegisterCustomOps(freeexport::ort::SessionOptions* options,
                                                  const freeexport::ort::ApiBase* base) {
  using namespace freeexport;
  const ort::Api* api = base->GetApi(ort::kApiVersion);
  if (api == nullptr)  // which it logs; the first version can say so, too
    return fail(base->GetApi(1), ort::kEngineError, "ONNX Runtime %s is too old for these kernels; install 1.%u or later",
                base->GetVersionString(), ort::kApiVersion);
  const char* problem = nullptr;
  if (choose_kernels(&problem) == nullptr) return fail(api, ort::kEngineError, "%s", problem);
  // ONNX Runtime keeps pointers to it, for sessions that may outlive any owner here.
  ort::CustomOpDomain* domain = nullptr;
  RETURN_IF_ERROR(api->CreateCustomOpDomain("freeexport", &domain));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kPackedLinearOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kPackedRowsOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kCachedAttentionOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kCappedAttentionOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kCrossAttentionOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kHalfAttentionOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kHalfCrossAttentionOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kBestTwoOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kPredictOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kWholeVocabularyOp));
  RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, &kCountedRowsOp));
  return api->AddCustomOpDomain(options, domain);
}

EXPORT int freeexport_kernels_version() { return FREEEXPORT_KERNELS_VERSION; }

// The instruction set that would be used, or null; `problem` then says why.
EXPORT const char* freeexport_instructions(const char** problem) {
  const freeexport::Kernels* kernels = freeexport::choose_kernels(problem);
  return kernels ? kernels->name : nullptr;
}

// Whether the kernels that would be used give a prompt's rows other bits than those of a step.
EXPORT int freeexport_prompt_differs() {
  const char* problem = nullptr;
  const freeexport::Kernels* kernels = freeexport::choose_kernels(&problem);
  return kernels && kernels->prompt_panels;
}

// Says whether this thread's calls read a prompt, until it says otherwise: whether they did before.
EXPORT int freeexport_read_prompt(int reads) {
  const bool before = freeexport::reading_prompt;
  freeexport::reading_prompt = reads != 0;
  return before;
}

// Says whether this thread's calls give logits of the whole vocabulary, until it says otherwise: whether they did before.
EXPORT int freeexport_spread_logits(int spreads) {
  const bool before = freeexport::spreading_logits;
  freeexport::spreading_logits = spreads != 0;
  return before;
}

// Whether this processor has an instruction set; -1 where the library has no kernels of that name.
EXPORT int freeexport_supports(const char* instructions) {
  const freeexport::Kernels* kernels = freeexport::find_kernels(instructions);
  return kernels ? kernels->supported() : -1;
}

// PackedLinear on one thread, for tests. Null, or what is wrong.
EXPORT const char* freeexport_packed_linear(const char* instructions, const freeexport::Product* product) {
  using namespace freeexport;
  const Kernels* kernels = find_kernels(instructions);
  if (kernels == nullptr || !kernels->supported()) return "no such instructions here";
  const Weight& w = product->weight;
  if (const char* problem = check_sizes(w.outputs, w.inputs, w.bits, w.block)) return problem;
  if (const char* problem = check_form(w, w.zeros, w.offsets, w.multiples)) return problem;
  if (product->beside && product->activation != kNone) return "an activation of products beside each other";
  return packed_linear(*kernels, *product, serial, nullptr) ? nullptr : "no memory";
}

// CachedAttention on one thread, for tests. Null, or what is wrong.
EXPORT const char* freeexport_attention(const char* instructions, const freeexport::Attention* call) {
  using namespace freeexport;
  const Kernels* kernels = find_kernels(instructions);
  if (kernels == nullptr || !kernels->supported()) return "no such instructions here";
  return attention(*kernels, *call, serial, nullptr);
}
