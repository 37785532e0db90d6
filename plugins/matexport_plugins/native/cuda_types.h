// Element types of tensors, and 16-byte transfers of them. 16-bit types are only stored; arithmetic is float32.
#pragma once

#include "cuda_shim.h"

namespace matexport::cuda {

struct Half {
  uint16_t bits;
};
struct Bf16 {
  uint16_t bits;
};

__device__ __forceinline__ float bits_to_float(uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}
__device__ __forceinline__ uint32_t float_to_bits(float f) {
#ifdef __CUDACC__
  return __float_as_uint(f);
#else
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
#endif
}

__device__ __forceinline__ float value(float v) { return v; }
__device__ __forceinline__ float value(Bf16 v) { return bits_to_float(uint32_t(v.bits) << 16); }
__device__ __forceinline__ float value(Half v) {
#ifdef __CUDACC__
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
#else
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, rest = v.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  const float magnitude = bits_to_float(rest << 13) * 0x1p112f;  // also right for subnormal numbers
  return bits_to_float(sign | float_to_bits(magnitude));
#endif
}

// The nearest number of type T, ties to even.
template <class T>
__device__ __forceinline__ T nearest(float v);
template <>
__device__ __forceinline__ float nearest<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ Bf16 nearest<Bf16>(float v) {
#ifdef __CUDACC__
  uint16_t r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return {r};
#else
  const uint32_t b = float_to_bits(v);
  if ((b & 0x7fffffff) > 0x7f800000) return {uint16_t(b >> 16 | 0x40)};
  return {uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16)};
#endif
}
template <>
__device__ __forceinline__ Half nearest<Half>(float v) {
#ifdef __CUDACC__
  uint16_t r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return {r};
#else
  const uint32_t b = float_to_bits(v), sign = b >> 16 & 0x8000, rest = b & 0x7fffffff;
  if (rest > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and above
  if (rest < 0x38800000)  // subnormal: let the addition round
    return {uint16_t(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - float_to_bits(0.5f)))};
  return {uint16_t(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13)};
#endif
}

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

template <class T>
__host__ __device__ __forceinline__ bool aligned16(const T *p, int64_t row) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && row * int64_t(sizeof(T)) % 16 == 0;
}

// out[0 .. 7] = p[0 .. 7]; zeros from `count` on. `whole`: p is aligned to 16 bytes.
template <class T>
__device__ __forceinline__ void load8(T *out, const T *p, int count, bool whole) {
  if (whole && count >= 8) {
    union {
      Bytes16 bytes[8 * sizeof(T) / 16];
      T values[8];
    } u;
    CUDA_UNROLL for (unsigned i = 0; i < 8 * sizeof(T) / 16; ++i) u.bytes[i] = reinterpret_cast<const Bytes16 *>(p)[i];
    CUDA_UNROLL for (int i = 0; i < 8; ++i) out[i] = u.values[i];
  } else {
    CUDA_UNROLL for (int i = 0; i < 8; ++i) out[i] = i < count ? p[i] : T{};
  }
}

// Two neighbouring elements, in one transfer where `whole`: p is aligned to both. Only the first of them if `count` is 1.
template <class T>
struct alignas(2 * sizeof(T)) Two {
  T v[2];
};
template <class T>
__device__ __forceinline__ Two<T> load2(const T *p, int count, bool whole) {
  if (whole) return *reinterpret_cast<const Two<T> *>(p);
  return {{p[0], count > 1 ? p[1] : T{}}};
}
template <class T>
__device__ __forceinline__ void store2(T *p, Two<T> two, int count, bool whole) {
  if (whole) {
    *reinterpret_cast<Two<T> *>(p) = two;
  } else {
    p[0] = two.v[0];
    if (count > 1) p[1] = two.v[1];
  }
}
template <class T>
__host__ __device__ __forceinline__ bool aligned_pairs(const T *p, int64_t row) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Two<T>) == 0 && row % 2 == 0;
}

__device__ __forceinline__ float softplus(float v) { return v > 20.f ? v : log1pf(expf(v)); }
__device__ __forceinline__ float silu(float v) { return v / (1.f + expf(-v)); }

}  // namespace matexport::cuda
