// The tensor-core kernels of hyena_fir with many taps: what the forward and the backward share.
//
// Products are transposed: their rows are 16 neighbouring channels, which share taps, and their
// columns are steps. A block is 16 channels x 16 steps. Of a block a lane has channels r and r + 8
// (r = lane / 4) at steps c, c + 1, c + 8, c + 9 (c = 2 (lane % 4)): four pairs of neighbouring
// steps, pair i of channel r + 8 (i % 2) from step c + 8 (i / 2) on. In this order a block is the
// A operand of a product, the sum of one (pair i is elements 2i, 2i + 1) and what
// load_matrices_transposed reads from rows [step, channel].
#pragma once

#include "sarissa/kernels/common/featurizer.cuh"
#include "sarissa/kernels/common/tensor.cuh"
#include "sarissa/kernels/common/vector.cuh"
#include "sarissa/kernels/fir/fir.h"
#include "sarissa/kernels/fir/fir_march.cuh"
#include "sarissa/kernels/fir/fir_tensor_plan.h"

namespace sarissa::kernels {

constexpr int kBefore = 2;  // rows of z before a tile, which the featurizer needs

/// 8 channels from `channel` of a third on in row t of z, or of the featurizer's state before
/// step 0.
__device__ inline Vector<__nv_bfloat16, 8> load_row(const FirParams& p, int b, int t, int third,
                                                    int channel) {
  const int64_t column = third * p.width + channel;
  if (t >= 0) {
    const auto* z = static_cast<const __nv_bfloat16*>(p.x) + b * p.x_stride_b + t * p.x_stride_l;
    return load_vector<__nv_bfloat16, 8>(z + column);
  }
  auto x = Vector<__nv_bfloat16, 8>::zero();
  if (t >= -kBefore && p.featurizer_state != nullptr) {
    // One by one: the state need not be aligned.
    const auto* state = static_cast<const uint16_t*>(p.featurizer_state) +
                        (int64_t{b} * kBefore + t + kBefore) * 3 * p.width + column;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x.pairs[i] = state[2 * i] | static_cast<uint32_t>(state[2 * i + 1]) << 16;
    }
  }
  return x;
}

/// The featurizer's state at L, and the rows of the inner state at L that are older than z: of 8
/// channels, rows `row`, row + rows_at_once, ..
__device__ inline void store_old_states(const FirParams& p, int b, int row, int rows_at_once,
                                        int channel) {
  const int length = static_cast<int>(p.length), rows = static_cast<int>(p.num_taps) - 1;
  if (channel >= p.width) return;
  if (p.featurizer_state_out != nullptr && row < kBefore * 3) {
    auto* out = static_cast<__nv_bfloat16*>(p.featurizer_state_out) +
                (int64_t{b} * kBefore * 3 + row) * p.width + channel;
    *reinterpret_cast<Vector<__nv_bfloat16, 8>*>(out) =
        load_row(p, b, length - kBefore + row / 3, row % 3, channel);
  }
  if (p.state_out == nullptr) return;
  const int64_t at = int64_t{b} * rows * p.width + channel;
  for (int i = row; i < rows - length; i += rows_at_once) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      static_cast<float*>(p.state_out)[at + i * p.width + j] =
          p.state == nullptr ? 0.0f
                             : static_cast<const float*>(p.state)[at + (i + length) * p.width + j];
    }
  }
}

/// The strip of the forward that the block of threads has.
struct FirForwardStrip {
  int begin, end;

  template <class Plan>
  __device__ FirForwardStrip(const FirParams& p, const Plan& plan) {
    const int strip = static_cast<int>(blockIdx.z);
    begin = strip > 0 ? plan.lead + strip * plan.steps : 0;
    end = min(plan.lead + (strip + 1) * plan.steps, static_cast<int>(p.length));
  }
};

/// Waits for the warps of a slice.
template <int kTeams>
__device__ inline void slice_barrier(int slice) {
  if constexpr (kTeams == 1) {
    __syncwarp();
  } else {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + slice), "n"(32 * kTeams) : "memory");
  }
}

/// Which channels and steps of a block a lane has.
struct BlockLane {
  int lane, row, column;  // r, c

  __device__ BlockLane()
      : lane(static_cast<int>(threadIdx.x) % 32), row(lane / 4), column(lane % 4 * 2) {}
  /// Row of a [step, channel] tile whose address this lane gives to load_matrices_transposed and
  /// store_matrices_transposed, and the unit of 8 channels.
  __device__ int address_row() const { return lane / 16 * 8 + lane % 8; }
  __device__ int address_unit() const { return lane / 8 % 2; }
};

/// Offset of a unit of 8 channels (16 bytes) in a tile of rows of kUnits units. Units change places
/// from row to row: the same unit of 8 neighbouring rows lies in different banks.
template <int kUnits>
__device__ inline int unit_offset(int row, int unit) {
  static_assert(kUnits == 4 || kUnits == 8);
  return (row * kUnits + (unit ^ (row / (8 / kUnits) % kUnits))) * 16;
}

/// The featurizer's taps of a lane's two neighbouring channels in one third.
using FeaturizerTaps = Two[3];

/// c of step i from z of the steps i - 2 on.
template <int kRows>
__device__ inline Two featurized(const FeaturizerTaps& f, const uint32_t (&z)[kRows], int i) {
  const Two z0 = unpack_two(z[i + 2]), z1 = unpack_two(z[i + 1]), z2 = unpack_two(z[i]);
  Two c;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    c.at[j] = three_taps(f[0].at[j], f[1].at[j], f[2].at[j], z0.at[j], z1.at[j], z2.at[j]);
  }
  return c;
}

/// Adds to the featurizer's gradient what step i gives, with z of the steps i - 2 on.
template <int kRows>
__device__ inline void add_d_featurizer(Two (&d_featurizer)[3], const Two& dc,
                                        const uint32_t (&z)[kRows], int i) {
#pragma unroll
  for (int tap = 0; tap < 3; ++tap) {
    const Two z_tap = unpack_two(z[i + 2 - tap]);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float& sum = d_featurizer[tap].at[j];
      sum = fmaf(dc.at[j], z_tap.at[j], sum);
    }
  }
}

/// The featurizer of one third for a lane's two channels: at[tap][0] of channel r, [1] of r + 8.
/// It runs in single precision, with the parameters as they are, in the order of the other kernels.
struct BlockFeaturizer {
  float at[3][2];

  /// d is the block's first channel.
  __device__ BlockFeaturizer(const FirParams& p, int third, int d, const BlockLane& lane) {
#pragma unroll
    for (int tap = 0; tap < 3; ++tap) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t channel = third * p.width + d + lane.row + 8 * half;
        at[tap][half] =
            load_parameter<__nv_bfloat16>(p.featurizer, p.featurizer_is_T, channel * 3 + tap);
      }
    }
  }

  /// c of a block from its z and the z of two steps before.
  __device__ void apply(const uint32_t (&now)[4], const uint32_t (&past)[4], float (&c)[8]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float f0 = at[0][i % 2], f1 = at[1][i % 2], f2 = at[2][i % 2];
      const float z0 = low_of(past[i]), z1 = high_of(past[i]);
      const float z2 = low_of(now[i]), z3 = high_of(now[i]);
      c[2 * i] = three_taps(f0, f1, f2, z2, z1, z0);
      c[2 * i + 1] = three_taps(f0, f1, f2, z3, z2, z1);
    }
  }
};

/// The taps of a warp's group in shared memory, rounded to bfloat16: word kOrigin + k holds taps k
/// and k - 1, and taps outside 0 .. W-1 are zero. In words, fragment i of a lane is word
/// kOrigin + 8 i + r - c. The product that adds a block of u to the sums of the block `lag` blocks
/// later takes the fragments 2 lag - 1 .. 2 lag + 1:
///   first 8 steps   B = (fragment 2 lag,     fragment 2 lag - 1)
///   last 8 steps    B = (fragment 2 lag + 1, fragment 2 lag)
struct TapPairs {
  static constexpr int kOrigin = 2 * kFirBlockSide;

  /// Words first, first + step, .. of the taps of `group`, of `count` (fir_tensor_pairs).
  __device__ static void fill(uint32_t* words, int first, int step, int count, const FirParams& p,
                              int64_t group) {
    const auto tap = [&](int k) {
      return k >= 0 && k < p.num_taps
                 ? load_parameter<__nv_bfloat16>(p.taps, p.taps_is_T, group * p.num_taps + k)
                 : 0.0f;
    };
#pragma unroll 5
    for (int i = first; i < count; i += step) {
      words[i] = pack_pair(tap(i - kOrigin), tap(i - kOrigin - 1));
    }
  }
  /// Where a lane finds fragment i.
  __device__ static int word(int i, const BlockLane& lane) {
    return kOrigin + 8 * i + lane.row - lane.column;
  }
};

/// Bytes of shared memory of a multiprocessor of the current device.
inline int64_t shared_memory() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  return bytes;
}

Status fir_tensor_fwd(const FirParams& p, const FirTensorFwd& plan, cudaStream_t stream);

}  // namespace sarissa::kernels
