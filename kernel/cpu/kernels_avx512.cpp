// The inner loops with AVX-512 (F, BW, VL, DQ and VBMI2, whose vpexpandw expands 32 values in one
// instruction).
#include "simd.h"

#if MUSTAFAR_X86
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

// What is included above keeps the default target: the linker may pick its copies for use on any machine.
#if defined(__clang__)
#pragma clang attribute push(                                                                                \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx2,fma,f16c,bmi,bmi2,popcnt"))), \
    apply_to = function)
#else
#pragma GCC push_options
// GCC's own header sets off these in every intrinsic (bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx2,fma,f16c,bmi,bmi2,popcnt")
#endif

#include "packed_avx512.h"
#include "table.h"

namespace mustafar::cpu {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16;
  using Vec = __m512;

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec set1(float x) { return _mm512_set1_ps(x); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static Vec load(const Half* p) { return _mm512_cvtph_ps(load256(p)); }
  static Vec load(const BFloat* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load256(p)), 16));
  }
  static void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec exp2_scale(Vec p, Vec t) {
    return _mm512_scalef_ps(p, _mm512_sub_ps(t, _mm512_set1_ps(12582912.0f)));
  }

  // Sums of 16 vectors in one, by adding halves while interleaving: 15 additions instead of 64.
  template <int R, int G>
  static void store_sums(const Vec* acc, float* scores, int64_t ld) {
    Vec quads[4];  // lane 4 i + j of quads[v]: part i of sum 4 v + j
    for (int v = 0; v < 4; ++v) {
      const Vec low = add_pairs(acc[4 * v], acc[4 * v + 1]);
      const Vec high = add_pairs(acc[4 * v + 2], acc[4 * v + 3]);
      const __m512d a = _mm512_castps_pd(low), b = _mm512_castps_pd(high);
      quads[v] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                               _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const Vec sums = add_blocks(add_blocks(quads[0], quads[1]), add_blocks(quads[2], quads[3]));
    if constexpr (G == 1) {
      _mm512_storeu_ps(scores, sums);
    } else if constexpr (G == 2) {
      _mm256_storeu_ps(scores, _mm512_castps512_ps256(sums));
      _mm256_storeu_ps(scores + ld, _mm512_extractf32x8_ps(sums, 1));
    } else {
      _mm_storeu_ps(scores, _mm512_castps512_ps128(sums));
      _mm_storeu_ps(scores + ld, _mm512_extractf32x4_ps(sums, 1));
      _mm_storeu_ps(scores + 2 * ld, _mm512_extractf32x4_ps(sums, 2));
      _mm_storeu_ps(scores + 3 * ld, _mm512_extractf32x4_ps(sums, 3));
    }
  }

  // Masked lanes take the next elements. The forms that work on memory are microcoded on some processors.
  template <class T>
  static void expand(const T* src, uint32_t mask, T* dst) {
    _mm512_storeu_si512(dst, _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(src)));
  }
  static void expand(const float* src, uint32_t mask, float* dst) {
    const __mmask16 low = static_cast<__mmask16>(mask), high = static_cast<__mmask16>(mask >> 16);
    _mm512_storeu_ps(dst, _mm512_maskz_expand_ps(low, _mm512_loadu_ps(src)));
    src += popcount(low);
    _mm512_storeu_ps(dst + 16, _mm512_maskz_expand_ps(high, _mm512_loadu_ps(src)));
  }

  template <class T>
  static void compress(const T* src, uint32_t mask, T* dst) {
    _mm512_storeu_si512(dst, _mm512_maskz_compress_epi16(mask, _mm512_loadu_si512(src)));
  }
  static void compress(const float* src, uint32_t mask, float* dst) {
    const __mmask16 low = static_cast<__mmask16>(mask), high = static_cast<__mmask16>(mask >> 16);
    _mm512_storeu_ps(dst, _mm512_maskz_compress_ps(low, _mm512_loadu_ps(src)));
    dst += popcount(low);
    _mm512_storeu_ps(dst, _mm512_maskz_compress_ps(high, _mm512_loadu_ps(src + 16)));
  }

  template <class T>
  static void make_keys(const T* src, uint16_t* keys) {
    const __m512i magnitude =
        _mm512_and_si512(_mm512_loadu_si512(src), _mm512_set1_epi16(Keys<T>::kMagnitude));
    _mm512_store_si512(keys, _mm512_min_epu16(magnitude, _mm512_set1_epi16(Keys<T>::kNan)));
  }
  static void make_keys(const float* src, uint32_t* keys) {
    for (int i = 0; i < kGroup; i += 16) {
      const __m512i magnitude =
          _mm512_and_si512(_mm512_loadu_si512(src + i), _mm512_set1_epi32(Keys<float>::kMagnitude));
      _mm512_store_si512(keys + i, _mm512_min_epu32(magnitude, _mm512_set1_epi32(Keys<float>::kNan)));
    }
  }
  static uint32_t at_least(const uint16_t* keys, uint16_t bound) {
    const __m512i bounds = _mm512_set1_epi16(static_cast<int16_t>(bound));
    return in_general_register<uint32_t>(_mm512_cmpge_epu16_mask(_mm512_load_si512(keys), bounds));
  }
  static uint32_t at_least(const uint32_t* keys, uint32_t bound) {
    const __m512i bounds = _mm512_set1_epi32(static_cast<int32_t>(bound));
    const auto low = _mm512_cmpge_epu32_mask(_mm512_load_si512(keys), bounds);
    const auto high = _mm512_cmpge_epu32_mask(_mm512_load_si512(keys + 16), bounds);
    return in_general_register<uint16_t>(low) | static_cast<uint32_t>(in_general_register<uint16_t>(high))
                                                    << 16;
  }
  template <class Key>
  static int count_at_least(const Key* keys, Key bound) {
    return popcount(at_least(keys, bound));
  }

  static void from_float(const float* src, float* dst) { std::memcpy(dst, src, kGroup * sizeof(float)); }
  static void from_float(const float* src, Half* dst) {
    for (int i = 0; i < kGroup; i += 16) {
      const __m256i halves = _mm512_cvtps_ph(_mm512_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i), halves);
    }
  }
  static void from_float(const float* src, BFloat* dst) {
    for (int i = 0; i < kGroup; ++i) cpu::from_float(src[i], dst + i);
  }

 private:
  static __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  // When GCC 12 spills a mask that is about to be widened, it may store the narrow mask and read the wide one
  // back, with whatever lies above (seen at -O1 with -fsanitize=undefined). Widened from here it cannot.
  template <class Bits>
  static Bits in_general_register(Bits mask) {
    asm("" : "+r"(mask));
    return mask;
  }
  // Lanes 4 i .. 4 i + 3 of the result: a0 + a2, b0 + b2, a1 + a3, b1 + b3 of block i.
  static Vec add_pairs(Vec a, Vec b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  // Blocks of four lanes: a0 + a1, a2 + a3, b0 + b1, b2 + b3.
  static Vec add_blocks(Vec a, Vec b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
};

}  // namespace

constexpr Kernels kAvx512Kernels = make_kernels<Avx512, Avx512Packed>("avx512");

}  // namespace mustafar::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // MUSTAFAR_X86
