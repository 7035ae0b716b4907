// Forward of hyena_modal on tensor cores, bfloat16 with up to 16 modes: one pass over memory.
//
// A CTA owns a column of channels and marches through time in tiles; the carry, the modes' states
// between tiles, stays on the chip. Batch entries may follow one another in one march, so that the
// filters are made once for all of them. A tile goes through three phases:
//   pre-gate   u = c_pre c_value, from rows of z to u[channel][step]; a thread has two channels and
//              eight steps
//   convolve   q = h * u + skip u, in place; a warp has one or two channels, whose filters it keeps
//              as fragments for the whole march
//   post-gate  y = c_post q; threads as in the pre-gate
// Between two barriers the warps convolve one tile, finish the tile before it and prepare the one
// after it. Half of them begin with the convolution, so that its products and scans overlap the
// arithmetic of the gates.
//
// Columns are wide, 32 channels in tiles of 256 steps, or where those would leave half of the
// multiprocessors idle narrow, 16 channels in tiles of 512 steps. Where even narrow columns are
// few, the CTAs of a cluster, the ranks, take the tiles of a column in turn and send the carry from
// rank to rank, into each other's shared memory. A warp waits for the carry only when the products
// of its tile are done, and sends the next one after a scan: each rank runs a little later than the
// one before it, and then finds the carry there when it asks for it.
#include <atomic>

#include "sarissa/kernels/common/cluster.cuh"
#include "sarissa/kernels/common/vector.cuh"
#include "sarissa/kernels/modal/modal_tensor.cuh"

namespace sarissa::kernels {
namespace {

using bf16 = __nv_bfloat16;

constexpr int kModes = kModalTensorModes;
constexpr int kBlock = kModalBlock;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kRun = 8;       // steps of two channels that a thread gates in a tile
constexpr int kHalo = 2;      // rows before a tile, for the featurizer
constexpr int kSlots = 3;     // tiles of z's thirds on the chip
constexpr int kTilesOfU = 2;  // of u, then q
constexpr int kProduct = 16;  // blocks of a product: rows of its left side
static_assert(kModes == 16 && kBlock == 16, "the fragments below");

/// A column of channels: a warp convolves kOwn of them. All tiles have as many elements.
template <int kOwnChannels>
struct Column {
  static constexpr int kOwn = kOwnChannels;
  static constexpr int kChannels = kOwn * kWarps;
  static constexpr int kPairs = kChannels / 2;
  static constexpr int kTile = kRun * kThreads / kPairs;
  static constexpr int kParts = kTile / kBlock / kProduct;  // products that a channel's tile takes
  static constexpr int kLaneBlocks = 2 * kParts;            // blocks whose states a lane has
  static constexpr int kRowBytes = kChannels * sizeof(bf16);
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kLineRows = 128 / kRowBytes;
  static constexpr int kChannelBytes = kTile * sizeof(bf16);
  static_assert(kTile * kChannels == kModalTensorTile * kModalTensorChannels);

  /// A table with an entry per channel and mode.
  template <class T>
  using PerMode = T[kChannels][kModes];

  /// Where row j of a tile of z lies, row 0 kHalo steps before it. The gates of a warp read rows
  /// that are multiples of 8 apart together: they lie in different banks.
  __device__ static constexpr int row_offset(int j) {
    return (j ^ (j >> 3 & (kLineRows - 1))) * kRowBytes;
  }
  /// Where eight steps of u[channel] lie. Neither the same steps of neighbouring pairs of channels
  /// nor the blocks of a channel meet in a bank.
  __device__ static constexpr int u_offset(int channel, int eight) {
    return channel * kChannelBytes + (eight ^ (eight >> 3 & 7) ^ (channel >> 1 & 7)) * 16;
  }

  int channel;  // the first one
  int length;
  int64_t stride, width;

  __device__ Column(const ModalInputs& in, int column)
      : channel(column * kChannels),
        length(static_cast<int>(in.length)),
        stride(in.u_time_stride),
        width(in.width) {}

  /// z of a batch entry, [L, 3D], from the first channel on.
  __device__ const bf16* z(const ModalInputs& in, int b) const {
    return static_cast<const bf16*>(in.u) + b * in.u_batch_stride + channel;
  }
  /// Row t >= -2 of one third of z of a batch entry, or null for zeros.
  __device__ const bf16* row(const ModalInputs& in, int b, int third, int t) const {
    if (t >= 0) return z(in, b) + t * stride + third * width;
    if (in.featurizer_state == nullptr) return nullptr;
    return static_cast<const bf16*>(in.featurizer_state) +
           ((int64_t{b} * kHalo + t + kHalo) * 3 + third) * width + channel;
  }
};
using Wide = Column<2>;
using Narrow = Column<1>;
static_assert(Wide::kChannels == kModalTensorChannels);
static_assert(Narrow::kChannels == kModalTensorNarrow);

/// u has two parts, the high one first; q takes the place of the high one.
constexpr int kPartBytes = Wide::kChannels * Wide::kChannelBytes;
constexpr int kTileBytes = 2 * kPartBytes;

/// What the filters are made of.
template <class Column>
struct Setup {
  /// With this stride neither modes nor powers meet in a bank.
  static constexpr int kStride = kModes + 4;

  Column::template PerMode<float> residue;
  float powers[Column::kChannels][kBlock + 1][kStride];  // lambda^k; 0 for modes that are not there
  float taps[Column::kChannels][kBlock + 1];             // of the local convolution
};

/// A tile of time of a batch entry.
struct Place {
  int tile, b;
};
/// Rounds whose places are kept.
constexpr int kPlaces = 8;  // a power of two

/// Mode n of a channel is number j of what lane l, for l % 4 = lane, holds of the channel's states.
__device__ constexpr int mode_of(int lane, int j) { return lane % 4 * 2 + j % 2 + j / 2 * 8; }
/// The states of a channel in the order of the lanes that hold them.
struct States {
  float4 of_lane[4];

  __device__ float& mode(int n) {
    return reinterpret_cast<float*>(of_lane)[n % 8 / 2 * 4 + n / 8 * 2 + n % 2];
  }
};
__device__ inline void unpack(float (&to)[4], const float4& four) {
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

template <class Column>
struct Shared {
  unsigned char z[3][kSlots][(kHalo + Column::kTile) * Column::kRowBytes];  // post, pre, value
  union {
    unsigned char u[kTilesOfU][kTileBytes];
    Setup<Column> setup;
  };
  float2 featurizer[3][3][Column::kPairs];          // [third][tap]
  typename Column::template PerMode<float4> decay;  // see `scan`
  States correction[Column::kChannels];             // see `convolve`
  /// The states before a tile, where they come from elsewhere: an entry's first tile, or with ranks
  /// all tiles. In the end those before the last block.
  States carry[Column::kChannels];
  float last_u[Column::kChannels][kBlock];  // of the last block
  Place places[kPlaces];                    // of round r: number r % kPlaces
  Arrival carried[kWarps];                  // ranks: a carry has come from the rank before
};

constexpr size_t kMostShared = 227 << 10;  // of a CTA on an H100
static_assert(sizeof(Shared<Wide>) <= kMostShared && sizeof(Shared<Narrow>) <= kMostShared);

/// Copies of tiles to their slots; a thread takes a chunk of two rows of each third, and a few
/// threads one of the rows before the tile.
template <class Column>
struct Copies {
  static constexpr int kChunks = Column::kChunks, kRowBytes = Column::kRowBytes;
  static constexpr int kTile = Column::kTile;
  static constexpr int kRows = kThreads / kChunks;  // that all threads copy at a time
  static_assert(kTile == 2 * kRows && kRows % (kRun * Column::kLineRows) == 0);

  const ModalInputs& in;
  const Column& cta;
  int row, lane, warp;
  int to;  // where the thread's chunk lies in a slot

  __device__ Copies(const ModalInputs& in, const Column& cta) : in(in), cta(cta) {
    uint32_t thread = threadIdx.x;
    opaque(thread);  // made again every time: there are no registers to keep it in
    row = static_cast<int>(thread / kChunks);
    lane = static_cast<int>(thread % 32);
    warp = static_cast<int>(thread / 32);
    to = Column::row_offset(row + kHalo) + lane % kChunks * 16;
  }
  /// Thirds [first, first + kThirds) of a tile.
  template <int kThirds>
  __device__ void copy(int first, Place at, unsigned char* const (&slots)[kThirds]) const {
    const int t = at.tile * kTile;
    // In bytes, so that an address takes a sum and no shift.
    const int64_t third = cta.width * int64_t{sizeof(bf16)};
    const int64_t stride = cta.stride * int64_t{sizeof(bf16)};
    const auto* const z = reinterpret_cast<const unsigned char*>(cta.z(in, at.b)) +
                          lane % kChunks * 16 + first * third;
    const unsigned char* const from = z + (t + row) * stride;
    const unsigned char* const from_half = from + kRows * stride;
    const int rows = cta.length - t - row;
#pragma unroll
    for (int k = 0; k < kThirds; ++k) {
      copy_async_line(slots[k] + to, from + k * third, rows > 0);
      copy_async_line(slots[k] + to + kRows * kRowBytes, from_half + k * third, rows > kRows);
    }
    // The rows before it.
#pragma unroll
    for (int k = 0; k < kThirds; ++k) {
      if (warp != first + k || lane >= kHalo * kChunks) continue;
      const int j = lane / kChunks;
      unsigned char* const to = slots[k] + Column::row_offset(j) + lane % kChunks * 16;
      if (t > 0) {
        const int before = t - kHalo + j;
        copy_async_line(to, z + before * stride + k * third, before < cta.length);
      } else {
        copy_state(to, cta.row(in, at.b, first + k, j - kHalo));
      }
    }
  }
  /// A chunk of a row before the sequence, which is aligned to an element only, or null for zeros.
  __device__ void copy_state(unsigned char* to, const bf16* row) const {
    constexpr int kElements = 16 / sizeof(bf16);
    Vector<bf16, kElements> chunk = Vector<bf16, kElements>::zero();
    if (row != nullptr) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        reinterpret_cast<bf16*>(&chunk)[i] = row[lane % kChunks * kElements + i];
      }
    }
    *reinterpret_cast<Vector<bf16, kElements>*>(to) = chunk;
  }
};

/// A thread's share of the gates: kRun steps of two channels in every tile. As with Copies, made
/// again for every tile.
template <class Column>
struct Run {
  static constexpr int kPairs = Column::kPairs, kRowBytes = Column::kRowBytes;
  static constexpr int kLineRows = Column::kLineRows;

  int pair, run;
  int rows[kLineRows];  // offsets of its first rows, which say those of the others
  int next[kHalo];      // of the rows where the next run begins
  int u;                // of its steps of u

  __device__ Run() {
    uint32_t thread = threadIdx.x;
    opaque(thread);
    pair = static_cast<int>(thread % kPairs);
    run = static_cast<int>(thread / kPairs);
#pragma unroll
    for (int i = 0; i < kLineRows; ++i) rows[i] = Column::row_offset(run * kRun + i) + pair * 4;
#pragma unroll
    for (int i = 0; i < kHalo; ++i) {
      next[i] = kLineRows == 2 ? rows[i ^ 1] + kRun * kRowBytes
                               : Column::row_offset((run + 1) * kRun + i) + pair * 4;
    }
    u = Column::u_offset(2 * pair, run);
  }

  /// Calls f(i, c) for the run's steps, c the featurizer's output of one third or of two thirds.
  template <int kThirds, class F>
  __device__ void featurize(const unsigned char* const (&z)[kThirds],
                            const float2 (*const (&taps)[kThirds])[kPairs], const F& f) const {
    static_assert(kRun == 8, "row_offset() changes from run to run");
    float2 f0[kThirds], f1[kThirds], f2[kThirds], z1[kThirds], z2[kThirds], c[kThirds];
#pragma unroll
    for (int k = 0; k < kThirds; ++k) {
      f0[k] = taps[k][0][pair];
      f1[k] = taps[k][1][pair];
      f2[k] = taps[k][2][pair];
    }
#pragma unroll
    for (int i = 0; i < kRun + kHalo; ++i) {
      const int at =
          i < kRun ? rows[i % kLineRows] + i / kLineRows * kLineRows * kRowBytes : next[i - kRun];
#pragma unroll
      for (int k = 0; k < kThirds; ++k) {
        const uint32_t row = *reinterpret_cast<const uint32_t*>(z[k] + at);
        const float2 z0 = {low_of(row), high_of(row)};
        if (i >= kHalo) {
          c[k].x = three_taps(f0[k].x, f1[k].x, f2[k].x, z0.x, z1[k].x, z2[k].x);
          c[k].y = three_taps(f0[k].y, f1[k].y, f2[k].y, z0.y, z1[k].y, z2[k].y);
        }
        z2[k] = z1[k];
        z1[k] = z0;
      }
      if (i >= kHalo) f(i - kHalo, c);
    }
  }
};

/// The state before the first step of a batch entry.
template <class Column>
__device__ inline float initial_state(const ModalInputs& in, const Column& cta, int b, int own,
                                      int n) {
  if (in.state == nullptr || n >= in.modes) return 0.0f;
  const int64_t at = (b * in.width + cta.channel + own) * in.modes + n;
  return static_cast<const float*>(in.state)[at];
}

/// The filter of one channel as fragments, for a warp. A tile's blocks are the rows of its
/// products: row r of the upper half of product i is block kLaneBlocks r + 2 i, of the lower half
/// the one after it, so that a lane has neighbouring blocks.
template <class Column>
struct Filter {
  // All as high + low. ends [step, mode] = lambda^(15 - step); reach [mode, step] = residue
  // lambda^(step + 1); local [step', step] = h[step - step'] with the skip in h[0], of which two
  // fragments say all.
  SplitPair ends[2][2], reach[2][2], local[2];
  // The states before the tile of the modes of this lane's columns: in lanes of row 0, in others 0.
  float carry[4] = {};

  Filter() = default;
  /// Channel `own` of the CTA.
  __device__ Filter(const Setup<Column>& setup, int own) {
    const int lane = static_cast<int>(threadIdx.x) % 32, row = lane / 4, column = lane % 4 * 2;
    const float* const residues = setup.residue[own];
    const auto power = [&](int n, int k) { return setup.powers[own][k][n]; };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int n = row + 8 * half, step = column + 8 * k;
        ends[half][k] = split_pair(power(n, kBlock - 1 - step), power(n, kBlock - 2 - step));
        const int m = column + 8 * k, to = row + 8 * half;
        reach[half][k] =
            split_pair(residues[m] * power(m, to + 1), residues[m + 1] * power(m + 1, to + 1));
      }
      const int lag = 8 * half + row - column;
      const float* const taps = setup.taps[own];
      local[half] =
          split_pair(lag >= 0 ? taps[max(lag, 0)] : 0.0f, lag >= 1 ? taps[max(lag - 1, 0)] : 0.0f);
    }
  }
};

/// The end states of the blocks of product `part` from zero: x[j][h] of mode_of(lane, j) and the
/// lane's block number h.
template <class Column>
__device__ inline void end_states(const Filter<Column>& f, const uint32_t (&u)[4],
                                  const uint32_t (&u_low)[4], int part,
                                  float (&x)[4][Column::kLaneBlocks]) {
  const float zero[4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float e[4];
    mma(e, u, f.ends[half][0].low, f.ends[half][1].low, zero);
    mma(e, u_low, f.ends[half][0].high, f.ends[half][1].high, e);
    mma(e, u, f.ends[half][0].high, f.ends[half][1].high, e);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      x[2 * half + j][2 * part] = e[j];
      x[2 * half + j][2 * part + 1] = e[2 + j];
    }
  }
}

/// s += factor * (s of the lane kUp rows above), where there is one.
template <int kUp>
__device__ inline void add_from_above(float& s, float factor) {
  asm volatile(
      "{.reg .pred p; .reg .f32 above; shfl.sync.up.b32 above|p, %0, %2, 0, -1;"
      "@p fma.rn.f32 %0, %1, above, %0;}"
      : "+f"(s)
      : "f"(factor), "n"(4 * kUp));
}
/// s: the states after this lane's blocks; `start` those before the tile in lanes of row 0, zero in
/// the others. `decay`: of one block, and of the blocks of one lane, two and four. Step by step for
/// all modes, since a step waits for its shuffle.
template <int kBlocks>
__device__ inline void scan(const float4 (&decay)[4], const float (&x)[4][kBlocks],
                            const float (&start)[4], float (&s)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    s[j] = x[j][0];
#pragma unroll
    for (int i = 1; i < kBlocks; ++i) s[j] = fmaf(decay[j].x, s[j], x[j][i]);
    s[j] = fmaf(decay[j].y, start[j], s[j]);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) add_from_above<1>(s[j], decay[j].y);
#pragma unroll
  for (int j = 0; j < 4; ++j) add_from_above<2>(s[j], decay[j].z);
#pragma unroll
  for (int j = 0; j < 4; ++j) add_from_above<4>(s[j], decay[j].w);
}
/// The decay of a tile as scan() multiplies it, up to the roundings of its sums.
__device__ inline double scan_decay(const float4& decay) {
  return static_cast<double>(decay.y) * decay.y * decay.z * decay.w;
}

template <class Column>
__global__ void __launch_bounds__(kThreads, 1)
    modal_tensor_fwd_kernel(const __grid_constant__ ModalFwdParams p,
                            const __grid_constant__ ModalTensorFwd plan) {
  constexpr int kOwn = Column::kOwn, kTile = Column::kTile, kPairs = Column::kPairs;
  constexpr int kParts = Column::kParts, kLaneBlocks = Column::kLaneBlocks;
  using Run = Run<Column>;
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<Column>*>(shared_bytes);
  const ModalInputs& in = p.in;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int row = lane / 4, column = lane % 4 * 2;
  // Wide columns have one rank. Several ranks have one batch entry.
  const int ranks = kOwn == 1 ? plan.ranks : 1;
  const int rank = kOwn == 1 ? static_cast<int>(blockIdx.x) % ranks : 0;
  const Column cta(in, static_cast<int>(blockIdx.x) / ranks);
  const int tiles = ceil_div(cta.length, kTile);
  const int first_b = static_cast<int>(blockIdx.y) * plan.entries;
  const int entries = min(plan.entries, static_cast<int>(in.batch) - first_b);
  const int rounds = entries * ceil_div(tiles - rank, ranks);

  // The parameters and the first tile are then near when the wait is over.
  {
    const int channel = thread / kModes, n = thread % kModes;
    const bool there = channel < Column::kChannels && n < in.modes;
    const int64_t at = ModalMode::at(in, cta.channel + channel, n);
    prefetch(static_cast<const float*>(in.log_poles) + at, there);
    prefetch(static_cast<const float*>(in.residues) + at, there);
    constexpr int kRows = kThreads / 2;
    const int third = kPre + thread / kRows;
#pragma unroll
    for (int i = 0; i < kTile / kRows; ++i) {
      const int t = rank * kTile + i * kRows + thread % kRows;
      prefetch(cta.z(in, first_b) + t * cta.stride + third * cta.width, t < cta.length);
    }
  }
  wait_for_earlier_kernels();

  // What the tables are made of: all loads before the first use, and before the copies, which would
  // keep them waiting.
  static_assert(kThreads >= Column::kChannels * kModes && kBlock == kModes);
  const int my_channel = thread / kModes, my_mode = thread % kModes;
  const bool with_tables = my_channel < Column::kChannels;
  const ModalMode mode(in, cta.channel + (with_tables ? my_channel : 0), my_mode);
  float my_tap = 0.0f;  // of the local convolution, number my_mode
  if (with_tables && my_mode == 0 && in.skip != nullptr) {
    my_tap = modal_parameter(in.skip, in.skip_is_T, cta.channel + my_channel);
  }
  const float my_start =
      with_tables && rank == 0 ? initial_state(in, cta, first_b, my_channel, my_mode) : 0.0f;
  constexpr int kFeaturizers = 9 * kPairs;  // [third][tap][pair], a thread each
  float2 featurizer = {};
  if (thread < kFeaturizers) {
    const int pair = thread % kPairs, tap = thread / kPairs % 3, third = thread / kPairs / 3;
    const int64_t at = (third * in.width + cta.channel + 2 * pair) * 3 + tap;
    featurizer = {modal_parameter(in.featurizer, in.featurizer_is_T, at),
                  modal_parameter(in.featurizer, in.featurizer_is_T, at + 3)};
  }

  // The tile of a round. It is read, since there are no registers to keep a batch entry in; the
  // plan sees to it that the first rounds are of one entry.
  const auto place_of = [&](int round) { return shared.places[round & (kPlaces - 1)]; };
  constexpr int kFirstRounds = kSlots + 1;
  if (thread < kFirstRounds) {
    const int tile = thread * ranks + rank;
    shared.places[thread] =
        tile < tiles || entries == 1 ? Place{tile, first_b} : Place{tile - tiles, first_b + 1};
  }
  if (ranks > 1) {
    if (thread < kWarps) shared.carried[thread].start();
    __syncwarp();
    arrive_at_cluster();
  }

  // Copies the tile of `round`, `at`, and for the post-gate, which needs it later, that of an
  // earlier one.
  const auto copy = [&](int round, Place at, int slot, int post_slot) {
    constexpr int kBehind = 2;
    const Copies copies(in, cta);
    if (round < rounds) {
      copies.template copy<2>(kPre, at, {shared.z[kPre][slot], shared.z[kValue][slot]});
    }
    const int post_round = round - kBehind;
    if (post_round >= 0 && post_round < rounds) {
      const Place post = round < kFirstRounds - 1 ? Place{post_round * ranks + rank, first_b}
                                                  : place_of(post_round);
      copies.template copy<1>(kPost, post, {shared.z[kPost][post_slot]});
    }
    copies_commit();
  };
#pragma unroll
  for (int round = 0; round < kSlots; ++round) {
    copy(round, {round * ranks + rank, first_b}, round, 0);
  }

  if (thread < kFeaturizers) (&shared.featurizer[0][0][0])[thread] = featurizer;
  auto& setup = shared.setup;
  if (with_tables) {
    setup.residue[my_channel][my_mode] = mode.residue;
#pragma unroll
    for (int k = 0; k <= kBlock; ++k) {
      setup.powers[my_channel][k][my_mode] = mode.there ? modal_power(mode.log_pole, k) : 0.0f;
    }
    shared.carry[my_channel].mode(my_mode) = my_start;
    double power = mode.there ? mode.exact_power(1) : 0.0;
#pragma unroll
    for (int k = 1; k < kBlock; k *= 2) power *= power;
    float4 decay;
    decay.x = static_cast<float>(power);
#pragma unroll
    for (int k = 1; k < kLaneBlocks; k *= 2) power *= power;
    decay.y = static_cast<float>(power);
    decay.z = static_cast<float>(power *= power);
    decay.w = static_cast<float>(power *= power);
    shared.decay[my_channel][my_mode] = decay;
    shared.correction[my_channel].mode(my_mode) =
        static_cast<float>(power * power - scan_decay(decay));
  }
  __syncthreads();
  if (with_tables) {
    const auto* const residues = reinterpret_cast<const float4*>(setup.residue[my_channel]);
    const auto* const powers = reinterpret_cast<const float4*>(setup.powers[my_channel][my_mode]);
#pragma unroll
    for (int i = 0; i < kModes / 4; ++i) {
      float residue[4], power[4];
      unpack(residue, residues[i]);
      unpack(power, powers[i]);
#pragma unroll
      for (int n = 0; n < 4; ++n) my_tap = fmaf(residue[n], power[n], my_tap);
    }
    setup.taps[my_channel][my_mode] = my_tap;
  }
  __syncthreads();
  Filter<Column> filters[kOwn];
#pragma unroll
  for (int k = 0; k < kOwn; ++k) filters[k] = Filter<Column>(setup, warp * kOwn + k);
  __syncthreads();  // u takes the room of setup

  const auto pre_gate = [&](const Run& run, int slot, unsigned char* u_tile) {
    const unsigned char* const z[] = {shared.z[kPre][slot], shared.z[kValue][slot]};
    const float2(*const taps[])[kPairs] = {shared.featurizer[kPre], shared.featurizer[kValue]};
    float u[2][kRun];
    run.featurize(z, taps, [&](int i, const float2(&c)[2]) {
      u[0][i] = c[0].x * c[1].x;
      u[1][i] = c[0].y * c[1].y;
    });
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      SplitPair pairs[kRun / 2];
#pragma unroll
      for (int i = 0; i < kRun / 2; ++i) pairs[i] = split_pair(u[k][2 * i], u[k][2 * i + 1]);
      uint4* const to = reinterpret_cast<uint4*>(u_tile + run.u + k * Column::kChannelBytes);
      *to = {pairs[0].high, pairs[1].high, pairs[2].high, pairs[3].high};
      to[kPartBytes / sizeof(uint4)] = {pairs[0].low, pairs[1].low, pairs[2].low, pairs[3].low};
    }
  };

  const auto post_gate = [&](const Run& run, Place at, int slot, const unsigned char* u_tile) {
    const int t = at.tile * kTile + run.run * kRun;
    const unsigned char* const z[] = {shared.z[kPost][slot]};
    const float2(*const taps[])[kPairs] = {shared.featurizer[kPost]};
    uint32_t q[2][kRun / 2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const auto four = *reinterpret_cast<const uint4*>(u_tile + run.u + k * Column::kChannelBytes);
      q[k][0] = four.x, q[k][1] = four.y, q[k][2] = four.z, q[k][3] = four.w;
    }
    uint32_t out[kRun];
    run.featurize(z, taps, [&](int i, const float2(&c)[1]) {
      const auto step = [&](uint32_t pair) { return i % 2 == 0 ? low_of(pair) : high_of(pair); };
      out[i] = pack_pair(c[0].x * step(q[0][i / 2]), c[0].y * step(q[1][i / 2]));
    });
    bf16* to = static_cast<bf16*>(p.y) + (int64_t{at.b} * in.length + t) * in.width + cta.channel +
               2 * run.pair;
    if (t + kRun <= cta.length) {
#pragma unroll
      for (int i = 0; i < kRun; ++i, to += in.width) *reinterpret_cast<uint32_t*>(to) = out[i];
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i, to += in.width) {
        if (t + i < cta.length) *reinterpret_cast<uint32_t*>(to) = out[i];
      }
    }
  };

  // This lane's row for load_matrices and its pairs of q, of the warp's first channel.
  uint32_t u_row, q_pair;
  {
    const int matrix = lane / 8, block = kLaneBlocks * (lane % 8) + matrix % 2;
    u_row = Column::u_offset(warp * kOwn, 2 * block + matrix / 2);
  }
  q_pair = Column::u_offset(warp * kOwn, 2 * (kLaneBlocks * row)) + 2 * column;
  opaque(u_row);
  opaque(q_pair);

  const auto convolve = [&](Place at, int round, unsigned char* u_tile) {
    const float zero[4] = {};
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      Filter<Column>& f = filters[k];
      const int own = warp * kOwn + k;
      unsigned char* const u_own = u_tile + k * Column::kChannelBytes;
      float x[4][kLaneBlocks], q[kParts][2][4];
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        uint32_t u[4], u_low[4];
        load_matrices(u, u_own + (u_row ^ i * 64));
        load_matrices(u_low, u_own + (u_row ^ i * 64) + kPartBytes);
        end_states(f, u, u_low, i, x);
        mma_k8(q[i][0], u[0], u[1], f.local[0].low, zero);
        mma(q[i][1], u, f.local[1].low, f.local[0].low, zero);
        mma_k8(q[i][0], u_low[0], u_low[1], f.local[0].high, q[i][0]);
        mma(q[i][1], u_low, f.local[1].high, f.local[0].high, q[i][1]);
        mma_k8(q[i][0], u[0], u[1], f.local[0].high, q[i][0]);
        mma(q[i][1], u, f.local[1].high, f.local[0].high, q[i][1]);
      }
      float4 decay[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) decay[j] = shared.decay[own][mode_of(lane, j)];

      if (ranks > 1 && at.tile > 0) {
        Arrival& carried = shared.carried[warp];
        if (lane == 0) carried.expect(sizeof(States));
        carried.wait(rank == 0 ? round - 1 : round);
      }
      float4* const carry = &shared.carry[own].of_lane[lane % 4];
      if ((ranks > 1 || at.tile == 0) && row == 0) unpack(f.carry, *carry);
      float start[4], after[4], correction[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) start[j] = f.carry[j];
      scan(decay, x, start, after);
      // scan() multiplied the carry by powers that were rounded; this makes up for it.
      unpack(correction, shared.correction[own].of_lane[lane % 4]);
      float s[4][kLaneBlocks];  // the states before this lane's blocks
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float before = __shfl_sync(~0u, after[j], (lane + 28) % 32);  // row 0: after the tile
        s[j][0] = row == 0 ? start[j] : before;
        f.carry[j] = fmaf(correction[j], start[j], before);
        if (row != 0) f.carry[j] = 0.0f;
      }
      const bool last = at.tile == tiles - 1;
      if (ranks > 1) {
        Arrival::deliver({f.carry[0], f.carry[1], f.carry[2], f.carry[3]}, carry,
                         &shared.carried[warp], rank + 1 < ranks ? rank + 1 : 0, row == 0 && !last);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 1; i < kLaneBlocks; ++i) {
          s[j][i] = fmaf(decay[j].x, s[j][i - 1], x[j][i - 1]);
        }
      }
      constexpr int kSavedBlocks = kModalSavedSteps / kBlock;
      static_assert(kSavedBlocks % kLaneBlocks == 0);
      if (p.saved != nullptr && row * kLaneBlocks % kSavedBlocks == 0) {
        const int saved = ceil_div(cta.length, kModalSavedSteps);
        const int entry = at.tile * (kTile / kModalSavedSteps) + row * kLaneBlocks / kSavedBlocks;
        float* const to = static_cast<float*>(p.saved) + column +
                          ((int64_t{at.b} * saved + entry) * in.width + cta.channel + own) * kModes;
        if (entry < saved) {
          *reinterpret_cast<float2*>(to) = {s[0][0], s[1][0]};
          *reinterpret_cast<float2*>(to + 8) = {s[2][0], s[3][0]};
        }
      }
      if (last) {
        __syncwarp();  // the carry has been read
        const int block = (cta.length - 1) % kTile / kBlock;
#pragma unroll
        for (int i = 0; i < kLaneBlocks; ++i) {
          if (row * kLaneBlocks + i != block) continue;
          *carry = {s[0][i], s[1][i], s[2][i], s[3][i]};
        }
        if (lane < kBlock) {
          const unsigned char* const u_at =
              u_tile + Column::u_offset(own, 2 * block + lane / 8) + lane % 8 * sizeof(bf16);
          shared.last_u[own][lane] = load(reinterpret_cast<const bf16*>(u_at)) +
                                     load(reinterpret_cast<const bf16*>(u_at + kPartBytes));
        }
      }

      // q += s reach, the small products first.
      __syncwarp();  // all have read u
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        SplitPair a[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          a[j] = split_pair(s[j / 2 * 2][2 * i + j % 2], s[j / 2 * 2 + 1][2 * i + j % 2]);
        }
        const auto times = [&](uint32_t SplitPair::*left, uint32_t SplitPair::*right) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            mma(q[i][half], a[0].*left, a[1].*left, a[2].*left, a[3].*left, f.reach[half][0].*right,
                f.reach[half][1].*right, q[i][half]);
          }
        };
        times(&SplitPair::low, &SplitPair::high);
        times(&SplitPair::high, &SplitPair::low);
        times(&SplitPair::high, &SplitPair::high);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            // Eight steps, number 2 kLaneBlocks row + 4 i + 2 h + half.
            *reinterpret_cast<uint32_t*>(u_own + (q_pair ^ (4 * i + 2 * h + half) * 16)) =
                pack_pair(q[i][half][2 * h], q[i][half][2 * h + 1]);
          }
        }
      }
    }
  };

  // What goes out after the last step of a batch entry: the states of the modes, from the block
  // that it lies in, and the featurizer's. Where another entry follows its carry is set.
  const auto end_entry = [&](int b, bool another) {
    uint32_t thread = threadIdx.x;
    opaque(thread);  // as in Copies
    const int own = static_cast<int>(thread) / kModes, n = static_cast<int>(thread) % kModes;
    if (own < Column::kChannels && n < in.modes) {
      float& carry = shared.carry[own].mode(n);
      const FloatPair pole(ModalMode(in, cta.channel + own, n).exact_power(1));
      float s = carry;
      const int steps = (cta.length - 1) % kBlock + 1;
      for (int i = 0; i < steps; ++i) s = recur(pole.high, pole.low, s, shared.last_u[own][i]);
      const int64_t to = (b * in.width + cta.channel + own) * in.modes + n;
      static_cast<float*>(p.state_out)[to] = s;
      if (another) carry = initial_state(in, cta, b + 1, own, n);
    }
    if (thread < 3 * kHalo * Column::kChunks) {
      const int third = static_cast<int>(thread) / (kHalo * Column::kChunks);
      const int i = static_cast<int>(thread) / Column::kChunks % kHalo,
                chunk = thread % Column::kChunks;
      const bf16* from = cta.row(in, b, third, cta.length - kHalo + i);
      const uint4 none = {};
      const uint4 z = from != nullptr ? reinterpret_cast<const uint4*>(from)[chunk] : none;
      bf16* const to = static_cast<bf16*>(p.featurizer_state_out) +
                       ((int64_t{b} * kHalo + i) * 3 + third) * in.width + cta.channel;
      reinterpret_cast<uint4*>(to)[chunk] = z;
    }
  };

  copies_wait<kSlots - 1>();
  __syncthreads();
  pre_gate(Run(), 0, shared.u[0]);
  copies_wait<kSlots - 2>();
  __syncthreads();
  if (ranks > 1) wait_for_cluster();
  const auto after = [](int i, int count) { return i == count - 1 ? 0 : i + 1; };
  int slot = 0, u_slot = 0;  // of the round's tile
  for (int round = 0; round <= rounds; ++round) {
    const int next_slot = after(slot, kSlots), last_slot = after(next_slot, kSlots);
    const int u_next = after(u_slot, kTilesOfU);
    copy(round + kSlots, place_of(round + kSlots), slot, next_slot);
    if (thread == 0) {
      const Place last = place_of(round + kSlots);
      const bool over = last.tile + ranks >= tiles;
      shared.places[(round + kSlots + 1) & (kPlaces - 1)] = {
          over && ranks == 1 ? 0 : last.tile + ranks, over && ranks == 1 ? last.b + 1 : last.b};
    }
    const Place before = place_of(round - 1);
    if (round > 0 && before.tile == tiles - 1) {
      end_entry(before.b, round < rounds);
      __syncwarp();  // a warp sets the carry of its channels
    }
    const bool convolve_first = warp % 8 >= 4;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      if ((half == 0) == convolve_first) {
        if (round < rounds) convolve(place_of(round), round, shared.u[u_slot]);
      } else {
        // The post-gate frees the u that the pre-gate writes.
        const Run run;
        if (round > 0) post_gate(run, before, last_slot, shared.u[u_next]);
        if (round + 1 < rounds) pre_gate(run, next_slot, shared.u[u_next]);
      }
    }
    slot = next_slot;
    u_slot = u_next;
    copies_wait<kSlots - 2>();
    __syncthreads();
  }
}

template <class Column>
Status run(const ModalFwdParams& p, const ModalTensorFwd& plan, cudaStream_t stream) {
  constexpr size_t kBytes = sizeof(Shared<Column>);
  const auto kernel = modal_tensor_fwd_kernel<Column>;
  const Status allowed = allow_shared_memory(kernel, kBytes);
  if (!allowed.ok()) return allowed;
  const dim3 grid(static_cast<unsigned>(plan.columns * plan.ranks),
                  static_cast<unsigned>(ceil_div<int64_t>(p.in.batch, plan.entries)));
  launch_early_in_clusters(plan.ranks, kernel, grid, kThreads, kBytes, stream, p, plan);
  return launch_status(plan.ranks > 1 ? "tensor_ranks" : "tensor");
}

}  // namespace

int modal_tensor_fwd_clusters(int ranks) {
  // Asked before every call, and the runtime takes long to answer.
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices][kModalTensorMostRanks + 1];  // the answer + 1
  int device = 0;
  cudaGetDevice(&device);
  std::atomic<int>* const answer = device < kDevices ? &known[device][ranks] : nullptr;
  if (answer != nullptr && *answer > 0) return *answer - 1;

  constexpr size_t kBytes = sizeof(Shared<Narrow>);
  const auto kernel = modal_tensor_fwd_kernel<Narrow>;
  cudaFuncAttributes code{};
  cudaLaunchAttribute dimension{};
  dimension.id = cudaLaunchAttributeClusterDimension;
  dimension.val.clusterDim = {static_cast<unsigned>(ranks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(ranks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.attrs = &dimension;
  config.numAttrs = 1;
  int clusters = 0;
  // A GPU that has clusters may run code that was made for one that has none.
  const bool known_code = cudaFuncGetAttributes(&code, kernel) == cudaSuccess;
  if (!known_code || code.ptxVersion < 90 || !allow_shared_memory(kernel, kBytes).ok() ||
      cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
    clusters = 0;
    cudaGetLastError();
  }
  if (answer != nullptr) *answer = clusters + 1;
  return clusters;
}

bool modal_tensor_fwd_runs(const ModalTensorFwd& plan) {
  const size_t bytes = plan.narrow ? sizeof(Shared<Narrow>) : sizeof(Shared<Wide>);
  return bytes <= static_cast<size_t>(most_shared_memory());
}

Status modal_tensor_fwd(const ModalFwdParams& p, const ModalTensorFwd& plan, cudaStream_t stream) {
  return plan.narrow ? run<Narrow>(p, plan, stream) : run<Wide>(p, plan, stream);
}

}  // namespace sarissa::kernels
