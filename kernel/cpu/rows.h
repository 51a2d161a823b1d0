// Packing, unpacking and selection of rows, generic over the primitives of an instruction set.
//
// Included by the translation unit of each instruction set, which compiles its own copy. `Simd` provides, for
// a group of 32 channels and a mask whose bit c stands for channel c of the group,
//   expand(const T* src, mask, Out* dst): dst[c] = next of src where bit c is set, 0 elsewhere. Out is T or
//   float;
//     may read 32 elements of src.
//   compress(const T* src, mask, T* dst): the masked elements of src in order, then anything, 32 in all.
//   make_keys(const T* src, Key* keys): magnitudes as integers that order like them (see Keys).
//   at_least(const Key* keys, Key bound): mask of keys >= bound; count_at_least: how many.
//   from_float(const float* src, T* dst)
#pragma once

#include <algorithm>
#include <cstring>

#include "dense.h"
#include "half.h"
#include "simd.h"

namespace mustafar::cpu {
namespace {

constexpr int kMaxGroups = kMaxHeadDim / kGroup;

inline int popcount(uint64_t bits) {
#if defined(__GNUC__) || defined(__clang__)
  return __builtin_popcountll(bits);
#else
  bits -= (bits >> 1) & 0x5555555555555555;
  bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333);
  return static_cast<int>((((bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0f) * 0x0101010101010101) >> 56);
#endif
}

inline uint32_t group_mask(const uint64_t* bitmap, unsigned group) {
  return static_cast<uint32_t>(bitmap[group / 2] >> (group % 2 * 32));
}

// Without the sign, the bits of a floating-point number order like its magnitude. All NaN share the first key
// above infinity: they tie.
template <class T>
struct Keys;
template <>
struct Keys<Half> {
  using Key = uint16_t;
  static constexpr Key kMagnitude = 0x7fff, kNan = 0x7c01;
};
template <>
struct Keys<BFloat> {
  using Key = uint16_t;
  static constexpr Key kMagnitude = 0x7fff, kNan = 0x7f81;
};
template <>
struct Keys<float> {
  using Key = uint32_t;
  static constexpr Key kMagnitude = 0x7fffffff, kNan = 0x7f800001;
};

// A row's vectors lie 64 tokens apart. Gathered into one piece, a group can start at any slot. Corrupt widths
// cannot exceed the piece: no more slots than channels can be in use.
inline int64_t staged_width(const PackedRows& in) { return std::min(in.width, kMaxHeadDim); }
// Of kTileRows rows; the room behind is for the read of 32 elements at the last slot.
constexpr int64_t kStagedSize = kTileRows * kMaxHeadDim + kMaxHeadDim + kGroup;

// Calls body(part, staged, first) for every kTileRows rows, those from `first` on, with their slots in one
// piece each.
template <class T, class Body>
void for_staged(const PackedRows& in, const Body& body) {
  alignas(64) T staged[kStagedSize];
  const int64_t width = staged_width(in);
  for (int first = 0; first < in.rows; first += kTileRows) {
    PackedRows part = in;
    part.bitmap += static_cast<int64_t>(first) * in.words;
    part.rows = std::min(kTileRows, in.rows - first);
    const T* from = static_cast<const T*>(in.values) + static_cast<int64_t>(first) * kVectorValues;
    for (int64_t slot = 0; slot < width; slot += kVectorValues, from += kSliceTokens * kVectorValues) {
      for (int r = 0; r < part.rows; ++r) {
        std::memcpy(staged + slot + r * width, from + r * kVectorValues, kVectorValues * sizeof(T));
      }
    }
    body(part, static_cast<const T*>(staged), first);
  }
}

template <class Simd, class T>
void expand_staged(const PackedRows& in, const T* staged, T* out, int64_t pitch) {
  const int64_t width = staged_width(in);
  const int words = in.words, groups = in.groups;
  const uint64_t* bitmap = in.bitmap;
  for (int r = 0; r < in.rows; ++r, bitmap += words, out += pitch) {
    const T* next = staged + r * width;
    for (int group = 0; group < groups; group += 2) {
      const uint64_t bits = bitmap[group / 2];
      const uint32_t low = static_cast<uint32_t>(bits), high = static_cast<uint32_t>(bits >> 32);
      Simd::expand(next, low, out + group * kGroup);
      if (group + 1 == groups) break;
      Simd::expand(next + popcount(low), high, out + (group + 1) * kGroup);
      next += popcount(bits);
    }
  }
}

template <class Simd, class T>
void expand_rows(const PackedRows& in, void* out, int64_t pitch) {
  for_staged<T>(in, [&](const PackedRows& part, const T* staged, int first) {
    expand_staged<Simd>(part, staged, static_cast<T*>(out) + first * pitch, pitch);
  });
}

// Products by way of a small dense tile.
template <class Simd>
struct TiledPacked {
  template <class T>
  static void score(const PackedRows& in, const float* q, int heads, float* scores, int64_t ld) {
    const int64_t pitch = static_cast<int64_t>(in.groups) * kGroup;
    alignas(64) T tile[kTileRows * kMaxHeadDim];
    for_staged<T>(in, [&](const PackedRows& part, const T* staged, int first) {
      expand_staged<Simd>(part, staged, tile, pitch);
      dot<Simd, T>(tile, pitch, q, heads, scores + first, ld);
    });
  }
  template <class T>
  static void weigh(const PackedRows& in, const float* p, int64_t ld, int heads, float* acc) {
    const int64_t pitch = static_cast<int64_t>(in.groups) * kGroup;
    alignas(64) T tile[kTileRows * kMaxHeadDim];
    for_staged<T>(in, [&](const PackedRows& part, const T* staged, int first) {
      expand_staged<Simd>(part, staged, tile, pitch);
      accumulate<Simd, T>(tile, pitch, part.rows, p + first, ld, heads, acc);
    });
  }
};

template <class Simd, class T>
void row_to_float(const void* src, float* dst, int64_t n) {
  const T* x = static_cast<const T*>(src);
  int64_t i = 0;
  for (; i + Simd::kLanes <= n; i += Simd::kLanes) Simd::store(dst + i, Simd::load(x + i));
  for (; i < n; ++i) dst[i] = to_float(x[i]);
}

template <class Simd, class T>
void row_from_float(const float* src, void* dst, int64_t n) {
  T* x = static_cast<T*>(dst);
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) Simd::from_float(src + i, x + i);
  for (; i < n; ++i) from_float(src[i], x + i);
}

// Hands out rows as whole groups of channels, padded with zeros where D does not end with one.
template <class T>
class GroupRows {
 public:
  explicit GroupRows(const DenseRows& rows) : rows_(rows) { std::memset(padded_, 0, sizeof(padded_)); }
  const T* operator[](int r) {
    const T* row = static_cast<const T*>(rows_.x) + r * rows_.token_stride;
    if (rows_.head_dim % kGroup == 0) return row;
    std::memcpy(padded_, row, rows_.head_dim * sizeof(T));
    return padded_;
  }

 private:
  const DenseRows& rows_;
  T padded_[kMaxHeadDim];
};

template <class Simd, class T>
int nonzero_bitmap(const DenseRows& in, uint64_t* bitmap) {
  using Key = typename Keys<T>::Key;
  alignas(64) Key keys[kGroup];
  const int words = (in.head_dim + 63) / 64, groups = (in.head_dim + kGroup - 1) / kGroup;
  GroupRows<T> rows(in);
  std::memset(bitmap, 0, kSliceTokens * words * sizeof(uint64_t));
  int fullest = 0;
  for (int r = 0; r < in.rows; ++r) {
    const T* row = rows[r];
    int used = 0;
    for (int group = 0; group < groups; ++group) {
      Simd::make_keys(row + group * kGroup, keys);
      const uint64_t mask = Simd::at_least(keys, Key{1});
      bitmap[r * words + group / 2] |= mask << (group % 2 * 32);
      used += popcount(mask);
    }
    fullest = std::max(fullest, used);
  }
  return fullest;
}

// Bits of the k largest keys, lowest channel first among equals. The keys that pad the last group are 0.
template <class Simd, class T>
void top_of_row(const typename Keys<T>::Key* keys, int groups, int k, uint64_t* bitmap) {
  using Key = typename Keys<T>::Key;
  // The largest bound that at least k keys reach, bit by bit from the top. Once exactly k reach it, no tie is
  // left.
  unsigned bound = 0;
  int reached = -1;
  for (unsigned bit = (Keys<T>::kMagnitude >> 1) + 1u; bit != 0 && reached != k; bit >>= 1) {
    int count = 0;
    for (int group = 0; group < groups; ++group) {
      count += Simd::count_at_least(keys + group * kGroup, static_cast<Key>(bound | bit));
    }
    if (count >= k) {
      bound |= bit;
      reached = count;
    }
  }
  int spare = k;  // ties to take
  uint32_t above[kMaxGroups] = {}, from[kMaxGroups];
  for (int group = 0; group < groups; ++group) {
    from[group] = Simd::at_least(keys + group * kGroup, static_cast<Key>(bound));
    if (reached == k) {
      above[group] = from[group];
    } else {
      above[group] = Simd::at_least(keys + group * kGroup, static_cast<Key>(bound + 1));
      spare -= popcount(above[group]);
    }
  }
  for (int group = 0; group < groups; ++group) {
    uint64_t mask = above[group];
    if (reached != k) {
      for (uint32_t ties = from[group] & ~above[group]; ties != 0 && spare > 0; --spare) {
        mask |= ties & (~ties + 1);
        ties &= ties - 1;
      }
    }
    bitmap[group / 2] |= mask << (group % 2 * 32);
  }
}

template <class Simd, class T>
void top_bitmap(const DenseRows& in, int k, uint64_t* bitmap) {
  alignas(64) typename Keys<T>::Key keys[kMaxHeadDim];
  const int words = (in.head_dim + 63) / 64, groups = (in.head_dim + kGroup - 1) / kGroup;
  GroupRows<T> rows(in);
  std::memset(bitmap, 0, kSliceTokens * words * sizeof(uint64_t));
  if (k == 0) return;
  for (int r = 0; r < in.rows; ++r) {
    const T* row = rows[r];
    for (int group = 0; group < groups; ++group) Simd::make_keys(row + group * kGroup, keys + group * kGroup);
    top_of_row<Simd, T>(keys, groups, k, bitmap + r * words);
  }
}

template <class Simd, class T>
void pack_rows(const DenseRows& in, const uint64_t* bitmap, int width, void* values) {
  alignas(64) T packed[kMaxHeadDim + kGroup];
  const int words = (in.head_dim + 63) / 64, groups = (in.head_dim + kGroup - 1) / kGroup;
  GroupRows<T> rows(in);
  for (int r = 0; r < kSliceTokens; ++r) {
    int used = 0;
    if (r < in.rows) {
      const T* row = rows[r];
      for (int group = 0; group < groups; ++group) {
        const uint32_t mask = group_mask(bitmap + r * words, group);
        Simd::compress(row + group * kGroup, mask, packed + used);
        used += popcount(mask);
      }
    }
    std::memset(packed + used, 0, (width - used) * sizeof(T));
    T* out = static_cast<T*>(values) + r * kVectorValues;
    for (int slot = 0; slot < width; slot += kVectorValues) {
      std::memcpy(out + static_cast<int64_t>(slot) * kSliceTokens, packed + slot, kVectorValues * sizeof(T));
    }
  }
}

}  // namespace
}  // namespace mustafar::cpu
