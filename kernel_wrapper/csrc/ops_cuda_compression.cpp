// CUDA implementations of prune_compress, compress and decompress. Compiled only where torch has CUDA.
#include <tuple>

#include "../../kernel/csrc/compress.h"
#include "../../kernel/csrc/decompress.h"
#include "../../kernel/csrc/prune_compress.h"
#include "checks.h"
#include "launch.h"

namespace mustafar {
namespace {

std::tuple<at::Tensor, at::Tensor> prune_compress(const at::Tensor& x, int64_t k) {
  const c10::cuda::CUDAGuard guard(x.device());
  check_dense(x);
  check_kept(k, x);
  const int64_t vectors = (k + kVectorValues - 1) / kVectorValues;
  at::Tensor bitmap = empty_bitmap(x);
  at::Tensor values =
      at::empty({x.size(0), x.size(1), bitmap.size(2), vectors, kSliceTokens, kVectorValues}, x.options());
  auto p = dense_params<cuda::PruneCompressParams>(x, bitmap);
  p.values = values.mutable_data_ptr();
  p.k = k;
  p.width = vectors * kVectorValues;
  check_launch(cuda::prune_compress(p, at::cuda::getCurrentCUDAStream()), "prune_compress");
  return {bitmap, values};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> compress(const at::Tensor& x) {
  const c10::cuda::CUDAGuard guard(x.device());
  check_dense(x);
  at::Tensor bitmap = empty_bitmap(x);
  at::Tensor widths = at::empty({x.size(0), x.size(1), bitmap.size(2)}, x.options().dtype(at::kInt));
  at::Tensor ends = at::empty({widths.numel() + 1}, x.options().dtype(at::kLong));
  auto p = dense_params<cuda::CompressParams>(x, bitmap);
  p.widths = widths.mutable_data_ptr<int32_t>();
  p.offsets = ends.mutable_data_ptr<int64_t>();
  check_launch(cuda::compress_count(p, at::cuda::getCurrentCUDAStream()), "compress");
  // The only synchronisation with the host: how much memory the values take.
  at::Tensor values = at::empty({ends[widths.numel()].item<int64_t>()}, x.options());
  p.values = values.mutable_data_ptr();
  check_launch(cuda::compress_fill(p, at::cuda::getCurrentCUDAStream()), "compress");
  return {bitmap, values, ends.narrow(0, 0, widths.numel()).view(widths.sizes()), widths};
}

at::Tensor decompress(const at::Tensor& bitmap, const at::Tensor& values, const OptionalTensor& offsets,
                      const OptionalTensor& widths, int64_t tokens, int64_t head_dim) {
  const c10::cuda::CUDAGuard guard(values.device());
  const CompressedArgs c{"c", bitmap, values, offsets, widths};
  cuda::DecompressParams p{};
  p.dtype = dtype_of(values, "values");
  p.in = view_of(c, head_dim, values.scalar_type());
  check_tokens(tokens, c);
  at::Tensor out = at::empty({c.batch(), c.kv_heads(), tokens, head_dim}, values.options());
  p.out = out.mutable_data_ptr();
  p.tokens = tokens;
  p.batch = c.batch(), p.kv_heads = c.kv_heads(), p.head_dim = head_dim;
  check_launch(cuda::decompress(p, at::cuda::getCurrentCUDAStream()), "decompress");
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(mustafar, CUDA, m) {
  m.impl("prune_compress", &prune_compress);
  m.impl("compress", &compress);
  m.impl("decompress", &decompress);
}

}  // namespace mustafar
