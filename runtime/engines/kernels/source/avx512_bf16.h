// Extends the AVX-512 VNNI kernels by attention in bfloat16.
#pragma once

#include "packed_linear.h"

namespace freeexport {

// Needs kProcessor.avx512_bf16.
bool avx512_bf16_attend(const Attention& attention, const Place* places, int64_t count,
                        int64_t kv_head);

}  // namespace freeexport
