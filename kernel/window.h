// The steps of a cache of fixed size: what one decoded token does to counters, window and compressed slices.
//
// Everything a step decides is read from and written to device memory, so that a captured graph can be
// replayed for every token: nothing here has a size or a choice that the host must know.
#pragma once

#include "params.h"

namespace mustafar {

// Entries of WindowState, int32. All sequences of a batch share them: they are padded to one length.
enum WindowEntry : int32_t {
  kPacked,     // compressed tokens, a multiple of 64
  kWindow,     // tokens in the window, this step's included
  kPruned,     // the oldest so many tokens are pruned; at least kPacked
  kSlot,       // window row of this step's token, -1 if the cache is full
  kFlushRows,  // window rows that this step compresses, a multiple of 64
  kPruneRows,  // window rows that this step prunes, those included
  kOldWindow,  // window rows before this step
  kOverflow,   // tokens that found no room
  kWindowEntries
};

// Counts one more token per sequence, and decides whether this step prunes first: when `flush_every` tokens
// have gathered beyond `residual`, all but the last `residual` are pruned.
struct WindowAdvanceParams {
  int32_t* state;    // [kWindowEntries]
  int32_t* lengths;  // [B, 2]: compressed tokens and window tokens, for decode attention
  int64_t* total;    // [1]: tokens held
  int32_t batch, residual, flush_every;
  int32_t max_length;  // tokens that there is room for
};

// The keys, or the values, of one layer.
struct WindowSide {
  const void* x;     // [B, Hkv, 1, D], last dim contiguous: this step's token
  void* window;      // [B, Hkv, capacity, D], rows contiguous
  uint64_t* bitmap;  // [B, Hkv, S, 64, W], the first two dims strided
  void* values;      // [B, Hkv, S, width / 8, 64, 8], likewise; uniform layout
  int64_t x_batch_stride, x_head_stride;
  int64_t window_batch_stride, window_head_stride, window_token_stride;
  int64_t bitmap_batch_stride, bitmap_head_stride;
  int64_t values_batch_stride, values_head_stride;
  int32_t kept;   // values kept per pruned row, 1 to D
  int32_t width;  // kept rounded up to a multiple of 8
};

// What the counters say, done to one layer: prune and compress the oldest rows of the window, move the others
// to its front, and put the token behind them.
struct WindowAppendParams {
  WindowSide key, value;
  const int32_t* state;  // [kWindowEntries], after the advance
  int32_t batch, kv_heads, head_dim, slices, window_capacity;
  DType dtype;
};

// The step's decision, in one place for both devices.
struct WindowStep {
  int32_t packed, window, pruned, slot, flush_rows, prune_rows, old_window, overflow;
};

#ifdef __CUDACC__
#define MUSTAFAR_BOTH __host__ __device__ inline
#else
#define MUSTAFAR_BOTH inline
#endif

MUSTAFAR_BOTH WindowStep next_window_step(const WindowAdvanceParams& p) {
  WindowStep s{p.state[kPacked], p.state[kWindow],  p.state[kPruned], -1, 0, 0,
               p.state[kWindow], p.state[kOverflow]};
  if (s.packed + s.window >= p.max_length) {
    ++s.overflow;
    return s;
  }
  if (s.packed + s.window - s.pruned >= p.residual + p.flush_every) {
    s.prune_rows = s.window - p.residual;
    s.flush_rows = s.prune_rows - s.prune_rows % kSliceTokens;
    s.pruned = s.packed + s.prune_rows;
    s.packed += s.flush_rows;
    s.window -= s.flush_rows;
  }
  s.slot = s.window++;
  return s;
}

MUSTAFAR_BOTH void store_window_step(const WindowAdvanceParams& p, const WindowStep& s) {
  p.state[kPacked] = s.packed, p.state[kWindow] = s.window, p.state[kPruned] = s.pruned;
  p.state[kSlot] = s.slot, p.state[kFlushRows] = s.flush_rows, p.state[kPruneRows] = s.prune_rows;
  p.state[kOldWindow] = s.old_window, p.state[kOverflow] = s.overflow;
  p.total[0] = s.packed + s.window;
}

#undef MUSTAFAR_BOTH

}  // namespace mustafar
