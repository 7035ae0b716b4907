// The tensor-core kernels of hyena_fir where few channels share taps: what the forward and the
// backward have in common.
//
// Each channel has products of its own. Their rows are the 16 steps of a block, and their columns
// are 8 blocks of time, so that a tile of 128 steps of q is
//
//   Q = sum over j of T_j U_j        T_j[a, b] = h[16 j + a - b]
//
// where column n of U_j is the block j blocks before block n of the tile. u lies in shared memory
// channel by channel, in units of 16 bytes, 8 neighbouring steps: half a block.
//
// Two warps share a slice of 8 channels. Where the featurizer, the gates and their gradients are
// computed a lane has two neighbouring channels and 8 steps, its segment; in the products a warp
// has four channels.
#pragma once

#include "sarissa/kernels/fir/fir_channel_plan.h"
#include "sarissa/kernels/fir/fir_tensor.cuh"

namespace sarissa::kernels {

constexpr int kSegment = 8;                        // steps
constexpr int kSlicePairs = kFirChannelSlice / 2;  // pairs of channels
constexpr int kTeamChannels = kFirChannelSlice / kFirChannelTeams;

/// Where a thread is.
template <int kSlices>
struct ChannelPlace : BlockLane {
  static constexpr int kThreads = 32 * kFirChannelTeams * kSlices;
  static constexpr int kChannels = kFirChannelSlice * kSlices;

  int thread, slice, team;
  int pair, segment;  // of channels in the slice, of steps in the tile
  int channel;        // the first of the block of threads
  int d;              // the first of the lane's two
  bool active;        // the slice is not beyond the last channel

  __device__ explicit ChannelPlace(const FirParams& p)
      : thread(static_cast<int>(threadIdx.x)),
        slice(thread / (32 * kFirChannelTeams)),
        team(thread / 32 % kFirChannelTeams),
        pair(lane % kSlicePairs),
        segment(team * (32 / kSlicePairs) + lane / kSlicePairs),
        channel(static_cast<int>(blockIdx.x) * kChannels),
        d(channel + slice * kFirChannelSlice + 2 * pair),
        active(d < p.width) {
    if (!active) d = channel + 2 * pair;
  }
  /// Half of a block that the segment is, and the block.
  __device__ int half() const { return segment % 2; }
  __device__ int block() const { return segment / 2; }
  /// A channel's place among those of its slice: first those with an even number.
  __device__ int slot(int j) const { return slice * kFirChannelSlice + pair + j * kSlicePairs; }
  /// The first of the warp's four channels in the products. Those with even numbers are two apart.
  __device__ int team_slot() const { return slice * kFirChannelSlice + team * kTeamChannels; }
  __device__ int team_channel(const FirParams& p, int i) const {
    const int d = channel + slice * kFirChannelSlice + team + 2 * i;
    return d < p.width ? d : 0;
  }
};

/// Sizes in shared memory for kLags lags, of each channel.
template <int kLags>
struct ChannelSizes {
  static constexpr int kHistory = static_cast<int>(fir_channel_history(kLags));  // blocks of u
  static constexpr int kHistoryBytes = static_cast<int>(16 * fir_channel_units(kHistory));
  static constexpr int kPairs = static_cast<int>(fir_tensor_pairs(kLags));  // of taps
};

/// A tile of rows of z or dy in shared memory: rows of kSlices units, the first two those before
/// the tile. After 8 rows a unit is left out: so the lanes of a warp, which read rows 8 steps apart
/// together, find them in different banks.
template <int kSlices>
struct ChannelRows {
  static constexpr int kBytes = static_cast<int>(fir_channel_row_units(kSlices)) * 16;
  static constexpr int kRowsAtOnce = 32 * kFirChannelTeams;  // that all threads copy
  static constexpr int kCopies = kFirChannelTile / kRowsAtOnce;

  int row, unit;  // of what the thread copies
  bool active;    // its channels are there
  int length;

  __device__ ChannelRows(const FirParams& p, const ChannelPlace<kSlices>& at)
      : row(at.thread / kSlices),
        unit(at.thread % kSlices),
        active(at.channel + unit * kFirChannelSlice < p.width),
        length(static_cast<int>(p.length)) {}

  /// In bytes. Row 0 is two steps before the tile.
  __device__ static constexpr int offset(int row, int unit) {
    return (row * kSlices + row / 8 + unit) * 16;
  }
  __device__ static constexpr int copy_offset(int i) {
    return i * kRowsAtOnce * (kSlices * 8 + 1) / 8 * 16;
  }

  /// Where the thread's unit of step t is; `from` is step 0 of the block's first channel.
  template <class Pointer>
  __device__ Pointer at_step(Pointer from, int64_t stride, int t) const {
    return from + t * stride + unit * kFirChannelSlice;
  }
  /// Starts the copies of steps `first` on; `from` is at_step(first + row). Steps that the sequence
  /// has not are zeros.
  __device__ void load(unsigned char* tile, const __nv_bfloat16* from, int64_t stride,
                       int first) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i, from += kRowsAtOnce * stride) {
      const int t = first + i * kRowsAtOnce + row;
      copy_async_line(tile + offset(kBefore + row, unit) + copy_offset(i), from,
                      active && t >= 0 && t < length);
    }
  }
  /// Of row `before` of the two before `first`; `from` is its at_step.
  __device__ void load_before(unsigned char* tile, const __nv_bfloat16* from, int first,
                              int before) const {
    const int t = first - kBefore + before;
    copy_async_line(tile + offset(before, unit), from, active && t >= 0 && t < length);
  }
  /// Stores what has taken the place of a tile. The thread reads where it copies to.
  __device__ void store(const unsigned char* tile, __nv_bfloat16* to, int64_t stride,
                        int first) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i, to += kRowsAtOnce * stride) {
      if (first + i * kRowsAtOnce + row < length && active) {
        *reinterpret_cast<uint4*>(to) =
            *reinterpret_cast<const uint4*>(tile + offset(kBefore + row, unit) + copy_offset(i));
      }
    }
  }

  /// A lane's two channels in the first row of its segment, two steps before it, and from there on.
  __device__ static int segment_offset(const ChannelPlace<kSlices>& at) {
    return offset(at.segment * kSegment, at.slice) + at.pair * 4;
  }
  template <int kRows>
  __device__ static void read(const unsigned char* segment, uint32_t (&z)[kRows]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      z[i] = *reinterpret_cast<const uint32_t*>(segment + offset(i, 0));
    }
  }
};

/// The featurizer of one third for a lane's two channels, in the order of the other kernels.
struct TwoFeaturizer {
  FeaturizerTaps at;

  TwoFeaturizer() = default;
  __device__ TwoFeaturizer(const FirParams& p, int third, int d) {
#pragma unroll
    for (int tap = 0; tap < 3; ++tap) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        at[tap].at[j] = load_parameter<__nv_bfloat16>(p.featurizer, p.featurizer_is_T,
                                                      (third * p.width + d + j) * 3 + tap);
      }
    }
  }
  /// c of step i, where z[0] is two steps before step 0.
  template <int kRows>
  __device__ Two apply(const uint32_t (&z)[kRows], int i) const {
    return featurized(at, z, i);
  }
};

/// u of a lane's steps, from its rows of the pre and value thirds.
__device__ inline void gate_u(const TwoFeaturizer& pre, const TwoFeaturizer& value,
                              const uint32_t (&z_pre)[kSegment + kBefore],
                              const uint32_t (&z_value)[kSegment + kBefore], Two (&u)[kSegment]) {
#pragma unroll
  for (int i = 0; i < kSegment; ++i) {
    const Two c_pre = pre.apply(z_pre, i), c_value = value.apply(z_value, i);
#pragma unroll
    for (int j = 0; j < 2; ++j) u[i].at[j] = c_pre.at[j] * c_value.at[j];
  }
}

/// A lane's steps of its channel j as a unit.
__device__ inline uint4 unit_of(const Two (&x)[kSegment], int j) {
  return make_uint4(pack_pair(x[0].at[j], x[1].at[j]), pack_pair(x[2].at[j], x[3].at[j]),
                    pack_pair(x[4].at[j], x[5].at[j]), pack_pair(x[6].at[j], x[7].at[j]));
}

/// The place of a unit of u or dq of a channel in shared memory, a ring of `blocks` blocks: the
/// first halves of all blocks, then the second halves, four blocks later. So what eight lanes touch
/// together, units of neighbouring channels or blocks, lies in different banks.
__device__ inline int ring_place(int blocks, int half, int block) {
  block += 4 * half;
  return block < blocks ? block : block - blocks;
}

/// Column n of a product is block n / 2 + 4 (n % 2) of the tile, so that of a product's sum a lane
/// has the blocks m and m + 4, m = lane % 4, and the lanes' blocks m are neighbours.
__device__ inline int column_block(int n) { return n / 2 + 4 * (n % 2); }

/// The taps of a warp's four channels in shared memory, `count` pairs for each, as TapPairs has
/// them. All channels are read at once: memory answers late.
__device__ inline void fill_taps(uint32_t* words, const FirParams& p, int64_t group_width,
                                 int count, int lane, const int (&channels)[kTeamChannels]) {
  const int num_taps = static_cast<int>(p.num_taps);
  const auto fill = [&]<class T>(const T* taps) {
#pragma unroll 2
    for (int word = lane; word < count; word += 32) {
      const int k = word - TapPairs::kOrigin;
      float tap[kTeamChannels][2];
#pragma unroll
      for (int i = 0; i < kTeamChannels; ++i) {
        const T* from = taps + channels[i] / group_width * num_taps + k;
        tap[i][0] = k >= 0 && k < num_taps ? load(from) : 0.0f;
        tap[i][1] = k >= 1 && k <= num_taps ? load(from - 1) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kTeamChannels; ++i) {
        words[i * count + word] = pack_pair(tap[i][0], tap[i][1]);
      }
    }
  };
  if (p.taps_is_T) {
    fill(static_cast<const __nv_bfloat16*>(p.taps));
  } else {
    fill(static_cast<const float*>(p.taps));
  }
}

Status fir_channel_fwd(const FirParams& p, const FirChannelFwd& plan, cudaStream_t stream);

}  // namespace sarissa::kernels
