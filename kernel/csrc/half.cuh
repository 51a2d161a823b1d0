// The two half-precision types the kernels work on, and the few instructions they need from PTX.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mustafar::cuda {

// Half<T>: T is __half or __nv_bfloat16. A `pair` is two values in 32 bits, the first in the low half.
template <class T>
struct Half;

template <>
struct Half<__half> {
  static __device__ __forceinline__ float low(uint32_t pair) { return __low2float(as_pair(pair)); }
  static __device__ __forceinline__ float high(uint32_t pair) { return __high2float(as_pair(pair)); }
  static __device__ __forceinline__ __half round(float x) { return __float2half_rn(x); }
  static __device__ __forceinline__ uint32_t pack(float first, float second) {
    const __half2 pair = __floats2half2_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  // d += a b on a tensor core: a is 16 x 16 (rows x k), b is 16 x 8 (k x columns), float32 sums.
  static __device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }

 private:
  static __device__ __forceinline__ __half2 as_pair(uint32_t pair) {
    return reinterpret_cast<const __half2&>(pair);
  }
};

template <>
struct Half<__nv_bfloat16> {
  static __device__ __forceinline__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
  static __device__ __forceinline__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
  static __device__ __forceinline__ __nv_bfloat16 round(float x) { return __float2bfloat16_rn(x); }
  static __device__ __forceinline__ uint32_t pack(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};

// Place of the highest set bit, 31 for the top one (one instruction, unlike 31 - __clz).
__device__ __forceinline__ uint32_t highest_one(uint32_t bits) {
  uint32_t place;
  asm("bfind.u32 %0, %1;" : "=r"(place) : "r"(bits));
  return place;
}

// All ones in a register: the compiler cannot tell, where a constant would be loaded anew for every use.
__device__ __forceinline__ uint32_t opaque_ones() {
  uint32_t below, rest;
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(below));
  asm("mov.u32 %0, %%lanemask_ge;" : "=r"(rest));
  return below | rest;
}

// 2^x: NaN stays NaN, -inf gives 0. Relative error 2^-22, far below half precision.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace mustafar::cuda
