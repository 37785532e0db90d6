// One table of kernels for each instruction set, and the choice between them at run time.
//
// The sources of the kernels (kernels.cc and what it includes) are compiled once for each instruction set.
#pragma once

#include <cstddef>

namespace matexport {

struct ScanProblem;
struct ConvProblem;

// A task takes its problem and the number of its part, as ONNX Runtime's thread pool calls it.
using Task = void (*)(void *problem, size_t part);

struct Kernels {
  const char *name;
  size_t (*scan_plan)(ScanProblem *);  // lays out the scratch memory; returns its size in floats
  Task scan_prepare, scan_heads, scan_step;
  Task conv_rows, conv_step;
};

extern const Kernels kPortable, kAvx2, kAvx512;

// The best kernels of this CPU, or those that the environment variable MATEXPORT_ISA names. Null if they do not exist
// here; then `problem` (of `size` bytes) says why.
const Kernels *choose_kernels(char *problem, size_t size);

// Whether these kernels can multiply in bfloat16, and the CPU has the instruction for it.
bool has_bf16_dots(const Kernels &kernels);

}  // namespace matexport
