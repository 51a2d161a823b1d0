// Bringing slices to a warp one after another: their values in a ring of vectors in shared memory that runs
// on from each slice into the next, so that memory is never waited for at a slice's start.
#pragma once

#include <climits>
#include <cstdint>
#include <type_traits>

#include "rows.cuh"
#include "shared.cuh"

namespace mustafar::cuda {

// Lanes stage and read nothing but their own rows, so no barrier is needed.
//   kWords  32-bit words of a row's bitmap, rounded up to what the kernel is compiled for
//   kRing   vectors of each row that are staged, there or on their way
//   kStagesBitmaps  whether the next slice's bitmaps wait in shared memory, or else in registers
template <int kWords, int kRing, bool kStagesBitmaps>
class Feed {
  static constexpr int kWordBytes = kWords * 4;
  static constexpr int kSlotBytes = kSliceVectorBytes;
  static constexpr int kRowsApart = kWarpSize * 16;  // bytes between vectors of a lane's rows

 public:
  static constexpr int kBitmapWords = kWords, kRingVectors = kRing;
  static constexpr int kStagingBytes =
      (kStagesBitmaps ? kSliceTokens * kWordBytes : 0) + kRing * kSlotBytes;  // of a warp

  // Starts the first copies.
  __device__ __forceinline__ Feed(const Slices& slices, uint32_t staging, int lane)
      : slices_(slices),
        lane_(lane),
        staged_words_(staging + lane * kWordBytes),
        staged_vectors_(staging + kStagingBytes - kRing * kSlotBytes + lane * 16),
        slice_(slices.first),
        cursor_(slices.first - slices.stride) {
    if (more()) {
      fetch_bitmaps(slice_);
      vectors_ = slices_.count(slice_);
      turn_cursor();
      if (step_ > 0) {
#pragma unroll
        for (int i = 0; i < kRing; ++i) copy_vector(), copied(1);
      }
    }
    commit_copies();
  }

  __device__ __forceinline__ bool more() const { return slice_ < slices_.end; }
  __device__ __forceinline__ int slice() const { return slice_; }
  // Whether all tokens of the slice are visible; and if not, which.
  __device__ __forceinline__ bool whole() const { return slices_.whole(slice_); }
  __device__ __forceinline__ bool visible(int row) const {
    return slices_.visible(slice_, lane_ + row * kWarpSize);
  }

  // Starts a walk over the slice, and the copies of the next slice's bitmaps.
  template <class SomeWalk>
  __device__ __forceinline__ void begin(SomeWalk& walk, int head_dim) {
    if (late_)
      wait_copies<0>();
    else
      wait_copies<kRing - 1>();
    if constexpr (kStagesBitmaps) {
      uint32_t words[kRowsPerLane][kWords];
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r) read_bitmap(r, words[r]);
      walk.start(words, head_dim);
    } else {
      walk.start(next_words_, head_dim);
    }
    if (!whole()) park_hidden(walk);
    if (slice_ + slices_.stride < slices_.end) {
      fetch_bitmaps(slice_ + slices_.stride);
      next_vectors_ = slices_.count(slice_ + slices_.stride);
    }
  }

  __device__ __forceinline__ int vectors() const { return vectors_; }
  // Vectors that can be copied before the cursor has to turn.
  __device__ __forceinline__ int left() const { return left_; }

  // The next vector of both rows, whose copies have been waited for, to the walk.
  template <class SomeWalk>
  __device__ __forceinline__ void take_vector(SomeWalk& walk) {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) load(staged_vectors_ + read_ + r * kRowsApart, walk.pairs[r]);
    read_ = next_slot(read_);
    walk.clamp();
  }

  // Copies one vector of both rows to the ring: a slot is free when its vector has been taken. Every step of
  // a walk commits one group, so that the newest kRing - 1 are never needed by the next.
  __device__ __forceinline__ void copy_vector() {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r)
      copy_async<16>(staged_vectors_ + write_ + r * kRowsApart, from_ + r * kRowsApart);
    from_ += step_;
    write_ = next_slot(write_);
  }

  // `count` vectors have been copied, at most left().
  __device__ __forceinline__ void copied(int count) {
    left_ -= count;
    if (left_ == 0) turn_cursor();
  }

  // After a walk: if it stalled, restart() and visits all values once more, straight from memory.
  template <class SomeWalk, class Restart, class Visit>
  __device__ __forceinline__ void finish(SomeWalk& walk, int head_dim, Restart restart, Visit& visit) {
    if (is_dense<kWords>(vectors_) && __any_sync(kFullWarp, walk.stalled())) {
      restart();
      repeat(walk, head_dim, visit);
    }
  }

  // On to the next slice.
  __device__ __forceinline__ void end() {
    late_ = vectors_ < kRing;  // the next bitmaps are among the newest copies
    if (late_) commit_copies();
    slice_ += slices_.stride;
    vectors_ = next_vectors_;
  }

 private:
  template <class SomeWalk>
  __device__ __forceinline__ void park_hidden(SomeWalk& walk) const {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r)
      if (!visible(r)) walk.park(r);
  }

  // Turns the cursor to the next slice that has values. There always is something to copy, so that the loops
  // need no test for it: past the end the cursor stays where it was.
  __device__ __forceinline__ void turn_cursor() {
    const char* at;
    do {
      cursor_ += slices_.stride;
      if (cursor_ >= slices_.end) {
        left_ = INT_MAX;
        from_ -= step_;
        step_ = 0;
        return;
      }
      at = slices_.locate(cursor_, &left_);
    } while (left_ == 0);
    from_ = at + lane_ * 16;
    step_ = kSliceVectorBytes;
  }

  static __device__ __forceinline__ uint32_t next_slot(uint32_t slot) {
    if constexpr (kRing == 2) return slot ^ kSlotBytes;
    return slot == (kRing - 1) * kSlotBytes ? 0 : slot + kSlotBytes;
  }

  __device__ __forceinline__ void fetch_bitmaps(int slice) {
    const uint64_t* bitmap = slices_.bitmap + (int64_t{slice} * kSliceTokens + lane_) * slices_.words;
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
      const uint32_t to = staged_words_ + r * kWarpSize * kWordBytes;
      const uint64_t* from = bitmap + r * kWarpSize * slices_.words;
      if constexpr (!kStagesBitmaps) {
        load_bitmap(from, next_words_[r]);
      } else if constexpr (kWords == 4) {
        copy_async<16>(to, from);
      } else {
#pragma unroll
        for (int i = 0; i < kWords / 2; ++i)
          if (i < slices_.words) copy_async<8>(to + i * 8, from + i);
      }
    }
  }

  // A row's bitmap from memory, least significant bit first.
  __device__ __forceinline__ void load_bitmap(const uint64_t* from, uint32_t (&words)[kWords]) const {
    if constexpr (kWords == 4) {
      const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(from));
      words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 2) {
        const uint2 two =
            i < 2 * slices_.words ? __ldg(reinterpret_cast<const uint2*>(from) + i / 2) : make_uint2(0, 0);
        words[i] = two.x, words[i + 1] = two.y;
      }
    }
  }

  // Row r's bitmap, least significant bit first.
  __device__ __forceinline__ void read_bitmap(int r, uint32_t (&words)[kWords]) const {
    const uint32_t from = staged_words_ + r * kWarpSize * kWordBytes;
    if constexpr (kWords == 4) {
      load(from, words);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 2) {
        uint32_t two[2];
        load(from + i * 4, two);
        const bool held = kWords <= 4 || i / 2 < slices_.words;
        words[i] = held ? two[0] : 0, words[i + 1] = held ? two[1] : 0;
      }
    }
  }

  // Visits all values once more, straight from memory, where nothing can stall.
  template <class SomeWalk, class Visit>
  __device__ __forceinline__ void repeat(SomeWalk& walk, int head_dim, Visit& visit) const {
    int vectors;
    const char* from = slices_.locate(slice_, &vectors) + lane_ * 16;
    const uint64_t* bitmap = slices_.bitmap + (int64_t{slice_} * kSliceTokens + lane_) * slices_.words;
    uint32_t words[kRowsPerLane][kWords];
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) load_bitmap(bitmap + r * kWarpSize * slices_.words, words[r]);
    walk.start(words, head_dim);
    if (!whole()) park_hidden(walk);
#pragma unroll 1
    for (int vector = 0; vector < vectors; ++vector) {
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r) {
        const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(from + r * kRowsApart));
        walk.pairs[r][0] = loaded.x, walk.pairs[r][1] = loaded.y;
        walk.pairs[r][2] = loaded.z, walk.pairs[r][3] = loaded.w;
      }
      from += kSliceVectorBytes;
      walk.clamp();
#pragma unroll 1
      for (int i = 0; i < kVectorValues; ++i) {
        while (__any_sync(kFullWarp, walk.stalled())) walk.skip_zeros();
        walk.template visit_value<kWords>(0, visit);
        walk.advance(1);
#pragma unroll
        for (int r = 0; r < kRowsPerLane; ++r)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            walk.pairs[r][j] = __funnelshift_r(walk.pairs[r][j], j < 3 ? walk.pairs[r][j + 1] : 0, 16);
      }
    }
  }

  const Slices& slices_;
  const int lane_;
  const uint32_t staged_words_, staged_vectors_;  // of row 0: addresses in shared memory
  uint32_t read_ = 0, write_ = 0;                 // slots of the ring
  int slice_, vectors_ = 0, next_vectors_ = 0;
  uint32_t next_words_[kRowsPerLane][kWords];  // bitmaps, if not staged
  bool late_ = true;
  // The cursor: what is copied next.
  int cursor_, left_ = 0;
  uint32_t step_ = 0;
  const char* from_ = nullptr;
};

template <class... Others>
__host__ __device__ constexpr int first_of(int first, Others...) {
  return first;
}

// A walk through the slice of a feed, and what is done with every value.
template <class SomeFeed, class SomeWalk, class SomeVisit>
struct Tour {
  static constexpr int kWords = SomeFeed::kBitmapWords, kRing = SomeFeed::kRingVectors;
  SomeFeed& feed;
  SomeWalk& walk;
  SomeVisit& visit;
};
template <class SomeFeed, class SomeWalk, class SomeVisit>
Tour(SomeFeed&, SomeWalk&, SomeVisit&) -> Tour<SomeFeed, SomeWalk, SomeVisit>;

// Visits the vectors from `vector` to `until` of one tour, or of two at once: twice the independent
// instructions to fill the latencies of either. kDense: without a thought for runs of zeros.
template <bool kDense, int kLive, class... Tours>
__device__ __forceinline__ void visit_vectors(int vector, int until, Tours... tours) {
  constexpr int kRing = first_of(Tours::kRing...);
#pragma unroll 1
  for (; vector < until; ++vector) {
    wait_copies<kRing - 1>();
    (tours.feed.take_vector(tours.walk), ...);
#pragma unroll
    for (int i = 0; i < kVectorValues; ++i) {
      if constexpr (!kDense)
        while (__any_sync(kFullWarp, (tours.walk.stalled() || ...))) (tours.walk.skip_zeros(), ...);
      (tours.walk.template visit_value<kLive>(i, tours.visit), ...);
      if (i == 1) {
        (tours.feed.copy_vector(), ...);
        commit_copies();
      }
    }
    (tours.walk.advance(kVectorValues), ...);
  }
}

// The same, however far: in pieces at whose ends a cursor turns, or bitmaps have got a quarter shorter. For
// as many values, and with them at least as many bits, have gone then.
template <class... Tours>
__device__ __forceinline__ void visit(bool dense, int vector, int until, Tours... tours) {
  constexpr int kWords = first_of(Tours::kWords...), kShorter = (kWords + 3) / 4;
  constexpr int kShortFrom = kShorter * 32 / kVectorValues;
  while (vector < until) {
    const int left[] = {tours.feed.left()...};
    int stop = vector + min(until - vector, min(left[0], left[sizeof...(Tours) - 1]));
    if (!dense) {
      visit_vectors<false, kWords>(vector, stop, tours...);
    } else if (vector < kShortFrom) {
      stop = min(stop, kShortFrom);
      visit_vectors<true, kWords>(vector, stop, tours...);
    } else {
      visit_vectors<true, kWords - kShorter>(vector, stop, tours...);
    }
    (tours.feed.copied(stop - vector), ...);
    vector = stop;
  }
}

// All vectors of one tour, or of two.
template <class SomeTour>
__device__ __forceinline__ void visit_all(SomeTour tour) {
  visit(is_dense<SomeTour::kWords>(tour.feed.vectors()), 0, tour.feed.vectors(), tour);
}
template <class TourA, class TourB>
__device__ __forceinline__ void visit_both(TourA a, TourB b) {
  const int common = min(a.feed.vectors(), b.feed.vectors());
  const bool dense = is_dense<TourA::kWords>(common);
  visit(dense, 0, common, a, b);
  if (common < a.feed.vectors()) visit(dense, common, a.feed.vectors(), a);
  if (common < b.feed.vectors()) visit(dense, common, b.feed.vectors(), b);
}

}  // namespace mustafar::cuda
