// Backward of hyena_fir with 130 to 1024 taps on tensor cores, bfloat16.
//
// A block of threads owns 16 neighbouring channels, which share taps, and marches over a strip of
// time, from the strip's end to its beginning, in strides of 128 steps: a tile of 32 for each of
// its four warps. u and dq of as many strides as the taps reach lie in shared memory. A stride n
// takes four passes:
//
//   gate    u = c_pre c_value and dq = c_post dy of stride n
//   filter  du of stride n, from dq of the strides n .. n + delay, and q of stride n + delay, from
//           u of the same strides: products with Toeplitz matrices of taps
//   taps    their gradient, of dq of stride n + delay: each warp sums that of a quarter of the taps
//   finish  dc and dz: of the pre and value thirds of stride n, of the post third of n + delay
//
// In gate and finish a lane has two neighbouring channels and eight steps, so both featurizers are
// plain arithmetic in single precision. Rows of z and dy come straight from global memory when they
// are needed, a second time for finish: L2 still has them, or is asked ahead for them. u, dq, q and
// du, which change hands between the lanes, are rounded to bfloat16.
#include "sarissa/kernels/fir/fir_tensor_long_bwd.cuh"

#include "sarissa/kernels/fir/fir_tensor.cuh"
#include "sarissa/kernels/fir/fir_tensor_bwd.cuh"
#include "sarissa/kernels/fir/fir_tensor_tile.cuh"

namespace sarissa::kernels {
namespace {

using BF16 = __nv_bfloat16;

constexpr int kWarps = kFirLongWarps, kThreads = 32 * kWarps;
constexpr int kSide = kFirBlockSide;
constexpr int kTileWords = kSegment * kLine;
/// Rows of z that gate needs for a lane's steps, and finish, which also makes dc of two steps more.
constexpr int kGateRows = kSegment + kBefore, kFinishSteps = kSegment + 2,
              kFinishRows = kFinishSteps + kBefore;

/// What has a fixed place in shared memory. Behind it come two rings of tiles, u and dq, then pairs
/// of taps.
struct Shared {
  Two featurizer[3][3][kPairs];  // [third][tap]
  /// q and du of each warp's tile, in this stride and the one before, which lies to its right.
  BlockTile q[2][kWarps], du[2][kWarps];
};

/// A strip of `tiles` tiles that its block owns, and those beside it that its gradients reach.
struct Strip {
  int b, begin, tiles;
  int last;     // the last tile with du and q: a strip's last two dz need dc of two steps more
  int last_dq;  // the last tile of dq

  __device__ Strip(const FirParams& p, const FirTensorLongBwd& plan)
      : b(static_cast<int>(blockIdx.z)), begin(static_cast<int>(blockIdx.y) * plan.steps) {
    const int left = static_cast<int>(p.length) - begin;
    tiles = ceil_div(min(plan.steps, left), kTile);
    last = left <= plan.steps ? tiles - 1 : tiles;
    last_dq = left <= plan.steps ? tiles - 1 : tiles + plan.delay * kWarps;
  }
  __device__ bool owns(int tile) const { return tile >= 0 && tile < tiles; }
};

/// Rows of z and dy that finish needs for a lane, asked for before the taps' gradient.
struct FinishRows {
  uint32_t post[kFinishRows], dy[kFinishSteps];   // of the tile with q
  uint32_t pre[kFinishRows], value[kFinishRows];  // of the tile with du
};

/// What a warp does: its registers and the passes over a tile.
template <int kLags>
struct March {
  const FirBwdParams& p;
  const FirTensorLongBwd& plan;
  const Strip& strip;
  Shared& shared;
  uint32_t *u, *dq;  // rings of tiles
  uint32_t* pairs;   // of taps: the word of the lane's fragment 0
  int lane, warp;
  int d;               // gate, finish: the first of the lane's channels
  int segment_begin;   // gate, finish: the lane's first step in a stride
  const BF16 *z, *dy;  // rows of the strip's first step at d
  BF16* dx;
  int first_tap, num_taps;  // whose gradients the warp sums
  float skip[2];            // of channels r and r + 8
  Two d_featurizer[3][3] = {};
  Two d_skip = {};
  float d_taps[kLags][2][4] = {};  // per lag: dq u^T, [16 steps of dq, 2 x 8 steps of u]

  __device__ March(const FirBwdParams& p, const FirTensorLongBwd& plan, const Strip& strip,
                   unsigned char* shared_bytes)
      : p(p),
        plan(plan),
        strip(strip),
        shared(*reinterpret_cast<Shared*>(shared_bytes)),
        u(reinterpret_cast<uint32_t*>(shared_bytes + sizeof(Shared))),
        dq(u + plan.history * kTileWords) {
    const int thread = static_cast<int>(threadIdx.x),
              first_channel = static_cast<int>(blockIdx.x) * kSide;
    lane = thread % 32;
    warp = thread / 32;
    const int r = lane / 4, c = lane % 4 * 2;
    uint32_t* const all_pairs = dq + plan.history * kTileWords;
    pairs = all_pairs + TapPairs::kOrigin + r - c;
    d = first_channel + lane % kPairs * 2;
    segment_begin = warp * kTile + lane / kPairs * kSegment;
    z = static_cast<const BF16*>(p.x) + strip.b * p.x_stride_b + strip.begin * p.x_stride_l + d;
    dy = static_cast<const BF16*>(p.dy) + strip.b * p.dy_stride_b + strip.begin * p.dy_stride_l + d;
    dx = static_cast<BF16*>(p.dx) + (strip.b * p.length + strip.begin) * 3 * p.width + d;
    first_tap = warp * (kLags - 1) * kSide;
    num_taps = static_cast<int>(p.num_taps) - first_tap;
    if (warp + 1 < kWarps) num_taps = min(num_taps, (kLags - 1) * kSide);

    TapPairs::fill(all_pairs, thread, kThreads, plan.pairs, p,
                   first_channel / (p.width / p.groups));
    for (int i = thread; i < 9 * kSide; i += kThreads) {
      const int third = i / (3 * kSide), channel = i / 3 % kSide, tap = i % 3;
      shared.featurizer[third][tap][channel / 2].at[channel % 2] =
          load_parameter<BF16>(p.featurizer, p.featurizer_is_T,
                               (third * p.width + first_channel) * 3 + channel * 3 + tap);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      skip[half] = p.skip == nullptr
                       ? 0.0f
                       : load_parameter<BF16>(p.skip, p.skip_is_T, first_channel + r + 8 * half);
    }
    // To the right of the first tiles dq, q and du are zero; and u must be finite where it is not
    // made, since taps that are zero meet it.
    for (uint32_t* word = &shared.q[0][0][0] + thread; word < all_pairs; word += kThreads) {
      *word = 0;
    }
  }

  __device__ void load_featurizer(int third, FeaturizerTaps& f) const {
#pragma unroll
    for (int tap = 0; tap < 3; ++tap) f[tap] = shared.featurizer[third][tap][lane % kPairs];
  }
  /// The lane's channels in rows `step`, .. of the strip; zeros outside the sequence, and where the
  /// rows are not `wanted`.
  template <int kRows>
  __device__ void load_rows(const BF16* from, int64_t stride, int step, bool wanted,
                            uint32_t (&rows)[kRows]) const {
    const BF16* row = from + step * stride;
    const auto at = static_cast<unsigned>(strip.begin + step);
    const unsigned length = wanted ? static_cast<unsigned>(p.length) : 0;
#pragma unroll
    for (unsigned i = 0; i < kRows; ++i, row += stride) {
      rows[i] = load_vector<BF16, 2>(row, at + i < length).pairs[0];
    }
  }
  __device__ const BF16* third_of_z(int third) const { return z + third * p.width; }

  /// The tile `ahead` tiles later than the first of the stride in `slot`: where it is in a ring.
  __device__ int ring(int slot, int ahead) const {
    const int tile = slot * kWarps + ahead;
    return (tile < plan.history ? tile : tile - plan.history) * kTileWords;
  }
  /// Where the tiles next to it are.
  __device__ int next(int at) const {
    at += kTileWords;
    return at < plan.history * kTileWords ? at : 0;
  }
  __device__ int previous(int at) const {
    return (at > 0 ? at : plan.history * kTileWords) - kTileWords;
  }

  /// u and dq of the warp's tile of stride n and, of owned steps, the gradient of skip.
  __device__ void gate(int n, int slot) {
    const int tile = n * kWarps + warp, step = n * kFirLongStride + segment_begin;
    const int at = ring(slot, warp);
    const bool has_u = tile <= strip.last, has_dq = n >= 0 && tile <= strip.last_dq;
    uint32_t pre[kGateRows], value[kGateRows], post[kGateRows], dy_rows[kSegment];
    load_rows(third_of_z(kPre), p.x_stride_l, step - kBefore, has_u, pre);
    load_rows(third_of_z(kValue), p.x_stride_l, step - kBefore, has_u, value);
    load_rows(third_of_z(kPost), p.x_stride_l, step - kBefore, has_dq, post);
    load_rows(dy, p.dy_stride_l, step, has_dq, dy_rows);
    FeaturizerTaps f_pre, f_value, f_post;
    load_featurizer(kPre, f_pre);
    load_featurizer(kValue, f_value);
    load_featurizer(kPost, f_post);
    const bool owned = strip.owns(tile);
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      const Two c_pre = featurized(f_pre, pre, i), c_value = featurized(f_value, value, i);
      const Two c_post = featurized(f_post, post, i), dy_i = unpack_two(dy_rows[i]);
      Two u_i, dq_i;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        u_i.at[j] = c_pre.at[j] * c_value.at[j];
        dq_i.at[j] = c_post.at[j] * dy_i.at[j];
        if (owned) d_skip.at[j] = fmaf(dq_i.at[j], u_i.at[j], d_skip.at[j]);
      }
      u[at + word_of(lane, i)] = pack_pair(u_i.at[0], u_i.at[1]);
      dq[at + backward_word_of(lane, i)] = pack_pair(dq_i.at[0], dq_i.at[1]);
    }
  }
  /// Asks L2 for the rows of stride n, a lane for a row of each stream.
  __device__ void prefetch_stride(int n) const {
    const int step = n * kFirLongStride + warp * kTile + lane;
    const int t = strip.begin + step;
    const bool good = t >= 0 && t < p.length;
    const BF16* const row = z - lane % kPairs * 2 + step * p.x_stride_l;
    prefetch(row + kPre * p.width, good);
    prefetch(row + kValue * p.width, good);
    prefetch(row + kPost * p.width, good && n >= 0);
    prefetch(dy - lane % kPairs * 2 + step * p.dy_stride_l, good && n >= 0);
  }

  /// The sums of a tile's two blocks begin with what skip gives: x is a tile of u or dq.
  __device__ void begin_sums(float (&sums)[2][2][4], const uint32_t* x) const {
#pragma unroll
    for (int o = 0; o < 2; ++o) {
      uint32_t block[4];
      load_matrices_transposed(block, x + fragment_word(lane) + o * 16);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t pair = block[i / 2];
        sums[o][i / 4][i % 4] = skip[i / 2 % 2] * (i % 2 == 0 ? low_of(pair) : high_of(pair));
      }
    }
  }
  /// Adds block x of u (of dq) times the Toeplitz matrix of lag 2 j + e. Fragment i of the taps
  /// holds, for the lane's row r and column c, taps 8 i + r - c and one less; the product takes
  /// fragments 2 lag - 1 .. 2 lag + 1. taps[i] is fragment 4 j - 3 + i.
  __device__ static void add(float (&sum)[2][4], const uint32_t (&x)[4], const uint32_t (&taps)[7],
                             int e) {
    mma(sum[0], x, taps[3 + 2 * e], taps[2 + 2 * e], sum[0]);
    mma(sum[1], x, taps[4 + 2 * e], taps[3 + 2 * e], sum[1]);
  }
  /// q of the warp's tile of stride n + delay, and du of that of stride n, from as many tiles as
  /// `farthest` and their own, the farthest first. Both walk along the same taps.
  template <bool kQ, bool kDu>
  __device__ void filter_tile(int slot, int parity, int farthest) {
    const int q_at = ring(slot, plan.delay * kWarps + warp), du_at = ring(slot, warp);
    float q_sums[2][2][4], du_sums[2][2][4];
    if (kQ) begin_sums(q_sums, u + q_at);
    if (kDu) begin_sums(du_sums, dq + du_at);
    int u_at = ring(slot, plan.delay * kWarps + warp - farthest);
    int dq_at = ring(slot, warp + farthest);
    const uint32_t* fragments = pairs + 32 * farthest;
    uint32_t taps[7];
#pragma unroll
    for (int i = 0; i < 3; ++i) taps[4 + i] = fragments[8 * (1 + i)];
#pragma unroll 2
    for (int j = farthest; j >= 0; --j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) taps[i] = fragments[8 * (i - 3)];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t x[4];
        if (kQ) {
          load_matrices_transposed(x, u + u_at + fragment_word(lane) + half * 16);
#pragma unroll
          for (int o = 0; o < 2; ++o) add(q_sums[o], x, taps, o - half);
        }
        if (kDu) {
          load_matrices_transposed(x, dq + dq_at + fragment_word(lane) + half * 16);
#pragma unroll
          for (int o = 0; o < 2; ++o) add(du_sums[o], x, taps, half - o);
        }
      }
#pragma unroll
      for (int i = 0; i < 3; ++i) taps[4 + i] = taps[i];
      fragments -= 32;
      u_at = next(u_at);
      dq_at = previous(dq_at);
    }
#pragma unroll
    for (int o = 0; o < 2; ++o) {
      if (kQ) store_block(shared.q[parity][warp] + fragment_word(lane) + o * 16, q_sums[o]);
      if (kDu) store_block(shared.du[parity][warp] + fragment_word(lane) + o * 16, du_sums[o]);
    }
  }
  /// What there is to filter. Beyond the strip's last dq, and before step 0, are zeros.
  __device__ void filter(int n, int slot, int parity) {
    const int tile = n * kWarps + warp, late = tile + plan.delay * kWarps;
    const int to_end = strip.last_dq - tile, to_start = strip.begin / kTile + late;
    const bool q = late <= strip.last, du = n >= 0 && tile <= strip.last;
    if (q && du) {
      filter_tile<true, true>(slot, parity, min(plan.reach, max(to_start, to_end)));
    } else if (q) {
      filter_tile<true, false>(slot, parity, min(plan.reach, to_start));
    } else if (du) {
      filter_tile<false, true>(slot, parity, min(plan.reach, to_end));
    }
  }

  /// The gradient of the warp's taps, of owned dq of stride n + delay.
  __device__ void sum_taps(int n, int slot) {
    if (num_taps <= 0) return;
    const int nearest = warp * (kLags / 2);  // tiles from dq back to the first u
#pragma unroll 1
    for (int i = 0; i < kWarps; ++i) {
      const int tile = (n + plan.delay) * kWarps + i, ahead = plan.delay * kWarps + i;
      if (tile >= strip.tiles || strip.begin / kTile + tile < nearest) continue;
      uint32_t a[2][4];
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        load_matrices(a[o], dq + ring(slot, ahead) + fragment_by_step_word(lane) + o * 16);
      }
      int at = ring(slot, ahead - nearest);
      // Block after block of u, back in time: it lies m - 1 + o lags before block o of dq, besides
      // those of the warps before this one.
#pragma unroll
      for (int m = 0; m <= kLags; ++m) {
        uint32_t b[4];
        load_matrices(b, u + at + fragment_word(lane) + (m % 2 == 0 ? 16 : 0));
        if (m % 2 == 1) at = previous(at);
#pragma unroll
        for (int o = 0; o < 2; ++o) {
          const int k = m - 1 + o;
          if (k < 0 || k >= kLags) continue;
          mma(d_taps[k][0], a[o], b[0], b[1], d_taps[k][0]);
          mma(d_taps[k][1], a[o], b[2], b[3], d_taps[k][1]);
        }
      }
    }
  }

  __device__ void load_finish(int n, FinishRows& rows) const {
    const int tile = n * kWarps + warp, late = tile + plan.delay * kWarps;
    const int step = n * kFirLongStride + segment_begin;
    const int late_step = step + plan.delay * kFirLongStride;
    load_rows(third_of_z(kPost), p.x_stride_l, late_step - kBefore, strip.owns(late), rows.post);
    load_rows(dy, p.dy_stride_l, late_step, strip.owns(late), rows.dy);
    load_rows(third_of_z(kPre), p.x_stride_l, step - kBefore, strip.owns(tile), rows.pre);
    load_rows(third_of_z(kValue), p.x_stride_l, step - kBefore, strip.owns(tile), rows.value);
  }
  /// q or du of the lane's steps and of the next two, from the results of this stride and of the
  /// one to its right. `word` is word_of, or backward_word_of.
  template <class Word>
  __device__ void load_result(const BlockTile (&results)[2][kWarps], int parity, Word word,
                              uint32_t (&x)[kFinishSteps]) const {
    const BlockTile& own = results[parity][warp];
#pragma unroll
    for (int i = 0; i < kSegment; ++i) x[i] = own[word(lane, i)];
    const bool edge = lane + kPairs >= 32;  // the next segment is another warp's
    const BlockTile& right = !edge               ? own
                             : warp + 1 < kWarps ? results[parity][warp + 1]
                                                 : results[parity ^ 1][0];
#pragma unroll
    for (int i = 0; i < 2; ++i) x[kSegment + i] = right[word((lane + kPairs) % 32, i)];
  }
  /// From dc of a third at the lane's steps and the next two: dz, and the gradient of the
  /// featurizer. `step` is the lane's first.
  __device__ void finish_third(int third, const FeaturizerTaps& f, const Two (&dc)[kFinishSteps],
                               const uint32_t (&z_rows)[kFinishRows], int step) {
    BF16* to = dx + step * (3 * p.width) + third * p.width;
    const int left = static_cast<int>(p.length) - strip.begin - step;
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      const Two dz = featurized_backward(f, dc, i);
      store_word(to, pack_pair(dz.at[0], dz.at[1]), i < left);
      to += 3 * p.width;
      add_d_featurizer(d_featurizer[third], dc[i], z_rows, i);
    }
  }
  /// dz of owned tiles: of the post third from q, of the others from du.
  __device__ void finish(int n, int parity, const FinishRows& rows) {
    const int tile = n * kWarps + warp, late = tile + plan.delay * kWarps;
    const int step = n * kFirLongStride + segment_begin;
    uint32_t x[kFinishSteps];
    Two dc[kFinishSteps];
    if (strip.owns(late)) {
      load_result(shared.q, parity, word_of, x);
      FeaturizerTaps f;
      load_featurizer(kPost, f);
#pragma unroll
      for (int i = 0; i < kFinishSteps; ++i) {
        const Two q = unpack_two(x[i]), dy_i = unpack_two(rows.dy[i]);
#pragma unroll
        for (int j = 0; j < 2; ++j) dc[i].at[j] = q.at[j] * dy_i.at[j];
      }
      finish_third(kPost, f, dc, rows.post, step + plan.delay * kFirLongStride);
    }
    if (strip.owns(tile)) {
      load_result(shared.du, parity, backward_word_of, x);
      FeaturizerTaps f_pre, f_value;
      load_featurizer(kPre, f_pre);
      load_featurizer(kValue, f_value);
      const auto times_du = [&](const FeaturizerTaps& f, const uint32_t(&z_rows)[kFinishRows]) {
#pragma unroll
        for (int i = 0; i < kFinishSteps; ++i) {
          const Two c = featurized(f, z_rows, i), du = unpack_two(x[i]);
#pragma unroll
          for (int j = 0; j < 2; ++j) dc[i].at[j] = c.at[j] * du.at[j];
        }
      };
      times_du(f_value, rows.value);
      finish_third(kPre, f_pre, dc, rows.pre, step);
      times_du(f_pre, rows.pre);
      finish_third(kValue, f_value, dc, rows.value, step);
    }
  }

  /// Stores the strip's partial gradients, of featurizer and skip summed over the warps in order.
  /// Overwrites the shared memory.
  __device__ void store_partials() {
    const int64_t partial = int64_t{strip.b} * plan.strips + static_cast<int>(blockIdx.y);
    auto* const d_f = static_cast<float*>(p.featurizer_partial) + partial * 9 * p.width;
    auto* const d_h =
        static_cast<float*>(p.taps_partial) + partial * (p.width + p.width / kSide * p.num_taps);
    auto& sums = *reinterpret_cast<float(*)[kWarps][10][kSide]>(&shared.q);
    static_assert(sizeof sums <= sizeof shared.q);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < 10; ++i) {
        const float sum =
            over_segments(i < 9 ? d_featurizer[i % 9 / 3][i % 3].at[j] : d_skip.at[j]);
        if (lane < kPairs) sums[warp][i][lane * 2 + j] = sum;
      }
    }
    auto* const products = reinterpret_cast<LagProducts<kLags>*>(u) + warp;
    if (num_taps > 0) {
      float* const to = d_h + p.width + int64_t{blockIdx.x} * p.num_taps + first_tap;
      sum_diagonals<kLags>(*products, d_taps, num_taps, to);
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < 10 * kSide; i += kThreads) {
      const int which = i / kSide, third = which / 3, tap = which % 3;
      const int64_t channel = int64_t{blockIdx.x} * kSide + i % kSide;
      float sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += sums[w][which][i % kSide];
      if (which < 9) {
        d_f[(third * p.width + channel) * 3 + tap] = sum;
      } else {
        d_h[channel] = sum;
      }
    }
  }
};

template <int kLags>
__global__ void __launch_bounds__(kThreads, kFirTensorBwdShare)
    fir_tensor_long_bwd_kernel(const __grid_constant__ FirBwdParams p,
                               const __grid_constant__ FirTensorLongBwd plan) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const Strip strip(p, plan);
  wait_for_earlier_kernels();
  March<kLags> march(p, plan, strip, shared_bytes);
  __syncthreads();
  int slot = plan.delay, parity = 0;  // slot of stride n in the rings
  for (int n = strip.last_dq / kWarps; n >= -plan.delay; --n) {
    march.gate(n, slot);
    march.prefetch_stride(n - 1);
    __syncthreads();  // u and dq are there
    march.filter(n, slot, parity);
    FinishRows rows;
    march.load_finish(n, rows);
    march.sum_taps(n, slot);
    __syncthreads();  // q and du are there, and nobody reads what the next gate replaces
    march.finish(n, parity, rows);
    slot = slot == 0 ? plan.delay : slot - 1;
    parity ^= 1;
  }
  __syncthreads();
  march.store_partials();
}

template <int kLags>
Status run(const FirBwdParams& p, const FirTensorLongBwd& plan, cudaStream_t stream) {
  const auto shared = static_cast<size_t>(plan.shared_bytes);
  const Status allowed = allow_shared_memory(fir_tensor_long_bwd_kernel<kLags>, shared);
  if (!allowed.ok()) return allowed;
  const dim3 grid(plan.columns, plan.strips, p.batch);
  launch_early(fir_tensor_long_bwd_kernel<kLags>, grid, kThreads, shared, stream, p, plan);
  const Status status = launch_status(plan.name);
  if (!status.ok()) return status;
  return fir_tensor_sum(p, static_cast<int>(p.batch) * plan.strips, kFirBlockSide, plan.name,
                        stream);
}

}  // namespace

Status fir_tensor_long_bwd(const FirBwdParams& p, const FirTensorLongBwd& plan,
                           cudaStream_t stream) {
  switch (plan.lags) {
    case 5:
      return run<5>(p, plan, stream);
    case 9:
      return run<9>(p, plan, stream);
    default:
      return run<17>(p, plan, stream);
  }
}

}  // namespace sarissa::kernels
