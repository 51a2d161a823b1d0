// Where rows of a compressed tensor lie.
#pragma once

#include <algorithm>

#include "simd.h"

namespace mustafar::cpu {

constexpr int words_for(int head_dim) { return (head_dim + 63) / 64; }

// Finds rows of a view of either layout.
class PackedReader {
 public:
  PackedReader(const CompressedView& view, int head_dim, DType dtype)
      : view_(view),
        dtype_(dtype),
        words_(words_for(head_dim)),
        groups_(static_cast<int>(round_up(head_dim, kGroup) / kGroup)) {}

  // Channels of an expanded row, whole groups.
  int64_t pitch() const { return static_cast<int64_t>(groups_) * kGroup; }

  // Rows `token` .. `token + rows - 1`, which must lie in one slice.
  PackedRows rows(int64_t b, int64_t h, int64_t token, int rows) const {
    const int64_t slice = token / kSliceTokens, row = token % kSliceTokens;
    const uint64_t* bitmap =
        view_.bitmap + b * view_.bitmap_batch_stride + h * view_.bitmap_head_stride + token * words_;
    int32_t width = view_.width;
    int64_t first = row * kVectorValues;
    if (view_.offsets == nullptr) {
      first += b * view_.values_batch_stride + h * view_.values_head_stride + slice * kSliceTokens * width;
    } else {
      width = view_.widths[b * view_.widths_batch_stride + h * view_.widths_head_stride + slice];
      first += view_.offsets[b * view_.offsets_batch_stride + h * view_.offsets_head_stride + slice];
    }
    return {bitmap, at(view_.values, first, dtype_), words_, width, rows, groups_};
  }

  // As many rows from `token` on as there are: not past `end`, nor past the slice.
  PackedRows rows_until(int64_t b, int64_t h, int64_t token, int64_t end) const {
    return rows(b, h, token, static_cast<int>(std::min(kSliceTokens - token % kSliceTokens, end - token)));
  }

 private:
  const CompressedView& view_;
  DType dtype_;
  int32_t words_, groups_;
};

}  // namespace mustafar::cpu
