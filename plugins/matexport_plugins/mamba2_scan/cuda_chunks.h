// Mamba2Scan by chunks of 64 steps as products of matrices (arXiv 2405.21060, section 6), on tensor cores.
//
// With l_t the sum of the log decays dt A from the start of the chunk, of a head and its state S before the chunk:
//   Y = (C B^T o L) x + exp(l) C S + D x     L_ts = exp(l_t - l_s) dt_s for s <= t, else 0
//   S <- exp(l_end) S + B^T (w o x)          w_s = exp(l_end - l_s) dt_s
// A block has some channels of all heads that share C B^T, and goes through the chunks of one segment. S stays in
// registers, in float32: warp w has rows 16 w and 16 (w + 4) onwards. Y is made by rows: warp w has steps 16 w onwards.
//
// Sums of log decays are float64, kept as two float32 numbers: their differences lose no digit where decay is strong.
#pragma once

#include "cuda.h"

namespace matexport::cuda {

struct LogSum {
  float high, low;
};
// exp of the difference; the sums are to the base 2.
__device__ __forceinline__ float decay_between(LogSum from, LogSum to) {
  return exp2f((to.high - from.high) + (to.low - from.low));
}

// Shared memory of the chunked kernel, in the order of its arrays.
template <class T>
struct ChunkMemory {
  using Operand = typename Precision<T>::Mma::Operand;
  static constexpr int kColumns = Precision<T>::kColumns;
  static constexpr int kAcross = kChunk + 8;  // row length of x; the 8 keep a warp's accesses in different banks

  int across;                    // row length of B, C, S
  Operand *B, *C, *x, *S;        // (step, n), (step, n), (column, step), (column, n)
  LogSum *log_decay;             // (head, step)
  float *dt;                     // (head, step)

  __host__ __device__ static int padded(int64_t N) { return int((N + 15) / 16 * 16); }
  __host__ __device__ static size_t bytes(int64_t N, int heads) {
    const size_t across = padded(N) + 8;
    return (2 * kChunk * across + kColumns * (kAcross + across)) * sizeof(Operand) +
           size_t(heads) * kChunk * (sizeof(LogSum) + sizeof(float));
  }
  __device__ ChunkMemory(unsigned char *memory, int64_t N, int heads) : across(padded(N) + 8) {
    B = reinterpret_cast<Operand *>(memory);
    C = B + kChunk * across;
    x = C + kChunk * across;
    S = x + kColumns * kAcross;
    log_decay = reinterpret_cast<LogSum *>(S + kColumns * across);
    dt = reinterpret_cast<float *>(log_decay + heads * kChunk);
  }
};

// rows[step][n] = source[step][n] for the steps that count, zeros elsewhere.
template <class T, class Operand>
__device__ void load_rows(Operand *rows, int across, int padded, const T *source, int64_t stride, int N, int valid,
                          const unsigned char *mask, bool whole) {
  const int parts = padded / 8;
  for (int i = int(threadIdx.x); i < kChunk * parts; i += kScanThreads) {
    const int s = i / parts, n = i % parts * 8;
    T v[8];
    load8(v, source + s * stride + n, s < valid && (!mask || mask[s]) ? N - n : 0, whole);
    CUDA_UNROLL for (int k = 0; k < 8; ++k) {
      if constexpr (sizeof(Operand) == sizeof(T)) rows[s * across + n + k] = reinterpret_cast<const Operand &>(v[k]);
      else rows[s * across + n + k] = value(v[k]);
    }
  }
}

template <class T, bool kStateOnly>
__global__ void __launch_bounds__(kScanThreads, Precision<T>::kBlocks) scan_chunks(ScanArgs<T> p) {
  using Mma = typename Precision<T>::Mma;
  using Operand = typename Mma::Operand;
  using Pair = typename Mma::Pair;
  using Memory = ChunkMemory<T>;
  constexpr int kColumns = Precision<T>::kColumns, kTiles = kColumns / 8, kAcross = Memory::kAcross;
  const ScanPlan &plan = p.plan;
  CUDA_SHARED(bytes);
  Memory shared(bytes, p.N, plan.heads);

  // Which heads, channels, steps and sequence: what changes fastest shares B and C.
  int64_t block = blockIdx.x;
  const int column_tile = int(block % plan.column_tiles);
  block /= plan.column_tiles;
  const int head_block = int(block % plan.head_blocks);
  block /= plan.head_blocks;
  const int64_t group = block % p.groups;
  block /= p.groups;
  const int segment = int(block % plan.segments);
  const int64_t b = block / plan.segments;
  const int64_t per_group = p.heads / p.groups, first = group * per_group + int64_t(head_block) * plan.heads;
  const int64_t left = (group + 1) * per_group - first;
  const int heads = left < plan.heads ? int(left) : plan.heads, tile = plan.tile, tile8 = tile / 8;
  const int p0 = column_tile * tile, N = int(p.N), P = int(p.P), padded = Memory::padded(N);
  if (kStateOnly && segment == plan.segments - 1) return;  // nobody comes after it

  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const bool whole_bc = aligned16(p.B, p.groups * N) && aligned16(p.C, p.groups * N) && N % 8 == 0;
  const bool whole_x = aligned16(p.x, P) && P % 8 == 0;
  const bool whole_y = aligned_pairs(p.y, P), whole_z = aligned_pairs(p.z, P);

  // The state: element e of tile (m, j) is row n(m, e), column j * 8 + 2 t + e % 2. Two of them are neighbours.
  float S[2][kTiles][4];
  const auto n_of = [=](int m, int e) { return (warp + 4 * m) * 16 + g + e / 2 * 8; };
  const auto column_of = [=](int j) { return p0 + j % tile8 * 8 + 2 * t; };
  const auto state_at = [=](int m, int j, int e) -> int64_t {  // in (batch, heads, N, P); -1 where there is none
    const int head = j / tile8, q = column_of(j), n = n_of(m, e);
    if (head >= heads || q >= P || n >= N) return -1;
    return ((b * p.heads + first + head) * N + n) * P + q;
  };
  const auto in_head = [=](int j, int head) { return j >= head * tile8 && j < (head + 1) * tile8; };
  const int64_t states = p.batch * p.heads * N * P;  // elements of one segment's states
  const float *start = plan.segments > 1 ? p.segment_states + segment * states : p.state;
  if (kStateOnly) start = nullptr;
  const bool start_whole = aligned_pairs(start, P);
  CUDA_UNROLL for (int m = 0; m < 2; ++m)
    CUDA_UNROLL for (int j = 0; j < kTiles; ++j)
      CUDA_UNROLL for (int e = 0; e < 4; e += 2) {
        const int64_t at = start ? state_at(m, j, e) : -1;
        const Two<float> two = at < 0 ? Two<float>{} : load2(start + at, P - column_of(j), start_whole);
        S[m][j][e] = two.v[0], S[m][j][e + 1] = two.v[1];
      }
  double log_total = 0;  // of the segment; in lane 31 of warp i, of head i (and i + 4)
  double log_total4 = 0;

  const int64_t end = (segment + 1) * plan.chunks * kChunk < p.length ? (segment + 1) * plan.chunks * kChunk : p.length;
  for (int64_t t0 = segment * plan.chunks * kChunk; t0 < end; t0 += kChunk) {
    const int valid = end - t0 < kChunk ? int(end - t0) : kChunk;
    const int64_t step0 = b * p.length + t0;
    const unsigned char *mask = p.mask ? p.mask + step0 : nullptr;
    __syncthreads();  // the chunk before this one is done

    load_rows(shared.B, shared.across, padded, p.B + (step0 * p.groups + group) * N, p.groups * N, N, valid, mask, whole_bc);
    if (!kStateOnly)
      load_rows(shared.C, shared.across, padded, p.C + (step0 * p.groups + group) * N, p.groups * N, N, valid, mask, whole_bc);
    for (int i = thread; i < kChunk * kTiles; i += kScanThreads) {  // x, transposed
      const int s = i % kChunk, column = i / kChunk * 8, head = column / tile, q = p0 + column % tile;
      const bool here = s < valid && head < heads && (!mask || mask[s]);
      T v[8];
      load8(v, p.x + ((step0 + s) * p.heads + first + head) * P + q, here ? P - q : 0, whole_x);
      CUDA_UNROLL for (int k = 0; k < 8; ++k) {
        if constexpr (sizeof(Operand) == sizeof(T))
          shared.x[(column + k) * kAcross + s] = reinterpret_cast<const Operand &>(v[k]);
        else
          shared.x[(column + k) * kAcross + s] = value(v[k]);
      }
    }
    if (!kStateOnly)
      CUDA_UNROLL for (int m = 0; m < 2; ++m)
        if ((warp + 4 * m) * 16 < padded)
          CUDA_UNROLL for (int j = 0; j < kTiles; ++j)
            CUDA_UNROLL for (int e = 0; e < 4; ++e)
              shared.S[(j * 8 + 2 * t + e % 2) * shared.across + n_of(m, e)] = nearest<Operand>(S[m][j][e]);

    for (int head = warp; head < heads; head += 4) {  // step sizes and log decays: each lane has two steps
      const float A = p.A[first + head], bias = p.dt_bias[first + head];
      double log_decay[2];
      CUDA_UNROLL for (int k = 0; k < 2; ++k) {
        const int s = 2 * lane + k;
        const bool real = s < valid && (!mask || mask[s]);
        const float dt = real ? step_size(p, value(p.dt_raw[(step0 + s) * p.heads + first + head]), bias) : 0.f;
        shared.dt[head * kChunk + s] = dt;
        const double l = double(dt) * A * 1.4426950408889634;
        log_decay[k] = l < -1e5 ? -1e5 : l;  // 2^-1e5 is zero as well, and the sums stay finite
      }
      double sum = log_decay[0] + log_decay[1];
      CUDA_UNROLL for (int distance = 1; distance < 32; distance *= 2) {
        const double below = from_lane_below(sum, distance);
        if (lane >= distance) sum += below;
      }
      CUDA_UNROLL for (int k = 0; k < 2; ++k) {
        const double l = k ? sum : sum - log_decay[1];
        const float high = float(l);
        shared.log_decay[head * kChunk + 2 * lane + k] = {high, float(l - high)};
      }
      (head < 4 ? log_total : log_total4) += sum;
    }
    __syncthreads();

    if (!kStateOnly && warp * 16 < valid) {
      // C B^T and C S, for 16 steps. Steps after them are left out.
      float CB[kChunk / 8][4] = {}, Y[kTiles][4] = {};
      for (int k = 0; k < padded; k += 16) {
        Pair c[4];
        CUDA_UNROLL for (int i = 0; i < 4; ++i)
          c[i] = Mma::load(shared.C + (warp * 16 + g + i % 2 * 8) * shared.across + k + 2 * t + i / 2 * 8);
        CUDA_UNROLL for (int j = 0; j < kChunk / 8; ++j)
          if (j < 2 * warp + 2) {
            const Operand *row = shared.B + (j * 8 + g) * shared.across + k + 2 * t;
            const Pair pairs[2] = {Mma::load(row), Mma::load(row + 8)};
            Mma::mma(CB[j], c, pairs);
          }
        CUDA_UNROLL for (int j = 0; j < kTiles; ++j)
          if (j < heads * tile8) {
            const Operand *row = shared.S + (j * 8 + g) * shared.across + k + 2 * t;
            const Pair pairs[2] = {Mma::load(row), Mma::load(row + 8)};
            Mma::mma(Y[j], c, pairs);
          }
      }
      const int row0 = warp * 16 + g;
      for (int head = 0; head < heads; ++head) {
        const LogSum *logs = shared.log_decay + head * kChunk;
        const float *dt = shared.dt + head * kChunk;
        const LogSum mine[2] = {logs[row0], logs[row0 + 8]};
        const float since[2] = {exp2f(mine[0].high + mine[0].low), exp2f(mine[1].high + mine[1].low)};
        CUDA_UNROLL for (int j = 0; j < kTiles; ++j)
          if (in_head(j, head)) CUDA_UNROLL for (int e = 0; e < 4; ++e) Y[j][e] *= since[e / 2];
        CUDA_UNROLL for (int k = 0; k < kChunk / 16; ++k)
          if (k <= warp) {
            Pair scores[4];
            CUDA_UNROLL for (int i = 0; i < 4; ++i) {
              const int s = k * 16 + 2 * t + i / 2 * 8, row = row0 + i % 2 * 8;
              float v[2];
              CUDA_UNROLL for (int e = 0; e < 2; ++e)
                v[e] = s + e > row ? 0.f
                                   : CB[2 * k + i / 2][i % 2 * 2 + e] * dt[s + e] * decay_between(logs[s + e], mine[i % 2]);
              scores[i] = Mma::make(v[0], v[1]);
            }
            CUDA_UNROLL for (int j = 0; j < kTiles; ++j)
              if (in_head(j, head)) {
                const Operand *row = shared.x + (j * 8 + g) * kAcross + k * 16 + 2 * t;
                const Pair pairs[2] = {Mma::load(row), Mma::load(row + 8)};
                Mma::mma(Y[j], scores, pairs);
              }
          }
      }
      CUDA_UNROLL for (int j = 0; j < kTiles; ++j) {
        const int head = j / tile8, q = column_of(j);
        if (head >= heads) break;
        const float D = p.D[first + head];
        CUDA_UNROLL for (int e = 0; e < 4; e += 2) {
          const int s = row0 + e / 2 * 8;
          if (q >= P || s >= valid) continue;
          const int64_t at = ((step0 + s) * p.heads + first + head) * P + q;
          Two<T> two = {};
          if (!mask || mask[s]) {
            if (p.z) two = load2(p.z + at, P - q, whole_z);
            CUDA_UNROLL for (int i = 0; i < 2; ++i) {
              float y = Y[j][e + i] + D * value(shared.x[(j * 8 + 2 * t + i) * kAcross + s]);
              if (p.z) y *= silu(value(two.v[i]));
              two.v[i] = nearest<T>(y);
            }
          }
          store2(p.y + at, two, P - q, whole_y);
        }
      }
    }
    __syncthreads();

    for (int i = thread; i < kColumns * kChunk; i += kScanThreads) {  // x <- w o x
      const int s = i % kChunk, column = i / kChunk, head = column / tile;
      if (head >= heads) break;
      const LogSum *logs = shared.log_decay + head * kChunk;
      const float w = shared.dt[head * kChunk + s] * decay_between(logs[s], logs[kChunk - 1]);
      Operand &x = shared.x[column * kAcross + s];
      x = nearest<Operand>(w * value(x));
    }
    __syncthreads();

    CUDA_UNROLL for (int j = 0; j < kTiles; ++j)
      if (j < heads * tile8) {
        const LogSum last = shared.log_decay[j / tile8 * kChunk + kChunk - 1];
        const float decay = exp2f(last.high + last.low);
        CUDA_UNROLL for (int m = 0; m < 2; ++m) CUDA_UNROLL for (int e = 0; e < 4; ++e) S[m][j][e] *= decay;
      }
    for (int k = 0; k < valid; k += 16)
      CUDA_UNROLL for (int m = 0; m < 2; ++m)
        if ((warp + 4 * m) * 16 < padded) {
          Pair bt[4];
          CUDA_UNROLL for (int i = 0; i < 4; ++i) {
            const Operand *at = shared.B + (k + 2 * t + i / 2 * 8) * shared.across + (warp + 4 * m) * 16 + g + i % 2 * 8;
            bt[i] = Mma::join(at[0], at[shared.across]);
          }
          CUDA_UNROLL for (int j = 0; j < kTiles; ++j)
            if (j < heads * tile8) {
              const Operand *row = shared.x + (j * 8 + g) * kAcross + k + 2 * t;
              const Pair pairs[2] = {Mma::load(row), Mma::load(row + 8)};
              Mma::mma(S[m][j], bt, pairs);
            }
        }
  }

  float *result = p.final_state;
  if (kStateOnly) {
    result = p.segment_states + (segment + 1) * states;
    for (int head = warp; head < heads; head += 4)
      if (lane == 31)
        p.segment_decays[((segment + 1) * p.batch + b) * p.heads + first + head] = exp2f(float(head < 4 ? log_total : log_total4));
  } else if (segment != plan.segments - 1) {
    result = nullptr;
  }
  const bool result_whole = aligned_pairs(result, P);
  if (result)
    CUDA_UNROLL for (int m = 0; m < 2; ++m)
      CUDA_UNROLL for (int j = 0; j < kTiles; ++j)
        CUDA_UNROLL for (int e = 0; e < 4; e += 2) {
          const int64_t at = state_at(m, j, e);
          if (at >= 0) store2(result + at, {{S[m][j][e], S[m][j][e + 1]}}, P - column_of(j), result_whole);
        }
}

// segment_states <- the state before each segment.
template <class T>
__global__ void __launch_bounds__(kScanThreads) pass_states(ScanArgs<T> p) {
  const int64_t states = p.batch * p.heads * p.N * p.P, i = int64_t(blockIdx.x) * kScanThreads + threadIdx.x;
  if (i >= states) return;
  const int64_t head = i / (p.N * p.P);
  float S = p.state ? p.state[i] : 0.f;
  p.segment_states[i] = S;
  for (int s = 1; s < p.plan.segments; ++s) {
    float &at = p.segment_states[s * states + i];
    S = p.segment_decays[s * p.batch * p.heads + head] * S + at;
    at = S;
  }
}

template <class T>
int launch_scan_chunks(const ScanArgs<T> &args, void *stream) {
  const ScanPlan &plan = args.plan;
  const size_t shared = ChunkMemory<T>::bytes(args.N, plan.heads);
  const int64_t blocks = plan.blocks * plan.segments;
  if (plan.segments > 1) {
    if (int e = launch(scan_chunks<T, true>, blocks, kScanThreads, shared, stream, args)) return e;
    const int64_t states = args.batch * args.heads * args.N * args.P;
    if (int e = launch(pass_states<T>, divide_up(states, kScanThreads), kScanThreads, 0, stream, args)) return e;
  }
  return launch(scan_chunks<T, false>, blocks, kScanThreads, shared, stream, args);
}

}  // namespace matexport::cuda
