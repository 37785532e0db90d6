// The part of CUDA C++ that the kernels use. Under nvcc it is CUDA; under g++ and clang++ the very same kernels run on
// the CPU, one fiber for each CUDA thread, so that their arithmetic, indices and barriers are tested without a GPU.
//
// On the CPU shared memory is poisoned with NaN before each block, a barrier that not all threads reach is an error, and
// threads can run in two orders (`shim::reversed`): a missing barrier gives another result in one of them. What it cannot
// show: races inside one instruction, and speed. One host thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__

#define CUDA_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define CUDA_UNROLL _Pragma("unroll")

namespace matexport::cuda {

template <class Args>
int launch(void (*kernel)(Args), int64_t blocks, int threads, size_t shared, void *stream, const Args &args) {
  if (blocks == 0) return 0;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  if (shared > 48 * 1024) {
    const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (e != cudaSuccess) return int(e);
  }
  kernel<<<unsigned(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(args);
  return int(cudaGetLastError());
}

__device__ inline unsigned ballot(bool v) { return __ballot_sync(0xffffffffu, v); }
template <class V>
__device__ V from_lane_below(V v, int distance) {
  return __shfl_up_sync(0xffffffffu, v, distance);
}
template <class V>
__device__ V from_lane(V v, int lane) {
  return __shfl_sync(0xffffffffu, v, lane);
}

}  // namespace matexport::cuda

#else  // ------------------------------------------------------------------------------------------------------- CPU

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define CUDA_SHARED(name) unsigned char *name = ::shim::shared_memory
#define CUDA_UNROLL

namespace shim {

struct Index {
  unsigned x = 0;
};
constexpr int kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStack = 64 << 10, kMostShared = 99 << 10;  // what a block may have on sm_86, 89 and 120

// A barrier of a block or a warp: its turn changes when the last one arrives.
struct Barrier {
  unsigned turn = 0;
  int arrived = 0;
};
struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool started, finished;
  const Barrier *waits;
  unsigned turn;
};
struct Warp {
  Barrier barrier;
  alignas(16) unsigned char in[kWarp][32], out[kWarp][32];
};

static bool reversed = false;
static Fiber *fibers;
static Warp *warps;
static Barrier block_barrier;
static int threads, current;
static jmp_buf scheduler;
static ucontext_t scheduler_start;
static unsigned char *shared_memory;
static void (*body)(const void *);
static const void *body_args;
static Index block_index;

// _setjmp and _longjmp switch in nanoseconds; swapcontext, a system call, is for the first entry only.
static inline void resume(int i) {
  current = i;
  Fiber &f = fibers[i];
  if (_setjmp(scheduler)) return;
  if (f.started) _longjmp(f.at, 1);
  f.started = true;
  swapcontext(&scheduler_start, &f.start);
}
static inline void leave() {
  if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}
static inline void entry() {
  body(body_args);
  fibers[current].finished = true;
  _longjmp(scheduler, 1);
}
// Waits until `count` fibers have come; the last one does `work` for all.
template <class Work>
inline void meet(Barrier &b, int count, Work work) {
  if (++b.arrived == count) {
    work();
    b.arrived = 0, ++b.turn;
    return;
  }
  Fiber &f = fibers[current];
  f.waits = &b, f.turn = b.turn;
  leave();
}
// Each lane of a warp gives an In and gets an Out; `work` makes all 32 of them at once.
template <class Out, class In, class Work>
inline Out collective(const In &in, Work work) {
  static_assert(sizeof(In) <= 32 && sizeof(Out) <= 32, "mailbox");
  Warp &w = warps[current / kWarp];
  const int lane = current % kWarp;
  std::memcpy(w.in[lane], &in, sizeof in);
  meet(w.barrier, kWarp, [&] {
    In all[kWarp];
    Out results[kWarp];
    for (int i = 0; i < kWarp; ++i) std::memcpy(&all[i], w.in[i], sizeof(In));
    work(all, results);
    for (int i = 0; i < kWarp; ++i) std::memcpy(w.out[i], &results[i], sizeof(Out));
  });
  Out out;
  std::memcpy(&out, w.out[lane], sizeof out);
  return out;
}

static inline void run_block() {
  for (int i = 0; i < threads; ++i) fibers[i].started = fibers[i].finished = false, fibers[i].waits = nullptr;
  block_barrier = Barrier();
  for (int i = 0; i < threads / kWarp; ++i) warps[i].barrier = Barrier();
  for (int left = threads; left;) {
    int moved = 0;
    for (int k = 0; k < threads; ++k) {
      const int i = reversed ? threads - 1 - k : k;
      Fiber &f = fibers[i];
      if (f.finished || (f.waits && f.waits->turn == f.turn)) continue;
      f.waits = nullptr, ++moved;
      resume(i);
      left -= f.finished;
    }
    if (!moved) std::fprintf(stderr, "a barrier that not all threads reach\n"), std::abort();
  }
}

}  // namespace shim

struct {
  struct {
    operator unsigned() const { return unsigned(shim::current); }
  } x;
} static const threadIdx;
#define blockIdx ::shim::block_index
static inline void __syncthreads() {
#ifndef MATEXPORT_SHIM_WITHOUT_BARRIERS  // the tests' negative control
  shim::meet(shim::block_barrier, shim::threads, [] {});
#endif
}

namespace matexport::cuda {

template <class Args>
int launch(void (*kernel)(Args), int64_t blocks, int threads, size_t shared, void *, const Args &args) {
  using namespace shim;
  if (shared > kMostShared || threads > kMaxThreads || threads % kWarp) return -2;
  static unsigned char *stacks = nullptr;
  if (!stacks) {
    stacks = static_cast<unsigned char *>(std::malloc(kStack * kMaxThreads));
    fibers = new Fiber[kMaxThreads], warps = new Warp[kMaxThreads / kWarp];
    shared_memory = static_cast<unsigned char *>(std::aligned_alloc(64, kMostShared));
  }
  struct Call {
    void (*kernel)(Args);
    const Args *args;
  } call = {kernel, &args};
  body = [](const void *c) { static_cast<const Call *>(c)->kernel(*static_cast<const Call *>(c)->args); };
  body_args = &call;
  shim::threads = threads;
  for (int64_t b = 0; b < blocks; ++b) {
    for (int i = 0; i < threads; ++i) {
      getcontext(&fibers[i].start);
      fibers[i].start.uc_stack = {stacks + kStack * i, 0, kStack};
      fibers[i].start.uc_link = nullptr;
      makecontext(&fibers[i].start, entry, 0);
    }
    block_index.x = unsigned(b);
    std::memset(shared_memory, 0xff, kMostShared);  // NaN in every type
    run_block();
  }
  body_args = nullptr;
  return 0;
}

static inline unsigned ballot(bool v) {
  return shim::collective<unsigned>(v, [](const bool *in, unsigned *out) {
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= unsigned(in[i]) << i;
    for (int i = 0; i < 32; ++i) out[i] = bits;
  });
}
template <class V>
V from_lane_below(V v, int distance) {
  return shim::collective<V>(v, [=](const V *in, V *out) {
    for (int i = 0; i < 32; ++i) out[i] = in[i < distance ? i : i - distance];
  });
}
template <class V>
V from_lane(V v, int lane) {
  return shim::collective<V>(v, [=](const V *in, V *out) {
    for (int i = 0; i < 32; ++i) out[i] = in[lane];
  });
}

}  // namespace matexport::cuda

#endif
