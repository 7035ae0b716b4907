// Backward of phalanx on CUDA at the speed of memory. A thread owns 4 bytes of neighbouring
// channels and a strip of blocks, and marches from right to left in chunks of at most 16 steps. b
// and v come through a ring of shared memory that only its warp uses, c and dy through registers
// or, where nothing is folded and rows are packed, through the ring too.
//
// With x the whole state w + r v, `arriving` the adjoint that comes from the right (q, the carry's
// adjoint, at the block's end) and T the product of all coefficients since r was 1:
//   x_i = a_i x_(i-1) + u_i      pw_i = dx_i + arriving      arriving <- a_i pw_i
//   a_i da_i = sum_p [ a_i pw_i x_(i-1) - T q v ]     (README.md, with w = x - r v)
// so one state and one adjoint march instead of two each, and nothing is divided by a.
//
// A chunk needs x at its start. Short windows: a second cursor, the front, runs ahead of the back
// that makes the gradients and folds each chunk into its end state from zero (E) and its product
// (G); block n starts from the fold of block n - 1. Long windows: the forward has saved x at every
// chunk's start, and T (SwrSaved).
//
// The block to the right of the strip is walked first, for q alone. Steps outside the sequence have
// a = 1 and zeros. Sums over a head's channels are butterflies over its lanes. No atomics.
#include "sarissa/kernels/swr/swr_lanes.cuh"
#include "sarissa/kernels/swr/swr_march.cuh"

namespace sarissa::kernels {
namespace {

/// kLanes neighbouring lanes own a head.
template <class T, int kLanes, bool kSaved, int kGroup, int kWidth>
struct March {
  static constexpr int V = kSwrMarchBytes / sizeof(T);  // channels of a thread
  static constexpr int kHeads = 32 / kLanes;            // heads of a warp

  /// Whether all rows come through the ring, and what follows. Then registers hold the gates in
  /// place of c and dy, and a CTA that has its multiprocessor to itself keeps up with the memory,
  /// which likes the fewer rows on their way. Folding is too much work for that: it wants two CTAs,
  /// the most that registers, and shared memory at 6 slots, allow.
  static constexpr bool kAllInRing = kSaved && kWidth > 0;
  static constexpr int kCtas = kAllInRing ? 1 : 2;  // on a multiprocessor
  static constexpr int kAhead = kAllInRing ? 1 : kSwrMarchAhead;

  /// A chunk of the ring; thread i reads only column i.
  struct alignas(16) Rows {
    Vector<T, V> b[kChunk][kSwrThreads], v[kChunk][kSwrThreads];
  };
  struct AllRows : Rows {
    Vector<T, V> c[kChunk][kSwrThreads], dy[kChunk][kSwrThreads];
  };
  struct FoldedRows : Rows {
    float end_state[V][kSwrThreads];  // E; from the back's entry into the block on: x at its start
    float product[kSwrThreads];       // G
  };
  using Slot =
      std::conditional_t<kAllInRing, AllRows, std::conditional_t<kSaved, Rows, FoldedRows>>;
  using Decays = MarchDecays<T, kHeads>;
  /// Gradients of b and c of a chunk from the heads that share them.
  struct Shares {
    float db[kChunk][V][kSwrThreads], dc[kChunk][V][kSwrThreads];
  };
  struct NoShares {};
  struct Shared {
    typename Decays::Shared front[kSwrThreads / 32], back[kSwrThreads / 32];
    std::conditional_t<(kGroup > 1), Shares, NoShares> shares;
    Slot slots[1];  // plan.slots of them
  };
};

// kGroup: heads that share a kv head; they are at the same lanes of neighbouring warps, which add
// their gradients of b and c in shared memory, in head order. kWidth: the channels H P, known when
// compiled, of one packed row per step, or 0: then all strides are constants and the addresses of a
// chunk's rows cost nothing.
template <class T, int kLanes, bool kSaved, int kGroup, int kWidth>
__global__ void __launch_bounds__(kSwrThreads)
    swr_bwd_march_kernel(SwrBwdParams params, SwrMarch plan) {
  using M = March<T, kLanes, kSaved, kGroup, kWidth>;
  constexpr int V = M::V, kAhead = M::kAhead;
  constexpr bool kAllInRing = M::kAllInRing;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename M::Shared*>(shared_bytes);
  const SwrInputs& in = params.in;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int64_t column = blockIdx.x % plan.columns;
  const int64_t strip = blockIdx.x / plan.columns % plan.strips;
  const int64_t row = blockIdx.x / plan.columns / plan.strips;

  wait_for_earlier_kernels();
  const SwrGrid wide_grid = swr_grid(in, row);
  const Grid grid(wide_grid);
  const bool last_complete = wide_grid.last_block_complete();
  const int blocks = static_cast<int>(wide_grid.blocks());
  const int first = static_cast<int>(strip * plan.strip_blocks);
  if (first >= blocks) return;
  const int end = static_cast<int>(min(first + plan.strip_blocks, int64_t{blocks}));
  const int warm = kSaved || first == 0 ? first : first - 1;  // the last block whose b, v are read
  const int K = plan.chunks_per_block;

  // Warps w, w + 1, ... of a group: one slice of kv channels, one head each. Threads beyond the
  // channels repeat the last ones and store nothing.
  const int member = warp % kGroup;
  const int64_t slice = column * (kSwrThreads / 32 / kGroup) + warp / kGroup;
  const int64_t channels = in.heads * in.width, gate_channels = in.kv_heads * in.width;
  int64_t gate_channel = (slice * 32 + lane) * V;
  const bool active = gate_channel < gate_channels;
  if (!active) gate_channel = gate_channels - in.width + gate_channel % in.width;
  const int64_t h = gate_channel / in.width * kGroup + member, p = gate_channel % in.width;
  const int64_t channel = h * in.width + p;
  const SwrChannel<T, true> at(in, row, h, p);
  const T* const dy =
      static_cast<const T*>(params.dx) + row * params.dx_batch + h * params.dx_head + p;
  constexpr int64_t kRow = kWidth / (kLanes * V) + 3 * kWidth;  // H + 3 H P
  const int64_t gate_step = kWidth > 0 ? kRow : in.gate_step;
  const int64_t v_step = kWidth > 0 ? kRow : in.u_step;
  const int64_t dgate_step = kWidth > 0 ? kRow : params.dgate_step;
  const int64_t dv_step = kWidth > 0 ? kRow : params.du_step;
  const int64_t dy_step = kWidth > 0 ? kWidth : params.dx_step;
  const T* const b_in = at.b;
  const T* const c_in = kWidth > 0 ? b_in + kWidth : at.c;
  const T* const v_in = kWidth > 0 ? b_in + 2 * kWidth : at.u;
  const int64_t out_row = row * in.length;
  T* const da = static_cast<T*>(params.da) + out_row * params.da_step + h;
  T* const db = static_cast<T*>(params.db) + out_row * dgate_step + gate_channel;
  T* const dc =
      kWidth > 0 ? db + kWidth : static_cast<T*>(params.dc) + out_row * dgate_step + gate_channel;
  T* const dv =
      kWidth > 0 ? db + 2 * kWidth : static_cast<T*>(params.du) + out_row * dv_step + channel;
  const float inverse_decay_max = 1.0f / at.decay_max;

  const auto read = [](const void* x, int64_t i) {
    return x != nullptr ? static_cast<const float*>(x)[i] : 0.0f;
  };
  const int64_t head = row * in.heads + h;
  const int64_t state = head * in.width + p;  // of the thread's first channel
  typename M::Decays back_decays(in, grid, row, slice * 32 * V / in.width * kGroup + member,
                                 kGroup);
  typename M::Decays front_decays = back_decays;
  const int my_head = lane / kLanes;

  // The lanes of a warp copy packed rows for each other, 16 bytes at a time: kUnits to a row, so
  // kTogether rows at once.
  constexpr int kUnits = 32 * kSwrMarchBytes / 16, kTogether = 32 / kUnits;
  const int unit_row = lane / kUnits, unit_tid = tid - lane + lane % kUnits * (32 / kUnits);
  // Where a chunk is copied from and to, row by row.
  struct Copies {
    Rows rows;
    bool wanted, late_wanted;  // b and v; c and dy
    const T *b, *v, *c, *dy;
    typename M::Slot& slot;
  };
  const auto copies_of = [&](const Cursor& chunk) {
    const Rows rows(grid, chunk);
    const int64_t t = rows.t0 + (kWidth > 0 ? unit_row : 0);
    const int64_t unit = kWidth > 0 ? (unit_tid - tid) * V : 0;
    return Copies{rows,
                  chunk.n < end && chunk.n >= warm,
                  chunk.n >= first,
                  b_in + t * gate_step + unit,
                  v_in + t * v_step + unit,
                  c_in + t * gate_step + unit,
                  dy + t * dy_step + unit,
                  shared.slots[chunk.slot]};
  };
  // Packed: rows k .. k + kTogether - 1.
  const auto copy_rows = [&]<bool kInside>(const Copies& from, int k) {
    const int i = k + unit_row;
    const bool good = kInside || (from.wanted && from.rows.has(i));
    copy_async<16>(&from.slot.b[i][unit_tid], from.b + k * kRow, good);
    copy_async<16>(&from.slot.v[i][unit_tid], from.v + k * kRow, good);
    if constexpr (kAllInRing) {
      const bool late_good = kInside || (from.late_wanted && from.rows.has(i));
      copy_async<16>(&from.slot.c[i][unit_tid], from.c + k * kRow, late_good);
      copy_async<16>(&from.slot.dy[i][unit_tid], from.dy + k * int64_t{kWidth}, late_good);
    }
  };
  const auto copy_chunk = [&]<bool kInside>(const Cursor& chunk) {
    const Copies from = copies_of(chunk);
    if constexpr (kWidth > 0) {
      __syncwarp();  // all lanes have read what the slot held
#pragma unroll
      for (int k = 0; k < kChunk; k += kTogether) copy_rows.template operator()<kInside>(from, k);
    } else {
      const T *b = from.b, *v = from.v;
#pragma unroll
      for (int i = 0; i < kChunk; ++i, b += gate_step, v += v_step) {
        const bool good = kInside || (from.wanted && from.rows.has(i));
        copy_async<kSwrMarchBytes>(&from.slot.b[i][tid], b, good);
        copy_async<kSwrMarchBytes>(&from.slot.v[i][tid], v, good);
      }
    }
    copies_commit();
  };

  // The front ends a step on chunk 0 of block n - 1 when the back enters block n: 2 K - 1 chunks
  // ahead. What is copied next is kAhead chunks ahead of the foremost reader.
  Cursor back{end, K - 1, (plan.slots - 1 + K) % plan.slots};
  Cursor front{end - 1, K - 1, plan.slots - 1};
  Cursor copied = kSaved ? back : front;
#pragma unroll
  for (int k = 0; k < kAhead; ++k) {
    copy_chunk.template operator()<false>(copied);
    copied.retreat(plan);
  }
  if constexpr (!kSaved) front_decays.template fetch<false>(front);
  Vector<T, V> c[kChunk], g[kChunk];
  // Row i of c and dy; the pointers step along, since the compiler would keep all multiples of the
  // strides in registers.
  const T *next_c, *next_dy;
  const auto point_at = [&](const Rows& rows) {
    next_c = c_in + int64_t{rows.t0 + kChunk - 1} * gate_step;
    next_dy = dy + int64_t{rows.t0 + kChunk - 1} * dy_step;
  };
  const auto fetch_row = [&](bool good, int i) {
    c[i] = load_vector<T, V>(next_c, good);
    g[i] = load_vector<T, V>(next_dy, good);
    next_c -= gate_step;
    next_dy -= dy_step;
  };
  back_decays.template fetch<false>(back);
  if constexpr (!kAllInRing) {
    const Rows rows(grid, back);
    point_at(rows);
#pragma unroll
    for (int i = kChunk - 1; i >= 0; --i) fetch_row(end < blocks && rows.has(i), i);
  }

  // What the forward saved, one chunk and one block ahead: x at the chunk's start; v and T.
  float x_saved[V], v_saved[V], T_saved;
  const auto saved_state = [&](int chunk, float* to) {
    const SwrSaved saved = params.saved;
    const float* from =
        static_cast<const float*>(saved.states) + (row * saved.chunks + chunk) * channels + channel;
    const auto x = load_vector<float, V>(from);
#pragma unroll
    for (int k = 0; k < V; ++k) to[k] = x[k];
  };
  const auto fetch_state = [&](const Cursor& chunk) {
    if constexpr (kSaved) {
      if (chunk.n >= first && chunk.n < end) saved_state(chunk.n * K + chunk.j, x_saved);
    }
  };
  const auto fetch_block = [&](int n) {
    if constexpr (kSaved) {
      if (n < first) return;
      T_saved = static_cast<const float*>(
          params.saved.products)[(row * plan.max_blocks + n) * in.heads + h];
      if (n > 0) {
        saved_state(n * K, v_saved);
      } else {
#pragma unroll
        for (int k = 0; k < V; ++k) v_saved[k] = SwrStart<float>(in, row, h, p + k).v;
      }
    }
  };
  fetch_block(end - 1);
  float v[V] = {}, q[V] = {}, arriving[V] = {};
  float product = 1.0f;  // of the block's coefficients: all (folded), or those walked (saved)
  float Tqv = 0.0f;
  const bool full_chunks =
      grid.window % kChunk == 0 && (column + 1) * (kSwrThreads / kGroup) * V <= gate_channels;
  const int delay = kSaved ? 0 : K - 1;  // steps that the front makes alone
  const int steps = delay + (end - first + 1) * K;

  // Makes the copies of a step and, when folding, the front's work. With all in the ring the copies
  // of a step inside are left to back_step.
  const auto front_step = [&]<bool kInside>(int step) {
    if constexpr (kAllInRing) {
      copies_wait<kAhead - 1>();
      // Warps that stay near each other read and write their parts of a row at about the same time.
      // (CTAs must not be held together: their turns of reading and writing would coincide.)
      constexpr int kSyncSteps = 4;
      if (step % kSyncSteps == 0) __syncthreads();
      __syncwarp();  // other lanes' copies are there too, and all have read the oldest chunk
    }
    if constexpr (!(kAllInRing && kInside)) copy_chunk.template operator()<kInside>(copied);
    if constexpr (!kAllInRing) {
      copies_wait<kAhead>();
      if constexpr (kWidth > 0) __syncwarp();  // other lanes' copies are there too
    }
    if constexpr (!(kAllInRing && kInside)) copied.retreat(plan);
    if constexpr (!kSaved) {
      if (front.n >= warm) {
        auto& coefficients = shared.front[warp];
        front_decays.template share<kInside>(front, coefficients);
        auto& slot = shared.slots[front.slot];
        float w[V] = {}, r = 1.0f;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          const float a = coefficients[i][my_head];
          const Vector<T, V> b = slot.b[i][tid], vv = slot.v[i][tid];
          r *= a;
#pragma unroll
          for (int k = 0; k < V; ++k) w[k] = a * w[k] + sigmoid<T>(b[k]) * vv[k];
        }
#pragma unroll
        for (int k = 0; k < V; ++k) slot.end_state[k][tid] = w[k];
        slot.product[tid] = r;
      }
      front.retreat(plan);
      if (front.n >= warm) front_decays.template fetch<kInside>(front);
    }
  };

  const auto c_of = [&](const auto& slot, int i) {
    if constexpr (kAllInRing) {
      return slot.c[i][tid];
    } else {
      return c[i];
    }
  };
  const auto dy_of = [&](const auto& slot, int i) {
    if constexpr (kAllInRing) {
      return slot.dy[i][tid];
    } else {
      return g[i];
    }
  };
  // The gradients of the back's chunk; of the halo only the adjoint.
  const auto back_step = [&]<bool kInside>(bool more) {
    const Rows rows(grid, back);
    auto& coefficients = shared.back[warp];
    back_decays.template share<kInside>(back, coefficients);
    Cursor next = back;
    next.retreat(plan);
    const Rows next_rows(grid, next);
    if (kInside || more) back_decays.template fetch<kInside>(next);
    if constexpr (!kAllInRing) point_at(next_rows);
    const auto& slot = shared.slots[back.slot];
    if (!kInside && back.n == end) {
#pragma unroll
      for (int i = kChunk - 1; i >= 0; --i) {
        const float a = coefficients[i][my_head];
        const Vector<T, V> ci = c_of(slot, i), gi = dy_of(slot, i);
        if constexpr (!kAllInRing) fetch_row(more && next_rows.has(i), i);
#pragma unroll
        for (int k = 0; k < V; ++k) arriving[k] = a * (gi[k] * ci[k] + arriving[k]);
      }
      fetch_state(next);
      return;
    }
    float x[kChunk + 1][V], share[kChunk];
    float gates[kAllInRing ? kChunk : 1][V];  // sigmoid(b), where registers are left for it
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if constexpr (kSaved) {
        x[0][k] = x_saved[k];
      } else {
        x[0][k] = slot.end_state[k][tid];
      }
    }
    fetch_state(next);
    const Copies copies = copies_of(copied);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float a = coefficients[i][my_head];
      if constexpr (kSaved) product *= a;
      const Vector<T, V> b = slot.b[i][tid], vv = slot.v[i][tid];
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float gate = sigmoid<T>(b[k]);
        if constexpr (kAllInRing) gates[i][k] = gate;
        x[i + 1][k] = a * x[i][k] + gate * vv[k];
      }
      if constexpr (kAllInRing && kInside) {  // here, so that the reads are spread over the step
        if (i % kTogether == 0) copy_rows.template operator()<true>(copies, i);
      }
    }
    if constexpr (kAllInRing && kInside) {
      copies_commit();
      copied.retreat(plan);
    }
    const int64_t last_row = rows.t0 + kChunk - 1;
    T* db_i = db + last_row * dgate_step;
    T* dc_i = kWidth > 0 ? db_i + kWidth : dc + last_row * dgate_step;
    T* dv_i = kWidth > 0 ? db_i + 2 * kWidth : dv + last_row * dv_step;
#pragma unroll
    for (int i = kChunk - 1; i >= 0; --i) {
      const float a = coefficients[i][my_head];
      const Vector<T, V> b = slot.b[i][tid], vv = slot.v[i][tid];
      const Vector<T, V> ci = c_of(slot, i), gi = dy_of(slot, i);
      if constexpr (!kAllInRing) fetch_row(kInside || (more && next_rows.has(i)), i);
      float dci[V], dvi[V], dbi[V], sum = 0.0f;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float gate = kAllInRing ? gates[i][k] : sigmoid<T>(b[k]);
        const float pw = gi[k] * ci[k] + arriving[k];
        arriving[k] = a * pw;
        sum += pw * x[i][k];
        const float du = pw * gate;
        dci[k] = gi[k] * x[i + 1][k];
        dvi[k] = gi[k] + du;
        const float dgate = du * vv[k];
        dbi[k] = dgate - dgate * gate;
      }
      share[i] = (1.0f - a * inverse_decay_max) * (a * sum - Tqv);
      if (kInside || (active && rows.has(i))) {
        if constexpr (kGroup == 1) {
          store_vector<T, V>(dc_i, dci);
          store_vector<T, V>(db_i, dbi);
        }
        store_vector<T, V>(dv_i, dvi);
      }
      if constexpr (kGroup > 1) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
          shared.shares.db[i][k][tid] = dbi[k];
          shared.shares.dc[i][k][tid] = dci[k];
        }
      }
      dc_i -= dgate_step;
      db_i -= dgate_step;
      dv_i -= dv_step;
    }
    if constexpr (kGroup > 1) {
      __syncthreads();
#pragma unroll
      for (int i = member; i < kChunk; i += kGroup) {
        float db_sum[V] = {}, dc_sum[V] = {};
#pragma unroll
        for (int k = 0; k < V; ++k) {
#pragma unroll
          for (int m = 0; m < kGroup; ++m) {
            const int from = tid + (m - member) * 32;
            db_sum[k] += shared.shares.db[i][k][from];
            dc_sum[k] += shared.shares.dc[i][k][from];
          }
        }
        if (kInside || (active && rows.has(i))) {
          store_vector<T, V>(db + int64_t{rows.t0 + i} * dgate_step, db_sum);
          store_vector<T, V>(dc + int64_t{rows.t0 + i} * dgate_step, dc_sum);
        }
      }
      __syncthreads();  // before the next chunk's shares
    }
    const int begin = reduce_scatter<kLanes, kChunk>(share, lane);
    constexpr int kRows = kLanes < kChunk ? kChunk / kLanes : 1;
    // With more lanes than rows two lanes hold the same row.
    if ((kInside || active) && lane % (kLanes > kChunk ? 2 : 1) == 0) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (kInside || rows.has(begin + i)) {
          store(da + (rows.t0 + begin + i) * params.da_step, share[i]);
        }
      }
    }
  };

  for (int step = 0; step < steps; ++step) {
    // Inside: every row and channel between the copies and the back exists.
    const bool inside = full_chunks && back.n < end && (back.n < blocks - 1 || last_complete) &&
                        copied.n >= warm && (copied.n > 0 || grid.index == 0);
    if (inside) {
      front_step.template operator()<true>(step);
    } else {
      front_step.template operator()<false>(step);
    }
    if (step < delay) continue;

    const bool real = back.n < end;
    if (real && back.j == K - 1) {  // enter a block from the right
      if (back.n == blocks - 1) {   // nothing to its right but the state after the last step
#pragma unroll
        for (int k = 0; k < V; ++k) {
          q[k] = read(last_complete ? params.dv_out : params.dw_out, state + k);
        }
      }
      float T_block;
      if constexpr (kSaved) {
        T_block = T_saved;
        product = 1.0f;
#pragma unroll
        for (int k = 0; k < V; ++k) v[k] = v_saved[k];
        fetch_block(back.n - 1);
      } else {
        int at_slot = back.slot - (K - 1);
        if (at_slot < 0) at_slot += plan.slots;
        float x[V], start_r = 1.0f;
        if (back.n == 0) {
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const SwrStart<float> start(in, row, h, p + k);
            start_r = start.r;
            v[k] = start.v;
            x[k] = start.w + start.r * start.v;
          }
        } else {
          int left = at_slot - K;
          if (left < 0) left += plan.slots;
#pragma unroll
          for (int k = 0; k < V; ++k) {
            v[k] = back.n == 1 ? SwrStart<float>(in, row, h, p + k).w : 0.0f;
          }
          for (int j = 0; j < K; ++j) {
            const auto& slot = shared.slots[left];
#pragma unroll
            for (int k = 0; k < V; ++k) v[k] = slot.product[tid] * v[k] + slot.end_state[k][tid];
            left = left + 1 == plan.slots ? 0 : left + 1;
          }
#pragma unroll
          for (int k = 0; k < V; ++k) x[k] = v[k];
        }
        product = 1.0f;
        for (int j = 0; j < K; ++j) {
          auto& slot = shared.slots[at_slot];
          const float r = slot.product[tid];
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const float end_state = slot.end_state[k][tid];
            slot.end_state[k][tid] = x[k];
            x[k] = r * x[k] + end_state;
          }
          product *= r;
          at_slot = at_slot + 1 == plan.slots ? 0 : at_slot + 1;
        }
        T_block = start_r * product;
      }
      const bool open_end = back.n == blocks - 1 && !last_complete;
      Tqv = open_end && lane % kLanes == 0 ? -T_block * read(params.dr_out, head) : 0.0f;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        Tqv += T_block * q[k] * v[k];
        arriving[k] = q[k];
      }
    }

    if (inside) {
      back_step.template operator()<true>(true);
    } else {
      back_step.template operator()<false>(step + 1 < steps);
    }
    if (back.j == 0 && (back.n > first || !real)) {  // leave the block to the left
      // The v of an incomplete last block leaves with the state after the last step.
      const bool passes_v = back.n == blocks - 1 && !last_complete;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        q[k] = arriving[k] - product * q[k] + (passes_v ? read(params.dv_out, state + k) : 0.0f);
        arriving[k] = 0.0f;
      }
    }
    back.retreat(plan);
  }

  if (first > 0) return;
  // From the adjoints before the first step to the gradients of the given state.
  const bool open_end = blocks == 1 && !last_complete;
  float dr = open_end && lane % kLanes == 0 ? product * read(params.dr_out, head) : 0.0f;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const SwrStart<float> start(in, row, h, p + k);
    const float carry = arriving[k] - product * q[k];  // the adjoint of r v
    dr += carry * start.v;
    if (active) {
      static_cast<float*>(params.dw)[state + k] = arriving[k];
      static_cast<float*>(params.dv)[state + k] =
          start.r * carry + (open_end ? read(params.dv_out, state + k) : 0.0f);
    }
  }
  reduce_scatter<kLanes, 1>(&dr, lane);
  if (active && lane % kLanes == 0) static_cast<float*>(params.dr)[head] = dr;
}

template <class T, int kLanes, bool kSaved, int kGroup, int kWidth>
Status launch(const SwrBwdParams& params, cudaStream_t stream) {
  using M = March<T, kLanes, kSaved, kGroup, kWidth>;
  const SwrInputs& in = params.in;
  const auto kernel = swr_bwd_march_kernel<T, kLanes, kSaved, kGroup, kWidth>;
  const SwrMarch plan = swr_march_plan(in.batch, in.length, in.heads * in.width, in.window,
                                       sizeof(T), M::kAhead, M::kCtas, multiprocessors());
  size_t bytes = sizeof(typename M::Shared) + (plan.slots - 1) * sizeof(typename M::Slot);
  const auto ctas = static_cast<unsigned>(plan.columns * plan.strips * in.batch);
  if (M::kCtas == 1 && ctas <= static_cast<unsigned>(multiprocessors())) {
    bytes = alone_on_multiprocessor(bytes);
  }
  const Status allowed = allow_shared_memory(kernel, bytes);
  if (!allowed.ok()) return allowed;
  launch_early(kernel, dim3(ctas), kSwrThreads, bytes, stream, params, plan);
  return launch_status(kSaved ? (kWidth > 0 ? "march_saved_packed" : "march_saved")
                              : (kWidth > 0 ? "march_folded_packed" : "march_folded"));
}

// Whether inputs and gradients are packed rows [a: H | b: H P | c: H P | v: H P] with nothing
// between, as phalanx's projection writes them, and rows aligned for copies of 16 bytes.
template <class T>
bool packed(const SwrBwdParams& params) {
  const SwrInputs& in = params.in;
  const int64_t channels = in.heads * in.width, row = in.heads + 3 * channels;
  const auto follow = [&](const void* b, const void* c, const void* v) {
    return static_cast<const T*>(c) == static_cast<const T*>(b) + channels &&
           static_cast<const T*>(v) == static_cast<const T*>(b) + 2 * channels;
  };
  return in.kv_heads == in.heads && in.gate_step == row && in.u_step == row &&
         params.dgate_step == row && params.du_step == row && params.dx_step == channels &&
         in.u_head == in.width && params.dx_head == in.width && follow(in.b, in.c, in.u) &&
         vector_aligned<T, 16 / sizeof(T)>(in.b, {in.gate_batch}) &&
         vector_aligned<T, 16 / sizeof(T)>(params.dx, {params.dx_batch}) &&
         follow(params.db, params.dc, params.du);
}

template <class T, int kLanes, bool kSaved>
Status launch_width(const SwrBwdParams& params, cudaStream_t stream) {
  constexpr bool kDefaultWidth = kLanes * (kSwrMarchBytes / sizeof(T)) == 16;
  if constexpr (kDefaultWidth) {
    switch (params.in.heads / params.in.kv_heads) {
      case 2:
        return launch<T, kLanes, kSaved, 2, 0>(params, stream);
      case 4:
        return launch<T, kLanes, kSaved, 4, 0>(params, stream);
    }
  }
  if constexpr (kDefaultWidth && sizeof(T) == 2) {
    if (packed<T>(params)) {
      switch (params.in.heads * params.in.width) {
        case 1024:
          return launch<T, kLanes, kSaved, 1, 1024>(params, stream);
        case 2048:
          return launch<T, kLanes, kSaved, 1, 2048>(params, stream);
        case 4096:
          return launch<T, kLanes, kSaved, 1, 4096>(params, stream);
      }
    }
  }
  return launch<T, kLanes, kSaved, 1, 0>(params, stream);
}

}  // namespace

bool swr_bwd_march_fits(const SwrBwdParams& params, DType dtype) {
  const SwrInputs& in = params.in;
  const int64_t group = in.heads / in.kv_heads;
  return swr_lanes_fit(in, dtype) && in.window >= kSwrMarchMinWindow &&
         in.length <= kSwrMarchLength &&
         (group == 1 || (in.width == 16 && (group == 2 || group == 4))) &&
         (!swr_saves(in.window) ||
          (params.saved.states != nullptr && vector_aligned<float, 2>(params.saved.states, {}))) &&
         swr_lane_gradients_fit(params, dtype);
}

Status swr_bwd_march(const SwrBwdParams& params, DType dtype, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return swr_with_lanes(params.in, dtype, [&]<class T, int kLanes>() {
    return swr_saves(params.in.window) ? launch_width<T, kLanes, true>(params, s)
                                       : launch_width<T, kLanes, false>(params, s);
  });
}

}  // namespace sarissa::kernels
