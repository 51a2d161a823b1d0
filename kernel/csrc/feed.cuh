// Bringing slices to a warp one after another: bitmaps and values come straight to registers, a vector of
// values ahead of the walk and on from each slice into the next, so that memory is not waited for at a
// slice's start.
#pragma once

#include <climits>
#include <cstdint>

#include "rows.cuh"

namespace mustafar::cuda {

// The slice that a warp is at, of those it goes through.
class SliceCursor {
 public:
  // Whether the walk is at a slice.
  __device__ __forceinline__ bool more() const { return slice_ < slices_.end; }
  __device__ __forceinline__ int slice() const { return slice_; }
  // Whether all tokens of the slice are visible; and if not, which.
  __device__ __forceinline__ bool whole() const { return slices_.whole(slice_); }
  __device__ __forceinline__ bool visible(int row) const {
    return slices_.visible(slice_, lane_ + row * kWarpSize);
  }
  __device__ __forceinline__ int vectors() const { return vectors_; }
  // Takes hidden tokens out of a walk that has begun.
  template <class SomeWalk>
  __device__ __forceinline__ void hide(SomeWalk& walk) const {
    if (whole() || !more()) return;
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r)
      if (!visible(r)) walk.park(r);
  }

 protected:
  __device__ __forceinline__ SliceCursor(const Slices& slices, int lane)
      : slices_(slices), lane_(lane), slice_(slices.first - slices.stride) {}

  const Slices& slices_;
  const int lane_;
  int slice_, vectors_ = 0;
};

//   kWords  32-bit words of a row's bitmap, rounded up to what the kernel is compiled for
template <int kWords>
class Feed : public SliceCursor {
 public:
  static constexpr int kBitmapWords = kWords, kStagingBytes = 0;
  // Values of a vector that are visited before the next loads are started: 1 % faster than none, for ptxas
  // then has fewer scoreboards to give to them (README.md); 2 % slower where every value takes a vote.
  template <bool kGaps>
  static constexpr int kLoadAt = kGaps ? 0 : 2;
  static constexpr bool kShortens = true;  // has registers and room for code that spares a word of bitmaps

  // Starts the first loads. begin() goes to the first slice.
  __device__ __forceinline__ Feed(const Slices& slices, uint32_t /*staging*/, int lane)
      : SliceCursor(slices, lane) {
    if (slices.first >= slices.end) return;
    width_ = slices.width(slices.first);
    fetch();
    const int vectors = slices.vectors_of(width_);
    if (vectors > 0) {
      from_ = address(slices.first);
      load();
    }
  }

  // Starts loading the bitmaps of the next slice, or of any if there is none: once before every begin(), as
  // early as there are registers for them.
  __device__ __forceinline__ void fetch() {
    const int next = min(slice_ + slices_.stride, slices_.end - 1);
    const uint64_t* bitmap = slices_.bitmap + (int64_t{next} * kSliceTokens + lane_) * slices_.words;
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) load_bitmap(bitmap + r * kWarpSize * slices_.words, words_[r]);
    width_after_ = slices_.width(min(next + slices_.stride, slices_.end - 1));
  }

  // Goes on to the next slice and starts a walk over it. There need not be a next slice, but there must have
  // been a first. hide() is to follow.
  template <class SomeWalk>
  __device__ __forceinline__ void begin(SomeWalk& walk, int head_dim) {
    slice_ += slices_.stride;
    vectors_ = slices_.vectors_of(width_);
    walk.start(words_, head_dim);
    width_ = width_after_;
    // Nothing to go on to: the last vector is loaded once more.
    const int next = slice_ + slices_.stride;
    if (!slices_.general()) {
      jump_ = next < slices_.end ? ((slices_.stride - 1) * vectors_ + 1) * kSliceVectorBytes : 0;
    } else {
      jump_ = 0;
      if (next < slices_.end && slices_.vectors_of(width_) > 0) {
        const char* const to = address(next);
        jump_ = uniform(to - from_) - max(vectors_ - 1, 0) * kSliceVectorBytes;
        if (vectors_ == 0) {  // the vector ahead is the next slice's
          from_ = to;
          load();
        }
      }
    }
  }
  static __device__ __forceinline__ void wait() {}
  // The next vector becomes the one at work.
  __device__ __forceinline__ void take() {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i) vector_[r][i] = next_[r][i];
  }
  // Starts loading what follows vector `vector` of the slice, which has been taken.
  __device__ __forceinline__ void load_ahead(int vector) {
    from_ += vector + 1 < vectors_ ? kSliceVectorBytes : jump_;
    load();
  }
  static __device__ __forceinline__ void commit() {}
  // So many vectors can be loaded ahead after look_up() and before the next.
  static __device__ __forceinline__ int room() { return INT_MAX; }
  __device__ __forceinline__ void look_up() {}
  // Two values of row r, of the vector at work.
  __device__ __forceinline__ uint32_t pair(int r, int i) const { return vector_[r][i]; }

 private:
  __device__ __forceinline__ void load() {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) load_once(from_ + r * (kWarpSize * 16), next_[r]);
  }
  static __device__ __forceinline__ int64_t uniform(int64_t x) {
    return __shfl_sync(kFullWarp, x, 0);  // so that the compiler knows it uniform
  }
  // Of the first vector of the lane's first row.
  __device__ __forceinline__ const char* address(int slice) const {
    return slices_.first_vector(slice) + lane_ * 16;
  }

  // A row's bitmap from memory, least significant bit first.
  __device__ __forceinline__ void load_bitmap(const uint64_t* from, uint32_t (&words)[kWords]) const {
    if constexpr (kWords == 4) {
      load_once(from, words);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 2) {
        const uint2 two =
            i < 2 * slices_.words ? __ldg(reinterpret_cast<const uint2*>(from) + i / 2) : make_uint2(0, 0);
        words[i] = two.x, words[i + 1] = two.y;
      }
    }
  }

  uint32_t words_[kRowsPerLane][kWords];  // bitmaps of the next slice
  int32_t width_ = 0, width_after_ = 0;   // of the next slice and the one after it, in the general layout
  uint32_t vector_[kRowsPerLane][4], next_[kRowsPerLane][4];  // at work, and the one after it
  const char* from_ = nullptr;                                // of the last vector loaded
  int64_t jump_ = 0;  // from a slice's last vector to the next slice's first
};

template <class First, class... Others>
__host__ __device__ constexpr First first_of(First first, Others...) {
  return first;
}

__device__ __forceinline__ uint32_t least_of(uint32_t a) { return a; }
__device__ __forceinline__ uint32_t least_of(uint32_t a, uint32_t b) { return min(a, b); }

// A walk through the slice of a feed, and what is done with every value.
template <class SomeFeed, class SomeWalk, class SomeVisit>
struct Tour {
  static constexpr int kWords = SomeWalk::kWords;
  template <bool kGaps>
  static constexpr int kLoadAt = SomeFeed::template kLoadAt<kGaps>;
  static constexpr bool kShortens = SomeFeed::kShortens;
  SomeFeed& feed;
  SomeWalk& walk;
  SomeVisit& visit;

  template <int kLive>
  __device__ __forceinline__ void visit_value(int i) {
#pragma unroll
    for (int n = 0; n < kRowsPerLane; ++n) {
      const int r = SomeVisit::kSecondRowFirst ? kRowsPerLane - 1 - n : n;
      walk.template visit_value<kLive>(r, i, feed.pair(r, i / 2), visit);
    }
  }
};
template <class SomeFeed, class SomeWalk, class SomeVisit>
Tour(SomeFeed&, SomeWalk&, SomeVisit&) -> Tour<SomeFeed, SomeWalk, SomeVisit>;

// Visits one vector. kGaps: rows may have runs of 32 zeros.
template <bool kGaps, int kLive, class... Tours>
__device__ __forceinline__ void visit_vector(int vector, Tours... tours) {
  first_of(tours...).feed.wait();
  (tours.feed.take(), ...);
#pragma unroll
  for (int i = 0; i < kVectorValues; ++i) {
    if (i == first_of(Tours::template kLoadAt<kGaps>...)) {
      (tours.feed.load_ahead(vector), ...);
      first_of(tours...).feed.commit();
    }
    if (i == kVectorValues / 2) (tours.walk.halfway(), ...);
    if constexpr (kGaps)
      while (__any_sync(kFullWarp, least_of(tours.walk.least()...) == 0)) (tours.walk.skip_zeros(), ...);
    (tours.template visit_value<kLive>(i), ...);
  }
  (tours.walk.advance(), ...);
}

// Visits the vectors from `vector` to `until` of one tour, or of two at once: twice the independent
// instructions to fill the latencies of either.
template <bool kGaps, int kLive, class... Tours>
__device__ __forceinline__ void visit_vectors(int vector, int until, Tours... tours) {
#pragma unroll 1
  for (; vector < until; ++vector) visit_vector<kGaps, kLive>(vector, tours...);
}
// The same, whatever the rows and the layout.
template <class... Tours>
__device__ __forceinline__ void visit(int vector, int until, Tours... tours) {
  constexpr int kWords = first_of(Tours::kWords...), kEarly = 32 / kVectorValues;
  const bool gaps = __any_sync(kFullWarp, (tours.walk.has_gap || ...));
  while (vector < until) {  // once, but for staged slices of the general layout
    (tours.feed.look_up(), ...);
    const int room[] = {tours.feed.room()...};
    const int stop = vector + min(until - vector, min(room[0], room[sizeof...(Tours) - 1]));
    if (gaps) {
      visit_vectors<true, kWords>(vector, stop, tours...);
    } else if constexpr (kWords == 4 && (Tours::kShortens && ...)) {  // 32 values use up a word of the bitmap
      visit_vectors<false, kWords>(vector, min(stop, kEarly), tours...);
      visit_vectors<false, kWords - 1>(max(vector, kEarly), stop, tours...);
    } else {
      visit_vectors<false, kWords>(vector, stop, tours...);
    }
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
