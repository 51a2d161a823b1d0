// The table of functions of one instruction set. Included last by its translation unit.
#pragma once

#include "dense.h"
#include "rows.h"

namespace mustafar::cpu {
namespace {

template <class Simd, class Packed = TiledPacked<Simd>>
constexpr Kernels make_kernels(const char* name) {
  return {
      name,
      {expand_rows<Simd, Half>, expand_rows<Simd, BFloat>, expand_rows<Simd, float>},
      {Packed::template score<Half>, Packed::template score<BFloat>, Packed::template score<float>},
      {Packed::template weigh<Half>, Packed::template weigh<BFloat>, Packed::template weigh<float>},
      {row_to_float<Simd, Half>, row_to_float<Simd, BFloat>, row_to_float<Simd, float>},
      {row_from_float<Simd, Half>, row_from_float<Simd, BFloat>, row_from_float<Simd, float>},
      {dot<Simd, Half>, dot<Simd, BFloat>, dot<Simd, float>},
      {accumulate<Simd, Half>, accumulate<Simd, BFloat>, accumulate<Simd, float>},
      softmax<Simd>,
      {top_bitmap<Simd, Half>, top_bitmap<Simd, BFloat>, top_bitmap<Simd, float>},
      {nonzero_bitmap<Simd, Half>, nonzero_bitmap<Simd, BFloat>, nonzero_bitmap<Simd, float>},
      {pack_rows<Simd, Half>, pack_rows<Simd, BFloat>, pack_rows<Simd, float>},
  };
}

}  // namespace
}  // namespace mustafar::cpu
