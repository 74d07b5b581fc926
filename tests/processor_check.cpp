// Program that prints which instruction sets the kernels would use. Each line of the input has the
// words of an Identity in hexadecimal. A last line tells of the processor that runs the program.
#include <cstdio>

#include "platform.h"

using namespace freeexport;

namespace {

void print(const Processor& found) {
  std::printf("%s%s%s%s%s%s%s\n",
              found.intel  ? "intel"
              : found.zen5 ? "zen5"
                           : "other",
              found.avx2 ? " avx2" : "", found.avx_vnni ? " avx2-vnni" : "",
              found.avx512 ? " avx512" : "", found.avx512_vnni ? " avx512-vnni" : "",
              found.avx512_bf16 ? " avx512-bf16" : "", found.amx ? " amx" : "");
}

}  // namespace

int main() {
  Identity is;
  while (std::scanf("%x %x %x %x %x %x %x", &is.vendor, &is.basic_c, &is.b, &is.c, &is.d,
                    &is.part_a, &is.saved) == 7)
    print(detect(is));
  print(kProcessor);
}
