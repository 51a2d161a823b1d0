// What every op needs, as raw pointers: filled by the bindings, read by the CUDA and the CPU kernels.
//
// Shapes in comments: B batch, H query heads, Hkv KV heads (H is a multiple), T tokens, D head dim,
// S slices of 64 tokens, W = ceil(D / 64) bitmap words. Strides count elements of the tensor they belong to.
#pragma once

#include <cstdint>

namespace mustafar {

constexpr int kSliceTokens = 64;  // tokens of a slice
constexpr int kVectorValues = 8;  // values of a vector: 16 bytes in half precision
constexpr int kMaxHeadDim = 256;
constexpr int kMaxGridSize = 65535;  // sequences of a batch, KV heads: dimensions of a CUDA grid

enum class DType : int32_t { kFloat16, kBFloat16, kFloat32 };

// Keys or values in the sliced bitmap format (FORMAT.md). Uniform layout where offsets is null.
struct CompressedView {
  const uint64_t* bitmap;       // [B, Hkv, S, 64, W]
  const void* values;           // uniform [B, Hkv, S, width / 8, 64, 8], general [N]
  const int64_t* offsets;       // general [B, Hkv, S]: first value of each slice
  const int32_t* widths;        // general [B, Hkv, S]: slots per row of each slice, multiple of 8
  int64_t bitmap_batch_stride;  // words
  int64_t bitmap_head_stride;
  int64_t values_batch_stride;  // values, uniform only
  int64_t values_head_stride;
  int64_t offsets_batch_stride;  // entries, general only
  int64_t offsets_head_stride;
  int64_t widths_batch_stride;
  int64_t widths_head_stride;
  int32_t width;  // slots per row, uniform only
};

// scores[b, h, t] = sum over d of q[b, h, d] * K[b, h / G, t, d]
struct KeyScoresParams {
  const void* q;       // [B, H, D]
  void* scores;        // [B, H, T]
  CompressedView key;  // of T tokens
  int64_t tokens;      // T
  int64_t q_batch_stride, q_head_stride;
  int64_t scores_batch_stride, scores_head_stride;
  int32_t batch, q_heads, kv_heads, head_dim, slices;
  DType dtype;
};

// out[b, h, d] = sum over t of p[b, h, t] * V[b, h / G, t, d]
struct ValueOutputParams {
  const void* p;         // [B, H, T]
  void* out;             // [B, H, D]
  CompressedView value;  // of T tokens
  void* workspace;       // CUDA: value_output_workspace_bytes() bytes, for the partial sums of splits
  int64_t tokens;        // T
  int64_t p_batch_stride, p_head_stride;
  int64_t out_batch_stride, out_head_stride;
  int32_t batch, q_heads, kv_heads, head_dim, slices;
  DType dtype;
};

// One decode step over the compressed tokens followed by a dense window.
//   positions 0 .. lengths[b][0] - 1 are compressed, the next lengths[b][1] lie in the window;
//   a position is visible if starts[b] <= position and position >= total - sliding_window (when that is > 0).
// A sequence with no visible position gives zeros.
struct DecodeAttentionParams {
  const void* q;         // [B, H, D]
  void* out;             // [B, H, D]
  CompressedView key;    // S slices
  CompressedView value;  // S slices; layout and width may differ from the keys'
  const void* k_window;  // [B, Hkv, window_capacity, D]
  const void* v_window;  // [B, Hkv, window_capacity, D]
  const int32_t*
      lengths;  // [B, 2] contiguous: compressed tokens (<= 64 S), window tokens (<= window_capacity)
  const int32_t* starts;  // [B] contiguous, or null
  void* workspace;        // CUDA: decode_attention_workspace_bytes() bytes
  int64_t q_batch_stride, q_head_stride;
  int64_t out_batch_stride, out_head_stride;
  int64_t k_window_batch_stride, k_window_head_stride, k_window_token_stride;
  int64_t v_window_batch_stride, v_window_head_stride, v_window_token_stride;
  int32_t batch, q_heads, kv_heads, head_dim, slices, window_capacity;
  int32_t sliding_window;  // 0: none
  float scale;             // of q . k, before the softmax
  DType dtype;
};

}  // namespace mustafar
