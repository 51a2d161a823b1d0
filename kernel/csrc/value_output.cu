#include "launch.cuh"
#include "tile.cuh"
#include "value_output.h"

namespace mustafar::cuda {
namespace {

constexpr int kHeads = 8;  // of a pass: rows of the mma
constexpr int kRing = 2;   // 3 and 4 are no faster (measured)
constexpr int max_warps(int channels) { return channels == 256 ? 8 : 12; }
template <int kChannels>
constexpr int kWarpBytes =
    tile_bytes(kChannels) + weights_bytes(kHeads) + RowPair<kChannels / 32, kRing>::kStagingBytes;

// Each warp expands slices of 64 values into its tile, one after another, and multiplies each by the
// probabilities of all heads of the group at once. The block adds up its warps; `partial` holds the sums of
// each split, [B, H, splits, D], unless there is one split.
template <class T, int kChannels>
__global__ void __launch_bounds__(kWarpSize* max_warps(kChannels))
    value_output_kernel(const __grid_constant__ ValueOutputParams p, const __grid_constant__ Plan plan) {
  constexpr int kWords = kChannels / 32, kBytes = kWarpBytes<kChannels>;
  extern __shared__ __align__(16) char shared[];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const Place at(plan, blockIdx.x, p.q_heads, p.kv_heads);

  const int block_warps = blockDim.x / kWarpSize;
  char* const own = shared + warp * kBytes;
  const uint32_t region = shared_address(own);
  const uint32_t tile = region + kGuardRows * kTilePitch;
  const uint32_t weights = region + tile_bytes(kChannels);
  fill_zeros(region, kBytes, lane);
  ValueProduct<T, kChannels, kHeads> product;
  product.clear();
  const uint16_t* probabilities =
      static_cast<const uint16_t*>(p.p) + at.b * p.p_batch_stride + at.first_head * p.p_head_stride;
  __syncwarp();

  const int words = bitmap_words(p.head_dim);
  const int slices = slices_of(p.tokens), stride = plan.splits * block_warps;
  RowPair<kWords, kRing> rows(weights + weights_bytes(kHeads), lane);
  const auto begin = [&](const Location& location, int index) {
    const int64_t token = int64_t{index} * kSliceTokens + lane;
    const bool visible[kRowsPerLane] = {token < p.tokens, token + kWarpSize < p.tokens};
    rows.begin(slice_rows(p.value, location, at.b, at.kv_head, index, words), visible, words, lane);
    commit_copies();
  };
  int slice = at.split * block_warps + warp;
  Location next;
  if (slice < slices) begin(locate(p.value, at.b, at.kv_head, slice), slice);
  for (; slice < slices; slice += stride) {
    const bool more = slice + stride < slices;
    if (more) next = locate(p.value, at.b, at.kv_head, slice + stride);
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      const uint16_t* from = probabilities + head * p.p_head_stride + int64_t{slice} * kSliceTokens + lane;
      uint32_t pair = 0;
      if (head < at.heads && rows.visible[0]) pair = __ldg(from);
      if (head < at.heads && rows.visible[1]) pair |= uint32_t{__ldg(from + kWarpSize)} << 16;
      store_weight(weights, head, pair, lane);
    }
    wait_copies<0>();
    expand(rows, tile, p.head_dim, words, lane);
    if (more) begin(next, slice + stride);
    __syncwarp();
    product.add(tile, weights, p.head_dim, lane);
    __syncwarp();
  }

  __syncwarp();
  product.store(reinterpret_cast<float*>(own), lane);
  __syncthreads();
  for (int i = threadIdx.x; i < at.heads * p.head_dim; i += blockDim.x) {
    const int head = i / p.head_dim, d = i % p.head_dim;
    float sum = 0.f;
    for (int w = 0; w < block_warps; ++w)
      sum += reinterpret_cast<const float*>(shared + w * kBytes)[head * kChannels + d];
    const int64_t q_head = at.first_head + head;
    if (plan.splits == 1) {
      static_cast<T*>(p.out)[at.b * p.out_batch_stride + q_head * p.out_head_stride + d] =
          Half<T>::round(sum);
    } else {
      const int64_t row = (at.b * p.q_heads + q_head) * plan.splits + at.split;
      static_cast<float*>(p.workspace)[row * p.head_dim + d] = sum;
    }
  }
}

// One block per query head adds up its splits, in order.
template <class T>
__global__ void combine_kernel(const __grid_constant__ ValueOutputParams p, int splits) {
  const int64_t b = blockIdx.x / p.q_heads, q_head = blockIdx.x % p.q_heads;
  const float* sums = static_cast<const float*>(p.workspace) + blockIdx.x * int64_t{splits} * p.head_dim;
  for (int d = threadIdx.x; d < p.head_dim; d += blockDim.x) {
    float sum = 0.f;
#pragma unroll 8
    for (int i = 0; i < splits; ++i) sum += sums[int64_t{i} * p.head_dim + d];
    static_cast<T*>(p.out)[b * p.out_batch_stride + q_head * p.out_head_stride + d] = Half<T>::round(sum);
  }
}

// How these shapes are launched, whatever the dtype.
cudaError_t plan_for(int batch, int q_heads, int kv_heads, int head_dim, int slices, Blocks* blocks,
                     Plan* plan) {
  const int channels = compiled_channels(head_dim);
  const int bytes = channels == 64 ? kWarpBytes<64> : channels == 128 ? kWarpBytes<128> : kWarpBytes<256>;
  MUSTAFAR_CUDA_TRY(size_blocks(0, bytes, max_warps(channels), blocks));
  *plan = make_plan(batch, q_heads, kv_heads, kHeads, slices, *blocks);
  return cudaSuccess;
}

template <class T, int kChannels>
cudaError_t run(const ValueOutputParams& p, const Plan& plan, const Blocks& blocks, cudaStream_t stream) {
  MUSTAFAR_CUDA_TRY(launch(value_output_kernel<T, kChannels>, plan, blocks, stream, p, plan));
  if (plan.splits == 1) return cudaSuccess;
  combine_kernel<T><<<p.batch * p.q_heads, std::min(kChannels, 128), 0, stream>>>(p, plan.splits);
  return cudaGetLastError();
}

}  // namespace

int64_t value_output_workspace_bytes(int batch, int q_heads, int kv_heads, int head_dim, int slices) {
  if (batch == 0) return 0;
  Blocks blocks;
  Plan plan;
  if (check_shape(batch, q_heads, kv_heads, head_dim, DType::kFloat16) != cudaSuccess) return 0;
  if (plan_for(batch, q_heads, kv_heads, head_dim, slices, &blocks, &plan) != cudaSuccess) return -1;
  return plan.splits == 1 ? 0 : int64_t{batch} * q_heads * plan.splits * head_dim * int64_t{sizeof(float)};
}

cudaError_t value_output(const ValueOutputParams& params, cudaStream_t stream) {
  if (params.batch == 0) return cudaSuccess;
  MUSTAFAR_CUDA_TRY(
      check_shape(params.batch, params.q_heads, params.kv_heads, params.head_dim, params.dtype));
  if (params.tokens < 0 || params.tokens > int64_t{params.slices} * kSliceTokens)
    return cudaErrorInvalidValue;
  MUSTAFAR_CUDA_TRY(check_view(params.value, params.batch, params.kv_heads, params.slices));
  Blocks blocks;
  Plan plan;
  MUSTAFAR_CUDA_TRY(plan_for(params.batch, params.q_heads, params.kv_heads, params.head_dim, params.slices,
                             &blocks, &plan));
  if (plan.splits > 1 && !(params.workspace != nullptr && aligned(params.workspace, 16)))
    return cudaErrorInvalidValue;
  return dispatch(params.dtype, params.head_dim, [&](auto element, auto channels) {
    return run<decltype(element), channels>(params, plan, blocks, stream);
  });
}

}  // namespace mustafar::cuda
