// Products with packed rows in AVX-512 registers: groups of 32 channels are expanded and converted in
// registers and used for up to 8 query heads, so that no dense row is ever written.
//
// Included by the translation units of the AVX-512 levels. A group is expanded one step ahead of its use and
// converted half a step ahead, so that the products never wait; README.md counts the instructions.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "half.h"
#include "rows.h"
#include "simd.h"

#if defined(__GNUC__)
#define MUSTAFAR_INLINE inline __attribute__((always_inline))
#define MUSTAFAR_INLINE_LAMBDA __attribute__((always_inline))
// Keeps a value in a register of its kind, where compilers would take it from memory or another register
// again.
#define MUSTAFAR_IN_VECTOR(x) asm("" : "+v"(x))
#define MUSTAFAR_IN_GENERAL(x) asm("" : "+r"(x))
#else
#define MUSTAFAR_INLINE inline
#define MUSTAFAR_INLINE_LAMBDA
#define MUSTAFAR_IN_VECTOR(x)
#define MUSTAFAR_IN_GENERAL(x)
#endif

namespace mustafar::cpu {
namespace {

MUSTAFAR_INLINE uint32_t mask_of(const void* bitmap, int group) {
  uint32_t mask;
  std::memcpy(&mask, static_cast<const char*>(bitmap) + group * sizeof(mask), sizeof(mask));
  MUSTAFAR_IN_GENERAL(mask);
  return mask;
}

// A tile of rows, each with its slots in one piece of memory, so that a group can start at any of them.
template <class T>
class StagedRows {
 public:
  static constexpr int kSlots = 4096;
  // Slots from row to row, whole cache lines. Corrupt widths cannot exceed the piece.
  static int pitch_of(const PackedRows& in) {
    return static_cast<int>(std::clamp<int64_t>(round_up(in.width, 64), 64, kMaxHeadDim));
  }

  // `rows` rows from `first` on, at most kSlots / pitch.
  StagedRows(const PackedRows& in, int first, int rows, int pitch)
      : bitmap_(in.bitmap + static_cast<int64_t>(first) * in.words),
        from_(static_cast<const T*>(in.values) + static_cast<int64_t>(first) * kVectorValues),
        words_(in.words),
        width_(static_cast<int>(staged_width(in))),
        pitch_(pitch),
        rows_(rows),
        groups_(in.groups) {
    while (staged_ < kAhead) stage_four();
  }

  int rows() const { return rows_; }
  int groups() const { return groups_; }
  int words() const { return words_; }
  int pitch() const { return pitch_; }
  const uint64_t* bitmap(int r) const { return bitmap_ + static_cast<int64_t>(r) * words_; }
  const T* slots(int r) const { return slots_ + r * pitch_; }

  // Rows r to r + 3 are next; called with every multiple of 4 in turn. Brings rows that follow, for copies
  // between the products cost next to nothing.
  MUSTAFAR_INLINE void use_four(int r) {
    if (r + kAhead == staged_) stage_four();
  }

  // Where the next group of channels starts in the slots of row r, for a loop that takes a few groups at a
  // time.
  uint16_t& start(int r) { return starts_[r]; }

 private:
  static constexpr int kAhead = 8;

  static MUSTAFAR_INLINE void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
  }

  MUSTAFAR_INLINE void stage_four() {
    constexpr int64_t kStep = kSliceTokens * kVectorValues;
    const int first = staged_, count = std::min(4, rows_ - first);
    staged_ += 4;
    if (count <= 0) return;
    const T* from = from_ + first * kVectorValues;
    T* to = slots_ + first * pitch_;
    // The next slice mostly lies behind this one, and waits in a far cache or in memory.
    prefetch(bitmap_ + (kSliceTokens + first) * words_);
    for (int64_t slot = 0; slot < width_; slot += kVectorValues) {
      prefetch(from + (width_ + slot) * kSliceTokens);
    }
    int slot = 0;
    if constexpr (sizeof(T) == 2) {
      if (count == 4) {  // the vectors of four rows lie side by side: turn 4 x 4 of them
        for (; slot + 32 <= width_; slot += 32, from += 4 * kStep, to += 32) {
          const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + kStep);
          const __m512i c = _mm512_loadu_si512(from + 2 * kStep), d = _mm512_loadu_si512(from + 3 * kStep);
          const __m512i ab01 = _mm512_shuffle_i64x2(a, b, 0x44), ab23 = _mm512_shuffle_i64x2(a, b, 0xee);
          const __m512i cd01 = _mm512_shuffle_i64x2(c, d, 0x44), cd23 = _mm512_shuffle_i64x2(c, d, 0xee);
          _mm512_storeu_si512(to, _mm512_shuffle_i64x2(ab01, cd01, 0x88));
          _mm512_storeu_si512(to + pitch_, _mm512_shuffle_i64x2(ab01, cd01, 0xdd));
          _mm512_storeu_si512(to + 2 * pitch_, _mm512_shuffle_i64x2(ab23, cd23, 0x88));
          _mm512_storeu_si512(to + 3 * pitch_, _mm512_shuffle_i64x2(ab23, cd23, 0xdd));
        }
      }
    }
    for (; slot < width_; slot += kVectorValues, from += kStep, to += kVectorValues) {
      for (int r = 0; r < count; ++r) {
        std::memcpy(to + r * pitch_, from + r * kVectorValues, kVectorValues * sizeof(T));
      }
    }
  }

  const uint64_t* bitmap_;
  const T* from_;
  int words_, width_, pitch_, rows_, groups_;
  int staged_ = 0;
  uint16_t starts_[kSliceTokens];
  // A read of 32 slots may start at the last one; rows that do not exist are read under empty masks.
  alignas(64) T slots_[kSlots + 4 * kMaxHeadDim];
};

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
    MUSTAFAR_INLINE void part(int i, Part* out) const {
      convert(i == 0 ? _mm512_castsi512_si256(halves) : _mm512_extracti64x4_epi64(halves, 1), T{}, out);
    }
  };
  static MUSTAFAR_INLINE void convert(__m256i x, Half, Part* out) { *out = _mm512_cvtph_ps(x); }
  static MUSTAFAR_INLINE void convert(__m256i x, BFloat, Part* out) {
    *out = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  static MUSTAFAR_INLINE void load(const float* query, Part* out) { *out = _mm512_loadu_ps(query); }
  static MUSTAFAR_INLINE void multiply(Part query, Part key, __m512* sum) {
    *sum = _mm512_fmadd_ps(query, key, *sum);
  }
};
template <>
struct FloatMath<float>::Group {
  __m512 parts[2];
  MUSTAFAR_INLINE void expand(const float* slots, uint32_t mask) {
    const auto low = static_cast<__mmask16>(mask), high = static_cast<__mmask16>(mask >> 16);
    parts[0] = _mm512_maskz_expand_ps(low, _mm512_loadu_ps(slots));
    parts[1] = _mm512_maskz_expand_ps(high, _mm512_loadu_ps(slots + popcount(mask & 0xffff)));
  }
  MUSTAFAR_INLINE void part(int i, Part* out) const { *out = parts[i]; }
};

// Block i of four lanes: a0 + a2, b0 + b2, a1 + a3, b1 + b3 of blocks i.
MUSTAFAR_INLINE __m512 add_pairs(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}
// Blocks a0 + a1, a2 + a3, b0 + b1, b2 + b3.
MUSTAFAR_INLINE __m512 add_blocks(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// Sums of the lanes of N vectors, by adding halves while interleaving.
template <int N>
MUSTAFAR_INLINE void sum_lanes(const __m512* acc, float* sums) {
  static_assert(N == 4 || N == 8 || N == 16);
  __m512 quads[N / 4];  // lane 4 i + j of quads[v]: part i of sum 4 v + j
  for (int v = 0; v < N / 4; ++v) {
    const __m512d a = _mm512_castps_pd(add_pairs(acc[4 * v], acc[4 * v + 1]));
    const __m512d b = _mm512_castps_pd(add_pairs(acc[4 * v + 2], acc[4 * v + 3]));
    quads[v] =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  if constexpr (N == 16) {
    _mm512_storeu_ps(sums, add_blocks(add_blocks(quads[0], quads[1]), add_blocks(quads[2], quads[3])));
  } else if constexpr (N == 8) {
    const __m512 both = add_blocks(quads[0], quads[1]);  // blocks 0 and 1 of quads[0], 2 and 3 of quads[1]
    const __m512 sum = _mm512_add_ps(both, _mm512_shuffle_f32x4(both, both, 0xb1));
    _mm256_storeu_ps(sums, _mm512_castps512_ps256(_mm512_shuffle_f32x4(sum, sum, 0x08)));
  } else {
    const __m512 both = add_blocks(quads[0], quads[0]);
    _mm_storeu_ps(sums, _mm512_castps512_ps128(add_blocks(both, both)));
  }
}

// R rows at a time, first .. last - 1 in all, against G heads: R * G sums in registers. NG groups of
// channels, 0 where that is known only now. `bitmap` is that of row `first`.
template <class Math, int R, int G, int NG>
MUSTAFAR_INLINE void score_rows(StagedRows<typename Math::Element>& in, int first, int last,
                                const uint64_t* bitmap, const typename Math::Query* q, float* scores,
                                int64_t ld) {
  const int groups = NG != 0 ? NG : in.groups(), words = NG != 0 ? (NG + 1) / 2 : in.words();
  const int64_t pitch = static_cast<int64_t>(groups) * kGroup;
  const typename Math::Element* slots[R];
  typename Math::Group ahead[R];
  const auto expand = [&](int group) MUSTAFAR_INLINE_LAMBDA {
    for (int r = 0; r < R; ++r) {
      const uint32_t mask = mask_of(bitmap + r * words, group);
      ahead[r].expand(slots[r], mask);
      slots[r] += popcount(mask);
    }
  };
  for (int r = 0; r < R; ++r) slots[r] = in.slots(first + r);
  expand(0);
  typename Math::Part now[R];
  for (int r = 0; r < R; ++r) ahead[r].part(0, &now[r]);
  for (; first < last; first += R) {
    if (first % 4 == 0) in.use_four(first);
    __m512 acc[G * R];
    for (auto& sum : acc) sum = _mm512_setzero_ps();
    const auto multiply = [&](const typename Math::Query* query, const typename Math::Part* key)
                              MUSTAFAR_INLINE_LAMBDA {
                                for (int g = 0; g < G; ++g) {
                                  typename Math::Part x;
                                  Math::load(query + g * pitch, &x);
                                  MUSTAFAR_IN_VECTOR(x);
                                  for (int r = 0; r < R; ++r) Math::multiply(x, key[r], &acc[g * R + r]);
                                }
                              };
#pragma GCC unroll 4
    for (int group = 0; group < groups; ++group) {
      typename Math::Part second[R];
      if constexpr (Math::kParts == 2) {
        for (int r = 0; r < R; ++r) ahead[r].part(1, &second[r]);
      }
      if (group + 1 < groups) {
        expand(group + 1);
      } else if (first + R < last) {
        bitmap += R * words;
        for (int r = 0; r < R; ++r) slots[r] = in.slots(first + R + r);
        expand(0);
      }
      multiply(q + group * kGroup, now);
      for (int r = 0; r < R; ++r) ahead[r].part(0, &now[r]);
      if constexpr (Math::kParts == 2) multiply(q + group * kGroup + kGroup / 2, second);
    }
    float sums[R * G];
    sum_lanes<R * G>(acc, sums);
    for (int g = 0; g < G; ++g) std::memcpy(scores + g * ld + first, sums + g * R, R * sizeof(float));
  }
}

template <class Math, int G, int NG>
void score_heads(StagedRows<typename Math::Element>& in, const typename Math::Query* q, float* scores,
                 int64_t ld) {
  constexpr int R = G == 8 ? 2 : 4;
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
#if defined(__GNUC__)
  __m512 total = *sum;
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(total) : "v"(x), "m"(*weight));
  *sum = total;
#else
  *sum = _mm512_fmadd_ps(_mm512_set1_ps(*weight), x, *sum);
#endif
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
