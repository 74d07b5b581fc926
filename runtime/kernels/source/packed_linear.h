// y = x W^T + bias for rows x in fp32 and a weight W in 4 or 8 bits, packed in panels of 16 outputs; and what stands
// before and behind such a product in a transformer: the norm of a sum, an activation, and a gate.
//
// Rows are quantized to 8 bits, each group of 32 inputs with a scale of its own. Per group the products are summed in
// integers, exactly; the groups are added up in order, in fp32, with the same operations on every instruction set. So
// the bits of a row depend on nothing but the row and the weight.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"
#include "best_two.h"

#define FREEEXPORT_INLINE __attribute__((always_inline)) inline

namespace freeexport {

constexpr int kGroup = 32;  // inputs that share a scale of the activations
constexpr int kPanel = 16;  // outputs that stand together
constexpr int64_t kTaskRows = 64;  // that one task multiplies with a panel, at most
constexpr int64_t kTileRows = 16;  // of a tile of bfloat16
constexpr int64_t kPromptRows = 512;  // the same of a prompt's rows in tiles
// Of an integer d that is added to the bits of the float -1.5 * 2^23 comes the float -(1.5 * 2^23 + d), exactly, as long
// as d has 22 bits: the sums of products need no conversion. These bits are kCounter * -32768.
constexpr int16_t kCounter = 27008;
constexpr float kCounted = 12582912.0f;

constexpr int kSuper = 256;  // inputs of a super-block

// A weight [outputs, inputs]. A value v stands for (v - zero point) * scale, or v * scale + offset. With `multiples` the
// scale and the offset of a block are those of its super-block times small integers, as in a GGUF file's K-quants.
struct Weight {
  int64_t outputs, inputs;
  int bits;     // 4, 5, 6 or 8
  int block;    // inputs that share a scale and a zero point: a multiple of kGroup; of 6 bits 16
  // [panels][groups][8 quads of inputs][16 outputs][4 inputs] in 8 bits; in 4 bits the low halves of the bytes of quad
  // j are quad 2j, the high halves quad 2j + 1, of [4 bytes quads]. 5 and 6 bits are 4, and behind them [16][4] bytes
  // whose bit j is the fifth of quad j, or [2][16][4] whose bits 2j and 2j + 1 are those of quad j, the second's of
  // 4 + j. What pads outputs and inputs is never seen.
  const uint8_t* data;
  const uint16_t* scales;  // [panels][blocks, or super-blocks][16], float16
  const uint8_t* zeros;  // [panels][blocks][16], of 4 and 8 bits; or null for the middle: 8, 16, 32 or 128
  const uint16_t* offsets;  // as scales, or null; of 4 and 5 bits, without zeros
  const float* bias;     // [outputs], or null
  const int8_t* multiples;  // [panels][blocks][16], of 4 and 5 bits [2][16] for scale and offset; or null

  // Inlined always: a copy that one file compiled for its processor must not serve the others.
  FREEEXPORT_INLINE int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
  FREEEXPORT_INLINE int64_t groups() const { return (inputs + kGroup - 1) / kGroup; }
  FREEEXPORT_INLINE int64_t blocks() const { return (inputs + block - 1) / block; }
  FREEEXPORT_INLINE int64_t scales_of_panel() const { return multiples ? (inputs + kSuper - 1) / kSuper : blocks(); }
  FREEEXPORT_INLINE int64_t group_bytes() const { return int64_t{kGroup} * kPanel * bits / 8; }
};

enum Activation : int { kNone, kRelu, kSilu, kGeluTanh, kGelu, kActivations };

// Of one call: y = activation(n W^T + bias), times n U^T where there is an `up` U; with n = x, or, where there is a
// `norm`, n = t / sqrt(mean(t^2) + epsilon) * norm of t = x + skip, or of t = x without skip. A `layer` norm takes the mean
// from t first, and adds `shift`. Or y has the products of W and U, whose bias goes on behind that of W, `beside` each
// other.
struct Product {
  int64_t rows;
  const float* x;      // [rows, inputs]
  const float* skip;   // the same, or null
  const float* norm;   // [inputs], or null; where there is skip, it is there
  const float* shift;  // [inputs], or null; of a layer norm
  float epsilon;
  int activation;
  Weight weight;
  Weight up;           // of the same inputs, without `beside` of the same outputs; or data is null
  float* total;        // [rows, inputs]: x + skip, or where it `keeps_norm` n; null without skip
  float* y;            // [rows, outputs]
  int beside;          // without activation
  int layer, keeps_norm;
  int prompt;          // rows of a prompt: these may have bits of their own, see `prompt_panels`

  FREEEXPORT_INLINE int64_t outputs() const { return weight.outputs + (beside ? up.outputs : 0); }
  FREEEXPORT_INLINE int64_t panels() const { return weight.panels() + (beside ? up.panels() : 0); }
};

// Input i of a group, of an output whose bytes begin at `data`.
FREEEXPORT_INLINE int value_of(const uint8_t* data, int bits, int i) {
  const int quad = i / 4, each = bits - 4;
  if (bits == 8) return data[64 * quad + i % 4];
  const int byte = data[64 * (quad / 2) + i % 4], value = quad % 2 ? byte >> 4 : byte & 15;
  if (bits == 4) return value;
  const int above = data[256 + 64 * (quad * each / 8) + i % 4] >> quad * each % 8;
  return value + ((above & ((1 << each) - 1)) << 4);
}

// 32 inputs of a row, quantized: values, their scale, and the sum of the values, with the sign turned, a pair with
// `counter`, and times the scale; such pairs of the first and the last 16; and what the products with weights of 4 and of
// 8 bits begin with whose zero point is the middle. Rows stand as they are multiplied, so many at once:
// [tiles of rows][groups][rows of the tile].
struct Group {
  int8_t values[kGroup];
  float scale;
  int16_t minus_sum;
  int16_t counter;  // kCounter
  float scaled_sum;
  int16_t halves[2][2];
  int32_t starts[2];
};

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  bool (*supported)();  // by this processor and system
  // A row of a product to that of `rows`; `normed` [inputs] is room for it where there is a norm.
  void (*prepare)(const Product& product, int64_t row, float* normed, Group* rows);
  // Outputs of panels `panel`..`end` for rows first..last, at most kTaskRows.
  void (*panels)(const Product& product, const Group* rows, int64_t first, int64_t last, int64_t panel, int64_t end);
  // Of attention: keys and values of a row to the cache; a piece of what it sees, for one group of heads; all joined.
  void (*store_row)(const Attention& attention, const Place& place);
  void (*attend)(const Attention& attention, const Place& place, int64_t kv_head, int64_t piece, const Ahead& ahead,
                 const Room& room);
  // The same for rows of a sequence, one behind the other, that see of the piece, with the room of the first; null where
  // rows are attended one by one.
  void (*attend_rows)(const Attention& attention, const Place* places, int64_t count, int64_t kv_head, int64_t piece,
                      const Room& room);
  void (*join)(const Attention& attention, const Place& place, int64_t kv_head, const Room& room);
  // Of a head: the best two of `count` logits, the first of which has number `first`.
  void (*best_of_piece)(const float* logits, int64_t first, int64_t count, BestTwo* two);
  // The same as `prepare` and `panels` for rows of a prompt, at most kPromptRows, whose bits then depend on the row and
  // the weight alone, too; `rows` [rows, as whole tiles of 16][groups][16][32 inputs] are bfloat16. Or null.
  void (*prepare_prompt)(const Product& product, int64_t row, float* normed, uint16_t* rows);
  void (*prompt_panels)(const Product& product, const uint16_t* rows, int64_t first, int64_t last, int64_t panel,
                        int64_t end);
  // All that rows of a sequence see, one behind the other, of a prompt, for one group of heads, to y. False where there
  // is no memory for it. Or null.
  bool (*attend_prompt)(const Attention& attention, const Place* places, int64_t count, int64_t kv_head);
};

// The second reads a prompt as AMX does, for tests: no processor chooses it.
extern const Kernels kScalar, kScalarBf16;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx2Vnni, kAvx512, kAvx512Vnni, kAmx;
#elif defined(__aarch64__)
extern const Kernels kNeon, kNeonI8mm;
#endif

// False where there is no memory for it.
bool packed_linear(const Kernels& kernels, const Product& product, Parallel parallel, void* context);

// The best kernels of this processor, or those that the environment's FREEEXPORT_INSTRUCTIONS names. Null where these
// are unknown or not to be had here; `problem` then says so.
const Kernels* choose_kernels(const char** problem);

// Null for a name that is unknown.
const Kernels* find_kernels(const char* name);

// Null, or what is wrong with these sizes.
const char* check_sizes(int64_t outputs, int64_t inputs, int64_t bits, int64_t block);
// The same of which of a weight's tensors are there.
const char* check_form(const Weight& weight, bool zeros, bool offsets, bool multiples);

}  // namespace freeexport
