// Products of small matrices for the scan, in float32 or of pairs in bfloat16 (native/kernels.cc includes this).

// tile[r][j] += sum over k < K of a[k * ak + r * ar] * (vector j of row k of b)
template <int W, int R, int NV>
MATEXPORT_INLINE void multiply(Floats<W> (&tile)[R][NV], const float *a, Size ar, Size ak, const float *b, Size ldb,
                               Size K) {
  for (Size k = 0; k < K; ++k, a += ak, b += ldb) {
    Floats<W> row[NV];
    MATEXPORT_UNROLL
    for (int j = 0; j < NV; ++j) row[j] = load<W>(b + j * W);
    MATEXPORT_UNROLL
    for (int r = 0; r < R; ++r) {
      const Floats<W> factor = splat<W>(a[r * ar]);
      MATEXPORT_UNROLL
      for (int j = 0; j < NV; ++j) tile[r][j] += factor * row[j];
    }
  }
}

// What multiplies vector j of NV: the value of the one head, or of the head of each lane where two share an odd NV.
template <int W, int NV>
MATEXPORT_INLINE Floats<W> of_heads(int, const float (&values)[1]) {
  return splat<W>(values[0]);
}
template <int W, int NV>
MATEXPORT_INLINE Floats<W> of_heads(int j, const float (&values)[2]) {
  return j < NV / 2 ? splat<W>(values[0]) : j > NV / 2 ? splat<W>(values[1]) : halves<W>(values[0], values[1]);
}
template <int W, int NV, int U>
MATEXPORT_INLINE Floats<W> of_heads(int j, const float (&values)[U][kChunk], Size t) {
  float at[U];
  for (int u = 0; u < U; ++u) at[u] = values[u][t];
  return of_heads<W, NV>(j, at);
}

// As above, for the columns of two heads with factors of their own.
template <int W, int R, int NV>
MATEXPORT_INLINE void multiply_two(Floats<W> (&tile)[R][NV], const float *a, const float *a2, Size ak, const float *b,
                                   Size ldb, Size K) {
  for (Size k = 0; k < K; ++k, a += ak, a2 += ak, b += ldb) {
    MATEXPORT_UNROLL
    for (int r = 0; r < R; ++r) {
      const float factors[2] = {a[r], a2[r]};
      MATEXPORT_UNROLL
      for (int j = 0; j < NV; ++j) tile[r][j] += of_heads<W, NV>(j, factors) * load<W>(b + j * W);
    }
  }
}

// Two numbers in bfloat16, the first one in the lower half.
struct Pair {
  unsigned bits;
};

// Rounds half up.
template <int W>
MATEXPORT_INLINE void store_pairs(Pair *to, Floats<W> first, Floats<W> second) {
  using I = typename Lanes<W>::I;
  const I pairs = (((I)first + 0x8000u) >> 16) | (((I)second + 0x8000u) & 0xffff0000u);
  __builtin_memcpy(to, &pairs, sizeof pairs);
}

#if MATEXPORT_BF16
// sum += both products of each pair of `row` with `factor`. In assembly: compilers disagree on the intrinsic's types.
MATEXPORT_INLINE void dot(Floats<16> &sum, Floats<16> row, const Pair &factor) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(row), "m"(factor));
}
MATEXPORT_INLINE void dot(Floats<8> &sum, Floats<8> row, const Pair &factor) {
  asm("vdpbf16ps %2%{1to8%}, %1, %0" : "+v"(sum) : "v"(row), "m"(factor));
}
MATEXPORT_INLINE void dot(Floats<4> &sum, Floats<4> row, const Pair &factor) {
  asm("vdpbf16ps %2%{1to4%}, %1, %0" : "+v"(sum) : "v"(row), "m"(factor));
}

// As above, for K pairs.
template <int W, int R, int NV>
MATEXPORT_INLINE void multiply(Floats<W> (&tile)[R][NV], const Pair *a, Size ar, Size ak, const Pair *b, Size ldb,
                               Size K) {
  for (Size k = 0; k < K; ++k, a += ak, b += ldb) {
    Floats<W> row[NV];
    MATEXPORT_UNROLL
    for (int j = 0; j < NV; ++j) __builtin_memcpy(&row[j], b + j * W, sizeof row[j]);
    MATEXPORT_UNROLL
    for (int r = 0; r < R; ++r) {
      MATEXPORT_UNROLL
      for (int j = 0; j < NV; ++j) dot(tile[r][j], row[j], a[r * ar]);
    }
  }
}
#endif
