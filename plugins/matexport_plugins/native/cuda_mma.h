// Products of small matrices on tensor cores: D (16, 8) += A (16, 16) B (16, 8), summed in float32, by one warp.
//
// Lane 4 g + t holds of A the pairs (row g, k 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..), of B the pairs
// (k 2t.., column g), (2t + 8.., g), and of D (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). That is what PTX's
// m16n8k16 has; for TF32, where one instruction is 8 deep, k is renumbered within a product so that it is the same.
// Hence D of two neighbouring products is A of the next one.
#pragma once

#include "cuda_types.h"

namespace matexport::cuda {

#ifndef __CUDACC__
// What one instruction computes, for a whole warp: A and B as float32.
struct MmaIn {
  uint32_t a[4], b[2];
};
struct MmaOut {
  float d[4];
};
template <int kDepth, class Decode>
inline void emulate(float *d, const MmaIn &mine, Decode decode) {
  const MmaOut sum = shim::collective<MmaOut>(mine, [=](const MmaIn *in, MmaOut *out) {
    float A[16][kDepth], B[kDepth][8];
    for (int lane = 0; lane < 32; ++lane) decode(in[lane], lane / 4, lane % 4, A, B);
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float s = 0;
        for (int k = 0; k < kDepth; ++k) s += A[row][k] * B[k][column];
        out[lane].d[i] = s;
      }
  });
  for (int i = 0; i < 4; ++i) d[i] += sum.d[i];
}
#endif

// bfloat16, one instruction.
struct MmaBf16 {
  using Operand = Bf16;
  using Pair = uint32_t;

  static __device__ __forceinline__ Pair load(const Bf16 *p) { return *reinterpret_cast<const uint32_t *>(p); }
  static __device__ __forceinline__ Pair join(Bf16 low, Bf16 high) { return low.bits | uint32_t(high.bits) << 16; }
  static __device__ __forceinline__ Pair make(float low, float high) {
#ifdef __CUDACC__
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
#else
    return join(nearest<Bf16>(low), nearest<Bf16>(high));
#endif
  }
  static __device__ __forceinline__ void mma(float *d, const Pair *a, const Pair *b) {
#ifdef __CUDACC__
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulate<16>(d, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, [](const MmaIn &in, int g, int t, auto &A, auto &B) {
      for (int e = 0; e < 2; ++e) {
        for (int i = 0; i < 4; ++i)
          A[g + i % 2 * 8][2 * t + i / 2 * 8 + e] = value(Bf16{uint16_t(in.a[i] >> 16 * e)});
        for (int i = 0; i < 2; ++i) B[2 * t + i * 8 + e][g] = value(Bf16{uint16_t(in.b[i] >> 16 * e)});
      }
    });
#endif
  }
};

// TF32 (10 bits of mantissa, the range of float32). With kPasses 1 operands are rounded to it: enough for float16. With
// 3 every operand is a sum of two such numbers, and only the product of the two small parts is left out: about float32.
template <int kPasses>
struct MmaTf32 {
  using Operand = float;
  struct Pair {
    float low, high;
  };

  static __device__ __forceinline__ Pair load(const float *p) {
#ifdef __CUDACC__
    const float2 v = *reinterpret_cast<const float2 *>(p);
    return {v.x, v.y};
#else
    return {p[0], p[1]};
#endif
  }
  static __device__ __forceinline__ Pair join(float low, float high) { return {low, high}; }
  static __device__ __forceinline__ Pair make(float low, float high) { return {low, high}; }

  static __device__ __forceinline__ void mma(float *d, const Pair *a, const Pair *b) {
    CUDA_UNROLL for (int half = 0; half < 2; ++half) {
      const Pair *x = a + 2 * half;
      const float A[4] = {x[0].low, x[1].low, x[0].high, x[1].high}, B[2] = {b[half].low, b[half].high};
      uint32_t big_a[4], big_b[2];
      CUDA_UNROLL for (int i = 0; i < 4; ++i) big_a[i] = tf32(A[i]);
      CUDA_UNROLL for (int i = 0; i < 2; ++i) big_b[i] = tf32(B[i]);
      if (kPasses == 3) {
        uint32_t small_a[4], small_b[2];
        CUDA_UNROLL for (int i = 0; i < 4; ++i) small_a[i] = tf32(A[i] - bits_to_float(big_a[i]));
        CUDA_UNROLL for (int i = 0; i < 2; ++i) small_b[i] = tf32(B[i] - bits_to_float(big_b[i]));
        mma8(d, small_a, big_b);
        mma8(d, big_a, small_b);
      }
      mma8(d, big_a, big_b);
    }
  }

 private:
  static __device__ __forceinline__ uint32_t tf32(float v) {
#ifdef __CUDACC__
    uint32_t r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
    return r;
#else
    return (float_to_bits(v) + 0x1000) & ~0x1fffu;
#endif
  }
  static __device__ __forceinline__ void mma8(float *d, const uint32_t *a, const uint32_t *b) {
#ifdef __CUDACC__
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulate<8>(d, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, [](const MmaIn &in, int g, int t, auto &A, auto &B) {
      for (int i = 0; i < 4; ++i) A[g + i % 2 * 8][t + i / 2 * 4] = bits_to_float(in.a[i]);
      for (int i = 0; i < 2; ++i) B[t + i * 4][g] = bits_to_float(in.b[i]);
    });
#endif
  }
};

}  // namespace matexport::cuda
