// Mamba2Scan step by step: one pass over the state for each step. For decoding, which is bound by the bandwidth of
// memory, and for states too long for the chunked kernel.
//
// A block has one head of one sequence and up to 128 * kVector of its channels: fewer where there would be too few blocks
// to fill a GPU. A thread has kVector neighbouring channels and every rows-th row of the state; it alone reads and writes
// them, so `state` may be `final_state`. It reads kBatch rows before it writes the first: the compiler, which cannot know
// that they are others, would wait for each.
#pragma once

#include "cuda.h"

namespace matexport::cuda {

constexpr int kBatch = 4;

template <int kVector>
struct alignas(4 * kVector) Floats {
  float v[kVector];
};

template <class T, int kVector>
__global__ void __launch_bounds__(kScanThreads, 6) scan_steps(ScanArgs<T> p) {
  CUDA_SHARED(memory);
  float *sums = reinterpret_cast<float *>(memory);  // (rows, columns)
  const int vectors = int(p.P / kVector);
  const int tiles = p.plan.column_tiles, across = int(divide_up(vectors, tiles));
  const int rows = kScanThreads / across, tile = int(blockIdx.x % tiles);
  const int64_t bh = blockIdx.x / tiles, b = bh / p.heads, h = bh % p.heads, group = h / (p.heads / p.groups);
  const int row = int(threadIdx.x) / across, column = int(threadIdx.x) % across, at = (tile * across + column) * kVector;
  const bool busy = row < rows && at < p.P;
  const float A = p.A[h], D = p.D[h], bias = p.dt_bias[h];
  const int64_t offset = bh * p.N * p.P + at;

  const float *before = p.state ? p.state + offset : nullptr;
  float *after = p.final_state ? p.final_state + offset : nullptr;
  for (int64_t t = 0; t < p.length; ++t, before = after) {
    const int64_t step = b * p.length + t;
    const bool real = !p.mask || p.mask[step];
    const int64_t bc = (step * p.groups + group) * p.N, xy = (step * p.heads + h) * p.P;
    const float dt = real ? step_size(p, value(p.dt_raw[step * p.heads + h]), bias) : 0.f;
    const float decay = expm1f(dt * A);  // S + decay S drifts less than a product of many factors
    float x[kVector], sum[kVector] = {};
    CUDA_UNROLL for (int i = 0; i < kVector; ++i) x[i] = busy && real ? dt * value(p.x[xy + at + i]) : 0.f;
    if (busy && (real || before != after)) {
      for (int64_t n0 = row; n0 < p.N; n0 += kBatch * rows) {
        Floats<kVector> S[kBatch] = {};
        float B[kBatch] = {}, C[kBatch] = {};
        CUDA_UNROLL for (int u = 0; u < kBatch; ++u) {
          const int64_t n = n0 + u * rows;
          if (n >= p.N) break;
          if (before) S[u] = *reinterpret_cast<const Floats<kVector> *>(before + n * p.P);
          if (real) B[u] = value(p.B[bc + n]), C[u] = value(p.C[bc + n]);
        }
        CUDA_UNROLL for (int u = 0; u < kBatch; ++u) {
          const int64_t n = n0 + u * rows;
          if (n >= p.N) break;
          CUDA_UNROLL for (int i = 0; i < kVector && real; ++i) {
            S[u].v[i] += decay * S[u].v[i] + B[u] * x[i];
            sum[i] += C[u] * S[u].v[i];
          }
          if (after) *reinterpret_cast<Floats<kVector> *>(after + n * p.P) = S[u];
        }
      }
    }
    if (row < rows)
      CUDA_UNROLL for (int i = 0; i < kVector; ++i) sums[(row * across + column) * kVector + i] = sum[i];
    __syncthreads();
    for (int c = int(threadIdx.x); c < across * kVector; c += kScanThreads) {
      const int64_t channel = tile * across * kVector + c;
      if (channel >= p.P) break;
      float y = 0;
      if (real) {
        for (int r = 0; r < rows; ++r) y += sums[r * across * kVector + c];
        y += D * value(p.x[xy + channel]);
        if (p.z) y *= silu(value(p.z[xy + channel]));
      }
      p.y[xy + channel] = nearest<T>(y);
    }
    __syncthreads();
  }
}

template <class T>
int launch_scan_steps(ScanArgs<T> args, void *stream) {
  const bool whole = args.P % 4 == 0 && aligned16(args.state, 0) && aligned16(args.final_state, 0);
  const int64_t vectors = args.P / (whole ? 4 : 1), heads = args.batch * args.heads, sector = whole ? 4 : 16;
  int64_t tiles = divide_up(vectors, kScanThreads);  // each of 64 bytes of a row at least
  while (heads * tiles < kWantedBlocks && vectors >= 2 * tiles * sector) tiles *= 2;
  args.plan.column_tiles = int(tiles);
  const int64_t blocks = heads * tiles;
  const size_t shared = kScanThreads * 4 * sizeof(float);
  return whole ? launch(scan_steps<T, 4>, blocks, kScanThreads, shared, stream, args)
               : launch(scan_steps<T, 1>, blocks, kScanThreads, shared, stream, args);
}

}  // namespace matexport::cuda
