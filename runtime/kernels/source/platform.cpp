#include "platform.h"

#include <cstdint>
#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(_WIN32)
#include <malloc.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace freeexport {
namespace {

#if defined(__x86_64__)

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

// Returns zeros if the processor does not have the leaf.
Registers identify(unsigned leaf, unsigned part) {
  Registers r;
  if (!__get_cpuid_count(leaf, part, &r.a, &r.b, &r.c, &r.d)) return {};
  return r;
}

bool bit(unsigned value, int index) { return (value >> index & 1) != 0; }

// Returns the registers that the system saves when it switches threads (XCR0).
unsigned saved_registers() {
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

Processor detect() {
  constexpr unsigned kYmm = 0x6, kZmm = 0xe0;
  Processor found;
  found.intel = identify(0, 0).b == 0x756e6547;  // "Genu"
  const Registers basic = identify(1, 0), extended = identify(7, 0), more = identify(7, 1);
  if (!bit(basic.c, 27)) return found;  // OSXSAVE
  const unsigned saved = saved_registers();
  if ((saved & kYmm) != kYmm) return found;
  const bool fma = bit(basic.c, 12), f16c = bit(basic.c, 29);
  found.avx2 = bit(extended.b, 5) && fma && f16c;
  found.avx_vnni = found.avx2 && bit(more.a, 4);
#if !defined(__APPLE__)  // macOS saves these registers from their first use on
  if ((saved & kZmm) != kZmm) return found;
#endif
  const bool f = bit(extended.b, 16), dq = bit(extended.b, 17), bw = bit(extended.b, 30), vl = bit(extended.b, 31);
  found.avx512 = found.avx2 && f && dq && bw && vl;
  found.avx512_vnni = found.avx512 && bit(extended.c, 11);
  const bool vbmi = bit(extended.c, 1), bf16 = bit(more.a, 5), tile_bf16 = bit(extended.d, 22), tiles = bit(extended.d, 24);
  found.amx = found.avx512_vnni && vbmi && bf16 && tile_bf16 && tiles;
  return found;
}

#elif defined(__aarch64__) && defined(__linux__)

Processor detect() {
  constexpr unsigned long kDotProducts = 1ul << 20, kI8mm = 1ul << 13;  // HWCAP_ASIMDDP, HWCAP2_I8MM
  Processor found;
  found.dot_products = (getauxval(AT_HWCAP) & kDotProducts) != 0;
  found.i8mm = (getauxval(AT_HWCAP2) & kI8mm) != 0;
  return found;
}

#elif defined(__aarch64__) && defined(__APPLE__)

bool has(const char* feature) {
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
}

Processor detect() {
  Processor found;
  found.dot_products = has("hw.optional.arm.FEAT_DotProd");
  found.i8mm = has("hw.optional.arm.FEAT_I8MM");
  return found;
}

#else

Processor detect() { return {}; }

#endif

}  // namespace

const Processor kProcessor = detect();

bool request_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of Linux 5.16
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

void* allocate(size_t bytes) {
  constexpr size_t kLine = 64;
#if defined(_WIN32)
  return _aligned_malloc(bytes, kLine);
#else
  // Available since macOS 10.6, unlike aligned_alloc.
  void* memory = nullptr;
  return posix_memalign(&memory, kLine, bytes) == 0 ? memory : nullptr;
#endif
}

void release(void* memory) {
#if defined(_WIN32)
  _aligned_free(memory);
#else
  std::free(memory);
#endif
}

}  // namespace freeexport
