// Loops over a tile of dense rows, in float32 arithmetic, generic over the vectors of an instruction set.
//
// Included by the translation unit of each instruction set, which compiles its own copy. `Simd` provides
//   Vec, kLanes, zero, set1, load (of any element type) and store (unaligned), add, mul, max, fma(a, b, c) =
//   a * b + c, exp2_scale(p, t): p * 2^n where t = 1.5 * 2^23 + n, store_sums<R, G>(acc, scores, ld):
//   scores[g * ld + r] = sum of the lanes of acc[g * R + r]; R * G = kLanes.
#pragma once

#include <cmath>
#include <limits>

#include "simd.h"

namespace mustafar::cpu {
namespace {

// R * G accumulators: enough independent chains to hide the latency of fma, few enough for the registers.
template <class Simd, class T, int G>
void dot_heads(const T* tile, int64_t pitch, const float* q, float* scores, int64_t ld) {
  constexpr int R = Simd::kLanes / G;
  for (int row = 0; row < kTileRows; row += R) {
    const T* rows = tile + row * pitch;
    typename Simd::Vec acc[R * G];
    for (auto& sum : acc) sum = Simd::zero();
    for (int64_t c = 0; c < pitch; c += Simd::kLanes) {
      typename Simd::Vec key[R];
      for (int r = 0; r < R; ++r) key[r] = Simd::load(rows + r * pitch + c);
      for (int g = 0; g < G; ++g) {
        const auto query = Simd::load(q + g * pitch + c);
        for (int r = 0; r < R; ++r) acc[g * R + r] = Simd::fma(query, key[r], acc[g * R + r]);
      }
    }
    Simd::template store_sums<R, G>(acc, scores + row, ld);
  }
}

template <class Simd, class T>
void dot(const void* rows, int64_t pitch, const float* q, int heads, float* scores, int64_t ld) {
  const T* tile = static_cast<const T*>(rows);
  int g = 0;
  for (; g + 4 <= heads; g += 4) dot_heads<Simd, T, 4>(tile, pitch, q + g * pitch, scores + g * ld, ld);
  for (; g + 2 <= heads; g += 2) dot_heads<Simd, T, 2>(tile, pitch, q + g * pitch, scores + g * ld, ld);
  if (g < heads) dot_heads<Simd, T, 1>(tile, pitch, q + g * pitch, scores + g * ld, ld);
}

// Columns c .. c + C * kLanes of G heads, held in registers over all rows.
template <class Simd, class T, int G, int C>
void accumulate_block(const T* tile, int64_t pitch, int rows, const float* p, int64_t ld, float* acc) {
  typename Simd::Vec sum[G][C];
  for (int g = 0; g < G; ++g) {
    for (int c = 0; c < C; ++c) sum[g][c] = Simd::load(acc + g * pitch + c * Simd::kLanes);
  }
  for (int r = 0; r < rows; ++r) {
    typename Simd::Vec value[C];
    for (int c = 0; c < C; ++c) value[c] = Simd::load(tile + r * pitch + c * Simd::kLanes);
    for (int g = 0; g < G; ++g) {
      const auto weight = Simd::set1(p[g * ld + r]);
      for (int c = 0; c < C; ++c) sum[g][c] = Simd::fma(weight, value[c], sum[g][c]);
    }
  }
  for (int g = 0; g < G; ++g) {
    for (int c = 0; c < C; ++c) Simd::store(acc + g * pitch + c * Simd::kLanes, sum[g][c]);
  }
}

template <class Simd, class T, int G>
void accumulate_heads(const T* tile, int64_t pitch, int rows, const float* p, int64_t ld, float* acc) {
  constexpr int kWide = Simd::kLanes / G < 8 ? Simd::kLanes / G : 8;
  int64_t c = 0;
  for (; c + kWide * Simd::kLanes <= pitch; c += kWide * Simd::kLanes) {
    accumulate_block<Simd, T, G, kWide>(tile + c, pitch, rows, p, ld, acc + c);
  }
  for (; c < pitch; c += 2 * Simd::kLanes) {
    accumulate_block<Simd, T, G, 2>(tile + c, pitch, rows, p, ld, acc + c);
  }
}

template <class Simd, class T>
void accumulate(const void* data, int64_t pitch, int rows, const float* p, int64_t ld, int heads,
                float* acc) {
  const T* tile = static_cast<const T*>(data);
  int g = 0;
  for (; g + 4 <= heads; g += 4) {
    accumulate_heads<Simd, T, 4>(tile, pitch, rows, p + g * ld, ld, acc + g * pitch);
  }
  for (; g + 2 <= heads; g += 2) {
    accumulate_heads<Simd, T, 2>(tile, pitch, rows, p + g * ld, ld, acc + g * pitch);
  }
  if (g < heads) accumulate_heads<Simd, T, 1>(tile, pitch, rows, p + g * ld, ld, acc + g * pitch);
}

// exp(x) for x <= 0, -inf or NaN, to 2 ulp: 2^n * e^r with |r| <= log(2) / 2 and a polynomial for e^r.
template <class Simd>
typename Simd::Vec exp_negative(typename Simd::Vec x) {
  // exp(-105) rounds to 0. The operand order of max keeps a NaN.
  x = Simd::max(Simd::set1(-105.0f), x);
  const auto magic = Simd::set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const auto t = Simd::fma(x, Simd::set1(1.44269504f), magic);
  const auto n = Simd::add(t, Simd::set1(-12582912.0f));
  auto r = Simd::fma(n, Simd::set1(-0.693359375f), x);
  r = Simd::fma(n, Simd::set1(2.12194440e-4f), r);
  auto p = Simd::set1(1.9875691500e-4f);
  p = Simd::fma(p, r, Simd::set1(1.3981999507e-3f));
  p = Simd::fma(p, r, Simd::set1(8.3334519073e-3f));
  p = Simd::fma(p, r, Simd::set1(4.1665795894e-2f));
  p = Simd::fma(p, r, Simd::set1(1.6666665459e-1f));
  p = Simd::fma(p, r, Simd::set1(5.0000001201e-1f));
  p = Simd::add(Simd::fma(p, Simd::mul(r, r), r), Simd::set1(1.0f));
  return Simd::exp2_scale(p, t);
}

template <class Simd>
void softmax(float* scores, int64_t n, float scale, float* max, float* sum) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const int64_t padded = round_up(n, kTileRows);
  float lanes[Simd::kLanes];

  for (int64_t i = 0; i < padded; i += Simd::kLanes) {
    Simd::store(scores + i, Simd::mul(Simd::load(scores + i), Simd::set1(scale)));
  }
  for (int64_t i = n; i < padded; ++i) scores[i] = -kInf;
  auto largest = Simd::set1(-kInf);
  for (int64_t i = 0; i < padded; i += Simd::kLanes) largest = Simd::max(largest, Simd::load(scores + i));
  Simd::store(lanes, largest);
  float top = -kInf;
  for (const float lane : lanes) top = lane > top ? lane : top;
  *max = top;

  // Subtracting -inf from -inf would give NaN. A NaN score may be lost from the maximum, never from the sum.
  const auto shift = Simd::set1(top == -kInf ? 0.0f : -top);
  auto total = Simd::zero();
  for (int64_t i = 0; i < padded; i += Simd::kLanes) {
    const auto weight = exp_negative<Simd>(Simd::add(Simd::load(scores + i), shift));
    Simd::store(scores + i, weight);
    total = Simd::add(total, weight);
  }
  Simd::store(lanes, total);
  *sum = 0;
  for (const float lane : lanes) *sum += lane;
}

}  // namespace
}  // namespace mustafar::cpu
