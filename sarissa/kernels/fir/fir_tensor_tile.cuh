// The backward of hyena_fir on tensor cores where 16 channels share taps: a tile of a warp, 32
// steps of 16 channels, as gate and finish write and read it and as the products do.
//
// In gate and finish a lane has a segment of eight steps of two neighbouring channels: lane 8 s + j
// has steps 8 s .. 8 s + 7 of channels 2j, 2j + 1.
#pragma once

#include "sarissa/kernels/common/tensor.cuh"
#include "sarissa/kernels/common/vector.cuh"
#include "sarissa/kernels/fir/fir_tensor.cuh"
#include "sarissa/kernels/fir/fir_tensor_bwd_plan.h"

namespace sarissa::kernels {

constexpr int kTile = kFirTensorBwdTile;   // steps
constexpr int kSegment = 8;                // steps of a lane
constexpr int kPairs = kFirBlockSide / 2;  // pairs of channels
static_assert(kTile / kSegment * kPairs == 32);

/// A tile of u, dq, q or du of a warp, eight lines. Line i has steps i, 8 + i, 16 + i, 24 + i, and
/// of each 16 channels in 8 words: lane 8 s + j has channels 2j, 2j + 1 of step 8 s + i. Lines are
/// 16 bytes longer than that, since ldmatrix reads the same place of eight lines at once. dq and du
/// run backwards in each block of 16 steps: so the taps of the adjoint filter are those of the
/// filter itself.
constexpr int kLine = 36;
using BlockTile = uint32_t[kSegment * kLine];

/// The word of step i of a lane's segment in a tile of u or q, and in one of dq or du.
__device__ inline int word_of(int lane, int i) { return i * kLine + lane; }
__device__ inline int backward_word_of(int lane, int i) {
  return (kSegment - 1 - i) * kLine + (lane ^ kPairs);
}

/// The word of a tile that a lane points ldmatrix to: for a block as operand A of [channel, step]
/// (transposed) or B of [step, channel] ..
__device__ inline int fragment_word(int lane) { return lane % 8 * kLine + lane / 8 * 4; }
/// .. and as A of [step, channel].
__device__ inline int fragment_by_step_word(int lane) {
  const int matrix = lane / 8;
  return lane % 8 * kLine + (matrix % 2 * 2 + matrix / 2) * 4;
}

/// Stores the sums of a block, [channel, step], at the lane's fragment word of it.
__device__ inline void store_block(uint32_t* to, const float (&sum)[2][4]) {
  store_matrices_transposed(to, pack_pair(sum[0][0], sum[0][1]), pack_pair(sum[0][2], sum[0][3]),
                            pack_pair(sum[1][0], sum[1][1]), pack_pair(sum[1][2], sum[1][3]));
}

/// dz of step i from dc of the steps i on.
template <int kSteps>
__device__ inline Two featurized_backward(const FeaturizerTaps& f, const Two (&dc)[kSteps], int i) {
  Two dz;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    dz.at[j] = fmaf(f[0].at[j], dc[i].at[j],
                    fmaf(f[1].at[j], dc[i + 1].at[j], f[2].at[j] * dc[i + 2].at[j]));
  }
  return dz;
}

/// The sum over a lane's channels in all segments of the tile.
__device__ inline float over_segments(float x) {
  x += __shfl_xor_sync(~0u, x, 8);
  return x + __shfl_xor_sync(~0u, x, 16);
}

/// A matrix for each lag of 16 steps: the products of 16 steps of dq (rows, backwards) with 16 of
/// u.
template <int kLags>
using LagProducts = float[kLags][kFirBlockSide][kFirBlockSide];

/// The gradients of `num_taps` taps from a warp's sums of lag products, [2 x 8 steps of u] in
/// accumulators. Lag 16 k + i - j of dq's step i in its block and u's step j: diagonals.
template <int kLags>
__device__ inline void sum_diagonals(LagProducts<kLags>& products, const float (&sums)[kLags][2][4],
                                     int num_taps, float* d_taps) {
  constexpr int kSide = kFirBlockSide;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int r = lane / 4, c = lane % 4 * 2;
#pragma unroll
  for (int k = 0; k < kLags; ++k) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      products[k][kSide - 1 - (r + i / 2 % 2 * 8)][c + i % 2 + i / 4 * 8] = sums[k][i / 4][i % 4];
    }
  }
  __syncwarp();
  for (int tap = lane; tap < num_taps; tap += 32) {
    const int k = tap / kSide, lag = tap % kSide;
    float sum = 0;
    for (int j = 0; j < kSide; ++j) {
      const int i = j + lag;
      if (i < kSide) {
        sum += products[k][i][j];
      } else if (k + 1 < kLags) {
        sum += products[k + 1][i - kSide][j];
      }
    }
    d_taps[tap] = sum;
  }
}

}  // namespace sarissa::kernels
