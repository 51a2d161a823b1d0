// Shared memory by 32-bit address: one instruction an access, where indexing an extern array costs an
// addition more. Volatile, so that accesses stay in order around barriers.
#pragma once

#include <cstdint>

namespace mustafar::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void store16(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(static_cast<uint16_t>(value)));
}
// The high half of a word, taken apart into a register of its own: shifting the word in place would wait
// until the store of its low half has read it.
__device__ __forceinline__ void store_high16(uint32_t address, uint32_t word) {
  asm volatile("{.reg .b16 low, high; mov.b32 {low, high}, %1; st.shared.b16 [%0], high;}" ::"r"(address),
               "r"(word));
}
__device__ __forceinline__ void store32(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value));
}
__device__ __forceinline__ void store(uint32_t address, const uint32_t (&words)[2]) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(words[0]), "r"(words[1]));
}
__device__ __forceinline__ void store(uint32_t address, const uint32_t (&words)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3]));
}
__device__ __forceinline__ void store_zeros(uint32_t address) {  // 16 bytes
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0));
}

__device__ __forceinline__ void load16(uint32_t address, uint32_t& word) {
  uint16_t bits;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(address));
  word = bits;
}
__device__ __forceinline__ void load(uint32_t address, uint32_t& word) {
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
}
__device__ __forceinline__ void load(uint32_t address, uint32_t (&words)[1]) { load(address, words[0]); }
__device__ __forceinline__ void load(uint32_t address, uint32_t (&words)[2]) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(address));
}
__device__ __forceinline__ void load(uint32_t address, uint32_t (&words)[4]) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address));
}

// Floats one after another, at a multiple of 16 bytes, or of 8 or 4 where they come to no more.
template <int kCount>
__device__ __forceinline__ void load_floats(uint32_t address, float (&x)[kCount]) {
  constexpr int kAtOnce = kCount % 4 == 0 ? 4 : kCount % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int i = 0; i < kCount; i += kAtOnce) {
    uint32_t words[kAtOnce];
    load(address + i * 4, words);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) x[i + j] = __uint_as_float(words[j]);
  }
}

// 32 or 16 bits of device memory.
__device__ __forceinline__ int32_t load_global32(const int32_t* from) {
  int32_t word;
  asm volatile("ld.global.nc.s32 %0, [%1];" : "=r"(word) : "l"(from));
  return word;
}
__device__ __forceinline__ uint32_t load_global16(const void* from) {
  uint16_t bits;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(bits) : "l"(from));
  return bits;
}
// 16 bytes of device memory that are read once.
__device__ __forceinline__ void load_once(const void* from, uint32_t (&words)[4]) {
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "l"(from));
}

// ldmatrix of four 8 x 8 matrices of 16-bit values, transposed: lane l has the address of row l % 8 of matrix
// l / 8.
__device__ __forceinline__ void load_transposed(uint32_t address, uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address));
}

// Asynchronous copies of 8 or 16 bytes from global memory. They are waited for in groups, in order, and
// unlike a load into registers an outstanding copy holds none of the six scoreboards of a warp: see
// README.md.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t address, const void* from) {
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from));
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(kBytes));
}
// 16 bytes from memory, or zeros. `from` must be in an allocation even so.
__device__ __forceinline__ void copy_async_or_zeros(uint32_t address, const void* from, bool held) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(held ? 16 : 0));
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
// Waits for this thread's copies but those of the last kGroups groups.
template <int kGroups>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups));
}

// Waits for all of them, committed or not.
__device__ __forceinline__ void wait_all_copies() { asm volatile("cp.async.wait_all;"); }

// By one warp, whose lanes stay together.
template <int kBytes>
__device__ __forceinline__ void fill_zeros(uint32_t address, int lane) {
  constexpr int kAtOnce = 32 * 16, kRest = kBytes % kAtOnce;
#pragma unroll 8
  for (int i = 0; i < kBytes - kRest; i += kAtOnce) store_zeros(address + lane * 16 + i);
  if (lane * 16 < kRest) store_zeros(address + lane * 16 + kBytes - kRest);
}

}  // namespace mustafar::cuda
