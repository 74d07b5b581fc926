// What AMX gives to the kernels of AVX-512 VNNI: prompts in tiles of bfloat16.
#pragma once

#include "packed_linear.h"

namespace freeexport {

// Whether the processor has tiles of bfloat16, and the system lets this process use them.
bool amx_supported();
void amx_prepare(const Product& product, int64_t row, float* normed, uint16_t* rows);
void amx_panels(const Product& product, const uint16_t* rows, int64_t first, int64_t last, int64_t panel, int64_t end);
bool amx_attend(const Attention& attention, const Place* places, int64_t count, int64_t kv_head);

}  // namespace freeexport
