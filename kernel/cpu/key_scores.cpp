#include "chunk.h"
#include "ops.h"
#include "simd.h"

namespace mustafar::cpu {

void key_scores(const KeyScoresParams& p, const ParallelFor& parallel) {
  const Kernels& kernel = kernels();
  const ChunkReader keys(kernel, p.key, {}, p.head_dim, p.dtype);
  const int64_t pitch = keys.pitch();
  const int group = p.q_heads / p.kv_heads;

  const Plan plan = Plan::over_tokens(p.batch, p.kv_heads, p.tokens);
  const auto work = [&](int64_t i, const ChunkScratch& scratch) {
    const Chunk& chunk = plan.chunks[i];
    const int64_t first_head = chunk.h * group;
    load_queries(kernel, at(p.q, chunk.b * p.q_batch_stride + first_head * p.q_head_stride, p.dtype),
                 p.q_head_stride, group, p.head_dim, pitch, p.dtype, scratch.queries.get());
    keys.score(chunk, scratch.queries.get(), group, scratch.tile.get(), scratch.scores.get());
    for (int64_t g = 0; g < group; ++g) {
      const int64_t start =
          chunk.b * p.scores_batch_stride + (first_head + g) * p.scores_head_stride + chunk.begin;
      kernel.from_float[static_cast<int>(p.dtype)](scratch.scores.get() + g * kScoresPitch,
                                                   at(p.scores, start, p.dtype), chunk.end - chunk.begin);
    }
  };
  const auto nothing_left = [](int64_t, const ChunkScratch&) {};
  for_each_chunk(plan, group, pitch, parallel, work, nothing_left);
}

}  // namespace mustafar::cpu
