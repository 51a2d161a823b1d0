#include "feed.cuh"
#include "key_scores.h"
#include "launch.cuh"
#include "queries.cuh"

namespace mustafar::cuda {
namespace {

// Two blocks on an SM, so that one computes while the other starts or ends.
constexpr int kBlocksPerSm = 2;
constexpr int max_warps(int heads) { return heads > 4 ? 8 : 12; }
template <int kChannels>
using KeyFeed = Feed<kChannels / 32>;
struct MostHeads {
  constexpr int operator()(int /*channels*/) const { return 8; }
};

// Each warp takes slices of 64 keys one after another, and its lanes score their tokens with all heads of the
// pass on the non-zeros.
template <class T, int kChannels, int kHeads>
__global__ void __launch_bounds__(kWarpSize* max_warps(kHeads), kBlocksPerSm)
    key_scores_kernel(const __grid_constant__ KeyScoresParams p, const __grid_constant__ Plan plan) {
  using Queries = QueryTable<T, kChannels, kHeads>;
  extern __shared__ __align__(16) char shared[];
  const int lane = threadIdx.x % kWarpSize;
  const int warp = __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);  // so the compiler knows it uniform
  const Place at(plan);
  typename Queries::Fill fill(
      static_cast<const T*>(p.q) + at.b * p.q_batch_stride + at.first_head * p.q_head_stride, p.q_head_stride,
      at.heads, p.head_dim);
  const int block_warps = blockDim.x / kWarpSize;
  const Slices slices(Stored(p.key, at.b, at.kv_head, bitmap_words(p.head_dim)),
                      {at.split * block_warps + warp, static_cast<int32_t>(slices_of(p.tokens)),
                       plan.splits * block_warps, 0, static_cast<int32_t>(p.tokens)});
  const uint32_t table = shared_address(shared);
  KeyFeed<kChannels> feed(slices, 0, lane);
  fill.template finish<1>(table);
  T* out = static_cast<T*>(p.scores) + at.b * p.scores_batch_stride + at.first_head * p.scores_head_stride;
  if (slices.first >= slices.end) return;
  QueryWalk<Queries, KeyFeed<kChannels>::kBitmapWords> walk(table + Queries::column(lane), p.head_dim);
  for (;;) {
    feed.begin(walk, p.head_dim);
    if (!feed.more()) break;
    Scores<Queries, kHeads> scores;
    scores.clear();
    visit_all(Tour{feed, walk, scores});
    feed.fetch();
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
      const int64_t token = int64_t{feed.slice()} * kSliceTokens + lane + r * kWarpSize;
#pragma unroll
      for (int h = 0; h < kHeads; ++h)
        if (h < at.heads && token < p.tokens)
          out[h * p.scores_head_stride + token] = Half<T>::round(scores.of[r][h]);
    }
  }
}

template <class T, int kChannels, int kHeads>
cudaError_t run(const KeyScoresParams& p, cudaStream_t stream) {
  static_assert(max_warps(kHeads) * kWarpSize >= kChannels);  // the table is filled in one pass
  Blocks blocks;
  using Queries = QueryTable<T, kChannels, kHeads>;
  MUSTAFAR_CUDA_TRY(size_blocks(Queries::kBytes, 0, max_warps(kHeads), 1, &blocks));
  const Plan plan = make_plan(p.batch, p.q_heads, p.kv_heads, MostHeads()(kChannels), slices_of(p.tokens),
                              blocks.teams, std::min<int64_t>(blocks.resident, kBlocksPerSm * blocks.sms));
  return launch(key_scores_kernel<T, kChannels, kHeads>, plan, blocks, stream, p, plan);
}

}  // namespace

cudaError_t key_scores(const KeyScoresParams& params, cudaStream_t stream) {
  if (params.batch == 0 || params.tokens == 0) return cudaSuccess;
  MUSTAFAR_CUDA_TRY(
      check_shape(params.batch, params.q_heads, params.kv_heads, params.head_dim, params.dtype));
  if (params.tokens < 0 || params.tokens > int64_t{params.slices} * kSliceTokens ||
      params.tokens > INT32_MAX - kSliceTokens)
    return cudaErrorInvalidValue;
  MUSTAFAR_CUDA_TRY(check_view(params.key, params.batch, params.kv_heads, params.slices));
  return dispatch_heads(params.dtype, params.head_dim, params.q_heads / params.kv_heads, MostHeads(),
                        [&](auto element, auto channels, auto heads) {
                          return run<decltype(element), channels, heads>(params, stream);
                        });
}

}  // namespace mustafar::cuda
