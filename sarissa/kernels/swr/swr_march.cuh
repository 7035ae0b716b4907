// What the marching backward of phalanx walks over: chunks of at most kSwrChunk steps of one block,
// and a warp's coefficients of a chunk. Steps outside the sequence have a = 1 and zeros, so that no
// arithmetic asks for them.
#pragma once

#include "sarissa/kernels/swr/swr_cuda.cuh"

namespace sarissa::kernels {

constexpr int kChunk = kSwrChunk;

/// SwrGrid in 32 bits.
struct Grid {
  int window, index, length;

  __device__ explicit Grid(const SwrGrid& grid)
      : window(static_cast<int>(grid.window)),
        index(static_cast<int>(grid.index)),
        length(static_cast<int>(grid.length)) {}
};

/// A chunk: number j of block n, and its slot.
struct Cursor {
  int n, j, slot;

  __device__ void retreat(const SwrMarch& plan) {
    if (--j < 0) {
      j = plan.chunks_per_block - 1;
      --n;
    }
    slot = slot == 0 ? plan.slots - 1 : slot - 1;
  }
};

/// Rows lo <= i < hi of a chunk are steps t0 + i of the sequence.
struct Rows {
  int t0, lo, hi;

  __device__ Rows(const Grid& grid, const Cursor& chunk)
      : t0(chunk.n * grid.window - grid.index + chunk.j * kChunk),
        lo(max(0, min(-t0, kChunk))),
        hi(max(0, min(min(kChunk, grid.window - chunk.j * kChunk), grid.length - t0))) {}
  __device__ bool has(int i) const { return lo <= i && i < hi; }
};

/// Waits at a barrier until kThreads threads of the CTA have come, from whichever places in the
/// code.
template <int kThreads>
__device__ inline void meet(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

/// The coefficients of a chunk for the kHeads heads of a warp: fetched early by one lane per row
/// and head, turned into decay_max sigmoid(a) and shared by the warp later.
template <class T, int kHeads>
class MarchDecays {
 public:
  using Shared = float[kChunk][kHeads];

  /// The warp's heads are first_head, first_head + 1, ...
  __device__ MarchDecays(const SwrInputs& in, const Grid& grid, int64_t row, int64_t first_head)
      : grid_(grid),
        a_(static_cast<const T*>(in.a) + row * in.a_batch + first_head),
        a_step_(in.a_step),
        decay_max_(static_cast<float>(in.decay_max)),
        heads_(static_cast<int>(min(max(in.heads - first_head, int64_t{0}), int64_t{kHeads}))),
        lane_(threadIdx.x % 32) {}

  /// kInside: all rows of the chunk and all heads exist.
  template <bool kInside>
  __device__ void fetch(const Cursor& chunk) {
    const Rows rows(grid_, chunk);
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const int i = (k * 32 + lane_) / kHeads, h = lane_ % kHeads;
      if (i < kChunk && (kInside || (rows.has(i) && h < heads_))) {
        raw_[k] = a_[(rows.t0 + i) * a_step_ + h];
      }
    }
  }
  template <bool kInside>
  __device__ void share(const Cursor& chunk, Shared& to) const {
    const Rows rows(grid_, chunk);
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const int i = (k * 32 + lane_) / kHeads, h = lane_ % kHeads;
      if (i < kChunk) {
        to[i][h] =
            kInside || (rows.has(i) && h < heads_) ? decay_max_ * sigmoid<T>(load(&raw_[k])) : 1.0f;
      }
    }
    __syncwarp();
  }

 private:
  static constexpr int kPerLane = (kChunk * kHeads + 31) / 32;
  Grid grid_;
  const T* a_;
  int64_t a_step_;
  float decay_max_;
  int heads_, lane_;
  T raw_[kPerLane];
};

}  // namespace sarissa::kernels
