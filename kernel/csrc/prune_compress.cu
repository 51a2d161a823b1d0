// One pass: rows to shared memory, the kept channels of each by bit-sliced selection, kept values packed.
//
// A lane turns its row's magnitudes into bit planes (bit c of plane b = bit b of the magnitude of channel c),
// 32 channels a word. One step of the search for the k-th largest magnitude is then a few logical
// instructions and a population count per 32 channels, not per channel.
#include "prune_compress.h"
#include "row_tile.cuh"

namespace mustafar::cuda {
namespace {

constexpr int kMagnitudeBits = 15;

// `pick` chooses, bit by bit, between a where it is 1 and b where it is 0.
__device__ __forceinline__ uint32_t select(uint32_t pick, uint32_t a, uint32_t b) {
  uint32_t d;  // one instruction, which the compiler does not find when `pick` is a constant
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(d) : "r"(pick), "r"(a), "r"(b));
  return d;
}

// Bit i of byte c of rows[j] becomes bit j of byte c of rows[i]: four 8 x 8 bit matrices at once.
__device__ __forceinline__ void transpose_bits(uint32_t (&rows)[8]) {
#pragma unroll
  for (int s = 4; s > 0; s /= 2) {
    const uint32_t low = s == 4 ? 0x0f0f0f0fu : s == 2 ? 0x33333333u : 0x55555555u;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i & s) continue;
      const uint32_t a = rows[i], b = rows[i + s];
      rows[i] = select(low, a, b << s);
      rows[i + s] = select(low, a >> s, b);
    }
  }
}

// The planes of 32 channels given in pairs; the sign is left out.
__device__ __forceinline__ void bit_planes(const uint32_t (&pairs)[16], uint32_t (&planes)[kMagnitudeBits]) {
  // low[r] and high[r]: the low and high bytes of channels r, 8 + r, 16 + r and 24 + r.
  uint32_t low[8], high[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t a = pairs[i], b = pairs[4 + i], c = pairs[8 + i], d = pairs[12 + i];
    const uint32_t low_ab = __byte_perm(a, b, 0x6240), low_cd = __byte_perm(c, d, 0x6240);
    const uint32_t high_ab = __byte_perm(a, b, 0x7351), high_cd = __byte_perm(c, d, 0x7351);
    low[2 * i] = __byte_perm(low_ab, low_cd, 0x5410);
    low[2 * i + 1] = __byte_perm(low_ab, low_cd, 0x7632);
    high[2 * i] = __byte_perm(high_ab, high_cd, 0x5410);
    high[2 * i + 1] = __byte_perm(high_ab, high_cd, 0x7632);
  }
  transpose_bits(low);
  transpose_bits(high);
#pragma unroll
  for (int bit = 0; bit < kMagnitudeBits; ++bit) planes[bit] = bit < 8 ? low[bit] : high[bit - 8];
}

// All NaN tie, just above infinity: their payloads would otherwise rank them.
template <int kMantissaBits>
__device__ __forceinline__ void level_nan(uint32_t (&planes)[kMagnitudeBits]) {
  uint32_t special = ~0u;  // infinity or NaN
#pragma unroll
  for (int bit = kMantissaBits; bit < kMagnitudeBits; ++bit) special &= planes[bit];
  if (special == 0) return;
  uint32_t nan = 0;
#pragma unroll
  for (int bit = 0; bit < kMantissaBits; ++bit) nan |= planes[bit];
  nan &= special;
#pragma unroll
  for (int bit = 0; bit < kMantissaBits; ++bit) planes[bit] &= ~nan;
  planes[0] |= nan;
}

// The search, over the keys (magnitude, lowest channel first), which are all different: after each bit
// `above` holds the channels known to be among the k largest, and `tied` those still equal to the k-th
// largest in the bits seen, of which `wanted` are to be kept.
template <int kChannels>
struct Search {
  using Tile = RowTile<kChannels>;
  static constexpr int kWords = Tile::kWords;
  const Tile& tile;
  uint32_t above[kWords], tied[kWords];
  int wanted;

  __device__ __forceinline__ void step(const uint32_t (&plane)[kWords]) {
    uint32_t set[kWords];
    int count = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      set[w] = tied[w] & plane[w];
      count += __popc(set[w]);
    }
    count = tile.row_sum(count);
    const bool enough = count >= wanted;
    const uint32_t all = enough ? ~0u : 0u;
    if (!enough) wanted -= count;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      asm("lop3.b32 %0, %0, %1, %2, 0xf4;" : "+r"(above[w]) : "r"(set[w]), "r"(all));   // a | (b & ~c)
      asm("lop3.b32 %0, %0, %1, %2, 0x90;" : "+r"(tied[w]) : "r"(plane[w]), "r"(all));  // a & ~(b ^ c)
    }
  }

  // Whether more channels tie than are wanted.
  __device__ __forceinline__ bool undecided() const {
    int count = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) count += __popc(tied[w]);
    return tile.row_sum(count) != wanted;
  }

  // The bits of the channel number, complemented so that low channels win.
  __device__ __forceinline__ void break_ties() {
    uint32_t plane[kWords];
    if constexpr (Tile::kRowLanes == 2) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) plane[w] = tile.part == 0 ? ~0u : 0u;
      step(plane);
    }
#pragma unroll
    for (int bit = (kWords + 1) / 2; bit > 0; bit /= 2) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) plane[w] = w & bit ? 0u : ~0u;
      step(plane);
    }
#pragma unroll
    for (int bit = 4; bit >= 0; --bit) {
      constexpr uint32_t kPlanes[] = {0x55555555u, 0x33333333u, 0x0f0f0f0fu, 0x00ff00ffu, 0x0000ffffu};
#pragma unroll
      for (int w = 0; w < kWords; ++w) plane[w] = kPlanes[bit];
      step(plane);
    }
  }
};

// Blocks of an SM that registers must allow: more warps hide more latency, fewer registers would spill.
constexpr int min_blocks(int channels) { return channels == 64 ? 16 : channels == 256 ? 6 : 12; }

// One block a slice.
template <int kMantissaBits, int kChannels>
__global__ void __launch_bounds__(RowTile<kChannels>::kThreads, min_blocks(kChannels))
    prune_compress_kernel(PruneCompressParams p) {
  using Tile = RowTile<kChannels>;
  extern __shared__ uint4 shared[];
  const Tile tile(static_cast<uint32_t>(__cvta_generic_to_shared(shared)));
  const SliceIndex at(blockIdx.x, p.kv_heads, p.slices);
  const int rows = at.rows(p.tokens);
  tile.stage_rows(static_cast<const uint16_t*>(p.x) + at.batch * p.x_batch_stride +
                      at.head * p.x_head_stride + at.token() * p.x_token_stride,
                  p.x_token_stride, rows, p.head_dim);
  wait_staged();

  uint32_t planes[Tile::kWords][kMagnitudeBits];
#pragma unroll
  for (int w = 0; w < Tile::kWords; ++w) {
    uint32_t pairs[16];
    tile.read_word(w, pairs);
    bit_planes(pairs, planes[w]);
    level_nan<kMantissaBits>(planes[w]);
  }

  Search<kChannels> search{tile, {}, {}, p.k};
  tile.existing(p.head_dim, search.tied);
#pragma unroll
  for (int bit = kMagnitudeBits - 1; bit >= 0; --bit) {
    uint32_t plane[Tile::kWords];
#pragma unroll
    for (int w = 0; w < Tile::kWords; ++w) plane[w] = planes[w][bit];
    search.step(plane);
  }
  if (__any_sync(~0u, search.undecided())) search.break_ties();

  uint32_t keep[Tile::kWords];
#pragma unroll
  for (int w = 0; w < Tile::kWords; ++w) keep[w] = search.above[w] | search.tied[w];
  tile.compact(keep);
  const int64_t width = p.width;
  tile.write_slots(static_cast<uint16_t*>(p.values) + at.number * kSliceTokens * width, p.k,
                   p.width / kVectorValues);
  // Rows past the end hold zeros, and have no bits.
#pragma unroll
  for (int w = 0; w < Tile::kWords; ++w) keep[w] = tile.row < rows ? keep[w] : 0u;
  const int words = (p.head_dim + 63) / 64;
  tile.write_bits(p.bitmap + at.number * kSliceTokens * words, keep, words);
}

template <int kMantissaBits>
cudaError_t run(const PruneCompressParams& p, int64_t blocks, cudaStream_t stream) {
  with_channels(p.head_dim, [&](auto channels) {
    using Tile = RowTile<channels>;
    prune_compress_kernel<kMantissaBits, channels>
        <<<static_cast<unsigned>(blocks), Tile::kThreads, Tile::kSharedBytes, stream>>>(p);
  });
  return cudaGetLastError();
}

}  // namespace

cudaError_t prune_compress(const PruneCompressParams& p, cudaStream_t stream) {
  const int64_t blocks = int64_t{p.batch} * p.kv_heads * p.slices;
  if (blocks == 0) return cudaSuccess;
  const bool ok = p.head_dim >= 1 && p.head_dim <= kMaxHeadDim && p.k >= 1 && p.k <= p.head_dim &&
                  p.width == (p.k + kVectorValues - 1) / kVectorValues * kVectorValues && blocks <= INT32_MAX;
  if (!ok) return cudaErrorInvalidValue;
  switch (p.dtype) {
    case DType::kFloat16:
      return run<10>(p, blocks, stream);
    case DType::kBFloat16:
      return run<7>(p, blocks, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace mustafar::cuda
