// Memory access of the marching kernels: vectors of neighbouring channels, asynchronous copies and
// sigmoids.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "sarissa/kernels/common/cuda.cuh"

namespace sarissa::kernels {

/// V neighbouring channels as they lie in memory, moved by one instruction.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T at[V];

  __device__ static Vector zero() {
    Vector x;
#pragma unroll
    for (int i = 0; i < V; ++i) x.at[i] = T(0);
    return x;
  }
  /// Element i in compute precision.
  __device__ compute_t<T> operator[](int i) const { return load(at + i); }
  __device__ void set(const compute_t<T>* x) {
#pragma unroll
    for (int i = 0; i < V; ++i) store(at + i, x[i]);
  }
};

/// Pairs of bfloat16 stay packed in words: as 16-bit values each would take a register of its own.
template <int V>
requires(V % 2 == 0) struct alignas(2 * V) Vector<__nv_bfloat16, V> {
  uint32_t pairs[V / 2];

  __device__ static Vector zero() {
    Vector x;
#pragma unroll
    for (int i = 0; i < V / 2; ++i) x.pairs[i] = 0;
    return x;
  }
  __device__ float operator[](int i) const {
    const uint32_t pair = pairs[i / 2];
    return __uint_as_float(i % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
  }
  __device__ void set(const float* x) {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pairs[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
    }
  }
};

template <class T, int V>
__device__ inline Vector<T, V> load_vector(const T* p) {
  return *reinterpret_cast<const Vector<T, V>*>(p);
}
/// `good` false: zeros, nothing is read. One predicated instruction: around a plain `if` the
/// compiler may put a branch, and loads on both sides of a branch no longer overlap.
template <class T, int V>
__device__ inline Vector<T, V> load_vector(const T* p, bool good) {
  constexpr int kBytes = sizeof(T) * V;
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16);
  auto x = Vector<T, V>::zero();
  if constexpr (kBytes == 2) {
    asm("{.reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.b16 %0, [%1];}"
        : "+h"(*reinterpret_cast<uint16_t*>(&x))
        : "l"(p), "r"(int{good}));
  } else {
    auto* const words = reinterpret_cast<uint32_t*>(&x);
    if constexpr (kBytes == 4) {
      asm("{.reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.b32 %0, [%1];}"
          : "+r"(words[0])
          : "l"(p), "r"(int{good}));
    } else if constexpr (kBytes == 8) {
      asm("{.reg .pred p; setp.ne.s32 p, %3, 0; @p ld.global.v2.b32 {%0, %1}, [%2];}"
          : "+r"(words[0]), "+r"(words[1])
          : "l"(p), "r"(int{good}));
    } else {
      asm("{.reg .pred p; setp.ne.s32 p, %5, 0; @p ld.global.v4.b32 {%0, %1, %2, %3}, [%4];}"
          : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
          : "l"(p), "r"(int{good}));
    }
  }
  return x;
}
template <class T, int V>
__device__ inline void store_vector(T* p, const compute_t<T>* x) {
  Vector<T, V> packed;
  packed.set(x);
  *reinterpret_cast<Vector<T, V>*>(p) = packed;
}

/// V neighbouring elements of a parameter, of type T or float, as they lie in memory. Which of the
/// two is known only at run time; a branch between two loads would wait in each arm for what it
/// converts, so both loads are there, one of them switched off, and the choice is made when read.
/// `good` false: zeros, nothing is read.
template <class T, int V>
class ParameterVector {
 public:
  __device__ ParameterVector(const void* p, bool is_T, int64_t at, bool good = true)
      : is_T_(std::is_same_v<T, float> || is_T),
        narrow_(load_vector<T, V>(static_cast<const T*>(p) + at, good && is_T_)),
        wide_(load_vector<float, V>(static_cast<const float*>(p) + at, good && !is_T_)) {}
  __device__ float operator[](int i) const { return is_T_ ? narrow_[i] : wide_[i]; }

 private:
  bool is_T_;
  Vector<T, V> narrow_;
  Vector<float, V> wide_;
};

/// Whether vectors of V elements at p, and at every multiple of the strides from there, are
/// aligned.
template <class T, int V>
inline bool vector_aligned(const void* p, std::initializer_list<int64_t> strides) {
  bool aligned = reinterpret_cast<uintptr_t>(p) % (sizeof(T) * V) == 0;
  for (const int64_t stride : strides) aligned = aligned && stride % V == 0;
  return aligned;
}

/// Copies kBytes from global to shared memory without waiting; `good` false writes zeros and reads
/// nothing. Reads of the copied bytes need copies_wait, and by other threads a barrier. Two bytes
/// are too few for an asynchronous copy: there the thread waits.
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* global, bool good) {
  if constexpr (kBytes == 2) {
    *static_cast<uint16_t*>(shared) = good ? *static_cast<const uint16_t*>(global) : uint16_t{0};
  } else {
    const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    if constexpr (kBytes == 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
                   "r"(good ? 16 : 0)
                   : "memory");
    } else {
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global),
                   "n"(kBytes), "r"(good ? kBytes : 0)
                   : "memory");
    }
  }
}

/// copy_async of 16 bytes for rows of which a block of threads takes a part of a line of 128 bytes:
/// the first to ask brings the whole line to L2, where the others find the rest. DRAM gives lines
/// faster than parts of them.
__device__ inline void copy_async_line(void* shared, const void* global, bool good) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(good ? 16 : 0)
               : "memory");
}

/// Ends a group of copies.
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits for all but the last kPending groups of this thread.
template <int kPending>
__device__ inline void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// sigmoid(x) = 1 / (1 + exp(-x)) for values stored as T. bfloat16 takes the special function unit
/// as it is (relative error about 1e-7 (1 + |x|), far below the 2^-9 of the stored value).
template <class T>
__device__ inline compute_t<T> sigmoid(compute_t<T> x) {
  if constexpr (std::is_same_v<T, double>) {
    return 1.0 / (1.0 + exp(-x));
  } else {
    float e, s;
    if constexpr (std::is_same_v<T, float>) {
      e = expf(-x);
    } else {
      asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(-1.4426950408889634f * x));
    }
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0f + e));
    return s;
  }
}

/// Stores a word, two bfloat16 channels, if `good`. One predicated instruction: around a plain `if`
/// the compiler puts a branch.
__device__ inline void store_word(void* p, uint32_t x, bool good) {
  asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p st.global.b32 [%0], %1;}" ::"l"(p), "r"(x),
               "r"(int{good}));
}

}  // namespace sarissa::kernels
