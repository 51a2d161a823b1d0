// The inner loops with AVX2, FMA and F16C. Groups of 8 channels are expanded and compressed by table.
#include "simd.h"

#if MUSTAFAR_X86
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

// What is included above keeps the default target: the linker may pick its copies for use on any machine.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,popcnt")
#endif

#include "table.h"

namespace mustafar::cpu {
namespace {

// Where each of 8 places gets its element from, for every mask of 8 bits; kNone where it gets zero.
constexpr uint8_t kNone = 0x80;
struct Sources {
  // As channels (for permutevar8x32) and as bytes of 16-bit elements (for pshufb).
  alignas(32) uint8_t expand32[256][8], compress32[256][8];
  alignas(32) uint8_t expand16[256][16], compress16[256][16];
};

constexpr Sources make_sources() {
  Sources sources{};
  for (int mask = 0; mask < 256; ++mask) {
    int used = 0;
    for (int c = 0; c < 8; ++c) sources.compress32[mask][c] = sources.expand32[mask][c] = kNone;
    for (int c = 0; c < 8; ++c) {
      if ((mask >> c & 1) == 0) continue;
      sources.expand32[mask][c] = static_cast<uint8_t>(used);
      sources.compress32[mask][used++] = static_cast<uint8_t>(c);
    }
    for (int i = 0; i < 16; ++i) {
      const int e = sources.expand32[mask][i / 2], c = sources.compress32[mask][i / 2];
      sources.expand16[mask][i] = static_cast<uint8_t>(e == kNone ? kNone : 2 * e + i % 2);
      sources.compress16[mask][i] = static_cast<uint8_t>(c == kNone ? kNone : 2 * c + i % 2);
    }
  }
  return sources;
}
constexpr Sources kSources = make_sources();

struct Avx2 {
  static constexpr int kLanes = 8;
  using Vec = __m256;

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec set1(float x) { return _mm256_set1_ps(x); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static Vec load(const Half* p) { return _mm256_cvtph_ps(load128(p)); }
  static Vec load(const BFloat* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16));
  }
  static void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  // In two steps, for 2^-150 is no float.
  static Vec exp2_scale(Vec p, Vec t) {
    const __m256i n = _mm256_sub_epi32(_mm256_castps_si256(t), _mm256_set1_epi32(0x4b400000));
    const __m256i half = _mm256_srai_epi32(n, 1);
    return _mm256_mul_ps(_mm256_mul_ps(p, power_of_2(half)), power_of_2(_mm256_sub_epi32(n, half)));
  }

  // Sums of 8 vectors in one, by adding halves while interleaving.
  template <int R, int G>
  static void store_sums(const Vec* acc, float* scores, int64_t ld) {
    Vec quads[2];  // lane 4 i + j of quads[v]: half i of sum 4 v + j
    for (int v = 0; v < 2; ++v) {
      quads[v] = _mm256_hadd_ps(_mm256_hadd_ps(acc[4 * v], acc[4 * v + 1]),
                                _mm256_hadd_ps(acc[4 * v + 2], acc[4 * v + 3]));
    }
    const Vec sums = _mm256_add_ps(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
                                   _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
    alignas(32) float out[kLanes];
    _mm256_store_ps(out, sums);
    for (int g = 0; g < G; ++g) std::memcpy(scores + g * ld, out + g * R, R * sizeof(float));
  }

  template <class T>
  static void expand(const T* src, uint32_t mask, T* dst) {
    for (int c = 0; c < kGroup; c += 8, mask >>= 8) {
      expand8(src, mask & 0xff, dst + c);
      src += popcount(mask & 0xff);
    }
  }
  template <class T>
  static void compress(const T* src, uint32_t mask, T* dst) {
    for (int c = 0; c < kGroup; c += 8, mask >>= 8) {
      compress8(src + c, mask & 0xff, dst);
      dst += popcount(mask & 0xff);
    }
  }

  template <class T>
  static void make_keys(const T* src, uint16_t* keys) {
    for (int i = 0; i < kGroup; i += 16) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i));
      const __m256i magnitude = _mm256_and_si256(x, _mm256_set1_epi16(Keys<T>::kMagnitude));
      _mm256_store_si256(reinterpret_cast<__m256i*>(keys + i),
                         _mm256_min_epi16(magnitude, _mm256_set1_epi16(Keys<T>::kNan)));
    }
  }
  static void make_keys(const float* src, uint32_t* keys) {
    for (int i = 0; i < kGroup; i += 8) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i));
      const __m256i magnitude = _mm256_and_si256(x, _mm256_set1_epi32(Keys<float>::kMagnitude));
      _mm256_store_si256(reinterpret_cast<__m256i*>(keys + i),
                         _mm256_min_epi32(magnitude, _mm256_set1_epi32(Keys<float>::kNan)));
    }
  }
  // Keys and bounds are below the sign bit: signed comparisons do.
  static uint32_t at_least(const uint16_t* keys, uint16_t bound) {
    const __m256i below = _mm256_set1_epi16(static_cast<int16_t>(bound - 1));
    const __m256i* x = reinterpret_cast<const __m256i*>(keys);
    const __m256i low = _mm256_cmpgt_epi16(_mm256_load_si256(x), below);
    const __m256i high = _mm256_cmpgt_epi16(_mm256_load_si256(x + 1), below);
    // The pack works within 128 bits: put its quarters in order.
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xd8);
    return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
  }
  static uint32_t at_least(const uint32_t* keys, uint32_t bound) {
    const __m256i below = _mm256_set1_epi32(static_cast<int32_t>(bound) - 1);
    uint32_t mask = 0;
    for (int i = 0; i < kGroup; i += 8) {
      const __m256i x = _mm256_load_si256(reinterpret_cast<const __m256i*>(keys + i));
      const __m256 reached = _mm256_castsi256_ps(_mm256_cmpgt_epi32(x, below));
      mask |= static_cast<uint32_t>(_mm256_movemask_ps(reached)) << i;
    }
    return mask;
  }

  template <class Key>
  static int count_at_least(const Key* keys, Key bound) {
    return popcount(at_least(keys, bound));
  }

  static void from_float(const float* src, float* dst) { std::memcpy(dst, src, kGroup * sizeof(float)); }
  static void from_float(const float* src, Half* dst) {
    for (int i = 0; i < kGroup; i += 8) {
      const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i), halves);
    }
  }
  static void from_float(const float* src, BFloat* dst) {
    for (int i = 0; i < kGroup; ++i) cpu::from_float(src[i], dst + i);
  }

 private:
  static Vec power_of_2(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }

  static __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  template <class T>
  static void expand8(const T* src, uint32_t mask, T* dst) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst),
                     _mm_shuffle_epi8(load128(src), load128(kSources.expand16[mask])));
  }
  static void expand8(const float* src, uint32_t mask, float* dst) {
    permute8(src, kSources.expand32[mask], dst);
  }

  template <class T>
  static void compress8(const T* src, uint32_t mask, T* dst) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst),
                     _mm_shuffle_epi8(load128(src), load128(kSources.compress16[mask])));
  }
  static void compress8(const float* src, uint32_t mask, float* dst) {
    permute8(src, kSources.compress32[mask], dst);
  }
  static void permute8(const float* src, const uint8_t (&sources)[8], float* dst) {
    // kNone becomes a negative index, whose sign then clears the lane.
    const __m256i index = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(sources)));
    const __m256 taken = _mm256_permutevar8x32_ps(_mm256_loadu_ps(src), index);
    const __m256 none = _mm256_castsi256_ps(_mm256_srai_epi32(index, 31));
    _mm256_storeu_ps(dst, _mm256_andnot_ps(none, taken));
  }
};

}  // namespace

constexpr Kernels kAvx2Kernels = make_kernels<Avx2>("avx2");

}  // namespace mustafar::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // MUSTAFAR_X86
