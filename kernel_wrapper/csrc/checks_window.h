// Checks of window_advance and window_append, and their parameters. One place for both devices, as checks.h.
#pragma once

#include <ATen/MemoryOverlap.h>

#include "../../kernel/window.h"
#include "checks.h"

namespace mustafar {

inline void check_counters(const at::Tensor& tensor, const at::Tensor& like, at::ScalarType dtype,
                           int64_t numel, const char* name) {
  check_device(tensor, like, name);
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype && tensor.numel() == numel && tensor.is_contiguous(), name,
                    ": expected ", numel, " contiguous ", dtype, ", got ", tensor.scalar_type(), " ",
                    tensor.sizes());
}

// What an op writes must not be one memory under several indices, as expand() makes it.
inline void check_written(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(at::has_internal_overlap(tensor) != at::MemOverlap::Yes, name,
                    ": expected memory of its own for every element, as it is written to, got strides ",
                    tensor.strides());
}

inline WindowAdvanceParams window_advance_params(const at::Tensor& state, const at::Tensor& lengths,
                                                 const at::Tensor& total, int64_t residual,
                                                 int64_t flush_every, int64_t max_length) {
  check_counters(state, state, at::kInt, kWindowEntries, "state");
  check_dim(lengths, 2, "lengths", "[B, 2]");
  check_counters(lengths, state, at::kInt, 2 * lengths.size(0), "lengths");
  check_counters(total, state, at::kLong, 1, "total");
  check_written(state, "state");
  check_written(lengths, "lengths");
  for (const auto& [value, least, name] :
       {std::tuple{residual, int64_t{0}, "residual"}, std::tuple{flush_every, int64_t{1}, "flush_every"},
        std::tuple{max_length, int64_t{0}, "max_length"}}) {
    TORCH_CHECK_VALUE(value >= least && value <= INT32_MAX / 2, name, ": expected ", least, " to ",
                      INT32_MAX / 2, " tokens, got ", value);
  }
  WindowAdvanceParams p{};
  p.state = state.mutable_data_ptr<int32_t>();
  p.lengths = lengths.mutable_data_ptr<int32_t>();
  p.total = total.mutable_data_ptr<int64_t>();
  p.batch = lengths.size(0), p.residual = residual, p.flush_every = flush_every;
  p.max_length = max_length;
  return p;
}

// The arguments of one side, as messages name them.
struct WindowNames {
  const char *x, *bitmap, *values, *store, *window, *kept;
};
constexpr WindowNames kKeyNames{"k", "k_store.bitmap", "k_store.values", "k_store", "k_window", "k_kept"};
constexpr WindowNames kValueNames{"v", "v_store.bitmap", "v_store.values", "v_store", "v_window", "v_kept"};

inline WindowSide window_side(const WindowNames& names, const at::Tensor& x, const at::Tensor& bitmap,
                              const at::Tensor& values, const at::Tensor& window, int64_t kept) {
  check_dim(x, 4, names.x, "[B, Hkv, 1, D]");
  TORCH_CHECK_VALUE(x.size(2) == 1, names.x, ".shape: expected one token, got ", x.sizes());
  TORCH_CHECK_VALUE(x.size(3) > 0 && x.size(3) <= kMaxHeadDim, names.x,
                    ".shape: expected a head_dim of 1 to ", kMaxHeadDim, ", got ", x.sizes());
  check_rows(x, names.x);
  TORCH_CHECK_VALUE(kept >= 1 && kept <= x.size(3), names.kept, ": expected 1 to ", x.size(3),
                    " values kept per row, got ", kept);
  check_dim(bitmap, 5, names.bitmap, "[B, Hkv, S, 64, W]");
  TORCH_CHECK_VALUE(bitmap.size(0) == x.size(0) && bitmap.size(1) == x.size(1), names.bitmap,
                    ".shape: expected [", x.size(0), ", ", x.size(1), ", ...], got ", bitmap.sizes());
  check_device(bitmap, x, names.bitmap);
  check_device(values, x, names.values);
  const OptionalTensor none;
  const CompressedView view = view_of({names.store, bitmap, values, none, none}, x.size(3), x.scalar_type());
  TORCH_CHECK_VALUE(view.width == (kept + kVectorValues - 1) / kVectorValues * kVectorValues, names.values,
                    ".shape: expected slots for ", kept, " values, got ", values.sizes());
  check_dim(window, 4, names.window, "[B, Hkv, capacity, D]");
  TORCH_CHECK_VALUE(window.size(0) == x.size(0) && window.size(1) == x.size(1) && window.size(3) == x.size(3),
                    names.window, ".shape: expected [", x.size(0), ", ", x.size(1), ", capacity, ", x.size(3),
                    "], got ", window.sizes());
  TORCH_CHECK_TYPE(window.scalar_type() == x.scalar_type(), names.window, ".dtype: expected ",
                   x.scalar_type(), ", got ", window.scalar_type());
  check_device(window, x, names.window);
  check_rows(window, names.window);
  check_written(bitmap, names.bitmap);
  check_written(values, names.values);
  check_written(window, names.window);

  WindowSide side{};
  side.x = x.const_data_ptr();
  side.window = window.mutable_data_ptr();
  side.bitmap = reinterpret_cast<uint64_t*>(bitmap.mutable_data_ptr<int64_t>());
  side.values = values.mutable_data_ptr();
  side.x_batch_stride = x.stride(0), side.x_head_stride = x.stride(1);
  side.window_batch_stride = window.stride(0), side.window_head_stride = window.stride(1);
  side.window_token_stride = window.stride(2);
  side.bitmap_batch_stride = view.bitmap_batch_stride, side.bitmap_head_stride = view.bitmap_head_stride;
  side.values_batch_stride = view.values_batch_stride, side.values_head_stride = view.values_head_stride;
  side.kept = kept, side.width = view.width;
  return side;
}

inline WindowAppendParams window_append_params(const at::Tensor& k, const at::Tensor& v,
                                               const at::Tensor& k_bitmap, const at::Tensor& k_values,
                                               const at::Tensor& v_bitmap, const at::Tensor& v_values,
                                               const at::Tensor& k_window, const at::Tensor& v_window,
                                               const at::Tensor& state, int64_t k_kept, int64_t v_kept) {
  WindowAppendParams p{};
  p.dtype = dtype_of(k, "k");
  TORCH_CHECK_VALUE(v.sizes() == k.sizes() && v.scalar_type() == k.scalar_type() && v.device() == k.device(),
                    "v: expected shape, dtype and device of k, ", k.sizes(), " ", k.scalar_type(), " on ",
                    k.device(), ", got ", v.sizes(), " ", v.scalar_type(), " on ", v.device());
  p.key = window_side(kKeyNames, k, k_bitmap, k_values, k_window, k_kept);
  p.value = window_side(kValueNames, v, v_bitmap, v_values, v_window, v_kept);
  TORCH_CHECK_VALUE(k_bitmap.size(2) == v_bitmap.size(2), "v_store.bitmap.shape: expected the ",
                    k_bitmap.size(2), " slices of k_store, got ", v_bitmap.sizes());
  TORCH_CHECK_VALUE(k_window.size(2) == v_window.size(2),
                    "v_window.shape: expected the capacity of k_window, ", k_window.size(2), ", got ",
                    v_window.sizes());
  check_counters(state, k, at::kInt, kWindowEntries, "state");
  p.state = state.const_data_ptr<int32_t>();
  p.batch = k.size(0), p.kv_heads = k.size(1), p.head_dim = k.size(3);
  p.slices = k_bitmap.size(2), p.window_capacity = k_window.size(2);
  return p;
}

// The counters themselves, where the host can read them: a step goes where they point.
inline void check_state(const WindowAdvanceParams& p) {
  const int32_t* s = p.state;
  const int64_t packed = s[kPacked], window = s[kWindow], pruned = s[kPruned];
  TORCH_CHECK_VALUE(
      packed >= 0 && packed % kSliceTokens == 0 && window >= 0 && packed + window <= INT32_MAX / 2 &&
          packed <= pruned && pruned <= packed + window && s[kOverflow] >= 0 && s[kOverflow] < INT32_MAX,
      "state: expected whole slices of 64 compressed tokens, a window, as many pruned tokens as "
      "are compressed or more, and those without room, got ",
      packed, ", ", window, ", ", pruned, " and ", s[kOverflow]);
}

inline void check_state(const WindowAppendParams& p) {
  const int32_t* s = p.state;
  const int32_t flush = s[kFlushRows], prune = s[kPruneRows], held = s[kOldWindow], packed = s[kPacked];
  TORCH_CHECK_VALUE(0 <= flush && flush % kSliceTokens == 0 && flush <= prune &&
                        prune < flush + kSliceTokens && prune <= held && held <= p.window_capacity,
                    "state: expected to compress whole slices and prune less than one more of at most ",
                    p.window_capacity, " window rows, got ", flush, " and ", prune, " of ", held);
  TORCH_CHECK_VALUE(
      flush <= packed && packed <= int64_t{p.slices} * kSliceTokens && packed % kSliceTokens == 0,
      "state: expected ", flush, " to ", int64_t{p.slices} * kSliceTokens,
      " compressed tokens in whole slices (the slices held), got ", packed);
  TORCH_CHECK_VALUE(-1 <= s[kSlot] && s[kSlot] < p.window_capacity, "state: expected a window row below ",
                    p.window_capacity, ", or -1 for none, got ", s[kSlot]);
}

}  // namespace mustafar
