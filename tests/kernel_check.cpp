// Program that checks every instruction set of the library it is linked with, where Python is not
// available, for example in an emulator. Compares products with float64, and all results with plain
// C++, bit for bit. Prints a digest of the results of plain C++, which is the same on every
// processor.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "packed_linear.h"

using namespace freeexport;

namespace {

std::mt19937 random_bits(1);
uint64_t digest = 1469598103934665603u;  // FNV-1a

int64_t between(int64_t low, int64_t high) { return low + random_bits() % (high - low + 1); }
// Approximately normal. The functions of the standard library differ between implementations.
float value() {
  int64_t sum = 0;
  for (int i = 0; i < 4; i++) sum += between(-1000, 1000);
  return static_cast<float>(sum) / 1024.0f;
}
std::vector<float> floats(int64_t count) {
  std::vector<float> all(count);
  for (float& one : all) one = value();
  return all;
}

void serial(void*, void (*task)(void*, size_t), size_t total, void* data) {
  for (size_t i = 0; i < total; i++) task(data, i);
}

void add_to_digest(const std::vector<float>& y) {
  for (float one : y) {
    uint32_t bits;
    std::memcpy(&bits, &one, 4);
    digest = (digest ^ bits) * 1099511628211u;
  }
}

void expect(bool good, const char* name, const char* what) {
  if (good) return;
  std::printf("%s: %s\n", name, what);
  std::exit(1);
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

struct Packed {
  Weight weight;
  std::vector<uint8_t> data;
  std::vector<uint8_t> zeros;
  std::vector<uint16_t> scales;
  std::vector<uint16_t> offsets;
  std::vector<int8_t> multiples;
  std::vector<float> bias;

  Packed(int64_t outputs, int64_t inputs, int bits) : weight{} {
    weight.outputs = outputs;
    weight.inputs = inputs;
    weight.bits = bits;
    const bool multiple = inputs % kSuper == 0 && bits != 8 && (bits == 6 || between(0, 1));
    weight.block = bits == 6 ? kGroup / 2 : multiple ? kGroup : kGroup << between(0, 2);
    multiples.resize(weight.panels() * weight.blocks() * kPanel * 2);
    for (auto& one : multiples) one = random_bits();
    if (multiple) weight.multiples = multiples.data();
    data.resize(weight.panels() * weight.groups() * weight.group_bytes());
    scales.resize(weight.panels() * weight.scales_of_panel() * kPanel);
    zeros.resize(scales.size());
    for (auto& one : data) one = random_bits();
    for (auto& one : scales)
      one = (between(0, 1) << 15) | between(0, 0x3c00);  // up to 1, with subnormals
    for (auto& one : zeros) one = between(0, bits == 4 ? 15 : 255);
    weight.data = data.data();
    weight.scales = scales.data();
    offsets.resize(scales.size());
    for (auto& one : offsets) one = (between(0, 1) << 15) | between(0, 0x4000);
    const int64_t form = bits == 6   ? 0
                         : multiple  ? 2
                         : bits == 5 ? 2 * between(0, 1)
                                     : between(0, bits == 4 ? 2 : 1);
    if (form == 1) weight.zeros = zeros.data();
    if (form == 2) weight.offsets = offsets.data();
    bias = floats(outputs);
    if (between(0, 1)) weight.bias = bias.data();
  }

  // Reads a value in the layout of packed_linear.h.
  double at(int64_t output, int64_t input) const {
    const int64_t panel = output / kPanel;
    const int64_t lane = output % kPanel;
    const int64_t group = input / kGroup;
    const int64_t quad = input % kGroup / 4;
    const uint8_t* bytes = data.data() + (panel * weight.groups() + group) * weight.group_bytes() +
                           lane * 4 + input % 4;
    const uint8_t byte = bytes[(weight.bits == 8 ? quad : quad / 2) * 64];
    int whole = weight.bits == 8 ? byte : quad % 2 ? byte >> 4 : byte & 15;
    if (weight.bits == 5) whole += (bytes[256] >> quad & 1) * 16;
    if (weight.bits == 6) whole += (bytes[256 + 64 * (quad / 4)] >> 2 * (quad % 4) & 3) * 16;
    const int64_t block = panel * weight.blocks() + input / weight.block;
    const int64_t at = block * kPanel + lane;
    const int zero = weight.offsets ? 0 : weight.zeros ? zeros[at] : 1 << (weight.bits - 1);
    if (!weight.multiples)
      return (whole - zero) * wide(scales[at]) + (weight.offsets ? wide(offsets[at]) : 0);
    const int64_t super = (panel * (weight.inputs / kSuper) + input / kSuper) * kPanel + lane;
    const double scale = wide(scales[super]);
    if (weight.bits == 6) return (whole - zero) * scale * multiples[at];
    return whole * scale * multiples[block * 2 * kPanel + lane] +
           wide(offsets[super]) * multiples[(block * 2 + 1) * kPanel + lane];
  }

  static double wide(uint16_t half) {
    const int exponent = half >> 10 & 31;
    const int fraction = half & 1023;
    const double size =
        exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return half & 0x8000 ? -size : size;
  }
};

// Compares y with the product of the weight and rows that are rounded to 8 bits as in the operator.
void expect_product(const Product& product, const std::vector<float>& y, const Packed& packed) {
  const int64_t inputs = product.weight.inputs;
  const int64_t outputs = product.weight.outputs;
  double largest = 0;
  double furthest = 0;
  for (int64_t row = 0; row < product.rows; row++) {
    std::vector<double> rounded(inputs);
    for (int64_t first = 0; first < inputs; first += kGroup) {
      const float* x = product.x + row * inputs;
      const int64_t end = first + kGroup < inputs ? first + kGroup : inputs;
      float peak = 0;
      for (int64_t i = first; i < end; i++) peak = std::fmax(peak, std::fabs(x[i]));
      const float step = 127.0f / peak;
      for (int64_t i = first; i < end && peak > 0; i++)
        rounded[i] = std::nearbyint(x[i] * step) * (peak / 127.0f);
    }
    for (int64_t output = 0; output < outputs; output++) {
      double sum = product.weight.bias ? product.weight.bias[output] : 0;
      for (int64_t i = 0; i < inputs; i++) sum += rounded[i] * packed.at(output, i);
      largest = std::fmax(largest, std::fabs(sum));
      furthest = std::fmax(furthest, std::fabs(sum - y[row * outputs + output]));
    }
  }
  expect(furthest <= 4e-6 * largest, "scalar", "a product is not that of float64");
}

std::vector<float> multiplied(const Kernels& kernels, Product product, std::vector<float>* total) {
  std::vector<float> y(product.rows * product.outputs(), NAN);
  product.y = y.data();
  product.total = total->data();
  expect(packed_linear(kernels, product, serial, nullptr), kernels.name, "no memory");
  return y;
}

void try_products(const std::vector<const Kernels*>& all, bool fused) {
  const int64_t outputs = between(1, 70);
  const int64_t whole = between(0, 1);
  const int64_t inputs = whole ? kSuper : between(1, 300);
  const int64_t rows = between(1, 33);
  const int kBits[] = {4, 8, 5, 6};
  const Packed packed(outputs, inputs, kBits[between(0, 2 + whole)]);
  const Packed up(outputs, inputs, kBits[between(0, 2 + whole)]);
  const auto x = floats(rows * inputs);
  const auto skip = floats(rows * inputs);
  const auto norm = floats(inputs);
  const auto shift = floats(inputs);
  Product product = {};
  product.rows = rows;
  product.x = x.data();
  product.epsilon = 1e-5f;
  product.weight = packed.weight;
  if (fused) {
    product.weight.pairs = between(0, 1);
    product.skip = skip.data();
    product.norm = norm.data();
    product.activation = between(0, kActivations - 1);
    if (between(0, 1)) {
      product.up = up.weight;
      product.up.pairs = product.weight.pairs;
    }
    product.beside = product.up.data != nullptr && product.activation == kNone;
    if ((product.layer = between(0, 1))) {
      product.shift = shift.data();
      product.keeps_norm = between(0, 1);
    }
  }
  std::vector<float> total(x.size());
  std::vector<float> again(x.size());
  const auto y = multiplied(kScalar, product, &total);
  if (!fused) expect_product(product, y, packed);
  add_to_digest(y);
  for (const Kernels* kernels : all) {
    expect(same(multiplied(*kernels, product, &again), y), kernels->name,
           "a product differs from plain C++");
    expect(same(again, total), kernels->name, "a sum differs from plain C++");
  }
}

// Returns random keys or values in the type of the cache.
std::vector<float> cached(const Attention& a) {
  const int64_t rows = a.batch * a.kv_heads * a.capacity;
  std::vector<float> all = floats(rows * cache_width(a));
  auto* halves = reinterpret_cast<uint16_t*>(all.data());
  auto* bytes = reinterpret_cast<int8_t*>(all.data());
  for (int64_t i = 0; i < rows * a.size && a.cache == kHalves; i++)
    halves[i] = static_cast<uint16_t>(between(0, 1) << 15 | between(0x2c00, 0x4000));  // 1/16 to 2
  for (int64_t row = 0; row < rows && a.cache == kBytes; row++, bytes += cache_width(a)) {
    for (int64_t i = 0; i < a.size; i++) bytes[i] = static_cast<int8_t>(between(-127, 127));
    const float scale = static_cast<float>(between(1, 30)) / 1024.0f;
    std::memcpy(bytes + a.size, &scale, sizeof(scale));
  }
  return all;
}

void try_attention(const std::vector<const Kernels*>& all) {
  Attention a = {};
  a.batch = a.prompts = between(1, 3);
  a.kv_heads = between(1, 3);
  a.heads = a.kv_heads * between(1, 5);
  a.size = 8 * between(2, 16);
  a.capacity = 220;
  a.scale = 0.2f;
  a.window = between(0, 1) ? between(1, 150) : 0;
  a.width = (a.heads + 2 * a.kv_heads) * a.size;
  a.packed = true;
  a.positions = 220;
  a.turned = between(1, a.size / 2);
  a.reach = 9;
  a.epsilon = 1e-6f;
  std::vector<int32_t> past;
  std::vector<int32_t> lengths;
  for (int64_t b = 0; b < a.batch; b++) {
    past.push_back(between(0, 200));
    lengths.push_back(between(b == 0, 12));
    a.rows += lengths[b];
  }
  a.cache = static_cast<Cache>(between(kFloats, kBytes));
  a.past_lengths = past.data();
  a.query_lengths = lengths.data();
  const auto rows = floats(a.rows * a.width);
  const auto keys = cached(a);
  const auto values = cached(a);
  const auto cosine = floats(a.positions * a.turned);
  const auto sine = floats(cosine.size());
  const auto bias = floats((a.reach + 1) * a.heads);
  const auto norm = floats(a.size);
  a.input = rows.data();
  if (between(0, 1)) a.softcap = 3.0f;
  if (between(0, 1)) {
    a.cosine = cosine.data();
    a.sine = sine.data();
  }
  if (between(0, 1)) a.bias = bias.data();
  if (between(0, 1)) a.query_norm = a.key_norm = norm.data();
  const auto attend = [&](const Kernels& kernels, std::vector<float>* key,
                          std::vector<float>* value) {
    std::vector<float> y(a.rows * a.heads * a.size, NAN);
    a.past_key = a.key = key->data();
    a.past_value = a.value = value->data();
    a.y = y.data();
    expect(attention(kernels, a, serial, nullptr) == nullptr, kernels.name, "attention is refused");
    return y;
  };
  std::vector<float> key = keys;
  std::vector<float> value = values;
  const auto y = attend(kScalar, &key, &value);
  add_to_digest(y);
  add_to_digest(key);
  for (const Kernels* kernels : all) {
    std::vector<float> other_key = keys;
    std::vector<float> other_value = values;
    expect(same(attend(*kernels, &other_key, &other_value), y), kernels->name,
           "attention differs from plain C++");
    expect(same(other_key, key) && same(other_value, value), kernels->name,
           "the cache differs from plain C++");
  }
}

void try_encoder(const std::vector<const Kernels*>& all) {
  Attention a = {};
  a.batch = a.prompts = between(1, 3);
  a.kv_heads = between(1, 2);
  a.heads = a.kv_heads * between(1, 2);
  a.size = 8 * between(2, 16);
  a.capacity = between(1, 150);
  a.rows = a.batch * a.capacity;
  a.scale = 0.2f;
  a.width = (a.heads + 2 * a.kv_heads) * a.size;
  a.reach = between(0, 20);
  a.encoder = true;
  std::vector<int32_t> lengths;
  for (int64_t b = 0; b < a.batch; b++) lengths.push_back(between(0, a.capacity));
  a.cross_lengths = a.query_lengths = lengths.data();
  const auto rows = floats(a.rows * a.width);
  const auto bias = floats((2 * a.reach + 1) * a.heads);
  a.input = rows.data();
  if (between(0, 1)) a.bias = bias.data();
  const auto attend = [&](const Kernels& kernels) {
    std::vector<float> y(a.rows * a.heads * a.size, NAN);
    std::vector<float> key(a.rows * a.kv_heads * a.size + kBehind, NAN);
    std::vector<float> value = key;
    a.key = key.data();
    a.value = value.data();
    a.y = y.data();
    expect(attention(kernels, a, serial, nullptr) == nullptr, kernels.name,
           "attention of an encoder is refused");
    return y;
  };
  const auto y = attend(kScalar);
  add_to_digest(y);
  for (const Kernels* kernels : all)
    expect(same(attend(*kernels), y), kernels->name,
           "attention of an encoder differs from plain C++");
}

void try_best_two(const std::vector<const Kernels*>& all) {
  const auto logits = floats(between(2, kPiece));
  BestTwo expected;
  BestTwo found;
  kScalar.best_of_piece(logits.data(), 7, logits.size(), &expected);
  add_to_digest({expected.best, expected.second, expected.sum});
  for (const Kernels* kernels : all) {
    kernels->best_of_piece(logits.data(), 7, logits.size(), &found);
    const bool equal =
        found.best_index == expected.best_index && found.second_index == expected.second_index;
    expect(equal && same({found.best, found.second, found.sum},
                         {expected.best, expected.second, expected.sum}),
           kernels->name, "the best two differ from plain C++");
  }
}

}  // namespace

// Arguments: names of the instruction sets that must be supported.
int main(int count, char** names) {
  std::vector<const Kernels*> all;
  for (int i = 1; i < count; i++) {
    const Kernels* kernels = find_kernels(names[i]);
    expect(kernels != nullptr && kernels->supported(), names[i], "is not to be had here");
    all.push_back(kernels);
  }
  for (int i = 0; i < 150; i++) {
    try_products(all, false);
    try_products(all, true);
    try_attention(all);
    try_encoder(all);
    try_best_two(all);
  }
  const char* problem = nullptr;
  const Kernels* chosen = choose_kernels(&problem);
  std::printf("chosen %s\ndigest %016llx\n", chosen ? chosen->name : problem,
              static_cast<unsigned long long>(digest));
}
