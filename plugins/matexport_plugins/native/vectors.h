// Vectors of 4, 8 and 16 floats in the compiler's own vector types, and the functions of them that the ops need.
//
// Included by kernels.cc only, inside a namespace of its instruction set. Nothing here may come from a C++ standard
// header: an inline function that several translation units share could be linked in its AVX-512 form for all of them.
#pragma once

#define MATEXPORT_INLINE static inline __attribute__((always_inline))

// Before every loop over an array of vectors: only if it is unrolled do they stay in registers.
#if defined(__clang__)
#define MATEXPORT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define MATEXPORT_UNROLL _Pragma("GCC unroll 16")
#endif

typedef __INT64_TYPE__ Size;

template <int W>
struct Lanes;
template <>
struct Lanes<4> {
  typedef float F __attribute__((vector_size(16)));
  typedef unsigned I __attribute__((vector_size(16)));
};
template <>
struct Lanes<8> {
  typedef float F __attribute__((vector_size(32)));
  typedef unsigned I __attribute__((vector_size(32)));
};
template <>
struct Lanes<16> {
  typedef float F __attribute__((vector_size(64)));
  typedef unsigned I __attribute__((vector_size(64)));
};
template <int W>
using Floats = typename Lanes<W>::F;

MATEXPORT_INLINE Size smaller(Size a, Size b) { return a < b ? a : b; }

template <int W>
MATEXPORT_INLINE Floats<W> splat(float x) {
  return x - Floats<W>{};  // minus zero: the compiler may drop it, also for x = -0
}
// The first half of the lanes a, the second half b.
template <int W>
MATEXPORT_INLINE Floats<W> halves(float a, float b) {
  typename Lanes<W>::I second;
  for (int i = 0; i < W; ++i) second[i] = i < W / 2 ? 0u : ~0u;
  return second ? splat<W>(b) : splat<W>(a);
}
template <int W>
MATEXPORT_INLINE Floats<W> load(const float *p) {
  Floats<W> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <int W>
MATEXPORT_INLINE void store(float *p, Floats<W> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
// The first `count` lanes only (the others are zero).
template <int W>
MATEXPORT_INLINE Floats<W> load(const float *p, Size count) {
  if (count >= W) return load<W>(p);
  float part[W] = {};
  for (Size i = 0; i < count; ++i) part[i] = p[i];
  return load<W>(part);
}
template <int W>
MATEXPORT_INLINE void store(float *p, Floats<W> v, Size count) {
  if (count >= W) return store<W>(p, v);
  float part[W];
  store<W>(part, v);
  for (Size i = 0; i < count; ++i) p[i] = part[i];
}

// exp to about 1e-7 relative: x = n ln 2 + r, a polynomial in r, times 2^n. 0 below -87.3; NaN stays NaN.
template <int W>
MATEXPORT_INLINE Floats<W> exponential(Floats<W> x) {
  using I = typename Lanes<W>::I;
  x = x > 88.f ? splat<W>(88.f) : x;
  const Floats<W> shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: rounds to an integer in the low bits
  const Floats<W> n = shifted - 12582912.f;
  Floats<W> r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Floats<W> p = splat<W>(1.f / 5040);
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const I power = (((I)shifted) << 23) + 0x3f800000u;
  return x < -87.3f ? Floats<W>{} : p * (Floats<W>)power;
}

// log(1 + exp(x)) = max(x, 0) + 2 artanh(u / (2 + u)) with u = exp(-|x|), so that the series runs to (1/3)^17.
template <int W>
MATEXPORT_INLINE Floats<W> softplus(Floats<W> x) {
  const Floats<W> u = exponential<W>(x > 0.f ? -x : x);
  const Floats<W> q = u / (u + 2.f), w = q * q;
  Floats<W> p = splat<W>(1.f / 17);
  p = p * w + 1.f / 15;
  p = p * w + 1.f / 13;
  p = p * w + 1.f / 11;
  p = p * w + 1.f / 9;
  p = p * w + 1.f / 7;
  p = p * w + 1.f / 5;
  p = p * w + 1.f / 3;
  p = p * w + 1.f;
  return (x > 0.f ? x : Floats<W>{}) + 2.f * q * p;
}

template <int W>
MATEXPORT_INLINE Floats<W> silu(Floats<W> x) {
  return x / (exponential<W>(-x) + 1.f);
}
