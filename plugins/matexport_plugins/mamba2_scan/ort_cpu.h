// Mamba2Scan on the CPU: what the operator (ort_cpu.cc) and its kernels (ort_cpu_kernel.h) agree on.
#pragma once

#include <cstddef>
#include <cstdint>

namespace matexport {

namespace ort {
struct CustomOp;
}

constexpr int kChunk = 32;           // steps that are computed as one matrix
constexpr int64_t kPanelChunks = 16;  // chunks between two meetings of all threads; bounds the scratch memory

constexpr int kMaxPairedState = 256;  // largest N for products in bfloat16

// Shapes as in README.md. Pointers to optional inputs and outputs may be null.
struct ScanProblem {
  const float *x, *dt_raw, *A, *B, *C, *D, *dt_bias, *state, *z;
  const bool *mask;
  float *y, *final_state;
  int64_t batch, length, heads, groups, N, P;
  float dt_min, dt_max;
  bool bf16;  // products in bfloat16; N is then a multiple of 16 and at most kMaxPairedState

  // The panel in work: chunks [first, first + chunks) of the sequence.
  int64_t first, chunks;

  // Laid out by scan_plan in `scratch`: for each chunk of a panel, ...
  int64_t panel, unit, stride;  // chunks in a panel; heads worked on at once; row length of their state in work
  float *scratch;
  size_t c_at, cb_at, b_at, pairs_at, dt_at, state_at;
  bool own_state;  // the state is worked on in scratch and not in final_state
};

const ort::CustomOp *mamba2_scan_op();

}  // namespace matexport
