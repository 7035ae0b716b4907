// Backward of phalanx on CUDA at the speed of memory. A CTA owns columns of 4 bytes of neighbouring
// channels and a strip of blocks, and marches from right to left in chunks of at most 16 steps. Two
// threads share a column: one of the front, whose warps bring all rows into a ring of shared memory
// and make chunks ready, and one of the back, whose warps make the gradients. So a multiprocessor
// has the rows of a single CTA on their way, which the memory likes, and yet two warps on each of
// its schedulers, of which one computes while the other waits.
//
// With x the whole state w + r v, `arriving` the adjoint that comes from the right (q, the carry's
// adjoint, at the block's end) and T the product of all coefficients since r was 1:
//   x_i = a_i x_(i-1) + u_i      pw_i = dx_i + arriving      arriving <- a_i pw_i
//   a_i da_i = sum_p [ a_i pw_i x_(i-1) - T q v ]     (README.md, with w = x - r v)
// so one state and one adjoint march instead of two each, and nothing is divided by a.
//
// A chunk needs x at its start. Short windows: the front folds each chunk into its end state from
// zero (E) and its product (G); block n starts from the fold of block n - 1. Long windows: the
// forward has saved x at every chunk's start, and T (SwrSaved). A chunk's second half starts from
// the fold of the first.
//
// Heads that share a kv head: a thread owns the same channels of two of them, so that b, c and the
// gate are there once for both, and adds their shares of the gradients of b and c in registers. Of
// four heads two more are kLanes lanes further: those two threads pass each other what they have,
// and one is left with the gradient of c, the other with that of b, both (h0 + h1) + (h2 + h3).
//
// The block to the right of the strip is walked first, for q alone. Steps outside the sequence have
// a = 1 and zeros. Sums over a head's channels are butterflies over its lanes. No atomics.
#include "sarissa/kernels/swr/swr_lanes.cuh"
#include "sarissa/kernels/swr/swr_march.cuh"

namespace sarissa::kernels {
namespace {

/// kGroup heads share a kv head. A thread owns kOwn of them, and kParts threads, kLanes lanes
/// apart, share the columns of b and c. A CTA has kColumns threads to a role.
template <class T, int kLanes, bool kSaved, int kGroup, int kColumns>
struct March {
  static constexpr int V = kSwrMarchBytes / sizeof(T);  // channels of a column
  static constexpr int kOwn = swr_march_own_heads(kGroup);
  static constexpr int kParts = kGroup / kOwn;
  static constexpr int kGateColumns = kColumns / kParts;
  /// A chunk is walked in runs of rows. Unrolled whole, the loops over it, the front's and the
  /// back's, would not fit in the instruction cache, nor the states of two heads in the registers.
  static constexpr int kRuns = 2;
  using Decays = MarchDecays<T, 32 / kLanes * kOwn>;

  /// A chunk of the ring.
  struct alignas(16) Rows {
    Vector<T, V> b[kChunk][kGateColumns], v[kChunk][kOwn * kColumns];
    Vector<T, V> c[kChunk][kGateColumns], dy[kChunk][kOwn * kColumns];
    typename Decays::Shared decays[kColumns / 32];
  };
  struct GatedRows : Rows {
    Vector<float, V> gates[kChunk][kGateColumns];  // sigmoid(b), once for all threads
  };
  using AllRows = std::conditional_t<kParts == 1, Rows, GatedRows>;
  /// What the front makes of a column's rows: end states from zero and products up to the end of
  /// each run, with the last run those of the chunk, E and G. In the place of E is x at the chunk's
  /// start from the back's entry into the block on, or, when saved, from the beginning, and then in
  /// the place of G the block's T.
  struct FoldedRows : AllRows {
    Vector<float, kOwn * V> end_state[kRuns][kColumns];
    Vector<float, kOwn> product[kRuns][kColumns];
  };
  struct SavedRows : FoldedRows {
    Vector<float, kOwn * V> carry[kColumns];  // v, with the last chunk of a block
  };
  using Slot = std::conditional_t<kSaved, SavedRows, FoldedRows>;

  /// Where word i of a warp's row of v or dy lies: with two heads to a thread such that the lanes
  /// meet no bank twice when each reads its first head, or its second.
  __device__ static int place(int i) { return kOwn == 1 ? i : i ^ (i / 32 % 2 * kLanes); }
};

/// Barriers: of all threads between two steps; and, from kPairBarrier on, of a warp of the front
/// and the one of the back that takes the same columns.
enum MarchBarrier { kStepBarrier, kPairBarrier };

/// sigmoid(b) of row i in column `at`: where threads share it, the front has put it into the ring.
template <class T, int kParts, class Slot>
__device__ inline auto input_gate(const Slot& slot, int i, int at) {
  if constexpr (kParts > 1) {
    return slot.gates[i][at];
  } else {
    const auto b = slot.b[i][at];
    constexpr int V = kSwrMarchBytes / sizeof(T);
    Vector<float, V> gate;
#pragma unroll
    for (int k = 0; k < V; ++k) gate.at[k] = sigmoid<T>(b[k]);
    return gate;
  }
}

// kWidth: the channels H P, known when compiled, of one packed row per step, or 0: then all strides
// are constants and the addresses of a chunk's rows cost nothing.
template <class T, int kLanes, bool kSaved, int kGroup, int kWidth, int kColumns>
__global__ void __launch_bounds__(2 * kColumns, 1)
    swr_bwd_march_kernel(SwrBwdParams params, SwrMarch plan) {
  using M = March<T, kLanes, kSaved, kGroup, kColumns>;
  constexpr int V = M::V, kOwn = M::kOwn, kParts = M::kParts;
  constexpr int kRuns = M::kRuns, kRun = kChunk / kRuns, kLastRun = kRuns - 1;
  constexpr int kHeadWidth = kLanes * V;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto* const slots = reinterpret_cast<typename M::Slot*>(shared_bytes);
  const SwrInputs& in = params.in;
  const bool is_front = threadIdx.x >= kColumns;
  const int tid = threadIdx.x % kColumns, lane = tid % 32, warp = tid / 32;
  const int64_t column = blockIdx.x % plan.ctas;
  const int64_t strip = blockIdx.x / plan.ctas % plan.strips;
  const int64_t row = blockIdx.x / plan.ctas / plan.strips;

  // Without a given index the grid of blocks is known before anything is read.
  const bool early = in.index == nullptr;
  if (!early) wait_for_earlier_kernels();
  const SwrGrid wide_grid = swr_grid(in, row);
  const Grid grid(wide_grid);
  const bool last_complete = wide_grid.last_block_complete();
  const int blocks = static_cast<int>(wide_grid.blocks());
  const int first = static_cast<int>(strip * plan.strip_blocks);
  if (first >= blocks) return;
  const int end = static_cast<int>(min(first + plan.strip_blocks, int64_t{blocks}));
  const int warm = kSaved || first == 0 ? first : first - 1;  // the last block whose b, v are read
  const int K = plan.chunks_per_block;

  // A warp's words of b: kGateWords; of v: kGroup to each. Columns beyond the channels repeat the
  // last ones, and nothing is stored for them.
  constexpr int kGateWords = 32 / kParts, kWords = 32 * kOwn;
  const int64_t slice = column * (kColumns / 32) + warp;
  const int64_t channels = in.heads * in.width, gate_channels = in.kv_heads * in.width;
  struct Column {
    bool active;
    int64_t gate_channel, h, p;
  };
  // The channels of word `gate_word` of b, of its kv head's head `member`.
  const auto column_of = [&](int gate_word, int member) {
    int64_t gate_channel = (slice * kGateWords + gate_word) * V;
    const bool active = gate_channel < gate_channels;
    if (!active) gate_channel = gate_channels - in.width + gate_channel % in.width;
    return Column{active, gate_channel, gate_channel / in.width * kGroup + member,
                  gate_channel % in.width};
  };
  // The same of word `word` of v.
  const auto column_of_word = [&](int word) {
    if constexpr (kGroup == 1) return column_of(word, 0);
    return column_of(word / (kGroup * kLanes) * kLanes + word % kLanes, word / kLanes % kGroup);
  };
  // The thread's words of b, and of v and dy for its heads; its first head among the warp's.
  const int part = kParts == 1 ? 0 : lane / kLanes % kParts;
  const int gate_word = kParts == 1 ? lane : lane / (kParts * kLanes) * kLanes + lane % kLanes;
  const int gate_at = kParts == 1 ? tid : warp * kGateWords + gate_word;
  const int my_head = lane / kLanes * kOwn;
  const int word = kOwn == 1 ? lane : my_head * kLanes + lane % kLanes;
  int at[kOwn];
#pragma unroll
  for (int m = 0; m < kOwn; ++m) {
    at[m] = kOwn == 1 ? tid : warp * kWords + M::place(word + m * kLanes);
  }
  constexpr int64_t kGates = kWidth / kGroup;
  constexpr int64_t kRow = kWidth / kHeadWidth + 2 * kGates + kWidth;
  // Whether v follows c at the same place.
  constexpr bool kPackedV = kWidth > 0 && kGroup == 1;
  // Whether every row of a chunk exists; its block is not beyond the strip's.
  const bool full_chunks =
      grid.window % kChunk == 0 && (column + 1) * M::kGateColumns * V <= gate_channels;
  const auto is_full = [&](const Cursor& chunk) {
    return full_chunks && (chunk.n > 0 || grid.index == 0) &&
           (chunk.n < blocks - 1 || (chunk.n == blocks - 1 && last_complete));
  };

  // In a step the front takes chunk number `step`, counted from the right, and the back the one
  // `lag` chunks before it: on entering a block it needs the folds of that and of the one to its
  // left.
  const int lag = kSaved ? 1 : 2 * K;
  const int steps = lag + (end - first + 1) * K;
  const Cursor rightmost{end, K - 1, plan.slots - 1};

  // Between two steps the back waits for what the front has made ready, and the front for slots
  // that the back has left. With saved states it is faster to let the pairs of warps go their way,
  // but not far: a row's parts should be read and written at about the same time.
  const auto meet_step = [&](int step) {
    constexpr int kMeetAll = kSaved ? 16 : 1;
    if (step % kMeetAll == 0) {
      meet<2 * kColumns>(kStepBarrier);
    } else {
      meet<2 * 32>(kPairBarrier + warp);
    }
  };

  // Calls run(m, k) for channel k of head m of the thread's.
  const auto for_own = [](const auto& run) {
#pragma unroll
    for (int m = 0; m < kOwn; ++m) {
#pragma unroll
      for (int k = 0; k < V; ++k) run(m, k);
    }
  };
  const auto pack = [&](const float(&x)[kOwn][V]) {
    Vector<float, kOwn * V> packed;
    for_own([&](int m, int k) { packed.at[m * V + k] = x[m][k]; });
    return packed;
  };

  if (is_front) {
    const int64_t gate_step = kWidth > 0 ? kRow : in.gate_step;
    const int64_t v_step = kWidth > 0 ? kRow : in.u_step;
    const int64_t dy_step = kWidth > 0 ? kWidth : params.dx_step;
    // Rows aligned to 16 bytes are copied in units of 16, by a warp's lanes for each other, several
    // rows at once; otherwise in words, several gate rows at once, but v and dy head by head.
    const bool wide = kWidth > 0 || plan.wide;
    constexpr int kUnit = 16 / kSwrMarchBytes;                               // words
    constexpr int kUnits = kWords / kUnit, kGateUnits = kGateWords / kUnit;  // of a row
    const int unit_row = wide ? lane / kUnits : 0;
    const int unit_word = wide ? lane % kUnits * kUnit : word;
    const int unit_at = warp * kWords + M::place(unit_word);
    const int gate_unit_row = wide ? lane / kGateUnits : lane / kGateWords;
    const int gate_unit_at =
        warp * kGateWords + (wide ? lane % kGateUnits * kUnit : lane % kGateWords);
    const Column unit = column_of_word(unit_word);
    const Column gate_unit = kGroup == 1 ? unit : column_of(gate_unit_at - warp * kGateWords, 0);
    const SwrChannel<T, true> at_unit(in, row, unit.h, unit.p);
    const SwrChannel<T, true> at_gate_unit(in, row, gate_unit.h, gate_unit.p);
    const T* const b_in = at_gate_unit.b;
    const T* const c_in = kWidth > 0 ? b_in + kGates : at_gate_unit.c;
    const T* const v_in = kPackedV ? b_in + 2 * kWidth : at_unit.u;
    const T* const dy_in =
        static_cast<const T*>(params.dx) + row * params.dx_batch + unit.h * params.dx_head + unit.p;
    // Copies a chunk, or asks the L2 cache for it.
    const auto bring_units = [&]<int kBytes, bool kInside, bool kPrefetch>(const Cursor& chunk) {
      constexpr bool kWide = kBytes == 16;
      constexpr int kTogether = kWide ? 32 / kUnits : 1;
      constexpr int kGateTogether = 32 / (kWide ? kGateUnits : kGateWords);
      const Rows rows(grid, chunk);
      const bool folded = chunk.n < end && chunk.n >= warm, walked = chunk.n >= first;
      auto& slot = slots[chunk.slot];
      const int64_t t = rows.t0 + unit_row, gate_t = rows.t0 + gate_unit_row;
      const T *b = b_in + gate_t * gate_step, *c = c_in + gate_t * gate_step;
      const T *v = v_in + t * v_step, *dy = dy_in + t * dy_step;
      const auto bring_unit = [](void* to, const T* from, bool good) {
        if constexpr (kPrefetch) {
          prefetch(from, good);
        } else {
          copy_async<kBytes>(to, from, good);
        }
      };
#pragma unroll
      for (int k = 0; k < kChunk; k += kTogether) {
        if (k % kGateTogether == 0) {
          const int i = k + gate_unit_row;
          bring_unit(&slot.b[i][gate_unit_at], b, kInside || (folded && rows.has(i)));
          bring_unit(&slot.c[i][gate_unit_at], c, kInside || (walked && rows.has(i)));
          b += kGateTogether * gate_step;
          c += kGateTogether * gate_step;
        }
        const int i = k + unit_row;
#pragma unroll
        for (int m = 0; m < (kWide ? 1 : kOwn); ++m) {
          const int to = kWide ? unit_at : at[m];
          bring_unit(&slot.v[i][to], v + m * in.u_head, kInside || (folded && rows.has(i)));
          bring_unit(&slot.dy[i][to], dy + m * params.dx_head, kInside || (walked && rows.has(i)));
        }
        v += kTogether * v_step;
        dy += kTogether * dy_step;
      }
    };
    const auto bring = [&]<bool kInside, bool kPrefetch = false>(const Cursor& chunk) {
      if (wide) {
        bring_units.template operator()<16, kInside, kPrefetch>(chunk);
      } else if constexpr (kWidth == 0) {
        bring_units.template operator()<kSwrMarchBytes, kInside, kPrefetch>(chunk);
      }
    };

    Cursor front = rightmost, copied = rightmost;
    copied.retreat(plan);
    if (early) {
      bring.template operator()<false, true>(front);
      bring.template operator()<false, true>(copied);
      wait_for_earlier_kernels();
    }
    bring.template operator()<false>(front);
    copies_commit();
    typename M::Decays decays(in, grid, row, slice * kGateWords * V / in.width * kGroup);
    decays.template fetch<false>(front);

    // What the forward saved for a chunk, fetched a step before it is needed: x at its start, and
    // of the last chunk of a block the block's v and T.
    [[maybe_unused]] Vector<float, kOwn * V> start{}, carry{};
    [[maybe_unused]] Vector<float, kOwn> product{};
    const Column own = column_of(gate_word, part * kOwn);
    const auto fetch_saved = [&](const Cursor& chunk) {
      if (!kSaved || chunk.n < first || chunk.n >= end) return;
      const SwrSaved& saved = params.saved;
      const auto state = [&](int chunk, auto& to) {
        const float* const from = static_cast<const float*>(saved.states) +
                                  (row * saved.chunks + chunk) * channels + own.h * in.width +
                                  own.p;
#pragma unroll
        for (int m = 0; m < kOwn; ++m) {
          const auto x = load_vector<float, V>(from + m * kHeadWidth);
#pragma unroll
          for (int k = 0; k < V; ++k) to.at[m * V + k] = x[k];
        }
      };
      state(chunk.n * K + chunk.j, start);
      if (chunk.j < K - 1) return;
#pragma unroll
      for (int m = 0; m < kOwn; ++m) {
        product.at[m] = static_cast<const float*>(
            saved.products)[(row * plan.max_blocks + chunk.n) * in.heads + own.h + m];
      }
      if (chunk.n > 0) {
        state(chunk.n * K, carry);
      } else {
        for_own([&](int m, int k) {
          carry.at[m * V + k] = SwrStart<float>(in, row, own.h + m, own.p + k).v;
        });
      }
    };

    // Up to the end of each run the end state from zero and the product. When saved, those of the
    // whole chunk are not needed.
    const auto fold = [&](auto& slot) {
      float w[kOwn][V] = {}, r[kOwn];
#pragma unroll
      for (int m = 0; m < kOwn; ++m) r[m] = 1.0f;
#pragma unroll 1
      for (int run = 0; run < (kSaved ? kLastRun : kRuns); ++run) {
#pragma unroll
        for (int k = 0; k < kRun; ++k) {
          const int i = run * kRun + k;
          const auto a = load_vector<float, kOwn>(&slot.decays[warp][i][my_head]);
          const auto gate = input_gate<T, kParts>(slot, i, gate_at);
#pragma unroll
          for (int m = 0; m < kOwn; ++m) {
            const Vector<T, V> v = slot.v[i][at[m]];
            r[m] *= a[m];
#pragma unroll
            for (int k = 0; k < V; ++k) w[m][k] = a[m] * w[m][k] + gate[k] * v[k];
          }
        }
        slot.end_state[run][tid] = pack(w);
        slot.product[run][tid].set(r);
      }
    };
    const auto front_step = [&]<bool kInside>() {
      if (kInside || copied.n >= warm) bring.template operator()<kInside>(copied);
      copies_commit();
      copied.retreat(plan);
      auto& slot = slots[front.slot];
      if (kInside || front.n >= warm) {
        decays.template share<kInside>(front, slot.decays[warp]);
      }
      if constexpr (kSaved) {
        slot.end_state[kLastRun][tid] = start;
        slot.product[kLastRun][tid] = product;
        slot.carry[tid] = carry;
      }
      Cursor next = front;
      next.retreat(plan);
      if (kInside || next.n >= warm) decays.template fetch<kInside>(next);
      fetch_saved(next);
      copies_wait<kSwrMarchAhead>();
      __syncwarp();  // other lanes' copies are there too
      if (kInside || (warm <= front.n && front.n < end)) {
        if constexpr (kParts > 1) {
#pragma unroll
          for (int k = 0; k < kChunk; k += kParts) {
            const Vector<T, V> b = slot.b[k + part][gate_at];
            float gate[V];
#pragma unroll
            for (int j = 0; j < V; ++j) gate[j] = sigmoid<T>(b[j]);
            slot.gates[k + part][gate_at].set(gate);
          }
          __syncwarp();
        }
        fold(slot);
      }
      front = next;
    };
    for (int step = 0; step < steps; ++step) {
      meet_step(step);
      if (front.n < end && is_full(front) && copied.n >= first && is_full(copied)) {
        front_step.template operator()<true>();
      } else {
        front_step.template operator()<false>();
      }
    }
    return;
  }

  if (early) wait_for_earlier_kernels();
  const auto [active, gate_channel, h, p] = column_of(gate_word, part * kOwn);
  const int64_t channel = h * in.width + p;
  const int64_t dgate_step = kWidth > 0 ? kRow : params.dgate_step;
  const int64_t dv_step = kWidth > 0 ? kRow : params.du_step;
  const int64_t out_row = row * in.length;
  T* const da = static_cast<T*>(params.da) + out_row * params.da_step + h;
  T* const db = static_cast<T*>(params.db) + out_row * dgate_step + gate_channel;
  T* const dc =
      kWidth > 0 ? db + kGates : static_cast<T*>(params.dc) + out_row * dgate_step + gate_channel;
  T* const dv =
      kPackedV ? db + 2 * kWidth : static_cast<T*>(params.du) + out_row * dv_step + channel;
  // Of two threads that share columns of b and c one stores dc and the other db.
  T* const dgate = part == 0 ? dc : db;
  const float inverse_decay_max = 1.0f / static_cast<float>(in.decay_max);
  const auto read = [](const void* x, int64_t i) {
    return x != nullptr ? static_cast<const float*>(x)[i] : 0.0f;
  };
  const int64_t head = row * in.heads + h;    // the thread's first
  const int64_t state = head * in.width + p;  // of the thread's first channel

  const auto state_of = [&](int m, int k) { return state + m * kHeadWidth + k; };
  float x_start[kOwn][V];  // x at the start of the chunk that is walked
  float q[kOwn][V] = {}, arriving[kOwn][V] = {};
  float product[kOwn];  // of the block's coefficients: all (folded), or those walked (saved)
  float Tqv[kOwn] = {};
#pragma unroll
  for (int m = 0; m < kOwn; ++m) product[m] = 1.0f;
  Cursor back = rightmost;

  // The halo: only its adjoint.
  const auto halo_step = [&] {
    const auto& slot = slots[back.slot];
#pragma unroll
    for (int i = kChunk - 1; i >= 0; --i) {
      const Vector<float, kOwn> a = load_vector<float, kOwn>(&slot.decays[warp][i][my_head]);
      const Vector<T, V> c = slot.c[i][gate_at];
#pragma unroll
      for (int m = 0; m < kOwn; ++m) {
        const Vector<T, V> dy = slot.dy[i][at[m]];
#pragma unroll
        for (int k = 0; k < V; ++k) arriving[m][k] = a[m] * (dy[k] * c[k] + arriving[m][k]);
      }
    }
  };
  // From the sums of pw x of a run, which starts at row `from`, to gradients of the logits.
  const auto store_da = [&]<bool kInside>(const Rows& rows, int from, auto& sums) {
    constexpr int kRows = kLanes < kRun ? kRun / kLanes : 1;
    constexpr int kSame = kLanes < kRun ? 1 : kLanes / kRun;  // lanes that hold the same row
#pragma unroll
    for (int m = 0; m < kOwn; ++m) {
      const int begin = from + reduce_scatter<kLanes, kRun>(sums[m], lane);
      if ((kInside || active) && lane % kSame == 0) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (kInside || rows.has(begin + i)) {
            const float a = slots[back.slot].decays[warp][begin + i][my_head + m];
            store(da + (rows.t0 + begin + i) * params.da_step + m,
                  (1.0f - a * inverse_decay_max) * (a * sums[m][i] - Tqv[m]));
          }
        }
      }
    }
  };
  // The gradients of a chunk.
  const auto back_step = [&]<bool kInside>() {
    const Rows rows(grid, back);
    const auto& slot = slots[back.slot];
    const int64_t last_row = rows.t0 + kChunk - 1;
    T* db_i = db + last_row * dgate_step;
    T* dc_i = kWidth > 0 ? db_i + kGates : dc + last_row * dgate_step;
    T* dv_i = kPackedV ? db_i + 2 * kWidth : dv + last_row * dv_step;
    T* dgate_i = dgate + last_row * dgate_step;
#pragma unroll 1
    for (int run = kLastRun; run >= 0; --run) {
      const int from = run * kRun;
      float x[kOwn][kRun + 1][V], share[kOwn][kRun];
      Vector<float, V> gates[kRun];
      for_own([&](int m, int k) { x[m][0][k] = x_start[m][k]; });
      if (run > 0) {
        const auto E = slot.end_state[run - 1][tid];
        const auto G = slot.product[run - 1][tid];
        for_own([&](int m, int k) { x[m][0][k] = G[m] * x_start[m][k] + E[m * V + k]; });
      }
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const auto a = load_vector<float, kOwn>(&slot.decays[warp][from + i][my_head]);
        gates[i] = input_gate<T, kParts>(slot, from + i, gate_at);
#pragma unroll
        for (int m = 0; m < kOwn; ++m) {
          const Vector<T, V> v_in = slot.v[from + i][at[m]];
          if constexpr (kSaved) product[m] *= a[m];
#pragma unroll
          for (int k = 0; k < V; ++k) x[m][i + 1][k] = a[m] * x[m][i][k] + gates[i][k] * v_in[k];
        }
      }
#pragma unroll
      for (int i = kRun - 1; i >= 0; --i) {
        const bool good = kInside || (active && rows.has(from + i));
        const auto a = load_vector<float, kOwn>(&slot.decays[warp][from + i][my_head]);
        const Vector<T, V> c_in = slot.c[from + i][gate_at];
        float dci[V] = {}, dbi[V] = {};
#pragma unroll
        for (int m = 0; m < kOwn; ++m) {
          const Vector<T, V> v_in = slot.v[from + i][at[m]], dy = slot.dy[from + i][at[m]];
          float dvi[V];
          float& sum = share[m][i] = 0.0f;
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const float g = dy[k], gate = gates[i][k];
            const float pw = g * c_in[k] + arriving[m][k];
            arriving[m][k] = a[m] * pw;
            sum += pw * x[m][i][k];
            dvi[k] = g + pw * gate;
            dci[k] += g * x[m][i + 1][k];
            dbi[k] += pw * v_in[k];
          }
          if (good) store_vector<T, V>(dv_i + m * kHeadWidth, dvi);
        }
#pragma unroll
        for (int k = 0; k < V; ++k) dbi[k] *= gates[i][k] - gates[i][k] * gates[i][k];
        if constexpr (kParts == 1) {
          if (good) {
            store_vector<T, V>(dc_i, dci);
            store_vector<T, V>(db_i, dbi);
          }
        } else {
          float sums[V];
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const float sent = part == 0 ? dbi[k] : dci[k], kept = part == 0 ? dci[k] : dbi[k];
            sums[k] = kept + __shfl_xor_sync(~0u, sent, kLanes);
          }
          if (good) store_vector<T, V>(dgate_i, sums);
        }
        dc_i -= dgate_step;
        db_i -= dgate_step;
        dgate_i -= dgate_step;
        dv_i -= dv_step;
      }
      store_da.template operator()<kInside>(rows, from, share);
    }
  };

  for (int step = 0; step < lag; ++step) meet_step(step);
  for (int step = lag; step < steps; ++step) {
    meet_step(step);
    const bool real = back.n < end;
    if (real && back.j == K - 1) {  // enter a block from the right
      float v[kOwn][V], T_block[kOwn], qv[kOwn] = {};
      if (back.n == blocks - 1) {  // nothing to its right but the state after the last step
        for_own([&](int m, int k) {
          q[m][k] = read(last_complete ? params.dv_out : params.dw_out, state_of(m, k));
        });
        if (!last_complete && lane % kLanes == 0) {
#pragma unroll
          for (int m = 0; m < kOwn; ++m) qv[m] = -read(params.dr_out, head + m);
        }
      }
      if constexpr (kSaved) {
        const auto carry = slots[back.slot].carry[tid];
        const auto T_saved = slots[back.slot].product[kLastRun][tid];
#pragma unroll
        for (int m = 0; m < kOwn; ++m) {
          T_block[m] = T_saved[m];
          product[m] = 1.0f;
        }
        for_own([&](int m, int k) { v[m][k] = carry[m * V + k]; });
      } else {
        // The slot `chunks` before one, and after it the next.
        const auto before = [&](int slot, int chunks) {
          return slot < chunks ? slot - chunks + plan.slots : slot - chunks;
        };
        const auto after = [&](int slot) { return slot + 1 == plan.slots ? 0 : slot + 1; };
        int at_slot = before(back.slot, K - 1);
#pragma unroll
        for (int m = 0; m < kOwn; ++m) T_block[m] = product[m] = 1.0f;
        if (back.n == 0) {
          for_own([&](int m, int k) {
            const SwrStart<float> start(in, row, h + m, p + k);
            T_block[m] = start.r;
            v[m][k] = start.v;
            x_start[m][k] = start.w + start.r * start.v;
          });
        } else {
          for_own([&](int m, int k) {
            v[m][k] = back.n == 1 ? SwrStart<float>(in, row, h + m, p + k).w : 0.0f;
          });
          int left = before(at_slot, K);
#pragma unroll 1
          for (int j = 0; j < K; ++j) {
            const auto E = slots[left].end_state[kLastRun][tid];
            const auto G = slots[left].product[kLastRun][tid];
            for_own([&](int m, int k) { v[m][k] = G[m] * v[m][k] + E[m * V + k]; });
            left = after(left);
          }
          for_own([&](int m, int k) { x_start[m][k] = v[m][k]; });
        }
#pragma unroll 1
        for (int j = 0; j < K - 1; ++j) {
          auto& slot = slots[at_slot];
          const auto E = slot.end_state[kLastRun][tid];
          const auto G = slot.product[kLastRun][tid];
          slot.end_state[kLastRun][tid] = pack(x_start);
          for_own([&](int m, int k) { x_start[m][k] = G[m] * x_start[m][k] + E[m * V + k]; });
#pragma unroll
          for (int m = 0; m < kOwn; ++m) product[m] *= G[m];
          at_slot = after(at_slot);
        }
        const auto G = slots[back.slot].product[kLastRun][tid];
#pragma unroll
        for (int m = 0; m < kOwn; ++m) {
          product[m] *= G[m];
          T_block[m] *= product[m];
        }
      }
      for_own([&](int m, int k) {
        arriving[m][k] = q[m][k];
        qv[m] += q[m][k] * v[m][k];
      });
#pragma unroll
      for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
#pragma unroll
        for (int m = 0; m < kOwn; ++m) qv[m] += __shfl_xor_sync(~0u, qv[m], lanes);
      }
#pragma unroll
      for (int m = 0; m < kOwn; ++m) Tqv[m] = T_block[m] * qv[m];
    }
    if (real && (kSaved || back.j < K - 1)) {
      const auto x = slots[back.slot].end_state[kLastRun][tid];
      for_own([&](int m, int k) { x_start[m][k] = x[m * V + k]; });
    }

    if (!real) {
      halo_step();
    } else if (is_full(back)) {
      back_step.template operator()<true>();
    } else {
      back_step.template operator()<false>();
    }
    if (back.j == 0 && (back.n > first || !real)) {  // leave the block to the left
      // The v of an incomplete last block leaves with the state after the last step.
      const bool passes_v = back.n == blocks - 1 && !last_complete;
      for_own([&](int m, int k) {
        q[m][k] = arriving[m][k] - product[m] * q[m][k] +
                  (passes_v ? read(params.dv_out, state_of(m, k)) : 0.0f);
        arriving[m][k] = 0.0f;
      });
    }
    back.retreat(plan);
  }

  if (first > 0) return;
  // From the adjoints before the first step to the gradients of the given state.
  const bool open_end = blocks == 1 && !last_complete;
#pragma unroll
  for (int m = 0; m < kOwn; ++m) {
    float dr = open_end && lane % kLanes == 0 ? product[m] * read(params.dr_out, head + m) : 0.0f;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const SwrStart<float> start(in, row, h + m, p + k);
      const float carry = arriving[m][k] - product[m] * q[m][k];  // the adjoint of r v
      dr += carry * start.v;
      if (active) {
        static_cast<float*>(params.dw)[state_of(m, k)] = arriving[m][k];
        static_cast<float*>(params.dv)[state_of(m, k)] =
            start.r * carry + (open_end ? read(params.dv_out, state_of(m, k)) : 0.0f);
      }
    }
    reduce_scatter<kLanes, 1>(&dr, lane);
    if (active && lane % kLanes == 0) static_cast<float*>(params.dr)[head + m] = dr;
  }
}

// Whether all rows can be copied in units of 16 bytes.
template <class T>
bool units_fit(const SwrBwdParams& params) {
  const SwrInputs& in = params.in;
  constexpr int kUnit = 16 / sizeof(T);
  return vector_aligned<T, kUnit>(in.b, {in.gate_batch, in.gate_step, in.width}) &&
         vector_aligned<T, kUnit>(in.c, {}) &&
         vector_aligned<T, kUnit>(in.u, {in.u_batch, in.u_step, in.u_head}) &&
         vector_aligned<T, kUnit>(params.dx, {params.dx_batch, params.dx_step, params.dx_head});
}

// Whether inputs and gradients are packed rows [a: H | b: K P | c: K P | v: H P] for K kv heads
// with nothing between, as phalanx's projection writes them, and copied in units of 16 bytes.
template <class T>
bool packed(const SwrBwdParams& params) {
  const SwrInputs& in = params.in;
  const int64_t channels = in.heads * in.width, gates = in.kv_heads * in.width;
  const int64_t row = in.heads + 2 * gates + channels;
  const auto follow = [&](const void* b, const void* c, const void* v) {
    return static_cast<const T*>(c) == static_cast<const T*>(b) + gates &&
           static_cast<const T*>(v) == static_cast<const T*>(b) + 2 * gates;
  };
  return in.gate_step == row && in.u_step == row && params.dgate_step == row &&
         params.du_step == row && params.dx_step == channels && in.u_head == in.width &&
         params.dx_head == in.width && follow(in.b, in.c, in.u) && units_fit<T>(params) &&
         follow(params.db, params.dc, params.du);
}

/// Shared memory of the ring for a chunk, per column.
template <class T, int kLanes, bool kSaved, int kGroup>
constexpr int64_t kSlotBytesPerColumn =
    sizeof(typename March<T, kLanes, kSaved, kGroup, 32>::Slot) / 32;

template <class T, int kLanes, bool kSaved, int kGroup, int kWidth, int kColumns>
Status launch(const SwrBwdParams& params, SwrMarch plan, cudaStream_t stream) {
  const auto kernel = swr_bwd_march_kernel<T, kLanes, kSaved, kGroup, kWidth, kColumns>;
  plan.wide = kWidth > 0 || units_fit<T>(params);
  using Slot = typename March<T, kLanes, kSaved, kGroup, kColumns>::Slot;
  static_assert(sizeof(Slot) == kSlotBytesPerColumn<T, kLanes, kSaved, kGroup> * kColumns);
  const size_t bytes = alone_on_multiprocessor(plan.slots * sizeof(Slot));
  const auto ctas = static_cast<unsigned>(plan.ctas * plan.strips * params.in.batch);
  const Status allowed = allow_shared_memory(kernel, bytes);
  if (!allowed.ok()) return allowed;
  launch_early(kernel, dim3(ctas), 2 * kColumns, bytes, stream, params, plan);
  return launch_status(kSaved ? (kWidth > 0 ? "march_saved_packed" : "march_saved")
                              : (kWidth > 0 ? "march_folded_packed" : "march_folded"));
}

template <class T, int kLanes, bool kSaved, int kGroup>
Status launch_group(const SwrBwdParams& params, cudaStream_t stream) {
  const SwrInputs& in = params.in;
  const SwrMarch plan =
      swr_march_plan(in.batch, in.length, in.heads, in.kv_heads, in.width, in.window, sizeof(T),
                     kSlotBytesPerColumn<T, kLanes, kSaved, kGroup>, multiprocessors(),
                     most_shared_memory(), in.index == nullptr);
  if (plan.columns == 64) return launch<T, kLanes, kSaved, kGroup, 0, 64>(params, plan, stream);
  if constexpr (kLanes * (kSwrMarchBytes / sizeof(T)) == 16 && sizeof(T) == 2) {
    if (packed<T>(params)) {
      switch (in.heads * in.width) {
        case 1024:
          return launch<T, kLanes, kSaved, kGroup, 1024, 128>(params, plan, stream);
        case 2048:
          return launch<T, kLanes, kSaved, kGroup, 2048, 128>(params, plan, stream);
        case 4096:
          return launch<T, kLanes, kSaved, kGroup, 4096, 128>(params, plan, stream);
      }
    }
  }
  return launch<T, kLanes, kSaved, kGroup, 0, 128>(params, plan, stream);
}

/// Calls run.template operator()<kGroup>() for the heads that share a kv head.
template <class T, int kLanes, class Run>
Status with_group(const SwrInputs& in, const Run& run) {
  if constexpr (kLanes * (kSwrMarchBytes / sizeof(T)) == 16) {
    const int64_t group = in.heads / in.kv_heads;
    if (group == 2) return run.template operator()<2>();
    if (group == 4) return run.template operator()<4>();
  }
  return run.template operator()<1>();
}

}  // namespace

bool swr_bwd_march_fits(const SwrBwdParams& params, DType dtype) {
  const SwrInputs& in = params.in;
  const int64_t group = in.heads / in.kv_heads;
  if (!swr_lanes_fit(in, dtype) || in.window < kSwrMarchMinWindow || in.length > kSwrMarchLength ||
      !(group == 1 || (in.width == 16 && (group == 2 || group == 4))) ||
      !swr_lane_gradients_fit(params, dtype)) {
    return false;
  }
  if (swr_saves(in.window) &&
      (params.saved.states == nullptr || !vector_aligned<float, 2>(params.saved.states, {}))) {
    return false;
  }
  bool fits = false;  // in shared memory
  swr_with_lanes(in, dtype, [&]<class T, int kLanes>() {
    return with_group<T, kLanes>(in, [&]<int kGroup>() -> Status {
      const int64_t slot_bytes = swr_saves(in.window)
                                     ? kSlotBytesPerColumn<T, kLanes, true, kGroup>
                                     : kSlotBytesPerColumn<T, kLanes, false, kGroup>;
      fits = swr_march_columns(swr_march_all_columns(in.heads * in.width, group, sizeof(T)),
                               in.window, slot_bytes, most_shared_memory()) > 0;
      return {};
    });
  });
  return fits;
}

Status swr_bwd_march(const SwrBwdParams& params, DType dtype, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return swr_with_lanes(params.in, dtype, [&]<class T, int kLanes>() {
    return with_group<T, kLanes>(params.in, [&]<int kGroup>() {
      return swr_saves(params.in.window) ? launch_group<T, kLanes, true, kGroup>(params, s)
                                         : launch_group<T, kLanes, false, kGroup>(params, s);
    });
  });
}

}  // namespace sarissa::kernels
