#include "key_scores.h"
#include "launch.cuh"
#include "tile.cuh"

namespace mustafar::cuda {
namespace {

constexpr int kMaxWarps = 12;
constexpr int kRing = 2;  // 3 and 4 are no faster (measured)
template <int kChannels>
constexpr int kWarpBytes = tile_bytes(kChannels) + RowPair<kChannels / 32, kRing>::kStagingBytes;

// Each warp expands slices of 64 keys into its tile, one after another, and multiplies each by the queries of
// all heads of the group at once. The next slice's first loads are under way during the product.
template <class T, int kChannels>
__global__ void __launch_bounds__(kWarpSize* kMaxWarps)
    key_scores_kernel(const __grid_constant__ KeyScoresParams p, const __grid_constant__ Plan plan) {
  constexpr int kWords = kChannels / 32;
  extern __shared__ __align__(16) char shared[];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int g = lane / 4, q = lane % 4;

  const Place at(plan, blockIdx.x, p.q_heads, p.kv_heads);
  const uint32_t region = shared_address(shared) + warp * kWarpBytes<kChannels>;
  const uint32_t tile = region + kGuardRows * kTilePitch;
  fill_zeros(region, tile_bytes(kChannels), lane);
  KeyProduct<T, kChannels> product;
  const T* queries = static_cast<const T*>(p.q) + at.b * p.q_batch_stride;
  product.load_queries(g < at.heads ? queries + (at.first_head + g) * p.q_head_stride : nullptr, p.head_dim,
                       lane);
  T* scores = static_cast<T*>(p.scores) + at.b * p.scores_batch_stride + at.first_head * p.scores_head_stride;
  __syncwarp();

  const int words = bitmap_words(p.head_dim);
  const int slices = slices_of(p.tokens);
  const int block_warps = blockDim.x / kWarpSize, warps = plan.splits * block_warps;
  int slice = at.split * block_warps + warp;
  RowPair<kWords, kRing> rows(region + tile_bytes(kChannels), lane);
  Location next;
  const bool visible[kRowsPerLane] = {true, true};
  const auto begin = [&](const Location& location, int index) {
    rows.begin(slice_rows(p.key, location, at.b, at.kv_head, index, words), visible, words, lane);
    commit_copies();
  };
  if (slice < slices) begin(locate(p.key, at.b, at.kv_head, slice), slice);
  for (; slice < slices; slice += warps) {
    const bool more = slice + warps < slices;
    if (more) next = locate(p.key, at.b, at.kv_head, slice + warps);
    wait_copies<0>();
    expand(rows, tile, p.head_dim, words, lane);
    if (more) begin(next, slice + warps);
    __syncwarp();
    product.multiply(tile, p.head_dim, lane);
    __syncwarp();
    fill_zeros(tile, kChannels * kTilePitch, lane);
    __syncwarp();
#pragma unroll
    for (int tokens = 0; tokens < KeyProduct<T, kChannels>::kTokenBlocks; ++tokens)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int head = 2 * q + i % 2;
        const int64_t token = int64_t{slice} * kSliceTokens + 8 * tokens + g + i / 2 * kWarpSize;
        if (head < at.heads && token < p.tokens)
          scores[head * p.scores_head_stride + token] = Half<T>::round(product.scores[tokens][i]);
      }
  }
}

template <class T, int kChannels>
cudaError_t run(const KeyScoresParams& p, cudaStream_t stream) {
  Blocks blocks;
  MUSTAFAR_CUDA_TRY(size_blocks(0, kWarpBytes<kChannels>, kMaxWarps, &blocks));
  const Plan plan = make_plan(p.batch, p.q_heads, p.kv_heads, kMmaColumns, slices_of(p.tokens), blocks);
  return launch(key_scores_kernel<T, kChannels>, plan, blocks, stream, p, plan);
}

}  // namespace

cudaError_t key_scores(const KeyScoresParams& params, cudaStream_t stream) {
  if (params.batch == 0 || params.tokens == 0) return cudaSuccess;
  MUSTAFAR_CUDA_TRY(
      check_shape(params.batch, params.q_heads, params.kv_heads, params.head_dim, params.dtype));
  if (params.tokens < 0 || params.tokens > int64_t{params.slices} * kSliceTokens)
    return cudaErrorInvalidValue;
  MUSTAFAR_CUDA_TRY(check_view(params.key, params.batch, params.kv_heads, params.slices));
  if (!aligned(params.q, 16) || !aligned_stride(params.q_batch_stride, params.batch) ||
      !aligned_stride(params.q_head_stride, params.q_heads))
    return cudaErrorMisalignedAddress;
  return dispatch(params.dtype, params.head_dim, [&](auto element, auto channels) {
    return run<decltype(element), channels>(params, stream);
  });
}

}  // namespace mustafar::cuda
