#include "platform.h"

#include <cstdint>
#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(_WIN32)
#include <malloc.h>
#else
#include <unistd.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#endif

namespace freeexport {
namespace {

#if defined(__x86_64__)

bool bit(unsigned value, int index) { return (value >> index & 1) != 0; }

bool all(unsigned value, unsigned bits) { return (value & bits) == bits; }

#elif defined(__aarch64__) && defined(__linux__)

Processor detect() {
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
  constexpr unsigned long kI8mm = 1ul << 13;         // HWCAP2_I8MM
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
  found.dot_products = true;  // of every Mac with this processor; macOS 11 lacks a name for it
  found.i8mm = has("hw.optional.arm.FEAT_I8MM");
  return found;
}

#elif !defined(__x86_64__)

Processor detect() { return {}; }

#endif

}  // namespace

#if defined(__x86_64__)

Identity identify() {
  constexpr int kReadable = 27;  // OSXSAVE
  Identity found;
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  __get_cpuid_count(0, 0, &a, &found.vendor, &c, &d);
  __get_cpuid_count(1, 0, &a, &b, &found.basic_c, &d);
  unsigned last_part = 0;
  // These leave the registers unchanged if the processor lacks the leaf.
  __get_cpuid_count(7, 0, &last_part, &found.b, &found.c, &found.d);
  if (last_part >= 1) __get_cpuid_count(7, 1, &found.part_a, &b, &c, &d);
  if (bit(found.basic_c, kReadable)) asm volatile("xgetbv" : "=a"(found.saved), "=d"(d) : "c"(0));
#if defined(__APPLE__)
  found.saved &= 0x7;  // macOS before 12.2 loses mask registers of AVX-512
#endif
  return found;
}

Processor detect(const Identity& is) {
  constexpr unsigned kYmm = 0x6;
  constexpr unsigned kZmm = 0xe6;
  constexpr unsigned kTiles = 0x600e6;
  Processor found;
  found.intel = is.vendor == 0x756e6547;  // "Genu"
  const bool avx = bit(is.basic_c, 28);
  const bool fma = bit(is.basic_c, 12);
  const bool f16c = bit(is.basic_c, 29);
  found.avx2 = all(is.saved, kYmm) && avx && fma && f16c && bit(is.b, 5);
  found.avx_vnni = found.avx2 && bit(is.part_a, 4);
  const bool f = bit(is.b, 16);
  const bool dq = bit(is.b, 17);
  const bool bw = bit(is.b, 30);
  const bool vl = bit(is.b, 31);
  found.avx512 = found.avx2 && all(is.saved, kZmm) && f && dq && bw && vl;
  found.avx512_vnni = found.avx512 && bit(is.c, 11);
  const bool vbmi = bit(is.c, 1);
  const bool bf16 = bit(is.part_a, 5);
  const bool tile_bf16 = bit(is.d, 22);
  const bool tiles = bit(is.d, 24);
  found.avx512_bf16 = found.avx512_vnni && bf16;
  found.amx = found.avx512_bf16 && all(is.saved, kTiles) && vbmi && tile_bf16 && tiles;
  found.zen5 = !found.intel && found.avx512_bf16 && found.avx_vnni;  // Zen 4 has no AVX-VNNI
  return found;
}

const Processor kProcessor = detect(identify());

#else

const Processor kProcessor = detect();

#endif

namespace {

int cores() {
#if defined(_WIN32)
  const char* found = std::getenv("NUMBER_OF_PROCESSORS");
  const long count = found == nullptr ? 1 : std::strtol(found, nullptr, 10);
#else
  const long count = sysconf(_SC_NPROCESSORS_ONLN);
#endif
  return count > 1 ? static_cast<int>(count) : 1;
}

}  // namespace

const int kCores = cores();

bool request_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM of Linux 5.16
  constexpr long kTileData = 18;
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
