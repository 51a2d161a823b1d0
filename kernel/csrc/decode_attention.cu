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

// Heads of a pass that the kernel is compiled for.
constexpr int compiled_heads(int heads) { return heads <= 1 ? 1 : heads <= 2 ? 2 : heads <= 4 ? 4 : 8; }
__host__ __device__ constexpr int tiles_for(int heads) { return (heads + kHeadsPerTile - 1) / kHeadsPerTile; }
__host__ __device__ constexpr int warp_bytes(int channels, int heads) {
  return tile_bytes(channels) + weights_bytes(tiles_for(heads) * kHeadsPerTile);
}

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

template <class T, int kChannels, int kHeads>
__global__ void __launch_bounds__(kWarpSize* block_warps(kChannels))
    decode_attention_kernel(const __grid_constant__ DecodeAttentionParams p,
                            const __grid_constant__ Plan plan, float score_scale) {
  constexpr int kWords = kChannels / 32, kWarps = block_warps(kChannels), kTiles = tiles_for(kHeads);
  constexpr int kWarpBytes = warp_bytes(kChannels, kHeads);
  using Queries = QueryTable<T, kChannels, kHeads>;
  extern __shared__ __align__(16) char shared[];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const Place at(plan, blockIdx.x, p.q_heads, p.kv_heads);
  const Sequence sequence(p, at.b);

  char* const own = shared + Queries::kBytes + warp * kWarpBytes;
  const uint32_t table = shared_address(shared), region = shared_address(own);
  const uint32_t tile = region + kGuardRows * kTilePitch, weights = region + tile_bytes(kChannels);
  fill_zeros(region, kWarpBytes, lane);
  Queries::fill(table, static_cast<const T*>(p.q) + at.b * p.q_batch_stride + at.first_head * p.q_head_stride,
                p.q_head_stride, at.heads, p.head_dim);
  __syncthreads();

  const int words = bitmap_words(p.head_dim);
  const int self = at.split * kWarps + warp, warps = plan.splits * kWarps;
  const DenseWindow k_window{p.k_window, p.k_window_batch_stride, p.k_window_head_stride,
                             p.k_window_token_stride, p.head_dim};
  const DenseWindow v_window{p.v_window, p.v_window_batch_stride, p.v_window_head_stride,
                             p.v_window_token_stride, p.head_dim};
  RowPair<kWords> keys, values;
  const auto begin = [&](RowPair<kWords>& rows, const Unit& unit, const Location& location,
                         const CompressedView& view, const DenseWindow& window) {
    const bool visible[kRowsPerLane] = {sequence.visible(unit, lane),
                                        sequence.visible(unit, lane + kWarpSize)};
    rows.begin(unit_rows(unit, location, view, window, at.b, at.kv_head, words), visible, words, lane);
  };

  ValueProduct<T, kChannels, kTiles> output;
  output.clear();
  Partial partial[kHeads];  // maximum is the warp's, sum this lane's
#pragma unroll
  for (int h = 0; h < kHeads; ++h) partial[h] = {-INFINITY, 0.f};

  Unit unit, next;
  Location value_location, next_key_location, next_value_location;
  bool more = sequence.deal(self, warps, 0, &unit);
  if (more) {
    begin(keys, unit, locate(unit, p.key, k_window, at.b, at.kv_head), p.key, k_window);
    value_location = locate(unit, p.value, v_window, at.b, at.kv_head);
  }
  for (int turn = 1; more; ++turn) {
    more = sequence.deal(self, warps, turn, &next);
    if (more) {
      next_key_location = locate(next, p.key, k_window, at.b, at.kv_head);
      next_value_location = locate(next, p.value, v_window, at.b, at.kv_head);
    }
    begin(values, unit, value_location, p.value, v_window);

    // Scores of the lane's two tokens with every head.
    float scores[kRowsPerLane][kHeads];
    const auto clear = [&] {
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r)
#pragma unroll
        for (int h = 0; h < kHeads; ++h) scores[r][h] = 0.f;
    };
    clear();
    walk<Queries::kPitch, 0>(keys, table + Queries::column(lane), p.head_dim, words, lane, clear,
                             [&](int row, uint32_t address, uint32_t pair, bool high) {
                               Queries::add(scores[row], address,
                                            high ? Half<T>::high(pair) : Half<T>::low(pair));
                             });
    if (more) begin(keys, next, next_key_location, p.key, k_window);

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
      float factors[kTiles][2];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) factors[t][0] = factors[t][1] = 1.f;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float top = fmaxf(partial[h].maximum, fmaxf(scores[0][h], scores[1][h]));
#pragma unroll
        for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
          top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, distance));
        const float factor = rescale(partial[h].maximum, top);
        partial[h].maximum = top;
        partial[h].sum *= factor;
        if (h % kHeadsPerTile / 2 * 2 == output.first_head(lane)) factors[h / kHeadsPerTile][h % 2] = factor;
      }
      output.scale(factors);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float maximum = partial[h].maximum == -INFINITY ? 0.f : partial[h].maximum;
      const float first = exp2_fast(scores[0][h] - maximum), second = exp2_fast(scores[1][h] - maximum);
      partial[h].sum += first + second;
      store_weight(weights, h, Half<T>::pack(first, second), lane);
    }

    walk<kTilePitch, 2>(values, tile_column(tile, lane), p.head_dim, words, lane, [] {}, scatter);
    __syncwarp();
    output.add(tile, weights, p.head_dim, lane);
    __syncwarp();
    unit = next;
    value_location = next_value_location;
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
      return reinterpret_cast<const Partial*>(first + w * kWarpBytes + tile_bytes(kChannels))[h];
    };
    float maximum = -INFINITY, sum = 0.f, weight = 0.f;
    for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, of_warp(w).maximum);
    for (int w = 0; w < kWarps; ++w) {
      const float factor = rescale(of_warp(w).maximum, maximum);
      weight += of_warp(w).sum * factor;
      sum += reinterpret_cast<const float*>(first + w * kWarpBytes)[h * kChannels + d] * factor;
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

constexpr int query_table_bytes(int channels) { return table_bytes(channels, channels == 256 ? 64 : 128); }

cudaError_t plan_for(int batch, int q_heads, int kv_heads, int head_dim, int slices, int window_capacity,
                     Plan* plan) {
  const int channels = compiled_channels(head_dim), heads = max_heads(channels);
  const int bytes = query_table_bytes(channels) +
                    block_warps(channels) * warp_bytes(channels, std::min(q_heads / kv_heads, heads));
  int64_t resident;
  MUSTAFAR_CUDA_TRY(resident_blocks(bytes, &resident));
  const int64_t units = slices + kWindowUnitCost * slices_of(window_capacity);
  *plan = make_plan(batch, q_heads, kv_heads, heads, units, block_warps(channels), resident);
  return cudaSuccess;
}

template <class T, int kChannels, int kHeads>
cudaError_t run(const DecodeAttentionParams& p, const Plan& plan, cudaStream_t stream) {
  constexpr int kWarps = block_warps(kChannels);
  constexpr int kBytes = QueryTable<T, kChannels, kHeads>::kBytes + kWarps * warp_bytes(kChannels, kHeads);
  static_assert(kBytes <= 99 * 1024, "does not fit on sm_86 and sm_89");
  const float log2_e = 1.44269504f;
  MUSTAFAR_CUDA_TRY(launch(decode_attention_kernel<T, kChannels, kHeads>, plan.blocks, kWarps * kWarpSize,
                           kBytes, stream, p, plan, p.scale * log2_e));
  if (plan.splits == 1) return cudaSuccess;
  return launch(combine_kernel<T>, int64_t{p.batch} * p.q_heads, std::min(kChannels, 128), 0, stream, p,
                int{plan.splits});
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
  Plan plan;
  if (plan_for(batch, q_heads, kv_heads, head_dim, slices, window_capacity, &plan) != cudaSuccess) return -1;
  if (plan.splits == 1) return 0;
  return int64_t{batch} * q_heads * plan.splits *
         static_cast<int64_t>(sizeof(Partial) + head_dim * sizeof(float));
}

cudaError_t decode_attention(const DecodeAttentionParams& params, cudaStream_t stream) {
  if (params.batch == 0) return cudaSuccess;
  MUSTAFAR_CUDA_TRY(check(params));
  Plan plan;
  MUSTAFAR_CUDA_TRY(plan_for(params.batch, params.q_heads, params.kv_heads, params.head_dim, params.slices,
                             params.window_capacity, &plan));
  if (plan.splits > 1 && !(params.workspace != nullptr && aligned(params.workspace, 16)))
    return cudaErrorInvalidValue;
  return dispatch(params.dtype, params.head_dim, [&](auto element, auto channels) {
    using T = decltype(element);
    switch (compiled_heads(plan.heads_per_chunk)) {
      case 1:
        return run<T, channels, 1>(params, plan, stream);
      case 2:
        return run<T, channels, 2>(params, plan, stream);
      case 4:
        return run<T, channels, 4>(params, plan, stream);
      default:
        if constexpr (max_heads(channels) >= 8)
          return run<T, channels, 8>(params, plan, stream);
        else
          return cudaErrorInvalidValue;
    }
  });
}

}  // namespace mustafar::cuda
