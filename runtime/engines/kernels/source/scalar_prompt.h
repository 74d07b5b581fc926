// Prompts in bfloat16 like AMX (amx.cpp, amx_attention.cpp), in plain C++. Every processor can then
// run the tests for kernels that compute prompts with other bits than steps. Values are rounded as
// in AMX, but the order of sums differs. See tiles.h.
#pragma once

#include "attention_tiles.h"

namespace freeexport {
namespace {

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 64);  // NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float from_bfloat16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float found;
  std::memcpy(&found, &bits, sizeof(found));
  return found;
}
float rounded(float value) { return from_bfloat16(to_bfloat16(value)); }
float rounded(const float* value) { return rounded(*value); }
float rounded(const uint16_t* half) { return rounded(Vec::halves(half)); }

void prepare_prompt(const Product& product, int64_t row, float* normed, uint16_t* rows) {
  const int64_t inputs = product.weight.inputs;
  const int64_t groups = product.weight.groups();
  const float* x = normed_row(product, row, normed);
  uint16_t* to = rows + (row / kTileRows * groups * kTileRows + row % kTileRows) * kGroup;
  for (int64_t g = 0; g < groups; g++, to += kTileRows * kGroup)
    for (int64_t i = 0; i < kGroup; i++)
      to[i] = g * kGroup + i < inputs ? to_bfloat16(x[g * kGroup + i]) : uint16_t{0};
}

// Unpacks the weights [16 outputs][32 inputs] of a group of a panel.
void unpack(const Weight& weight, int64_t panel, int64_t group, float (&to)[kPanel][kGroup]) {
  constexpr int kHalfGroup = kGroup / 2;  // the smallest block
  const uint8_t* data = weight.data + (panel * weight.groups() + group) * weight.group_bytes();
  for (int half = 0; half < 2; half++) {
    const int64_t input = group * kGroup + half * kHalfGroup;
    const int64_t block =
        panel * weight.blocks() + least(input / weight.block, weight.blocks() - 1);
    const int64_t of_block =
        weight.multiples ? panel * weight.scales_of_panel() + input / kSuper : block;
    for (int output = 0; output < kPanel; output++) {
      const int8_t* by = weight.multiples
                             ? weight.multiples + block * (weight.offsets ? 2 : 1) * kPanel + output
                             : nullptr;
      const float whole = Vec::halves(weight.scales + of_block * kPanel + output);
      const float scale = by ? Vec::times(whole, by) : whole;
      float offset;
      if (weight.offsets) {
        offset = Vec::halves(weight.offsets + of_block * kPanel + output);
        if (by) offset = Vec::times(offset, by + kPanel);
      } else {
        const int zero =
            weight.zeros ? weight.zeros[block * kPanel + output] : 1 << (weight.bits - 1);
        offset = static_cast<float>(zero) * -scale;
      }
      for (int i = half * kHalfGroup; i < (half + 1) * kHalfGroup; i++) {
        const auto value = static_cast<float>(value_of(data + 4 * output, weight.bits, i));
        to[output][i] = rounded(std::fma(value, scale, offset));
      }
    }
  }
}

using PromptSums = float[kPromptRows * kPanel];  // of rows, for the outputs of a panel

void multiply_prompt(const Weight& weight, int64_t panel, const uint16_t* rows, int64_t first,
                     int64_t last, PromptSums& sums) {
  const int64_t groups = weight.groups();
  const int64_t left = least(weight.outputs - panel * kPanel, kPanel);
  for (int64_t m = first; m < last; m++)
    for (int64_t i = 0; i < kPanel; i++)
      sums[(m - first) * kPanel + i] =
          weight.bias && i < left ? weight.bias[panel * kPanel + i] : 0.0f;
  for (int64_t g = 0; g < groups; g++) {
    float weights[kPanel][kGroup];
    unpack(weight, panel, g, weights);
    for (int64_t m = first; m < last; m++) {
      const uint16_t* from =
          rows + ((m / kTileRows * groups + g) * kTileRows + m % kTileRows) * kGroup;
      for (int i = 0; i < kGroup; i++) {
        const float value = from_bfloat16(from[i]);
        float* to = sums + (m - first) * kPanel;
        for (int output = 0; output < kPanel; output++) to[output] += value * weights[output][i];
      }
    }
  }
}

void prompt_panels(const Product& product, const uint16_t* rows, int64_t first, int64_t last,
                   int64_t panel, int64_t end) {
  PromptSums sums;
  PromptSums gates;
  for (; panel < end; panel++) {
    const int64_t behind = panel - product.weight.panels();
    const Weight& weight = behind < 0 ? product.weight : product.up;
    const int64_t number = behind < 0 ? panel : behind;
    const auto bytes =
        static_cast<size_t>(least(weight.outputs - number * kPanel, kPanel)) * sizeof(float);
    multiply_prompt(weight, number, rows, first, last, sums);
    activate(product.activation, sums, (last - first) * kPanel);
    if (product.up.data && !product.beside) {
      multiply_prompt(product.up, number, rows, first, last, gates);
      for (int64_t i = 0; i < (last - first) * kPanel; i++) sums[i] *= gates[i];
    }
    float* y = product.y + (behind < 0 ? 0 : product.weight.outputs) + number * kPanel;
    for (int64_t m = first; m < last; m++)
      std::memcpy(y + m * product.outputs(), sums + (m - first) * kPanel, bytes);
  }
}

// Computes y of one head of a row, with keys and values of type C.
template <typename C>
void attend_to_prompt(const Attention& a, const Place& place, int64_t head) {
  const int64_t size = a.size;
  const int64_t kv_head = head / (a.heads / a.kv_heads);
  const C* keys = static_cast<const C*>(a.key);
  const C* values = static_cast<const C*>(a.value);
  float query[kTurnedSize];
  float out[kTurnedSize] = {};
  float largest = -1e30f;
  float sum = 0.0f;
  for (int64_t i = 0; i < size; i++) query[i] = rounded(queries_of(a, place)[head * size + i]);
  for (int64_t piece = first_piece(a, place); piece < end_piece(place); piece++) {
    const Seen seen = seen_of(a, place, piece);
    const int64_t at = keys_at(a, place, kv_head, piece * kPieceRows);
    float scores[kPieceRows + 1];
    for (int64_t t = seen.from; t < seen.end; t++) {
      scores[t] = 0.0f;
      for (int64_t i = 0; i < size; i++) scores[t] += query[i] * rounded(keys + at + t * size + i);
      scores[t] *= a.scale;
    }
    if (a.softcap > 0.0f) cap(scores + seen.from, seen.end - seen.from, a.softcap);
    const float before = largest;
    for (int64_t t = seen.from; t < seen.end; t++)
      largest = scores[t] > largest ? scores[t] : largest;
    for (int64_t t = seen.from; t < seen.end; t++) scores[t] -= largest;
    exponentials(scores + seen.from, seen.end - seen.from);
    float shrink = before - largest;
    exponentials(&shrink, 1);
    sum *= shrink;
    for (int64_t i = 0; i < size; i++) out[i] *= shrink;
    for (int64_t t = seen.from; t < seen.end; t++) {
      sum += scores[t];
      for (int64_t i = 0; i < size; i++)
        out[i] += rounded(scores[t]) * rounded(values + at + t * size + i);
    }
  }
  for (int64_t i = 0; i < size; i++) a.y[(place.row * a.heads + head) * size + i] = out[i] / sum;
}

bool attend_prompt(const Attention& a, const Place* places, int64_t count, int64_t kv_head) {
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t i = 0; i < count; i++)
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
      a.cache == kHalves ? attend_to_prompt<uint16_t>(a, places[i], head)
                         : attend_to_prompt<float>(a, places[i], head);
  return true;
}

}  // namespace
}  // namespace freeexport
