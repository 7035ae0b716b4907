// Forward of hyena_fir with many taps where few channels share them, on tensor cores; see
// fir_channel.cuh.
//
// A block of threads owns a strip of time and some slices of 8 channels, and marches along the
// strip in tiles of 128 steps. z arrives by asynchronous copies, one tile ahead. The two warps of a
// slice make its u, rounded to bfloat16, and keep as many blocks of it in shared memory as the taps
// reach back. Then each adds block after block, the oldest first, to the sums of four channels. q
// changes hands through shared memory; y takes the place of the pre third of z there and leaves by
// rows at the next tile.
#include "sarissa/kernels/fir/fir_channel.cuh"

namespace sarissa::kernels {
namespace {

using BF16 = __nv_bfloat16;

/// q of a channel in shared memory, floats: laid out as u is, but in units of 4 steps.
constexpr int kSumFloats = 4 * static_cast<int>(fir_channel_units(2 * kFirChannelBlocks));
__device__ inline int sum_of(int half, int block) {
  return (half * kFirChannelBlocks + (block ^ 2 * half)) * kSegment;
}

/// Sizes in shared memory for kLags lags, which are constants where kLags is not 0.
template <int kLags>
struct Sizes {
  int lags, blocks, channel_bytes, pairs;

  __device__ explicit Sizes(const FirChannelFwd& plan)
      : lags(plan.lags),
        blocks(plan.history),
        channel_bytes(plan.history_bytes),
        pairs(plan.pairs) {
    if constexpr (kLags > 0) {
      using Known = ChannelSizes<kLags>;
      lags = kLags;
      blocks = Known::kHistory;
      channel_bytes = Known::kHistoryBytes;
      pairs = Known::kPairs;
    }
  }
};

/// The history of u of all channels, a ring of `blocks` blocks.
struct Ring {
  unsigned char* begin;
  int blocks, channel_bytes;

  template <int kLags>
  __device__ Ring(unsigned char* begin, const Sizes<kLags>& sizes)
      : begin(begin), blocks(sizes.blocks), channel_bytes(sizes.channel_bytes) {}
  __device__ uint4* unit(int slot, int half, int block) const {
    return reinterpret_cast<uint4*>(begin + slot * channel_bytes) + half * blocks +
           ring_place(blocks, half, block);
  }
};

/// u before step 0 from the inner state, rounded to bfloat16 like every u, in the blocks at the
/// ring's end that the taps reach.
template <int kSlices>
__device__ void load_history(const FirParams& p, int b, int lags, const ChannelPlace<kSlices>& at,
                             const Ring& ring) {
  constexpr int kSegments = kFirChannelTile / kSegment;
  const int rows = static_cast<int>(p.num_taps) - 1;
  const auto* state = static_cast<const float*>(p.state) + int64_t{b} * rows * p.width + at.d;
  for (int i = at.segment; i < 2 * (lags - 1); i += kSegments) {
    const int first = rows - kSegment * (i + 1);  // row of the state
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const auto u = [&](int row) {
        return p.state != nullptr && row >= 0 ? state[row * p.width + j] : 0.0f;
      };
      *ring.unit(at.slot(j), 1 - i % 2, ring.blocks - 1 - i / 2) =
          make_uint4(pack_pair(u(first), u(first + 1)), pack_pair(u(first + 2), u(first + 3)),
                     pack_pair(u(first + 4), u(first + 5)), pack_pair(u(first + 6), u(first + 7)));
    }
  }
}

/// The rows of the inner state at L that a lane's u from step t on are, not rounded.
__device__ inline void store_state_rows(const FirParams& p, int b, int d, int t,
                                        const Two (&u)[kSegment]) {
  const int length = static_cast<int>(p.length), rows = static_cast<int>(p.num_taps) - 1;
  float* out = static_cast<float*>(p.state_out) + int64_t{b} * rows * p.width + d;
#pragma unroll
  for (int i = 0; i < kSegment; ++i) {
    const int row = t + i - (length - rows);
    if (row < 0 || t + i >= length) continue;
#pragma unroll
    for (int j = 0; j < 2; ++j) out[row * p.width + j] = u[i].at[j];
  }
}

/// q of a warp's four channels: block after block of the history from `oldest` on, the block that
/// the oldest taps of the tile's first block meet. `pairs` is the lane's fragment 2 lags - 1 of the
/// first channel's taps.
template <int kLags>
__device__ inline void sum_history(float (&q)[kTeamChannels][4], const Ring& ring, int slot,
                                   int oldest, const BlockLane& lane, const uint32_t* pairs,
                                   const Sizes<kLags>& sizes) {
  // Matrices of an ldmatrix: the halves of one channel, then of the next.
  const int half = lane.lane / 8 % 2;
  const unsigned char* const from =
      ring.begin + (slot + lane.lane / 16) * ring.channel_bytes + half * ring.blocks * 16;
  int block = oldest + column_block(lane.lane % 8);
  if (block >= ring.blocks) block -= ring.blocks;
  block = ring_place(ring.blocks, half, block);
  uint32_t taps[kTeamChannels][3];  // fragments 2 lag - 1 .. 2 lag + 1
#pragma unroll
  for (int i = 0; i < kTeamChannels; ++i) {
    taps[i][0] = pairs[i * sizes.pairs];
#pragma unroll
    for (int k = 0; k < 4; ++k) q[i][k] = 0.0f;
  }
  constexpr int kUnroll = kLags > 0 ? kLags : 4;
#pragma unroll kUnroll
  for (int lag = sizes.lags - 1; lag >= 0; --lag) {
    const unsigned char* const unit = from + block * 16;
    pairs -= 16;
#pragma unroll
    for (int i = 0; i < kTeamChannels; i += 2) {
      uint32_t u[4];
      load_matrices(u, unit + i * ring.channel_bytes);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        uint32_t(&t)[3] = taps[i + k];
        t[2] = t[0];
        t[1] = pairs[(i + k) * sizes.pairs + 8];
        t[0] = pairs[(i + k) * sizes.pairs];
        mma(q[i + k], t[1], t[2], t[0], t[1], u[2 * k], u[2 * k + 1], q[i + k]);
      }
    }
    if (++block == ring.blocks) block = 0;
  }
}

template <int kSlices, int kLags>
__global__ void __launch_bounds__(ChannelPlace<kSlices>::kThreads,
                                  512 / ChannelPlace<kSlices>::kThreads)
    fir_channel_fwd_kernel(const __grid_constant__ FirParams p,
                           const __grid_constant__ FirChannelFwd plan) {
  using Place = ChannelPlace<kSlices>;
  using Rows = ChannelRows<kSlices>;
  constexpr int kTile = kFirChannelTile, kStageBytes = 3 * Rows::kBytes;
  const Place at(p);
  const Rows rows(p, at);
  const int b = static_cast<int>(blockIdx.y);
  const FirForwardStrip strip(p, plan);
  const int begin = strip.begin, end = strip.end;
  const int start = begin - min(begin, ceil_div(plan.lags - 1, kFirChannelBlocks) * kTile);

  extern __shared__ __align__(16) unsigned char shared[];
  const Sizes<kLags> sizes(plan);
  const Ring ring(shared + 2 * kStageBytes, sizes);
  auto* const sums = reinterpret_cast<float*>(ring.begin + Place::kChannels * ring.channel_bytes);
  auto* const taps = reinterpret_cast<uint32_t*>(sums + Place::kChannels * kSumFloats) +
                     at.team_slot() * sizes.pairs;

  // The thread's rows of z of the next tile, and of y. Of the rows before a tile a thread copies
  // one unit of one third.
  const int before_third = rows.row / kBefore, before_row = rows.row % kBefore;
  const bool copies_before = before_third < 3;
  const auto* const x = static_cast<const BF16*>(p.x) + b * p.x_stride_b + at.channel;
  const BF16* z = rows.at_step(x, p.x_stride_l, start + rows.row);
  const BF16* z_before = rows.at_step(x, p.x_stride_l, start - kBefore + before_row);
  if (copies_before) z_before += before_third * p.width;
  BF16* y = rows.at_step(static_cast<BF16*>(p.y) + b * p.length * p.width + at.channel, p.width,
                         begin + rows.row);
  const auto load = [&](unsigned char* stage, int first) {
    if (first < end) {
#pragma unroll
      for (int third = 0; third < 3; ++third) {
        rows.load(stage + third * Rows::kBytes, z + third * p.width, p.x_stride_l, first);
      }
      if (copies_before && first > 0) {
        rows.load_before(stage + before_third * Rows::kBytes, z_before, first, before_row);
      }
      z += kTile * p.x_stride_l;
      z_before += kTile * p.x_stride_l;
    }
    copies_commit();
  };
  wait_for_earlier_kernels();
  load(shared, start);
  if (copies_before && start == 0) {
    auto row = Vector<BF16, 8>::zero();
    if (rows.active) {
      row = load_row(p, b, before_row - kBefore, before_third,
                     at.channel + rows.unit * kFirChannelSlice);
    }
    *reinterpret_cast<Vector<BF16, 8>*>(shared + before_third * Rows::kBytes +
                                        Rows::offset(before_row, rows.unit)) = row;
  }
  const TwoFeaturizer post(p, kPost, at.d), pre(p, kPre, at.d), value(p, kValue, at.d);
  Two skip = {};
  if (p.skip != nullptr) {
#pragma unroll
    for (int j = 0; j < 2; ++j) skip.at[j] = load_parameter<BF16>(p.skip, p.skip_is_T, at.d + j);
  }
  int channels[kTeamChannels];
#pragma unroll
  for (int i = 0; i < kTeamChannels; ++i) channels[i] = at.team_channel(p, i);
  fill_taps(taps, p, plan.group_width, sizes.pairs, at.lane, channels);
  if (start == 0) load_history(p, b, sizes.lags, at, ring);
  if (blockIdx.z == 0) {
    store_old_states(p, b, rows.row, Rows::kRowsAtOnce, at.channel + rows.unit * kFirChannelSlice);
  }
  const int state_begin =
      p.state_out == nullptr ? end : max(begin, static_cast<int>(p.length - p.num_taps) + 1);

  const int segment = Rows::segment_offset(at);
  int own = 0;  // where the tile's u go in the ring; the past is before it
  int parity = 0;
  for (int t0 = start; t0 < end; t0 += kTile, parity ^= 1) {
    unsigned char* const stage = shared + parity * kStageBytes;
    unsigned char* const other = shared + (parity ^ 1) * kStageBytes;
    copies_wait<0>();
    __syncthreads();  // the tile is there; of the one before, z and u have been read and y is there
    if (t0 > begin) {
      rows.store(other + Rows::kBytes, y, p.width, t0 - kTile);
      y += kTile * p.width;
    }
    load(other, t0 + kTile);
    const bool owned = t0 >= begin;
    const int t = t0 + at.segment * kSegment;
    {
      uint32_t z_pre[kSegment + kBefore], z_value[kSegment + kBefore];
      Rows::read(stage + Rows::kBytes + segment, z_pre);
      Rows::read(stage + 2 * Rows::kBytes + segment, z_value);
      Two u[kSegment];
      gate_u(pre, value, z_pre, z_value, u);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        *ring.unit(at.slot(j), at.half(), own + at.block()) = unit_of(u, j);
      }
      if (owned && t + kSegment > state_begin && at.active) store_state_rows(p, b, at.d, t, u);
    }
    slice_barrier<kFirChannelTeams>(at.slice);  // u is there, and the pre third has been read
    if (owned) {
      float q[kTeamChannels][4];
      int oldest = own - (sizes.lags - 1);
      if (oldest < 0) oldest += ring.blocks;
      sum_history(q, ring, at.team_slot(), oldest, at,
                  taps + TapPairs::word(2 * sizes.lags - 1, at), sizes);
      const int m = at.lane % 4;
#pragma unroll
      for (int i = 0; i < kTeamChannels; ++i) {
        float* const sum = sums + (at.team_slot() + i) * kSumFloats + at.row;
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[sum_of(k / 2, m + 4 * (k % 2))] = q[i][k];
      }
    }
    slice_barrier<kFirChannelTeams>(at.slice);  // q is there
    if (owned) {
      uint32_t z_post[kSegment + kBefore];
      Rows::read(stage + segment, z_post);
      Two result[kSegment];
#pragma unroll
      for (int i = 0; i < kSegment; ++i) result[i] = post.apply(z_post, i);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint4 units = *ring.unit(at.slot(j), at.half(), own + at.block());
        const uint32_t u[4] = {units.x, units.y, units.z, units.w};
        const auto* const sum = reinterpret_cast<const float4*>(sums + at.slot(j) * kSumFloats +
                                                                sum_of(at.half(), at.block()));
        const float4 q0 = sum[0], q1 = sum[1];
        const float q[kSegment] = {q0.x, q0.y, q0.z, q0.w, q1.x, q1.y, q1.z, q1.w};
#pragma unroll
        for (int i = 0; i < kSegment; ++i) {
          const float x = i % 2 == 0 ? low_of(u[i / 2]) : high_of(u[i / 2]);
          result[i].at[j] *= fmaf(skip.at[j], x, q[i]);
        }
      }
      unsigned char* const y_segment = stage + Rows::kBytes + segment;
#pragma unroll
      for (int i = 0; i < kSegment; ++i) {
        *reinterpret_cast<uint32_t*>(y_segment + Rows::offset(i + kBefore, 0)) =
            pack_pair(result[i].at[0], result[i].at[1]);
      }
    }
    own += kFirChannelBlocks;
    if (own == ring.blocks) own = 0;
  }
  __syncthreads();
  rows.store(shared + (parity ^ 1) * kStageBytes + Rows::kBytes, y, p.width,
             begin + (end - begin - 1) / kTile * kTile);
}

template <int kSlices, int kLags>
Status run(const FirParams& p, const FirChannelFwd& plan, cudaStream_t stream) {
  const auto kernel = fir_channel_fwd_kernel<kSlices, kLags>;
  const Status allowed = allow_shared_memory(kernel, static_cast<size_t>(plan.shared_bytes));
  if (!allowed.ok()) return allowed;
  launch_early(kernel, dim3(plan.columns, p.batch, plan.strips), ChannelPlace<kSlices>::kThreads,
               static_cast<size_t>(plan.shared_bytes), stream, p, plan);
  return launch_status(plan.name);
}

}  // namespace

Status fir_channel_fwd(const FirParams& p, const FirChannelFwd& plan, cudaStream_t stream) {
  switch (plan.slices) {
    case 4:
      if (plan.lags == 3) return run<4, 3>(p, plan, stream);
      if (plan.lags == 5) return run<4, 5>(p, plan, stream);
      return plan.lags == 9 ? run<4, 9>(p, plan, stream) : run<4, 0>(p, plan, stream);
    case 2:
      return run<2, 0>(p, plan, stream);
    case 1:
      return run<1, 0>(p, plan, stream);
    default:
      return {"the GPU has too little shared memory for the tensor-core kernels"};
  }
}

}  // namespace sarissa::kernels
