// y = x W^T + bias for rows x in fp32 and a weight W in 4, 5, 6 or 8 bits, or in floating point,
// packed in panels of 16 outputs. Fused with operations before and after such a product in a
// transformer: the norm of a sum, an activation, and a gate.
//
// With a quantized weight, unless it is exact, rows are quantized to 8 bits, with a scale per group
// of 32 inputs. For activations in 16 bits, the remainders are quantized in the same way to a
// second row, and the products of both rows are added. The products of a group are summed exactly,
// in integers. Groups are added in order, in fp32, with the same operations on every instruction
// set. The bits of a row therefore depend only on the row and the weight. The same holds for
// weights in floating point (float_tiles.h), and for exact ones (exact_tiles.h), which have the
// results of the same weight in fp32.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"
#include "best_two.h"
#include "platform.h"

#define FREEEXPORT_INLINE __attribute__((always_inline)) inline

namespace freeexport {

constexpr int kGroup = 32;                           // inputs that share a scale of the activations
constexpr int kPanel = 16;                           // outputs that are stored together
constexpr int64_t kTaskRows = 64;                    // maximum per task, quantized
constexpr int64_t kTileRows = 16;                    // in a tile of bfloat16
constexpr int64_t kTileValues = kTileRows * kGroup;  // 16-bit values of such a tile
constexpr int64_t kTileSums = kTileRows * kPanel;    // and fp32 values of a product
constexpr int64_t kPromptRows = 512;  // maximum per task, for a prompt's rows in tiles
// Adding an integer d to the bits of the float -1.5 * 2^23 gives exactly the float -(1.5 * 2^23 +
// d), if d has at most 22 bits. Sums of products therefore need no conversion. These bits are
// kCounter * -32768.
constexpr int16_t kCounter = 27008;
constexpr float kCounted = 12582912.0f;

constexpr int kSuper = 256;  // inputs of a super-block

// A weight [outputs, inputs]. A stored value v means (v - zero point) * scale, or v * scale +
// offset. With `multiples`, the scale and offset of a block are those of its super-block times
// small integers, as in the K-quants of GGUF files. With 16 or 32 bits, `data` has floats, and
// there are no other tensors but the bias.
struct Weight {
  int64_t outputs;
  int64_t inputs;
  int bits;   // 4, 5, 6, 8, 16 or 32
  int block;  // inputs per scale and zero point: a multiple of kGroup, or 16 for 6 bits
  // 8 bits: [panels][groups][8 quads of inputs][16 outputs][4 inputs].
  // 4 bits: 4 quads of bytes. The low halves of quad j of bytes are quad 2j, the high ones 2j + 1.
  // 5 bits: as 4 bits, then [16][4] bytes whose bit j is the fifth bit of quad j.
  // 6 bits: as 4 bits, then [2][16][4] bytes. Bits 2j and 2j + 1 are the upper bits of quad j in
  // the first part, and of quad 4 + j in the second.
  // 16 and 32 bits: [panels][groups][32 inputs][16 outputs].
  // Padding of outputs and inputs has no effect on results.
  const uint8_t* data;
  const uint16_t* scales;   // [panels][blocks or super-blocks][16], float16
  const uint8_t* zeros;     // [panels][blocks][16] for 4 and 8 bits. Null: the middle, 2^(bits - 1)
  const uint16_t* offsets;  // like scales, for 4 and 5 bits without zeros. Or null
  const float* bias;        // [outputs], or null
  const int8_t* multiples;  // [panels][blocks][16], for 4 and 5 bits [2][16]. Or null
  int pairs;     // 1: a row of activations is quantized to a pair of rows, for 16 bits. Otherwise 0
  int bfloat16;  // 1: 16 bits are a bfloat16. Otherwise 0, and they are a float16
  int exact;     // 1: rows stay in fp32, and at most 8 bits are widened to fp32. Otherwise 0

  // Always inlined: a copy compiled for one instruction set must not be linked into code for
  // another.
  FREEEXPORT_INLINE bool floats() const { return bits >= 16; }
  FREEEXPORT_INLINE bool float_rows() const { return exact || floats(); }
  FREEEXPORT_INLINE int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
  FREEEXPORT_INLINE int64_t groups() const { return (inputs + kGroup - 1) / kGroup; }
  FREEEXPORT_INLINE int64_t blocks() const { return (inputs + block - 1) / block; }
  FREEEXPORT_INLINE int64_t scales_of_panel() const {
    return multiples ? (inputs + kSuper - 1) / kSuper : blocks();
  }
  FREEEXPORT_INLINE int64_t group_bytes() const { return int64_t{kGroup} * kPanel * bits / 8; }
};

enum Activation : int { kNone, kRelu, kSilu, kGeluTanh, kGelu, kActivations };

// Arguments of one call. y = activation(n W^T + bias), times n U^T if there is an `up` U.
//
// n = x, or with `norm` n = t / sqrt(mean(t^2) + epsilon) * norm, where t = x + skip, or x without
// skip. A `layer` norm first subtracts the mean from t, and finally adds `shift`. With `beside`, y
// has the products of W and U side by side, and the bias of U follows that of W.
struct Product {
  int64_t rows;
  const float* x;      // [rows, inputs]
  const float* skip;   // [rows, inputs], or null
  const float* norm;   // [inputs], or null. Required with skip
  const float* shift;  // [inputs], or null. Only for a layer norm
  float epsilon;
  int activation;
  Weight weight;
  Weight up;  // same inputs and type of rows, and without `beside` same outputs. data may be null
  float* total;  // [rows, inputs]: x + skip, or n with `keeps_norm`. Null without skip
  float* y;      // [rows, outputs]
  int beside;    // only without activation
  int layer;
  int keeps_norm;
  int prompt;  // rows of a prompt, which may have other bits, see `prompt_panels`

  FREEEXPORT_INLINE int64_t quantized_rows() const { return rows << weight.pairs; }
  FREEEXPORT_INLINE int64_t outputs() const { return weight.outputs + (beside ? up.outputs : 0); }
  FREEEXPORT_INLINE int64_t panels() const { return weight.panels() + (beside ? up.panels() : 0); }
};

// Returns input i of a group, for the output whose bytes begin at `data`.
FREEEXPORT_INLINE int value_of(const uint8_t* data, int bits, int i) {
  const int quad = i / 4;
  const int each = bits - 4;
  if (bits == 8) return data[64 * quad + i % 4];
  const int byte = data[64 * (quad / 2) + i % 4];
  const int value = quad % 2 ? byte >> 4 : byte & 15;
  if (bits == 4) return value;
  const int above = data[256 + 64 * (quad * each / 8) + i % 4] >> quad * each % 8;
  return value + ((above & ((1 << each) - 1)) << 4);
}

// 32 quantized inputs of a row: values, their scale, and their sum, both negated (as a pair with
// `counter`) and scaled. `halves` are such pairs for the first and the last 16 values. `starts` are
// the initial sums of products with weights of 4 and of 8 bits whose zero point is the middle. Rows
// are stored in the order of multiplication: [tiles of rows][groups][rows of the tile].
struct Group {
  int8_t values[kGroup];
  float scale;
  int16_t minus_sum;
  int16_t counter;  // kCounter
  float scaled_sum;
  int16_t halves[2][2];
  int32_t starts[2];
};

// With so many rows, some kernels unpack 8-bit weights to 16 bits. Below, unpacking takes longer
// than it saves (Zen 3).
constexpr int64_t kManyRows = 16;

// Returns true if memory for a product's quantized rows, widened to 16 bits, follows its groups, in
// the same order.
FREEEXPORT_INLINE bool has_wide_rows(const Product& product) {
  const bool bytes = product.weight.bits == 8 || product.up.bits == 8;
  return bytes && product.quantized_rows() >= kManyRows && !product.weight.float_rows();
}
FREEEXPORT_INLINE int16_t* wide_rows_of(const Product& product, const Group* rows) {
  return reinterpret_cast<int16_t*>(const_cast<Group*>(rows) +
                                    product.quantized_rows() * product.weight.groups());
}

// Kernels of one instruction set.
struct Kernels {
  const char* name;
  bool (*supported)();  // by this processor and system
  // Quantizes a row of a product to a row, or a pair, of `rows`. `normed` [inputs] is memory for
  // its norm.
  void (*prepare)(const Product& product, int64_t row, float* normed, Group* rows);
  // Computes the outputs of panels `panel`..`end` for rows first..last, at most kTaskRows quantized
  // ones.
  void (*panels)(const Product& product, const Group* rows, int64_t first, int64_t last,
                 int64_t panel, int64_t end);
  // The same for weights with rows in fp32. `rows` is [tiles of rows][padded inputs][rows of the
  // tile].
  void (*prepare_floats)(const Product& product, int64_t row, float* normed, float* rows);
  void (*float_panels)(const Product& product, const float* rows, int64_t first, int64_t last,
                       int64_t panel, int64_t end);
  // Attention: `store_row` stores a row's keys and values in the cache, `attend` attends to one
  // piece with one group of heads, `join` joins all pieces.
  void (*store_row)(const Attention& attention, const Place& place);
  void (*attend)(const Attention& attention, const Place& place, int64_t kv_head, int64_t piece,
                 const Ahead& ahead, const Room& room);
  // Like `attend`, for consecutive rows of a sequence that see the piece. `room` belongs to the
  // first. Null if rows are processed one by one.
  void (*attend_rows)(const Attention& attention, const Place* places, int64_t count,
                      int64_t kv_head, int64_t piece, const Room& room);
  // Computes y of consecutive rows of an encoder's prompt for one group of heads. Returns false if
  // out of memory.
  bool (*attend_encoder)(const Attention& attention, const Place* places, int64_t count,
                         int64_t kv_head);
  void (*join)(const Attention& attention, const Place& place, int64_t kv_head, const Room& room);
  // Finds the best two of `count` logits, which start at index `first`.
  void (*best_of_piece)(const float* logits, int64_t first, int64_t count, BestTwo* two);
  // Like `prepare` and `panels`, for at most kPromptRows rows of a prompt. Their bits, too, depend
  // only on the row and the weight. `rows` is bfloat16 [tiles of 16 rows][groups][16][32 inputs].
  // Or null.
  void (*prepare_prompt)(const Product& product, int64_t row, float* normed, uint16_t* rows);
  void (*prompt_panels)(const Product& product, const uint16_t* rows, int64_t first, int64_t last,
                        int64_t panel, int64_t end);
  // Like `attend_encoder`, for rows of any prompt, without a bias. Or null.
  bool (*attend_prompt)(const Attention& attention, const Place* places, int64_t count,
                        int64_t kv_head);
  // The first position for which a decoder uses `attend_prompt`. Encoders use it for all.
  int64_t prompt_from;
};

// kScalarBf16 reads prompts like AMX, for tests. It is never chosen automatically.
extern const Kernels kScalar, kScalarBf16;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx2Vnni, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmx;
#elif defined(__aarch64__)
extern const Kernels kNeon, kNeonI8mm;
#endif

// Returns false if out of memory.
bool packed_linear(const Kernels& kernels, const Product& product, Parallel parallel,
                   void* context);

// Returns the best kernels for this processor, or those in the environment variable
// FREEEXPORT_INSTRUCTIONS. If these are unknown or not supported, returns null and sets `problem`.
const Kernels* choose_kernels(const char** problem);

// Returns null if the name is unknown.
const Kernels* find_kernels(const char* name);

// Returns null, or an error about the sizes.
const char* check_sizes(int64_t outputs, int64_t inputs, int64_t bits, int64_t block);
// Returns null, or an error about the tensors that a weight has.
const char* check_form(const Weight& weight, bool scales, bool zeros, bool offsets, bool multiples);

}  // namespace freeexport
