// Forward of hyena_fir with many taps on tensor cores; see fir_tensor.cuh.
//
// A block of threads owns a strip of time and some slices of 16 channels, and marches along the
// strip in tiles. z arrives by asynchronous copies, one tile ahead. The warps of a slice make its
// u, rounded to bfloat16, and keep as many blocks of it in shared memory as the taps reach back.
// Then each adds block after block of u, the oldest first, to the sums of its part of the tile. y
// takes the place of the post third of z in shared memory and leaves by whole rows at the next
// tile.
#include "sarissa/kernels/fir/fir_tensor.cuh"

namespace sarissa::kernels {
namespace {

using Element = __nv_bfloat16;

constexpr int kBlocks = kFirTensorFwdBlocks;                    // of a warp in a tile
constexpr int kBlockBytes = 2 * kFirBlockSide * kFirBlockSide;  // of u

/// Constants of the forward with kSlices slices of 16 channels and kTeams warps for each.
template <int kSlices, int kTeams>
struct Tiles {
  static constexpr int kThreads = 32 * kSlices * kTeams;
  static constexpr int kChannels = kFirBlockSide * kSlices;
  static constexpr int kUnits = kChannels / 8;  // units of 16 bytes in a row
  static constexpr int kSteps = kFirBlockSide * kBlocks * kTeams;
  static constexpr int kBlockRows = kFirBlockSide * kUnits * 16;  // bytes of a block's rows of z
  static constexpr int kThirdBytes = (kBefore + kSteps) * kUnits * 16;
  static constexpr int kStageBytes = 3 * kThirdBytes;
  static constexpr int kCopyRows = kThreads / kUnits;  // rows that all threads copy at once
  static constexpr int kCopies = kSteps / kCopyRows;
  static_assert(kCopyRows % kFirBlockSide == 0);  // units of rows so far apart lie alike
};

/// Where a thread is, and what it works on.
template <int kSlices, int kTeams>
struct Place : BlockLane {
  int thread, slice, team;
  int b;           // batch element
  int channel;     // the first of the block of threads
  int d;           // the first of the warp's slice
  bool active;     // the slice is not beyond the last channel
  int begin, end;  // of the strip
  int start;       // of the march: what the taps reach back to from the strip, or step 0

  __device__ Place(const FirParams& p, const FirTensorFwd& plan) {
    using Tile = Tiles<kSlices, kTeams>;
    thread = static_cast<int>(threadIdx.x);
    slice = thread / 32 % kSlices;
    team = thread / 32 / kSlices;
    b = static_cast<int>(blockIdx.y);
    channel = static_cast<int>(blockIdx.x) * Tile::kChannels;
    d = channel + slice * kFirBlockSide;
    active = d < p.width;
    d = active ? d : channel;
    const FirForwardStrip strip(p, plan);
    begin = strip.begin;
    end = strip.end;
    const int reach = (plan.lags - 1) * kFirBlockSide;
    start = begin - min(begin, ceil_div(reach, Tile::kSteps) * Tile::kSteps);
  }
};

/// u before step 0 from the inner state, rounded to bfloat16 like every u: blocks first, first -
/// step, .. of those that the taps reach. Block -1 goes to `newest`, the others before it.
__device__ void load_history(const FirParams& p, int lags, int b, int d, const BlockLane& lane,
                             int first, int step, unsigned char* newest) {
  const int rows = static_cast<int>(p.num_taps) - 1;
  const auto* state = static_cast<const float*>(p.state) + int64_t{b} * rows * p.width + d;
  const auto u = [&](int t, int channel) {
    const int row = t + rows;
    return p.state != nullptr && row >= 0 ? state[row * p.width + channel] : 0.0f;
  };
#pragma unroll 2
  for (int block = first; block > -lags; block -= step) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int t = block * kFirBlockSide + i / 2 * 8 + lane.column;
      const int channel = lane.row + i % 2 * 8;
      pairs[i] = pack_pair(u(t, channel), u(t + 1, channel));
    }
    reinterpret_cast<uint4*>(newest + (block + 1) * kBlockBytes)[lane.lane] =
        make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}

/// The rows of the inner state at L that a block of u from step t on holds, not rounded.
__device__ void store_state_rows(const FirParams& p, int b, int d, int t, const BlockLane& lane,
                                 const float (&u)[8]) {
  const int length = static_cast<int>(p.length), rows = static_cast<int>(p.num_taps) - 1;
  float* out = static_cast<float*>(p.state_out) + int64_t{b} * rows * p.width + d + lane.row;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int step = t + j / 4 * 8 + lane.column + j % 2, row = step - (length - rows);
    if (row >= 0 && step < length) out[row * p.width + j / 2 % 2 * 8] = u[j];
  }
}

/// Copies tiles of z to shared memory and tiles of y from there. A thread moves the same unit of 16
/// bytes in rows kCopyRows apart, so that it may copy to where it has just read y.
template <int kSlices, int kTeams>
struct Mover {
  using Tile = Tiles<kSlices, kTeams>;
  int row, channel, offset;
  int post_begin;         // the first step whose post third is needed
  int64_t width, stride;  // D, elements between rows of z
  int length;
  const Element* z;  // of the next tile
  Element* y;        // of the next tile

  __device__ Mover(const FirParams& p, const Place<kSlices, kTeams>& at)
      : row(at.thread / Tile::kUnits),
        channel(at.channel + at.thread % Tile::kUnits * 8),
        offset(unit_offset<Tile::kUnits>(kBefore + row, at.thread % Tile::kUnits)),
        post_begin(at.begin - kBefore),
        width(p.width),
        stride(p.x_stride_l),
        length(static_cast<int>(p.length)),
        z(static_cast<const Element*>(p.x) + at.b * p.x_stride_b + (at.start + row) * p.x_stride_l +
          channel),
        y(static_cast<Element*>(p.y) + (at.b * p.length + at.begin + row) * p.width + channel) {}

  /// Starts the copy of the next tile, of steps `first` on, unless that is the strip's `end`. Steps
  /// beyond L are zeros.
  __device__ void load(unsigned char* stage, int first, int end) {
    if (first >= end) {
      copies_commit();
      return;
    }
#pragma unroll
    for (int i = 0; i < Tile::kCopies; ++i, z += Tile::kCopyRows * stride) {
      const int t = first + i * Tile::kCopyRows + row;
      const bool good = t < length && channel < width;
      unsigned char* to = stage + offset + i * Tile::kCopyRows * Tile::kUnits * 16;
      copy_async<16>(to, z, good && t >= post_begin);
      copy_async<16>(to + Tile::kThirdBytes, z + width, good);
      copy_async<16>(to + 2 * Tile::kThirdBytes, z + 2 * width, good);
    }
    copies_commit();
  }
  /// Stores y of the next tile of the strip, of steps `first` on.
  __device__ void store(const unsigned char* stage, int first) {
#pragma unroll
    for (int i = 0; i < Tile::kCopies; ++i, y += Tile::kCopyRows * width) {
      if (first + i * Tile::kCopyRows + row < length && channel < width) {
        *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(
            stage + offset + i * Tile::kCopyRows * Tile::kUnits * 16);
      }
    }
  }
};

/// The history of u of a slice in shared memory, a ring of blocks, as one lane sees it.
struct History {
  unsigned char *begin, *end;
};

/// q of a warp's blocks: block after block of the history from `oldest` on, by the Toeplitz
/// matrices of the taps that lie between it and each of the warp's blocks. `pairs` is the lane's
/// fragment 2 lags - 3 of the taps.
__device__ inline void sum_history(float (&q)[kBlocks][8], const History& history,
                                   const unsigned char* oldest, const uint32_t* pairs, int lags) {
#pragma unroll
  for (int i = 0; i < 8 * kBlocks; ++i) q[i / 8][i % 8] = 0.0f;
  // Fragments 2 lag - 1 .. 2 lag + 1 of the warp's first block, then of the next.
  uint32_t taps[2 * kBlocks + 1] = {};
  uint4 next_u;  // operands are read one block ahead
  uint32_t next_taps[2];
  const auto load_next = [&] {
    next_u = *reinterpret_cast<const uint4*>(oldest);
    next_taps[0] = pairs[0];
    next_taps[1] = pairs[8];
    oldest += kBlockBytes;
    if (oldest == history.end) oldest = history.begin;
    pairs -= 16;
  };
  load_next();
  const auto add = [&](int first, int last) {  // to the warp's blocks first .. last - 1
    const uint4 u = next_u;
#pragma unroll
    for (int i = 2 * kBlocks; i >= 2; --i) taps[i] = taps[i - 2];
    taps[0] = next_taps[0];
    taps[1] = next_taps[1];
    load_next();
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      if (i < first || i >= last) continue;
      mma(q[i], u.x, u.y, u.z, u.w, taps[2 * i + 1], taps[2 * i], q[i]);
      mma(q[i] + 4, u.x, u.y, u.z, u.w, taps[2 * i + 2], taps[2 * i + 1], q[i] + 4);
    }
  };
#pragma unroll
  for (int i = 1; i < kBlocks; ++i) add(0, i);
#pragma unroll 4
  for (int i = kBlocks; i <= lags; ++i) add(0, kBlocks);
#pragma unroll
  for (int i = 1; i < kBlocks; ++i) add(i, kBlocks);
}

template <int kSlices, int kTeams, int kStages>
__global__ void __launch_bounds__(Tiles<kSlices, kTeams>::kThreads,
                                  512 / Tiles<kSlices, kTeams>::kThreads)
    fir_tensor_fwd_kernel(const __grid_constant__ FirParams p,
                          const __grid_constant__ FirTensorFwd plan) {
  using Tile = Tiles<kSlices, kTeams>;
  constexpr int kUnits = Tile::kUnits, kThird = Tile::kThirdBytes;
  const Place<kSlices, kTeams> at(p, plan);
  Mover<kSlices, kTeams> mover(p, at);

  extern __shared__ __align__(16) unsigned char shared[];
  unsigned char* const histories = shared + kStages * Tile::kStageBytes;
  const int history_bytes = plan.history * kBlockBytes;
  const int num_pairs = plan.pairs;
  auto* const pairs =
      reinterpret_cast<uint32_t*>(histories + kSlices * history_bytes) + at.slice * num_pairs;
  History history;  // this lane's 16 bytes of every block
  history.begin = histories + at.slice * history_bytes + at.lane * 16;
  history.end = history.begin + history_bytes;

  unsigned char* stage = shared;
  wait_for_earlier_kernels();
#pragma unroll
  for (int i = 0; i + 1 < kStages; ++i) {
    mover.load(shared + i * Tile::kStageBytes, at.start + i * Tile::kSteps, at.end);
  }
  if (mover.row < 3 * kBefore && mover.channel < p.width) {
    const int row = mover.row / 3, third = mover.row % 3;
    *reinterpret_cast<Vector<Element, 8>*>(stage + third * kThird +
                                           unit_offset<kUnits>(row, at.thread % kUnits)) =
        load_row(p, at.b, at.start - kBefore + row, third, mover.channel);
  }
  const BlockFeaturizer post(p, kPost, at.d, at), pre(p, kPre, at.d, at),
      value(p, kValue, at.d, at);
  float skip[2] = {};
  if (p.skip != nullptr) {
    skip[0] = load_parameter<Element>(p.skip, p.skip_is_T, at.d + at.row);
    skip[1] = load_parameter<Element>(p.skip, p.skip_is_T, at.d + at.row + 8);
  }
  TapPairs::fill(pairs, at.team * 32 + at.lane, 32 * kTeams, num_pairs, p, at.d / plan.group_width);
  const uint32_t* const oldest_pairs = pairs + TapPairs::word(2 * plan.lags - 3, at);

  // Where the tile's u go in the history, in bytes; the past is before it.
  int own = history_bytes - kTeams * kBlocks * kBlockBytes;
  if (at.start == 0) {
    load_history(p, plan.lags, at.b, at.d, at, -1 - at.team, kTeams,
                 history.begin + own - kBlockBytes - at.lane * 16);
  }
  if (blockIdx.z == 0) store_old_states(p, at.b, mover.row, Tile::kCopyRows, mover.channel);
  const int state_begin =
      p.state_out == nullptr ? at.end : max(at.begin, static_cast<int>(p.length - p.num_taps) + 1);

  // The lane's part of the warp's blocks in a third, and of the last rows of a tile, which the next
  // tile needs.
  const int unit = 2 * at.slice + at.address_unit(), first_block = at.team * kBlocks;
  const int rows_offset = first_block * Tile::kBlockRows;
  const int now = rows_offset + unit_offset<kUnits>(kBefore + at.address_row(), unit);
  const int past = rows_offset + unit_offset<kUnits>(at.address_row(), unit);
  const bool carries = at.team == kTeams - 1 && at.lane < 3 * kBefore * 2;
  const int carry_third = at.lane / 4 * kThird, carry_row = at.lane / 2 % 2;
  const int carry_unit = 2 * at.slice + at.lane % 2;
  const int carry_from = carry_third + unit_offset<kUnits>(Tile::kSteps + carry_row, carry_unit);
  const int carry_to = carry_third + unit_offset<kUnits>(carry_row, carry_unit);

  unsigned char* const last_stage = shared + (kStages - 1) * Tile::kStageBytes;
  for (int t0 = at.start; t0 < at.end; t0 += Tile::kSteps) {
    unsigned char* const next = stage == last_stage ? shared : stage + Tile::kStageBytes;
    unsigned char* const before = stage == shared ? last_stage : stage - Tile::kStageBytes;
    copies_wait<kStages - 2>();
    __syncthreads();  // the tile is there; of the one before, z has been read and y is there
    if (t0 > at.begin) mover.store(before, t0 - Tile::kSteps);
    if (carries) {
      *reinterpret_cast<uint4*>(next + carry_to) =
          *reinterpret_cast<const uint4*>(stage + carry_from);
    }
    mover.load(before, t0 + (kStages - 1) * Tile::kSteps, at.end);
    const auto featurized = [&](const BlockFeaturizer& featurizer, int third, int i, float(&c)[8]) {
      const unsigned char* rows = stage + third * kThird + i * Tile::kBlockRows;
      uint32_t z_now[4], z_past[4];
      load_matrices_transposed(z_now, rows + now);
      load_matrices_transposed(z_past, rows + past);
      featurizer.apply(z_now, z_past, c);
    };
    uint4* const u_tile = reinterpret_cast<uint4*>(history.begin + own + first_block * kBlockBytes);
    float u[kBlocks][8], c_post[kBlocks][8];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      float c_pre[8], c_value[8];
      featurized(pre, kPre, i, c_pre);
      featurized(value, kValue, i, c_value);
#pragma unroll
      for (int j = 0; j < 8; ++j) u[i][j] = c_pre[j] * c_value[j];
    }
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      u_tile[i * kBlockBytes / 16] =
          make_uint4(pack_pair(u[i][0], u[i][1]), pack_pair(u[i][2], u[i][3]),
                     pack_pair(u[i][4], u[i][5]), pack_pair(u[i][6], u[i][7]));
    }
    if (t0 >= at.begin) {
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) featurized(post, kPost, i, c_post[i]);
      const int t = t0 + first_block * kFirBlockSide;
      if (t + kBlocks * kFirBlockSide > state_begin && at.active) {
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          store_state_rows(p, at.b, at.d, t + i * kFirBlockSide, at, u[i]);
        }
      }
    }
    slice_barrier<kTeams>(at.slice);  // u is there, and the post third has been read
    if (t0 >= at.begin) {
      float q[kBlocks][8];
      int oldest = own + (first_block - plan.lags + 1) * kBlockBytes;
      if (oldest < 0) oldest += history_bytes;
      sum_history(q, history, history.begin + oldest, oldest_pairs, plan.lags);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        const uint4 block = u_tile[i * kBlockBytes / 16];
        const uint32_t u[4] = {block.x, block.y, block.z, block.w};
        uint32_t y[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* c = c_post[i] + 2 * j;
          y[j] = pack_pair(c[0] * fmaf(skip[j % 2], low_of(u[j]), q[i][2 * j]),
                           c[1] * fmaf(skip[j % 2], high_of(u[j]), q[i][2 * j + 1]));
        }
        store_matrices_transposed(stage + i * Tile::kBlockRows + now, y[0], y[1], y[2], y[3]);
      }
    }
    own += kTeams * kBlocks * kBlockBytes;
    if (own == history_bytes) own = 0;
    stage = next;
  }
  __syncthreads();
  mover.store(stage == shared ? last_stage : stage - Tile::kStageBytes,
              at.begin + (at.end - at.begin - 1) / Tile::kSteps * Tile::kSteps);
}

template <int kSlices, int kTeams, int kStages>
Status run(const FirParams& p, const FirTensorFwd& plan, cudaStream_t stream) {
  const auto kernel = fir_tensor_fwd_kernel<kSlices, kTeams, kStages>;
  const Status allowed = allow_shared_memory(kernel, static_cast<size_t>(plan.shared_bytes));
  if (!allowed.ok()) return allowed;
  launch_early(kernel, dim3(plan.columns, p.batch, plan.strips), Tiles<kSlices, kTeams>::kThreads,
               static_cast<size_t>(plan.shared_bytes), stream, p, plan);
  return launch_status(plan.name);
}

}  // namespace

Status fir_tensor_fwd(const FirParams& p, const FirTensorFwd& plan, cudaStream_t stream) {
  if (!plan) return {"the GPU has too little shared memory for the tensor-core kernels"};
  if (plan.slices == 2) return run<2, 1, 2>(p, plan, stream);
  return plan.stages == 2 ? run<4, 2, 2>(p, plan, stream) : run<4, 2, 3>(p, plan, stream);
}

}  // namespace sarissa::kernels
