// Helpers of the CUDA kernels that walk over rows: 16-byte packs of elements and reductions of a
// block in a fixed order.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "sarissa/kernels/common/cuda.cuh"

namespace sarissa::kernels {

/// V neighbouring elements, moved by one load or store.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T values[V];
};

template <int V, class T>
__device__ inline Pack<T, V> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}
template <class T, int V>
__device__ inline void store_pack(T* p, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

/// Elements of T in 16 bytes.
template <class T>
constexpr int kPackWidth = 16 / sizeof(T);

/// Whether every row can be read in packs: all pointers (null allowed) are 16-byte aligned and all
/// widths and strides are multiples of the pack.
template <class T>
inline bool packs_fit(std::initializer_list<const void*> pointers,
                      std::initializer_list<int64_t> strides) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  }
  for (const int64_t s : strides) {
    if (s % kPackWidth<T> != 0) return false;
  }
  return true;
}

/// Combines one value per thread over the block and gives all threads the result. blockDim.x is a
/// multiple of 32; `shared` holds 32 values and may be used again after the next barrier.
template <class C, class Combine>
__device__ inline C block_reduce(C x, C* shared, Combine combine) {
  for (int offset = 16; offset > 0; offset /= 2) {
    x = combine(x, __shfl_xor_sync(0xffffffffu, x, offset));
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  C total = shared[0];
  for (unsigned w = 1; w < blockDim.x / 32; ++w) total = combine(total, shared[w]);
  return total;
}

}  // namespace sarissa::kernels
