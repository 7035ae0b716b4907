// Tensor cores for bfloat16 with sums in float: the warp-wide instructions, as functions.
//
// Layouts (PTX ISA, mma.m16n8k16). Lane l has row r = l / 4 and column pair c = 2 (l % 4). A
// register holds two neighbouring columns, the first in its low half.
//
//   A [16, 16]  a[0] = (r, c), a[1] = (r + 8, c), a[2] = (r, c + 8), a[3] = (r + 8, c + 8)
//   B [16, 8]   b[0] = rows c, c + 1 of column r; b[1] = rows c + 8, c + 9
//   C [16, 8]   c[0], c[1] = (r, c), (r, c + 1); c[2], c[3] = (r + 8, c), (r + 8, c + 1)
//
// So two C tiles side by side, packed by pairs, are an A: {C0[0,1], C0[2,3], C1[0,1], C1[2,3]}.
#pragma once

#include <cstdint>

#include "sarissa/kernels/common/cuda.cuh"

namespace sarissa::kernels {

/// Two floats rounded to bfloat16, `low` in the low half.
__device__ inline uint32_t pack_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ inline float low_of(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_of(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

/// Two neighbouring channels.
struct Two {
  float at[2];
};
__device__ inline Two unpack_two(uint32_t pair) { return {low_of(pair), high_of(pair)}; }

/// a b + c of both bfloat16 of a pair, rounded once.
__device__ inline uint32_t fma_pairs(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

/// x = high + low up to 2^-17 of x, both bfloat16, for two x at once.
struct SplitPair {
  uint32_t high, low;
};
__device__ inline SplitPair split_pair(float x0, float x1) {
  SplitPair s;
  s.high = pack_pair(x0, x1);
  s.low = pack_pair(x0 - low_of(s.high), x1 - high_of(s.high));
  return s;
}

/// d = a b + c, [16, 8] = [16, 16] [16, 8] + [16, 8].
__device__ inline void mma(float* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                           uint32_t b0, uint32_t b1, const float* c) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
        "f"(c[3]));
}
__device__ inline void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                           const float* c) {
  mma(d, a[0], a[1], a[2], a[3], b0, b1, c);
}
/// d = a b + c with k = 8: a is a[0], a[1] of the layout above, b is b[0].
__device__ inline void mma_k8(float* d, uint32_t a0, uint32_t a1, uint32_t b0, const float* c) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a0), "r"(a1), "r"(b0), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

/// Four 8 x 8 matrices of 2-byte elements. Lane 8 i + r gives the address of row r (16 bytes,
/// aligned) of matrix i; x[i] is then this lane's pair (l / 4, 2 (l % 4)) of it, of its transpose
/// with `load_matrices_transposed`.
__device__ inline void load_matrices(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}

/// The transpose of an 8 x 8 matrix that lies in registers, a pair in each lane.
__device__ inline uint32_t transpose_matrix(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

/// The inverse of load_matrices_transposed. Before sm_90, which has an instruction for it, by
/// transposes and stores of pairs.
__device__ inline void store_matrices_transposed(void* row, uint32_t x0, uint32_t x1, uint32_t x2,
                                                 uint32_t x3) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(row)),
               "r"(x0), "r"(x1), "r"(x2), "r"(x3)
               : "memory");
#else
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t x[4] = {x0, x1, x2, x3};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t to = __shfl_sync(0xffffffffu, shared_address(row), 8 * i + lane / 4);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + lane % 4 * 4), "r"(transpose_matrix(x[i]))
                 : "memory");
  }
#endif
}

/// Hides where x comes from: else the compiler computes offsets again and again inside a loop, or
/// spills them.
__device__ inline void opaque(uint32_t& x) { asm volatile("" : "+r"(x)); }

}  // namespace sarissa::kernels
