// Forward of hyena_modal on tensor cores, bfloat16 with up to 16 modes: one pass over memory.
//
// A CTA owns 32 channels and marches through time in tiles of 16 blocks; the carry, the modes'
// states between tiles, stays in registers. Batch entries may follow one another in one march, so
// that the filters are made once for all of them. A tile goes through three phases:
//   pre-gate   u = c_pre c_value, from rows of z to u[channel][step]; a thread has two channels and
//              eight steps
//   convolve   q = h * u + skip u, in place; a warp has two channels, whose filters it keeps as
//              fragments for the whole march
//   post-gate  y = c_post q; threads as in the pre-gate
// Between two barriers the warps convolve one tile, finish the tile before it and prepare the one
// after it. Half of them begin with the convolution, so that its products and scans overlap the
// arithmetic of the gates.
//
// Where a few channels would leave most of the GPU idle, several CTAs, the ranks, take the tiles of
// a column of channels in turn. A rank first finds where its tile ends from zero and tells the
// others through global memory; a round later all of them know the ends of the round's tiles and
// follow the carry through them. The ranks wait for each other, so the launch is cooperative.
#include "sarissa/kernels/common/vector.cuh"
#include "sarissa/kernels/modal/modal_tensor.cuh"

namespace sarissa::kernels {
namespace {

using bf16 = __nv_bfloat16;

constexpr int kModes = kModalTensorModes;
constexpr int kBlock = kModalBlock;
constexpr int kTileBlocks = 16;
constexpr int kTile = kTileBlocks * kBlock;
constexpr int kChannels = kModalTensorChannels;  // of a CTA
constexpr int kPairs = kChannels / 2;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kOwn = kChannels / kWarps;         // channels that a warp convolves
constexpr int kRun = kTile * kPairs / kThreads;  // steps that a thread gates
constexpr int kHalo = 2;                         // rows before a tile, for the featurizer
constexpr int kMailRounds = 4;                   // rounds that messages of ranks are kept
constexpr int kRowBytes = kChannels * sizeof(bf16);
constexpr int kChunks = kRowBytes / 16;
static_assert(kModes == 16 && kBlock == 16, "the fragments below");

/// Tiles of z's thirds on the chip. The ranks' third tile of u takes the room of a third one.
template <bool kRanked>
constexpr int kSlots = kRanked ? 2 : 3;

/// u, then q, of a tile: [channel][step].
constexpr int kChannelBytes = kTile * sizeof(bf16);
constexpr int kPartBytes = kChannels * kChannelBytes;
/// u has two parts, the high one first; q takes the place of the high one.
constexpr int kTileBytes = 2 * kPartBytes;

/// A table with an entry per channel and mode.
template <class T>
using PerMode = T[kChannels][kModes];

/// What the filters are made of.
struct Setup {
  PerMode<float> log_pole, residue;
  float taps[kChannels][kBlock + 1];  // of the local convolution
};

/// Rounds by which a tile is convolved later than it could be: the ranks' messages travel
/// meanwhile.
template <bool kRanked>
constexpr int kLag = kRanked ? 1 : 0;

/// A tile of time of a batch entry.
struct Place {
  int tile, b;
};
/// Rounds whose places are kept, where batch entries follow one another.
constexpr int kPlaces = 8;  // a power of two

template <bool kRanked>
struct Shared {
  unsigned char z[3][kSlots<kRanked>][(kHalo + kTile) * kRowBytes];  // post, pre, value
  union {
    unsigned char u[2 + kLag<kRanked>][kTileBytes];
    Setup setup;
  };
  float2 featurizer[3][3][kPairs];  // [third][tap]
  PerMode<float4> decay;            // of one, two, four and eight blocks
  union {
    PerMode<float> correction;   // without ranks: see `convolve`
    PerMode<float2> tile_decay;  // with ranks: lambda^kTile, high and low
  };
  // Of the sequence's last block: the states before it, and its u.
  PerMode<float> last_states;
  float last_u[kChannels][kBlock];
  Place places[kPlaces];  // of round r: number r % kPlaces
};

constexpr size_t kMostShared = 227 << 10;  // of a CTA on an H100
static_assert(sizeof(Shared<false>) <= kMostShared && sizeof(Shared<true>) <= kMostShared);

/// Where row j of a tile lies, row 0 kHalo steps before it. The gates read rows that are 8 apart
/// together: they lie in different banks.
__device__ constexpr int row_offset(int j) { return (j ^ (j >> 3 & 1)) * kRowBytes; }
/// Where eight steps of u[channel] lie. Neither the same steps of neighbouring pairs of channels
/// nor the blocks of a channel meet in a bank.
__device__ constexpr int u_offset(int channel, int eight) {
  return channel * kChannelBytes + (eight ^ (eight >> 3 & 3) ^ (channel / 2 & 7)) * 16;
}

/// Where a tile ends from zero, for one channel and mode. Read and written as a whole: a message is
/// there or not, and needs no flag or fence beside it.
struct alignas(8) TileEnd {
  float state;
  int number;  // of the round, from 1 on

  __device__ void tell(TileEnd* to) const {
    asm volatile("{.reg .b64 m; mov.b64 m, {%1, %2}; st.relaxed.gpu.global.b64 [%0], m;}" ::"l"(to),
                 "f"(state), "r"(number)
                 : "memory");
  }
  __device__ static TileEnd peek(const TileEnd* from) {
    TileEnd end;
    asm volatile("{.reg .b64 m; ld.relaxed.gpu.global.b64 m, [%2]; mov.b64 {%0, %1}, m;}"
                 : "=f"(end.state), "=r"(end.number)
                 : "l"(from)
                 : "memory");
    return end;
  }
};
/// Messages [kMailRounds, columns, ranks, kChannels, kModes], all columns of all batch entries.
constexpr int kMail = kChannels * kModes;
inline int64_t mail_bytes(const ModalTensorFwd& plan, int64_t batch) {
  if (plan.ranks == 1) return 0;
  return kMailRounds * batch * plan.columns * plan.ranks * kMail * int64_t{sizeof(TileEnd)};
}

/// A CTA's channels.
struct Column {
  int channel;  // the first of kChannels
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

/// Copies of tiles to their slots; a thread takes a chunk of two rows of each third, and a few
/// threads one of the rows before the tile.
struct Copies {
  static constexpr int kRows = kThreads / kChunks;  // that all threads copy at a time
  static_assert(kTile == 2 * kRows && kRows % 16 == 0);

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
    to = row_offset(row + kHalo) + lane % kChunks * 16;
  }
  /// Thirds [first, first + kThirds) of a tile.
  template <int kThirds>
  __device__ void copy(int first, Place at, unsigned char* const (&slots)[kThirds]) const {
    const int t = at.tile * kTile;
    const bf16* const z = cta.z(in, at.b) + lane % kChunks * 8;
    const bf16* const from = z + (t + row) * cta.stride + first * cta.width;
    const int64_t half = kRows * cta.stride;
    const int rows = cta.length - t - row;
#pragma unroll
    for (int k = 0; k < kThirds; ++k) {
      copy_async_line(slots[k] + to, from + k * cta.width, rows > 0);
      copy_async_line(slots[k] + to + kRows * kRowBytes, from + k * cta.width + half, rows > kRows);
    }
    // The rows before it.
#pragma unroll
    for (int k = 0; k < kThirds; ++k) {
      if (warp != first + k || lane >= kHalo * kChunks) continue;
      const int j = lane / kChunks;
      unsigned char* const to = slots[k] + row_offset(j) + lane % kChunks * 16;
      if (t > 0) {
        const int before = t - kHalo + j;
        copy_async_line(to, z + before * cta.stride + (first + k) * cta.width, before < cta.length);
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
struct Run {
  int pair, run;
  int even, odd;  // offsets of its rows, of even and odd number
  int u;          // offset of its steps of u

  __device__ Run() {
    uint32_t thread = threadIdx.x;
    opaque(thread);
    pair = static_cast<int>(thread % kPairs);
    run = static_cast<int>(thread / kPairs);
    const int first = run * kRun * kRowBytes + pair * 4, swap = run % 2 * kRowBytes;
    even = first + swap;
    odd = first - swap;
    u = u_offset(2 * pair, run);
  }

  /// Calls f(i, c) for the run's steps, c the featurizer's output of one third or of two thirds.
  template <int kThirds, class F>
  __device__ void featurize(const unsigned char* const (&z)[kThirds],
                            const float2 (*const (&taps)[kThirds])[kPairs], const F& f) const {
    static_assert(kRun == 8, "row_offset() alternates between runs");
    float2 f0[kThirds], f1[kThirds], f2[kThirds], z1[kThirds], z2[kThirds], c[kThirds];
#pragma unroll
    for (int k = 0; k < kThirds; ++k) {
      f0[k] = taps[k][0][pair];
      f1[k] = taps[k][1][pair];
      f2[k] = taps[k][2][pair];
    }
#pragma unroll
    for (int i = 0; i < kRun + kHalo; ++i) {
      const int at = i < kRun ? (i % 2 == 0 ? even : odd) + i * kRowBytes
                              : (i == kRun ? odd : even) + (i ^ 1) * kRowBytes;
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

/// The mode of element j of what a lane holds of a channel's states.
__device__ inline int mode_of(int column, int j) { return column + j % 2 + j / 2 * 8; }
/// The state before the first step of a batch entry.
__device__ inline float initial_state(const ModalInputs& in, const Column& cta, int b, int own,
                                      int n) {
  if (in.state == nullptr || n >= in.modes) return 0.0f;
  const int64_t at = (b * in.width + cta.channel + own) * in.modes + n;
  return static_cast<const float*>(in.state)[at];
}

/// The filter of one channel as fragments, for a warp. A tile's blocks are the rows of its
/// products: row r of the upper half is block 2 r, of the lower half block 2 r + 1, so that a lane
/// has neighbouring blocks.
struct Filter {
  // All as high + low. ends [step, mode] = lambda^(15 - step); reach [mode, step] = residue
  // lambda^(step + 1); local [step', step] = h[step - step'] with the skip in h[0], of which two
  // fragments say all.
  SplitPair ends[2][2], reach[2][2], local[2];
  // States before the tile of the modes of this lane's columns: in lanes of row 0, in others 0. Not
  // used by ranks.
  float carry[4];

  /// Channel `own` of the CTA, at the start of batch entry b.
  __device__ Filter(const ModalInputs& in, const Setup& setup, const Column& cta, int b, int own) {
    const int lane = static_cast<int>(threadIdx.x) % 32, row = lane / 4, column = lane % 4 * 2;
    const int modes = static_cast<int>(in.modes);
    const float* const log_poles = setup.log_pole[own];
    const float* const residues = setup.residue[own];
    const auto power = [&](int n, int k) {
      return n < modes ? modal_power(log_poles[n], k) : 0.0f;
    };
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
    start(in, cta, b, own);
  }
  /// The carry at the start of a batch entry.
  __device__ void start(const ModalInputs& in, const Column& cta, int b, int own) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      carry[j] = lane / 4 == 0 ? initial_state(in, cta, b, own, mode_of(lane % 4 * 2, j)) : 0.0f;
    }
  }
};

/// The end states of the blocks from zero: x[j][h] of mode column + j % 2 + j / 2 * 8 and block
/// 2 row + h.
__device__ inline void end_states(const Filter& f, const uint32_t (&u)[4],
                                  const uint32_t (&u_low)[4], float (&x)[4][2]) {
  const float zero[4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float e[4];
    mma(e, u, f.ends[half][0].low, f.ends[half][1].low, zero);
    mma(e, u_low, f.ends[half][0].high, f.ends[half][1].high, e);
    mma(e, u, f.ends[half][0].high, f.ends[half][1].high, e);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      x[2 * half + j][0] = e[j];
      x[2 * half + j][1] = e[2 + j];
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
/// s: the states after this lane's second block; `start` those before the tile in lanes of row 0,
/// zero in the others. Step by step for all modes, since a step waits for its shuffle.
__device__ inline void scan(const float4 (&decay)[4], const float (&x)[4][2],
                            const float (&start)[4], float (&s)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    s[j] = fmaf(decay[j].y, start[j], fmaf(decay[j].x, x[j][0], x[j][1]));
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) add_from_above<1>(s[j], decay[j].y);
#pragma unroll
  for (int j = 0; j < 4; ++j) add_from_above<2>(s[j], decay[j].z);
#pragma unroll
  for (int j = 0; j < 4; ++j) add_from_above<4>(s[j], decay[j].w);
}
/// lambda^kTile as scan() multiplies it, up to the roundings of its sums.
__device__ inline double scan_decay(const float4& decay) {
  return static_cast<double>(decay.y) * decay.y * decay.z * decay.w;
}

template <bool kRanked>
__global__ void __launch_bounds__(kThreads, 1)
    modal_tensor_fwd_kernel(const __grid_constant__ ModalFwdParams p,
                            const __grid_constant__ ModalTensorFwd plan) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<kRanked>*>(shared_bytes);
  wait_for_earlier_kernels();
  const ModalInputs& in = p.in;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int row = lane / 4, column = lane % 4 * 2;
  const int ranks = kRanked ? plan.ranks : 1;
  const int rank = static_cast<int>(blockIdx.x) % ranks;
  const int my_column = static_cast<int>(blockIdx.x) / ranks;
  const Column cta(in, my_column);
  const int tiles = ceil_div(cta.length, kTile);
  // Batch entries, one after the other.
  const int first_b = static_cast<int>(blockIdx.y) * (kRanked ? 1 : plan.entries);
  const int entries = kRanked ? 1 : min(plan.entries, static_cast<int>(in.batch) - first_b);
  const int rounds = kRanked ? ceil_div(tiles, ranks) : entries * tiles;
  // The tile of a round. Without ranks it is read, since there are no registers to keep a batch
  // entry in; the plan sees to it that the first rounds are of one entry.
  const auto place_of = [&](int round) {
    return kRanked ? Place{round * ranks + rank, first_b} : shared.places[round & (kPlaces - 1)];
  };
  constexpr int kFirstRounds = kSlots<kRanked> + 1;
  if (!kRanked && threadIdx.x < kFirstRounds) {
    const int round = static_cast<int>(threadIdx.x);
    shared.places[round] =
        round < tiles || entries == 1 ? Place{round, first_b} : Place{round - tiles, first_b + 1};
  }

  // Copies the tile of `round`, `at`, and for the post-gate, which needs it later, that of an
  // earlier one.
  const auto copy = [&](int round, Place at, int slot, int post_slot) {
    constexpr int kBehind = 2 + kLag<kRanked>;
    const Copies copies(in, cta);
    if (round < rounds) {
      copies.copy<2>(kPre, at, {shared.z[kPre][slot], shared.z[kValue][slot]});
    }
    const int post_round = round - kBehind;
    if (post_round >= 0 && post_round < rounds) {
      const Place post =
          round < kFirstRounds - 1 ? Place{post_round, first_b} : place_of(post_round);
      copies.copy<1>(kPost, post, {shared.z[kPost][post_slot]});
    }
    copies_commit();
  };
#pragma unroll
  for (int round = 0; round < kSlots<kRanked>; ++round) {
    copy(round, {round * ranks + rank, first_b}, round, 0);
  }

  // What the tables are made of: all loads before the first use, while the first tiles arrive.
  static_assert(kThreads == kChannels * kModes && kBlock == kModes);
  const int my_channel = thread / kModes, my_mode = thread % kModes;
  const ModalMode mode(in, cta.channel + my_channel, my_mode);
  float my_tap = 0.0f;  // of the local convolution, number my_mode
  if (my_mode == 0 && in.skip != nullptr) {
    my_tap = modal_parameter(in.skip, in.skip_is_T, cta.channel + my_channel);
  }
  constexpr int kFeaturizers = 9 * kPairs;  // [third][tap][pair], a thread each
  float2 featurizer = {};
  if (thread < kFeaturizers) {
    const int pair = thread % kPairs, tap = thread / kPairs % 3, third = thread / kPairs / 3;
    const int64_t at = (third * in.width + cta.channel + 2 * pair) * 3 + tap;
    featurizer = {modal_parameter(in.featurizer, in.featurizer_is_T, at),
                  modal_parameter(in.featurizer, in.featurizer_is_T, at + 3)};
  }
  if (thread < kFeaturizers) (&shared.featurizer[0][0][0])[thread] = featurizer;

  auto& setup = shared.setup;
  const double lambda = mode.there ? mode.exact_power(1) : 0.0;
  double lambda_to_tile;
  {
    setup.log_pole[my_channel][my_mode] = mode.log_pole;
    setup.residue[my_channel][my_mode] = mode.residue;
    double block_decay = lambda;
#pragma unroll
    for (int k = 1; k < kBlock; k *= 2) block_decay *= block_decay;
    lambda_to_tile = block_decay;
#pragma unroll
    for (int k = 1; k < kTileBlocks; k *= 2) lambda_to_tile *= lambda_to_tile;
    float4 decay;
    decay.x = static_cast<float>(block_decay);
    decay.y = decay.x * decay.x;
    decay.z = decay.y * decay.y;
    decay.w = decay.z * decay.z;
    shared.decay[my_channel][my_mode] = decay;
    if constexpr (kRanked) {
      const FloatPair tile_decay(lambda_to_tile);
      shared.tile_decay[my_channel][my_mode] = {tile_decay.high, tile_decay.low};
    } else {
      shared.correction[my_channel][my_mode] =
          static_cast<float>(lambda_to_tile - scan_decay(decay));
    }
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kModes; ++n) {
    const float power = modal_power(setup.log_pole[my_channel][n], my_mode);
    my_tap = fmaf(setup.residue[my_channel][n], power, my_tap);
  }
  setup.taps[my_channel][my_mode] = my_tap;
  __syncthreads();
  Filter filters[kOwn] = {Filter(in, setup, cta, first_b, warp * kOwn),
                          Filter(in, setup, cta, first_b, warp * kOwn + 1)};
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
      uint4* const to = reinterpret_cast<uint4*>(u_tile + run.u + k * kChannelBytes);
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
      const auto four = *reinterpret_cast<const uint4*>(u_tile + run.u + k * kChannelBytes);
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
    const int matrix = lane / 8, block = 2 * (lane % 8) + matrix % 2;
    u_row = u_offset(warp * kOwn, 2 * block + matrix / 2);
  }
  q_pair = u_offset(warp * kOwn, 2 * (2 * row)) + 2 * column;
  opaque(u_row);
  opaque(q_pair);
  const auto load_u = [&](const unsigned char* u_tile, int k, uint32_t(&high)[4],
                          uint32_t(&low)[4]) {
    load_matrices(high, u_tile + u_row + k * kChannelBytes);
    load_matrices(low, u_tile + u_row + k * kChannelBytes + kPartBytes);
  };

  const auto load_decay = [&](int own, float4(&decay)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) decay[j] = shared.decay[own][mode_of(column, j)];
  };

  // Ranks: a warp's threads are those of its channels' modes. The first message for a warp of a
  // rank of this column.
  static_assert(kOwn * kModes == 32);
  const auto mail = [&](int round, int from_rank) {
    const auto columns = static_cast<int>(in.width) / kChannels;
    const int of_column =
        (round % kMailRounds * static_cast<int>(gridDim.y) + first_b) * columns + my_column;
    uint32_t at = (of_column * ranks + from_rank) * kMail + warp * 32;
    opaque(at);  // made again every time: there are no registers to keep it in
    return static_cast<TileEnd*>(p.workspace) + at;
  };
  const auto publish_ends = [&](int round, const unsigned char* u_tile) {
    TileEnd* const to = mail(round, rank);
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      uint32_t u[4], u_low[4];
      float x[4][2], s[4];
      float4 decay[4];
      const float zero[4] = {};
      load_u(u_tile, k, u, u_low);
      end_states(filters[k], u, u_low, x);
      load_decay(warp * kOwn + k, decay);
      scan(decay, x, zero, s);
      if (row != 7) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        TileEnd{s[j], round + 1}.tell(to + k * kModes + mode_of(column, j));
      }
    }
  };
  float carry = 0.0f;  // of the thread's mode, before the tiles of a round
  if constexpr (kRanked) carry = initial_state(in, cta, first_b, my_channel, my_mode);
  // Messages that are read at once.
  constexpr int kTogether = 4;
  struct Ends {
    TileEnd of[kTogether];
  };
  const auto peek_ends = [&](int round, int first) {
    const TileEnd* const from = mail(round, 0) + lane;
    Ends ends;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      ends.of[i] = TileEnd::peek(from + min(first + i, ranks - 1) * kMail);
    }
    return ends;
  };
  // The state before this rank's tile, of the thread's mode; the carry moves on.
  const auto follow_carry = [&](int round) {
    float start = 0.0f;
    const float2 decay = shared.tile_decay[my_channel][my_mode];
    for (int first = 0; first < ranks; first += kTogether) {
      Ends ends;
      bool complete;
      do {
        ends = peek_ends(round, first);
        complete = true;
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          complete = complete && ends.of[i].number == round + 1;
        }
      } while (!complete);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (first + i == rank) start = carry;
        if (first + i < ranks) {
          carry = recur(decay.x, decay.y, carry, ends.of[i].state);
        }
      }
    }
    __syncwarp();
    return start;
  };

  // my_start: of ranks, what follow_carry() gave.
  const auto convolve = [&](Place at, unsigned char* u_tile, float my_start) {
    const float zero[4] = {};
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      Filter& f = filters[k];
      const int own = warp * kOwn + k;
      uint32_t u[4], u_low[4];
      float x[4][2], q[2][4];
      load_u(u_tile, k, u, u_low);
      end_states(f, u, u_low, x);
      mma_k8(q[0], u[0], u[1], f.local[0].low, zero);
      mma(q[1], u, f.local[1].low, f.local[0].low, zero);
      mma_k8(q[0], u_low[0], u_low[1], f.local[0].high, q[0]);
      mma(q[1], u_low, f.local[1].high, f.local[0].high, q[1]);
      mma_k8(q[0], u[0], u[1], f.local[0].high, q[0]);
      mma(q[1], u, f.local[1].high, f.local[0].high, q[1]);

      // s: the states before this lane's blocks.
      float s[4][2], start[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (kRanked) {
          start[j] = __shfl_sync(~0u, my_start, k * kModes + mode_of(column, j));
          if (row != 0) start[j] = 0.0f;
        } else {
          start[j] = f.carry[j];
        }
      }
      float4 decay[4];
      float after[4];
      load_decay(own, decay);
      scan(decay, x, start, after);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float before = __shfl_sync(~0u, after[j], (lane + 28) % 32);  // row 0: after the tile
        s[j][0] = row == 0 ? start[j] : before;
        s[j][1] = fmaf(decay[j].x, s[j][0], x[j][0]);
        if constexpr (!kRanked) {
          // scan() multiplied the carry by powers that were rounded; this makes up for it.
          f.carry[j] = fmaf(shared.correction[own][mode_of(column, j)], start[j], before);
          if (row != 0) f.carry[j] = 0.0f;
        }
      }
      if (p.saved != nullptr && row % 4 == 0) {
        static_assert(kModalSavedSteps == 4 * 2 * kBlock);
        const int saved = ceil_div(cta.length, kModalSavedSteps);
        const int entry = at.tile * (kTile / kModalSavedSteps) + row / 4;
        float* const to = static_cast<float*>(p.saved) + column +
                          ((int64_t{at.b} * saved + entry) * in.width + cta.channel + own) * kModes;
        if (entry < saved) {
          *reinterpret_cast<float2*>(to) = {s[0][0], s[1][0]};
          *reinterpret_cast<float2*>(to + 8) = {s[2][0], s[3][0]};
        }
      }
      if (at.tile == tiles - 1) {
        const int block = (cta.length - 1) % kTile / kBlock;
        if (row == block / 2) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            shared.last_states[own][mode_of(column, j)] = block % 2 == 0 ? s[j][0] : s[j][1];
          }
        }
        if (lane < kBlock) {
          const unsigned char* const u_at =
              u_tile + u_offset(own, 2 * block + lane / 8) + lane % 8 * sizeof(bf16);
          shared.last_u[own][lane] = load(reinterpret_cast<const bf16*>(u_at)) +
                                     load(reinterpret_cast<const bf16*>(u_at + kPartBytes));
        }
      }

      // q += s reach, the small products first.
      SplitPair a[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        a[j] = split_pair(s[j / 2 * 2][j % 2], s[j / 2 * 2 + 1][j % 2]);
      }
      const auto times = [&](uint32_t SplitPair::*left, uint32_t SplitPair::*right) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          mma(q[half], a[0].*left, a[1].*left, a[2].*left, a[3].*left, f.reach[half][0].*right,
              f.reach[half][1].*right, q[half]);
        }
      };
      times(&SplitPair::low, &SplitPair::high);
      times(&SplitPair::high, &SplitPair::low);
      times(&SplitPair::high, &SplitPair::high);
      __syncwarp();  // all have read u
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          // Eight steps, number 4 row + 2 h + half.
          *reinterpret_cast<uint32_t*>(u_tile + (q_pair ^ (2 * h + half) * 16) +
                                       k * kChannelBytes) =
              pack_pair(q[half][2 * h], q[half][2 * h + 1]);
        }
      }
    }
  };

  // What goes out after the last step of a batch entry: the states of the modes, from the block
  // that it lies in, and the featurizer's.
  const auto store_states = [&](int b) {
    uint32_t thread = threadIdx.x;
    opaque(thread);  // as in Copies
    const int own = static_cast<int>(thread) / kModes, n = static_cast<int>(thread) % kModes;
    const ModalMode mode(in, cta.channel + own, n);
    if (mode.there) {
      const FloatPair pole(mode.exact_power(1));
      float s = shared.last_states[own][n];
      const int steps = (cta.length - 1) % kBlock + 1;
      for (int i = 0; i < steps; ++i) s = recur(pole.high, pole.low, s, shared.last_u[own][i]);
      const int64_t to = (b * in.width + cta.channel + own) * in.modes + n;
      static_cast<float*>(p.state_out)[to] = s;
    }
    if (thread < 3 * kHalo * kChunks) {
      const int third = static_cast<int>(thread) / (kHalo * kChunks);
      const int i = static_cast<int>(thread) / kChunks % kHalo, chunk = thread % kChunks;
      const bf16* from = cta.row(in, b, third, cta.length - kHalo + i);
      const uint4 none = {};
      const uint4 z = from != nullptr ? reinterpret_cast<const uint4*>(from)[chunk] : none;
      bf16* const to = static_cast<bf16*>(p.featurizer_state_out) +
                       ((int64_t{b} * kHalo + i) * 3 + third) * in.width + cta.channel;
      reinterpret_cast<uint4*>(to)[chunk] = z;
    }
  };

  constexpr int kLate = kLag<kRanked>, kAhead = kSlots<kRanked>, kTilesOfU = 2 + kLate;
  copies_wait<kAhead - 1>();
  __syncthreads();
  pre_gate(Run(), 0, shared.u[0]);
  copies_wait<kAhead - 2>();
  __syncthreads();
  const auto after = [](int i, int count) { return i == count - 1 ? 0 : i + 1; };
  int slot = 0, u_slot = 0;  // of the round's tile
  for (int round = 0; round <= rounds + kLate; ++round) {
    // With two slots, the next one is also that of the tile before.
    const int next_slot = after(slot, kAhead), last_slot = after(next_slot, kAhead);
    const int u_next = after(u_slot, kTilesOfU), u_last = after(u_next, kTilesOfU);
    copy(round + kAhead, place_of(round + kAhead), slot, next_slot);
    if constexpr (!kRanked) {
      if (threadIdx.x == 0) {
        const Place last = place_of(round + kAhead);
        const bool over = last.tile == tiles - 1;
        shared.places[(round + kAhead + 1) & (kPlaces - 1)] = {over ? 0 : last.tile + 1,
                                                               over ? last.b + 1 : last.b};
      }
      const Place before = place_of(round - 1);
      if (round > 0 && before.tile == tiles - 1) {
        store_states(before.b);
        if (round < rounds) {
#pragma unroll
          for (int k = 0; k < kOwn; ++k) filters[k].start(in, cta, before.b + 1, warp * kOwn + k);
        }
      }
    }
    const bool convolve_first = warp % 8 >= 4;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      if ((half == 0) == convolve_first) {
        float my_start = 0.0f;
        if constexpr (kRanked) {
          if (round < rounds) publish_ends(round, shared.u[u_slot]);
          if (round > 0 && round <= rounds) my_start = follow_carry(round - 1);
        }
        if (round >= kLate && round < rounds + kLate) {
          convolve(place_of(round - kLate), shared.u[kRanked ? u_last : u_slot], my_start);
        }
      } else {
        // The post-gate frees the u that the pre-gate writes.
        const Run run;
        if (round > kLate) {
          post_gate(run, place_of(round - 1 - kLate), kRanked ? slot : last_slot, shared.u[u_next]);
        }
        if (round + 1 < rounds) pre_gate(run, next_slot, shared.u[u_next]);
      }
    }
    slot = next_slot;
    u_slot = u_next;
    copies_wait<kAhead - 2>();
    __syncthreads();
  }
  if (kRanked && (rounds - 1) * ranks + rank == tiles - 1) store_states(first_b);
}

template <bool kRanked>
Status run(const ModalFwdParams& p, const ModalTensorFwd& plan, cudaStream_t stream) {
  constexpr size_t kBytes = sizeof(Shared<kRanked>);
  const auto kernel = modal_tensor_fwd_kernel<kRanked>;
  const Status allowed = allow_shared_memory(kernel, kBytes);
  if (!allowed.ok()) return allowed;
  const dim3 grid(static_cast<unsigned>(plan.columns * plan.ranks),
                  static_cast<unsigned>(ceil_div<int64_t>(p.in.batch, plan.entries)));
  if (!kRanked) {
    launch_early(kernel, grid, kThreads, kBytes, stream, p, plan);
    return launch_status("tensor");
  }
  const auto mail = static_cast<size_t>(mail_bytes(plan, p.in.batch));
  cudaError_t e = cudaMemsetAsync(p.workspace, 0, mail, stream);  // no message yet
  if (e != cudaSuccess) return {cudaGetErrorString(e)};
  ModalFwdParams params = p;
  ModalTensorFwd shape = plan;
  void* args[] = {&params, &shape};
  e = cudaLaunchCooperativeKernel(kernel, grid, kThreads, args, kBytes, stream);
  if (e != cudaSuccess) return {cudaGetErrorString(e)};
  return launch_status("tensor_ranks");
}

}  // namespace

bool modal_tensor_fwd_runs(const ModalTensorFwd& plan) {
  const size_t bytes = plan.ranks > 1 ? sizeof(Shared<true>) : sizeof(Shared<false>);
  return bytes <= static_cast<size_t>(most_shared_memory());
}

int64_t modal_tensor_fwd_workspace(const ModalInputs& in, const ModalTensorFwd& plan) {
  return mail_bytes(plan, in.batch);
}

Status modal_tensor_fwd(const ModalFwdParams& p, const ModalTensorFwd& plan, cudaStream_t stream) {
  return plan.ranks > 1 ? run<true>(p, plan, stream) : run<false>(p, plan, stream);
}

}  // namespace sarissa::kernels
