// Products with packed rows in AVX-512 registers: groups of 32 channels are expanded and converted in
// registers and used for up to 8 query heads, so that no dense row is ever written.
//
// Included by the translation units of the AVX-512 levels. A group is expanded and converted among the
// products before its own, which then need not wait; README.md counts the instructions.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "half.h"
#include "ordered.h"
#include "rows.h"
#include "simd.h"
#include "staged_rows.h"

namespace mustafar::cpu {
namespace {

MUSTAFAR_INLINE uint32_t mask_of(const void* bitmap, int group) {
  uint32_t mask;
  std::memcpy(&mask, static_cast<const char*>(bitmap) + group * sizeof(mask), sizeof(mask));
  asm("" : "+r"(mask));  // else it is loaded again for each use
  return mask;
}

// Products in float32: 32 channels are two parts of 16.
template <class T>
struct FloatMath {
  using Element = T;
  using Query = float;
  using Part = __m512;
  static constexpr int kParts = 2;

  struct Group {
    __m512i halves;
    MUSTAFAR_INLINE void expand(const T* slots, uint32_t mask) {
      halves = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(slots));
    }
    MUSTAFAR_INLINE void expand_in_order(const T* slots, uint32_t mask) {
      halves = ordered::expand_words(slots, mask);
    }
    MUSTAFAR_INLINE void part(int i, Part* out) const {
      convert(i == 0 ? _mm512_castsi512_si256(halves) : _mm512_extracti64x4_epi64(halves, 1), T{}, out);
    }
    template <int i>
    MUSTAFAR_INLINE Part part_in_order() const {
      return ordered::to_float(i == 0 ? _mm512_castsi512_si256(halves) : ordered::high_half(halves), T{});
    }
  };
  static MUSTAFAR_INLINE void convert(__m256i x, Half, Part* out) { *out = _mm512_cvtph_ps(x); }
  static MUSTAFAR_INLINE void convert(__m256i x, BFloat, Part* out) {
    *out = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  static MUSTAFAR_INLINE Part load(const float* query) { return ordered::load(query); }
  static MUSTAFAR_INLINE void multiply(Part query, Part key, __m512* sum) { ordered::fma(query, key, sum); }
};
template <>
struct FloatMath<float>::Group {
  __m512 parts[2];
  MUSTAFAR_INLINE void expand(const float* slots, uint32_t mask) {
    const auto low = static_cast<__mmask16>(mask), high = static_cast<__mmask16>(mask >> 16);
    parts[0] = _mm512_maskz_expand_ps(low, _mm512_loadu_ps(slots));
    parts[1] = _mm512_maskz_expand_ps(high, _mm512_loadu_ps(slots + popcount(mask & 0xffff)));
  }
  MUSTAFAR_INLINE void expand_in_order(const float* slots, uint32_t mask) {
    parts[0] = ordered::expand_floats(slots, mask & 0xffff);
    parts[1] = ordered::expand_floats(slots + popcount(mask & 0xffff), mask >> 16);
  }
  MUSTAFAR_INLINE void part(int i, Part* out) const { *out = parts[i]; }
  template <int i>
  MUSTAFAR_INLINE Part part_in_order() const {
    return parts[i];
  }
};

// Scores of R rows against G heads from the sums of their products, in pieces that go among the products of
// the rows that follow: at once they would wait for the last products, and the next ones for them.
template <int R, int G>
class LaneSums {
 public:
  static constexpr int N = R * G, kPieces = N;
  static_assert(N == 4 || N == 8 || N == 16);

  MUSTAFAR_INLINE LaneSums() {
    unroll<N>([&](auto i) MUSTAFAR_INLINE_LAMBDA { acc_[i] = _mm512_setzero_ps(); });
  }
  MUSTAFAR_INLINE void take(const __m512* acc) {
    unroll<N>([&](auto i) MUSTAFAR_INLINE_LAMBDA { acc_[i] = acc[i]; });
  }

  // scores[g * ld + r] after the last piece. Halves are added while interleaving.
  template <int i>
  MUSTAFAR_INLINE void piece(float* scores, int64_t ld) {
    if constexpr (i < N / 2) {  // block j of four lanes: parts of a0, b0, a1, b1
      acc_[i] = ordered::add_interleaved_ps(acc_[2 * i], acc_[2 * i + 1]);
    } else if constexpr (i < N * 3 / 4) {  // block j: part j of four sums
      constexpr int v = i - N / 2;
      acc_[v] = ordered::add_interleaved_pd(acc_[2 * v], acc_[2 * v + 1]);
    } else if constexpr (i == N * 3 / 4) {  // of 8 sums: blocks 0 and 1 of sums 0 to 3, 2 and 3 of the others
      acc_[0] = add_blocks(acc_[0], acc_[N == 4 ? 0 : 1]);
      if constexpr (N == 16) acc_[0] = add_blocks(acc_[0], add_blocks(acc_[2], acc_[3]));
    }
    if constexpr (i == N - 1) store(scores, ld);
  }

 private:
  // Blocks a0 + a1, a2 + a3, b0 + b1, b2 + b3.
  static MUSTAFAR_INLINE __m512 add_blocks(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  MUSTAFAR_INLINE void store(float* scores, int64_t ld) const {
    alignas(64) float sums[16];
    if constexpr (N == 16) {
      _mm512_store_ps(sums, acc_[0]);
    } else {
      const __m512 sum = _mm512_add_ps(acc_[0], _mm512_shuffle_f32x4(acc_[0], acc_[0], 0xb1));
      _mm256_store_ps(sums, _mm512_castps512_ps256(_mm512_shuffle_f32x4(sum, sum, 0x08)));
    }
    for (int g = 0; g < G; ++g) std::memcpy(scores + g * ld, sums + g * R, R * sizeof(float));
  }

  __m512 acc_[N];
};

// R rows at a time, first .. last - 1 in all, against G heads: R * G sums in registers. NG groups of
// channels, 0 where that is known only now. `bitmap` is that of row `first`.
template <class Math, int R, int G, int NG>
MUSTAFAR_INLINE void score_rows(StagedRows<typename Math::Element>& in, int first, int last,
                                const uint64_t* bitmap, const typename Math::Query* q, float* scores,
                                int64_t ld) {
  constexpr int P = Math::kParts, kParts = R * P;
  const int groups = NG != 0 ? NG : in.groups(), words = NG != 0 ? (NG + 1) / 2 : in.words();
  const int64_t pitch = static_cast<int64_t>(groups) * kGroup;
  const typename Math::Element* slots[R];
  typename Math::Group group[R];
  typename Math::Part now[kParts], next[kParts];
  const auto expand = [&](auto r, int index) MUSTAFAR_INLINE_LAMBDA {
    const uint32_t mask = mask_of(bitmap + r * words, index);
    group[r].expand_in_order(slots[r], mask);
    slots[r] += popcount(mask);
  };
  const auto part = [&](auto i)
                        MUSTAFAR_INLINE_LAMBDA { next[i] = group[i / P].template part_in_order<i % P>(); };
  unroll<R>([&](auto r) MUSTAFAR_INLINE_LAMBDA {
    slots[r] = in.slots(first + r);
    expand(r, 0);
  });
  unroll<kParts>(part);
  using Sums = LaneSums<R, G>;
  constexpr bool kLater = NG == 4 && Sums::N <= 8;  // else registers or steps do not suffice
  Sums sums;
  const auto finish = [&](float* out) MUSTAFAR_INLINE_LAMBDA {
    unroll<Sums::kPieces>([&](auto i) MUSTAFAR_INLINE_LAMBDA { sums.template piece<i>(out, ld); });
  };
  float* target = scores + first;  // of `sums`; what they hold at first is overwritten
  for (; first < last; first += R) {
    if (first % 4 == 0) in.use_four(first);
    __m512 acc[G * R];
    unroll<G * R>([&](auto i) MUSTAFAR_INLINE_LAMBDA { acc[i] = _mm512_setzero_ps(); });
    // The products of group `index`. Among them the group that follows is expanded, the pieces from
    // `first_piece` on of earlier rows' sums are added, and what was expanded is converted.
    const auto step = [&](int index, auto first_piece, auto pieces) MUSTAFAR_INLINE_LAMBDA {
      unroll<kParts>([&](auto i) MUSTAFAR_INLINE_LAMBDA { now[i] = next[i]; });
      int following = index + 1;
      if (following == groups) {
        following = 0;
        const bool more = first + R < last;  // if not, the same again, for nobody
        if (more) bitmap += R * words;
        unroll<R>([&](auto r) MUSTAFAR_INLINE_LAMBDA { slots[r] = in.slots(first + (more ? R : 0) + r); });
      }
      const auto product = [&](auto i) MUSTAFAR_INLINE_LAMBDA {
        constexpr int p = i / G, g = i % G;
        const auto query = Math::load(q + g * pitch + index * kGroup + p * (kGroup / P));
        unroll<R>([&](auto r)
                      MUSTAFAR_INLINE_LAMBDA { Math::multiply(query, now[r * P + p], &acc[g * R + r]); });
      };
      const auto task = [&](auto i) MUSTAFAR_INLINE_LAMBDA {
        if constexpr (i < R) {
          expand(i, following);
        } else if constexpr (i < R + pieces) {
          sums.template piece<first_piece + i - R>(target, ld);
        } else {
          part(std::integral_constant<int, i - R - pieces>{});
        }
      };
      among<G * P, R + pieces + kParts>(product, task);
    };
    if constexpr (kLater) {
      constexpr int kEach = Sums::kPieces / 4;
      unroll<4>([&](auto i) MUSTAFAR_INLINE_LAMBDA {
        step(i, std::integral_constant<int, i * kEach>{}, std::integral_constant<int, kEach>{});
      });
    } else {
      for (int index = 0; index < groups; ++index) {
        step(index, std::integral_constant<int, 0>{}, std::integral_constant<int, 0>{});
      }
    }
    sums.take(acc);
    target = scores + first;
    if constexpr (!kLater) finish(target);
  }
  if constexpr (kLater) finish(target);
}

// scores[g * ld + r] of G heads.
template <class Math, int G, int NG>
void score_heads(StagedRows<typename Math::Element>& in, const typename Math::Query* q, float* scores,
                 int64_t ld) {
  constexpr int R = G <= 2 ? 4 : 2;
  const int whole = in.rows() / R * R;
  if (whole > 0) score_rows<Math, R, G, NG>(in, 0, whole, in.bitmap(0), q, scores, ld);
  if (whole == in.rows()) return;
  uint64_t padded[R * (kMaxHeadDim / 64)] = {};
  std::memcpy(padded, in.bitmap(whole), (in.rows() - whole) * in.words() * sizeof(uint64_t));
  score_rows<Math, R, G, NG>(in, whole, whole + R, padded, q, scores, ld);
}

// sum += weight * x, broadcast by the instruction itself: compilers prefer one broadcast into a register for
// all uses, which takes the place of a conversion.
MUSTAFAR_INLINE void add_weighted(const float* weight, __m512 x, __m512* sum) {
  __m512 total = *sum;
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(total) : "v"(x), "m"(*weight));
  *sum = total;
}

// C groups of channels from `group` on, expanded row by row. Used for group 0 first and then on and on, as
// the starts are kept in between.
template <class T, class Group, int C>
class RowGroups {
 public:
  RowGroups(StagedRows<T>& in, int group)
      : in_(in),
        bitmap_(reinterpret_cast<const char*>(in.bitmap(0)) + group * sizeof(uint32_t)),
        slots_(in.slots(0)),
        bitmap_bytes_(in.words() * sizeof(uint64_t)),
        pitch_(in.pitch()),
        first_(group == 0) {}

  MUSTAFAR_INLINE void expand(Group* out) {
    int64_t used = first_ ? 0 : in_.start(row_);
    for (int c = 0; c < C; ++c) {
      const uint32_t mask = mask_of(bitmap_, c);
      out[c].expand(slots_ + used, mask);
      used += popcount(mask);
    }
    in_.start(row_++) = static_cast<uint16_t>(used);
    bitmap_ += bitmap_bytes_;
    slots_ += pitch_;
  }

 private:
  StagedRows<T>& in_;
  const char* bitmap_;
  const T* slots_;
  int64_t bitmap_bytes_, pitch_;
  bool first_;
  int row_ = 0;
};

// C groups of channels from `group` on of G heads, summed in registers over all rows.
template <class T, int G, int C>
void weigh_groups(StagedRows<T>& in, int group, const float* p, int64_t ld, int64_t pitch, float* acc) {
  using Group = typename FloatMath<T>::Group;
  __m512 sum[G][2 * C];
  for (int g = 0; g < G; ++g) {
    for (int c = 0; c < 2 * C; ++c) sum[g][c] = _mm512_loadu_ps(acc + g * pitch + c * 16);
  }
  const int rows = in.rows();
  RowGroups<T, Group, C> next_row(in, group);
  Group ahead[C];
  __m512 now[2 * C];
  next_row.expand(ahead);
  for (int c = 0; c < 2 * C; ++c) ahead[c / 2].part(c % 2, &now[c]);
  if (rows > 1) next_row.expand(ahead);
  for (int r = 0; r < rows; ++r) {
    if (r % 4 == 0) in.use_four(r);
    __m512 next[2 * C];
    for (int c = 0; c < 2 * C; ++c) ahead[c / 2].part(c % 2, &next[c]);
    if (r + 2 < rows) next_row.expand(ahead);
    for (int g = 0; g < G; ++g) {
      for (int c = 0; c < 2 * C; ++c) add_weighted(p + g * ld + r, now[c], &sum[g][c]);
    }
    for (int c = 0; c < 2 * C; ++c) now[c] = next[c];
  }
  for (int g = 0; g < G; ++g) {
    for (int c = 0; c < 2 * C; ++c) _mm512_storeu_ps(acc + g * pitch + c * 16, sum[g][c]);
  }
}

// Calls body(std::integral_constant<int, G>, first head) for 8 (where kMost allows), 4, 2 or 1 heads at a
// time.
template <int kMost, class Body>
MUSTAFAR_INLINE void for_heads(int heads, const Body& body) {
  int g = 0;
  if constexpr (kMost == 8) {
    for (; g + 8 <= heads; g += 8) body(std::integral_constant<int, 8>{}, g);
  }
  for (; g + 4 <= heads; g += 4) body(std::integral_constant<int, 4>{}, g);
  for (; g + 2 <= heads; g += 2) body(std::integral_constant<int, 2>{}, g);
  if (g < heads) body(std::integral_constant<int, 1>{}, g);
}

// Calls body(rows, first row) for as many rows at a time as are staged together.
template <class T, class Body>
MUSTAFAR_INLINE void for_tiles(const PackedRows& in, const Body& body) {
  const int pitch = StagedRows<T>::pitch_of(in), tile = StagedRows<T>::kSlots / pitch;
  for (int first = 0; first < in.rows; first += tile) {
    StagedRows<T> rows(in, first, std::min(tile, in.rows - first), pitch);
    body(rows, first);
  }
}

// Calls body(std::integral_constant<int, C>, first group) for the groups that a register tile of G heads
// takes: 16 sums where there are as many.
template <int G, class Body>
MUSTAFAR_INLINE void for_groups(int groups, const Body& body) {
  constexpr int C = G == 8 ? 1 : G == 4 ? 2 : 4;
  int group = 0;
  for (; group + C <= groups; group += C) body(std::integral_constant<int, C>{}, group);
  for (; group < groups; ++group) body(std::integral_constant<int, 1>{}, group);
}

struct Avx512Packed {
  template <class T>
  static void score(const PackedRows& in, const float* q, int heads, float* scores, int64_t ld) {
    const int64_t pitch = static_cast<int64_t>(in.groups) * kGroup;
    for_tiles<T>(in, [&](StagedRows<T>& rows, int first) {
      for_heads<8>(heads, [&](auto group_size, int g) {
        constexpr int G = decltype(group_size)::value;
        const auto work = in.groups == 4 ? score_heads<FloatMath<T>, G, 4> : score_heads<FloatMath<T>, G, 0>;
        work(rows, q + g * pitch, scores + g * ld + first, ld);
      });
    });
  }

  template <class T>
  static void weigh(const PackedRows& in, const float* p, int64_t ld, int heads, float* acc) {
    const int64_t pitch = static_cast<int64_t>(in.groups) * kGroup;
    for_tiles<T>(in, [&](StagedRows<T>& rows, int first) {
      for_heads<8>(heads, [&](auto group_size, int g) {
        constexpr int G = decltype(group_size)::value;
        for_groups<G>(in.groups, [&](auto groups, int group) {
          weigh_groups<T, G, decltype(groups)::value>(rows, group, p + g * ld + first, ld, pitch,
                                                      acc + g * pitch + group * kGroup);
        });
      });
    });
  }
};

}  // namespace
}  // namespace mustafar::cpu
