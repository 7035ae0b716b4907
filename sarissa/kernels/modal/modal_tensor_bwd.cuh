// What modal_tensor_bwd.cu keeps in shared memory and registers: layouts, tables, lanes' positions.
#pragma once

#include "sarissa/kernels/common/vector.cuh"
#include "sarissa/kernels/modal/modal_tensor.cuh"
#include "sarissa/kernels/modal/modal_tensor_bwd.h"

namespace sarissa::kernels::modal_bwd {

using Bf16 = __nv_bfloat16;

constexpr int kTeamWarps = 8, kTeamThreads = 32 * kTeamWarps;
constexpr int kChannels = kModalTeamChannels;
constexpr int kModes = kModalTensorModes;
constexpr int kBlock = kModalBlock;
constexpr int kTile = kModalBwdTile;
constexpr int kSegment = 8;  // steps of a lane in the phases `gates` and `gradients`
constexpr int kSegments = kTile / kSegment;
constexpr int kSegmentsOfWarp = kSegments / kTeamWarps;

using kernels::opaque;

enum Stream { kDy = 3 };  // after z's thirds
enum Side { kU, kDq };    // of the filter's products

/// Rows of one stream, 32 bytes for a team's channels, with two rows before the tile. Segments are
/// one row further apart than they are long: the four that a warp reads at once are then in
/// different banks.
struct Rows {
  static constexpr int kRow = 2 * kChannels;
  static constexpr int kSegmentBytes = (kSegment + 1) * kRow;
  /// From a segment's first row to the two before it.
  static constexpr int kOneBefore = -2 * kRow, kTwoBefore = -3 * kRow;

  unsigned char bytes[-kTwoBefore + kSegments * kSegmentBytes - kRow];

  /// row >= -2
  __device__ static int offset(int row) {
    return -kTwoBefore + (row >> 3) * kSegmentBytes + (row & 7) * kRow;
  }
};

/// One side of a channel: u or dq, then q or du. Half h of block b is the unit of 16 bytes 2 b + h,
/// swizzled: the eight units of a matrix of the phase `filter`, and the four of a warp with two
/// channels in the other phases, are in different banks.
struct Steps {
  static constexpr int kUnit = 16;
  unsigned char bytes[2 * kTile + 2 * kUnit];

  __device__ static int offset(int unit) {
    return kUnit * (unit ^ (unit >> 3 & 1) ^ (unit >> 4 & 1) << 2);
  }
};

struct Stage {
  Rows rows[4];
  float states[kChannels][kModes];  // before the tile
};

/// Per mode: lambda^16; residue lambda; what the scan of a tile lacks of lambda^256
/// (BackwardMarch::start).
enum Constant { kDecay, kScale, kRest, kConstants };

/// What a team has in shared memory.
struct TeamShared {
  Stage stages[2];
  Steps steps[2][kChannels];
  unsigned char powers[kChannels][2][512];  // lambda^(15-p): high parts, low parts
  float constants[kChannels][kConstants][kModes];
  uint32_t first_taps[kChannels][kBlock];  // the filter's, with the skip, rounded
  float taps[3][3][kChannels];             // [third][tap] of the featurizer
  /// Gradients of the featurizer's output at the first two steps of a tile, for the tile to its
  /// left.
  float edges[2][3][2][kChannels];
  float right[3][2][kChannels];  // the same at the last two steps of a chunk, for the seam
};

/// Gradients of parameters, bfloat16 or float.
struct Parameters {
  void* data;
  bool is_bf16;

  __device__ void store(int64_t at, float x) const {
    if (is_bf16) {
      kernels::store(static_cast<Bf16*>(data) + at, x);
    } else {
      static_cast<float*>(data)[at] = x;
    }
  }
};

/// opaque() of an address: what is added to it is then not added to each of its parts.
template <class T>
__device__ inline void opaque(T*& at) {
  asm volatile("" : "+l"(at));
}

/// Two channels of a row.
__device__ inline float2 pair_at(const void* p) {
  const uint32_t pair = *static_cast<const uint32_t*>(p);
  return {low_of(pair), high_of(pair)};
}

/// The taps of two channels of a third.
struct Taps {
  float2 at[3];

  __device__ Taps(const TeamShared& shared, int third, int pair) {
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      at[k] = *reinterpret_cast<const float2*>(&shared.taps[third][k][2 * pair]);
    }
  }
  __device__ float2 apply(float2 z0, float2 z1, float2 z2) const {
    return {fmaf(at[0].x, z0.x, fmaf(at[1].x, z1.x, at[2].x * z2.x)),
            fmaf(at[0].y, z0.y, fmaf(at[1].y, z1.y, at[2].y * z2.y))};
  }
};

/// The adjoint of the featurizer for one third, step by step from right to left.
struct FeaturizerAdjoint {
  Taps taps;
  float2 dc1, dc2;  // gradients of the featurizer's output one and two steps later

  __device__ void shift(float2 dc) {
    dc2 = dc1;
    dc1 = dc;
  }
  /// dz of the step.
  __device__ float2 push(float2 dc) {
    const float2 dz = taps.apply(dc, dc1, dc2);
    shift(dc);
    return dz;
  }
};

/// The thread within its team, made again: what depends on it is then not kept in registers from
/// phase to phase, which have none to spare.
__device__ inline int again_thread() {
  uint32_t thread = threadIdx.x % kTeamThreads;
  opaque(thread);
  return static_cast<int>(thread);
}

/// A lane's part in the phases `gates` and `gradients`.
struct Part {
  int pair;     // its two channels
  int segment;  // its steps
  int row_at;   // of its first step and channels in Rows
  int unit_at;  // of its steps in Steps

  __device__ Part() {
    const unsigned thread = again_thread();
    pair = thread % 32 / kSegmentsOfWarp;
    segment = thread / 32 * kSegmentsOfWarp + thread % kSegmentsOfWarp;
    row_at = Rows::offset(segment * kSegment) + 4 * pair;
    unit_at = Steps::offset(segment);
  }
};

/// Where a lane points when it loads matrices in the phase `filter`.
struct Pointers {
  static constexpr int kSide = sizeof(TeamShared::steps[0]);
  /// Between blocks 4 i, 4 i + 1 and 4 i + 2, 4 i + 3, by exclusive or.
  static constexpr int kOtherBlocks = 4 * Steps::kUnit;

  int steps;            // both sides, both halves of blocks 4 i and 4 i + 1
  int lags_dq, lags_u;  // one side, all blocks
  int powers;           // the table of powers, to read it transposed

  __device__ Pointers() {
    const int lane = again_thread() % 32u;
    const int row = lane % 8, low = lane / 8 % 2, high = lane / 16;
    const int block = row / 2 * 4 + row % 2;
    steps = high * kSide + Steps::offset(2 * block + low);
    lags_dq = kSide + (Steps::offset(2 * block + low) ^ high * kOtherBlocks);
    lags_u = Steps::offset(2 * block + high) ^ low * kOtherBlocks;
    powers = 256 * low + 128 * high + 16 * row;
  }
};

/// What the scan over a tile's blocks makes of x at a block of the lane: x_k decay + sums_k from
/// block to block. Lanes of a quad hold four blocks each.
///
/// `entering` enters the tile at the left. Gives what enters each of the lane's blocks; returns
/// what leaves them.
__device__ inline float scan_right(float decay, const float (&sums)[4], float entering,
                                   float (&at)[4]) {
  const int quad = threadIdx.x % 4;
  const float decay2 = decay * decay, decay4 = decay2 * decay2, decay8 = decay4 * decay4;
  float s = sums[0], other;
#pragma unroll
  for (int k = 1; k < 4; ++k) s = fmaf(decay, s, sums[k]);
  if (quad == 0) s = fmaf(decay4, entering, s);
  other = __shfl_up_sync(~0u, s, 1);
  if (quad >= 1) s = fmaf(decay4, other, s);
  other = __shfl_up_sync(~0u, s, 2);
  if (quad >= 2) s = fmaf(decay8, other, s);
  other = __shfl_up_sync(~0u, s, 1);
  at[0] = quad == 0 ? entering : other;
#pragma unroll
  for (int k = 1; k < 4; ++k) at[k] = fmaf(decay, at[k - 1], sums[k - 1]);
  return s;
}
/// The same from right to left. `entering` enters the tile at the right and becomes what leaves it
/// at the left, `rest` times itself more; only lane 3 of a quad has it.
__device__ inline void scan_left(float decay, float rest, const float (&sums)[4], float& entering,
                                 float (&at)[4]) {
  const int lane = threadIdx.x % 32, quad = lane % 4;
  const float decay2 = decay * decay, decay4 = decay2 * decay2, decay8 = decay4 * decay4;
  float s = sums[3], other;
#pragma unroll
  for (int k = 2; k >= 0; --k) s = fmaf(decay, s, sums[k]);
  if (quad == 3) s = fmaf(decay4, entering, s);
  other = __shfl_down_sync(~0u, s, 1);
  if (quad <= 2) s = fmaf(decay4, other, s);
  other = __shfl_down_sync(~0u, s, 2);
  if (quad <= 1) s = fmaf(decay8, other, s);
  other = __shfl_sync(~0u, s, (lane & 28) | ((lane + 1) & 3));
  at[3] = quad == 3 ? entering : other;
  entering = fmaf(rest, entering, other);
#pragma unroll
  for (int k = 2; k >= 0; --k) at[k] = fmaf(decay, at[k + 1], sums[k + 1]);
}
/// What scan_left makes of `entering` over a tile, without `rest`.
__device__ inline double scanned_decay(float decay) {
  const float decay2 = decay * decay, decay4 = decay2 * decay2, decay8 = decay4 * decay4;
  return double{decay8} * double{decay4} * double{decay4};
}

}  // namespace sarissa::kernels::modal_bwd
