// The scan of a single step: one pass over the state (native/kernels.cc includes this, after ort_cpu_kernel.h).

// Columns of a single step: NV vectors, the last one of `count` lanes.
template <int W, int NV>
MATEXPORT_INLINE void step_columns(const ScanProblem &p, Size head, Size column, Size count, const float *B,
                                   const float *C, float dt, float decay, float D) {
  const Size row = head * p.P + column, last = NV - 1;
  Floats<W> x[NV], y[NV] = {};
  for (int j = 0; j < NV; ++j) x[j] = load<W>(p.x + row + j * W, j == last ? count : W);
  const float *in = p.state ? p.state + head * p.N * p.P + column : nullptr;
  float *out = p.final_state ? p.final_state + head * p.N * p.P + column : nullptr;
  for (Size n = 0; n < p.N; ++n)
    for (int j = 0; j < NV; ++j) {
      Floats<W> s = x[j] * (dt * B[n]);
      if (in) s += load<W>(in + n * p.P + j * W, j == last ? count : W) * decay;
      if (out) store<W>(out + n * p.P + j * W, s, j == last ? count : W);
      y[j] += s * C[n];
    }
  for (int j = 0; j < NV; ++j) {
    Floats<W> v = y[j] + x[j] * D;
    if (p.z) v *= silu<W>(load<W>(p.z + row + j * W, j == last ? count : W));
    store<W>(p.y + row + j * W, v, j == last ? count : W);
  }
}

void scan_step(void *problem, size_t part) {
  const ScanProblem &p = *static_cast<const ScanProblem *>(problem);
  constexpr int W = MATEXPORT_LANES;
  const Size head = Size(part), b = head / p.heads, h = head % p.heads, N = p.N, P = p.P;
  if (p.mask && !p.mask[b]) {
    for (Size i = 0; i < P; ++i) p.y[head * P + i] = 0.f;
    const Size at = head * N * P;
    if (p.final_state) copy_rows(p.state ? p.state + at : nullptr, P, p.final_state + at, P, N, P, false);
    return;
  }
  float dt = softplus<4>(splat<4>(p.dt_raw[head] + p.dt_bias[h]))[0];
  dt = dt < p.dt_min ? p.dt_min : dt > p.dt_max ? p.dt_max : dt;
  const float decay = exponential<4>(splat<4>(dt * p.A[h]))[0], D = p.D[h];
  const Size group = (b * p.groups + h / (p.heads / p.groups)) * N;
  const float *B = p.B + group, *C = p.C + group;
  Size column = 0;
  for (; column + 4 * W <= P; column += 4 * W) step_columns<W, 4>(p, head, column, W, B, C, dt, decay, D);
  for (; column + W <= P; column += W) step_columns<W, 1>(p, head, column, W, B, C, dt, decay, D);
  for (; column + 4 <= P; column += 4) step_columns<4, 1>(p, head, column, 4, B, C, dt, decay, D);
  if (column < P) step_columns<4, 1>(p, head, column, P - column, B, C, dt, decay, D);
}
