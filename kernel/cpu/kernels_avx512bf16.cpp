// The AVX-512 level for CPUs that multiply pairs of bfloat16 (vdpbf16ps): twice the products of an fma, and
// nothing to convert. All but the products of bfloat16 is the AVX-512 level's.
//
// The instruction adds in float32 and takes subnormal numbers for zero. Weights of values are rounded to
// bfloat16, as PyTorch's attention does.
#include "simd.h"

#if MUSTAFAR_AVX512BF16
#include <immintrin.h>

#include <algorithm>
#include <cstring>

// What is included above keeps the default target: the linker may pick its copies for use on any machine.
#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((                                                                                \
        target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,avx2,fma,f16c,bmi,bmi2," \
               "popcnt"))),                                                                        \
    apply_to = function)
#else
#pragma GCC push_options
// GCC's own header sets off these in every intrinsic (bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,avx2,fma,f16c,bmi,bmi2,popcnt")
#endif

#include "packed_avx512.h"

namespace mustafar::cpu {
namespace {

MUSTAFAR_INLINE __m512i round_pairs(__m512 low, __m512 high) {
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// Products of pairs of neighbours: 32 channels are one part.
struct PairMath {
  using Element = BFloat;
  using Query = BFloat;
  using Part = __m512i;
  static constexpr int kParts = 1;

  struct Group {
    __m512i pairs;
    MUSTAFAR_INLINE void expand(const BFloat* slots, uint32_t mask) {
      pairs = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(slots));
    }
    MUSTAFAR_INLINE void expand_in_order(const BFloat* slots, uint32_t mask) {
      pairs = ordered::expand_words(slots, mask);
    }
    template <int>
    MUSTAFAR_INLINE Part part_in_order() const {
      return pairs;
    }
  };
  static MUSTAFAR_INLINE Part load(const BFloat* query) { return ordered::load(query); }
  static MUSTAFAR_INLINE void multiply(Part query, Part key, __m512* sum) {
    __m512 total = *sum;
    asm volatile("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(query), "v"(key));
    *sum = total;
  }
};

// sum += the products of a pair of weights and pairs of channels of two rows.
MUSTAFAR_INLINE void add_weighted_pair(const uint32_t* weights, __m512i x, __m512* sum) {
  __m512 total = *sum;
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(total) : "v"(x), "m"(*weights));
  *sum = total;
}

// Interleaving two rows puts channels 0-3, 8-11, 16-19, 24-27 of a group into one vector of sums and the
// others into the next.
MUSTAFAR_INLINE void load_interleaved(const float* acc, __m512* sum) {
  const __m512 low = _mm512_loadu_ps(acc), high = _mm512_loadu_ps(acc + 16);
  sum[0] = _mm512_shuffle_f32x4(low, high, 0x88);
  sum[1] = _mm512_shuffle_f32x4(low, high, 0xdd);
}
MUSTAFAR_INLINE void store_interleaved(const __m512* sum, float* acc) {
  const __m512 low = _mm512_shuffle_f32x4(sum[0], sum[1], 0x44);
  const __m512 high = _mm512_shuffle_f32x4(sum[0], sum[1], 0xee);
  _mm512_storeu_ps(acc, _mm512_shuffle_f32x4(low, low, 0xd8));
  _mm512_storeu_ps(acc + 16, _mm512_shuffle_f32x4(high, high, 0xd8));
}

// weights[g * kSliceTokens / 2 + i]: of rows 2 i and 2 i + 1.
template <int G, int C>
void weigh_pairs(StagedRows<BFloat>& in, int group, const uint32_t* weights, int64_t pitch, float* acc) {
  __m512 sum[G][2 * C];
  for (int g = 0; g < G; ++g) {
    for (int c = 0; c < C; ++c) load_interleaved(acc + g * pitch + c * kGroup, &sum[g][2 * c]);
  }
  const int rows = in.rows();
  RowGroups<BFloat, PairMath::Group, C> next_row(in, group);
  PairMath::Group first[C], second[C];
  const auto expand = [&](int r) MUSTAFAR_INLINE_LAMBDA {
    next_row.expand(first);
    if (r + 1 < rows) {
      next_row.expand(second);
    } else {
      for (auto& none : second) none.pairs = _mm512_setzero_si512();
    }
  };
  expand(0);
  for (int r = 0; r < rows; r += 2) {
    if (r % 4 == 0) in.use_four(r);
    __m512i x[2 * C];
    for (int c = 0; c < C; ++c) {
      x[2 * c] = _mm512_unpacklo_epi16(first[c].pairs, second[c].pairs);
      x[2 * c + 1] = _mm512_unpackhi_epi16(first[c].pairs, second[c].pairs);
    }
    if (r + 2 < rows) expand(r + 2);
    for (int g = 0; g < G; ++g) {
      for (int c = 0; c < 2 * C; ++c) {
        add_weighted_pair(weights + g * (kSliceTokens / 2) + r / 2, x[c], &sum[g][c]);
      }
    }
  }
  for (int g = 0; g < G; ++g) {
    for (int c = 0; c < C; ++c) store_interleaved(&sum[g][2 * c], acc + g * pitch + c * kGroup);
  }
}

// q of bfloat16 comes as float32: nothing is lost in turning it back.
void score(const PackedRows& in, const float* q, int heads, float* scores, int64_t ld) {
  const int64_t pitch = static_cast<int64_t>(in.groups) * kGroup;
  for_tiles<BFloat>(in, [&](StagedRows<BFloat>& rows, int first) {
    for_heads<4>(heads, [&](auto group_size, int g) {
      constexpr int G = decltype(group_size)::value;
      alignas(64) BFloat query[G * kMaxHeadDim];
      for (int64_t i = 0; i < G * pitch; i += kGroup) {
        const float* from = q + g * pitch + i;
        _mm512_store_si512(query + i, round_pairs(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)));
      }
      const auto work = in.groups == 4 ? score_heads<PairMath, G, 4> : score_heads<PairMath, G, 0>;
      work(rows, query, scores + g * ld + first, ld);
    });
  });
}

void weigh(const PackedRows& in, const float* p, int64_t ld, int heads, float* acc) {
  const int64_t pitch = static_cast<int64_t>(in.groups) * kGroup;
  for_tiles<BFloat>(in, [&](StagedRows<BFloat>& rows, int first) {
    for_heads<4>(heads, [&](auto group_size, int g) {
      constexpr int G = decltype(group_size)::value;
      alignas(64) uint32_t weights[G * kSliceTokens / 2];
      for (int i = 0; i < G; ++i) {
        for (int r = 0; r < rows.rows(); r += 32) {
          const float* from = p + (g + i) * ld + first + r;
          const uint32_t there = ~uint32_t{0} >> (32 - std::min(32, rows.rows() - r));
          const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there), from);
          const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> 16), from + 16);
          _mm512_store_si512(weights + (i * kSliceTokens + r) / 2, round_pairs(low, high));
        }
      }
      for_groups<G>(in.groups, [&](auto groups, int group) {
        weigh_pairs<G, decltype(groups)::value>(rows, group, weights, pitch,
                                                acc + g * pitch + group * kGroup);
      });
    });
  });
}

}  // namespace

Kernels avx512bf16_kernels() {
  Kernels kernels = kAvx512Kernels;
  kernels.name = "avx512bf16";
  kernels.score[static_cast<int>(DType::kBFloat16)] = score;
  kernels.weigh[static_cast<int>(DType::kBFloat16)] = weigh;
  return kernels;
}

}  // namespace mustafar::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // MUSTAFAR_AVX512BF16
