#include <cmath>

#include "decode_attention.h"
#include "launch.cuh"
#include "queries.cuh"
#include "sequence.cuh"
#include "tile.cuh"

namespace mustafar::cuda {
namespace {

// The running maximum is raised only when a score exceeds it by this much (in powers of two): weights stay
// below 2^8, far from float16's 65504, and almost no slice after the first rescales the sums.
constexpr float kMaximumSlack = 8.f;

// Query heads of a group that one pass over the cache serves at most: what registers are left for.
__host__ __device__ constexpr int max_heads(int channels) { return channels == 256 ? 4 : 8; }
// Heads of a pass that the kernel is compiled for.
constexpr int compiled_heads(int heads) { return heads <= 1 ? 1 : heads <= 2 ? 2 : heads <= 4 ? 4 : 8; }

// Warps of a block at most. Shared memory limits them (launch.cuh), for 64 channels registers do.
__host__ __device__ constexpr int max_warps(int channels) { return channels == 64 ? 10 : 8; }

// Staged vectors of a row: a third gains 3 %, but for 8 heads at 128 channels it costs the eighth warp of an
// SM.
template <int kChannels, int kHeads>
using StagedRows = RowPair<kChannels / 32, kHeads == 8 ? 2 : 3>;

template <int kChannels, int kHeads>
constexpr int kWarpBytes =
    tile_bytes(kChannels) + weights_bytes(kHeads) + 2 * StagedRows<kChannels, kHeads>::kStagingBytes;
template <int kChannels>
constexpr int kTableBytes = QueryTable<__half, kChannels, 1>::kBytes;  // of any dtype and heads

// Softmax over part of the tokens: sums of exp2(score - maximum), and the output's sums follow it.
struct Partial {
  float maximum, sum;
};

// Factor that brings sums relative to `from` to those relative to `to`. No score yet is -inf.
__device__ __forceinline__ float rescale(float from, float to) {
  return from == to ? 1.f : exp2_fast(from - to);
}

// Partial results of the splits: Partial [B, H, splits], then float [B, H, splits, D].
struct Workspace {
  Partial* partials;
  float* sums;
  __host__ __device__ Workspace(void* memory, int64_t rows)
      : partials(static_cast<Partial*>(memory)), sums(reinterpret_cast<float*>(partials + rows)) {}
};

template <class T>
__device__ __forceinline__ void write_output(const DecodeAttentionParams& p, int64_t b, int64_t head, int d,
                                             float sum, float weight, bool nothing_visible) {
  // Visible tokens whose scores are all -inf have weight 0: 0 / 0 is the NaN that dense attention gives.
  static_cast<T*>(p.out)[b * p.out_batch_stride + head * p.out_head_stride + d] =
      Half<T>::round(nothing_visible ? 0.f : sum / weight);
}

// Each warp takes units of 64 tokens (sequence.cuh) one after another. Scores of a unit come first, lane by
// lane on the non-zeros of its keys; then, at once, its values are expanded to the tile and the next unit's
// scores computed; then the tensor cores multiply the tile by the softmax weights.
template <class T, int kChannels, int kHeads>
__global__ void __launch_bounds__(kWarpSize* max_warps(kChannels))
    decode_attention_kernel(const __grid_constant__ DecodeAttentionParams p,
                            const __grid_constant__ Plan plan, float score_scale) {
  constexpr int kBytes = kWarpBytes<kChannels, kHeads>;
  using Queries = QueryTable<T, kChannels, kHeads>;
  using Rows = StagedRows<kChannels, kHeads>;
  using KeyWalk = Walk<Queries::kPitch, 0, Rows>;
  extern __shared__ __align__(16) char shared[];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const Place at(plan, blockIdx.x, p.q_heads, p.kv_heads);
  const Sequence sequence(p, at.b);

  const int block_warps = blockDim.x / kWarpSize;
  char* const own = shared + Queries::kBytes + warp * kBytes;
  const uint32_t table = shared_address(shared), region = shared_address(own);
  const uint32_t tile = region + kGuardRows * kTilePitch, weights = region + tile_bytes(kChannels);
  const uint32_t staging = weights + weights_bytes(kHeads);
  Rows keys(staging, lane), values(staging + Rows::kStagingBytes, lane);

  const int words = bitmap_words(p.head_dim);
  const int self = at.split * block_warps + warp, warps = plan.splits * block_warps;
  const DenseWindow k_window{p.k_window, p.k_window_batch_stride, p.k_window_head_stride,
                             p.k_window_token_stride, p.head_dim};
  const DenseWindow v_window{p.v_window, p.v_window_batch_stride, p.v_window_head_stride,
                             p.v_window_token_stride, p.head_dim};
  const auto key_location = [&](const Unit& unit) { return locate(unit, p.key, k_window, at.b, at.kv_head); };
  const auto value_location = [&](const Unit& unit) {
    return locate(unit, p.value, v_window, at.b, at.kv_head);
  };
  const auto begin = [&](Rows& rows, const Unit& unit, const Location& location, const CompressedView& view,
                         const DenseWindow& window) {
    const bool visible[kRowsPerLane] = {sequence.visible(unit, lane),
                                        sequence.visible(unit, lane + kWarpSize)};
    rows.begin(unit_rows(unit, location, view, window, at.b, at.kv_head, words), visible, words, lane);
  };

  // Scores of the lane's two tokens with every head.
  float scores[kRowsPerLane][kHeads];
  const auto clear_scores = [&] {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r)
#pragma unroll
      for (int h = 0; h < kHeads; ++h) scores[r][h] = 0.f;
  };
  auto add_score = [&](int row, uint32_t address, uint32_t pair, bool high) {
    Queries::add(scores[row], address, high ? Half<T>::high(pair) : Half<T>::low(pair));
  };
  Scatter scatter;

  Unit unit, next, after;
  bool more = sequence.deal(self, warps, 0, &unit), more_next = more && sequence.deal(self, warps, 1, &next);
  if (more) begin(keys, unit, key_location(unit), p.key, k_window);
  commit_copies();
  Queries::fill(table, shared_address(shared + Queries::kBytes),
                static_cast<const T*>(p.q) + at.b * p.q_batch_stride + at.first_head * p.q_head_stride,
                p.q_head_stride, at.heads, p.head_dim);
  fill_zeros(region, tile_bytes(kChannels), lane);
  __syncwarp();
  if (more) {
    clear_scores();
    wait_copies<0>();
    KeyWalk walk(keys, table + Queries::column(lane), p.head_dim, words);
    walk_from(0, 0, walk, add_score);
    walk.finish(clear_scores, add_score);
    begin(values, unit, value_location(unit), p.value, v_window);
    if (more_next) begin(keys, next, key_location(next), p.key, k_window);
    commit_copies();
  }

  ValueProduct<T, kChannels, kHeads> output;
  output.clear();
  Partial partial[kHeads];  // maximum is the warp's, sum this lane's
#pragma unroll
  for (int h = 0; h < kHeads; ++h) partial[h] = {-INFINITY, 0.f};

  for (int turn = 2; more; ++turn) {
    // Here the scores of `unit` are known, and its values and the keys of `next` are on their way.
    const bool more_after = more_next && sequence.deal(self, warps, turn, &after);
    Location value_at, key_at;
    if (more_next) value_at = value_location(next);
    if (more_after) key_at = key_location(after);

    // Softmax weights, relative to a maximum that the whole warp shares.
    bool above = false;
#pragma unroll
    for (int h = 0; h < kHeads; ++h)
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r) {
        scores[r][h] = values.visible[r] ? scores[r][h] * score_scale : -INFINITY;
        above |= scores[r][h] > partial[h].maximum + kMaximumSlack;
      }
    if (__any_sync(kFullWarp, above)) {
      float own_factor = 1.f;  // of the head whose output sums this lane holds
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float top = fmaxf(partial[h].maximum, fmaxf(scores[0][h], scores[1][h]));
#pragma unroll
        for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
          top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, distance));
        const float factor = rescale(partial[h].maximum, top);
        partial[h].maximum = top;
        partial[h].sum *= factor;
        if (h == output.head(lane)) own_factor = factor;
      }
      output.scale(own_factor);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float maximum = partial[h].maximum == -INFINITY ? 0.f : partial[h].maximum;
      const float first = exp2_fast(scores[0][h] - maximum), second = exp2_fast(scores[1][h] - maximum);
      partial[h].sum += first + second;
      store_weight(weights, h, Half<T>::pack(first, second), lane);
    }

    clear_scores();
    wait_copies<0>();
    if (more_next) {
      TileWalk<Rows> value_walk(values, tile_column(tile, lane), p.head_dim, words);
      KeyWalk key_walk(keys, table + Queries::column(lane), p.head_dim, words);
      walk_both(key_walk, add_score, value_walk, scatter);
      key_walk.finish(clear_scores, add_score);
      value_walk.finish([] {}, scatter);
      begin(values, next, value_at, p.value, v_window);
      if (more_after) begin(keys, after, key_at, p.key, k_window);
      commit_copies();
    } else {
      expand(values, tile, p.head_dim, words, lane);
    }
    __syncwarp();
    output.add(tile, weights, p.head_dim, lane);
    __syncwarp();
    next = after, more = more_next, more_next = more_after;
  }

  // Merge the warps of the block: each leaves its sums in its own tile.
  output.store(reinterpret_cast<float*>(own), lane);
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
      partial[h].sum += __shfl_xor_sync(kFullWarp, partial[h].sum, distance);
    if (lane == 0) reinterpret_cast<Partial*>(own + tile_bytes(kChannels))[h] = partial[h];
  }
  __syncthreads();
  const Workspace workspace(p.workspace, int64_t{p.batch} * p.q_heads * plan.splits);
  for (int i = threadIdx.x; i < at.heads * p.head_dim; i += blockDim.x) {
    const int h = i / p.head_dim, d = i % p.head_dim;
    const char* first = shared + Queries::kBytes;
    const auto of_warp = [&](int w) {
      return reinterpret_cast<const Partial*>(first + w * kBytes + tile_bytes(kChannels))[h];
    };
    float maximum = -INFINITY, sum = 0.f, weight = 0.f;
    for (int w = 0; w < block_warps; ++w) maximum = fmaxf(maximum, of_warp(w).maximum);
    for (int w = 0; w < block_warps; ++w) {
      const float factor = rescale(of_warp(w).maximum, maximum);
      weight += of_warp(w).sum * factor;
      sum += reinterpret_cast<const float*>(first + w * kBytes)[h * kChannels + d] * factor;
    }
    const int64_t head = at.first_head + h;
    if (plan.splits == 1) {
      write_output<T>(p, at.b, head, d, sum, weight, sequence.nothing_visible());
    } else {
      const int64_t row = (at.b * p.q_heads + head) * plan.splits + at.split;
      workspace.sums[row * p.head_dim + d] = sum;
      if (d == 0) workspace.partials[row] = {maximum, weight};
    }
  }
}

// One block per query head merges its splits, in order.
template <class T>
__global__ void combine_kernel(const __grid_constant__ DecodeAttentionParams p, int splits) {
  __shared__ float factors[kMaxSplits];
  const int64_t b = blockIdx.x / p.q_heads, head = blockIdx.x % p.q_heads;
  const Workspace workspace(p.workspace, int64_t{gridDim.x} * splits);
  const Partial* partials = workspace.partials + int64_t{blockIdx.x} * splits;
  const float* sums = workspace.sums + int64_t{blockIdx.x} * splits * p.head_dim;

  float maximum = -INFINITY;
  for (int i = 0; i < splits; ++i) maximum = fmaxf(maximum, partials[i].maximum);
  for (int i = threadIdx.x; i < splits; i += blockDim.x) factors[i] = rescale(partials[i].maximum, maximum);
  __syncthreads();
  float weight = 0.f;
  for (int i = 0; i < splits; ++i) weight += partials[i].sum * factors[i];
  const bool nothing_visible = Sequence(p, b).nothing_visible();
  for (int d = threadIdx.x; d < p.head_dim; d += blockDim.x) {
    float sum = 0.f;
#pragma unroll 8
    for (int i = 0; i < splits; ++i) sum += sums[int64_t{i} * p.head_dim + d] * factors[i];
    write_output<T>(p, b, head, d, sum, weight, nothing_visible);
  }
}

template <int kChannels>
constexpr int warp_bytes(int heads) {
  return heads == 1   ? kWarpBytes<kChannels, 1>
         : heads == 2 ? kWarpBytes<kChannels, 2>
         : heads == 4 ? kWarpBytes<kChannels, 4>
                      : kWarpBytes<kChannels, 8>;
}

// How these shapes are launched, whatever the dtype.
cudaError_t plan_for(int batch, int q_heads, int kv_heads, int head_dim, int slices, int window_capacity,
                     Blocks* blocks, Plan* plan) {
  const int channels = compiled_channels(head_dim), most_heads = max_heads(channels);
  const int chunks = (q_heads / kv_heads + most_heads - 1) / most_heads;
  const int heads = compiled_heads((q_heads / kv_heads + chunks - 1) / chunks);
  const int fixed = channels == 64 ? kTableBytes<64> : channels == 128 ? kTableBytes<128> : kTableBytes<256>;
  const int per_warp = channels == 64    ? warp_bytes<64>(heads)
                       : channels == 128 ? warp_bytes<128>(heads)
                                         : warp_bytes<256>(heads);
  MUSTAFAR_CUDA_TRY(size_blocks(fixed, per_warp, max_warps(channels), blocks));
  const int64_t units = slices + kWindowUnitCost * slices_of(window_capacity);
  *plan = make_plan(batch, q_heads, kv_heads, most_heads, units, *blocks);
  return cudaSuccess;
}

template <class T, int kChannels, int kHeads>
cudaError_t run(const DecodeAttentionParams& p, const Plan& plan, const Blocks& blocks, cudaStream_t stream) {
  const float log2_e = 1.44269504f;
  MUSTAFAR_CUDA_TRY(
      launch(decode_attention_kernel<T, kChannels, kHeads>, plan, blocks, stream, p, plan, p.scale * log2_e));
  if (plan.splits == 1) return cudaSuccess;
  combine_kernel<T><<<p.batch * p.q_heads, std::min(kChannels, 128), 0, stream>>>(p, plan.splits);
  return cudaGetLastError();
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
  Blocks blocks;
  Plan plan;
  if (plan_for(batch, q_heads, kv_heads, head_dim, slices, window_capacity, &blocks, &plan) != cudaSuccess)
    return -1;
  if (plan.splits == 1) return 0;
  return int64_t{batch} * q_heads * plan.splits *
         static_cast<int64_t>(sizeof(Partial) + head_dim * sizeof(float));
}

cudaError_t decode_attention(const DecodeAttentionParams& params, cudaStream_t stream) {
  if (params.batch == 0) return cudaSuccess;
  MUSTAFAR_CUDA_TRY(check(params));
  Blocks blocks;
  Plan plan;
  MUSTAFAR_CUDA_TRY(plan_for(params.batch, params.q_heads, params.kv_heads, params.head_dim, params.slices,
                             params.window_capacity, &blocks, &plan));
  if (plan.splits > 1 && !(params.workspace != nullptr && aligned(params.workspace, 16)))
    return cudaErrorInvalidValue;
  return dispatch(params.dtype, params.head_dim, [&](auto element, auto channels) {
    using T = decltype(element);
    switch (compiled_heads(plan.heads_per_chunk)) {
      case 1:
        return run<T, channels, 1>(params, plan, blocks, stream);
      case 2:
        return run<T, channels, 2>(params, plan, blocks, stream);
      case 4:
        return run<T, channels, 4>(params, plan, blocks, stream);
      default:
        if constexpr (max_heads(channels) >= 8)
          return run<T, channels, 8>(params, plan, blocks, stream);
        else
          return cudaErrorInvalidValue;
    }
  });
}

}  // namespace mustafar::cuda
