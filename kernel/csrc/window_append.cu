// A block owns the keys or the values of one KV head, so that what a flush must do in order needs no more
// than a barrier: slices out of the window, the remaining rows to its front, the new row behind them.
//
// A flush happens once in hundreds of steps and is then done by few blocks; a warp takes a row at a time, its
// lanes the channels, and votes give the bitmap. The step that matters reads the counters and copies a row.
#include "window_append.h"

namespace mustafar::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMagnitudeBits = 15;

__device__ __forceinline__ uint32_t lanes_below() {
  uint32_t mask;
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(mask));
  return mask;
}

// A row of up to 32 * kGroups channels held by a warp: channel 32 j + lane is value j of the lane.
template <int kGroups>
struct WarpRow {
  uint16_t values[kGroups];
  uint32_t keep[kGroups];  // bit c of word j: channel 32 j + c; the same in all lanes

  __device__ __forceinline__ void load(const uint16_t* row, int head_dim, int lane) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const int channel = 32 * j + lane;
      values[j] = channel < head_dim ? row[channel] : uint16_t{0};
    }
  }

  // Marks the `kept` largest magnitudes. `infinity` is that of the dtype; all NaN rank just above it.
  __device__ __forceinline__ void select(int kept, int head_dim, int infinity, int lane) {
    int keys[kGroups];
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      keys[j] = 32 * j + lane < head_dim ? min(values[j] & 0x7fff, infinity + 1) : -1;
    }
    int bound = 0;  // the largest that `kept` keys reach
#pragma unroll
    for (int bit = kMagnitudeBits - 1; bit >= 0; --bit) {
      const int candidate = bound | 1 << bit;
      int count = 0;
#pragma unroll
      for (int j = 0; j < kGroups; ++j) count += __popc(__ballot_sync(~0u, keys[j] >= candidate));
      if (count >= kept) bound = candidate;
    }
    int spare = kept;  // channels that tie with the bound and are kept
#pragma unroll
    for (int j = 0; j < kGroups; ++j) spare -= __popc(__ballot_sync(~0u, keys[j] > bound));
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const uint32_t ties = __ballot_sync(~0u, keys[j] == bound);
      const bool tie = keys[j] == bound && __popc(ties & lanes_below()) < spare;
      keep[j] = __ballot_sync(~0u, keys[j] > bound || tie);
      spare -= min(spare, __popc(ties));
    }
  }

  __device__ __forceinline__ bool kept_here(int j, int lane) const { return keep[j] >> lane & 1; }

  // The row with zeros where it is pruned.
  __device__ __forceinline__ void store_pruned(uint16_t* row, int head_dim, int lane) const {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const int channel = 32 * j + lane;
      if (channel < head_dim) row[channel] = kept_here(j, lane) ? values[j] : uint16_t{0};
    }
  }

  __device__ __forceinline__ void store(uint16_t* row, int head_dim, int lane) const {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const int channel = 32 * j + lane;
      if (channel < head_dim) row[channel] = values[j];
    }
  }

  // Row `row` of the slice whose bitmap and values these are.
  __device__ __forceinline__ void store_packed(uint64_t* bitmap, uint16_t* slots, int row, int words,
                                               int kept, int width, int lane) const {
    uint32_t* bits = reinterpret_cast<uint32_t*>(bitmap + row * words);
    uint16_t* to = slots + row * kVectorValues;
    int before = 0;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      if (lane == 0 && j < 2 * words) bits[j] = keep[j];
      if (kept_here(j, lane)) put(to, before + __popc(keep[j] & lanes_below()), values[j]);
      before += __popc(keep[j]);
    }
    if (lane < width - kept) put(to, kept + lane, 0);
  }

 private:
  static __device__ __forceinline__ void put(uint16_t* to, int slot, uint16_t value) {
    to[slot / kVectorValues * (kSliceTokens * kVectorValues) + slot % kVectorValues] = value;
  }
};

template <int kGroups>
__device__ __forceinline__ void flush(const WindowAppendParams& p, const WindowSide& side, int64_t b,
                                      int64_t h, uint16_t* window, int infinity) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int flush_rows = p.state[kFlushRows], prune_rows = p.state[kPruneRows];
  const int64_t pitch = side.window_token_stride;
  const int words = (p.head_dim + 63) / 64;
  const int64_t first_slice = (p.state[kPacked] - flush_rows) / kSliceTokens;
  uint64_t* bitmap = side.bitmap + b * side.bitmap_batch_stride + h * side.bitmap_head_stride;
  uint16_t* values =
      static_cast<uint16_t*>(side.values) + b * side.values_batch_stride + h * side.values_head_stride;
  WarpRow<kGroups> row;
  for (int r = warp; r < flush_rows; r += kWarps) {
    const int64_t slice = first_slice + r / kSliceTokens;
    row.load(window + r * pitch, p.head_dim, lane);
    row.select(side.kept, p.head_dim, infinity, lane);
    row.store_packed(bitmap + slice * kSliceTokens * words, values + slice * kSliceTokens * side.width,
                     r % kSliceTokens, words, side.kept, side.width, lane);
  }
  // The rest moves up by flush_rows, as many rows at a time, so that none is overwritten before it is read.
  const int rest = p.state[kOldWindow] - flush_rows;
  const int chunk = flush_rows > 0 ? flush_rows : rest;
  for (int begin = 0; begin < rest; begin += chunk) {
    __syncthreads();
    const int end = min(begin + chunk, rest);
    for (int r = begin + warp; r < end; r += kWarps) {
      const int from = r + flush_rows;
      const bool prune = from < prune_rows;
      if (!prune && flush_rows == 0) continue;
      row.load(window + from * pitch, p.head_dim, lane);
      if (prune) {
        row.select(side.kept, p.head_dim, infinity, lane);
        row.store_pruned(window + r * pitch, p.head_dim, lane);
      } else {
        row.store(window + r * pitch, p.head_dim, lane);
      }
    }
  }
  __syncthreads();
}

template <int kGroups>
__global__ void __launch_bounds__(kThreads)
    window_append_kernel(const __grid_constant__ WindowAppendParams p, int infinity) {
  // Blocks of a head's keys and values are neighbours.
  const WindowSide& side = blockIdx.x % 2 == 0 ? p.key : p.value;
  const int64_t b = blockIdx.x / 2 / p.kv_heads, h = blockIdx.x / 2 % p.kv_heads;
  uint16_t* window =
      static_cast<uint16_t*>(side.window) + b * side.window_batch_stride + h * side.window_head_stride;
  const int slot = p.state[kSlot];
  if (p.state[kPruneRows] > 0) flush<kGroups>(p, side, b, h, window, infinity);
  if (slot < 0 || slot >= p.window_capacity) return;
  const uint16_t* x = static_cast<const uint16_t*>(side.x) + b * side.x_batch_stride + h * side.x_head_stride;
  if (threadIdx.x < p.head_dim) window[slot * side.window_token_stride + threadIdx.x] = x[threadIdx.x];
}

__global__ void window_advance_kernel(WindowAdvanceParams p) {
  const WindowStep step = next_window_step(p);
  __syncthreads();  // all have read what one now writes
  if (threadIdx.x == 0) store_window_step(p, step);
  for (int b = threadIdx.x; b < p.batch; b += blockDim.x) {
    p.lengths[2 * b] = step.packed;
    p.lengths[2 * b + 1] = step.window;
  }
}

bool valid(const WindowSide& side, int head_dim) {
  return side.kept >= 1 && side.kept <= head_dim &&
         side.width == (side.kept + kVectorValues - 1) / kVectorValues * kVectorValues;
}

}  // namespace

cudaError_t window_advance(const WindowAdvanceParams& p, cudaStream_t stream) {
  if (p.residual < 0 || p.flush_every < 1) return cudaErrorInvalidValue;
  window_advance_kernel<<<1, 64, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t window_append(const WindowAppendParams& p, cudaStream_t stream) {
  const int64_t blocks = 2 * int64_t{p.batch} * p.kv_heads;
  if (blocks == 0) return cudaSuccess;
  const bool ok = p.head_dim >= 1 && p.head_dim <= kMaxHeadDim && valid(p.key, p.head_dim) &&
                  valid(p.value, p.head_dim) && blocks <= INT32_MAX && p.dtype != DType::kFloat32;
  if (!ok) return cudaErrorInvalidValue;
  const int infinity = p.dtype == DType::kFloat16 ? 0x7c00 : 0x7f80;
  const auto grid = static_cast<unsigned>(blocks);
  if (p.head_dim <= 64) {
    window_append_kernel<2><<<grid, kThreads, 0, stream>>>(p, infinity);
  } else if (p.head_dim <= 128) {
    window_append_kernel<4><<<grid, kThreads, 0, stream>>>(p, infinity);
  } else {
    window_append_kernel<8><<<grid, kThreads, 0, stream>>>(p, infinity);
  }
  return cudaGetLastError();
}

}  // namespace mustafar::cuda
