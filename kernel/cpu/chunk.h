// Chunks of tokens, the unit of work of the ops that multiply: the rows of a chunk are expanded once for all
// query heads of their KV head.
//
// Chunks have a fixed size and fixed boundaries, so that a result depends neither on the number of threads
// nor on the other sequences of a batch.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "packed.h"
#include "parallel.h"
#include "simd.h"

namespace mustafar::cpu {

constexpr int64_t kChunkTokens = 256;
// A tile that starts off a multiple of kTileRows may reach past the chunk.
constexpr int64_t kScoresPitch = kChunkTokens + kTileRows;

// Tokens begin .. end - 1 of one KV head.
struct Chunk {
  int64_t b, h, begin, end;
  bool in_window;
};

// The chunks of every KV head of every sequence: those of head i = b * Hkv + h are first[i] .. first[i + 1]
// - 1.
struct Plan {
  std::vector<Chunk> chunks;
  std::vector<int64_t> first{0};

  // Of the head that is open.
  void add(int64_t b, int64_t h, int64_t begin, int64_t end, bool in_window) {
    for (int64_t next; begin < end; begin = next) {
      next = std::min(end, round_up(begin + 1, kChunkTokens));
      chunks.push_back({b, h, begin, next, in_window});
    }
  }
  void close_head() { first.push_back(count()); }
  int64_t count() const { return static_cast<int64_t>(chunks.size()); }
  int64_t heads() const { return static_cast<int64_t>(first.size()) - 1; }

  // All compressed tokens of all heads.
  static Plan over_tokens(int64_t batch, int64_t kv_heads, int64_t tokens) {
    Plan plan;
    for (int64_t i = 0; i < batch * kv_heads; ++i) {
      plan.add(i / kv_heads, i % kv_heads, 0, tokens, false);
      plan.close_head();
    }
    return plan;
  }
};

// Dense tokens [B, Hkv, tokens, D] that follow the compressed ones.
struct WindowView {
  const void* data;
  int64_t batch_stride, head_stride, token_stride;
};

// Multiplies with the keys or values of a chunk, a tile of a few dense rows at a time.
class ChunkReader {
 public:
  ChunkReader(const Kernels& kernel, const CompressedView& packed, const WindowView& window, int head_dim,
              DType dtype)
      : kernel_(kernel),
        reader_(packed, head_dim, dtype),
        window_(window),
        head_dim_(head_dim),
        dtype_(dtype) {}

  int64_t pitch() const { return reader_.pitch(); }

  // scores[g * kScoresPitch + i] = key of token `begin + i` . query row g
  void score(const Chunk& chunk, const float* queries, int group, void* tile, float* scores) const {
    for (int64_t token = chunk.begin, rows; token < chunk.end; token += rows) {
      float* const part = scores + token - chunk.begin;
      if (chunk.in_window) {
        rows = load(chunk, token, tile);
        kernel_.dot[dtype()](tile, pitch(), queries, group, part, kScoresPitch);
      } else {
        const PackedRows packed = reader_.rows_until(chunk.b, chunk.h, token, chunk.end);
        kernel_.score[dtype()](packed, queries, group, part, kScoresPitch);
        rows = packed.rows;
      }
    }
  }

  // sums row g = sum over i of weights[g * kScoresPitch + i] * value of token `begin + i`
  void weigh(const Chunk& chunk, const float* weights, int group, void* tile, float* sums) const {
    std::fill_n(sums, group * pitch(), 0.0f);
    for (int64_t token = chunk.begin, rows; token < chunk.end; token += rows) {
      const float* const part = weights + token - chunk.begin;
      if (chunk.in_window) {
        rows = load(chunk, token, tile);
        kernel_.accumulate[dtype()](tile, pitch(), static_cast<int>(rows), part, kScoresPitch, group, sums);
      } else {
        const PackedRows packed = reader_.rows_until(chunk.b, chunk.h, token, chunk.end);
        kernel_.weigh[dtype()](packed, part, kScoresPitch, group, sums);
        rows = packed.rows;
      }
    }
  }

 private:
  int dtype() const { return static_cast<int>(dtype_); }

  // Brings window tokens from `token` on into the tile and says how many. The columns past D of the tile must
  // be zero.
  int load(const Chunk& chunk, int64_t token, void* tile) const {
    const int rows = static_cast<int>(std::min<int64_t>(kTileRows, chunk.end - token));
    for (int r = 0; r < rows; ++r) {
      const int64_t start =
          chunk.b * window_.batch_stride + chunk.h * window_.head_stride + (token + r) * window_.token_stride;
      std::memcpy(at(tile, r * pitch(), dtype_), at(window_.data, start, dtype_),
                  head_dim_ * element_size(dtype_));
    }
    return rows;
  }

  const Kernels& kernel_;
  PackedReader reader_;
  WindowView window_;
  int head_dim_;
  DType dtype_;
};

// What one thread works with.
struct ChunkScratch {
  ChunkScratch(int64_t group, int64_t pitch)
      : tile(kTileRows * pitch), queries(group * pitch), scores(group * kScoresPitch), result(group * pitch) {
    std::fill_n(tile.get(), kTileRows * pitch, 0.0f);
    std::fill_n(queries.get(), group * pitch, 0.0f);
  }
  FloatBuffer tile;     // [kTileRows, pitch] of any element type, zero past D
  FloatBuffer queries;  // [G, pitch], zero past D
  FloatBuffer scores;   // [G, kScoresPitch]
  FloatBuffer result;   // [G, pitch]
};

// Calls work(i, scratch) for every chunk i, and finish(head, scratch) once all chunks of a head are done, by
// the thread that did the last one: a second pass over the heads would make all threads wait for one another
// again.
template <class Work, class Finish>
void for_each_chunk(const Plan& plan, int64_t group, int64_t pitch, const ParallelFor& parallel,
                    const Work& work, const Finish& finish) {
  std::vector<int64_t> head_of(plan.count());
  std::vector<std::atomic<int64_t>> left(plan.heads());
  int64_t tokens = 0;
  for (int64_t head = 0; head < plan.heads(); ++head) {
    left[head] = plan.first[head + 1] - plan.first[head];
    if (left[head] == 0) finish(head, ChunkScratch(group, pitch));
    for (int64_t i = plan.first[head]; i < plan.first[head + 1]; ++i) {
      head_of[i] = head;
      tokens += plan.chunks[i].end - plan.chunks[i].begin;
    }
  }
  // Threads take chunks from one queue, fewer and fewer at a time, as they start and go at different speeds.
  // Of a range only the length is used: it says how many threads there are.
  std::atomic<int64_t> next{0};
  const auto body = [&](int64_t begin, int64_t end) {
    const ChunkScratch scratch(group, pitch);
    const double share = static_cast<double>(end - begin) / static_cast<double>(2 * plan.count());
    for (int64_t first = next.load(); first < plan.count();) {
      const int64_t left_over = plan.count() - first;
      const int64_t last = first + std::max<int64_t>(1, static_cast<int64_t>(left_over * share));
      if (!next.compare_exchange_weak(first, last)) continue;
      for (int64_t i = first; i < last; ++i) {
        work(i, scratch);
        // Acquire and release: the last to finish sees what the others wrote.
        if (left[head_of[i]].fetch_sub(1, std::memory_order_acq_rel) == 1) finish(head_of[i], scratch);
      }
      first = next.load();
    }
  };
  // Some 20 microseconds of work are not worth waking other threads.
  constexpr int64_t kSerialWork = 1 << 18;
  if (tokens * pitch * (group + 4) < kSerialWork) {
    body(0, plan.count());
  } else {
    parallel(plan.count(), body);
  }
}

// Query heads of one KV head as float32.
inline void load_queries(const Kernels& kernel, const void* q, int64_t head_stride, int group, int head_dim,
                         int64_t pitch, DType dtype, float* out) {
  for (int64_t g = 0; g < group; ++g) {
    kernel.to_float[static_cast<int>(dtype)](at(q, g * head_stride, dtype), out + g * pitch, head_dim);
  }
}

}  // namespace mustafar::cpu
