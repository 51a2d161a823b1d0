// Rows of a packed slice brought together. Included by the translation units of the AVX-512 levels.
#pragma once

#include <algorithm>
#include <cstring>

#include "ordered.h"
#include "rows.h"
#include "simd.h"

namespace mustafar::cpu {
namespace {

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

}  // namespace
}  // namespace mustafar::cpu
