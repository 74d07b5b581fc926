// What differs between processors and systems: instruction sets and aligned memory.
#pragma once

#include <cstddef>

namespace freeexport {

// Instruction sets that both the processor and the system support, and that kernels are built for.
struct Processor {
  bool intel = false;
  bool zen5 = false;  // or a later one
#if defined(__x86_64__)
  bool avx2 = false;         // with FMA and F16C
  bool avx_vnni = false;     // AVX2 with dot products of bytes
  bool avx512 = false;       // F, BW, DQ and VL, with FMA
  bool avx512_vnni = false;  // with dot products of bytes
  bool avx512_bf16 = false;  // and of pairs in bfloat16
  bool amx = false;          // bfloat16 tiles, AVX512_BF16 and AVX512_VBMI
#elif defined(__aarch64__)
  bool dot_products = false;
  bool i8mm = false;
#endif
};

#if defined(__x86_64__)
// Registers of CPUID, and of XCR0, which tells what the system saves when it switches threads.
struct Identity {
  unsigned vendor = 0;   // leaf 0, EBX
  unsigned basic_c = 0;  // leaf 1, ECX
  unsigned b = 0;        // leaf 7, EBX
  unsigned c = 0;        // leaf 7, ECX
  unsigned d = 0;        // leaf 7, EDX
  unsigned part_a = 0;   // leaf 7, part 1, EAX
  unsigned saved = 0;    // XCR0, or 0 if the system does not let programs read it
};

Identity identify();
Processor detect(const Identity& identity);
#endif

// Set when the library is loaded.
extern const Processor kProcessor;

// Number of logical processors of the machine, at least 1. Set when the library is loaded.
extern const int kCores;

// Allows this process to use AMX tiles. Returns false if the system does not.
bool request_tiles();

// Returns memory at a multiple of 64 bytes, or null. Free it with `release`.
void* allocate(size_t bytes);
void release(void* memory);

}  // namespace freeexport
