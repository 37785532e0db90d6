/* The CUDA kernels behind plain C: pointers to device memory, sizes, a data type, a stream. Shapes, equations and states
 * are those of mamba2_scan/README.md and causal_conv1d/README.md; every tensor is dense, in the order of its axes.
 *
 * A function returns 0, a negative number for arguments that make no sense, or the number of a cudaError_t. It only puts
 * work into the stream: no memory is allocated, nothing waits, so a CUDA graph can capture it. */
#ifndef MATEXPORT_CUDA_H
#define MATEXPORT_CUDA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { MATEXPORT_CUDA_ABI = 1 };

/* The type of x, dt_raw, B, C, z and y. Everything else is float32, the mask one byte a step. */
enum { MATEXPORT_FLOAT32 = 0, MATEXPORT_FLOAT16 = 1, MATEXPORT_BFLOAT16 = 2 };

/* What was wrong with the arguments. */
enum { MATEXPORT_BAD_TYPE = -1, MATEXPORT_TOO_LARGE = -2, MATEXPORT_BAD_SIZES = -3, MATEXPORT_NULL = -4 };

/* Optional: state, mask, z, final_state may be null. final_state may be the same memory as state. */
typedef struct {
  int64_t batch, length, heads, groups, N, P;
  float dt_min, dt_max;
  const void *x, *dt_raw;
  const float *A;
  const void *B, *C;
  const float *D, *dt_bias, *state;
  const unsigned char *mask;
  const void *z;
  void *y;
  float *final_state;
} matexport_scan;

/* Optional: state, mask, final_state may be null. final_state may be the same memory as state. */
typedef struct {
  int64_t batch, length, channels, k;
  const void *x;
  const float *weight, *bias, *state;
  const unsigned char *mask;
  void *y;
  float *final_state;
} matexport_conv;

/* MATEXPORT_CUDA_ABI of this library. */
int matexport_cuda_abi(void);

/* Bytes of device memory that matexport_cuda_scan needs for these sizes (pointers are not looked at). It is 0 unless a
 * long sequence has to be cut to fill a GPU, or states of N > 128 have nowhere to be. */
size_t matexport_cuda_scan_workspace(const matexport_scan *problem, int type);

/* The most that it returns for any length, for up to `batch` sequences and otherwise the same sizes. */
size_t matexport_cuda_scan_most_workspace(const matexport_scan *problem, int type);

int matexport_cuda_scan(const matexport_scan *problem, int type, void *workspace, void *stream);
int matexport_cuda_conv(const matexport_conv *problem, int type, void *stream);

/* What a return value means, in English. */
const char *matexport_cuda_error(int status);

#ifdef __cplusplus
}
#endif
#endif
