// Two passes over x: bitmap and widths, then, once a scan of the widths has placed the slices, the values.
#include "compress.h"
#include "row_tile.cuh"

namespace mustafar::cuda {
namespace {

constexpr int kScanThreads = 1024;
constexpr int kScanItems = 8;  // of a thread at once

// One bit a value, in order, of 8 in pairs: 1 where it is neither 0.0 nor -0.0.
__device__ __forceinline__ uint32_t nonzeros(const uint4& v) {
  const uint32_t pairs[] = {v.x, v.y, v.z, v.w};
  uint32_t bits = 0;  // value i at bit i / 2, plus 16 if i is odd
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // The sum carries into the sign bit of each half unless its magnitude is zero, and no further.
    const uint32_t signs = ((pairs[i] & 0x7fff7fffu) + 0x7fff7fffu) & 0x80008000u;
    bits |= signs >> (15 - 2 * i);
  }
  return (bits | bits >> 15) & 0xffu;
}

__device__ __forceinline__ const uint16_t* slice_rows(const CompressParams& p, const SliceIndex& at) {
  return static_cast<const uint16_t*>(p.x) + at.batch * p.x_batch_stride + at.head * p.x_head_stride +
         at.token() * p.x_token_stride;
}

// One block a slice, one lane a row; rows go through shared memory.
template <int kChannels>
__global__ void __launch_bounds__(RowTile<kChannels>::kThreads) count_kernel(CompressParams p) {
  using Tile = RowTile<kChannels>;
  extern __shared__ uint4 shared[];
  const Tile tile(static_cast<uint32_t>(__cvta_generic_to_shared(shared)));
  const SliceIndex at(blockIdx.x, p.kv_heads, p.slices);
  tile.stage_rows(slice_rows(p, at), p.x_token_stride, at.rows(p.tokens), p.head_dim);
  wait_staged();

  uint32_t keep[Tile::kWords];
  int count = 0;
#pragma unroll
  for (int w = 0; w < Tile::kWords; ++w) {
    uint32_t pairs[16];
    tile.read_word(w, pairs);
    keep[w] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      keep[w] |= nonzeros({pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]}) << 8 * i;
    count += __popc(keep[w]);
  }
  const int words = (p.head_dim + 63) / 64;
  tile.write_bits(p.bitmap + at.number * kSliceTokens * words, keep, words);

  __shared__ int fullest[Tile::kThreads / 32];
  const int most = __reduce_max_sync(~0u, tile.row_sum(count));
  if (tile.lane == 0) fullest[threadIdx.x / 32] = most;
  __syncthreads();
  if (threadIdx.x == 0) {
    int width = 0;
    for (const int warp : fullest) width = max(width, warp);
    p.widths[at.number] = (width + kVectorValues - 1) / kVectorValues * kVectorValues;
  }
}

// offsets[i] = values of all slices before i, of `count` slices; offsets[count] = values of all. One block.
__global__ void __launch_bounds__(kScanThreads)
    scan_kernel(const int32_t* widths, int64_t* offsets, int64_t count) {
  __shared__ int64_t sums[kScanThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t before = 0;
  for (int64_t first = 0; first < count; first += kScanThreads * kScanItems) {
    const int64_t mine = first + threadIdx.x * kScanItems;
    int64_t sizes[kScanItems], total = 0;
#pragma unroll
    for (int i = 0; i < kScanItems; ++i) {
      sizes[i] = mine + i < count ? int64_t{widths[mine + i]} * kSliceTokens : 0;
      total += sizes[i];
    }
    int64_t sum = total;  // of this lane and those below, then of this thread and those below
    for (int d = 1; d < 32; d *= 2) {
      const int64_t lower = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += lower;
    }
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    int64_t all = 0;
    for (int w = 0; w < kScanThreads / 32; ++w) {
      if (w < warp) sum += sums[w];
      all += sums[w];
    }
    __syncthreads();
    int64_t offset = before + sum - total;
#pragma unroll
    for (int i = 0; i < kScanItems; ++i) {
      if (mine + i < count) offsets[mine + i] = offset;
      offset += sizes[i];
    }
    before += all;
  }
  if (threadIdx.x == 0) offsets[count] = before;
}

template <int kChannels>
__global__ void __launch_bounds__(RowTile<kChannels>::kThreads) fill_kernel(CompressParams p) {
  using Tile = RowTile<kChannels>;
  extern __shared__ uint4 shared[];
  const Tile tile(static_cast<uint32_t>(__cvta_generic_to_shared(shared)));
  // Backwards: what the first pass read last is still in the L2 cache.
  const SliceIndex at(gridDim.x - 1 - blockIdx.x, p.kv_heads, p.slices);
  const int vectors = p.widths[at.number] / kVectorValues;
  if (vectors == 0) return;
  const int words = (p.head_dim + 63) / 64;
  tile.stage_rows(slice_rows(p, at), p.x_token_stride, at.rows(p.tokens), p.head_dim);
  uint32_t keep[Tile::kWords];
  tile.read_bits(p.bitmap + at.number * kSliceTokens * words, keep, words);
  int count = 0;
#pragma unroll
  for (int w = 0; w < Tile::kWords; ++w) count += __popc(keep[w]);
  wait_staged();
  tile.compact(keep);
  tile.write_slots(static_cast<uint16_t*>(p.values) + p.offsets[at.number], tile.row_sum(count), vectors);
}

// Blocks of the kernels, one a slice; negative where the arguments are not what they can do.
int64_t blocks_of(const CompressParams& p) {
  const int64_t blocks = int64_t{p.batch} * p.kv_heads * p.slices;
  const bool ok = p.head_dim >= 1 && p.head_dim <= kMaxHeadDim && blocks <= INT32_MAX &&
                  (p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16);
  return ok ? blocks : -1;
}

}  // namespace

cudaError_t compress_count(const CompressParams& p, cudaStream_t stream) {
  const int64_t blocks = blocks_of(p);
  if (blocks < 0) return cudaErrorInvalidValue;
  if (blocks > 0) {
    with_channels(p.head_dim, [&](auto channels) {
      using Tile = RowTile<channels>;
      count_kernel<channels>
          <<<static_cast<unsigned>(blocks), Tile::kThreads, Tile::kSharedBytes, stream>>>(p);
    });
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  scan_kernel<<<1, kScanThreads, 0, stream>>>(p.widths, p.offsets, blocks);
  return cudaGetLastError();
}

cudaError_t compress_fill(const CompressParams& p, cudaStream_t stream) {
  const int64_t blocks = blocks_of(p);
  if (blocks < 0) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  with_channels(p.head_dim, [&](auto channels) {
    using Tile = RowTile<channels>;
    fill_kernel<channels><<<static_cast<unsigned>(blocks), Tile::kThreads, Tile::kSharedBytes, stream>>>(p);
  });
  return cudaGetLastError();
}

}  // namespace mustafar::cuda
