// Shape, dtype, device and stride checks of the ops, and the raw-pointer views the kernels take.
// One place for both devices; every message names the argument, what was expected and what came.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>

#include "../../kernel/params.h"

namespace mustafar {

using OptionalTensor = std::optional<at::Tensor>;

// A compressed tensor as the ops receive it: the fields of mustafar.CompressedTensor.
struct CompressedArgs {
  const char* name;  // "key" or "value", for messages
  const at::Tensor& bitmap;
  const at::Tensor& values;
  const OptionalTensor& offsets;
  const OptionalTensor& widths;

  int64_t batch() const { return bitmap.size(0); }
  int64_t kv_heads() const { return bitmap.size(1); }
  int64_t slices() const { return bitmap.size(2); }
};

inline int64_t words_for(int64_t head_dim) { return (head_dim + 63) / 64; }
inline int64_t slices_for(int64_t tokens) { return (tokens + kSliceTokens - 1) / kSliceTokens; }

inline DType dtype_of(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kFloat:
      TORCH_CHECK_TYPE(!tensor.is_cuda(), name, ".dtype: expected float16 or bfloat16 on a GPU, got float32");
      return DType::kFloat32;
    default:
      TORCH_CHECK_TYPE(false, name, ".dtype: expected float16, bfloat16 or float32, got ",
                       tensor.scalar_type());
  }
}

inline void check_head_dim(int64_t head_dim) {
  TORCH_CHECK_VALUE(head_dim > 0 && head_dim <= kMaxHeadDim, "head_dim: expected 1 to ", kMaxHeadDim,
                    ", got ", head_dim);
}

inline void check_dim(const at::Tensor& tensor, int64_t dim, const char* name, const char* shape) {
  TORCH_CHECK_VALUE(tensor.dim() == dim, name, ".shape: expected ", shape, ", got ", tensor.sizes());
}

inline void check_rows(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.size(-1) <= 1 || tensor.stride(-1) == 1, name,
                    ": expected a contiguous last dimension, got strides ", tensor.strides());
}

inline void check_device(const at::Tensor& tensor, const at::Tensor& like, const char* name) {
  TORCH_CHECK_VALUE(tensor.device() == like.device(), name, ".device: expected ", like.device(), ", got ",
                    tensor.device());
}

// What prune_compress and compress read.
inline void check_dense(const at::Tensor& x) {
  check_dim(x, 4, "x", "[B, Hkv, T, D]");
  check_head_dim(x.size(3));
  check_rows(x, "x");
  dtype_of(x, "x");
}

inline int64_t check_kept(int64_t k, const at::Tensor& x) {
  TORCH_CHECK_VALUE(k >= 1 && k <= x.size(3), "k: expected 1 to ", x.size(3), " values kept per row, got ",
                    k);
  return k;
}

inline at::Tensor empty_bitmap(const at::Tensor& x) {
  return at::empty({x.size(0), x.size(1), slices_for(x.size(2)), kSliceTokens, words_for(x.size(3))},
                   x.options().dtype(at::kLong));
}

// The fields that the parameters of prune_compress and compress have in common, on either device.
template <typename Params>
Params dense_params(const at::Tensor& x, const at::Tensor& bitmap) {
  Params p{};
  p.x = x.const_data_ptr();
  p.bitmap = reinterpret_cast<uint64_t*>(bitmap.mutable_data_ptr<int64_t>());
  p.tokens = x.size(2);
  p.x_batch_stride = x.stride(0), p.x_head_stride = x.stride(1), p.x_token_stride = x.stride(2);
  p.batch = x.size(0), p.kv_heads = x.size(1), p.head_dim = x.size(3), p.slices = bitmap.size(2);
  p.dtype = dtype_of(x, "x");
  return p;
}

// The kernels load 16-byte vectors of dense rows on a GPU.
inline void check_alignment(const at::Tensor& tensor, const char* name) {
  if (!tensor.is_cuda() || tensor.numel() == 0) return;
  bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d)
    aligned = aligned && (tensor.size(d) <= 1 || tensor.stride(d) * tensor.element_size() % 16 == 0);
  TORCH_CHECK_VALUE(aligned, name, ": expected rows aligned to 16 bytes, got strides ", tensor.strides(),
                    " of ", tensor.element_size(), " bytes; pass a contiguous tensor");
}

inline void check_inner(const at::Tensor& tensor, int64_t from, const char* name, const char* part) {
  if (tensor.numel() == 0) return;
  int64_t expected = 1;
  for (int64_t d = tensor.dim() - 1; d >= from; --d) {
    TORCH_CHECK_VALUE(tensor.size(d) <= 1 || tensor.stride(d) == expected, name, ".", part,
                      ": expected all but the first two dimensions contiguous, got strides ",
                      tensor.strides());
    expected *= tensor.size(d);
  }
}

inline CompressedView view_of(const CompressedArgs& c, int64_t head_dim, at::ScalarType dtype) {
  check_head_dim(head_dim);
  const at::Tensor& bitmap = c.bitmap;
  TORCH_CHECK_VALUE(bitmap.scalar_type() == at::kLong, c.name, ".bitmap.dtype: expected int64, got ",
                    bitmap.scalar_type());
  TORCH_CHECK_VALUE(
      bitmap.dim() == 5 && bitmap.size(3) == kSliceTokens && bitmap.size(4) == words_for(head_dim), c.name,
      ".bitmap.shape: expected [B, Hkv, S, 64, ", words_for(head_dim), "], got ", bitmap.sizes());
  check_inner(bitmap, 2, c.name, "bitmap");
  TORCH_CHECK_TYPE(c.values.scalar_type() == dtype, c.name, ".values.dtype: expected ", dtype,
                   " like the other arguments, got ", c.values.scalar_type());
  check_device(c.values, bitmap, "values");

  CompressedView view{};
  view.bitmap = reinterpret_cast<const uint64_t*>(bitmap.const_data_ptr<int64_t>());
  view.values = c.values.const_data_ptr();
  view.bitmap_batch_stride = bitmap.stride(0);
  view.bitmap_head_stride = bitmap.stride(1);
  TORCH_CHECK_VALUE(c.offsets.has_value() == c.widths.has_value(), c.name,
                    ": expected offsets and widths both (general layout) or neither (uniform layout)");
  if (!c.offsets.has_value()) {
    TORCH_CHECK_VALUE(c.values.dim() == 6 && c.values.sizes().slice(0, 3) == bitmap.sizes().slice(0, 3) &&
                          c.values.size(4) == kSliceTokens && c.values.size(5) == kVectorValues,
                      c.name, ".values.shape: expected ", bitmap.sizes().slice(0, 3),
                      " + [width / 8, 64, 8], got ", c.values.sizes());
    check_inner(c.values, 2, c.name, "values");
    view.values_batch_stride = c.values.stride(0);
    view.values_head_stride = c.values.stride(1);
    view.width = static_cast<int32_t>(c.values.size(3) * kVectorValues);
    return view;
  }
  check_dim(c.values, 1, "values", "[N] in the general layout");
  const at::Tensor& offsets = *c.offsets;
  const at::Tensor& widths = *c.widths;
  TORCH_CHECK_TYPE(offsets.scalar_type() == at::kLong, c.name, ".offsets.dtype: expected int64, got ",
                   offsets.scalar_type());
  TORCH_CHECK_TYPE(widths.scalar_type() == at::kInt, c.name, ".widths.dtype: expected int32, got ",
                   widths.scalar_type());
  for (const at::Tensor* table : {&offsets, &widths}) {
    TORCH_CHECK_VALUE(table->sizes() == bitmap.sizes().slice(0, 3), c.name,
                      ".offsets and widths: expected shape ", bitmap.sizes().slice(0, 3), ", got ",
                      table->sizes());
    check_device(*table, bitmap, "offsets and widths");
    check_rows(*table, "offsets and widths");
  }
  view.offsets = offsets.const_data_ptr<int64_t>();
  view.widths = widths.const_data_ptr<int32_t>();
  view.offsets_batch_stride = offsets.stride(0);
  view.offsets_head_stride = offsets.stride(1);
  view.widths_batch_stride = widths.stride(0);
  view.widths_head_stride = widths.stride(1);
  return view;
}

inline void check_group(int64_t q_heads, const CompressedArgs& c) {
  TORCH_CHECK_VALUE(c.kv_heads() > 0 && q_heads > 0 && q_heads % c.kv_heads() == 0,
                    "q_heads: expected a multiple of the ", c.kv_heads(), " KV heads, got ", q_heads);
}

inline void check_tokens(int64_t tokens, const CompressedArgs& c) {
  TORCH_CHECK_VALUE(0 <= tokens && tokens <= c.slices() * kSliceTokens, "tokens: expected 0 to ",
                    c.slices() * kSliceTokens, " (the slices held), got ", tokens);
}

inline KeyScoresParams key_scores_params(const at::Tensor& q, const CompressedArgs& key, int64_t tokens,
                                         const at::Tensor& scores) {
  check_alignment(q, "q");
  KeyScoresParams p{};
  p.dtype = dtype_of(q, "q");
  p.key = view_of(key, q.size(2), q.scalar_type());
  p.q = q.const_data_ptr();
  p.scores = scores.mutable_data_ptr();
  p.tokens = tokens;
  p.q_batch_stride = q.stride(0), p.q_head_stride = q.stride(1);
  p.scores_batch_stride = scores.stride(0), p.scores_head_stride = scores.stride(1);
  p.batch = q.size(0), p.q_heads = q.size(1), p.kv_heads = key.kv_heads();
  p.head_dim = q.size(2), p.slices = key.slices();
  return p;
}

inline at::Tensor check_key_scores(const at::Tensor& q, const CompressedArgs& key, int64_t tokens) {
  check_dim(q, 3, "q", "[B, H, D]");
  check_rows(q, "q");
  check_dim(key.bitmap, 5, "key.bitmap", "[B, Hkv, S, 64, W]");
  check_device(key.bitmap, q, "key.bitmap");
  TORCH_CHECK_VALUE(q.size(0) == key.batch(), "q.shape: expected batch ", key.batch(), ", got ", q.size(0));
  check_group(q.size(1), key);
  check_tokens(tokens, key);
  return at::empty({q.size(0), q.size(1), tokens}, q.options());
}

inline at::Tensor check_value_output(const at::Tensor& p, const CompressedArgs& value, int64_t head_dim) {
  check_dim(p, 3, "p", "[B, H, T]");
  check_rows(p, "p");
  check_dim(value.bitmap, 5, "value.bitmap", "[B, Hkv, S, 64, W]");
  check_device(value.bitmap, p, "value.bitmap");
  TORCH_CHECK_VALUE(p.size(0) == value.batch(), "p.shape: expected batch ", value.batch(), ", got ",
                    p.size(0));
  check_group(p.size(1), value);
  check_tokens(p.size(2), value);
  return at::empty({p.size(0), p.size(1), head_dim}, p.options());
}

inline ValueOutputParams value_output_params(const at::Tensor& p, const CompressedArgs& value,
                                             int64_t head_dim, const at::Tensor& out) {
  ValueOutputParams v{};
  v.dtype = dtype_of(p, "p");
  v.value = view_of(value, head_dim, p.scalar_type());
  v.p = p.const_data_ptr();
  v.out = out.mutable_data_ptr();
  v.tokens = p.size(2);
  v.p_batch_stride = p.stride(0), v.p_head_stride = p.stride(1);
  v.out_batch_stride = out.stride(0), v.out_head_stride = out.stride(1);
  v.batch = p.size(0), v.q_heads = p.size(1), v.kv_heads = value.kv_heads();
  v.head_dim = head_dim, v.slices = value.slices();
  return v;
}

inline void check_window(const at::Tensor& window, const at::Tensor& q, const CompressedArgs& c,
                         const char* name) {
  check_dim(window, 4, name, "[B, Hkv, capacity, D]");
  TORCH_CHECK_VALUE(
      window.size(0) == q.size(0) && window.size(1) == c.kv_heads() && window.size(3) == q.size(2), name,
      ".shape: expected [", q.size(0), ", ", c.kv_heads(), ", capacity, ", q.size(2), "], got ",
      window.sizes());
  TORCH_CHECK_TYPE(window.scalar_type() == q.scalar_type(), name, ".dtype: expected ", q.scalar_type(),
                   ", got ", window.scalar_type());
  check_device(window, q, name);
  check_rows(window, name);
  check_alignment(window, name);
}

inline DecodeAttentionParams decode_attention_params(const at::Tensor& q, const CompressedArgs& key,
                                                     const CompressedArgs& value, const at::Tensor& k_window,
                                                     const at::Tensor& v_window, const at::Tensor& lengths,
                                                     const OptionalTensor& starts, double scale,
                                                     int64_t sliding_window, const at::Tensor& out) {
  dtype_of(q, "q");
  check_rows(q, "q");
  check_alignment(q, "q");
  for (const CompressedArgs* c : {&key, &value}) {
    check_dim(c->bitmap, 5, "bitmap", "[B, Hkv, S, 64, W]");
    check_device(c->bitmap, q, "bitmap");
    TORCH_CHECK_VALUE(c->batch() == q.size(0), c->name, ".bitmap.shape: expected batch ", q.size(0), ", got ",
                      c->batch());
    check_group(q.size(1), *c);
  }
  TORCH_CHECK_VALUE(key.kv_heads() == value.kv_heads() && key.slices() == value.slices(),
                    "value.bitmap.shape: expected the KV heads and slices of the key, ", key.bitmap.sizes(),
                    ", got ", value.bitmap.sizes());
  check_window(k_window, q, key, "k_window");
  check_window(v_window, q, value, "v_window");
  TORCH_CHECK_VALUE(k_window.size(2) == v_window.size(2), "v_window.shape: expected capacity ",
                    k_window.size(2), ", got ", v_window.size(2));
  check_device(lengths, q, "lengths");
  TORCH_CHECK_VALUE(lengths.scalar_type() == at::kInt && lengths.dim() == 2 && lengths.size(0) == q.size(0) &&
                        lengths.size(1) == 2 && lengths.is_contiguous(),
                    "lengths: expected contiguous int32 [", q.size(0), ", 2], got ", lengths.scalar_type(),
                    " ", lengths.sizes());
  if (starts.has_value()) {
    check_device(*starts, q, "starts");
    TORCH_CHECK_VALUE(starts->scalar_type() == at::kInt && starts->dim() == 1 &&
                          starts->size(0) == q.size(0) && starts->is_contiguous(),
                      "starts: expected contiguous int32 [", q.size(0), "], got ", starts->scalar_type(), " ",
                      starts->sizes());
  }
  TORCH_CHECK_VALUE(sliding_window >= 0 && sliding_window <= INT32_MAX,
                    "sliding_window: expected 0 (none) or a number of positions, got ", sliding_window);

  DecodeAttentionParams p{};
  p.dtype = dtype_of(q, "q");
  p.key = view_of(key, q.size(2), q.scalar_type());
  p.value = view_of(value, q.size(2), q.scalar_type());
  p.q = q.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.k_window = k_window.const_data_ptr();
  p.v_window = v_window.const_data_ptr();
  p.lengths = lengths.const_data_ptr<int32_t>();
  p.starts = starts.has_value() ? starts->const_data_ptr<int32_t>() : nullptr;
  p.q_batch_stride = q.stride(0), p.q_head_stride = q.stride(1);
  p.out_batch_stride = out.stride(0), p.out_head_stride = out.stride(1);
  p.k_window_batch_stride = k_window.stride(0), p.k_window_head_stride = k_window.stride(1);
  p.k_window_token_stride = k_window.stride(2);
  p.v_window_batch_stride = v_window.stride(0), p.v_window_head_stride = v_window.stride(1);
  p.v_window_token_stride = v_window.stride(2);
  p.batch = q.size(0), p.q_heads = q.size(1), p.kv_heads = key.kv_heads(), p.head_dim = q.size(2);
  p.slices = key.slices(), p.window_capacity = k_window.size(2);
  p.sliding_window = sliding_window;
  p.scale = static_cast<float>(scale);
  return p;
}

}  // namespace mustafar
