// Backward of hyena_fir with many taps on tensor cores, bfloat16.
//
// A warp owns 16 neighbouring channels, which share taps, and marches over a strip of time in tiles
// of 32 steps, from the strip's end to its beginning. A tile n takes three passes:
//
//   gate    u = c_pre c_value of tile n, and dq = c_post dy
//   filter  du of tile n, from dq of the tiles n .. n + kDelay, and q of tile n + kDelay, from u of
//           the same tiles: products with Toeplitz matrices of taps; from both, the taps' gradient
//   finish  dc and dz: of the pre and value thirds of tile n, of the post third of n + kDelay
//
// In gate and finish a lane has two neighbouring channels and eight steps, so both featurizers are
// plain arithmetic in single precision. u, dq, q and du, which change hands between the lanes, are
// rounded to bfloat16. The warps of a block only load rows for each other, one barrier per tile.
#include "sarissa/kernels/fir/fir_tensor_bwd.cuh"

#include "sarissa/kernels/fir/fir_tensor_tile.cuh"

namespace sarissa::kernels {
namespace {

using BF16 = __nv_bfloat16;

constexpr int kWarps = kFirTensorBwdWarps, kThreads = 32 * kWarps;

/// What a march has to do with: nothing else; states that come in or go out.
enum class Mode { kPlain, kStates };

/// A tile of z or dy in shared memory: rows of the block's channels, two to a word. The 8 words of
/// a warp are the (warp ^ segment)-th of a row: so the lanes of a warp, which read rows 8 steps
/// apart together, find them in different banks.
constexpr int kRowWords = kPairs * kWarps;
using RowTile = uint32_t[kTile * kRowWords];

/// kLags: Toeplitz matrices of 16 lags, so at most 16 (kLags - 1) + 1 taps.
template <int kLags>
struct FirTensorBwdTraits {
  static constexpr int kDelay = fir_tensor_bwd_delay(kLags);
  static constexpr int kHistory = kDelay + 1;    // tiles of u and dq
  static constexpr int kPostSlots = kDelay + 2;  // tiles of z_post and dy: also the one on its way
  static constexpr int kLateSlots = 2;           // tiles of z_pre and z_value
  struct Warp {
    BlockTile u[kHistory], dq[kHistory];
    Two featurizer[3][3][kPairs];  // [third][tap]
    Two dc_right[3][kPairs][2];    // the first two dc of the tile to the right
  };
  struct Shared {
    RowTile post[kPostSlots], dy[kPostSlots], pre[kLateSlots], value[kLateSlots];
    Warp warps[kWarps];
  };
};

/// A strip of `tiles` tiles that its block owns, and those beside it that its gradients reach.
struct FirTensorStrip {
  int b, begin, tiles;
  int last;     // the last tile with du and q: a strip's last two dz need dc of two steps more
  int last_dq;  // the last tile of dq
  int first;    // the first tile of u, where the march ends

  __device__ FirTensorStrip(const FirParams& p, const FirTensorBwd& plan, int delay)
      : b(static_cast<int>(blockIdx.z)),
        begin(static_cast<int>(blockIdx.y) * plan.steps),
        first(-delay) {
    const int left = static_cast<int>(p.length) - begin;
    tiles = ceil_div(min(plan.steps, left), kTile);
    last = left <= plan.steps ? tiles - 1 : tiles;
    last_dq = left <= plan.steps ? tiles - 1 : tiles + delay;
  }
  __device__ bool owns(int tile) const { return tile >= 0 && tile < tiles; }
  /// Whether a tile lies before step 0, where states take the place of z.
  __device__ bool before_start(int tile) const { return begin + tile * kTile < 0; }
};

/// Copies rows for all warps of the block: warp w copies stream w (z_post, dy, z_pre, z_value),
/// tile by tile back in time. z comes two steps earlier than the rest: row i of tile n is step 32 n
/// + i - 2 of the strip.
template <class Traits, Mode kMode>
struct FirTensorCopies {
  int tile;         // the next one
  int first;        // the one that is copied last
  bool late;        // z_pre or z_value
  int slot = 0;     // of the next tile
  int step;         // of the sequence, of the lane's first row there
  int length;       // of the sequence; 0: a lane without channels
  const BF16* row;  // the lane's first row
  int64_t stride;
  uint32_t* to;       // in slot 0
  const BF16* state;  // Mode::kStates: the rows of z before step 0
  int64_t state_stride;

  __device__ FirTensorCopies(const FirBwdParams& p, const FirTensorStrip& strip,
                             typename Traits::Shared& shared) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int stream = static_cast<int>(threadIdx.x) / 32;
    const int segment = lane / 8, unit = lane % 8;  // of 8 channels
    const int64_t d = int64_t{blockIdx.x} * kWarps * kFirBlockSide + 8 * unit;
    length = d < p.width ? static_cast<int>(p.length) : 0;
    late = stream >= 2;
    tile = late ? strip.last : strip.last_dq;
    first = late ? strip.first : 0;
    to = (stream == 0   ? shared.post[0]
          : stream == 1 ? shared.dy[0]
          : stream == 2 ? shared.pre[0]
                        : shared.value[0]) +
         segment * kSegment * kRowWords + (unit / 2 ^ segment) * kPairs + unit % 2 * 4;
    step = strip.begin + tile * kTile + kSegment * segment;
    state = nullptr;
    state_stride = 3 * p.width;
    if (stream == 1) {
      stride = p.dy_stride_l;
      row = static_cast<const BF16*>(p.dy) + strip.b * p.dy_stride_b + d;
    } else {
      const int third = stream == 0 ? kPost : stream - 1;
      step -= 2;
      stride = p.x_stride_l;
      row = static_cast<const BF16*>(p.x) + strip.b * p.x_stride_b + third * p.width + d;
      if (kMode == Mode::kStates && p.featurizer_state != nullptr && length > 0) {
        state = static_cast<const BF16*>(p.featurizer_state) + strip.b * 2 * state_stride +
                third * p.width + d;
      }
    }
    row += step * stride;
  }

  /// Starts the copies of the next tile, if it is `wanted` now and at all.
  __device__ void start(bool wanted) {
    if (wanted && tile >= first) {
      uint32_t* const shared = to + slot * (kTile * kRowWords);
      const BF16* from = row;
      const bool has_state = kMode == Mode::kStates && step == -2 && state != nullptr;
#pragma unroll
      for (int i = 0; i < kSegment; ++i) {
        if (has_state && i < 2) {
          auto* const elements = reinterpret_cast<BF16*>(shared + i * kRowWords);
          for (int j = 0; j < 8; ++j) elements[j] = state[i * state_stride + j];
        } else {
          copy_async<16>(shared + i * kRowWords, from, step + i >= 0 && step + i < length);
        }
        from += stride;
      }
      slot = slot == 0 ? (late ? Traits::kLateSlots : Traits::kPostSlots) - 1 : slot - 1;
      row -= kTile * stride;
      step -= kTile;
      --tile;
    }
    copies_commit();
  }
};

/// What a warp does: its registers and the passes over a tile.
template <int kLags, Mode kMode>
struct FirTensorBackward {
  using Traits = FirTensorBwdTraits<kLags>;
  static constexpr int kDelay = Traits::kDelay;

  const FirBwdParams& p;
  const FirTensorStrip& strip;
  typename Traits::Warp& shared;
  int length;  // steps beyond it are not stored; 0: none are
  int num_taps;
  int lane, segment;
  int row_word;  // gate, finish: of a row tile, where the lane's rows begin
  int d;         // gate, finish: the first of the lane's channels
  /// filter: the word of a tile that the lane points ldmatrix to, for a block as operand A of
  /// [channel, step] (transposed) or B of [step, channel], and as A of [step, channel].
  int fragment, fragment_by_step;
  uint32_t taps[2 * kLags - 1];  // Toeplitz fragments, see toeplitz()
  float skip[2];                 // of channels r and r + 8
  Two d_featurizer[3][3] = {};
  Two d_skip = {};
  float d_taps[kLags][2][4] = {};  // per lag: dq u^T, [16 steps of dq, 2 x 8 steps of u]
  /// The first two rows of z of the tile to the right (post in gate, pre, value, post in finish).
  /// Only the lanes of segment 0 hold what is asked for.
  uint32_t z_right[4][2];

  __device__ FirTensorBackward(const FirBwdParams& p, const FirTensorStrip& strip,
                               typename Traits::Warp& shared, int first_channel, bool active)
      : p(p),
        strip(strip),
        shared(shared),
        length(active ? static_cast<int>(p.length) : 0),
        num_taps(static_cast<int>(p.num_taps)) {
    lane = static_cast<int>(threadIdx.x) % 32;
    segment = lane / kPairs;
    row_word = segment * kSegment * kRowWords +
               (static_cast<int>(threadIdx.x) / 32 ^ segment) * kPairs + lane % kPairs;
    d = first_channel + lane % kPairs * 2;
    fragment = fragment_word(lane);
    fragment_by_step = fragment_by_step_word(lane);
#pragma unroll
    for (int third = 0; third < 3; ++third) {
#pragma unroll
      for (int tap = 0; tap < 3; ++tap) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          shared.featurizer[third][tap][lane % kPairs].at[j] = load_parameter<BF16>(
              p.featurizer, p.featurizer_is_T, (third * p.width + d + j) * 3 + tap);
        }
      }
    }
    const int r = lane / 4, c = lane % 4 * 2;
    const int64_t group = first_channel / (p.width / p.groups);
    const auto tap = [&](int k) {
      return k >= 0 && k < num_taps
                 ? load_parameter<BF16>(p.taps, p.taps_is_T, group * p.num_taps + k)
                 : 0.0f;
    };
#pragma unroll
    for (int i = 0; i < 2 * kLags - 1; ++i) {
      taps[i] = pack_pair(tap(8 * i + r - c), tap(8 * i + r - c - 1));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      skip[half] = p.skip == nullptr
                       ? 0.0f
                       : load_parameter<BF16>(p.skip, p.skip_is_T, first_channel + r + 8 * half);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int next = (i == 0 ? strip.last_dq : strip.last) + 1;  // the tile to the right
      const int third = i == 3 ? kPost : i;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int t = strip.begin + next * kTile + row - 2;
        z_right[i][row] = 0;
        if (t >= 0 && t < p.length) {
          z_right[i][row] = *reinterpret_cast<const uint32_t*>(
              static_cast<const BF16*>(p.x) + strip.b * p.x_stride_b + t * p.x_stride_l +
              third * p.width + d);
        }
      }
    }
    // Beyond the last strip dq is zero.
    for (auto& tile : shared.dq) {
#pragma unroll
      for (int i = 0; i < kSegment; ++i) tile[i * kLine + lane] = 0;
    }
    for (auto& third : shared.dc_right) {
      third[lane % kPairs][0] = third[lane % kPairs][1] = {};
    }
    __syncwarp();
  }

  /// Steps 8 and 9 after a lane's first: what the lane of the next segment has as its first two.
  /// For the last segment those of the tile to the right, which then become this tile's.
  template <class V>
  __device__ void from_right(V first, V second, V& right_first, V& right_second, V& out8, V& out9) {
    const int next = (lane + kPairs) % 32;
    const bool edge = segment == 0;
    out8 = __shfl_sync(~0u, edge ? right_first : first, next);
    out9 = __shfl_sync(~0u, edge ? right_second : second, next);
    right_first = first;
    right_second = second;
  }

  /// z of a lane's eight steps and of the two before them.
  __device__ void load_z(const RowTile& tile, uint32_t (&right)[2], uint32_t (&z)[kSegment + 2]) {
#pragma unroll
    for (int i = 0; i < kSegment; ++i) z[i] = tile[row_word + i * kRowWords];
    from_right(z[0], z[1], right[0], right[1], z[kSegment], z[kSegment + 1]);
  }

  __device__ void load_featurizer(int third, FeaturizerTaps& f) const {
#pragma unroll
    for (int tap = 0; tap < 3; ++tap) f[tap] = shared.featurizer[third][tap][lane % kPairs];
  }

  /// u of a tile. What z_pre and z_value lie beyond its rows is kept for finish.
  __device__ void gate_u(BlockTile& u_tile, const RowTile& pre_tile, const RowTile& value_tile,
                         Two (&u)[kSegment], uint32_t (&beyond)[2][2]) {
    uint32_t z_pre[kSegment + 2], z_value[kSegment + 2];
    load_z(pre_tile, z_right[kPre], z_pre);
    load_z(value_tile, z_right[kValue], z_value);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      beyond[0][i] = z_pre[kSegment + i];
      beyond[1][i] = z_value[kSegment + i];
    }
    FeaturizerTaps f_pre, f_value;
    load_featurizer(kPre, f_pre);
    load_featurizer(kValue, f_value);
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      const Two c_pre = featurized(f_pre, z_pre, i), c_value = featurized(f_value, z_value, i);
#pragma unroll
      for (int j = 0; j < 2; ++j) u[i].at[j] = c_pre.at[j] * c_value.at[j];
      u_tile[word_of(lane, i)] = pack_pair(u[i].at[0], u[i].at[1]);
    }
  }
  /// Before step 0 u is the state, and dq zero.
  __device__ void gate_before_start(BlockTile& u_tile, BlockTile& dq_tile, int step) {
    const int rows = static_cast<int>(p.num_taps) - 1;
    const int first = rows + step;
    const auto* from =
        static_cast<const float*>(p.state) + (int64_t{strip.b} * rows + first) * p.width + d;
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      Two u = {};
      if (p.state != nullptr && first + i >= 0) u = {from[i * p.width], from[i * p.width + 1]};
      u_tile[word_of(lane, i)] = pack_pair(u.at[0], u.at[1]);
      dq_tile[word_of(lane, i)] = 0;
    }
  }
  /// dq of a tile and, of owned steps, the gradient of skip.
  __device__ void gate_dq(BlockTile& dq_tile, const RowTile& z_tile, const RowTile& dy_tile,
                          bool owned, const Two (&u)[kSegment]) {
    uint32_t z[kSegment + 2];
    load_z(z_tile, z_right[0], z);
    FeaturizerTaps f;
    load_featurizer(kPost, f);
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      const Two c = featurized(f, z, i), dy = unpack_two(dy_tile[row_word + i * kRowWords]);
      Two dq;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        dq.at[j] = c.at[j] * dy.at[j];
        if (owned) d_skip.at[j] = fmaf(dq.at[j], u[i].at[j], d_skip.at[j]);
      }
      dq_tile[backward_word_of(lane, i)] = pack_pair(dq.at[0], dq.at[1]);
    }
  }

  /// Fragment i of the taps holds, for the lane's row r and column c, taps 8 i + r - c and one
  /// less: in the product of a block with the Toeplitz matrix of lag k, fragments 2k - 1 .. 2k + 1.
  __device__ uint32_t toeplitz(int i) const {
    return i >= 0 && i < 2 * kLags - 1 ? taps[i < 0 ? 0 : i] : 0u;
  }
  /// Adds what a block x of u (of dq) contributes to the block k later (earlier).
  __device__ void filter_block(float (&sum)[2][4], const uint32_t (&x)[4], int k) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (k == 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t pair = x[2 * half + i / 2];
          sum[half][i] = fmaf(skip[i / 2], i % 2 == 0 ? low_of(pair) : high_of(pair), sum[half][i]);
        }
      }
      mma(sum[half], x, toeplitz(2 * k + half), toeplitz(2 * k + half - 1), sum[half]);
    }
  }
  /// The tile `ahead` tiles later than the one in `slot`.
  __device__ static int ring(int slot, int ahead, int slots) {
    return slot + ahead < slots ? slot + ahead : slot + ahead - slots;
  }

  /// q of tile n + kDelay, in place of its u. Of owned steps also the taps' gradient.
  __device__ void filter_q(int slot, bool owned) {
    const int target = ring(slot, kDelay, Traits::kHistory);
    uint32_t dq[2][4];
    if (owned) {
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        load_matrices(dq[o], shared.dq[target] + fragment_by_step + o * 16);
      }
    }
    float sum[2][2][4] = {};
#pragma unroll
    for (int block = 0; block < 2 * Traits::kHistory; ++block) {
      const uint32_t* from =
          shared.u[ring(slot, block / 2, Traits::kHistory)] + fragment + block % 2 * 16;
      uint32_t x[4];
      load_matrices_transposed(x, from);
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        const int k = 2 * kDelay + o - block;
        if (k >= 0 && k < kLags) filter_block(sum[o], x, k);
      }
      if (owned) {
        load_matrices(x, from);
#pragma unroll
        for (int o = 0; o < 2; ++o) {
          const int k = 2 * kDelay + o - block;
          if (k < 0 || k >= kLags) continue;
          mma(d_taps[k][0], dq[o], x[0], x[1], d_taps[k][0]);
          mma(d_taps[k][1], dq[o], x[2], x[3], d_taps[k][1]);
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int o = 0; o < 2; ++o) store_block(shared.u[target] + fragment + o * 16, sum[o]);
  }

  /// du of tile n, in place of dq of tile n + kDelay.
  __device__ void filter_du(int slot) {
    float sum[2][2][4] = {};
#pragma unroll
    for (int block = 2 * Traits::kHistory - 1; block >= 0; --block) {
      uint32_t x[4];
      load_matrices_transposed(
          x, shared.dq[ring(slot, block / 2, Traits::kHistory)] + fragment + block % 2 * 16);
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        const int k = block - o;
        if (k >= 0 && k < kLags) filter_block(sum[o], x, k);
      }
    }
    __syncwarp();
    const int target = ring(slot, kDelay, Traits::kHistory);
#pragma unroll
    for (int o = 0; o < 2; ++o) store_block(shared.dq[target] + fragment + o * 16, sum[o]);
  }

  /// From dc of a third: dz, and the gradient of the featurizer, of owned tiles. `dx` is the row of
  /// the lane's first step, which is `step` of the sequence.
  __device__ void finish(int third, const FeaturizerTaps& f, const Two (&dc)[kSegment],
                         const uint32_t (&z)[kSegment + 2], bool owned, BF16* dx, int step) {
    Two all[kSegment + 2];
#pragma unroll
    for (int i = 0; i < kSegment; ++i) all[i] = dc[i];
    auto& right = shared.dc_right[third][lane % kPairs];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const Two beyond = right[row];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float next = __shfl_down_sync(~0u, dc[row].at[j], kPairs);
        all[kSegment + row].at[j] = segment < 3 ? next : beyond.at[j];
      }
    }
    __syncwarp();
    if (segment == 0) {
      right[0] = dc[0];
      right[1] = dc[1];
    }
    if (!owned) return;
    const int64_t N = 3 * p.width;
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      Two dz = featurized_backward(f, all, i);
      if constexpr (kMode == Mode::kStates) add_d_featurizer_state_out(third, step + i, dz.at);
      store_word(dx, pack_pair(dz.at[0], dz.at[1]), step + i < length);
      dx += N;
      add_d_featurizer(d_featurizer[third], dc[i], z, i);
    }
  }

  /// Of the post third, from q.
  __device__ void finish_post(const BlockTile& q_tile, const RowTile& z_tile,
                              const RowTile& dy_tile, bool owned, BF16* dx, int step) {
    uint32_t z[kSegment + 2];
    load_z(z_tile, z_right[3], z);
    Two dc[kSegment];
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      const Two q = unpack_two(q_tile[word_of(lane, i)]);
      const Two dy = unpack_two(dy_tile[row_word + i * kRowWords]);
#pragma unroll
      for (int j = 0; j < 2; ++j) dc[i].at[j] = q.at[j] * dy.at[j];
    }
    FeaturizerTaps f;
    load_featurizer(kPost, f);
    finish(kPost, f, dc, z, owned, dx, step);
  }
  /// du of a tile and, with states, the gradient of those that go out.
  __device__ void load_du(const BlockTile& du_tile, int step, Two (&du)[kSegment]) const {
    const int rows = static_cast<int>(p.num_taps) - 1;
    const int first = step - (static_cast<int>(p.length) - rows);  // row of the state
    const auto* state =
        static_cast<const float*>(p.d_state_out) + (int64_t{strip.b} * rows + first) * p.width + d;
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      du[i] = unpack_two(du_tile[backward_word_of(lane, i)]);
      if (kMode == Mode::kStates && p.d_state_out != nullptr && first + i >= 0 &&
          first + i < rows) {
#pragma unroll
        for (int j = 0; j < 2; ++j) du[i].at[j] += state[i * p.width + j];
      }
    }
  }
  /// Of the pre and value thirds, from du.
  __device__ void finish_late(const BlockTile& du_tile, const RowTile& pre_tile,
                              const RowTile& value_tile, const uint32_t (&beyond)[2][2], bool owned,
                              BF16* dx, int step) {
    uint32_t z_pre[kSegment + 2], z_value[kSegment + 2];
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      z_pre[i] = pre_tile[row_word + i * kRowWords];
      z_value[i] = value_tile[row_word + i * kRowWords];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      z_pre[kSegment + i] = beyond[0][i];
      z_value[kSegment + i] = beyond[1][i];
    }
    Two du[kSegment], dc[kSegment];
    load_du(du_tile, step, du);
    FeaturizerTaps f_pre, f_value;
    load_featurizer(kPre, f_pre);
    load_featurizer(kValue, f_value);
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      const Two c = featurized(f_value, z_value, i);
#pragma unroll
      for (int j = 0; j < 2; ++j) dc[i].at[j] = c.at[j] * du[i].at[j];
    }
    finish(kPre, f_pre, dc, z_pre, owned, dx + p.width, step);
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      const Two c = featurized(f_pre, z_pre, i);
#pragma unroll
      for (int j = 0; j < 2; ++j) dc[i].at[j] = c.at[j] * du[i].at[j];
    }
    finish(kValue, f_value, dc, z_value, owned, dx + 2 * p.width, step);
  }

  /// The gradient of the state: du before step 0.
  __device__ void finish_before_start(const BlockTile& du_tile, int step) {
    const int rows = static_cast<int>(p.num_taps) - 1;
    Two du[kSegment];
    load_du(du_tile, step, du);
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      const int row = rows + step + i;
      if (row < 0 || length == 0) continue;
      auto* to = static_cast<float*>(p.d_state) + (int64_t{strip.b} * rows + row) * p.width + d;
#pragma unroll
      for (int j = 0; j < 2; ++j) to[j] = du[i].at[j];
    }
  }
  /// What dz of the last two steps gets from the state that goes out.
  __device__ void add_d_featurizer_state_out(int third, int step, float (&dz)[2]) const {
    const int row = step - static_cast<int>(p.length) + 2;
    if (p.d_featurizer_state_out == nullptr || row < 0 || row >= 2) return;
    const auto* from = static_cast<const BF16*>(p.d_featurizer_state_out) +
                       ((int64_t{strip.b} * 2 + row) * 3 + third) * p.width + d;
#pragma unroll
    for (int j = 0; j < 2; ++j) dz[j] += load(from + j);
  }
  /// The gradient of the featurizer's state: dz of the two steps before the first, when the march
  /// has arrived there.
  __device__ void store_d_featurizer_state() const {
    if (segment != 0 || length == 0) return;
    for (int third = 0; third < 3; ++third) {
      const auto& dc = shared.dc_right[third][lane % kPairs];
      FeaturizerTaps f;
      load_featurizer(third, f);
      for (int row = 0; row < 2; ++row) {
        float dz[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          dz[j] = f[2].at[j] * dc[row].at[j];
          if (row == 1) dz[j] = fmaf(f[1].at[j], dc[0].at[j], dz[j]);
        }
        add_d_featurizer_state_out(third, row - 2, dz);
        auto* to = static_cast<BF16*>(p.d_featurizer_state) +
                   ((int64_t{strip.b} * 2 + row) * 3 + third) * p.width + d;
        store_word(to, pack_pair(dz[0], dz[1]), true);
      }
    }
  }

  /// Where the strip's partial gradients of skip and taps go; fir_tensor_bwd_plan.h has the layout.
  __device__ float* taps_partial(int64_t partial) const {
    return static_cast<float*>(p.taps_partial) +
           partial * (p.width + p.width / kFirBlockSide * p.num_taps);
  }
  /// Stores the strip's partial gradients of featurizer and skip.
  __device__ void store_partials(int64_t partial) const {
    auto* d_f = static_cast<float*>(p.featurizer_partial) + partial * 9 * p.width;
    float* d_h = taps_partial(partial);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int third = 0; third < 3; ++third) {
#pragma unroll
        for (int tap = 0; tap < 3; ++tap) {
          const float sum = over_segments(d_featurizer[third][tap].at[j]);
          if (segment == 0) d_f[(third * p.width + d + j) * 3 + tap] = sum;
        }
      }
      const float sum = over_segments(d_skip.at[j]);
      if (segment == 0) d_h[d + j] = sum;
    }
  }
  /// Stores those of the taps. Overwrites the shared memory.
  __device__ void store_taps_partial(int64_t partial) {
    auto& products = *reinterpret_cast<LagProducts<kLags>*>(&shared);
    static_assert(sizeof products <= sizeof shared);
    __syncwarp();
    sum_diagonals<kLags>(products, d_taps, num_taps,
                         taps_partial(partial) + p.width + int64_t{d / kFirBlockSide} * p.num_taps);
  }
};

template <int kLags, Mode kMode>
__global__ void __launch_bounds__(kThreads, 2)
    fir_tensor_bwd_kernel(const __grid_constant__ FirBwdParams p,
                          const __grid_constant__ FirTensorBwd plan) {
  using Traits = FirTensorBwdTraits<kLags>;
  using March = FirTensorBackward<kLags, kMode>;
  constexpr int kDelay = Traits::kDelay;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(shared_bytes);
  const FirTensorStrip strip(p, plan, kDelay);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int first_channel = (static_cast<int>(blockIdx.x) * kWarps + warp) * kFirBlockSide;
  const bool active = first_channel < p.width;  // else the warp works on zeros, and stores nothing

  // The tiles to the right take little time each: all their rows are asked for at once.
  const bool has_right = strip.last_dq > strip.last;
  wait_for_earlier_kernels();
  FirTensorCopies<Traits, kMode> copies(p, strip, shared);
  copies.start(true);
  if (has_right) {
    for (int i = 1; i < Traits::kPostSlots; ++i) copies.start(!copies.late);
  }
  March march(p, strip, shared.warps[warp], active ? first_channel : 0, active);
  const int64_t N = 3 * p.width;
  int step = strip.begin + march.segment * kSegment + strip.last_dq * kTile;
  BF16* dx = static_cast<BF16*>(p.dx) + (strip.b * p.length + step) * N + march.d;
  int history = 0, post = 0;  // slots of tile n in the rings, which go down with n
  for (int n = strip.last_dq; n >= strip.first; --n) {
    if (n > strip.last) {
      copies_wait<Traits::kPostSlots - 1>();
    } else {
      copies_wait<0>();
    }
    __syncthreads();  // tile n is there, and nobody reads the tiles that the next copies replace
    copies.start(copies.tile >= n - 1);
    auto& w = march.shared;
    const int late = (strip.last - n) & 1, delayed = n + kDelay;
    const bool before_start = kMode == Mode::kStates && strip.before_start(n);
    Two u[kSegment];
    uint32_t beyond[2][2];
    if (before_start) {
      march.gate_before_start(w.u[history], w.dq[history], step);
    } else {
      if (n <= strip.last) {
        march.gate_u(w.u[history], shared.pre[late], shared.value[late], u, beyond);
      }
      if (n >= 0) {
        march.gate_dq(w.dq[history], shared.post[post], shared.dy[post], strip.owns(n), u);
      }
    }
    __syncwarp();
    const bool q = delayed <= strip.last;
    const bool d_state = kMode == Mode::kStates && p.d_state != nullptr && strip.begin == 0;
    const bool du = n <= strip.last && (n >= 0 || d_state);
    if (q) march.filter_q(history, strip.owns(delayed));
    if (du) march.filter_du(history);
    __syncwarp();
    const int oldest = March::ring(history, kDelay, Traits::kHistory);
    const int oldest_post = March::ring(post, kDelay, Traits::kPostSlots);
    if (q) {
      march.finish_post(w.u[oldest], shared.post[oldest_post], shared.dy[oldest_post],
                        strip.owns(delayed), dx + kDelay * kTile * N, step + kDelay * kTile);
    }
    if (du) {
      if (before_start) {
        march.finish_before_start(w.dq[oldest], step);
      } else {
        march.finish_late(w.dq[oldest], shared.pre[late], shared.value[late], beyond, strip.owns(n),
                          dx, step);
      }
    }
    __syncwarp();
    history = history == 0 ? Traits::kHistory - 1 : history - 1;
    post = post == 0 ? Traits::kPostSlots - 1 : post - 1;
    dx -= kTile * N;
    step -= kTile;
  }
  if (kMode == Mode::kStates && strip.begin == 0 && p.d_featurizer_state != nullptr) {
    march.store_d_featurizer_state();
  }
  if (active) {
    const int64_t partial = int64_t{strip.b} * plan.strips + static_cast<int>(blockIdx.y);
    march.store_partials(partial);
    march.store_taps_partial(partial);
  }
}

constexpr int kSumThreads = 256;

/// Sums the partials of all strips in order: d_featurizer [3D, 3], d_skip [D], d_taps [G, W], a
/// thread for each. d_taps is also summed over the units of `unit` channels of its group.
__global__ void __launch_bounds__(kSumThreads)
    fir_tensor_sum_kernel(const __grid_constant__ FirBwdParams p, int partials, int unit) {
  const int64_t i = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  const int64_t f_columns = 9 * p.width, taps = p.groups * p.num_taps;
  const int64_t units = p.width / unit, h_columns = p.width + units * p.num_taps;
  const auto* d_f = static_cast<const float*>(p.featurizer_partial);
  const auto* d_h = static_cast<const float*>(p.taps_partial);
  wait_for_earlier_kernels();
  const auto sum = [&](const float* from, int64_t stride) {
    float total = 0;
#pragma unroll 4
    for (int partial = 0; partial < partials; ++partial) total += from[partial * stride];
    return total;
  };
  if (i < f_columns) {
    store_parameter<BF16>(p.d_featurizer, p.featurizer_is_T, i, sum(d_f + i, f_columns));
  } else if (i < f_columns + p.width) {
    if (p.d_skip == nullptr) return;
    const int64_t channel = i - f_columns;
    store_parameter<BF16>(p.d_skip, p.skip_is_T, channel, sum(d_h + channel, h_columns));
  } else if (i < f_columns + p.width + taps) {
    const int64_t tap = i - f_columns - p.width, group = tap / p.num_taps;
    const int64_t group_units = units / p.groups;
    float total = 0;
    for (int64_t at = group * group_units; at < (group + 1) * group_units; ++at) {
      total += sum(d_h + p.width + at * p.num_taps + tap % p.num_taps, h_columns);
    }
    store_parameter<BF16>(p.d_taps, p.taps_is_T, tap, total);
  }
}

template <int kLags, Mode kMode>
Status run(const FirBwdParams& p, const FirTensorBwd& plan, cudaStream_t stream) {
  constexpr size_t shared = sizeof(typename FirTensorBwdTraits<kLags>::Shared);
  static_assert(shared == fir_tensor_bwd_shared(kLags));
  const dim3 grid(plan.columns, plan.strips, p.batch);
  const Status allowed = allow_shared_memory(fir_tensor_bwd_kernel<kLags, kMode>, shared);
  if (!allowed.ok()) return allowed;
  launch_early(fir_tensor_bwd_kernel<kLags, kMode>, grid, kThreads, shared, stream, p, plan);
  const Status status = launch_status(plan.name);
  if (!status.ok()) return status;
  return fir_tensor_sum(p, static_cast<int>(p.batch) * plan.strips, kFirBlockSide, plan.name,
                        stream);
}

}  // namespace

Status fir_tensor_sum(const FirBwdParams& p, int partials, int unit, const char* name,
                      cudaStream_t stream) {
  const int64_t sums = 10 * p.width + p.groups * p.num_taps;
  launch_early(fir_tensor_sum_kernel, dim3(static_cast<unsigned>(fir_ceil_div(sums, kSumThreads))),
               kSumThreads, 0, stream, p, partials, unit);
  return launch_status(name);
}

Status fir_tensor_bwd(const FirBwdParams& p, const FirTensorBwd& plan, cudaStream_t stream) {
  return fir_with_bwd_lags(plan.lags, [&]<int kLags>() {
    return fir_has_states(p) ? run<kLags, Mode::kStates>(p, plan, stream)
                             : run<kLags, Mode::kPlain>(p, plan, stream);
  });
}

}  // namespace sarissa::kernels
