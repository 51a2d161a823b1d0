// Instructions that stay in the order in which they are written. Compilers gather products, expansions and
// additions by kind, and each kind then waits for the one before it.
// Included by the translation units of the AVX-512 levels, which only GCC and clang compile.
#pragma once

#include <immintrin.h>

#include <type_traits>
#include <utility>

#include "half.h"
#include "simd.h"

#define MUSTAFAR_INLINE inline __attribute__((always_inline))
#define MUSTAFAR_INLINE_LAMBDA __attribute__((always_inline))

namespace mustafar::cpu {
namespace {

// Calls body(std::integral_constant<int, i>) for i = 0 .. N - 1: what it indexes stays in registers.
template <class Body, int... I>
MUSTAFAR_INLINE void unroll(const Body& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}
template <int N, class Body>
MUSTAFAR_INLINE void unroll(const Body& body) {
  unroll(body, std::make_integer_sequence<int, N>{});
}

// Calls product(i) for i = 0 .. N - 1, and after each its share of task(0) .. task(M - 1).
template <int N, int M, class Product, class Task>
MUSTAFAR_INLINE void among(const Product& product, const Task& task) {
  unroll<N>([&](auto i) MUSTAFAR_INLINE_LAMBDA {
    product(i);
    constexpr int first = i * M / N, last = (i + 1) * M / N;
    unroll<last - first>([&](auto j)
                             MUSTAFAR_INLINE_LAMBDA { task(std::integral_constant<int, first + j>{}); });
  });
}

namespace ordered {

// A sanitizer does not see what instructions written by hand read, so it is read before them.
#if defined(__SANITIZE_ADDRESS__)
inline void will_read(const void* p) {
  volatile __m512i x = _mm512_loadu_si512(p);
  (void)x;
}
#else
MUSTAFAR_INLINE void will_read(const void*) {}
#endif

MUSTAFAR_INLINE __m512 load(const float* p) {
  will_read(p);
  __m512 x;
  asm volatile("vmovups %1, %0" : "=v"(x) : "m"(*reinterpret_cast<const __m512*>(p)));
  return x;
}
MUSTAFAR_INLINE __m512i load(const BFloat* p) {
  will_read(p);
  __m512i x;
  asm volatile("vmovdqu64 %1, %0" : "=v"(x) : "m"(*reinterpret_cast<const __m512i*>(p)));
  return x;
}

// Masked lanes take the next elements, the others are zero. 64 bytes are read.
MUSTAFAR_INLINE __m512i expand_words(const void* p, uint32_t mask) {
  will_read(p);
  __m512i x;
  asm volatile("vpexpandw %1, %0%{%2%}%{z%}"
               : "=v"(x)
               : "m"(*static_cast<const __m512i*>(p)), "Yk"(static_cast<__mmask32>(mask)));
  return x;
}
MUSTAFAR_INLINE __m512 expand_floats(const float* p, uint32_t mask) {
  will_read(p);
  __m512 x;
  asm volatile("vexpandps %1, %0%{%2%}%{z%}"
               : "=v"(x)
               : "m"(*reinterpret_cast<const __m512*>(p)), "Yk"(static_cast<__mmask16>(mask)));
  return x;
}

MUSTAFAR_INLINE __m256i high_half(__m512i x) {
  __m256i high;
  asm volatile("vextracti64x4 $1, %1, %0" : "=v"(high) : "v"(x));
  return high;
}
MUSTAFAR_INLINE __m512 to_float(__m256i x, Half) {
  __m512 y;
  asm volatile("vcvtph2ps %1, %0" : "=v"(y) : "v"(x));
  return y;
}
MUSTAFAR_INLINE __m512 to_float(__m256i x, BFloat) {
  __m512i y;
  asm volatile("vpmovzxwd %1, %0\n\tvpslld $16, %0, %0" : "=v"(y) : "v"(x));
  return _mm512_castsi512_ps(y);
}

// sum += a * b
MUSTAFAR_INLINE void fma(__m512 a, __m512 b, __m512* sum) {
  __m512 total = *sum;
  asm volatile("vfmadd231ps %2, %1, %0" : "+v"(total) : "v"(a), "v"(b));
  *sum = total;
}
// Block i of four lanes: a0 + a2, b0 + b2, a1 + a3, b1 + b3 of blocks i.
MUSTAFAR_INLINE __m512 add_interleaved_ps(__m512 a, __m512 b) {
  __m512 low, high;
  asm volatile("vunpcklps %2, %1, %0" : "=v"(low) : "v"(a), "v"(b));
  asm volatile("vunpckhps %2, %1, %0" : "=v"(high) : "v"(a), "v"(b));
  asm volatile("vaddps %1, %0, %0" : "+v"(low) : "v"(high));
  return low;
}
// Block i: a0 + a2, a1 + a3, b0 + b2, b1 + b3.
MUSTAFAR_INLINE __m512 add_interleaved_pd(__m512 a, __m512 b) {
  __m512 low, high;
  asm volatile("vunpcklpd %2, %1, %0" : "=v"(low) : "v"(a), "v"(b));
  asm volatile("vunpckhpd %2, %1, %0" : "=v"(high) : "v"(a), "v"(b));
  asm volatile("vaddps %1, %0, %0" : "+v"(low) : "v"(high));
  return low;
}

}  // namespace ordered
}  // namespace
}  // namespace mustafar::cpu
