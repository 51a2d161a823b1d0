// One pass: a row's packed values to shared memory, from there each to its channel.
#include "decompress.h"
#include "row_tile.cuh"

namespace mustafar::cuda {
namespace {

// One block a slice.
template <int kChannels>
__global__ void __launch_bounds__(RowTile<kChannels>::kThreads) decompress_kernel(DecompressParams p) {
  using Tile = RowTile<kChannels>;
  extern __shared__ uint4 shared[];
  const Tile tile(static_cast<uint32_t>(__cvta_generic_to_shared(shared)));
  const CompressedView& in = p.in;
  const SliceIndex at(blockIdx.x, p.kv_heads, (p.tokens + kSliceTokens - 1) / kSliceTokens);
  const uint16_t* values = static_cast<const uint16_t*>(in.values);
  int vectors;
  if (in.offsets == nullptr) {
    vectors = in.width / kVectorValues;
    values += at.batch * in.values_batch_stride + at.head * in.values_head_stride +
              at.slice * kSliceTokens * in.width;
  } else {
    vectors = in.widths[at.batch * in.widths_batch_stride + at.head * in.widths_head_stride + at.slice] /
              kVectorValues;
    values += in.offsets[at.batch * in.offsets_batch_stride + at.head * in.offsets_head_stride + at.slice];
  }
  tile.stage_slots(values, min(vectors, Tile::kVectors));
  const int words = (p.head_dim + 63) / 64;
  uint32_t keep[Tile::kWords];
  tile.read_bits(in.bitmap + at.batch * in.bitmap_batch_stride + at.head * in.bitmap_head_stride +
                     at.slice * kSliceTokens * words,
                 keep, words);
  wait_staged();
  tile.expand(keep);
  tile.write_rows(static_cast<uint16_t*>(p.out) +
                      ((at.batch * p.kv_heads + at.head) * p.tokens + at.token()) * p.head_dim,
                  at.rows(p.tokens), p.head_dim);
}

}  // namespace

cudaError_t decompress(const DecompressParams& p, cudaStream_t stream) {
  const int64_t blocks = int64_t{p.batch} * p.kv_heads * ((p.tokens + kSliceTokens - 1) / kSliceTokens);
  if (blocks == 0) return cudaSuccess;
  const bool ok = p.head_dim >= 1 && p.head_dim <= kMaxHeadDim && blocks <= INT32_MAX &&
                  (p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16);
  if (!ok) return cudaErrorInvalidValue;
  with_channels(p.head_dim, [&](auto channels) {
    using Tile = RowTile<channels>;
    decompress_kernel<channels>
        <<<static_cast<unsigned>(blocks), Tile::kThreads, Tile::kSharedBytes, stream>>>(p);
  });
  return cudaGetLastError();
}

}  // namespace mustafar::cuda
