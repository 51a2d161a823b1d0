// Bringing slices to a warp one after another: their values in a ring of vectors in shared memory that runs
// on from each slice into the next, so that memory is never waited for at a slice's start.
#pragma once

#include <climits>
#include <cstdint>

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

  // Starts the first copies. wait_bitmaps(0) and begin() go to the first slice.
  __device__ __forceinline__ Feed(const Slices& slices, uint32_t staging, int lane)
      : slices_(slices),
        lane_(lane),
        staged_words_(staging + lane * kWordBytes),
        staged_vectors_(staging + kStagingBytes - kRing * kSlotBytes + lane * 16),
        slice_(slices.first - slices.stride),
        cursor_(slice_) {
    if (slices.first < slices.end) {
      fetch_bitmaps(slices.first);
      next_width_ = slices_.width(slices.first);
      if (!slices.general()) {
        from_ = slices.uniform_values(slices.first) + lane * 16;
        left_ = slices.vectors;
        to_copy_ = ((slices.end - slices.first - 1) / slices.stride + 1) * left_;
        jump_ = ((slices.stride - 1) * left_ + 1) * kSliceVectorBytes;
      }
#pragma unroll
      for (int i = 0; i < kRing; ++i) {
        look_up();
        copy_vector();
      }
    }
    commit_copies();
  }

  // Whether the walk is at a slice.
  __device__ __forceinline__ bool more() const { return slice_ < slices_.end; }
  __device__ __forceinline__ int slice() const { return slice_; }
  // Whether all tokens of the slice are visible; and if not, which.
  __device__ __forceinline__ bool whole() const { return slices_.whole(slice_); }
  __device__ __forceinline__ bool visible(int row) const {
    return slices_.visible(slice_, lane_ + row * kWarpSize);
  }
  __device__ __forceinline__ int vectors() const { return vectors_; }

  // Waits for the bitmaps of the next slice, when so many vectors have been walked since the last time.
  static __device__ __forceinline__ void wait_bitmaps(int vectors) {
    if (vectors < kRing)
      wait_copies<0>();
    else
      wait_copies<kRing - 1>();
  }

  // Goes on to the next slice, starts a walk over it, and the copies of the bitmaps after that. There need
  // not be a next slice, but there must have been a first. hide() is to follow.
  template <class SomeWalk>
  __device__ __forceinline__ void begin(SomeWalk& walk, int head_dim) {
    slice_ += slices_.stride;
    vectors_ = slices_.vectors_of(next_width_);
    if constexpr (kStagesBitmaps) {
      uint32_t words[kRowsPerLane][kWords];
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r) read_bitmap(r, words[r]);
      walk.start(words, head_dim);
    } else {
      walk.start(next_words_, head_dim);
    }
    const int next = min(slice_ + slices_.stride, slices_.end - 1);  // any slice will do after the last
    fetch_bitmaps(next);
    next_width_ = slices_.width(next);
  }
  // Takes hidden tokens out of a walk that has begun.
  template <class SomeWalk>
  __device__ __forceinline__ void hide(SomeWalk& walk) const {
    if (whole() || !more()) return;
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r)
      if (!visible(r)) walk.park(r);
  }

  // The next vector of both rows, whose copies have been waited for, to the walk.
  template <class SomeWalk>
  __device__ __forceinline__ void take_vector(SomeWalk& walk) {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) load(staged_vectors_ + slot_ + r * kRowsApart, walk.pairs[r]);
  }

  // Copies one vector of both rows, if there is one left, to the slot of the ring whose vector has been
  // taken. Every step of a walk commits one group, so that the newest kRing - 1 are never needed by the next.
  __device__ __forceinline__ void copy_vector() {
    if (to_copy_ > 0) {
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r)
        copy_async<16>(staged_vectors_ + slot_ + r * kRowsApart, from_ + r * kRowsApart);
    }
    --to_copy_;
    const bool last = --left_ == 0;  // of its slice
    from_ += last ? jump_ : kSliceVectorBytes;
    left_ = last ? slices_.vectors : left_;
    slot_ = next_slot(slot_);
  }
  // So many vectors can be copied after look_up() and before the next.
  __device__ __forceinline__ int room() const { return slices_.general() ? left_ : INT_MAX; }
  // In the general layout, goes to the next slice that has values when those of this one have been copied.
  __device__ __forceinline__ void look_up() {
    if (!slices_.general() || left_ > 0) return;
    do {
      cursor_ += slices_.stride;
      if (cursor_ >= slices_.end) {
        to_copy_ = 0, left_ = INT_MAX;
        return;
      }
      left_ = slices_.vectors_of(slices_.width(cursor_));
    } while (left_ == 0);
    to_copy_ = left_;
    from_ = slices_.general_values(cursor_) + lane_ * 16;
  }

 private:
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

  const Slices& slices_;
  const int lane_;
  const uint32_t staged_words_, staged_vectors_;  // of row 0: addresses in shared memory
  uint32_t slot_ = 0;                             // of the ring, at work
  int slice_, vectors_ = 0;
  uint32_t next_words_[kRowsPerLane][kWords];  // bitmaps, if not staged
  int32_t next_width_ = 0;
  // What is copied next.
  int cursor_, left_ = 0, to_copy_ = 0;  // the slice, in the general layout; vectors left of it, and in all
  uint32_t jump_ = 0;                    // from a slice's last vector to the next slice's first
  const char* from_ = nullptr;
};

template <class... Others>
__host__ __device__ constexpr int first_of(int first, Others...) {
  return first;
}

// A walk through the slice of a feed, and what is done with every value.
template <class SomeFeed, class SomeWalk, class SomeVisit>
struct Tour {
  static constexpr int kRing = SomeFeed::kRingVectors;
  SomeFeed& feed;
  SomeWalk& walk;
  SomeVisit& visit;
};
template <class SomeFeed, class SomeWalk, class SomeVisit>
Tour(SomeFeed&, SomeWalk&, SomeVisit&) -> Tour<SomeFeed, SomeWalk, SomeVisit>;

// Visits the vectors from `vector` to `until` of one tour, or of two at once: twice the independent
// instructions to fill the latencies of either. kGaps: rows may have runs of 32 zeros.
template <bool kGaps, class... Tours>
__device__ __forceinline__ void visit_vectors(int vector, int until, Tours... tours) {
  constexpr int kRing = first_of(Tours::kRing...);
#pragma unroll 1
  for (; vector < until; ++vector) {
    wait_copies<kRing - 1>();
    (tours.feed.take_vector(tours.walk), ...);
#pragma unroll
    for (int i = 0; i < kVectorValues; ++i) {
      if constexpr (kGaps)
        while (__any_sync(kFullWarp, (tours.walk.stalled() || ...))) (tours.walk.skip_zeros(), ...);
      (tours.walk.visit_value(i, tours.visit), ...);
      if (i == 1) {
        (tours.feed.copy_vector(), ...);
        commit_copies();
      }
    }
    (tours.walk.advance(), ...);
  }
}

// The same, whatever the rows and the layout.
template <class... Tours>
__device__ __forceinline__ void visit(int vector, int until, Tours... tours) {
  const bool gaps = __any_sync(kFullWarp, (tours.walk.has_gap || ...));
  while (vector < until) {  // once, but for the general layout
    (tours.feed.look_up(), ...);
    const int room[] = {tours.feed.room()...};
    const int stop = vector + min(until - vector, min(room[0], room[sizeof...(Tours) - 1]));
    if (gaps)
      visit_vectors<true>(vector, stop, tours...);
    else
      visit_vectors<false>(vector, stop, tours...);
    vector = stop;
  }
}

// All vectors of a tour.
template <class SomeTour>
__device__ __forceinline__ void visit_all(SomeTour tour) {
  visit(0, tour.feed.vectors(), tour);
}
// Vectors of two tours, as many as are said.
template <class TourA, class TourB>
__device__ __forceinline__ void visit_both(TourA a, int vectors_a, TourB b, int vectors_b) {
  const int common = min(vectors_a, vectors_b);
  visit(0, common, a, b);
  visit(common, vectors_a, a);
  visit(common, vectors_b, b);
}

}  // namespace mustafar::cuda
