// CausalConv1d on the GPU. The work is bound by memory: neighbouring threads have neighbouring channels.
#pragma once

#include "../native/cuda_types.h"
#include "../native/matexport_cuda.h"

namespace matexport::cuda {

constexpr int kConvThreads = 128;  // channels in a block
constexpr int kConvSteps = 32;     // steps in a block
constexpr int kConvBatch = 8;      // of them that a thread reads before it writes the first
constexpr int kMostTaps = 256;     // k

template <class T>
struct ConvArgs {
  int64_t batch, length, channels;
  int k;
  const T *x;
  const float *weight, *bias, *state;
  const unsigned char *mask;
  T *y;
  float *final_state;
  int64_t channel_blocks, step_blocks;
};

// before[0 .. k - 2] = the last k - 1 steps before `end` that count, oldest first; where there are fewer, the columns of
// the state that come before them, as column - (k - 1). Done by one warp.
__device__ inline void steps_before(const unsigned char *mask, int64_t end, int k, int64_t *before) {
  const int lane = int(threadIdx.x) % 32;
  int missing = k - 1;
  for (int64_t at = end; at > 0 && missing > 0; at -= 32) {
    const int64_t step = at - 1 - lane;
    const bool real = step >= 0 && (!mask || mask[step]);
    const unsigned bits = ballot(real);
    int rank = 0, count = 0;  // of real steps in lower lanes, which are later steps; of all
    for (int i = 0; i < 32; ++i) {
      if (i == lane) rank = count;
      count += int(bits >> i & 1);
    }
    if (real && rank < missing) before[missing - 1 - rank] = step;
    missing -= count < missing ? count : missing;
  }
  for (int i = lane; i < missing; i += 32) before[i] = i - missing;
}

template <class T>
__device__ __forceinline__ float conv_input(const ConvArgs<T> &p, int64_t b, int64_t channel, int64_t step) {
  if (step >= 0) return value(p.x[(b * p.length + step) * p.channels + channel]);
  return p.state ? p.state[(b * p.channels + channel) * (p.k - 1) + p.k - 1 + step] : 0.f;
}

// kTaps inputs stay in registers while a thread goes through its steps; kTaps = 0: any number, read again for each step.
template <class T, int kTaps>
__global__ void __launch_bounds__(kConvThreads) conv_rows(ConvArgs<T> p) {
  CUDA_SHARED(memory);
  const int k = kTaps ? kTaps : p.k;
  int64_t *steps = reinterpret_cast<int64_t *>(memory);  // k - 1 before this block's, then its own
  int64_t &own = steps[k - 1 + kConvSteps];              // of its own that count
  int64_t block = blockIdx.x;
  const int64_t channel = block % p.channel_blocks * kConvThreads + threadIdx.x;
  block /= p.channel_blocks;
  const int64_t b = block / p.step_blocks, t0 = block % p.step_blocks * kConvSteps;
  const unsigned char *mask = p.mask ? p.mask + b * p.length : nullptr;
  const int thread = int(threadIdx.x);
  if (thread < 32) {
    const int64_t step = t0 + thread;
    const bool real = step < p.length && (!mask || mask[step]);
    const unsigned bits = ballot(real);
    int rank = 0, total = 0;
    for (int i = 0; i < 32; ++i) {
      if (i == thread) rank = total;
      total += int(bits >> i & 1);
    }
    if (real) steps[k - 1 + rank] = step;
    if (thread == 0) own = total;
    if (total) steps_before(mask, t0, k, steps);
  }
  __syncthreads();
  if (channel >= p.channels) return;
  const int count = int(own);
  const float bias = p.bias[channel];
  const float *weight = p.weight + channel * k;
  const int64_t here = p.length - t0 < kConvSteps ? p.length - t0 : kConvSteps;
  if (count < here)
    for (int i = 0; i < here; ++i)
      if (!mask[t0 + i]) p.y[(b * p.length + t0 + i) * p.channels + channel] = nearest<T>(0.f);
  float taps[kTaps ? kTaps : 1], window[kTaps ? kTaps : 1];
  if (kTaps && count) {
    CUDA_UNROLL for (int i = 0; i < kTaps; ++i) taps[i] = weight[i];
    CUDA_UNROLL for (int i = 1; i < kTaps; ++i) window[i] = conv_input(p, b, channel, steps[i - 1]);
  }
  const auto at = [=](int i) { return (b * p.length + steps[k - 1 + i]) * p.channels + channel; };
  if (kTaps) {
    for (int i0 = 0; i0 < count; i0 += kConvBatch) {
      T inputs[kConvBatch] = {};
      CUDA_UNROLL for (int u = 0; u < kConvBatch; ++u)
        if (i0 + u < count) inputs[u] = p.x[at(i0 + u)];
      CUDA_UNROLL for (int u = 0; u < kConvBatch; ++u)
        if (i0 + u < count) {
          CUDA_UNROLL for (int j = 1; j < kTaps; ++j) window[j - 1] = window[j];
          window[kTaps - 1] = value(inputs[u]);
          float sum = bias;
          CUDA_UNROLL for (int j = 0; j < kTaps; ++j) sum += taps[j] * window[j];
          p.y[at(i0 + u)] = nearest<T>(silu(sum));
        }
    }
  } else {
    for (int i = 0; i < count; ++i) {
      float sum = bias;
      for (int j = 0; j < k; ++j) sum += weight[j] * conv_input(p, b, channel, steps[i + j]);
      p.y[at(i)] = nearest<T>(silu(sum));
    }
  }
}

// The state after the last step. A kernel of its own, so that it may overwrite the state that conv_rows reads.
template <class T>
__global__ void __launch_bounds__(kConvThreads) conv_state(ConvArgs<T> p) {
  CUDA_SHARED(memory);
  int64_t *steps = reinterpret_cast<int64_t *>(memory);
  const int64_t channel = int64_t(blockIdx.x) % p.channel_blocks * kConvThreads + threadIdx.x;
  const int64_t b = blockIdx.x / p.channel_blocks;
  if (threadIdx.x < 32) steps_before(p.mask ? p.mask + b * p.length : nullptr, p.length, p.k, steps);
  __syncthreads();
  if (channel >= p.channels) return;
  float *state = p.final_state + (b * p.channels + channel) * (p.k - 1);
  for (int i = 0; i < p.k - 1; ++i) state[i] = conv_input(p, b, channel, steps[i]);  // never from columns before i
}

// One step: output and state at once.
template <class T>
__global__ void __launch_bounds__(kConvThreads) conv_step(ConvArgs<T> p) {
  const int64_t i = int64_t(blockIdx.x) * kConvThreads + threadIdx.x, b = i / p.channels, channel = i % p.channels;
  if (b >= p.batch) return;
  const int last = p.k - 1;
  const bool real = !p.mask || p.mask[b];
  const float *weight = p.weight + channel * p.k, *before = p.state ? p.state + i * last : nullptr;
  float *after = p.final_state ? p.final_state + i * last : nullptr, sum = p.bias[channel];
  for (int j = 0; j < last; ++j) {
    const float v = before ? before[j] : 0.f;
    sum += weight[j] * v;
    if (after && real && j > 0) after[j - 1] = v;
    if (after && !real) after[j] = v;
  }
  float y = 0;
  if (real) {
    const float v = value(p.x[i]);
    y = silu(sum + weight[last] * v);
    if (after && last) after[last - 1] = v;
  }
  p.y[i] = nearest<T>(y);
}

template <class T>
int launch_conv(ConvArgs<T> args, void *stream) {
  if (args.length == 1)
    return launch(conv_step<T>, (args.batch * args.channels + kConvThreads - 1) / kConvThreads, kConvThreads, 0, stream, args);
  args.channel_blocks = (args.channels + kConvThreads - 1) / kConvThreads;
  args.step_blocks = (args.length + kConvSteps - 1) / kConvSteps;
  const int64_t blocks = args.batch * args.channel_blocks * args.step_blocks;
  const size_t shared = size_t(args.k + kConvSteps) * sizeof(int64_t);
  if (int e = launch(args.k == 4 ? conv_rows<T, 4> : conv_rows<T, 0>, blocks, kConvThreads, shared, stream, args))
    return e;
  if (!args.final_state || args.k == 1) return 0;
  return launch(conv_state<T>, args.batch * args.channel_blocks, kConvThreads, shared, stream, args);
}

}  // namespace matexport::cuda
