#include <vector>

#include "chunk.h"
#include "ops.h"
#include "simd.h"

namespace mustafar::cpu {

void key_scores(const KeyScoresParams& p, const ParallelFor& parallel) {
  const Kernels& kernel = kernels();
  const ChunkReader keys(kernel, p.key, {}, p.head_dim, p.dtype);
  const int64_t pitch = keys.pitch();
  const int group = p.q_heads / p.kv_heads;

  std::vector<Chunk> chunks;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.kv_heads; ++h) append_chunks(chunks, b, h, 0, p.tokens, false);
  }
  parallel(static_cast<int64_t>(chunks.size()), [&](int64_t begin, int64_t end) {
    const ChunkScratch scratch(group, pitch);
    for (int64_t i = begin; i < end; ++i) {
      const Chunk& chunk = chunks[i];
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
    }
  });
}

}  // namespace mustafar::cpu
