// As Feed, by way of shared memory: a ring of vectors that runs on from each slice into the next. It costs
// shared memory and its bandwidth, and hides more latency: for kernels with fewer warps. Unlike a load into
// registers an outstanding copy holds none of the six scoreboards of a warp.
#pragma once

#include <climits>
#include <cstdint>

#include "feed.cuh"
#include "rows.cuh"
#include "shared.cuh"

namespace mustafar::cuda {

// Lanes stage and read nothing but their own rows, so no barrier is needed.
//   kWords  32-bit words of a row's bitmap, rounded up to what the kernel is compiled for
template <int kWords>
class StagedFeed : public SliceCursor {
  static constexpr int kRing =
      2;  // vectors of each row that are staged, there or on their way (3: not faster)
  static constexpr int kWordBytes = kWords * 4;
  static constexpr int kSlotBytes = kSliceVectorBytes;
  static constexpr int kRowsApart = kWarpSize * 16;  // bytes between vectors of a lane's rows

 public:
  static constexpr int kBitmapWords = kWords;
  static constexpr int kStagingBytes = kSliceTokens * kWordBytes + kRing * kSlotBytes;  // of a warp
  template <bool kGaps>
  static constexpr int kLoadAt = 0;  // as in Feed. 2: value_output 3 %, groups of 6 2 % slower
  static constexpr bool kShortens = false;

  // Starts the first copies. fetch() and begin() go to the first slice.
  __device__ __forceinline__ StagedFeed(const Slices& slices, uint32_t staging, int lane)
      : SliceCursor(slices, lane),
        staged_words_(staging + lane * kWordBytes),
        staged_vectors_(staging + kStagingBytes - kRing * kSlotBytes + lane * 16),
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
        load_ahead(0);
      }
    }
    commit_copies();
  }

  // Waits for the bitmaps of the next slice: they were copied when this one began.
  __device__ __forceinline__ void fetch() const {
    if (vectors_ < kRing)
      wait_all_copies();
    else
      wait_copies<kRing - 1>();
  }

  // Goes on to the next slice, starts a walk over it, and the copies of the bitmaps after that. There need
  // not be a next slice, but there must have been a first. hide() is to follow.
  template <class SomeWalk>
  __device__ __forceinline__ void begin(SomeWalk& walk, int head_dim) {
    slice_ += slices_.stride;
    vectors_ = slices_.vectors_of(next_width_);
    uint32_t words[kRowsPerLane][kWords];
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) read_bitmap(r, words[r]);
    walk.start(words, head_dim);
    const int next = min(slice_ + slices_.stride, slices_.end - 1);  // any slice will do after the last
    fetch_bitmaps(next);
    next_width_ = slices_.width(next);
  }
  // Waits for the next vector of the walks, and takes it.
  static __device__ __forceinline__ void wait() { wait_copies<kRing - 1>(); }
  __device__ __forceinline__ void take() {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) load(staged_vectors_ + slot_ + r * kRowsApart, vector_[r]);
  }
  // Two values of row r, of the vector at work.
  __device__ __forceinline__ uint32_t pair(int r, int i) const { return vector_[r][i]; }

  // Copies one vector of both rows, if there is one left, to the slot of the ring whose vector has been
  // taken. Every step of a walk commits one group, so that the newest kRing - 1 are never needed by the next.
  __device__ __forceinline__ void load_ahead(int /*vector*/) {
    if (to_copy_ > 0) {
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r)
        copy_async<16>(staged_vectors_ + slot_ + r * kRowsApart, from_ + r * kRowsApart);
    }
    --to_copy_;
    const bool last = --left_ == 0;  // of its slice
    from_ += last ? jump_ : kSliceVectorBytes;
    left_ = last ? slices_.vectors : left_;
    slot_ ^= kSlotBytes;  // of two
  }
  static __device__ __forceinline__ void commit() { commit_copies(); }
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
  __device__ __forceinline__ void fetch_bitmaps(int slice) {
    const uint64_t* bitmap = slices_.bitmap + (int64_t{slice} * kSliceTokens + lane_) * slices_.words;
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
      const uint32_t to = staged_words_ + r * kWarpSize * kWordBytes;
      const uint64_t* from = bitmap + r * kWarpSize * slices_.words;
      if constexpr (kWords == 4) {
        copy_async<16>(to, from);
      } else {
#pragma unroll
        for (int i = 0; i < kWords / 2; ++i)
          if (i < slices_.words) copy_async<8>(to + i * 8, from + i);
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

  const uint32_t staged_words_, staged_vectors_;  // of row 0: addresses in shared memory
  uint32_t slot_ = 0;                             // of the ring, at work
  int32_t next_width_ = 0;
  uint32_t vector_[kRowsPerLane][4];  // at work
  // What is copied next.
  int cursor_, left_ = 0, to_copy_ = 0;  // the slice, in the general layout; vectors left of it, and in all
  uint32_t jump_ = 0;                    // from a slice's last vector to the next slice's first
  const char* from_ = nullptr;
};

}  // namespace mustafar::cuda
