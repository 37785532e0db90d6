// The convolution, for the instruction set whose namespace includes this (native/kernels.cc).
//
// Channels are the vectors' axis: memory is read and written in order, and every output is a few multiplications.

// R steps at once, for kernels of K taps: rows[r .. r + K - 1] is what step r sees, and ys[r] its y.
template <int K, int R>
MATEXPORT_INLINE void conv_steps(const ConvProblem &p, const float *const *rows, float *const *ys) {
  constexpr int W = MATEXPORT_LANES;
  for (Size c = 0; c < p.channels; c += W) {
    const Size count = p.channels - c;
    Floats<W> tap[K], x[K + R - 1];
    const Floats<W> bias = load<W>(p.bias + c, count);
    MATEXPORT_UNROLL
    for (int i = 0; i < K; ++i) tap[i] = load<W>(p.taps + i * p.channels + c, count);
    MATEXPORT_UNROLL
    for (int i = 0; i < K + R - 1; ++i) x[i] = load<W>(rows[i] + c, count);
    MATEXPORT_UNROLL
    for (int r = 0; r < R; ++r) {
      Floats<W> sum = bias;
      MATEXPORT_UNROLL
      for (int i = 0; i < K; ++i) sum += tap[i] * x[r + i];
      store<W>(ys[r] + c, silu<W>(sum), count);
    }
  }
}

// One step, any kernel.
MATEXPORT_INLINE void conv_step_any(const ConvProblem &p, const float *const *rows, float *y) {
  constexpr int W = MATEXPORT_LANES;
  for (Size c = 0; c < p.channels; c += W) {
    const Size count = p.channels - c;
    Floats<W> sum = load<W>(p.bias + c, count);
    for (Size i = 0; i < p.k; ++i)
      sum += load<W>(p.taps + i * p.channels + c, count) * load<W>(rows[i] + c, count);
    store<W>(y + c, silu<W>(sum), count);
  }
}

// kConvRows steps of one batch entry. Masked steps are left out: the real ones lie side by side in `rows`.
void conv_rows(void *problem, size_t part) {
  const ConvProblem &p = *static_cast<const ConvProblem *>(problem);
  const Size blocks = (p.length + kConvRows - 1) / kConvRows, b = Size(part) / blocks;
  const Size t0 = Size(part) % blocks * kConvRows, t1 = smaller(t0 + kConvRows, p.length);
  const float *rows[kMaxKernel + kConvRows];
  float *ys[kConvRows];
  rows_before(p, b, t0, rows);
  Size real = 0;
  for (Size t = t0; t < t1; ++t) {
    const Size at = (b * p.length + t) * p.channels;
    if (p.mask && !p.mask[b * p.length + t]) {
      for (Size c = 0; c < p.channels; ++c) p.y[at + c] = 0.f;
    } else {
      rows[p.k - 1 + real] = p.x + at;
      ys[real++] = p.y + at;
    }
  }
  Size i = 0;
  if (p.k == 4) {
    for (; i + 4 <= real; i += 4) conv_steps<4, 4>(p, rows + i, ys + i);
    for (; i < real; ++i) conv_steps<4, 1>(p, rows + i, ys + i);
  }
  for (; i < real; ++i) conv_step_any(p, rows + i, ys[i]);
}

// A single step, straight from weight and state in their own layouts. One part for each batch entry.
template <int K>
MATEXPORT_INLINE void conv_single(const ConvProblem &p, Size b) {
  constexpr int W = MATEXPORT_LANES;
  const Size k = K ? K : p.k;
  const float *x = p.x + b * p.channels, *state = p.state ? p.state + b * p.channels * (k - 1) : nullptr;
  float *y = p.y + b * p.channels, *next = p.final_state ? p.final_state + b * p.channels * (k - 1) : nullptr;
  for (Size c0 = 0; c0 < p.channels; c0 += W) {
    const Size count = smaller(W, p.channels - c0);
    float sums[W] = {};
    for (Size j = 0; j < count; ++j) {
      const Size c = c0 + j;
      float sum = p.bias[c] + p.weight[c * k + k - 1] * x[c];
      for (Size i = 0; i < k - 1; ++i) {
        if (state) sum += p.weight[c * k + i] * state[c * (k - 1) + i];
        if (next) next[c * (k - 1) + i] = i + 1 == k - 1 ? x[c] : state ? state[c * (k - 1) + i + 1] : 0.f;
      }
      sums[j] = sum;
    }
    store<W>(y + c0, silu<W>(load<W>(sums)), count);
  }
}

void conv_step(void *problem, size_t part) {
  const ConvProblem &p = *static_cast<const ConvProblem *>(problem);
  const Size b = Size(part), size = p.channels * (p.k - 1);
  if (p.mask && !p.mask[b]) {
    for (Size c = 0; c < p.channels; ++c) p.y[b * p.channels + c] = 0.f;
    for (Size i = 0; p.final_state && i < size; ++i)
      p.final_state[b * size + i] = p.state ? p.state[b * size + i] : 0.f;
  } else if (p.k == 4) {
    conv_single<4>(p, b);
  } else {
    conv_single<0>(p, b);
  }
}
