// CUDA implementations of torch.ops.mustafar. Compiled only where torch has CUDA; ops_nocuda.cpp stands in.
#include <ATen/cuda/CUDAGraphsUtils.cuh>

#include "../../kernel/csrc/decode_attention.h"
#include "../../kernel/csrc/key_scores.h"
#include "../../kernel/csrc/value_output.h"
#include "checks.h"
#include "launch.h"

namespace mustafar {

bool has_cuda() { return true; }

int64_t decode_attention_workspace_size(int64_t batch, int64_t q_heads, int64_t kv_heads, int64_t head_dim,
                                        int64_t slices, int64_t window_capacity) {
  if (!at::cuda::is_available()) return 0;
  return cuda::decode_attention_workspace_bytes(batch, q_heads, kv_heads, head_dim, slices, window_capacity);
}

namespace {

void check_grid(int64_t batch, int64_t kv_heads, const char* op) {
  TORCH_CHECK_VALUE(batch <= kMaxGridSize && kv_heads <= kMaxGridSize, op, ": at most ", kMaxGridSize,
                    " sequences and ", kMaxGridSize, " KV heads on a GPU, got ", batch, " and ", kv_heads);
}

at::Tensor key_scores(const at::Tensor& q, const at::Tensor& bitmap, const at::Tensor& values,
                      const OptionalTensor& offsets, const OptionalTensor& widths, int64_t tokens) {
  const c10::cuda::CUDAGuard guard(q.device());
  const CompressedArgs key{"key", bitmap, values, offsets, widths};
  at::Tensor scores = check_key_scores(q, key, tokens);
  const KeyScoresParams params = key_scores_params(q, key, tokens, scores);
  if (scores.numel() == 0) return scores;
  check_grid(params.batch, params.kv_heads, "key_scores");
  check_launch(cuda::key_scores(params, at::cuda::getCurrentCUDAStream()), "key_scores");
  return scores;
}

at::Tensor value_output(const at::Tensor& p, const at::Tensor& bitmap, const at::Tensor& values,
                        const OptionalTensor& offsets, const OptionalTensor& widths, int64_t head_dim) {
  const c10::cuda::CUDAGuard guard(p.device());
  const CompressedArgs value{"value", bitmap, values, offsets, widths};
  at::Tensor out = check_value_output(p, value, head_dim);
  ValueOutputParams params = value_output_params(p, value, head_dim, out);
  if (p.numel() == 0) return out.zero_();
  check_grid(params.batch, params.kv_heads, "value_output");
  const int64_t bytes = cuda::value_output_workspace_bytes(params.batch, params.q_heads, params.kv_heads,
                                                           params.head_dim, params.slices);
  at::Tensor workspace = at::empty({bytes}, p.options().dtype(at::kByte));
  params.workspace = workspace.mutable_data_ptr();
  check_launch(cuda::value_output(params, at::cuda::getCurrentCUDAStream()), "value_output");
  return out;
}

at::Tensor decode_attention(const at::Tensor& q, const at::Tensor& k_bitmap, const at::Tensor& k_values,
                            const OptionalTensor& k_offsets, const OptionalTensor& k_widths,
                            const at::Tensor& v_bitmap, const at::Tensor& v_values,
                            const OptionalTensor& v_offsets, const OptionalTensor& v_widths,
                            const at::Tensor& k_window, const at::Tensor& v_window, const at::Tensor& lengths,
                            const OptionalTensor& starts, double scale, int64_t sliding_window,
                            const OptionalTensor& workspace) {
  const c10::cuda::CUDAGuard guard(q.device());
  check_dim(q, 3, "q", "[B, H, D]");
  at::Tensor out = at::empty(q.sizes(), q.options());
  DecodeAttentionParams params = decode_attention_params(
      q, {"key", k_bitmap, k_values, k_offsets, k_widths}, {"value", v_bitmap, v_values, v_offsets, v_widths},
      k_window, v_window, lengths, starts, scale, sliding_window, out);
  if (out.numel() == 0) return out;
  check_grid(params.batch, params.kv_heads, "decode_attention");
  const int64_t bytes = cuda::decode_attention_workspace_bytes(
      params.batch, params.q_heads, params.kv_heads, params.head_dim, params.slices, params.window_capacity);
  at::Tensor buffer;
  if (workspace.has_value()) {
    buffer = *workspace;
    check_device(buffer, q, "workspace");
    check_alignment(buffer, "workspace");
    TORCH_CHECK_VALUE(buffer.is_contiguous() && static_cast<int64_t>(buffer.nbytes()) >= bytes,
                      "workspace: expected at least ", bytes,
                      " contiguous bytes (ops.decode_attention_workspace), got ", buffer.nbytes());
  } else {
    // A graph must not own memory that nobody sees: the caller of a capture brings the workspace.
    TORCH_CHECK(at::cuda::currentStreamCaptureStatus() == at::cuda::CaptureStatus::None || bytes == 0,
                "decode_attention would allocate ", bytes,
                " bytes inside a CUDA graph capture: pass workspace=ops.decode_attention_workspace(...)");
    buffer = at::empty({bytes}, q.options().dtype(at::kByte));
  }
  params.workspace = buffer.mutable_data_ptr();
  check_launch(cuda::decode_attention(params, at::cuda::getCurrentCUDAStream()), "decode_attention");
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(mustafar, CUDA, m) {
  m.impl("key_scores", &key_scores);
  m.impl("value_output", &value_output);
  m.impl("decode_attention", &decode_attention);
}

}  // namespace mustafar
