// As Feed, by way of shared memory: a ring of vectors that runs on from each slice into the next. It costs
// shared memory and its bandwidth, and hides more latency: for kernels that have registers or room for few
// warps. Unlike a load into registers an outstanding copy holds none of the six scoreboards of a warp.
#pragma once

#include <cstdint>

#include "rows.cuh"
#include "shared.cuh"

namespace mustafar::cuda {

// Lanes stage and read nothing but their own rows, so no barrier is needed.
//   kWords  32-bit words of a row's bitmap, rounded up to what the kernel is compiled for: 4
template <int kWords>
class StagedFeed {
  static_assert(kWords == 4, "bitmaps are copied 16 bytes at once");
  static constexpr int kRing = 2;  // vectors of each row that are staged, there or on their way
  static constexpr int kSlotBytes = kSliceVectorBytes, kWordBytes = kWords * 4;
  static constexpr int kRowsApart = kWarpSize * 16;  // bytes between vectors of a lane's rows

 public:
  static constexpr int kBitmapWords = kWords;
  static constexpr int kLoadAt = 2;  // values of a vector are visited before the next copies are started
  static constexpr int kStagingBytes = kSliceTokens * kWordBytes + kRing * kSlotBytes;  // of a warp

  __device__ __forceinline__ StagedFeed(const Slices& slices, uint32_t staging, int lane)
      : slices_(slices),
        lane_(lane),
        staged_words_(staging + lane * kWordBytes),
        staged_vectors_(staging + kSliceTokens * kWordBytes + lane * 16),
        slice_(slices.first - slices.stride),
        cursor_(slice_) {
    if (slices.first < slices.end) {
      fetch_bitmaps(slices.first);
      width_ = slices.width(slices.first);
#pragma unroll
      for (int i = 0; i < kRing; ++i) copy_vector();
    }
    commit_copies();
  }

  __device__ __forceinline__ bool more() const { return slice_ < slices_.end; }
  __device__ __forceinline__ int slice() const { return slice_; }
  __device__ __forceinline__ bool whole() const { return slices_.whole(slice_); }
  __device__ __forceinline__ bool visible(int row) const {
    return slices_.visible(slice_, lane_ + row * kWarpSize);
  }
  __device__ __forceinline__ int vectors() const { return vectors_; }

  __device__ __forceinline__ void fetch() {}  // begin() does
  template <class SomeWalk>
  __device__ __forceinline__ void begin(SomeWalk& walk, int head_dim) {
    // The bitmaps were copied when the last slice began, before its first vector's group was committed.
    if (walked_ < kRing)
      wait_all_copies();
    else
      wait_copies<kRing - 1>();
    walked_ = 0;
    slice_ += slices_.stride;
    vectors_ = slices_.vectors_of(width_);
    uint32_t words[kRowsPerLane][kWords];
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) load(staged_words_ + r * kWarpSize * kWordBytes, words[r]);
    walk.start(words, head_dim);
    const int next = min(slice_ + slices_.stride, slices_.end - 1);  // any slice will do after the last
    fetch_bitmaps(next);
    width_ = slices_.width(next);
  }
  template <class SomeWalk>
  __device__ __forceinline__ void hide(SomeWalk& walk) const {
    if (whole() || !more()) return;
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r)
      if (!visible(r)) walk.park(r);
  }

  __device__ __forceinline__ void take() {
    wait_copies<kRing - 1>();
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) load(staged_vectors_ + slot_ + r * kRowsApart, vector_[r]);
  }
  // Copies one vector of both rows, if there is one left, to the slot whose vector has been taken. Every step
  // of a walk commits one group, so that the newest kRing - 1 are never needed by the next.
  __device__ __forceinline__ void load_ahead(int /*vector*/) {
    ++walked_;
    copy_vector();
  }
  static __device__ __forceinline__ void commit() { commit_copies(); }
  __device__ __forceinline__ uint32_t pair(int r, int i) const { return vector_[r][i]; }

 private:
  __device__ __forceinline__ void copy_vector() {
    if (left_ == 0) next_slice();
    if (left_ > 0) {
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r)
        copy_async<16>(staged_vectors_ + slot_ + r * kRowsApart, from_ + r * kRowsApart);
      from_ += kSliceVectorBytes;
      --left_;
    }
    slot_ ^= kSlotBytes;
  }
  // Goes to the next slice that has values, to copy them.
  __device__ __forceinline__ void next_slice() {
    while (left_ == 0 && cursor_ + slices_.stride < slices_.end) {
      cursor_ += slices_.stride;
      left_ = slices_.vectors_of(slices_.width(cursor_));
      if (left_ > 0) from_ = slices_.first_vector(cursor_) + lane_ * 16;
    }
  }
  __device__ __forceinline__ void fetch_bitmaps(int slice) {
    const uint64_t* bitmap = slices_.bitmap + (int64_t{slice} * kSliceTokens + lane_) * slices_.words;
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r)
      copy_async<16>(staged_words_ + r * kWarpSize * kWordBytes, bitmap + r * kWarpSize * slices_.words);
  }

  const Slices& slices_;
  const int lane_;
  const uint32_t staged_words_, staged_vectors_;  // of row 0: addresses in shared memory
  uint32_t slot_ = 0;                             // of the ring, at work
  int slice_, vectors_ = 0, walked_ = 0;          // the last: vectors of this slice that have been taken
  int32_t width_ = 0;                             // of the next slice
  uint32_t vector_[kRowsPerLane][4];              // at work
  int cursor_, left_ = 0;                         // the slice that is copied, and its vectors to come
  const char* from_ = nullptr;
};

}  // namespace mustafar::cuda
