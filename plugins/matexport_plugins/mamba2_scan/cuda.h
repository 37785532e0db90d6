// Mamba2Scan on the GPU: what its kernels get, and how the work is divided among blocks.
#pragma once

#include "../native/cuda_mma.h"
#include "../native/matexport_cuda.h"

namespace matexport::cuda {

constexpr int kChunk = 64;         // steps that are computed as one matrix
constexpr int kScanThreads = 128;  // four warps
constexpr int kMostN = 128;        // of the chunked kernel; larger states go step by step
constexpr int kMostHeads = 8;      // that share a block
constexpr int kSegmentChunks = 4;  // the fewest that a segment has
constexpr int kWantedBlocks = 256;

// How the chunked kernel computes with tensors of type T: precision, channels in a block, blocks that a processor's
// registers must hold at a time.
template <class T>
struct Precision;
template <>
struct Precision<Bf16> {
  using Mma = MmaBf16;
  static constexpr int kColumns = 64, kBlocks = 2;
};
template <>
struct Precision<Half> {  // float16 has no room for products of its own range
  using Mma = MmaTf32<1>;
  static constexpr int kColumns = 32, kBlocks = 2;
};
template <>
struct Precision<float> {
  using Mma = MmaTf32<3>;
  static constexpr int kColumns = 32, kBlocks = 2;
};

// Blocks of the chunked kernel. A block has all channels of some heads of one group, which share B and C; or, where a
// head is too wide, some channels of one head. Sequences are cut into segments where that gives too few blocks: then the
// state that each segment adds is computed first, then the state at the start of each, and then all segments at once.
struct ScanPlan {
  int column_tiles;   // blocks for one head
  int tile;           // channels in each, a multiple of 8
  int heads;          // heads in a block
  int head_blocks;    // blocks for one group
  int segments;       // of each sequence
  int64_t chunks;     // in a segment
  int64_t blocks;     // for one segment of all sequences
};

__host__ __device__ inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
ScanPlan scan_plan(const matexport_scan &p) {
  constexpr int kColumns = Precision<T>::kColumns;
  ScanPlan plan;
  plan.column_tiles = int(divide_up(p.P, kColumns));
  plan.tile = int(divide_up(divide_up(p.P, plan.column_tiles), 8) * 8);
  const int64_t group = p.heads / p.groups;
  int64_t heads = plan.column_tiles > 1 ? 1 : kColumns / plan.tile;
  heads = heads < kMostHeads ? heads : kMostHeads;
  plan.heads = int(heads < group ? heads : group);
  plan.head_blocks = int(divide_up(group, plan.heads));
  plan.blocks = p.batch * p.groups * plan.head_blocks * plan.column_tiles;
  const int64_t chunks = divide_up(p.length, kChunk);
  int64_t segments = plan.blocks ? kWantedBlocks / plan.blocks : 1;
  segments = segments < chunks / kSegmentChunks ? segments : chunks / kSegmentChunks;
  plan.chunks = divide_up(chunks, segments > 1 ? segments : 1);
  plan.segments = int(divide_up(chunks, plan.chunks));
  return plan;
}

template <class T>
struct ScanArgs {
  int64_t batch, length, heads, groups, N, P;
  float dt_min, dt_max;
  const T *x, *dt_raw;
  const float *A;
  const T *B, *C;
  const float *D, *dt_bias, *state;
  const unsigned char *mask;
  const T *z;
  T *y;
  float *final_state;
  ScanPlan plan;
  float *segment_states;  // (segments, batch, heads, N, P): what segment i - 1 adds, then the state before segment i
  float *segment_decays;  // (segments, batch, heads)
};

template <class T>
__device__ __forceinline__ float step_size(const ScanArgs<T> &p, float raw, float bias) {
  return fminf(fmaxf(softplus(raw + bias), p.dt_min), p.dt_max);
}

}  // namespace matexport::cuda
