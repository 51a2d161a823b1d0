// CPU implementations of torch.ops.mustafar.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "../../kernel/cpu/ops.h"
#include "../../kernel/cpu/window_append.h"
#include "checks.h"
#include "checks_window.h"

namespace mustafar {

std::string simd_level() { return cpu::simd_level(); }

namespace {

void parallel(int64_t n, const std::function<void(int64_t, int64_t)>& body) {
  at::parallel_for(0, n, 1, body);
}

std::tuple<at::Tensor, at::Tensor> prune_compress(const at::Tensor& x, int64_t k) {
  check_dense(x);
  check_kept(k, x);
  const int64_t vectors = (k + kVectorValues - 1) / kVectorValues;
  at::Tensor bitmap = empty_bitmap(x);
  at::Tensor values =
      at::empty({x.size(0), x.size(1), bitmap.size(2), vectors, kSliceTokens, kVectorValues}, x.options());
  auto p = dense_params<cpu::PruneCompressParams>(x, bitmap);
  p.values = values.mutable_data_ptr();
  p.k = k;
  p.width = vectors * kVectorValues;
  cpu::prune_compress(p, parallel);
  return {bitmap, values};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> compress(const at::Tensor& x) {
  check_dense(x);
  at::Tensor bitmap = empty_bitmap(x);
  at::Tensor widths = at::empty({x.size(0), x.size(1), bitmap.size(2)}, x.options().dtype(at::kInt));
  at::Tensor offsets = at::empty(widths.sizes(), x.options().dtype(at::kLong));
  auto p = dense_params<cpu::CompressParams>(x, bitmap);
  p.widths = widths.mutable_data_ptr<int32_t>();
  cpu::compress_count(p, parallel);
  int64_t total = 0;
  int64_t* offset = offsets.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < widths.numel(); ++i) {
    offset[i] = total;
    total += static_cast<int64_t>(p.widths[i]) * kSliceTokens;
  }
  at::Tensor values = at::empty({total}, x.options());
  p.offsets = offset;
  p.values = values.mutable_data_ptr();
  cpu::compress_fill(p, parallel);
  return {bitmap, values, offsets, widths};
}

at::Tensor decompress(const at::Tensor& bitmap, const at::Tensor& values, const OptionalTensor& offsets,
                      const OptionalTensor& widths, int64_t tokens, int64_t head_dim) {
  const CompressedArgs c{"c", bitmap, values, offsets, widths};
  cpu::DecompressParams p{};
  p.dtype = dtype_of(values, "values");
  p.in = view_of(c, head_dim, values.scalar_type());
  check_tokens(tokens, c);
  at::Tensor out = at::empty({c.batch(), c.kv_heads(), tokens, head_dim}, values.options());
  p.out = out.mutable_data_ptr();
  p.tokens = tokens;
  p.batch = c.batch(), p.kv_heads = c.kv_heads(), p.head_dim = head_dim, p.slices = c.slices();
  cpu::decompress(p, parallel);
  return out;
}

at::Tensor key_scores(const at::Tensor& q, const at::Tensor& bitmap, const at::Tensor& values,
                      const OptionalTensor& offsets, const OptionalTensor& widths, int64_t tokens) {
  const CompressedArgs key{"key", bitmap, values, offsets, widths};
  at::Tensor scores = check_key_scores(q, key, tokens);
  cpu::key_scores(key_scores_params(q, key, tokens, scores), parallel);
  return scores;
}

at::Tensor value_output(const at::Tensor& p, const at::Tensor& bitmap, const at::Tensor& values,
                        const OptionalTensor& offsets, const OptionalTensor& widths, int64_t head_dim) {
  const CompressedArgs value{"value", bitmap, values, offsets, widths};
  at::Tensor out = check_value_output(p, value, head_dim);
  cpu::value_output(value_output_params(p, value, head_dim, out), parallel);
  return out;
}

at::Tensor decode_attention(const at::Tensor& q, const at::Tensor& k_bitmap, const at::Tensor& k_values,
                            const OptionalTensor& k_offsets, const OptionalTensor& k_widths,
                            const at::Tensor& v_bitmap, const at::Tensor& v_values,
                            const OptionalTensor& v_offsets, const OptionalTensor& v_widths,
                            const at::Tensor& k_window, const at::Tensor& v_window, const at::Tensor& lengths,
                            const OptionalTensor& starts, double scale, int64_t sliding_window,
                            const OptionalTensor& workspace) {
  check_dim(q, 3, "q", "[B, H, D]");
  at::Tensor out = at::empty(q.sizes(), q.options());
  cpu::decode_attention(decode_attention_params(q, {"key", k_bitmap, k_values, k_offsets, k_widths},
                                                {"value", v_bitmap, v_values, v_offsets, v_widths}, k_window,
                                                v_window, lengths, starts, scale, sliding_window, out),
                        parallel);
  return out;
}

void window_advance(const at::Tensor& state, const at::Tensor& lengths, const at::Tensor& total,
                    int64_t residual, int64_t flush_every, int64_t max_length) {
  const auto p = window_advance_params(state, lengths, total, residual, flush_every, max_length);
  check_state(p);
  cpu::window_advance(p);
}

void window_append(const at::Tensor& k, const at::Tensor& v, const at::Tensor& k_bitmap,
                   const at::Tensor& k_values, const at::Tensor& v_bitmap, const at::Tensor& v_values,
                   const at::Tensor& k_window, const at::Tensor& v_window, const at::Tensor& state,
                   int64_t k_kept, int64_t v_kept) {
  const auto p = window_append_params(k, v, k_bitmap, k_values, v_bitmap, v_values, k_window, v_window, state,
                                      k_kept, v_kept);
  check_state(p);
  cpu::window_append(p, parallel);
}

}  // namespace

TORCH_LIBRARY_IMPL(mustafar, CPU, m) {
  m.impl("prune_compress", &prune_compress);
  m.impl("compress", &compress);
  m.impl("decompress", &decompress);
  m.impl("key_scores", &key_scores);
  m.impl("value_output", &value_output);
  m.impl("decode_attention", &decode_attention);
  m.impl("window_advance", &window_advance);
  m.impl("window_append", &window_append);
}

}  // namespace mustafar
