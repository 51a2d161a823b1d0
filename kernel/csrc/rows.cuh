// Walking compressed rows: a warp takes the 64 rows of a slice, every lane two of them, and visits their
// values in channel order. Everything that reads the format is here.
#pragma once

#include <cstdint>

#include "../params.h"
#include "half.cuh"
#include "shared.cuh"

namespace mustafar::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kRowsPerLane = kSliceTokens / kWarpSize;  // lane l owns tokens l and l + 32

// Tables in shared memory that are indexed by channel have one row before and eight rows after the channels
// that the walk may touch but nobody reads: see Scan.
constexpr int kGuardRows = 1;
constexpr int kSinkRows = kVectorValues;
__host__ __device__ constexpr int table_bytes(int channels, int pitch) {
  return (kGuardRows + channels + kSinkRows) * pitch;
}

// Which values belong to a slice. In the general layout both come from memory: located one slice ahead, and
// nothing waits for them before RowPair::begin() does.
struct Location {
  int64_t first;  // value of the tensor
  int32_t width;  // value slots of each row
};

__device__ __forceinline__ Location locate(const CompressedView& view, int64_t b, int h, int slice) {
  if (view.offsets == nullptr)
    return {b * view.values_batch_stride + h * view.values_head_stride +
                int64_t{slice} * view.width * kSliceTokens,
            view.width};
  return {__ldg(view.offsets + b * view.offsets_batch_stride + h * view.offsets_head_stride + slice),
          __ldg(view.widths + b * view.widths_batch_stride + h * view.widths_head_stride + slice)};
}

// The 64 rows of a slice. Uniform across the warp.
struct RowSource {
  const uint64_t* bitmap;  // of row 0; null if every row holds every channel (the dense window)
  const uint4* values;     // vector 0 of row 0
  int32_t vectors;         // of each row
  int32_t row_pitch;       // vectors from a row to the next
  int32_t vector_pitch;    // vectors from one vector of a row to its next
};

__device__ __forceinline__ RowSource slice_rows(const CompressedView& view, const Location& location,
                                                int64_t b, int h, int slice, int bitmap_words) {
  return {view.bitmap + b * view.bitmap_batch_stride + h * view.bitmap_head_stride +
              int64_t{slice} * (kSliceTokens * bitmap_words),
          static_cast<const uint4*>(view.values) + location.first / kVectorValues,
          location.width / kVectorValues, 1, kSliceTokens};
}

// One row's bitmap, left-aligned: the next channel is the top bit of bits[0]. Bits from head_dim on are ones
// ("sentinels"), and ones are shifted in behind them: a row that has run out of kept channels goes on to
// channels head_dim, head_dim + 1, ..., the sink rows of the tables, so the loop needs no test per value.
// A run of 32 zeros stalls the scan (step() then repeats the last channel, or the guard row): bits[0] stays 0
// until the end of the row, where Walk::finish() notices and walks again with skip_zeros().
template <int kWords, int kPitch>
struct Scan {
  uint32_t bits[kWords];
  // Address in the table of the channel before the one that bits[0] starts with, less kPitch for each step
  // since the last advance(): so an address costs one multiply-add, and the steps go into the offset of the
  // access.
  uint32_t at;

  // Sink rows are kSinkRows: called before each vector.
  __device__ __forceinline__ void clamp(uint32_t sink) { at = min(at, sink); }

  // Consumes channels up to and including the next kept one, and returns its address in the table. The i-th
  // call, from 0, since advance().
  __device__ __forceinline__ uint32_t step(int i) {
    const uint32_t zeros = leading_zeros(bits[0]), shift = zeros + 1;
    at += zeros * kPitch;
#pragma unroll
    for (int w = 0; w + 1 < kWords; ++w) bits[w] = __funnelshift_lc(bits[w + 1], bits[w], shift);
    bits[kWords - 1] = __funnelshift_lc(~0u, bits[kWords - 1], shift);
    return at + (i + 1) * kPitch;
  }

  __device__ __forceinline__ void advance(int steps) { at += steps * kPitch; }

  __device__ __forceinline__ bool stalled() const { return bits[0] == 0; }

  __device__ __forceinline__ void skip_zeros() {
    while (bits[0] == 0) {
#pragma unroll
      for (int i = 0; i + 1 < kWords; ++i) bits[i] = bits[i + 1];
      bits[kWords - 1] = ~0u;
      at += 32 * kPitch;
    }
  }
};

// A lane's two rows of a slice: begin() starts copying them to shared memory, Walk visits them. Lanes stage
// and read nothing but their own rows, so no barrier is needed.
//   kBitmapWords: 32-bit words of a row's bitmap, rounded up to what the kernel is compiled for
//   kRingVectors: vectors of each row that are staged, there or on their way
template <int kBitmapWords, int kRingVectors>
struct RowPair {
  static constexpr int kWords = kBitmapWords, kRing = kRingVectors;
  static constexpr int kWordBytes = kWords * 4;
  static constexpr int kSlotBytes = kSliceTokens * sizeof(uint4);
  static constexpr int kStagingBytes = kSliceTokens * kWordBytes + kRing * kSlotBytes;  // of a warp

  uint32_t staged_words, staged_vectors;  // of row 0: addresses in shared memory
  const uint64_t* bitmap;                 // of row 0; null: all ones
  const char* vector0[kRowsPerLane];
  int32_t vectors;
  uint32_t vector_bytes;  // from a vector to the next
  bool visible[kRowsPerLane];

  __device__ __forceinline__ RowPair(uint32_t staging, int lane)
      : staged_words(staging + lane * kWordBytes),
        staged_vectors(staging + kSliceTokens * kWordBytes + lane * sizeof(uint4)) {}

  // The caller commits the copies. Rows that are not visible are never read from memory that may not exist,
  // and count as empty.
  __device__ __forceinline__ void begin(const RowSource& source, const bool (&rows_visible)[kRowsPerLane],
                                        int bitmap_words, int lane) {
    vectors = source.vectors;
    vector_bytes = source.vector_pitch * sizeof(uint4);
    bitmap = source.bitmap == nullptr ? nullptr : source.bitmap + lane * bitmap_words;
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
      visible[r] = rows_visible[r];
      const int token = visible[r] ? lane + r * kWarpSize : 0;
      vector0[r] = reinterpret_cast<const char*>(source.values + int64_t{token} * source.row_pitch);
    }
    copy_words(bitmap_words);
#pragma unroll
    for (int slot = 0; slot < kRing; ++slot)
      if (slot < vectors) copy_vector(slot * kSlotBytes, slot);
  }

  __device__ __forceinline__ void copy_words(int bitmap_words) const {
    if (bitmap == nullptr) return;
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
      const uint32_t to = staged_words + r * kWarpSize * kWordBytes;
      const uint64_t* from = bitmap + r * kWarpSize * bitmap_words;
      if constexpr (kWords == 4) {
        copy_async<16>(to, from);
      } else {
#pragma unroll
        for (int i = 0; i < kWords / 2; ++i)
          if (i < bitmap_words) copy_async<8>(to + i * 8, from + i);
      }
    }
  }

  __device__ __forceinline__ void copy_vector(uint32_t slot, uint32_t vector) const {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r)
      copy_async<16>(staged_vectors + slot + r * kWarpSize * sizeof(uint4),
                     vector0[r] + uint64_t{vector} * vector_bytes);
  }

  __device__ __forceinline__ void read_vector(uint32_t slot, uint32_t (&pairs)[kRowsPerLane][4]) const {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r)
      load(staged_vectors + slot + r * kWarpSize * sizeof(uint4), pairs[r]);
  }

  // Row r's bitmap, least significant bit first.
  __device__ __forceinline__ void read_words(int r, int bitmap_words, uint32_t (&words)[kWords]) const {
#pragma unroll
    for (int i = 0; i < kWords; i += 2) {
      uint32_t two[2] = {~0u, ~0u};
      if (bitmap != nullptr) load(staged_words + r * kWarpSize * kWordBytes + i * 4, two);
      const bool held = kWords <= 4 || i / 2 < bitmap_words;
      words[i] = held ? two[0] : 0, words[i + 1] = held ? two[1] : 0;
    }
  }
};

// Visits every value slot of a lane's two rows. Visit: visit(row, address, pair, high) with the address of
// the value's channel in a table of kPitch bytes a channel, and the value in the low or high half of `pair`.
// Channel 0 of row r is at table + r * kRowBytes. Slots without a channel land in the sink rows.
template <int kPitch, int kRowBytes, class Rows>
struct Walk {
  const Rows& rows;
  const uint32_t before, sink;  // the guard row and the last channel's row of row 0's table
  const int head_dim, bitmap_words;
  Scan<Rows::kWords, kPitch> scan[kRowsPerLane];
  uint32_t pairs[kRowsPerLane][4];  // the vector at work

  // The copies of rows.begin() have been waited for.
  __device__ __forceinline__ Walk(const Rows& rows, uint32_t table, int head_dim, int bitmap_words)
      : rows(rows),
        before(table - kPitch),
        sink(before + head_dim * kPitch),
        head_dim(head_dim),
        bitmap_words(bitmap_words) {
    start();
  }

  __device__ __forceinline__ void start() {
    bool empty[kRowsPerLane];
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
      uint32_t words[Rows::kWords], any = 0;
      rows.read_words(r, bitmap_words, words);
#pragma unroll
      for (int i = 0; i < Rows::kWords; ++i) {
        any |= words[i];
        scan[r].bits[i] = __brev(words[i]);
      }
      empty[r] = !rows.visible[r] || any == 0;
      scan[r].at = before + r * kRowBytes;
    }
    if (head_dim < Rows::kWords * 32) {
#pragma unroll
      for (int i = 0; i < Rows::kWords; ++i) {
        const int channels = head_dim - 32 * i;  // of this word
        const uint32_t sentinels = channels >= 32 ? 0 : channels <= 0 ? ~0u : ~0u >> channels;
#pragma unroll
        for (int r = 0; r < kRowsPerLane; ++r) scan[r].bits[i] |= sentinels;
      }
    }
    if (__any_sync(kFullWarp, empty[0] || empty[1])) {
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r) {
        if (!empty[r]) continue;
        scan[r].at = sink + r * kRowBytes;
#pragma unroll
        for (int i = 0; i < Rows::kWords; ++i) scan[r].bits[i] = ~0u;
      }
    }
  }

  __device__ __forceinline__ void take_vector(uint32_t slot) {
    rows.read_vector(slot, pairs);
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) scan[r].clamp(sink + r * kRowBytes);
  }

  template <class Visit>
  __device__ __forceinline__ void visit_value(int i, Visit& visit) {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) visit(r, scan[r].step(i), pairs[r][i / 2], i % 2 == 1);
  }

  // The vector has been used, so its slot can take another.
  __device__ __forceinline__ void leave_vector(int vector, uint32_t slot) {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) scan[r].advance(kVectorValues);
    if (vector + Rows::kRing < rows.vectors) rows.copy_vector(slot, vector + Rows::kRing);
  }

  // Rows with a run of 32 zeros: restart(), then visits all values again, slowly.
  template <class Restart, class Visit>
  __device__ __forceinline__ void finish(Restart restart, Visit& visit) {
    if (!__any_sync(kFullWarp, scan[0].stalled() || scan[1].stalled())) return;
    restart();
    rows.copy_words(bitmap_words);
    commit_copies();
    wait_copies<0>();
    start();
#pragma unroll 1
    for (int vector = 0; vector < rows.vectors; ++vector) {
      rows.copy_vector(0, vector);
      commit_copies();
      wait_copies<0>();
      take_vector(0);
#pragma unroll 1
      for (int i = 0; i < kVectorValues; ++i) {
#pragma unroll
        for (int r = 0; r < kRowsPerLane; ++r) {
          scan[r].skip_zeros();
          visit(r, scan[r].step(0), pairs[r][0], false);
          scan[r].advance(1);
#pragma unroll
          for (int j = 0; j < 4; ++j) pairs[r][j] = pairs[r][j] >> 16 | (j < 3 ? pairs[r][j + 1] << 16 : 0);
        }
      }
    }
  }
};

// Commits one group of copies a vector, so that the newest kRing - 1 groups are exactly those that the next
// vector does not need.
template <class Rows>
__device__ __forceinline__ void next_slot(const Rows&, uint32_t& slot) {
  commit_copies();
  wait_copies<Rows::kRing - 1>();
  slot = slot == (Rows::kRing - 1) * Rows::kSlotBytes ? 0 : slot + Rows::kSlotBytes;
}

template <class SomeWalk, class Visit>
__device__ __forceinline__ void walk_from(int vector, uint32_t slot, SomeWalk& walk, Visit& visit) {
#pragma unroll 1
  for (; vector < walk.rows.vectors; ++vector) {
    walk.take_vector(slot);
#pragma unroll
    for (int i = 0; i < kVectorValues; ++i) walk.visit_value(i, visit);
    walk.leave_vector(vector, slot);
    next_slot(walk.rows, slot);
  }
}

// Two walks at once: twice the independent instructions to fill the latencies of either.
template <class WalkA, class VisitA, class WalkB, class VisitB>
__device__ __forceinline__ void walk_both(WalkA& a, VisitA& visit_a, WalkB& b, VisitB& visit_b) {
  const int common = min(a.rows.vectors, b.rows.vectors);
  int vector = 0;
  uint32_t slot = 0;
#pragma unroll 1
  for (; vector < common; ++vector) {
    a.take_vector(slot);
    b.take_vector(slot);
#pragma unroll
    for (int i = 0; i < kVectorValues; ++i) {
      a.visit_value(i, visit_a);
      b.visit_value(i, visit_b);
    }
    a.leave_vector(vector, slot);
    b.leave_vector(vector, slot);
    next_slot(a.rows, slot);
  }
  walk_from(vector, slot, a, visit_a);
  walk_from(vector, slot, b, visit_b);
}

}  // namespace mustafar::cuda
