// Backward of hyena_modal on tensor cores, bfloat16; README.md has the mathematics.
//
// A team of 8 warps owns 16 neighbouring channels and marches through time from right to left in
// tiles of 256 steps. Only the adjoint of the states is carried from tile to tile; the states enter
// each tile from what the forward saved. A tile takes three phases:
//
//   gates      A lane has two channels and 8 steps. u and dq, rounded to bfloat16, go to shared
//              memory channel by channel; dq reversed in time inside every block of 16 steps.
//   filter     A warp has two channels. With the 16 blocks as columns, u and reversed dq are two
//              sides of the same products: E = sum over p of lambda^(15-p) x[p] is what a block
//              adds to the states or their adjoints, F the same weighted by 7.5 - p, and
//              q or du = (the filter's first 16 taps) * x + lambda^(15-p) (what enters the block).
//              Thanks to the reversal the adjoint of the filter is the filter; the result of u is q
//              reversed, that of reversed dq is du. Scans over the blocks, four in each lane of a
//              quad, make the states C and adjoints H that enter the blocks.
//   gradients  Lanes as in `gates`: gradients of the featurizer's output, of z and of the taps.
//
// Gradients of poles and residues need no second pass. With a = lambda^16, over all blocks,
//   S = sum C E_dq     A = sum C residue lambda F_dq + H (F_u + 16 a C)
// and with the sums dh_d of dq[t] u[t-d] inside blocks,
//   dresidue  = lambda S + sum_d lambda^d dh_d
//   dlog_pole = A + 16 residue lambda S + residue sum_d d lambda^d dh_d
// This used sum H E_u = sum C residue lambda E_dq, which lacks the states at the two ends times
// their gradients; those are added 7.5 times, the weight that F lacks.
//
// A team may march through several batch entries one after the other: its tables are made, and its
// sums leave, once for all of them.
//
// Few channels do not fill a GPU: then time is cut in chunks. A first pass
// (modal_tensor_bwd_arriving.cuh) makes the adjoint that each chunk sends to its left, from zero; a
// chunk composes what arrives from those to its right. The last two rows of dz of a chunk want
// gradients of the featurizer's output from the next: both leave theirs at the seam, and the kernel
// that sums the parts makes these rows.
#include "sarissa/kernels/modal/modal_tensor_bwd.cuh"
#include "sarissa/kernels/modal/modal_tensor_bwd_arriving.cuh"

namespace sarissa::kernels {
namespace modal_bwd {
namespace {

/// Teams of a CTA, where shared memory allows. They share nothing but the rows of memory that they
/// read and write, which are twice as long for the two.
constexpr int kTeams = kModalTensorChannels / kChannels;
/// Tiles between meetings of the teams. One is kept half a tile behind the other, so that phases of
/// arithmetic and of products overlap; and not much more, so that their rows meet in the cache.
constexpr int kMeetTiles = 2;

/// The buffers beside the operator's own.
struct Buffers {
  float* arriving;  // modal_tensor_bwd_arriving.cuh
  /// [B, chunks - 1, 4, 3D]: gradients of the featurizer's output at the last two steps of a chunk
  /// and the first two of the next.
  float* seams;
  // Partial sums, per part of the problem (batch entries of a team, and chunk) and channel.
  float *dlog_poles, *dresidues;  // [parts, D, N]
  Parameters dskip;               // [parts, D]
  Parameters dfeaturizer;         // [parts, 3D, 3]
};

/// Barrier of a team; with `all`, of the kTeams teams of the CTA.
__device__ inline void meet(int team, bool all) {
  const int threads = (all ? kTeams : 1) * kTeamThreads;
  asm volatile("bar.sync %0, %1;" ::"r"(all ? 0 : team + 1), "r"(threads) : "memory");
}

/// kEnds: gradients of the last states are given.
template <bool kEnds>
struct BackwardMarch {
  const ModalBwdParams& p;
  const ModalTensorBwd& plan;
  const Buffers& buffers;
  TeamShared& shared;
  const int team, thread, warp, lane;
  int batch;  // the entry that it marches through
  const int channel0, chunk;
  float lags[2][6] = {};       // per channel: sums over blocks of dq u
  float state_sum[2][2] = {};  // per channel, modes r and r + 8: S
  float pole_sum[2][2] = {};   // A
  float adjoint[2][2] = {};    // lambda p of the step right of the tile, in lanes 3 of the quads
  float d_taps[3][3][2] = {};  // [third][tap]

  __device__ BackwardMarch(const ModalBwdParams& p, const ModalTensorBwd& plan,
                           const Buffers& buffers, TeamShared* teams)
      : p(p),
        plan(plan),
        buffers(buffers),
        shared(teams[threadIdx.x / kTeamThreads]),
        team(threadIdx.x / kTeamThreads),
        thread(threadIdx.x % kTeamThreads),
        warp(thread / 32),
        lane(thread % 32),
        batch(blockIdx.y * plan.entries),
        channel0((blockIdx.x * (blockDim.x / kTeamThreads) + team) * kChannels),
        chunk(blockIdx.z) {}

  __device__ void barrier() const { meet(team, false); }
  __device__ bool is_last(int tile) const { return tile == plan.tiles - 1; }

  /// Starts to copy the rows of a tile of a batch entry, zeros beyond the sequence, the two rows of
  /// z before it, and the states that enter it.
  __device__ void load(int batch, int tile, Stage& stage) const {
    const ModalInputs& in = p.in;
    const unsigned thread = again_thread(), row = thread / 2, part = thread % 2;
    const int64_t t0 = int64_t{tile} * kTile, column = channel0 + 8 * part;
    // Where the tile's rows begin is the same for all lanes; a lane's offset from there has 32
    // bits.
    const auto lane_row = [&](const void* tensor, int64_t batch_stride, int64_t time_stride) {
      const char* at = static_cast<const char*>(tensor) +
                       2 * (batch * batch_stride + t0 * time_stride + channel0) +
                       (row * static_cast<unsigned>(2 * time_stride) + 16 * part);
      opaque(at);
      return at;
    };
    const char* const z = lane_row(in.u, in.u_batch_stride, in.u_time_stride);
    const char* const dy = lane_row(p.dy, p.dy_batch_stride, p.dy_time_stride);
    unsigned char* const to = stage.rows[0].bytes + Rows::offset(row) + 16 * part;
    const int left = static_cast<int>(in.length) - tile * kTile - static_cast<int>(row);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      constexpr int kHalf = kTile / 2, kHalfBytes = kHalf / kSegment * Rows::kSegmentBytes;
      const bool good = left > half * kHalf;
#pragma unroll
      for (int third = 0; third < 3; ++third) {
        copy_async_line(to + third * sizeof(Rows) + half * kHalfBytes,
                        z + 2 * (third * in.width + half * kHalf * in.u_time_stride), good);
      }
      copy_async_line(to + kDy * sizeof(Rows) + half * kHalfBytes,
                      dy + 2 * (half * kHalf * p.dy_time_stride), good);
    }
    if (thread < 12) {
      const int third = thread / 4, before = static_cast<int>(thread / 2 % 2) - 2;
      const bool inside = tile > 0;
      const Bf16* const from = inside ? static_cast<const Bf16*>(in.u) + batch * in.u_batch_stride +
                                            (t0 + before) * in.u_time_stride
                                      : static_cast<const Bf16*>(in.featurizer_state) +
                                            (int64_t{batch} * 2 + before + 2) * 3 * in.width;
      const bool good = inside || in.featurizer_state != nullptr;
      copy_async<16>(stage.rows[third].bytes + Rows::offset(before) + 16 * part,
                     good ? from + third * in.width + column : in.u, good);
    } else if (thread >= 64 && thread < 64 + kChannels * kModes / 4) {
      const int64_t entries = ceil_div<int64_t>(in.length, kModalSavedSteps);
      uint32_t entry = tile * (kTile / kModalSavedSteps);
      opaque(entry);  // nothing to keep from tile to tile
      const int i = 4 * (thread - 64);
      copy_async<16>(&stage.states[0][0] + i,
                     static_cast<const float*>(p.saved) +
                         ((batch * entries + entry) * in.width + channel0) * kModes + i,
                     true);
    }
    copies_commit();
  }

  /// Asks L2 for what comes first, the poles and the last tile, while the kernel before ends.
  __device__ void ask() const {
    const ModalInputs& in = p.in;
    const int n = thread % kModes;
    if (n < in.modes) {
      const int64_t at = ModalMode::at(in, channel0 + thread / kModes, n);
      prefetch(static_cast<const float*>(in.log_poles) + at);
      prefetch(static_cast<const float*>(in.residues) + at);
    }
    const int64_t t = int64_t{plan.tiles - 1} * kTile + thread;
    if (t >= in.length) return;
    const Bf16* const z = static_cast<const Bf16*>(in.u) + batch * in.u_batch_stride +
                          t * in.u_time_stride + channel0;
    for (int third = 0; third < 3; ++third) prefetch(z + third * in.width);
    prefetch(static_cast<const Bf16*>(p.dy) + batch * p.dy_batch_stride + t * p.dy_time_stride +
             channel0);
  }

  /// Starts to copy the first tile, number `tile`, and fills the tables in shared memory. Ends with
  /// a barrier.
  __device__ void start(int tile) const {
    const ModalInputs& in = p.in;
    const int channel = thread / kModes, n = thread % kModes;
    // All reads of global memory before the first use, and before the copies, behind which they
    // would wait.
    const ModalMode mode(in, channel0 + channel, n);
    const ParameterVector<Bf16, 1> skip(in.skip, in.skip_is_T, channel0 + channel,
                                        n == 0 && in.skip != nullptr);
    const bool has_tap = thread < 9 * kChannels;
    const int third = thread / (3 * kChannels), k = thread / kChannels % 3, c = thread % kChannels;
    const ParameterVector<Bf16, 1> tap(in.featurizer, in.featurizer_is_T,
                                       (third * in.width + channel0 + c) * 3 + k, has_tap);
    load(batch, tile, shared.stages[0]);
    if (thread < 6 * kChannels) {
      const int third = thread / (2 * kChannels), i = thread / kChannels % 2;
      shared.edges[0][third][i][thread % kChannels] = 0.0f;
    }
    if (has_tap) shared.taps[third][k][c] = tap[0];

    float powers[kBlock];
#pragma unroll
    for (int i = 0; i < kBlock; ++i) powers[i] = modal_power(mode.log_pole, i);
    shared.constants[channel][kScale][n] = mode.residue * powers[1];
#pragma unroll
    for (int i = 0; i < kBlock; i += 2) {
      const SplitPair s = split_pair(powers[15 - i], powers[14 - i]);
      unsigned char* const to = &shared.powers[channel][0][i / 8 * 256 + n * 16 + i % 8 * 2];
      *reinterpret_cast<uint32_t*>(to) = s.high;
      *reinterpret_cast<uint32_t*>(to + 512) = s.low;
    }
    // The filter's tap n.
#pragma unroll
    for (int i = 0; i < kBlock; ++i) powers[i] *= mode.residue;
    static_assert(kModes == kBlock);
    reduce_scatter<kModes, kBlock>(powers, lane);
    shared.first_taps[channel][n] = pack_pair(skip[0] + powers[0], 0.0f);
    // The decay of a tile is that of its scan, with its roundings, and the rest by itself: else a
    // pole close to 1 would carry those roundings from tile to tile.
    static_assert(kTile == kBlock * kBlock);
    double exact = mode.exact_power(kBlock);
    const auto decay = static_cast<float>(exact);
#pragma unroll
    for (int power = 1; power < kBlock; power *= 2) exact *= exact;
    shared.constants[channel][kDecay][n] = decay;
    shared.constants[channel][kRest][n] = static_cast<float>(exact - scanned_decay(decay));
    barrier();
  }

  /// Calls f(i, c) for the lane's steps i with the featurizer's output.
  template <class F>
  __device__ void featurize(const Stage& stage, const Part& part, int third, const F& f) const {
    const Taps taps(shared, third, part.pair);
    const unsigned char* const row = stage.rows[third].bytes + part.row_at;
    float2 z1 = pair_at(row + Rows::kOneBefore), z2 = pair_at(row + Rows::kTwoBefore);
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      const float2 z0 = pair_at(row + i * Rows::kRow);
      f(i, taps.apply(z0, z1, z2));
      z2 = z1;
      z1 = z0;
    }
  }

  __device__ void gates(const Stage& stage) {
    const Part part;
    float2 x[kSegment];
    featurize(stage, part, kPre, [&](int i, float2 c) { x[i] = c; });
    featurize(stage, part, kValue, [&](int i, float2 c) { x[i] = {x[i].x * c.x, x[i].y * c.y}; });
    unsigned char* const to_u = shared.steps[kU][2 * part.pair].bytes + part.unit_at;
    *reinterpret_cast<uint4*>(to_u) = {pack_pair(x[0].x, x[1].x), pack_pair(x[2].x, x[3].x),
                                       pack_pair(x[4].x, x[5].x), pack_pair(x[6].x, x[7].x)};
    *reinterpret_cast<uint4*>(to_u + sizeof(Steps)) = {
        pack_pair(x[0].y, x[1].y), pack_pair(x[2].y, x[3].y), pack_pair(x[4].y, x[5].y),
        pack_pair(x[6].y, x[7].y)};
    const unsigned char* const dy = stage.rows[kDy].bytes + part.row_at;
    featurize(stage, part, kPost, [&](int i, float2 c) {
      const float2 d = pair_at(dy + i * Rows::kRow);
      x[i] = {d.x * c.x, d.y * c.y};
    });
    // Reversed: the other half of the block, its last step first.
    unsigned char* const to =
        shared.steps[kDq][2 * part.pair].bytes + (part.unit_at ^ Steps::kUnit);
    *reinterpret_cast<uint4*>(to) = {pack_pair(x[7].x, x[6].x), pack_pair(x[5].x, x[4].x),
                                     pack_pair(x[3].x, x[2].x), pack_pair(x[1].x, x[0].x)};
    *reinterpret_cast<uint4*>(to + sizeof(Steps)) = {
        pack_pair(x[7].y, x[6].y), pack_pair(x[5].y, x[4].y), pack_pair(x[3].y, x[2].y),
        pack_pair(x[1].y, x[0].y)};
  }

  /// Where the sequence ends in its last tile: after `steps` steps of block `block`, which may be
  /// the one right of the tile.
  struct End {
    int block, steps;
    __device__ End(int64_t length, int tile)
        : block(static_cast<int>(length - int64_t{tile} * kTile) / kBlock),
          steps(static_cast<int>(length % kBlock)) {}
  };
  /// The gradient of the last state of a mode.
  __device__ float d_last_state(int channel, int n) const {
    const int64_t at = batch * p.in.width + channel0 + channel;
    return p.dstate_out != nullptr && n < p.in.modes
               ? static_cast<const float*>(p.dstate_out)[at * p.in.modes + n]
               : 0.0f;
  }
  /// Lets it enter the scan of the adjoint of the last tile: at the right edge, or with what the
  /// block adds in which the sequence ends.
  __device__ void enter_last_state(int tile, int channel, int n, float (&sums)[4],
                                   float& entering) const {
    const End end(p.in.length, tile);
    const float d = d_last_state(channel, n);
    if (end.block == kTile / kBlock) {
      entering = d;
      return;
    }
    const float decayed =
        d * modal_power(ModalMode(p.in, channel0 + channel, n).log_pole, end.steps);
#pragma unroll
    for (int k = 0; k < 4; ++k) sums[k] += 4 * (lane % 4) + k == end.block ? decayed : 0.0f;
  }
  /// What A lacks then: the derivative of the last state inside its block, and 7.5 for sum H E_u.
  /// `states` enter the lane's blocks, `past` leaves them.
  __device__ float last_state_pole_sum(int tile, int channel, int n, const float (&states)[4],
                                       float past) const {
    const End end(p.in.length, tile);
    const float d = d_last_state(channel, n);
    const int quad = lane % 4;
    if (end.block == kTile / kBlock) return quad == 3 ? 7.5f * d * past : 0.0f;
    if (quad != end.block / 4) return 0.0f;
    const float log_pole = ModalMode(p.in, channel0 + channel, n).log_pole;
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < 4; ++k) sum += k == end.block % 4 ? states[k] : 0.0f;
    sum *= (7.5f + static_cast<float>(end.steps)) * modal_power(log_pole, end.steps);
    const unsigned char* const u = shared.steps[kU][channel].bytes;
#pragma unroll 1
    for (int i = 0; i < end.steps - 1; ++i) {
      const int later = end.steps - 1 - i;
      const auto* const at =
          reinterpret_cast<const Bf16*>(u + Steps::offset(2 * end.block + i / 8) + 2 * (i % 8));
      sum += static_cast<float>(later) * modal_power(log_pole, later) * kernels::load(at);
    }
    return d * sum;
  }
  /// What it adds to du at step i of the block in which the sequence ends.
  __device__ float last_state_du(int channel, int i, int steps) const {
    float sum = 0.0f;
#pragma unroll 1
    for (int n = 0; n < kModes && i < steps; ++n) {
      const float log_pole = ModalMode(p.in, channel0 + channel, n).log_pole;
      sum += modal_power(log_pole, steps - 1 - i) * d_last_state(channel, n);
    }
    return sum;
  }

  /// The filter and its adjoint for channel 2 warp + q of the team.
  __device__ void filter(const Stage& stage, const Pointers& at, int tile, int q) {
    constexpr float kZero[4] = {};
    const unsigned thread = again_thread(), lane = thread % 32;
    const int channel = 2 * (thread / 32) + q, r = lane / 4, quad = lane % 4;
    unsigned char* const column = shared.steps[0][channel].bytes;
    uint32_t dq[4], u[4];
    // No lags: rows and columns from 8 on.
    float second[4] = {lags[q][4], lags[q][5], 0.0f, 0.0f};
    load_matrices_transposed(dq, column + at.lags_dq);
    load_matrices_transposed(u, column + at.lags_u);
    mma(lags[q], dq, u[0], u[1], lags[q]);
    mma(second, dq, u[2], u[3], second);
    lags[q][4] = second[0];
    lags[q][5] = second[1];
    uint32_t x[2][4];  // of each half of the columns: u, u, reversed dq, reversed dq
    load_matrices(x[0], column + at.steps);
    load_matrices(x[1], column + (at.steps ^ Pointers::kOtherBlocks));
    uint32_t high[4], low[4];
    load_matrices(low, shared.powers[channel][1] + 16 * lane);
    load_matrices(high, shared.powers[channel][0] + 16 * lane);

    // Tiles [mode, block]: of mode r + 8 m and block 4 quad + k, element 2 m + k % 2 of tile k / 2.
    float tiles[2][4];
    const auto make_sums = [&](int side) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        mma(tiles[j], low, x[j][2 * side], x[j][2 * side + 1], kZero);
        mma(tiles[j], high, x[j][2 * side], x[j][2 * side + 1], tiles[j]);
      }
    };
    const float* const constants = &shared.constants[channel][0][r];
    const auto constant = [&](Constant which, int m) { return constants[which * kModes + 8 * m]; };
    float states[2][4], adjoints[2][4];
    make_sums(kU);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const float sums[4] = {tiles[0][2 * m], tiles[0][2 * m + 1], tiles[1][2 * m],
                             tiles[1][2 * m + 1]};
      const float entering = stage.states[channel][r + 8 * m];
      [[maybe_unused]] const float past =
          scan_right(constant(kDecay, m), sums, entering, states[m]);
      if (kEnds && is_last(tile)) {
        pole_sum[q][m] += last_state_pole_sum(tile, channel, r + 8 * m, states[m], past);
      }
    }
    make_sums(kDq);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const float scale = constant(kScale, m);
      float sums[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float e = tiles[k / 2][2 * m + k % 2];
        state_sum[q][m] = fmaf(states[m][k], e, state_sum[q][m]);
        sums[k] = scale * e;
      }
      if (kEnds && is_last(tile)) {
        enter_last_state(tile, channel, r + 8 * m, sums, adjoint[q][m]);
      }
      scan_left(constant(kDecay, m), constant(kRest, m), sums, adjoint[q][m], adjoints[m]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // the table of F in place of that of E
      const float weight = 7.5f - static_cast<float>(2 * quad + i / 2 * 8);
      const uint32_t weights = pack_pair(weight, weight - 1.0f);
      high[i] = fma_pairs(weights, high[i], fma_pairs(weights, low[i], 0));
    }
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int j = 0; j < 2; ++j) mma(tiles[j], high, x[j][2 * side], x[j][2 * side + 1], kZero);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const float decay_16 = 16.0f * constant(kDecay, m), scale = constant(kScale, m);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float f = tiles[k / 2][2 * m + k % 2];
          if (side == kU) {
            const float slope = fmaf(decay_16, states[m][k], f);
            pole_sum[q][m] = fmaf(adjoints[m][k], slope, pole_sum[q][m]);
            states[m][k] *= scale;
          } else {
            pole_sum[q][m] = fmaf(states[m][k], f, pole_sum[q][m]);
          }
        }
      }
    }

    load_matrices_transposed(high, shared.powers[channel][0] + at.powers);
    // An element of the filter's fragments has two taps, from tap `last` or last - 8 on.
    const int last = 15 - r - 2 * quad;
    const uint32_t* const h = shared.first_taps[channel];
    const uint32_t near = h[last] | h[last - 1] << 16;
    const uint32_t far = (last >= 8 ? h[last - 8] : 0) | (last >= 9 ? h[last - 9] : 0) << 16;
    uint32_t results[2][4];  // as x
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const float(&entering)[2][4] = side == kU ? states : adjoints;
      float y[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        mma(y[j], near, far, far, 0, x[j][2 * side], x[j][2 * side + 1], kZero);
        const uint32_t e0 = transpose_matrix(pack_pair(entering[0][2 * j], entering[0][2 * j + 1]));
        const uint32_t e1 = transpose_matrix(pack_pair(entering[1][2 * j], entering[1][2 * j + 1]));
        mma(y[j], high, e0, e1, y[j]);
        if (kEnds && side == kDq && is_last(tile)) {
          const End end(p.in.length, tile);
          const int k = end.block % 4;
          if (end.block / 4 == quad && k / 2 == j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (i % 2 == k % 2) y[j][i] += last_state_du(channel, r + i / 2 * 8, end.steps);
            }
          }
        }
        results[j][2 * side] = pack_pair(y[j][0], y[j][1]);
        results[j][2 * side + 1] = pack_pair(y[j][2], y[j][3]);
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      store_matrices_transposed(column + (at.steps ^ j * Pointers::kOtherBlocks), results[j][0],
                                results[j][1], results[j][2], results[j][3]);
    }
  }
  /// The gradients of the states before the first step, and what A lacks of them: 7.5 for
  /// sum H E_u. Another batch entry may follow.
  __device__ void finish_adjoint(const Stage& stage) {
    const int lane = again_thread() % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int q = i / 2, m = i % 2, channel = 2 * warp + q, n = lane / 4 + 8 * m;
      if (lane % 4 == 3) {
        const int64_t at = batch * p.in.width + channel0 + channel;
        if (n < p.in.modes) static_cast<float*>(p.dstate)[at * p.in.modes + n] = adjoint[q][m];
        pole_sum[q][m] = fmaf(-7.5f * adjoint[q][m], stage.states[channel][n], pole_sum[q][m]);
      }
      adjoint[q][m] = 0.0f;
    }
  }

  __device__ void add_taps(int third, float2 dc, float2 z0, float2 z1, float2 z2) {
    const float2 z[3] = {z0, z1, z2};
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      d_taps[third][k][0] = fmaf(dc.x, z[k].x, d_taps[third][k][0]);
      d_taps[third][k][1] = fmaf(dc.y, z[k].y, d_taps[third][k][1]);
    }
  }

  /// `parity` says which edges are those of the tile before.
  __device__ void gradients(const Stage& stage, int tile, int parity) {
    const ModalInputs& in = p.in;
    const Part part;
    const int64_t width = in.width, t0 = int64_t{tile} * kTile;
    // Of the lane's steps, how many are in the sequence; more than 8 stand for all.
    const int steps = static_cast<int>(in.length) - tile * kTile - part.segment * kSegment;
    Bf16* const last_dz = static_cast<Bf16*>(p.du) + (batch * in.length + t0) * 3 * width +
                          channel0 + (part.segment * kSegment + kSegment - 1) * 3 * width +
                          2 * part.pair;
    const auto store = [&](Bf16* to, int third, int i, float2 dz) {
      if (kEnds && p.dfeaturizer_state_out != nullptr && (i == steps - 2 || i == steps - 1)) {
        const int64_t row = (batch * 2 + i - (steps - 2)) * 3 + third;
        const float2 d = pair_at(static_cast<const Bf16*>(p.dfeaturizer_state_out) + row * width +
                                 channel0 + 2 * part.pair);
        dz = {dz.x + d.x, dz.y + d.y};
      }
      store_word(to, pack_pair(dz.x, dz.y), i < steps);
    };
    // The segment to the right gives the gradients of two more steps. Right of the tile lie those
    // that the tile before left behind.
    const bool rightmost = part.segment == kSegments - 1;
    const int next_rows = rightmost ? 0 : Rows::kSegmentBytes;
    const int next_unit = rightmost ? part.unit_at : Steps::offset(part.segment + 1);
    const float(&right)[3][2][kChannels] = shared.edges[parity];
    float(&left)[3][2][kChannels] = shared.edges[parity ^ 1];
    const auto at_edge = [&](int third, int i, float2 own) {
      const float2 edge = *reinterpret_cast<const float2*>(&right[third][i][2 * part.pair]);
      return rightmost ? edge : own;
    };
    const auto leave = [&](int third, const FeaturizerAdjoint& adjoint) {
      if (part.segment > 0) return;
      *reinterpret_cast<float2*>(&left[third][0][2 * part.pair]) = adjoint.dc1;
      *reinterpret_cast<float2*>(&left[third][1][2 * part.pair]) = adjoint.dc2;
    };
    const auto leave_right = [&](int third, int i, const FeaturizerAdjoint& adjoint) {
      if (i != kSegment - 2 || !rightmost || tile + 1 != (chunk + 1) * plan.chunk_tiles) return;
      *reinterpret_cast<float2*>(&shared.right[third][0][2 * part.pair]) = adjoint.dc1;
      *reinterpret_cast<float2*>(&shared.right[third][1][2 * part.pair]) = adjoint.dc2;
    };
    const auto row = [&](int stream, int i) {
      const int at = i == -2        ? Rows::kTwoBefore
                     : i == -1      ? Rows::kOneBefore
                     : i < kSegment ? i * Rows::kRow
                                    : next_rows + (i - kSegment) * Rows::kRow;
      return pair_at(stage.rows[stream].bytes + part.row_at + at);
    };
    {
      // q is reversed.
      const unsigned char* const steps_q = shared.steps[kU][2 * part.pair].bytes;
      uint32_t q[2][4], next[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const unsigned char* const of = steps_q + c * sizeof(Steps);
        const uint4 words = *reinterpret_cast<const uint4*>(of + (part.unit_at ^ Steps::kUnit));
        q[c][0] = words.w, q[c][1] = words.z, q[c][2] = words.y, q[c][3] = words.x;
        next[c] = *reinterpret_cast<const uint32_t*>(of + (next_unit ^ Steps::kUnit) + 12);
      }
      const auto dc = [&](int i, uint32_t q0, uint32_t q1) {
        const float2 dy = row(kDy, i);
        return i % 2 == 0 ? float2{dy.x * high_of(q0), dy.y * high_of(q1)}
                          : float2{dy.x * low_of(q0), dy.y * low_of(q1)};
      };
      FeaturizerAdjoint adjoint{Taps(shared, kPost, part.pair),
                                at_edge(kPost, 0, dc(8, next[0], next[1])),
                                at_edge(kPost, 1, dc(9, next[0], next[1]))};
      float2 z0 = row(kPost, 7), z1 = row(kPost, 6);
      Bf16* to = last_dz;
#pragma unroll
      for (int i = kSegment - 1; i >= 0; --i) {
        const float2 z2 = row(kPost, i - 2), d = dc(i, q[0][i / 2], q[1][i / 2]);
        add_taps(kPost, d, z0, z1, z2);
        store(to, kPost, i, adjoint.push(d));
        leave_right(kPost, i, adjoint);
        to -= 3 * width;
        z0 = z1;
        z1 = z2;
      }
      leave(kPost, adjoint);
    }
    {
      const unsigned char* const steps_du = shared.steps[kDq][2 * part.pair].bytes;
      uint32_t du[2][5];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const unsigned char* const of = steps_du + c * sizeof(Steps);
        const uint4 words = *reinterpret_cast<const uint4*>(of + part.unit_at);
        du[c][0] = words.x, du[c][1] = words.y, du[c][2] = words.z, du[c][3] = words.w;
        du[c][4] = *reinterpret_cast<const uint32_t*>(of + next_unit);
      }
      FeaturizerAdjoint pre{Taps(shared, kPre, part.pair), {}, {}};
      FeaturizerAdjoint value{Taps(shared, kValue, part.pair), {}, {}};
      float2 pre0 = row(kPre, 9), pre1 = row(kPre, 8);
      float2 value0 = row(kValue, 9), value1 = row(kValue, 8);
      Bf16* to = last_dz + width;
#pragma unroll
      for (int i = kSegment + 1; i >= 0; --i) {
        const float2 pre2 = row(kPre, i - 2), value2 = row(kValue, i - 2);
        const float2 c_pre = pre.taps.apply(pre0, pre1, pre2);
        const float2 c_value = value.taps.apply(value0, value1, value2);
        const uint32_t du0 = du[0][i / 2], du1 = du[1][i / 2];
        const float2 d =
            i % 2 == 0 ? float2{low_of(du0), low_of(du1)} : float2{high_of(du0), high_of(du1)};
        const float2 d_pre = {d.x * c_value.x, d.y * c_value.y};
        const float2 d_value = {d.x * c_pre.x, d.y * c_pre.y};
        if (i >= kSegment) {
          pre.shift(at_edge(kPre, i - kSegment, d_pre));
          value.shift(at_edge(kValue, i - kSegment, d_value));
        } else {
          add_taps(kPre, d_pre, pre0, pre1, pre2);
          add_taps(kValue, d_value, value0, value1, value2);
          store(to, kPre, i, pre.push(d_pre));
          store(to + width, kValue, i, value.push(d_value));
          leave_right(kPre, i, pre);
          leave_right(kValue, i, value);
          to -= 3 * width;
        }
        pre0 = pre1, pre1 = pre2;
        value0 = value1, value1 = value2;
      }
      leave(kPre, pre);
      leave(kValue, value);
    }
  }

  /// The tiles of the chunk, from right to left, of one batch entry after the other.
  __device__ void run() {
    const int first = chunk * plan.chunk_tiles;
    const int end = min(first + plan.chunk_tiles, plan.tiles);
    start(end - 1);
    if (plan.chunks > 1) start_adjoint();
    const int end_batch = min(batch + plan.entries, static_cast<int>(p.in.batch));
    int stage = 0;
    for (; batch < end_batch; ++batch) {
      for (int tile = end - 1; tile >= first; --tile) {
        const bool all = plan.teams == kTeams && tile % kMeetTiles == 0;
        const Stage& now = shared.stages[stage];
        copies_wait<0>();
        meet(team, all && team == 0);
        if (tile > first) {
          load(batch, tile - 1, shared.stages[stage ^ 1]);
        } else if (batch + 1 < end_batch) {
          load(batch + 1, end - 1, shared.stages[stage ^ 1]);
        }
        gates(now);
        barrier();
        const Pointers at;
#pragma unroll
        for (int q = 0; q < 2; ++q) filter(now, at, tile, q);
        meet(team, all && team > 0);
        gradients(now, tile, stage);
        stage ^= 1;
      }
      if (chunk == 0) finish_adjoint(shared.stages[stage ^ 1]);
      barrier();
      if (chunk == 0) finish_rows(stage);
      if (chunk > 0) leave_seam(chunk - 1, 2, shared.edges[stage]);
      if (chunk < plan.chunks - 1) leave_seam(chunk, 0, shared.right);
    }
    const ModalMode mode(p.in, channel0 + 2 * warp + lane / kModes, lane % kModes);
    barrier();
    finish_filter(mode);
    finish_featurizer();
  }

  /// Waits for the first pass and composes what arrives from all chunks to the right, into lanes 3
  /// of the quads. The other lanes help: each of a quad composes one of its four.
  __device__ void start_adjoint() {
    constexpr int kAtOnce = 16;  // loads on their way
    const int own = lane % 4, channel = channel0 + 2 * warp + own / 2, n = lane / 4 + own % 2 * 8;
    const FloatPair decay(ModalMode(p.in, channel, n).exact_power(plan.chunk_tiles * kTile));
    wait_for_earlier_kernels();
    const float* const from = buffers.arriving + arriving_at(p.in, plan, batch, chunk + 1, 0) +
                              int64_t{channel} * kModes + n;
    float h = 0.0f;
    int of_chunk = 0;  // pieces of a chunk still to come
    for (int left = (plan.chunks - 1 - chunk) * plan.pieces; left > 0; left -= kAtOnce) {
      float x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        x[i] = load_vector<float, 1>(from + (left - 1 - i) * p.in.width * kModes, i < left)[0];
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (i >= left) continue;
        if (of_chunk == 0) {
          h = fmaf(decay.high, h, decay.low * h);
          of_chunk = plan.pieces;
        }
        h += x[i];
        --of_chunk;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) adjoint[i / 2][i % 2] = __shfl_sync(~0u, h, lane / 4 * 4 + i);
  }

  /// Two steps of the four around the seam between a chunk and the next: steps 0 and 1, or 2 and 3.
  __device__ void leave_seam(int of_chunk, int step, const float (&dc)[3][2][kChannels]) const {
    const unsigned thread = again_thread();
    if (thread >= 6 * kChannels) return;
    const int third = thread / (2 * kChannels), i = thread / kChannels % 2, c = thread % kChannels;
    const int64_t row = (int64_t{batch} * (plan.chunks - 1) + of_chunk) * 4 + step + i;
    buffers.seams[(row * 3 + third) * p.in.width + channel0 + c] = dc[third][i][c];
  }
  __device__ int64_t part_of_sums() const { return int64_t{blockIdx.y} * plan.chunks + chunk; }

  /// The gradients of the two rows before the sequence, from the edges left last, those of
  /// `parity`; they become zeros, for the batch entry that may follow.
  __device__ void finish_rows(int parity) {
    const ModalInputs& in = p.in;
    const unsigned thread = again_thread();
    if (thread >= 3 * kChannels) return;
    const int third = thread / kChannels, c = thread % kChannels;
    float(&dc)[2][kChannels] = shared.edges[parity][third];
    const float(&w)[3][kChannels] = shared.taps[third];
    float dz[2] = {w[2][c] * dc[0][c], fmaf(w[1][c], dc[0][c], w[2][c] * dc[1][c])};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t state_row = r - in.length;  // of the state after the last step
      const auto at = [&](int64_t row) {
        return ((int64_t{batch} * 2 + row) * 3 + third) * in.width + channel0 + c;
      };
      if (kEnds && state_row >= 0 && p.dfeaturizer_state_out != nullptr) {
        dz[r] += kernels::load(static_cast<const Bf16*>(p.dfeaturizer_state_out) + at(state_row));
      }
      kernels::store(static_cast<Bf16*>(p.dfeaturizer_state) + at(r), dz[r]);
      dc[r][c] = 0.0f;
    }
  }

  /// The sums for the taps over the lanes.
  __device__ void finish_featurizer() const {
    const ModalInputs& in = p.in;
    float(&sums)[kTeamWarps][9][kChannels] =
        *reinterpret_cast<float(*)[kTeamWarps][9][kChannels]>(&shared.stages[0]);
#pragma unroll
    for (int i = 0; i < 18; ++i) {
      float sum = d_taps[i / 6][i / 2 % 3][i % 2];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (lane % kSegmentsOfWarp == 0) {
        sums[warp][i / 2][2 * (lane / kSegmentsOfWarp) + i % 2] = sum;
      }
    }
    barrier();
    const int c = thread % kChannels;
    if (thread < 9 * kChannels) {
      const int third = thread / (3 * kChannels), k = thread / kChannels % 3;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kTeamWarps; ++w) sum += sums[w][third * 3 + k][c];
      buffers.dfeaturizer.store(((part_of_sums() * 3 + third) * in.width + channel0 + c) * 3 + k,
                                sum);
    }
  }

  /// The sums for poles, residues and skip over the lanes. Half a warp has one of its channels, and
  /// a lane of it `mode`, which is read before the sums, so that they do not wait for it.
  __device__ void finish_filter(const ModalMode& mode) const {
    static_assert(2 * kModes == 32);
    const ModalInputs& in = p.in;
    const int own = lane / kModes, n = lane % kModes;
    const int64_t at = channel0 + 2 * warp + own;
    // The lags are the sums along antidiagonals.
    using Products = float[kBlock][kBlock];
    static_assert(sizeof(Products) <= 2 * sizeof(Steps));
    const auto products = [&](int q) -> Products& {
      return *reinterpret_cast<Products*>(&shared.steps[q][2 * warp]);
    };
#pragma unroll
    for (int q = 0; q < 2; ++q) {
#pragma unroll
      for (int i = 0; i < 6; ++i) {
        products(q)[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] = lags[q][i];
      }
    }
    __syncwarp();
    float lag = 0.0f;  // number n
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const float product = products(own)[i][max(15 - n - i, 0)];
      lag += i <= 15 - n ? product : 0.0f;
    }

    // Mode n is number n / 8 of quad n % 8.
    const auto of_mode = [&](const float(&x)[2][2]) {
      float mine = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float of = x[i / 2][i % 2];
        of += __shfl_xor_sync(~0u, of, 1);
        of += __shfl_xor_sync(~0u, of, 2);
        of = __shfl_sync(~0u, of, n % 8 * 4);
        if (i == 2 * own + n / 8) mine = of;
      }
      return mine;
    };
    const float s = of_mode(state_sum), a = of_mode(pole_sum);
    const float lambda = modal_power(mode.log_pole, 1);
    float dresidue = lambda * s, inside = 0.0f;
#pragma unroll
    for (int d = 0; d < kBlock; ++d) {
      const float term = modal_power(mode.log_pole, d) * __shfl_sync(~0u, lag, own * kModes + d);
      dresidue += term;
      inside = fmaf(static_cast<float>(d), term, inside);
    }
    const float dlog_pole = a + mode.residue * fmaf(16.0f * lambda, s, inside);
    const int64_t part = part_of_sums() * in.width + at;
    if (n < in.modes) {
      buffers.dlog_poles[part * in.modes + n] = dlog_pole;
      buffers.dresidues[part * in.modes + n] = dresidue;
    }
    if (n == 0) buffers.dskip.store(part, lag);
  }
};

template <bool kEnds>
__global__ void __launch_bounds__(kTeams* kTeamThreads, 1)
    modal_tensor_bwd_kernel(ModalBwdParams p, ModalTensorBwd plan, Buffers buffers) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  BackwardMarch<kEnds> march(p, plan, buffers, reinterpret_cast<TeamShared*>(shared_bytes));
  // The first pass waited for what came before it: what it does not make can be read before it
  // ends.
  if (plan.chunks == 1) {
    march.ask();
    wait_for_earlier_kernels();
  }
  march.run();
}

constexpr int kSumThreads = 256;

__host__ __device__ inline Parameters skip_gradient(const ModalBwdParams& p) {
  return {p.dskip, p.in.skip_is_T};
}
__host__ __device__ inline Parameters featurizer_gradient(const ModalBwdParams& p) {
  return {p.dfeaturizer, p.in.featurizer_is_T};
}

/// Sums of `count` channels of each of `parts` parts, in an order that depends on sizes alone, by a
/// warp: from[((part D + first channel + c) K + k)].
__device__ inline float warp_sum(const float* from, int64_t parts, int64_t width, int64_t first,
                                 int64_t count, int64_t k_count, int64_t k) {
  float sum = 0.0f;
  for (int64_t i = threadIdx.x % 32; i < parts * count; i += 32) {
    sum += from[(i / count * width + first + i % count) * k_count + k];
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  return sum;
}

/// The same of one element, from[part stride], by one lane.
__device__ inline float lane_sum(const float* from, int64_t parts, int64_t stride) {
  float sum = 0.0f;
  for (int64_t part = 0; part < parts; ++part) sum += from[part * stride];
  return sum;
}

/// Lanes that sum the partial sums of one mode of a group: those of a filter per channel are few.
__host__ __device__ inline int sum_lanes(const ModalInputs& in) {
  return in.groups == in.width ? 1 : 32;
}

/// Sums the partial sums: sum_lanes for each mode of each group, twice, a thread for each gradient
/// of skip and featurizer. And a thread for each element of the last two rows of dz of a chunk.
__global__ void __launch_bounds__(kSumThreads)
    modal_tensor_sum_kernel(ModalBwdParams p, ModalTensorBwd plan, Buffers buffers, int64_t parts) {
  wait_for_earlier_kernels();
  const ModalInputs& in = p.in;
  const int64_t modes = in.groups * in.modes, lanes = sum_lanes(in);
  int64_t i = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (i < 2 * modes * lanes) {
    const bool poles = i < modes * lanes;
    const float* const from = poles ? buffers.dlog_poles : buffers.dresidues;
    const int64_t mode = i / lanes - (poles ? 0 : modes), count = in.width / in.groups;
    const float sum = lanes == 1 ? lane_sum(from + mode, parts, modes)
                                 : warp_sum(from, parts, in.width, mode / in.modes * count, count,
                                            in.modes, mode % in.modes);
    if (i % lanes == 0) static_cast<float*>(poles ? p.dlog_poles : p.dresidues)[mode] = sum;
    return;
  }
  i -= 2 * modes * lanes;
  if (i < 10 * in.width) {
    const bool skip = i < in.width;
    const auto* const from =
        static_cast<const float*>(skip ? buffers.dskip.data : buffers.dfeaturizer.data);
    const int64_t columns = skip ? in.width : 9 * in.width, column = skip ? i : i - in.width;
    const float sum = lane_sum(from + column, parts, columns);
    (skip ? skip_gradient(p) : featurizer_gradient(p)).store(column, sum);
    return;
  }
  i -= 10 * in.width;
  const int64_t width = 3 * in.width, seam = i / (2 * width), column = i % width;
  const int64_t r = i / width % 2, chunks = plan.chunks - 1;
  if (seam >= in.batch * chunks) return;
  const int64_t batch = seam / chunks;
  const int64_t t = (seam % chunks + 1) * plan.chunk_tiles * kTile - 2 + r;
  const float* const dc = buffers.seams + (4 * seam + r) * width + column;
  float taps[3];
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    taps[k] = modal_parameter(in.featurizer, in.featurizer_is_T, column * 3 + k);
  }
  float dz = fmaf(taps[0], dc[0], fmaf(taps[1], dc[width], taps[2] * dc[2 * width]));
  if (p.dfeaturizer_state_out != nullptr && t >= in.length - 2) {
    const int64_t row = batch * 2 + t - (in.length - 2);
    dz += kernels::load(static_cast<const Bf16*>(p.dfeaturizer_state_out) + row * width + column);
  }
  kernels::store(static_cast<Bf16*>(p.du) + (batch * in.length + t) * width + column, dz);
}

/// Whether the partial sums of the only part are the gradients.
bool is_direct(const ModalInputs& in, const ModalTensorBwd& plan) {
  return plan.parts(in) == 1 && in.groups == in.width;
}

}  // namespace
}  // namespace modal_bwd

ModalTensorBwd modal_tensor_bwd_plan(const ModalInputs& in, DType dtype) {
  return modal_tensor_bwd_plan(in, dtype, sizeof(modal_bwd::TeamShared), most_shared_memory());
}

Status modal_tensor_bwd(const ModalBwdParams& p, const ModalTensorBwd& plan, void* stream) {
  using namespace modal_bwd;
  const auto s = static_cast<cudaStream_t>(stream);
  const ModalInputs& in = p.in;
  if (!modal_tensor_rows_fit(p.dy, in.batch, p.dy_batch_stride, p.dy_time_stride)) {
    return {"rows of dy are not aligned to 16 bytes"};
  }
  const ModalTensorBwdWorkspace sizes(in, plan);
  Buffers buffers{};
  buffers.arriving = static_cast<float*>(p.workspace);
  buffers.seams = buffers.arriving + sizes.arriving;
  if (is_direct(in, plan)) {
    buffers.dlog_poles = static_cast<float*>(p.dlog_poles);
    buffers.dresidues = static_cast<float*>(p.dresidues);
    buffers.dskip = skip_gradient(p);
    buffers.dfeaturizer = featurizer_gradient(p);
  } else {
    buffers.dlog_poles = buffers.seams + sizes.seams;
    buffers.dresidues = buffers.dlog_poles + sizes.poles;
    float* const dskip = buffers.dresidues + sizes.poles;
    buffers.dskip = {dskip, false};
    buffers.dfeaturizer = {dskip + sizes.skip, false};
  }
  const size_t shared = plan.teams * sizeof(TeamShared);
  const dim3 grid(static_cast<unsigned>(in.width / (plan.teams * kChannels)),
                  static_cast<unsigned>(plan.parts(in) / plan.chunks),
                  static_cast<unsigned>(plan.chunks));
  const auto march = [&](auto* kernel) {
    const Status status = allow_shared_memory(kernel, shared);
    if (!status.ok()) return status;
    launch_early(kernel, grid, plan.teams * kTeamThreads, shared, s, p, plan, buffers);
    return launch_status(plan.name);
  };
  if (plan.chunks > 1) {
    const Status status = allow_shared_memory(modal_tensor_arriving_kernel, sizeof(ArrivingShared));
    if (!status.ok()) return status;
    const dim3 pieces(static_cast<unsigned>(in.width / kArrivingChannels), grid.y,
                      static_cast<unsigned>((plan.chunks - 1) * plan.pieces));
    launch_early(modal_tensor_arriving_kernel, pieces, kArrivingThreads, sizeof(ArrivingShared), s,
                 p, plan, buffers.arriving);
    const Status launched = launch_status(plan.name);
    if (!launched.ok()) return launched;
  }
  const bool ends = p.dstate_out != nullptr || p.dfeaturizer_state_out != nullptr;
  const Status status =
      ends ? march(modal_tensor_bwd_kernel<true>) : march(modal_tensor_bwd_kernel<false>);
  if (!status.ok() || is_direct(in, plan)) return status;
  const int64_t threads = 2 * in.groups * in.modes * sum_lanes(in) + 10 * in.width +
                          in.batch * (plan.chunks - 1) * 6 * in.width;
  const dim3 blocks(static_cast<unsigned>(ceil_div<int64_t>(threads, kSumThreads)));
  launch_early(modal_tensor_sum_kernel, blocks, kSumThreads, 0, s, p, plan, buffers,
               plan.parts(in));
  return launch_status(plan.name);
}

}  // namespace sarissa::kernels
