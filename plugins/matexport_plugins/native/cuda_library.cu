// The plain C interface of matexport_cuda.h: checks, types, and the choice of kernels. nvcc compiles it for GPUs, g++
// (as C++) for the CPU by way of cuda_shim.h.
#include "matexport_cuda.h"

#include "../causal_conv1d/cuda.h"
#include "../mamba2_scan/cuda_chunks.h"
#include "../mamba2_scan/cuda_steps.h"

#define MATEXPORT_API extern "C" __attribute__((visibility("default")))

namespace matexport::cuda {
namespace {

constexpr int64_t kMostElements = int64_t(1) << 48;

bool scan_sizes_fit(const matexport_scan &p) {
  return p.batch >= 0 && p.length >= 1 && p.heads >= 1 && p.groups >= 1 && p.heads % p.groups == 0 && p.N >= 1 &&
         p.P >= 1 && p.dt_min <= p.dt_max && p.N < 1 << 24 && p.P < 1 << 24 && p.heads < 1 << 24 &&
         p.batch < 1 << 24 && p.length < int64_t(1) << 40 && double(p.batch) * p.length * p.heads * p.P < kMostElements;
}

bool by_chunks(const matexport_scan &p) { return p.length > 1 && p.N <= kMostN; }

int64_t state_elements(const matexport_scan &p) { return p.batch * p.heads * p.N * p.P; }

template <class T>
size_t workspace(const matexport_scan &p) {
  if (by_chunks(p)) {
    const int64_t segments = scan_plan<T>(p).segments;
    return segments > 1 ? size_t(segments * (state_elements(p) + p.batch * p.heads)) * sizeof(float) : 0;
  }
  return p.length > 1 && !p.final_state ? size_t(state_elements(p)) * sizeof(float) : 0;
}

template <class T>
size_t most_workspace(const matexport_scan &p) {
  matexport_scan longest = p;
  longest.length = int64_t(kWantedBlocks) * kSegmentChunks * kChunk;
  longest.final_state = nullptr;
  if (p.N > kMostN) return workspace<T>(longest);
  size_t most = 0;  // segments times batch is about constant, but not monotonic
  for (longest.batch = 1; longest.batch <= p.batch && longest.batch <= kWantedBlocks; ++longest.batch) {
    const size_t bytes = workspace<T>(longest);
    most = bytes > most ? bytes : most;
  }
  return most;
}

template <class T>
int scan(const matexport_scan &p, void *memory, void *stream) {
  ScanArgs<T> args = {p.batch, p.length, p.heads, p.groups, p.N, p.P, p.dt_min, p.dt_max,
                      static_cast<const T *>(p.x), static_cast<const T *>(p.dt_raw), p.A,
                      static_cast<const T *>(p.B), static_cast<const T *>(p.C), p.D, p.dt_bias, p.state, p.mask,
                      static_cast<const T *>(p.z), static_cast<T *>(p.y), p.final_state, scan_plan<T>(p),
                      static_cast<float *>(memory), nullptr};
  if (workspace<T>(p) && !memory) return MATEXPORT_NULL;
  if (by_chunks(p)) {
    args.segment_decays = args.segment_states + args.plan.segments * state_elements(p);
    return launch_scan_chunks(args, stream);
  }
  if (p.length > 1 && !p.final_state) args.final_state = static_cast<float *>(memory);
  return launch_scan_steps(args, stream);
}

template <class T>
int conv(const matexport_conv &p, void *stream) {
  return launch_conv(ConvArgs<T>{p.batch, p.length, p.channels, int(p.k), static_cast<const T *>(p.x), p.weight, p.bias,
                                 p.state, p.mask, static_cast<T *>(p.y), p.final_state, 0, 0},
                     stream);
}

}  // namespace
}  // namespace matexport::cuda

using namespace matexport::cuda;

MATEXPORT_API int matexport_cuda_abi(void) { return MATEXPORT_CUDA_ABI; }

MATEXPORT_API size_t matexport_cuda_scan_workspace(const matexport_scan *p, int type) {
  if (!scan_sizes_fit(*p)) return 0;
  return type == MATEXPORT_BFLOAT16 ? workspace<Bf16>(*p)
         : type == MATEXPORT_FLOAT16 ? workspace<Half>(*p) : workspace<float>(*p);
}

MATEXPORT_API size_t matexport_cuda_scan_most_workspace(const matexport_scan *p, int type) {
  if (!scan_sizes_fit(*p)) return 0;
  return type == MATEXPORT_BFLOAT16 ? most_workspace<Bf16>(*p)
         : type == MATEXPORT_FLOAT16 ? most_workspace<Half>(*p) : most_workspace<float>(*p);
}

MATEXPORT_API int matexport_cuda_scan(const matexport_scan *p, int type, void *memory, void *stream) {
  if (!scan_sizes_fit(*p)) return MATEXPORT_BAD_SIZES;
  if (p->batch == 0) return 0;
  if (!p->x || !p->dt_raw || !p->A || !p->B || !p->C || !p->D || !p->dt_bias || !p->y) return MATEXPORT_NULL;
  switch (type) {
    case MATEXPORT_FLOAT32: return scan<float>(*p, memory, stream);
    case MATEXPORT_FLOAT16: return scan<Half>(*p, memory, stream);
    case MATEXPORT_BFLOAT16: return scan<Bf16>(*p, memory, stream);
  }
  return MATEXPORT_BAD_TYPE;
}

MATEXPORT_API int matexport_cuda_conv(const matexport_conv *p, int type, void *stream) {
  if (p->batch < 0 || p->length < 1 || p->channels < 1 || p->k < 1 || p->k > kMostTaps || p->batch >= 1 << 24 ||
      p->channels >= 1 << 30 || double(p->batch) * p->length * p->channels >= kMostElements)
    return MATEXPORT_BAD_SIZES;
  if (p->batch == 0) return 0;
  if (!p->x || !p->weight || !p->bias || !p->y) return MATEXPORT_NULL;
  switch (type) {
    case MATEXPORT_FLOAT32: return conv<float>(*p, stream);
    case MATEXPORT_FLOAT16: return conv<Half>(*p, stream);
    case MATEXPORT_BFLOAT16: return conv<Bf16>(*p, stream);
  }
  return MATEXPORT_BAD_TYPE;
}

MATEXPORT_API const char *matexport_cuda_error(int status) {
  switch (status) {
    case 0: return "success";
    case MATEXPORT_BAD_TYPE: return "a type that is none of float32, float16, bfloat16";
    case MATEXPORT_TOO_LARGE: return "a block would need more shared memory or threads than there are";
    case MATEXPORT_BAD_SIZES: return "sizes that make no sense";
    case MATEXPORT_NULL: return "a null pointer where one is required";
  }
#ifdef __CUDACC__
  return cudaGetErrorString(static_cast<cudaError_t>(status));
#else
  return "unknown";
#endif
}

// For operators that have no workspace of their own; not exported.
extern "C" void *matexport_cuda_allocate(size_t bytes, void *stream) {
#ifdef __CUDACC__
  void *memory = nullptr;
  return cudaMallocAsync(&memory, bytes, static_cast<cudaStream_t>(stream)) == cudaSuccess ? memory : nullptr;
#else
  return (void)stream, std::malloc(bytes);
#endif
}
extern "C" void matexport_cuda_release(void *memory, void *stream) {
#ifdef __CUDACC__
  cudaFreeAsync(memory, static_cast<cudaStream_t>(stream));
#else
  (void)stream, std::free(memory);
#endif
}

#ifndef __CUDACC__
// For tests: threads run in the opposite order, so that a missing barrier shows.
MATEXPORT_API void matexport_shim_reversed(int reversed) { shim::reversed = reversed != 0; }
#endif
