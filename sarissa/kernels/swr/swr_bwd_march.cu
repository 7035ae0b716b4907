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
// forward has saved x at every chunk's start, and T (SwrSaved).
//
// The block to the right of the strip is walked first, for q alone. Steps outside the sequence have
// a = 1 and zeros. Sums over a head's channels are butterflies over its lanes. No atomics.
#include "sarissa/kernels/swr/swr_lanes.cuh"
#include "sarissa/kernels/swr/swr_march.cuh"

namespace sarissa::kernels {
namespace {

/// kLanes neighbouring lanes own a head; a CTA has kColumns columns.
template <class T, int kLanes, bool kSaved, int kColumns>
struct March {
  static constexpr int V = kSwrMarchBytes / sizeof(T);  // channels of a column
  static constexpr int kHeads = 32 / kLanes;            // heads of a warp
  using Decays = MarchDecays<T, kHeads>;

  /// A chunk of the ring: a thread reads only its own column.
  struct alignas(16) Rows {
    Vector<T, V> b[kChunk][kColumns], v[kChunk][kColumns];
    Vector<T, V> c[kChunk][kColumns], dy[kChunk][kColumns];
    typename Decays::Shared decays[kColumns / 32];
  };
  struct FoldedRows : Rows {
    float end_state[V][kColumns];  // E; from the back's entry into the block on: x at its start
    float product[kColumns];       // G
  };
  using Slot = std::conditional_t<kSaved, Rows, FoldedRows>;
};

/// Barriers: of all threads between two steps; of the front when shares are added; and, from
/// kPairBarrier on, of a warp of the front and the one of the back that takes the same columns.
enum MarchBarrier { kStepBarrier, kGroupBarrier, kPairBarrier };

/// A share of a gradient in the place of a row's channels.
template <class Channels>
__device__ inline void put(Channels& to, float x) {
  static_assert(sizeof(Channels) == sizeof(float));
  memcpy(&to, &x, sizeof(float));
}
template <class Channels>
__device__ inline float get(const Channels& from) {
  float x;
  memcpy(&x, &from, sizeof(float));
  return x;
}

// kGroup: heads that share a kv head; they are at the same lanes of neighbouring warps of the back.
// Their shares of the gradients of b and c take the place of a chunk's rows in the ring, and the
// front adds them in the next step, in head order; a spare slot keeps them so long. kWidth: the
// channels H P, known when compiled, of one packed row per step, or 0: then all strides are
// constants and the addresses of a chunk's rows cost nothing.
template <class T, int kLanes, bool kSaved, int kGroup, int kWidth, int kColumns>
__global__ void __launch_bounds__(2 * kColumns, 1)
    swr_bwd_march_kernel(SwrBwdParams params, SwrMarch plan) {
  using M = March<T, kLanes, kSaved, kColumns>;
  constexpr int V = M::V;
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

  // Warps w, w + 1, ... of a group: one slice of kv channels, one head each. Columns beyond the
  // channels repeat the last ones, and nothing is stored for them.
  const int member = warp % kGroup;
  const int64_t slice = column * (kColumns / 32 / kGroup) + warp / kGroup;
  const int64_t channels = in.heads * in.width, gate_channels = in.kv_heads * in.width;
  struct Column {
    bool active;
    int64_t gate_channel, h, p;
  };
  const auto column_of = [&](int lane) {
    int64_t gate_channel = (slice * 32 + lane) * V;
    const bool active = gate_channel < gate_channels;
    if (!active) gate_channel = gate_channels - in.width + gate_channel % in.width;
    return Column{active, gate_channel, gate_channel / in.width * kGroup + member,
                  gate_channel % in.width};
  };
  constexpr int64_t kGates = kWidth / kGroup;
  constexpr int64_t kRow = kWidth / (kLanes * V) + 2 * kGates + kWidth;
  // Whether v follows c at the same place.
  constexpr bool kPackedV = kWidth > 0 && kGroup == 1;
  // Whether every row of a chunk exists; its block is not beyond the strip's.
  const bool full_chunks =
      grid.window % kChunk == 0 && (column + 1) * (kColumns / kGroup) * V <= gate_channels;
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
  // that the back has left. Where nothing is folded, it is faster to let the pairs of warps go
  // their way, but not far: a row's parts should be read and written at about the same time.
  const auto meet_step = [&](int step) {
    constexpr int kMeetAll = kSaved && kGroup == 1 ? 16 : 1;
    if (step % kMeetAll == 0) {
      meet<2 * kColumns>(kStepBarrier);
    } else {
      meet<2 * 32>(kPairBarrier + warp);
    }
  };

  if (is_front) {
    const int64_t gate_step = kWidth > 0 ? kRow : in.gate_step;
    const int64_t v_step = kWidth > 0 ? kRow : in.u_step;
    const int64_t dy_step = kWidth > 0 ? kWidth : params.dx_step;
    // Rows aligned to 16 bytes are copied in units of 16, by a warp's lanes for each other: kUnits
    // to a row, so several rows at once.
    const bool wide = kWidth > 0 || plan.wide;
    constexpr int kUnits = 32 * kSwrMarchBytes / 16;
    const int unit_row = wide ? lane / kUnits : 0;
    const int unit_lane = wide ? lane % kUnits * (32 / kUnits) : lane;
    const int unit_tid = tid - lane + unit_lane;
    const Column unit = column_of(unit_lane);
    const SwrChannel<T, true> at(in, row, unit.h, unit.p);
    const T* const b_in = at.b;
    const T* const c_in = kWidth > 0 ? b_in + kGates : at.c;
    const T* const v_in = kPackedV ? b_in + 2 * kWidth : at.u;
    const T* const dy_in =
        static_cast<const T*>(params.dx) + row * params.dx_batch + unit.h * params.dx_head + unit.p;
    // Copies a chunk, or asks the L2 cache for it.
    const auto bring_units = [&]<int kBytes, bool kInside, bool kPrefetch>(const Cursor& chunk) {
      constexpr int kTogether = kBytes / kSwrMarchBytes;
      const Rows rows(grid, chunk);
      const bool folded = chunk.n < end && chunk.n >= warm, walked = chunk.n >= first;
      auto& slot = slots[chunk.slot];
      const int64_t t = rows.t0 + unit_row;
      const T *b = b_in + t * gate_step, *c = c_in + t * gate_step, *v = v_in + t * v_step;
      const T* dy = dy_in + t * dy_step;
      const auto bring_unit = [](void* to, const T* from, bool good) {
        if constexpr (kPrefetch) {
          prefetch(from, good);
        } else {
          copy_async<kBytes>(to, from, good);
        }
      };
#pragma unroll
      for (int k = 0; k < kChunk; k += kTogether) {
        const int i = k + unit_row;
        const bool good_bv = kInside || (folded && rows.has(i));
        const bool good_c_dy = kInside || (walked && rows.has(i));
        bring_unit(&slot.b[i][unit_tid], b, good_bv);
        bring_unit(&slot.v[i][unit_tid], v, good_bv);
        bring_unit(&slot.c[i][unit_tid], c, good_c_dy);
        bring_unit(&slot.dy[i][unit_tid], dy, good_c_dy);
        b += kTogether * gate_step;
        c += kTogether * gate_step;
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
    typename M::Decays decays(in, grid, row, slice * 32 * V / in.width * kGroup + member, kGroup);
    decays.template fetch<false>(front);
    const int my_head = lane / kLanes;

    // Adds the shares that the back has left of the chunk it walked last, this warp those of every
    // kGroup-th row.
    Cursor walked = rightmost;
    const auto add_shares = [&] {
      if constexpr (kGroup > 1) {
        if (walked.n < end) {
          const Rows rows(grid, walked);
          const auto& slot = slots[walked.slot];
          const Column mine = column_of(lane);
          const int64_t dgate_step = kWidth > 0 ? kRow : params.dgate_step;
          const int64_t at = row * in.length * dgate_step + mine.gate_channel;
          T* const db = static_cast<T*>(params.db) + at;
          T* const dc = kWidth > 0 ? db + kGates : static_cast<T*>(params.dc) + at;
#pragma unroll
          for (int i = member; i < kChunk; i += kGroup) {
            float db_sum[V] = {}, dc_sum[V] = {};
#pragma unroll
            for (int k = 0; k < V; ++k) {
#pragma unroll
              for (int m = 0; m < kGroup; ++m) {
                const int from = tid + (m - member) * 32;
                db_sum[k] += get(k == 0 ? slot.b[i][from] : slot.v[i][from]);
                dc_sum[k] += get(k == 0 ? slot.c[i][from] : slot.dy[i][from]);
              }
            }
            if (mine.active && rows.has(i)) {
              store_vector<T, V>(db + int64_t{rows.t0 + i} * dgate_step, db_sum);
              store_vector<T, V>(dc + int64_t{rows.t0 + i} * dgate_step, dc_sum);
            }
          }
        }
        walked.retreat(plan);
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
      Cursor next = front;
      next.retreat(plan);
      if (kInside || next.n >= warm) decays.template fetch<kInside>(next);
      copies_wait<kSwrMarchAhead>();
      __syncwarp();  // other lanes' copies are there too
      if constexpr (!kSaved) {
        if (kInside || (warm <= front.n && front.n < end)) {
          auto& coefficients = slot.decays[warp];
          float w[V] = {}, r = 1.0f;
#pragma unroll
          for (int i = 0; i < kChunk; ++i) {
            const float a = coefficients[i][my_head];
            const Vector<T, V> b = slot.b[i][tid], v = slot.v[i][tid];
            r *= a;
#pragma unroll
            for (int k = 0; k < V; ++k) w[k] = a * w[k] + sigmoid<T>(b[k]) * v[k];
          }
#pragma unroll
          for (int k = 0; k < V; ++k) slot.end_state[k][tid] = w[k];
          slot.product[tid] = r;
        }
      }
      front = next;
    };
    for (int step = 0; step < steps; ++step) {
      meet_step(step);
      if (kGroup > 1 && step > lag) {
        add_shares();
        if (!plan.spare_slot) meet<kColumns>(kGroupBarrier);  // before the slot is filled again
      }
      if (front.n < end && is_full(front) && copied.n >= first && is_full(copied)) {
        front_step.template operator()<true>();
      } else {
        front_step.template operator()<false>();
      }
    }
    if constexpr (kGroup > 1) {
      meet_step(steps);
      add_shares();
    }
    return;
  }

  if (early) wait_for_earlier_kernels();
  const auto [active, gate_channel, h, p] = column_of(lane);
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
  const float inverse_decay_max = 1.0f / static_cast<float>(in.decay_max);
  const auto read = [](const void* x, int64_t i) {
    return x != nullptr ? static_cast<const float*>(x)[i] : 0.0f;
  };
  const int64_t head = row * in.heads + h;
  const int64_t state = head * in.width + p;  // of the thread's first channel
  const int my_head = lane / kLanes;

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
  Cursor back = rightmost;

  // The halo: only its adjoint.
  const auto halo_step = [&] {
    const auto& slot = slots[back.slot];
#pragma unroll
    for (int i = kChunk - 1; i >= 0; --i) {
      const float a = slot.decays[warp][i][my_head];
      const Vector<T, V> c = slot.c[i][tid], dy = slot.dy[i][tid];
#pragma unroll
      for (int k = 0; k < V; ++k) arriving[k] = a * (dy[k] * c[k] + arriving[k]);
    }
  };
  // The gradients of a chunk.
  const auto back_step = [&]<bool kInside>() {
    const Rows rows(grid, back);
    auto& slot = slots[back.slot];
    float x[kChunk + 1][V], gates[kChunk][V], share[kChunk], a[kChunk];
    // Read before shares take the rows' places: around those nothing could be read ahead.
    Vector<T, V> v_in[kChunk], c_in[kChunk], dy[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      a[i] = slot.decays[warp][i][my_head];
      v_in[i] = slot.v[i][tid];
      c_in[i] = slot.c[i][tid];
      dy[i] = slot.dy[i][tid];
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if constexpr (kSaved) {
        x[0][k] = x_saved[k];
      } else {
        x[0][k] = slot.end_state[k][tid];
      }
    }
    Cursor next = back;
    next.retreat(plan);
    fetch_state(next);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if constexpr (kSaved) product *= a[i];
      const Vector<T, V> b_in = slot.b[i][tid];
#pragma unroll
      for (int k = 0; k < V; ++k) {
        gates[i][k] = sigmoid<T>(b_in[k]);
        x[i + 1][k] = a[i] * x[i][k] + gates[i][k] * v_in[i][k];
      }
    }
    const int64_t last_row = rows.t0 + kChunk - 1;
    T* db_i = db + last_row * dgate_step;
    T* dc_i = kWidth > 0 ? db_i + kGates : dc + last_row * dgate_step;
    T* dv_i = kPackedV ? db_i + 2 * kWidth : dv + last_row * dv_step;
#pragma unroll
    for (int i = kChunk - 1; i >= 0; --i) {
      float dci[V], dvi[V], dbi[V], sum = 0.0f;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float g = dy[i][k], gate = gates[i][k];
        const float pw = g * c_in[i][k] + arriving[k];
        arriving[k] = a[i] * pw;
        sum += pw * x[i][k];
        const float du = pw * gate;
        dci[k] = g * x[i + 1][k];
        dvi[k] = g + du;
        const float dgate = du * v_in[i][k];
        dbi[k] = dgate - dgate * gate;
      }
      share[i] = (1.0f - a[i] * inverse_decay_max) * (a[i] * sum - Tqv);
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
          put(k == 0 ? slot.b[i][tid] : slot.v[i][tid], dbi[k]);
          put(k == 0 ? slot.c[i][tid] : slot.dy[i][tid], dci[k]);
        }
      }
      dc_i -= dgate_step;
      db_i -= dgate_step;
      dv_i -= dv_step;
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

  for (int step = 0; step < lag; ++step) meet_step(step);
  for (int step = lag; step < steps; ++step) {
    meet_step(step);
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
            const auto& slot = slots[left];
#pragma unroll
            for (int k = 0; k < V; ++k) v[k] = slot.product[tid] * v[k] + slot.end_state[k][tid];
            left = left + 1 == plan.slots ? 0 : left + 1;
          }
#pragma unroll
          for (int k = 0; k < V; ++k) x[k] = v[k];
        }
        product = 1.0f;
        for (int j = 0; j < K; ++j) {
          auto& slot = slots[at_slot];
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

    if (!real) {
      halo_step();
      Cursor next = back;
      next.retreat(plan);
      fetch_state(next);
    } else if (is_full(back)) {
      back_step.template operator()<true>();
    } else {
      back_step.template operator()<false>();
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
  if constexpr (kGroup > 1) meet_step(steps);  // the last shares are there

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
template <class T, int kLanes, bool kSaved>
constexpr int64_t kSlotBytesPerColumn = sizeof(typename March<T, kLanes, kSaved, 32>::Slot) / 32;

template <class T, int kLanes, bool kSaved, int kGroup, int kWidth, int kColumns>
Status launch(const SwrBwdParams& params, SwrMarch plan, cudaStream_t stream) {
  const auto kernel = swr_bwd_march_kernel<T, kLanes, kSaved, kGroup, kWidth, kColumns>;
  plan.wide = kWidth > 0 || units_fit<T>(params);
  using Slot = typename March<T, kLanes, kSaved, kColumns>::Slot;
  static_assert(sizeof(Slot) == kSlotBytesPerColumn<T, kLanes, kSaved> * kColumns);
  const size_t bytes = alone_on_multiprocessor(plan.slots * sizeof(Slot));
  const auto ctas = static_cast<unsigned>(plan.ctas * plan.strips * params.in.batch);
  const Status allowed = allow_shared_memory(kernel, bytes);
  if (!allowed.ok()) return allowed;
  launch_early(kernel, dim3(ctas), 2 * kColumns, bytes, stream, params, plan);
  return launch_status(kSaved ? (kWidth > 0 ? "march_saved_packed" : "march_saved")
                              : (kWidth > 0 ? "march_folded_packed" : "march_folded"));
}

template <class T, int kLanes, bool kSaved>
Status launch_width(const SwrBwdParams& params, cudaStream_t stream) {
  constexpr bool kDefaultWidth = kLanes * (kSwrMarchBytes / sizeof(T)) == 16;
  const SwrInputs& in = params.in;
  const SwrMarch plan = swr_march_plan(in.batch, in.length, in.heads, in.kv_heads, in.width,
                                       in.window, sizeof(T), kSlotBytesPerColumn<T, kLanes, kSaved>,
                                       multiprocessors(), most_shared_memory());
  const int64_t group = in.heads / in.kv_heads;
  if (plan.columns == 64) {
    if constexpr (kDefaultWidth) {
      if (group == 2) return launch<T, kLanes, kSaved, 2, 0, 64>(params, plan, stream);
    }
    return launch<T, kLanes, kSaved, 1, 0, 64>(params, plan, stream);
  }
  const auto with_group = [&]<int kGroup>() -> Status {
    if constexpr (kDefaultWidth && sizeof(T) == 2) {
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
  };
  if constexpr (kDefaultWidth) {
    if (group == 2) return with_group.template operator()<2>();
    if (group == 4) return with_group.template operator()<4>();
  }
  return with_group.template operator()<1>();
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
  swr_with_lanes(in, dtype, [&]<class T, int kLanes>() -> Status {
    const int64_t slot_bytes = swr_saves(in.window) ? kSlotBytesPerColumn<T, kLanes, true>
                                                    : kSlotBytesPerColumn<T, kLanes, false>;
    fits = swr_march_columns(swr_march_all_columns(in.heads * in.width, sizeof(T)), group,
                             in.window, slot_bytes, most_shared_memory()) > 0;
    return {};
  });
  return fits;
}

Status swr_bwd_march(const SwrBwdParams& params, DType dtype, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return swr_with_lanes(params.in, dtype, [&]<class T, int kLanes>() {
    return swr_saves(params.in.window) ? launch_width<T, kLanes, true>(params, s)
                                       : launch_width<T, kLanes, false>(params, s);
  });
}

}  // namespace sarissa::kernels
