#include "feed.cuh"
#include "launch.cuh"
#include "merge.cuh"
#include "staged_feed.cuh"
#include "tile.cuh"
#include "value_output.h"

namespace mustafar::cuda {
namespace {

struct MostHeads {  // of a pass: rows of the mma
  constexpr int operator()(int /*channels*/) const { return 8; }
};
constexpr int max_warps(int channels) { return channels == 256 ? 6 : 11; }
template <int kChannels>
using ValueFeed = StagedFeed<kChannels / 32>;
template <int kChannels, int kHeads>
constexpr int kWarpBytes =
    tile_bytes(kChannels) + weights_bytes(kHeads) + ValueFeed<kChannels>::kStagingBytes;

// Each warp expands slices of 64 values into its tile, one after another, and multiplies each by the
// probabilities of all heads of the pass at once. The block adds up its warps, then the cluster its splits;
// where they are no cluster, the workspace holds the sums of each split, [B, H, splits, D].
template <class T, int kChannels, int kHeads>
__global__ void __launch_bounds__(kWarpSize* max_warps(kChannels))
    value_output_kernel(const __grid_constant__ ValueOutputParams p, const __grid_constant__ Plan plan) {
  constexpr int kBytes = kWarpBytes<kChannels, kHeads>;
  extern __shared__ __align__(16) char shared[];
  launch_next();
  const int lane = threadIdx.x % kWarpSize;
  const int warp = __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);  // so the compiler knows it uniform
  const Place at(plan);
  const int block_warps = blockDim.x / kWarpSize;
  const uint32_t of_warps = shared_address(shared), region = of_warps + warp * kBytes;
  const uint32_t tile = region + kGuardRows * kTilePitch, weights = region + tile_bytes(kChannels);

  const Slices slices(Stored(p.value, at.b, at.kv_head, bitmap_words(p.head_dim)),
                      {at.split * block_warps + warp, static_cast<int32_t>(slices_of(p.tokens)),
                       plan.splits * block_warps, 0, static_cast<int32_t>(p.tokens)});
  ValueFeed<kChannels> feed(slices, weights + weights_bytes(kHeads), lane);
  const uint16_t* probabilities =
      static_cast<const uint16_t*>(p.p) + at.b * p.p_batch_stride + at.first_head * p.p_head_stride;
  uint32_t pairs[kHeads];  // of the lane's two tokens of a slice
  const auto load_pairs = [&](int slice) {
    const int64_t token = int64_t{slice} * kSliceTokens + lane;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const uint16_t* from = probabilities + h * p.p_head_stride + token;
      pairs[h] = h < at.heads && token < p.tokens ? __ldg(from) : 0;
      if (h < at.heads && token + kWarpSize < p.tokens) pairs[h] |= uint32_t{__ldg(from + kWarpSize)} << 16;
    }
  };
  fill_zeros<tile_bytes(kChannels)>(region, lane);
  ValueProduct<T, kChannels, kHeads> product;
  product.clear();
  __syncwarp();
  if (slices.first < slices.end) {
    Scatter scatter;
    TileWalk<ValueFeed<kChannels>::kBitmapWords> walk(tile_column(tile, lane), p.head_dim);
    load_pairs(slices.first);
    feed.fetch();
    feed.begin(walk, p.head_dim);
    feed.hide(walk);
    while (feed.more()) {
#pragma unroll
      for (int h = 0; h < kHeads; ++h) store_weight(weights, h, pairs[h], lane);
      load_pairs(feed.slice() + slices.stride);
      visit_all(Tour{feed, walk, scatter});
      feed.fetch();
      __syncwarp();
      product.add(tile, weights, lane);
      __syncwarp();
      feed.begin(walk, p.head_dim);
      feed.hide(walk);
    }
  }
  wait_copies<0>();

  // The sums of a warp lie at the start of its memory; what the splits send each other, behind those of the
  // first.
  using Splits = Exchange<kChannels, kHeads>;
  constexpr int kSumBytes = kChannels * kHeads * 4;
  static_assert(kSumBytes + Splits::kBytes <= kBytes);
  const Splits splits(of_warps + kSumBytes, plan.splits, at.split);
  product.store(region, lane);
  __syncthreads();
  if (plan.clustered) {
    splits.open(false);
    splits.wait_open();
  }
  const auto write = [&](int h, int channel, float sum) {
    if (h < at.heads && channel < p.head_dim)
      static_cast<T*>(p.out)[at.b * p.out_batch_stride + (at.first_head + h) * p.out_head_stride + channel] =
          Half<T>::round(sum);
  };
  for (int channel = threadIdx.x; channel < kChannels; channel += blockDim.x) {
    float sums[kHeads] = {};
#pragma unroll 4
    for (int w = 0; w < block_warps; ++w) {
      float of_warp[kHeads];
      load_floats(of_warps + w * kBytes + channel * kHeads * 4, of_warp);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) sums[h] += of_warp[h];
    }
    if (plan.clustered) {
      splits.send(channel, sums);
      continue;
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const int64_t row = (at.b * p.q_heads + at.first_head + h) * plan.splits + at.split;
      if (plan.splits == 1)
        write(h, channel, sums[h]);
      else if (h < at.heads && channel < p.head_dim)
        static_cast<float*>(p.workspace)[row * p.head_dim + channel] = sums[h];
    }
  }
  if (!plan.clustered) return;

  splits.receive();
  for (int i = threadIdx.x; i < splits.share * kHeads; i += blockDim.x) {
    float sum = 0.f;
#pragma unroll 4
    for (int s = 0; s < plan.splits; ++s) sum += splits.sum(s, i / kHeads, i % kHeads);
    write(i % kHeads, at.split * splits.share + i / kHeads, sum);
  }
}

// One block per query head adds up its splits, in order.
template <class T>
__global__ void combine_kernel(const __grid_constant__ ValueOutputParams p, int splits) {
  const int64_t b = blockIdx.x / p.q_heads, q_head = blockIdx.x % p.q_heads;
  const float* sums = static_cast<const float*>(p.workspace) + blockIdx.x * int64_t{splits} * p.head_dim;
  wait_for_previous_launch();
  for (int d = threadIdx.x; d < p.head_dim; d += blockDim.x) {
    float sum = 0.f;
#pragma unroll 8
    for (int i = 0; i < splits; ++i) sum += sums[int64_t{i} * p.head_dim + d];
    static_cast<T*>(p.out)[b * p.out_batch_stride + q_head * p.out_head_stride + d] = Half<T>::round(sum);
  }
}

// How a launch of these shapes is cut.
template <int kChannels, int kHeads>
cudaError_t prepare(int batch, int q_heads, int kv_heads, int slices, Blocks* blocks, Plan* plan) {
  MUSTAFAR_CUDA_TRY(size_blocks(0, kWarpBytes<kChannels, kHeads>, max_warps(kChannels), 1, blocks));
  *plan = make_plan(batch, q_heads, kv_heads, MostHeads()(kChannels), slices, blocks->teams, blocks->resident,
                    KernelClusters<value_output_kernel<__half, kChannels, kHeads>>{*blocks});
  return cudaSuccess;
}

template <class T, int kChannels, int kHeads>
cudaError_t run(const ValueOutputParams& p, cudaStream_t stream) {
  Blocks blocks;
  Plan plan;
  MUSTAFAR_CUDA_TRY((prepare<kChannels, kHeads>(p.batch, p.q_heads, p.kv_heads, p.slices, &blocks, &plan)));
  if (plan.splits > 1 && !plan.clustered && !(p.workspace != nullptr && aligned(p.workspace, 16)))
    return cudaErrorInvalidValue;
  MUSTAFAR_CUDA_TRY(launch(value_output_kernel<T, kChannels, kHeads>, plan, blocks, stream, p, plan));
  if (plan.splits == 1 || plan.clustered) return cudaSuccess;
  return launch_after(combine_kernel<T>, int64_t{p.batch} * p.q_heads, std::min(kChannels, 128), stream, p,
                      plan.splits);
}

// Up to 4 heads take the kernel for 4: fewer save nothing.
constexpr int kernel_heads(int heads) { return heads <= 4 ? 4 : 8; }

}  // namespace

int64_t value_output_workspace_bytes(int batch, int q_heads, int kv_heads, int head_dim, int slices) {
  if (batch == 0 || check_shape(batch, q_heads, kv_heads, head_dim, DType::kFloat16) != cudaSuccess) return 0;
  int splits = 0;
  const cudaError_t error = dispatch_heads(
      DType::kFloat16, head_dim, q_heads / kv_heads, MostHeads(), [&](auto, auto channels, auto heads) {
        Blocks blocks;
        Plan plan;
        MUSTAFAR_CUDA_TRY(
            (prepare<channels, kernel_heads(heads)>(batch, q_heads, kv_heads, slices, &blocks, &plan)));
        splits = plan.clustered ? 1 : plan.splits;
        return cudaSuccess;
      });
  if (error != cudaSuccess) return -1;
  return splits == 1 ? 0 : int64_t{batch} * q_heads * splits * head_dim * int64_t{sizeof(float)};
}

cudaError_t value_output(const ValueOutputParams& params, cudaStream_t stream) {
  if (params.batch == 0) return cudaSuccess;
  MUSTAFAR_CUDA_TRY(
      check_shape(params.batch, params.q_heads, params.kv_heads, params.head_dim, params.dtype));
  if (params.tokens < 0 || params.tokens > int64_t{params.slices} * kSliceTokens ||
      params.tokens > INT32_MAX - kSliceTokens)
    return cudaErrorInvalidValue;
  MUSTAFAR_CUDA_TRY(check_view(params.value, params.batch, params.kv_heads, params.slices));
  return dispatch_heads(params.dtype, params.head_dim, params.q_heads / params.kv_heads, MostHeads(),
                        [&](auto element, auto channels, auto heads) {
                          return run<decltype(element), channels, kernel_heads(heads)>(params, stream);
                        });
}

}  // namespace mustafar::cuda
