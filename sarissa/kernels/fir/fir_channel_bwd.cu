// Backward of hyena_fir with many taps where few channels share them, on tensor cores; see
// fir_channel.cuh.
//
// A block of threads owns a strip of time and some slices of 8 channels, and marches along the
// strip backwards in tiles of 128 steps. A tile n takes three passes:
//
//   gate      u of tile n - 1, and dq = c_post dy of tile n
//   products  q of tile n, from u of the tiles n - 1 and n, and du of tile n, from dq of the tiles
//             n and n + 1, with the same matrices of taps; and the taps' gradient
//   finish    dc and dz of tile n, the gradients of featurizer and skip
//
// In gate and finish a lane has two channels and eight steps, in single precision. u, dq, q and du,
// which change hands between the lanes, are rounded to bfloat16; q takes the place of u, and du
// that of dq one tile later. dz takes the place of z and leaves by rows.
#include "sarissa/kernels/fir/fir_channel_bwd.cuh"

#include "sarissa/kernels/fir/fir_channel.cuh"
#include "sarissa/kernels/fir/fir_tensor_bwd.cuh"

namespace sarissa::kernels {
namespace {

using BF16 = __nv_bfloat16;

constexpr int kTile = kFirChannelTile, kBlocks = kFirChannelBwdBlocks;
constexpr int kUnits = 2 * kBlocks + 1;  // of a channel's u or dq
static_assert(kUnits == fir_channel_units(kBlocks));

/// Shared memory of a block of threads, beside the taps, which follow.
template <int kSlices>
struct Shared {
  static constexpr int kChannels = kFirChannelSlice * kSlices;
  using RowTile = unsigned char[ChannelRows<kSlices>::kBytes];
  using Channel = uint4[kUnits];  // two tiles: tile n is in the blocks 8 (n % 2) on

  RowTile post, dy, pre[2], value[2];  // pre and value of tiles n and n - 1
  Channel u[kChannels];
  Channel dq[kChannels];             // backwards in each block of 16 steps
  Two featurizer[9][kChannels / 2];  // [third, tap]
  Two edge[2][3][2][kChannels / 2];  // the first two dc of tile n + 1, and those of tile n
};

/// A channel's unit, of a half of one of its blocks, modulo two tiles.
__device__ inline int unit_index(int half, int block) {
  return half * kBlocks + ((block + 4 * half) & (kBlocks - 1));
}

/// What a warp sums in the products of a tile, for its four channels.
struct Products {
  float q[kTeamChannels][4], du[kTeamChannels][4];
};

/// q and du of the tile whose first block is `own`. dq runs backwards, so that its adjoint filter
/// has the matrices of the filter: T_j meets u j blocks before, and dq j blocks after. `pairs` is
/// the lane's fragment 0 of the first channel's taps.
template <int kLags>
__device__ inline void filter(Products& sums, const uint4 (*u)[kUnits], const uint4 (*dq)[kUnits],
                              int own, const BlockLane& lane, const uint32_t* pairs) {
  constexpr int kPairs = ChannelSizes<kLags>::kPairs;
  const int half = lane.lane / 8 % 2, channel = lane.lane / 16;
  const int column = own + column_block(lane.lane % 8);
  uint32_t taps[kTeamChannels][3];  // fragments 2 lag - 1 .. 2 lag + 1
#pragma unroll
  for (int i = 0; i < kTeamChannels; ++i) {
    taps[i][0] = pairs[i * kPairs + 8 * (2 * kLags - 1)];
#pragma unroll
    for (int k = 0; k < 4; ++k) sums.q[i][k] = sums.du[i][k] = 0.0f;
  }
#pragma unroll
  for (int lag = kLags - 1; lag >= 0; --lag) {
    const int u_unit = unit_index(half, column - lag);
    const int dq_unit = unit_index(half, column + lag);
#pragma unroll
    for (int i = 0; i < kTeamChannels; i += 2) {
      uint32_t u_pairs[4], dq_pairs[4];
      load_matrices(u_pairs, &u[channel + i][u_unit]);
      load_matrices(dq_pairs, &dq[channel + i][dq_unit]);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        uint32_t(&t)[3] = taps[i + k];
        t[2] = t[0];
        t[1] = pairs[(i + k) * kPairs + 8 * (2 * lag)];
        t[0] = pairs[(i + k) * kPairs + 8 * (2 * lag - 1)];
        mma(sums.q[i + k], t[1], t[2], t[0], t[1], u_pairs[2 * k], u_pairs[2 * k + 1],
            sums.q[i + k]);
        mma(sums.du[i + k], t[1], t[2], t[0], t[1], dq_pairs[2 * k], dq_pairs[2 * k + 1],
            sums.du[i + k]);
      }
    }
  }
}

/// Adds what the u of a tile contribute to the gradients of the taps. With dq blocks i .. i + 7 as
/// columns m, a product has 128 taps at once:
///
///   d_h[16 m + a] += sum over b of u[16 i + b - a] dq[16 (i + m) + b]
///
/// dq runs backwards, so the rows of the matrix of u do too: a lane needs the pairs of u at steps
/// 8 k + 7 - c - r and one less, k = 2i - 1 .. 2i + 1.
__device__ inline void add_taps(float (&d_taps)[kTeamChannels][4], const uint4 (*u)[kUnits],
                                const uint4 (*dq)[kUnits], int own, const BlockLane& lane) {
  const int step = 7 - lane.column - lane.row;
  // Either a word with its halves exchanged, or halves of two words.
  const int first = step & ~1, second = (step - 1) & ~1;
  const uint32_t halves = step % 2 != 0 ? 0x5432 : 0x7610;
  const int matrix_half = lane.lane / 8 % 2, matrix_channel = lane.lane / 16;
  // Where the word of u from step 8 k + `at` on is, k = 2 block + half. It may be in unit k - 1.
  const auto word = [&](int at, int block, int half) {
    const int before = at < 0 ? 1 : 0;
    return unit_index(half ^ before, half == 0 ? block - before : block) * 4 + (at & 7) / 2;
  };
  const auto pair = [&](int i, int first_word, int second_word) {
    const auto* words = reinterpret_cast<const uint32_t*>(u[i]);
    return __byte_perm(words[first_word], words[second_word], halves);
  };
  uint32_t u_pairs[kTeamChannels][3];  // k = 2i - 1 .. 2i + 1
#pragma unroll
  for (int i = 0; i < kTeamChannels; ++i) {
    u_pairs[i][2] = pair(i, word(first, own - 1, 1), word(second, own - 1, 1));
  }
#pragma unroll
  for (int step = 0; step < kFirChannelBlocks; ++step) {
    const int block = own + step;
    const int even_a = word(first, block, 0), even_b = word(second, block, 0);
    const int odd_a = word(first, block, 1), odd_b = word(second, block, 1);
    const int dq_unit = unit_index(matrix_half, block + lane.lane % 8);
#pragma unroll
    for (int i = 0; i < kTeamChannels; ++i) {
      u_pairs[i][0] = u_pairs[i][2];
      u_pairs[i][1] = pair(i, even_a, even_b);
      u_pairs[i][2] = pair(i, odd_a, odd_b);
    }
#pragma unroll
    for (int i = 0; i < kTeamChannels; i += 2) {
      uint32_t dq_pairs[4];
      load_matrices(dq_pairs, &dq[matrix_channel + i][dq_unit]);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint32_t(&x)[3] = u_pairs[i + k];
        mma(d_taps[i + k], x[2], x[1], x[1], x[0], dq_pairs[2 * k], dq_pairs[2 * k + 1],
            d_taps[i + k]);
      }
    }
  }
}

/// Stores the sums of a warp's four channels as the tile in the blocks from `own` on.
__device__ inline void store_sums(uint4 (*to)[kUnits], const float (&sums)[kTeamChannels][4],
                                  int own, const BlockLane& lane) {
  const int unit = unit_index(lane.lane / 8 % 2, own + column_block(lane.lane % 8));
#pragma unroll
  for (int i = 0; i < kTeamChannels; i += 2) {
    store_matrices_transposed(&to[lane.lane / 16 + i][unit], pack_pair(sums[i][0], sums[i][1]),
                              pack_pair(sums[i][2], sums[i][3]),
                              pack_pair(sums[i + 1][0], sums[i + 1][1]),
                              pack_pair(sums[i + 1][2], sums[i + 1][3]));
  }
}

/// Ten steps of q or du of one channel: a segment, and two steps of the next.
struct Segment {
  uint32_t words[5];

  __device__ float operator[](int i) const {
    return i % 2 == 0 ? low_of(words[i / 2]) : high_of(words[i / 2]);
  }
  __device__ static Segment load(const uint4* own, const uint4* next) {
    const uint4 x = *own;
    return {{x.x, x.y, x.z, x.w, next->x}};
  }
};
/// Of what lies backwards.
struct BackwardSegment {
  uint32_t words[5];

  __device__ float operator[](int i) const {
    return i % 2 != 0 ? low_of(words[i / 2]) : high_of(words[i / 2]);
  }
  __device__ static BackwardSegment load(const uint4* own, const uint4* next) {
    const uint4 x = *own;
    return {{x.w, x.z, x.y, x.x, next->w}};
  }
};

/// The gradients of featurizer and skip that a lane sums.
struct LaneSums {
  Two featurizer[3][3], skip;
};

/// What a lane does in gate and finish.
template <int kSlices>
struct Lane {
  using Rows = ChannelRows<kSlices>;
  const ChannelPlace<kSlices>& at;
  Shared<kSlices>& shared;
  int segment;  // offset in a tile of rows
  int pair;     // of channels

  __device__ Lane(const ChannelPlace<kSlices>& at, Shared<kSlices>& shared)
      : at(at),
        shared(shared),
        segment(Rows::segment_offset(at)),
        pair(at.slice * kSlicePairs + at.pair) {}

  __device__ TwoFeaturizer featurizer(int third) const {
    TwoFeaturizer f;
#pragma unroll
    for (int tap = 0; tap < 3; ++tap) f.at[tap] = shared.featurizer[3 * third + tap][pair];
    return f;
  }

  __device__ void gate_u(const unsigned char* pre_tile, const unsigned char* value_tile, int own) {
    uint32_t z_pre[kSegment + kBefore], z_value[kSegment + kBefore];
    Rows::read(pre_tile + segment, z_pre);
    Rows::read(value_tile + segment, z_value);
    const TwoFeaturizer pre = featurizer(kPre), value = featurizer(kValue);
    Two u[kSegment];
    kernels::gate_u(pre, value, z_pre, z_value, u);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      shared.u[at.slot(j)][unit_index(at.half(), own + at.block())] = unit_of(u, j);
    }
  }
  __device__ void gate_dq(int own) {
    uint32_t z[kSegment + kBefore];
    Rows::read(shared.post + segment, z);
    const TwoFeaturizer post = featurizer(kPost);
    Two dq[kSegment];
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      const Two c = post.apply(z, i), dy = load_dy(i);
#pragma unroll
      for (int j = 0; j < 2; ++j) dq[i].at[j] = c.at[j] * dy.at[j];
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      shared.dq[at.slot(j)][unit_index(1 - at.half(), own + at.block())] =
          make_uint4(pack_pair(dq[7].at[j], dq[6].at[j]), pack_pair(dq[5].at[j], dq[4].at[j]),
                     pack_pair(dq[3].at[j], dq[2].at[j]), pack_pair(dq[1].at[j], dq[0].at[j]));
    }
  }
  /// dy of step i of the segment.
  __device__ Two load_dy(int i) const {
    return unpack_two(
        *reinterpret_cast<const uint32_t*>(shared.dy + segment + Rows::offset(i + kBefore, 0)));
  }

  /// dz of the tile, packed; adds to the sums what an `owned` tile has.
  __device__ void finish(const unsigned char* pre_tile, const unsigned char* value_tile, int own,
                         int parity, bool owned, const Two& skip, LaneSums& sums,
                         uint32_t (&dz)[3][kSegment]) {
    // The last segment has no next one in the tile: what it reads instead is not used.
    const bool last = at.segment == kTile / kSegment - 1;
    const int next = last ? at.segment : at.segment + 1;
    Segment q[2];
    BackwardSegment du[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint4* const u_units = shared.u[at.slot(j)];
      const uint4* const dq_units = shared.dq[at.slot(j)];
      q[j] = Segment::load(u_units + unit_index(at.half(), own + at.block()),
                           u_units + unit_index(next % 2, own + next / 2));
      const int later = own ^ kFirChannelBlocks;
      du[j] = BackwardSegment::load(dq_units + unit_index(1 - at.half(), later + at.block()),
                                    dq_units + unit_index(1 - next % 2, later + next / 2));
    }
    const auto beyond = [&](int row) { return last ? 0 : Rows::offset(row, 0); };
    const auto load_z = [&](const unsigned char* tile, uint32_t(&z)[kSegment + 4]) {
#pragma unroll
      for (int i = 0; i < kSegment + 4; ++i) {
        z[i] = *reinterpret_cast<const uint32_t*>(
            tile + segment + (i < kSegment + kBefore ? Rows::offset(i, 0) : beyond(i)));
      }
    };
    const TwoFeaturizer post = featurizer(kPost), pre = featurizer(kPre),
                        value = featurizer(kValue);
    uint32_t z_post[kSegment + 4], z_pre[kSegment + 4], z_value[kSegment + 4];
    load_z(shared.post, z_post);
    load_z(pre_tile, z_pre);
    load_z(value_tile, z_value);
    Two dc[3][3];  // of steps i - 2 .. i
#pragma unroll
    for (int i = 0; i < kSegment + 2; ++i) {
      const Two dy = i < kSegment ? load_dy(i)
                                  : unpack_two(*reinterpret_cast<const uint32_t*>(
                                        shared.dy + segment + beyond(i + kBefore)));
      const Two c_post = post.apply(z_post, i), c_pre = pre.apply(z_pre, i),
                c_value = value.apply(z_value, i);
#pragma unroll
      for (int third = 0; third < 3; ++third) {
        dc[third][0] = dc[third][1];
        dc[third][1] = dc[third][2];
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float u = c_pre.at[j] * c_value.at[j], dq = c_post.at[j] * dy.at[j];
        const float d = fmaf(skip.at[j], dq, du[j][i]);
        dc[kPost][2].at[j] = fmaf(skip.at[j], u, q[j][i]) * dy.at[j];
        dc[kPre][2].at[j] = c_value.at[j] * d;
        dc[kValue][2].at[j] = c_pre.at[j] * d;
        if (i < kSegment && owned) sums.skip.at[j] = fmaf(dq, u, sums.skip.at[j]);
      }
#pragma unroll
      for (int third = 0; third < 3; ++third) {
        if (i < 2 && at.segment == 0) shared.edge[parity][third][i][pair] = dc[third][2];
        if (i >= kSegment && last)
          dc[third][2] = shared.edge[parity ^ 1][third][i - kSegment][pair];
        const auto& z = third == kPost ? z_post : third == kPre ? z_pre : z_value;
        const auto& f = third == kPost ? post : third == kPre ? pre : value;
        if (i < kSegment && owned) {
          add_d_featurizer(sums.featurizer[third], dc[third][2], z, i);
        }
        if (i >= 2) {
          float d[2];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            d[j] = three_taps(f.at[0].at[j], f.at[1].at[j], f.at[2].at[j], dc[third][0].at[j],
                              dc[third][1].at[j], dc[third][2].at[j]);
          }
          dz[third][i - 2] = pack_pair(d[0], d[1]);
        }
      }
    }
  }
  __device__ void store_dz(unsigned char* tile, const uint32_t (&dz)[kSegment]) const {
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      *reinterpret_cast<uint32_t*>(tile + segment + Rows::offset(i + kBefore, 0)) = dz[i];
    }
  }

  /// Sums over the segments in order, and stores the strip's partial gradients of featurizer and
  /// skip. Overwrites u.
  __device__ void store_sums_of_lanes(const FirBwdParams& p, LaneSums& sums, float* d_f,
                                      float* d_skip) {
    constexpr int kSums = sizeof(LaneSums) / sizeof(float);
    auto* const flat = reinterpret_cast<float*>(&sums);
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
#pragma unroll
      for (int lanes = kSlicePairs; lanes < 32; lanes *= 2) {
        flat[i] += __shfl_xor_sync(~0u, flat[i], lanes);
      }
    }
    auto* const others = reinterpret_cast<float*>(shared.u[at.slot(0)]);
    static_assert(kSums * sizeof(float) <= sizeof shared.u[0]);
    const bool first = at.lane < kSlicePairs;
    slice_barrier<kFirChannelTeams>(at.slice);
    if (first && at.team == 1) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) others[i] = flat[i];
    }
    slice_barrier<kFirChannelTeams>(at.slice);
    if (!first || at.team != 0 || !at.active) return;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int third = 0; third < 3; ++third) {
#pragma unroll
        for (int tap = 0; tap < 3; ++tap) {
          d_f[(third * p.width + at.d + j) * 3 + tap] =
              sums.featurizer[third][tap].at[j] + others[(third * 3 + tap) * 2 + j];
        }
      }
      d_skip[at.d + j] = sums.skip.at[j] + others[18 + j];
    }
  }
};

template <int kSlices, int kLags>
__global__ void __launch_bounds__(ChannelPlace<kSlices>::kThreads,
                                  512 / ChannelPlace<kSlices>::kThreads)
    fir_channel_bwd_kernel(const __grid_constant__ FirBwdParams p,
                           const __grid_constant__ FirChannelBwd plan) {
  using Place = ChannelPlace<kSlices>;
  using Rows = ChannelRows<kSlices>;
  constexpr int kPairs = ChannelSizes<kLags>::kPairs;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<kSlices>*>(shared_bytes);
  const Place at(p);
  const Rows rows(p, at);
  const int b = static_cast<int>(blockIdx.z);
  const int begin = static_cast<int>(blockIdx.y) * plan.steps;
  const int left = static_cast<int>(p.length) - begin;
  const int tiles = ceil_div(min(plan.steps, left), kTile);
  // The last two dz of a strip need dc of two steps more, and so a tile more of everything.
  const int last = left <= plan.steps ? tiles - 1 : tiles;

  // What the gate of the next tile takes: the thread's rows of z_post and dy of the tile, and of
  // z_pre and z_value of the tile before. Of the two rows before each a thread copies one unit of
  // one third.
  const auto* const x = static_cast<const BF16*>(p.x) + b * p.x_stride_b + at.channel;
  const int next = begin + (last + 1) * kTile;
  const int before_third = rows.row / kBefore, before_row = rows.row % kBefore;
  const BF16* z = rows.at_step(x, p.x_stride_l, next + rows.row);
  const BF16* z_before = rows.at_step(
      x, p.x_stride_l, (before_third == kPost ? next : next - kTile) - kBefore + before_row);
  if (before_third < 3) z_before += before_third * p.width;
  const BF16* dy = rows.at_step(static_cast<const BF16*>(p.dy) + b * p.dy_stride_b + at.channel,
                                p.dy_stride_l, next + rows.row);
  const int64_t tile_stride = kTile * p.x_stride_l, dx_stride = 3 * p.width;
  const auto load = [&](int n) {
    const int first = begin + n * kTile, slot = (n - 1) & 1;
    rows.load(shared.post, z, p.x_stride_l, first);
    rows.load(shared.dy, dy, p.dy_stride_l, first);
    z -= tile_stride;
    dy -= kTile * p.dy_stride_l;
    rows.load(shared.pre[slot], z + p.width, p.x_stride_l, first - kTile);
    rows.load(shared.value[slot], z + 2 * p.width, p.x_stride_l, first - kTile);
    if (before_third < 3) {
      rows.load_before(before_third == kPost  ? shared.post
                       : before_third == kPre ? shared.pre[slot]
                                              : shared.value[slot],
                       z_before, before_third == kPost ? first : first - kTile, before_row);
    }
    z_before -= tile_stride;
    copies_commit();
  };
  wait_for_earlier_kernels();
  load(last + 1);

  Lane<kSlices> lane(at, shared);
  for (int i = at.thread; i < 9 * Place::kChannels; i += Place::kThreads) {
    const int channel = i % Place::kChannels, third = i / Place::kChannels / 3;
    const int tap = i / Place::kChannels % 3;
    const int64_t d = at.channel + channel < p.width ? at.channel + channel : 0;
    shared.featurizer[3 * third + tap][channel / 2].at[channel % 2] =
        load_parameter<BF16>(p.featurizer, p.featurizer_is_T, (third * p.width + d) * 3 + tap);
  }
  for (int i = at.thread; i < 2 * 3 * Place::kChannels; i += Place::kThreads) {
    (&shared.edge[0][0][0][0])[i] = {};
  }
  Two skip = {};
  if (p.skip != nullptr) {
#pragma unroll
    for (int j = 0; j < 2; ++j) skip.at[j] = load_parameter<BF16>(p.skip, p.skip_is_T, at.d + j);
  }
  auto* const taps =
      reinterpret_cast<uint32_t*>(shared_bytes + sizeof shared) + at.team_slot() * kPairs;
  int channels[kTeamChannels];
#pragma unroll
  for (int i = 0; i < kTeamChannels; ++i) channels[i] = at.team_channel(p, i);
  fill_taps(taps, p, plan.group_width, kPairs, at.lane, channels);

  BF16* dx = rows.at_step(static_cast<BF16*>(p.dx) + b * p.length * dx_stride + at.channel,
                          dx_stride, begin + (tiles - 1) * kTile + rows.row);
  LaneSums sums = {};
  float d_taps[kTeamChannels][4] = {};
  uint4(*const u)[kUnits] = shared.u + at.team_slot();
  uint4(*const dq)[kUnits] = shared.dq + at.team_slot();
  for (int n = last + 1; n >= 0; --n) {
    const int parity = n & 1, own = parity * kFirChannelBlocks;
    const bool full = n <= last, owned = n < tiles;
    copies_wait<0>();
    __syncthreads();  // the rows are there
    lane.gate_u(shared.pre[parity ^ 1], shared.value[parity ^ 1], own ^ kFirChannelBlocks);
    lane.gate_dq(own);
    slice_barrier<kFirChannelTeams>(at.slice);
    if (full) {
      if (owned) add_taps(d_taps, u, dq, own, at);
      Products products;
      filter<kLags>(products, u, dq, own, at, taps + TapPairs::word(0, at));
      __syncwarp();
      store_sums(u, products.q, own, at);
      store_sums(dq, products.du, own ^ kFirChannelBlocks, at);
    }
    slice_barrier<kFirChannelTeams>(at.slice);
    if (full) {
      uint32_t dz[3][kSegment];
      lane.finish(shared.pre[parity], shared.value[parity], own, parity, owned, skip, sums, dz);
      slice_barrier<kFirChannelTeams>(at.slice);  // z has been read
      lane.store_dz(shared.post, dz[kPost]);
      lane.store_dz(shared.pre[parity], dz[kPre]);
      lane.store_dz(shared.value[parity], dz[kValue]);
    }
    __syncthreads();  // dz is there, and dy has been read
    if (owned) {
      const int first = begin + n * kTile;
      rows.store(shared.post, dx, dx_stride, first);
      rows.store(shared.pre[parity], dx + p.width, dx_stride, first);
      rows.store(shared.value[parity], dx + 2 * p.width, dx_stride, first);
      dx -= kTile * dx_stride;
    }
    if (n > 0) load(n - 1);
  }

  const int64_t partial = int64_t{b} * plan.strips + static_cast<int>(blockIdx.y);
  float* const d_skip = static_cast<float*>(p.taps_partial) + partial * p.width * (1 + p.num_taps);
  lane.store_sums_of_lanes(
      p, sums, static_cast<float*>(p.featurizer_partial) + partial * 9 * p.width, d_skip);
  if (!at.active) return;
#pragma unroll
  for (int i = 0; i < kTeamChannels; ++i) {
    float* const d_h = d_skip + p.width + channels[i] * p.num_taps;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int tap = 16 * (at.column + k % 2) + at.row + k / 2 * 8;
      if (tap < p.num_taps) d_h[tap] = d_taps[i][k];
    }
  }
}

template <int kSlices, int kLags>
Status run(const FirBwdParams& p, const FirChannelBwd& plan, cudaStream_t stream) {
  static_assert(sizeof(Shared<kSlices>) +
                    4 * kFirChannelSlice * kSlices * ChannelSizes<kLags>::kPairs ==
                fir_channel_bwd_shared(kSlices, kLags));
  const auto kernel = fir_channel_bwd_kernel<kSlices, kLags>;
  const Status allowed = allow_shared_memory(kernel, static_cast<size_t>(plan.shared_bytes));
  if (!allowed.ok()) return allowed;
  launch_early(kernel, dim3(plan.columns, plan.strips, p.batch), ChannelPlace<kSlices>::kThreads,
               static_cast<size_t>(plan.shared_bytes), stream, p, plan);
  const Status status = launch_status(plan.name);
  if (!status.ok()) return status;
  return fir_tensor_sum(p, static_cast<int>(p.batch) * plan.strips, 1, plan.name, stream);
}

}  // namespace

Status fir_channel_bwd(const FirBwdParams& p, const FirChannelBwd& plan, cudaStream_t stream) {
  return fir_with_bwd_lags(plan.lags, [&]<int kLags>() {
    return plan.slices == 4 ? run<4, kLags>(p, plan, stream) : run<2, kLags>(p, plan, stream);
  });
}

}  // namespace sarissa::kernels
