// AMX extends the AVX-512 VNNI kernels: it processes prompts in tiles of bfloat16.
#pragma once

#include "packed_linear.h"

namespace freeexport {

// These need kProcessor.amx and request_tiles().
void amx_prepare(const Product& product, int64_t row, float* normed, uint16_t* rows);
void amx_panels(const Product& product, const uint16_t* rows, int64_t first, int64_t last,
                int64_t panel, int64_t end);
bool amx_attend(const Attention& attention, const Place* places, int64_t count, int64_t kv_head);

}  // namespace freeexport
