// What a sequence's lengths, padding and sliding window leave to read, and how its slices are dealt to warps.
#pragma once

#include <cstdint>

#include "../params.h"
#include "plan.cuh"
#include "rows.cuh"

namespace mustafar::cuda {

// 64 tokens to attend to: a slice of the compressed tokens or as many rows of the dense window.
struct Unit {
  bool window;
  int32_t index;
};

// A window unit walks D values a row where a slice at 70 % walks 0.3 D: it counts as three slices.
constexpr int kWindowUnitCost = 3;

struct Sequence {
  int32_t first_visible, compressed, total;  // positions
  int32_t first_slice, slices;               // with something visible
  int32_t first_window_unit, window_units;

  __device__ __forceinline__ Sequence(const DecodeAttentionParams& p, int64_t b) {
    compressed = max(0, min(p.lengths[2 * b], p.slices * kSliceTokens));
    total = compressed + max(0, min(p.lengths[2 * b + 1], p.window_capacity));
    first_visible = p.starts == nullptr ? 0 : max(0, p.starts[b]);
    if (p.sliding_window > 0) first_visible = max(first_visible, total - p.sliding_window);
    units(first_visible, compressed, &first_slice, &slices);
    units(max(0, first_visible - compressed), total - compressed, &first_window_unit, &window_units);
  }

  __device__ __forceinline__ bool nothing_visible() const { return first_visible >= total; }

  // Whether a unit's row `token` may be attended to.
  __device__ __forceinline__ bool visible(const Unit& unit, int token) const {
    const int row = unit.index * kSliceTokens + token;
    return unit.window ? row >= first_visible - compressed && row < total - compressed
                       : row >= first_visible && row < compressed;
  }

  // Deals units to `warps` warps; false when warp `self` has no more than `turn` of them. The first warps get
  // the window, and while they work on it the others take slices.
  __device__ __forceinline__ bool deal(int self, int warps, int turn, Unit* unit) const {
    const int others = warps - window_units;
    int slice;
    if (others <= 0) {
      slice = turn * warps + self - window_units;
    } else if (self < window_units) {
      slice = turn == 0 ? -1 : kWindowUnitCost * others + (turn - 1) * warps + self;
    } else {
      slice = turn < kWindowUnitCost ? turn * others + self - window_units
                                     : kWindowUnitCost * others + (turn - kWindowUnitCost) * warps + self;
    }
    unit->window = slice < 0;
    unit->index =
        slice >= 0 ? first_slice + slice : first_window_unit + (others <= 0 ? turn * warps : 0) + self;
    return slice < slices;
  }

 private:
  static __device__ __forceinline__ void units(int begin, int end, int32_t* first, int32_t* count) {
    *first = begin / kSliceTokens;
    *count = begin < end ? (end + kSliceTokens - 1) / kSliceTokens - *first : 0;
  }
};

struct DenseWindow {
  const void* rows;
  int64_t batch_stride, head_stride, token_stride;
  int32_t head_dim;
};

// Location and rows of a unit of keys or values.
__device__ __forceinline__ Location locate(const Unit& unit, const CompressedView& view,
                                           const DenseWindow& window, int64_t b, int head) {
  if (!unit.window) return locate(view, b, head, unit.index);
  return {b * window.batch_stride + head * window.head_stride +
              int64_t{unit.index} * kSliceTokens * window.token_stride,
          window.head_dim};
}

__device__ __forceinline__ RowSource unit_rows(const Unit& unit, const Location& location,
                                               const CompressedView& view, const DenseWindow& window,
                                               int64_t b, int head, int bitmap_words) {
  if (!unit.window) return slice_rows(view, location, b, head, unit.index, bitmap_words);
  return {nullptr, static_cast<const uint4*>(window.rows) + location.first / kVectorValues,
          location.width / kVectorValues, static_cast<int32_t>(window.token_stride / kVectorValues), 1};
}

}  // namespace mustafar::cuda
