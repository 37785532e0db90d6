#include "isa.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace matexport {
namespace {

struct Candidate {
  const char *name;
  const Kernels *kernels;  // null: not compiled in
  bool usable;
};

}  // namespace

const Kernels *choose_kernels(char *problem, size_t size) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  const Candidate candidates[] = {  // best first
#if defined(MATEXPORT_WITH_X86)
      {"avx512", &kAvx512,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma")},
      {"avx2", &kAvx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#else
      {"avx512", nullptr, false},
      {"avx2", nullptr, false},
#endif
      {"portable", &kPortable, true},
  };
  const char *wanted = std::getenv("MATEXPORT_ISA");
  const bool any = !wanted || !*wanted;
  for (const Candidate &c : candidates) {
    if (!any && std::strcmp(c.name, wanted) != 0) continue;
    if (c.usable) return c.kernels;
    if (!any) {
      std::snprintf(problem, size, "MATEXPORT_ISA=%s: this %s", wanted,
                    c.kernels ? "processor does not have it" : "library was built without it");
      return nullptr;
    }
  }
  std::snprintf(problem, size, "MATEXPORT_ISA=%.32s is not one of portable, avx2, avx512", wanted);
  return nullptr;
}

bool has_bf16_dots([[maybe_unused]] const Kernels &kernels) {
#if defined(MATEXPORT_WITH_X86)
  return &kernels == &kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace matexport
