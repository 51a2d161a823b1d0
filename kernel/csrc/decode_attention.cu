#include <algorithm>
#include <cmath>
#include <type_traits>

#include "decode_attention.h"
#include "feed.cuh"
#include "launch.cuh"
#include "merge.cuh"
#include "queries.cuh"
#include "sequence.cuh"
#include "staged_feed.cuh"
#include "tile.cuh"
#include "window.cuh"

namespace mustafar::cuda {
namespace {

// The running maximum is raised only when a score exceeds it by this much (in powers of two): weights stay
// below 2^8, far from float16's 65504, and almost no slice after the first rescales the sums.
constexpr float kMaximumSlack = 8.f;

// Query heads of a group that one pass over the cache serves at most: what registers are left for.
struct MostHeads {
  constexpr int operator()(int channels) const { return channels == 256 ? 4 : 8; }
};
// What slices come through, and warps of a block at most: what shared memory and registers have room for.
// Straight to registers needs 12 warps to hide the latency of memory (measured: kernel/csrc/README.md).
template <int kChannels, int kHeads>
constexpr bool kDirect = kChannels == 128 && kHeads <= 4;
template <int kChannels, int kHeads>
using SliceFeed =
    std::conditional_t<kDirect<kChannels, kHeads>, Feed<kChannels / 32>, StagedFeed<kChannels / 32>>;
template <int kChannels, int kHeads>
constexpr int kMaxWarps = kChannels == 64 || kDirect<kChannels, kHeads> ? 12
                          : kChannels == 128                            ? 8
                                                                        : 4;

// A warp's memory: its tile, weights of a slice, its running maxima, what its feeds stage.
__host__ __device__ constexpr int maxima_bytes(int heads) { return (heads * 4 + 15) / 16 * 16; }
template <int kChannels, int kHeads>
constexpr int kWarpBytes = tile_bytes(kChannels) + weights_bytes(kHeads) + maxima_bytes(kHeads) +
                           2 * SliceFeed<kChannels, kHeads>::kStagingBytes;
static_assert(kFewSinkRows * kTilePitch + weights_bytes(8) >= window_scores_bytes(8));
template <int kChannels>
constexpr int kTableBytes = QueryTable<__half, kChannels, 1>::kBytes;  // of any dtype and heads

// A thread fills the table for so many channels at most: with 99 KB of shared memory, the least of sm_80 and
// newer.
template <int kChannels, int kHeads>
constexpr int kLeastWarps = std::min(kMaxWarps<kChannels, kHeads>,
                                     (99 * 1024 - kTableBytes<kChannels>) / kWarpBytes<kChannels, kHeads>);
template <int kChannels, int kHeads>
constexpr int kTablePasses = (kChannels + kLeastWarps<kChannels, kHeads> * kWarpSize - 1) /
                             (kLeastWarps<kChannels, kHeads> * kWarpSize);

// Partial results of the splits: Partial [B, H, splits], then float [B, H, splits, D].
struct Workspace {
  Partial* partials;
  float* sums;
  __host__ __device__ Workspace(void* memory, int64_t rows)
      : partials(static_cast<Partial*>(memory)), sums(reinterpret_cast<float*>(partials + rows)) {}
};

// Where the output of a query head is.
template <class T>
__device__ __forceinline__ T* output_row(const DecodeAttentionParams& p, int64_t b, int64_t head) {
  return static_cast<T*>(p.out) + b * p.out_batch_stride + head * p.out_head_stride;
}
// Visible tokens whose scores are all -inf have weight 0: 0 / 0 is the NaN that dense attention gives.
template <class T>
__device__ __forceinline__ T merged_output(float2 merged, bool nothing_visible) {
  return Half<T>::round(nothing_visible ? 0.f : __fdividef(merged.x, merged.y));
}

// The work of a warp: 64 tokens after another, window chunks and then slices. The scores of a slice are there
// when its values are walked; the keys of the next slice are walked in the same loop, for twice the
// independent instructions. Scores are in powers of two.
//   kOnce  of 64 tokens at most, as where contexts are short
template <class T, int kChannels, int kHeads, bool kOnce>
struct Worker {
  using Queries = QueryTable<T, kChannels, kHeads>;
  using SomeFeed = SliceFeed<kChannels, kHeads>;
  static constexpr int kWords = SomeFeed::kBitmapWords;
  const uint32_t table, tile, weights;
  const int head_dim, lane;
  const float scale;
  Scores<Queries, kHeads> scores;
  ValueProduct<T, kChannels, kHeads> output;
  float weight[kHeads];  // sums of this lane's

  __device__ __forceinline__ void clear() {
    output.clear();
#pragma unroll
    for (int h = 0; h < kHeads; ++h) weight[h] = 0.f;
    if (lane < kHeads) store32(maxima() + lane * 4, __float_as_uint(kNoMaximum));
    __syncwarp();
  }

  // 64 tokens of the window, from `first`.
  __device__ __forceinline__ void chunk(const Sequence& sequence, const DenseWindow& keys,
                                        const DenseWindow& values, int first) {
    const Window<T, kChannels, kHeads> window(sequence, keys, values, first, head_dim, table, tile, lane);
    window.fetch_values();
    window.scores(scratch());
    scores.load(scratch(), lane);
    scale_scores();
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r)
      if (!sequence.in_window(first + lane + r * kWarpSize)) hide(r);
    weigh();
    window.add_values(output, weights);
  }

  // All slices of the feeds, of which there is at least one. The scores of a slice come first; its values are
  // walked together with the keys of the next one: the same code at the start, without values, and at the
  // end, without keys, for the instruction cache. An only slice's keys and values are walked together: two
  // walks one after the other would wait for memory twice.
  __device__ __forceinline__ void slices(SomeFeed& keys, SomeFeed& values) {
    Scatter scatter;
    QueryWalk<Queries, kWords> key_walk(table + Queries::column(lane), head_dim);
    TileWalk<kWords> value_walk(tile_column(tile, lane), head_dim);
    if constexpr (SomeFeed::kStagingBytes > 0) keys.fetch();
    keys.begin(key_walk, head_dim);
    keys.hide(key_walk);
    if constexpr (kOnce) {
      values.begin(value_walk, head_dim);
      values.hide(value_walk);
      scores.clear();
      visit_both(Tour{keys, key_walk, scores}, keys.vectors(), Tour{values, value_walk, scatter},
                 values.vectors());
      scores_done(keys);
      weigh();
      multiply();
      return;
    }
    value_walk.has_gap = false;
    int value_vectors = 0;
    for (bool first = true;; first = false) {
      const bool more = keys.more();
      const int key_vectors = more ? keys.vectors() : 0;
      scores.clear();
      visit_both(Tour{keys, key_walk, scores}, key_vectors, Tour{values, value_walk, scatter}, value_vectors);
      keys.fetch();
      values.fetch();
      if (!first) multiply();
      if (!more) return;
      scores_done(keys);
      weigh();
      keys.begin(key_walk, head_dim);
      values.begin(value_walk, head_dim);
      keys.hide(key_walk);
      values.hide(value_walk);
      value_vectors = values.vectors();
    }
  }

  // Leaves the sums and the Partial of every head in the warp's own memory.
  __device__ __forceinline__ void finish(uint32_t own) {
    output.store(own, lane);
    float maximum[kHeads];
    load_floats(maxima(), maximum);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
        weight[h] += __shfl_xor_sync(kFullWarp, weight[h], distance);
      if (lane == 0)
        cuda::store(own + tile_bytes(kChannels) + h * 8,
                    {__float_as_uint(maximum[h]), __float_as_uint(weight[h])});
    }
  }

 private:
  // Room for float scores [kSliceTokens][kHeads] while there are no weights: behind the tile's channels.
  __device__ __forceinline__ uint32_t scratch() const { return tile + kChannels * kTilePitch; }
  // Where the warp's running maximum of each head is: there are no registers for them.
  __device__ __forceinline__ uint32_t maxima() const { return weights + weights_bytes(kHeads); }
  __device__ __forceinline__ void scale_scores() {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r)
#pragma unroll
      for (int h = 0; h < kHeads; ++h) scores.of[r][h] *= scale;
  }
  __device__ __forceinline__ void hide(int row) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) scores.of[row][h] = -INFINITY;
  }
  __device__ __forceinline__ void scores_done(SomeFeed& keys) {
    scale_scores();
    if (!keys.whole()) {
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r)
        if (!keys.visible(r)) hide(r);
    }
  }

  // Softmax weights of the scores, relative to a maximum that the whole warp shares.
  __device__ __forceinline__ void weigh() {
    float maximum[kHeads];
    load_floats(maxima(), maximum);
    bool above = false;
#pragma unroll
    for (int h = 0; h < kHeads; ++h)
      above |= fmaxf(scores.of[0][h], scores.of[1][h]) > maximum[h] + kMaximumSlack;
    if (__any_sync(kFullWarp, above)) {
      __syncwarp();                   // all lanes have read the maxima
      float factors[2] = {1.f, 1.f};  // of the heads whose output sums this lane holds
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float top = fmaxf(maximum[h], fmaxf(scores.of[0][h], scores.of[1][h]));
#pragma unroll
        for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
          top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, distance));
        const float factor = rescale(maximum[h], top);
        maximum[h] = top;
        weight[h] *= factor;
        if (lane == 0) store32(maxima() + h * 4, __float_as_uint(top));
        if (h / 2 * 2 == output.head(lane)) factors[h % 2] = factor;
      }
      output.scale(factors[0], factors[1]);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float first = exp2_fast(scores.of[0][h] - maximum[h]);
      const float second = exp2_fast(scores.of[1][h] - maximum[h]);
      weight[h] += first + second;
      store_weight(weights, h, Half<T>::pack(first, second), lane);
    }
  }

  __device__ __forceinline__ void multiply() {
    __syncwarp();
    output.add(tile, weights, lane);
    __syncwarp();
  }
};

template <class T, int kChannels, int kHeads, bool kOnce>
__global__ void __launch_bounds__(kWarpSize* kMaxWarps<kChannels, kHeads>, 1)
    decode_attention_kernel(const __grid_constant__ DecodeAttentionParams p,
                            const __grid_constant__ Plan plan, float score_scale) {
  using Queries = QueryTable<T, kChannels, kHeads>;
  using SomeFeed = SliceFeed<kChannels, kHeads>;
  constexpr int kBytes = kWarpBytes<kChannels, kHeads>;
  extern __shared__ __align__(16) char shared[];
  launch_next();
  const int lane = threadIdx.x % kWarpSize;
  const int warp = __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);  // so the compiler knows it uniform
  const int block_warps = blockDim.x / kWarpSize;
  const Place at(plan);
  const Lengths lengths(p, at.b);
  typename Queries::Fill fill(
      static_cast<const T*>(p.q) + at.b * p.q_batch_stride + at.first_head * p.q_head_stride, p.q_head_stride,
      at.heads, p.head_dim);
  const int words = bitmap_words(p.head_dim);
  const Stored stored_keys(p.key, at.b, at.kv_head, words), stored_values(p.value, at.b, at.kv_head, words);
  const uint32_t table = shared_address(shared), of_warps = table + Queries::kBytes;
  const uint32_t region = of_warps + warp * kBytes;
  const Sequence sequence(p, lengths);
  const uint32_t weights = region + tile_bytes(kChannels);
  // Neighbouring pieces of a sequence go to different blocks: all of them end at the same time.
  const int first = warp * plan.splits + at.split, step = block_warps * plan.splits;
  const Share share = sequence.deal(first, step);
  const Slices key_slices(stored_keys, share), value_slices(stored_values, share);
  const uint32_t staging = weights + weights_bytes(kHeads) + maxima_bytes(kHeads);
  SomeFeed keys(key_slices, staging, lane), values(value_slices, staging + SomeFeed::kStagingBytes, lane);
  // While queries and slices come; the tiles of others are for their chunk of the window first.
  if (first >= sequence.chunks) fill_zeros<tile_bytes(kChannels)>(region, lane);
  fill.template finish<kTablePasses<kChannels, kHeads>>(table);

  Worker<T, kChannels, kHeads, kOnce> worker{
      table, region + kGuardRows * kTilePitch, weights, p.head_dim, lane, score_scale};
  worker.clear();
  const DenseWindow key_window(p.k_window, at.b, p.k_window_batch_stride, at.kv_head, p.k_window_head_stride,
                               p.k_window_token_stride);
  const DenseWindow value_window(p.v_window, at.b, p.v_window_batch_stride, at.kv_head,
                                 p.v_window_head_stride, p.v_window_token_stride);
  for (int i = first; i < sequence.chunks; i += step)
    worker.chunk(sequence, key_window, value_window, (sequence.first_chunk + i) * kSliceTokens);
  if (first < sequence.chunks) fill_zeros<tile_bytes(kChannels)>(region, lane);
  __syncwarp();
  if (share.first < share.end) worker.slices(keys, values);
  wait_copies<0>();
  worker.finish(region);

  // Merge the warps of the block. What the table was in is free when all blocks of the cluster are here.
  using Splits = Exchange<kChannels, kHeads>;
  using Warps = WarpMerge<kHeads, kBytes, tile_bytes(kChannels)>;
  static_assert(Splits::kBytes + Warps::kBytes <= Queries::kBytes && Splits::kBytes % 16 == 0);
  static_assert(kMaxWarps<kChannels, kHeads> <= Warps::kMostWarps);
  const Splits splits(table, plan.splits, at.split);
  const Warps warps{of_warps, table + Splits::kBytes, block_warps};
  __syncthreads();
  if (plan.clustered) splits.open(true);
  warps.find_factors(plan.splits == 1);
  __syncthreads();
  if (plan.clustered) {
    splits.wait_open();
#pragma unroll 1
    for (int channel = threadIdx.x; channel < kChannels; channel += blockDim.x) {
      float sums[kHeads];
      warps.add(channel, sums);
      splits.send(channel, sums);
      if (channel < plan.splits)  // to block `channel`
#pragma unroll
        for (int h = 0; h < kHeads; ++h) splits.send_partial(channel, h, warps.partial(h));
    }
    splits.receive();
    for (int i = threadIdx.x; i < splits.share * kHeads; i += blockDim.x) {
      const int h = i % kHeads, own = i / kHeads, channel = at.split * splits.share + own;
      if (h >= at.heads || channel >= p.head_dim) continue;
      const float2 merged = merge_splits(
          plan.splits, [&](int s) { return splits.partial(s, h); },
          [&](int s) { return splits.sum(s, own, h); });
      output_row<T>(p, at.b, at.first_head + h)[channel] =
          merged_output<T>(merged, sequence.nothing_visible());
    }
    return;
  }
  const Workspace workspace(p.workspace, int64_t{p.batch} * p.q_heads * plan.splits);
#pragma unroll 1
  for (int channel = threadIdx.x; channel < p.head_dim; channel += blockDim.x) {
    float sums[kHeads];
    warps.add(channel, sums);
    if (plan.splits == 1) {
      T* const out = output_row<T>(p, at.b, at.first_head) + channel;
#pragma unroll
      for (int h = 0; h < kHeads; ++h)
        if (h < at.heads)
          out[h * p.out_head_stride] = Half<T>::round(sequence.nothing_visible() ? 0.f : sums[h]);
    } else {
      const int64_t row = (at.b * p.q_heads + at.first_head) * plan.splits + at.split;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        if (h >= at.heads) continue;
        workspace.sums[(row + h * plan.splits) * p.head_dim + channel] = sums[h];
        if (channel == 0) workspace.partials[row + h * plan.splits] = warps.partial(h);
      }
    }
  }
}

// One block per query head merges its splits.
template <class T>
__global__ void combine_kernel(const __grid_constant__ DecodeAttentionParams p, int splits) {
  const int64_t b = blockIdx.x / p.q_heads, head = blockIdx.x % p.q_heads;
  const Workspace workspace(p.workspace, int64_t{gridDim.x} * splits);
  const Partial* partials = workspace.partials + int64_t{blockIdx.x} * splits;
  const float* sums = workspace.sums + int64_t{blockIdx.x} * splits * p.head_dim;
  wait_for_previous_launch();

  const bool nothing_visible = Sequence(p, Lengths(p, b)).nothing_visible();
  for (int d = threadIdx.x; d < p.head_dim; d += blockDim.x) {
    const float2 merged = merge_splits(
        splits, [&](int s) { return partials[s]; }, [&](int s) { return sums[int64_t{s} * p.head_dim + d]; });
    output_row<T>(p, b, head)[d] = merged_output<T>(merged, nothing_visible);
  }
}

// Pieces of 64 tokens that a problem of these shapes may have.
int64_t units_of(int slices, int window_capacity) { return slices + slices_of(window_capacity); }

// How a launch of these shapes is cut, whatever the dtype.
template <int kChannels, int kHeads>
cudaError_t prepare(int batch, int q_heads, int kv_heads, int slices, int window_capacity, Blocks* blocks,
                    Plan* plan) {
  MUSTAFAR_CUDA_TRY(size_blocks(kTableBytes<kChannels>, kWarpBytes<kChannels, kHeads>,
                                kMaxWarps<kChannels, kHeads>, 1, blocks));
  if (blocks->threads * kTablePasses<kChannels, kHeads> < kChannels) return cudaErrorInvalidConfiguration;
  const int64_t units = units_of(slices, window_capacity);
  *plan = make_plan(batch, q_heads, kv_heads, MostHeads()(kChannels), units, blocks->teams, blocks->resident,
                    KernelClusters<decode_attention_kernel<__half, kChannels, kHeads, false>>{*blocks});
  const int64_t of_block = (units + plan->splits - 1) / plan->splits;
  // No more warps than the block has units for, but 8 bring in the tables.
  blocks->threads =
      kWarpSize * static_cast<int>(std::min<int64_t>(blocks->teams, std::max<int64_t>(8, of_block)));
  return cudaSuccess;
}

template <class T, int kChannels, int kHeads>
cudaError_t run(const DecodeAttentionParams& p, cudaStream_t stream) {
  Blocks blocks;
  Plan plan;
  MUSTAFAR_CUDA_TRY((prepare<kChannels, kHeads>(p.batch, p.q_heads, p.kv_heads, p.slices, p.window_capacity,
                                                &blocks, &plan)));
  if (plan.splits > 1 && !plan.clustered && !(p.workspace != nullptr && aligned(p.workspace, 16)))
    return cudaErrorInvalidValue;
  // Whether no warp gets more than one piece.
  const bool once =
      units_of(p.slices, p.window_capacity) <= int64_t{plan.splits} * (blocks.threads / kWarpSize);
  const float log2_e = 1.44269504f;
  MUSTAFAR_CUDA_TRY(launch(once ? decode_attention_kernel<T, kChannels, kHeads, true>
                                : decode_attention_kernel<T, kChannels, kHeads, false>,
                           plan, blocks, stream, p, plan, p.scale * log2_e));
  if (plan.splits == 1 || plan.clustered) return cudaSuccess;
  return launch_after(combine_kernel<T>, int64_t{p.batch} * p.q_heads, std::min(kChannels, 128), stream, p,
                      plan.splits);
}

cudaError_t check_windows(const DecodeAttentionParams& p) {
  for (const int64_t stride : {p.k_window_token_stride, p.v_window_token_stride})
    if (stride < 0 || stride / kVectorValues > INT32_MAX) return cudaErrorInvalidValue;
  const bool ok = aligned(p.k_window, 16) && aligned(p.v_window, 16) &&
                  aligned_stride(p.k_window_batch_stride, p.batch) &&
                  aligned_stride(p.v_window_batch_stride, p.batch) &&
                  aligned_stride(p.k_window_head_stride, p.kv_heads) &&
                  aligned_stride(p.v_window_head_stride, p.kv_heads) &&
                  aligned_stride(p.k_window_token_stride, p.window_capacity) &&
                  aligned_stride(p.v_window_token_stride, p.window_capacity);
  return ok ? cudaSuccess : cudaErrorMisalignedAddress;
}

cudaError_t check(const DecodeAttentionParams& p) {
  MUSTAFAR_CUDA_TRY(check_shape(p.batch, p.q_heads, p.kv_heads, p.head_dim, p.dtype));
  MUSTAFAR_CUDA_TRY(check_view(p.key, p.batch, p.kv_heads, p.slices));
  MUSTAFAR_CUDA_TRY(check_view(p.value, p.batch, p.kv_heads, p.slices));
  if (p.window_capacity < 0 || p.sliding_window < 0) return cudaErrorInvalidValue;
  if (int64_t{p.slices} * kSliceTokens + p.window_capacity > INT32_MAX) return cudaErrorInvalidValue;
  return p.window_capacity == 0 ? cudaSuccess : check_windows(p);
}

}  // namespace

int64_t decode_attention_workspace_bytes(int batch, int q_heads, int kv_heads, int head_dim, int slices,
                                         int window_capacity) {
  if (batch == 0 || check_shape(batch, q_heads, kv_heads, head_dim, DType::kFloat16) != cudaSuccess) return 0;
  int splits = 0;
  const cudaError_t error = dispatch_heads(
      DType::kFloat16, head_dim, q_heads / kv_heads, MostHeads(), [&](auto, auto channels, auto heads) {
        Blocks blocks;
        Plan plan;
        MUSTAFAR_CUDA_TRY(
            (prepare<channels, heads>(batch, q_heads, kv_heads, slices, window_capacity, &blocks, &plan)));
        splits = plan.clustered ? 1 : plan.splits;
        return cudaSuccess;
      });
  if (error != cudaSuccess) return -1;
  if (splits == 1) return 0;
  return int64_t{batch} * q_heads * splits * static_cast<int64_t>(sizeof(Partial) + head_dim * sizeof(float));
}

cudaError_t decode_attention(const DecodeAttentionParams& params, cudaStream_t stream) {
  if (params.batch == 0) return cudaSuccess;
  MUSTAFAR_CUDA_TRY(check(params));
  return dispatch_heads(params.dtype, params.head_dim, params.q_heads / params.kv_heads, MostHeads(),
                        [&](auto element, auto channels, auto heads) {
                          return run<decltype(element), channels, heads>(params, stream);
                        });
}

}  // namespace mustafar::cuda
