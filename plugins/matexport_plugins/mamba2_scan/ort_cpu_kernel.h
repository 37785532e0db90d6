// The scan, for the instruction set whose namespace includes this (native/kernels.cc).
//
// A sequence is cut into chunks of 32 steps, and chunks into panels. For each panel:
//   scan_prepare, a part for each (batch, group, chunk): what all heads of a group share, C transposed and
//       cb[s][t] = B_s . C_t, and the dt of its heads;
//   scan_heads, a part for each (batch, unit): y and the state, chunk by chunk, as two small matrix products each:
//       y_t = (decay from the chunk's start to t) C_t S + sum over s <= t of W[s][t] x_s,
//             W[s][t] = cb[s][t] (decay from s to t) dt_s, plus D on the diagonal;
//       S   = (decay of the chunk) S + sum over s of B_s (decay from s to the end) dt_s x_s^T.
// Decays are products or sums of steps in float64, never differences of float32 sums: those cancel.
// A masked step has dt = 0 and is zero in B, C and x, so that it changes nothing, whatever it holds.
// A unit is one head, or two neighbours whose columns fill vectors together: 24 + 24 are three of 16. They share C and B;
// the rest differs by lane.
// The products (ort_cpu_product_kernel.h) are of float, or of Pair: two steps, or two rows of the state, in bfloat16.
// Sums are float32 in both, and so is the state. Single steps are in ort_cpu_step_kernel.h.

// ---------------------------------------------------------------------------------------- sizes of tiles
// A tile is Rows<W, NV> x NV vectors of accumulators in registers: 32 registers with AVX-512, 16 otherwise.
constexpr bool kManyRegisters = MATEXPORT_LANES == 16;
constexpr int kMaxVectors = kManyRegisters ? 5 : 3;
constexpr int rows_of(int vectors) {
  if (kManyRegisters) return vectors == 1 ? 16 : vectors <= 3 ? 8 : 4;
  return vectors == 1 ? 8 : 4;
}

// The vector width for head dim P. A vector of 4 costs as much as one of 8; one of 16 often twice that.
MATEXPORT_INLINE int lanes_for(Size P) {
  if (P <= 4 || MATEXPORT_LANES == 4) return 4;
  return MATEXPORT_LANES == 8 || (P + 7) / 8 % 2 ? 8 : 16;
}

// Whether two heads are worked on at once: where a head by itself ends in half a vector.
MATEXPORT_INLINE bool by_twos(const ScanProblem &p) {
  return !p.bf16 && 2 * p.P % MATEXPORT_LANES == 0 && 2 * p.P / MATEXPORT_LANES % 2 == 1 &&
         2 * p.P <= kMaxVectors * MATEXPORT_LANES && p.heads / p.groups % 2 == 0;
}

size_t scan_plan(ScanProblem *p) {
  const Size chunks = (p->length + kChunk - 1) / kChunk;
  p->panel = smaller(chunks, kPanelChunks);
  p->unit = by_twos(*p) ? 2 : 1;
  const int W = p->unit == 2 ? MATEXPORT_LANES : lanes_for(p->P);
  p->stride = (p->unit * p->P + W - 1) / W * W;
  p->own_state = p->stride != p->P || !p->final_state;
  const size_t shared = size_t(p->batch * p->groups * p->panel), round = 15;
  size_t end = 0;
  p->c_at = end, end += shared * size_t(p->N) * kChunk;
  p->cb_at = end, end += shared * kChunk * kChunk;
  p->dt_at = end, end += size_t(p->batch * p->heads * p->panel) * kChunk;
  p->b_at = end, end += p->mask ? shared * size_t(p->N) * kChunk : 0;
  p->pairs_at = end, end += p->bf16 ? shared * size_t(p->N) * kChunk : 0;
  end = (end + round) & ~round;
  p->state_at = end, end += p->own_state ? size_t(p->batch * p->heads / p->unit * p->N * p->stride) : 0;
  return end;
}

// -------------------------------------------------------------------------------------------- scan_prepare
// R rows of cb from row s on.
template <int W, int R>
MATEXPORT_INLINE void products(const float *b, Size ldb, const float *ct, Size N, Size s, Size len, float *cb) {
  constexpr int NV = 2;
  for (Size t = s / (W * NV) * (W * NV); t < len; t += W * NV) {
    Floats<W> tile[R][NV];
    MATEXPORT_UNROLL
    for (int r = 0; r < R; ++r) {
      MATEXPORT_UNROLL
      for (int j = 0; j < NV; ++j) tile[r][j] = Floats<W>{};
    }
    multiply<W, R, NV>(tile, b + s * ldb, ldb, 1, ct + t, kChunk, N);
    MATEXPORT_UNROLL
    for (int r = 0; r < R; ++r) {
      MATEXPORT_UNROLL
      for (int j = 0; j < NV; ++j) store<W>(cb + (s + r) * kChunk + t + j * W, tile[r][j]);
    }
  }
}

// dt of the heads [h0, h1) of one chunk, written as [head][step] with zeros at steps that do not count.
template <int W>
MATEXPORT_INLINE void step_sizes(const ScanProblem &p, Size b, Size t0, Size len, Size h0, Size h1, float *dt) {
  const Size ld = p.panel * kChunk;
  for (Size t = 0; t < kChunk; ++t) {
    const Size row = b * p.length + t0 + t;
    if (t >= len || (p.mask && !p.mask[row])) {
      for (Size h = h0; h < h1; ++h) dt[h * ld + t] = 0.f;
      continue;
    }
    for (Size h = h0; h < h1; h += W) {
      const Size count = smaller(W, h1 - h);
      Floats<W> v = softplus<W>(load<W>(p.dt_raw + row * p.heads + h, count) + load<W>(p.dt_bias + h, count));
      v = v < p.dt_min ? splat<W>(p.dt_min) : v;
      v = v > p.dt_max ? splat<W>(p.dt_max) : v;
      float out[W];
      store<W>(out, v);
      for (Size i = 0; i < count; ++i) dt[(h + i) * ld + t] = out[i];
    }
  }
}

void scan_prepare(void *problem, size_t part) {
  const ScanProblem &p = *static_cast<const ScanProblem *>(problem);
  constexpr int W = MATEXPORT_LANES;
  const Size c = Size(part) % p.chunks, bg = Size(part) / p.chunks, b = bg / p.groups, g = bg % p.groups;
  const Size t0 = (p.first + c) * kChunk, len = smaller(kChunk, p.length - t0), ld = p.groups * p.N, N = p.N;
  const Size in = (b * p.length + t0) * ld + g * N, chunk = bg * p.panel + c;
  const bool *mask = p.mask ? p.mask + b * p.length + t0 : nullptr;
  float *ct = p.scratch + p.c_at + chunk * N * kChunk, *cb = p.scratch + p.cb_at + chunk * kChunk * kChunk;
  for (Size t = 0; t < kChunk; ++t) {
    if (t < len && !(mask && !mask[t])) {
      for (Size n = 0; n < N; ++n) ct[n * kChunk + t] = p.C[in + t * ld + n];
    } else {
      for (Size n = 0; n < N; ++n) ct[n * kChunk + t] = 0.f;
    }
  }
  const float *bs = p.B + in;
  Size ldb = ld;
  if (mask) {
    float *copy = p.scratch + p.b_at + chunk * N * kChunk;
    for (Size t = 0; t < len; ++t)
      for (Size n = 0; n < N; ++n) copy[t * N + n] = mask[t] ? p.B[in + t * ld + n] : 0.f;
    bs = copy, ldb = N;
  }
  Size s = 0;
  for (; s + 4 <= len; s += 4) products<W, 4>(bs, ldb, ct, N, s, len, cb);
  for (; s < len; ++s) products<W, 1>(bs, ldb, ct, N, s, len, cb);
  if (p.bf16) {  // C as [pair of n][t], B as [pair of s][n]
    Pair *c2 = reinterpret_cast<Pair *>(p.scratch + p.pairs_at + chunk * N * kChunk), *b2 = c2 + N / 2 * kChunk;
    static const float zeros[W] = {};
    for (Size n = 0; n < N; n += 2)
      for (Size t = 0; t < kChunk; t += W)
        store_pairs<W>(c2 + n / 2 * kChunk + t, load<W>(ct + n * kChunk + t), load<W>(ct + (n + 1) * kChunk + t));
    for (Size i = 0; i < len; i += 2)
      for (Size n = 0; n < N; n += W)
        store_pairs<W>(b2 + i / 2 * N + n, load<W>(bs + i * ldb + n),
                       load<W>(i + 1 < len ? bs + (i + 1) * ldb + n : zeros));
  }
  const Size share = p.heads / p.groups;
  step_sizes<W>(p, b, t0, len, g * share, (g + 1) * share,
                p.scratch + p.dt_at + b * p.heads * p.panel * kChunk + c * kChunk);
}

// ---------------------------------------------------------------------------------------------- scan_heads
// One chunk of a unit of U heads, with elements E in the products.
template <int U, class E>
struct Chunk {
  static constexpr int kHeads = U;
  static constexpr bool kPairs = __is_same(E, Pair);
  static constexpr int kPer = kPairs ? 2 : 1;  // numbers in an element
  const float *x, *z;                          // rows are ldx floats apart
  const E *b, *ct;                             // rows of b are ldb elements apart
  float *y;
  const bool *mask;
  Size ldx, ldb, len, N, width, stride;  // width: columns of the unit
  float whole[U];                          // of each head: decay of the whole chunk
  alignas(64) float start[U][kChunk];      // decay from the start of the chunk to each step
  alignas(64) float end[U][kChunk];        // decay from each step to the end, times dt
  alignas(64) float W[U][kChunk * kChunk];  // [s][t]
  alignas(64) E W2[kPairs ? kChunk / 2 * kChunk : 1];  // [pair of s][t]
};

// Decays and W of head u from dt (zero beyond the chunk's length), A, D and cb.
template <int W, int U, class E>
MATEXPORT_INLINE void weigh(Chunk<U, E> &c, int u, const float *dt, float A, float D, const float *cb) {
  float *start = c.start[u], *end = c.end[u], *weights = c.W[u];
  double sum = 0, sums[kChunk];
  for (int t = 0; t < kChunk; ++t) sums[t] = sum += double(dt[t]) * double(A);
  alignas(64) float step[kChunk + 1];
  for (int t = 0; t < kChunk; ++t) {
    start[t] = float(sums[t]);
    end[t] = float(sum - sums[t]);
    step[t] = dt[t] * A;
  }
  for (int t = 0; t < kChunk; t += W) {
    store<W>(start + t, exponential<W>(load<W>(start + t)));
    store<W>(end + t, exponential<W>(load<W>(end + t)) * load<W>(dt + t));
    store<W>(step + t, exponential<W>(load<W>(step + t)));
  }
  step[kChunk] = 0.f;
  c.whole[u] = start[kChunk - 1];
  // decay[t] from step s to t, made from that of s + 1. Less than 1e-30 is taken off, so that what is too small to
  // matter becomes zero and no multiplication meets a denormal number.
  static const float one[2 * kChunk] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1};
  constexpr int NV = kChunk / W;
  Floats<W> decay[NV];
  MATEXPORT_UNROLL
  for (int j = 0; j < NV; ++j) decay[j] = Floats<W>{};
  for (Size s = c.len - 1; s >= 0; --s) {
    MATEXPORT_UNROLL
    for (int j = 0; j < NV; ++j) {
      const Floats<W> diagonal = load<W>(one + kChunk - s + j * W), d = decay[j] * step[s + 1] - 1e-30f;
      decay[j] = d > diagonal ? d : diagonal;
      const Floats<W> product = load<W>(cb + s * kChunk + j * W) * (decay[j] * dt[s]);  // no cb where t < s
      store<W>(weights + s * kChunk + j * W, (decay[j] > 0.f ? product : Floats<W>{}) + diagonal * D);
    }
  }
  if constexpr (Chunk<U, E>::kPairs) {
    for (Size s = 0; s < c.len; s += 2)
      for (Size t = 0; t < kChunk; t += W)
        store_pairs<W>(c.W2 + s / 2 * kChunk + t, load<W>(weights + s * kChunk + t),
                       s + 1 < c.len ? load<W>(weights + (s + 1) * kChunk + t) : Floats<W>{});
  }
}

// R rows of y from step t on, and R rows of the state from row n on, for NV vectors of columns.
template <int W, int R, int NV, int U, class E>
MATEXPORT_INLINE void rows_of_y(const Chunk<U, E> &c, Size t, Size column, const E *S, Size lds, const E *x) {
  constexpr int per = Chunk<U, E>::kPer;
  Floats<W> tile[R][NV];
  MATEXPORT_UNROLL
  for (int r = 0; r < R; ++r) {
    MATEXPORT_UNROLL
    for (int j = 0; j < NV; ++j) tile[r][j] = Floats<W>{};
  }
  multiply<W, R, NV>(tile, c.ct + t, 1, kChunk, S, lds, c.N / per);
  MATEXPORT_UNROLL
  for (int r = 0; r < R; ++r) {
    MATEXPORT_UNROLL
    for (int j = 0; j < NV; ++j) tile[r][j] *= of_heads<W, NV>(j, c.start, t + r);
  }
  const Size steps = (smaller(t + R, c.len) + per - 1) / per;
  if constexpr (U == 2) multiply_two<W, R, NV>(tile, c.W[0] + t, c.W[1] + t, kChunk, x, NV * W, steps);
  else if constexpr (per == 2) multiply<W, R, NV>(tile, c.W2 + t, 1, kChunk, x, NV * W, steps);
  else multiply<W, R, NV>(tile, c.W[0] + t, 1, kChunk, x, NV * W, steps);
  float *y = c.y + t * c.ldx + column;
  if (t + R <= c.len && column + NV * W <= c.width && !c.z && !c.mask) {
    MATEXPORT_UNROLL
    for (int r = 0; r < R; ++r) {
      MATEXPORT_UNROLL
      for (int j = 0; j < NV; ++j) store<W>(y + r * c.ldx + j * W, tile[r][j]);
    }
    return;
  }
  alignas(64) float part[R * NV * W];
  MATEXPORT_UNROLL
  for (int r = 0; r < R; ++r) {
    MATEXPORT_UNROLL
    for (int j = 0; j < NV; ++j) store<W>(part + (r * NV + j) * W, tile[r][j]);
  }
  for (int r = 0; r < R && t + r < c.len; ++r)
    for (int j = 0; j < NV; ++j) {
      const Size at = r * c.ldx + j * W, count = c.width - column - j * W;
      Floats<W> v = load<W>(part + (r * NV + j) * W);
      if (c.z) v *= silu<W>(load<W>(c.z + t * c.ldx + column + at, count));
      if (c.mask && !c.mask[t + r]) v = Floats<W>{};
      store<W>(y + at, v, count);
    }
}

template <int W, int R, int NV, int U, class E>
MATEXPORT_INLINE void rows_of_state(const Chunk<U, E> &c, Size n, float *S, const E *x) {
  constexpr int per = Chunk<U, E>::kPer;
  Floats<W> tile[R][NV];
  MATEXPORT_UNROLL
  for (int r = 0; r < R; ++r) {
    MATEXPORT_UNROLL
    for (int j = 0; j < NV; ++j) tile[r][j] = load<W>(S + (n + r) * c.stride + j * W) * of_heads<W, NV>(j, c.whole);
  }
  multiply<W, R, NV>(tile, c.b + n, 1, c.ldb, x, NV * W, (c.len + per - 1) / per);
  MATEXPORT_UNROLL
  for (int r = 0; r < R; ++r) {
    MATEXPORT_UNROLL
    for (int j = 0; j < NV; ++j) store<W>(S + (n + r) * c.stride + j * W, tile[r][j]);
  }
}

// Row s of the columns of x: zero where it is masked, or beyond the end.
template <int W, int NV, int U, class E>
MATEXPORT_INLINE void row_of_x(const Chunk<U, E> &c, Size s, Size column, Floats<W> (&row)[NV]) {
  const bool plain = column + NV * W <= c.width, real = s < c.len && !(c.mask && !c.mask[s]);
  const float *from = c.x + s * c.ldx + column;
  MATEXPORT_UNROLL
  for (int j = 0; j < NV; ++j)
    row[j] = !real ? Floats<W>{} : plain ? load<W>(from + j * W) : load<W>(from + j * W, c.width - column - j * W);
}

// NV vectors of columns: y and the state of one chunk.
template <int W, int NV, int U, class E>
__attribute__((noinline)) void columns(const Chunk<U, E> &c, Size column, float *S) {
  constexpr int R = rows_of(NV), ld = NV * W, per = Chunk<U, E>::kPer;
  alignas(64) E x[kChunk / per * ld], ended[kChunk / per * ld];
  Floats<W> row[NV], next[NV];
  if constexpr (per == 2) {
    alignas(64) E S2[kMaxPairedState / 2 * ld];
    for (Size n = 0; n < c.N; n += 2) {
      MATEXPORT_UNROLL
      for (int j = 0; j < NV; ++j)
        store_pairs<W>(S2 + n / 2 * ld + j * W, load<W>(S + n * c.stride + j * W),
                       load<W>(S + (n + 1) * c.stride + j * W));
    }
    for (Size s = 0; s < c.len; s += 2) {
      row_of_x<W, NV>(c, s, column, row);
      row_of_x<W, NV>(c, s + 1, column, next);
      MATEXPORT_UNROLL
      for (int j = 0; j < NV; ++j) {
        store_pairs<W>(x + s / 2 * ld + j * W, row[j], next[j]);
        store_pairs<W>(ended + s / 2 * ld + j * W, row[j] * c.end[0][s], next[j] * c.end[0][s + 1]);
      }
    }
    for (Size t = 0; t < c.len; t += R) rows_of_y<W, R, NV>(c, t, column, S2, ld, x);
  } else {
    for (Size s = 0; s < c.len; ++s) {
      row_of_x<W, NV>(c, s, column, row);
      MATEXPORT_UNROLL
      for (int j = 0; j < NV; ++j) {
        store<W>(x + s * ld + j * W, row[j]);
        store<W>(ended + s * ld + j * W, row[j] * of_heads<W, NV>(j, c.end, s));
      }
    }
    for (Size t = 0; t < c.len; t += R) rows_of_y<W, R, NV>(c, t, column, S, c.stride, x);
  }
  Size n = 0;
  for (; n + R <= c.N; n += R) rows_of_state<W, R, NV>(c, n, S, ended);
  for (; n + 4 <= c.N; n += 4) rows_of_state<W, 4, NV>(c, n, S, ended);
  for (; n < c.N; ++n) rows_of_state<W, 1, NV>(c, n, S, ended);
}

template <int W, int NV = kMaxVectors, int U, class E>
MATEXPORT_INLINE void some_columns(int vectors, const Chunk<U, E> &c, Size column, float *S) {
  if constexpr (NV % U || U == 1)  // two heads share the middle one of an odd number of vectors
    if (vectors == NV) return columns<W, NV>(c, column, S + column);
  if constexpr (NV > 1) some_columns<W, NV - 1>(vectors, c, column, S);
}

template <int W, int U, class E>
MATEXPORT_INLINE void all_columns(const Chunk<U, E> &c, float *S) {
  for (Size left = c.stride / W, column = 0; left > 0;) {
    int vectors = int(left);
    if (left > kMaxVectors) vectors = left == kMaxVectors + 1 ? (kMaxVectors + 1) / 2 : kManyRegisters ? 4 : 3;
    some_columns<W>(vectors, c, column, S);
    left -= vectors, column += vectors * W;
  }
}

// Rows of P floats, `from` apart, to rows `to` apart; with `pad`, the rest of a row becomes zero.
MATEXPORT_INLINE void copy_rows(const float *source, Size from, float *target, Size to, Size rows, Size P, bool pad) {
  for (Size n = 0; n < rows; ++n) {
    for (Size i = 0; i < P; ++i) target[n * to + i] = source ? source[n * from + i] : 0.f;
    for (Size i = P; pad && i < to; ++i) target[n * to + i] = 0.f;
  }
}

template <int U, class E>
MATEXPORT_INLINE void scan_unit(const ScanProblem &p, size_t part) {
  const Size units = p.heads / U, b = Size(part) / units, h = Size(part) % units * U, N = p.N, first = b * p.heads + h;
  const Size g = h / (p.heads / p.groups), all = (p.length + kChunk - 1) / kChunk, ld = p.groups * N;
  const Size bg = b * p.groups + g;
  float *S = p.own_state ? p.scratch + p.state_at + Size(part) * N * p.stride : p.final_state + first * N * p.P;
  for (int u = 0; u < U && p.first == 0; ++u)
    copy_rows(p.state ? p.state + (first + u) * N * p.P : nullptr, p.P, S + u * p.P, p.stride, N, p.P, U == 1);
  Chunk<U, E> c;
  c.ldx = p.heads * p.P, c.N = N, c.width = U * p.P, c.stride = p.stride, c.ldb = p.mask || p.bf16 ? N : ld;
  for (Size i = 0; i < p.chunks; ++i) {
    const Size t0 = (p.first + i) * kChunk, row = b * p.length + t0, in = row * c.ldx + h * p.P;
    const Size chunk = bg * p.panel + i;
    c.len = smaller(kChunk, p.length - t0);
    c.x = p.x + in, c.y = p.y + in, c.z = p.z ? p.z + in : nullptr;
    c.mask = p.mask ? p.mask + row : nullptr;
    if constexpr (Chunk<U, E>::kPairs) {
      c.ct = reinterpret_cast<const Pair *>(p.scratch + p.pairs_at + chunk * N * kChunk);
      c.b = c.ct + N / 2 * kChunk;
    } else {
      c.ct = p.scratch + p.c_at + chunk * N * kChunk;
      c.b = p.mask ? p.scratch + p.b_at + chunk * N * kChunk : p.B + row * ld + g * N;
    }
    for (int u = 0; u < U; ++u) {
      const float *dt = p.scratch + p.dt_at + ((first + u) * p.panel + i) * kChunk;
      weigh<MATEXPORT_LANES>(c, u, dt, p.A[h + u], p.D[h + u], p.scratch + p.cb_at + chunk * kChunk * kChunk);
    }
    switch (U == 2 ? MATEXPORT_LANES : lanes_for(p.P)) {
#if MATEXPORT_LANES >= 16
      case 16: all_columns<16>(c, S); break;
#endif
#if MATEXPORT_LANES >= 8
      case 8:
        if constexpr (U == 1 || MATEXPORT_LANES == 8) all_columns<8>(c, S);
        break;
#endif
      default:
        if constexpr (U == 1 || MATEXPORT_LANES == 4) all_columns<4>(c, S);
    }
  }
  if (!p.own_state || !p.final_state || p.first + p.chunks != all) return;
  for (int u = 0; u < U; ++u)
    copy_rows(S + u * p.P, p.stride, p.final_state + (first + u) * N * p.P, p.P, N, p.P, false);
}

void scan_heads(void *problem, size_t part) {
  const ScanProblem &p = *static_cast<const ScanProblem *>(problem);
#if MATEXPORT_BF16
  if (p.bf16) return scan_unit<1, Pair>(p, part);
#endif
  if (p.unit == 2) return scan_unit<2, float>(p, part);
  scan_unit<1, float>(p, part);
}
