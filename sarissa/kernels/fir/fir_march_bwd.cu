// Backward of hyena_fir with few taps by marching; see fir_march.cuh.
//
// One march forward in time. Step t makes u, q, dq and the gradients of the post third. The adjoint
// of the filter is anticausal, du[s] = sum over k of taps[k] dq[s + k], so du of step s = t - (W-1)
// is complete at t; the gradients of the pre and value thirds follow there, from the rows of z at s
// that are still in the ring. The adjoint of the featurizer takes two steps more.
#include "sarissa/kernels/fir/fir_march.cuh"

namespace sarissa::kernels {
namespace {

/// Constants of the backward: elements T, V channels per thread, copies of kUnit bytes, W taps.
template <class T, int V, int kUnit, int W>
struct FirMarchBwd {
  static constexpr int kDelay = W - 1;  // steps from dq to du
  static constexpr int kGroup = 8;      // rows between waits for copies, unrolled
  static constexpr int kAhead = 2;      // groups on their way
  static constexpr int kBehind = (kDelay + kGroup - 1) / kGroup;  // groups of late rows still read
  using Copies = FirCopies<T, V, kUnit, 2, kGroup>;
  /// Rings of rows: post and dy, which are read once; pre and value, read again kDelay steps later;
  /// and c_pre and c_value, kept for then. The last takes a new row where it has just read one.
  static constexpr int kSlots = kAhead + 1, kLateSlots = kSlots + kBehind;
  static constexpr int kGateSlots = kDelay / kGroup + 1;
  using Row = typename Copies::Row;
  using Gates = Vector<float, 2 * V>[kFirMarchThreads];
  struct Shared {
    Row rows[kSlots * kGroup];
    Row late_rows[kLateSlots * kGroup];
    Gates gates[kGateSlots * kGroup];
  };
  /// Values of u kept: a ring where its length divides a group, else moved from group to group.
  static constexpr bool kRing = W <= kGroup;
  static constexpr int kHistory = kRing ? kGroup : kDelay + kGroup;
};

/// Which of the steps that a step t of the march completes are the strip's.
struct FirOwned {
  bool t, dz_post;      // t; t - 2
  bool delayed, s, dz;  // whether s = t - (W-1) is a step at all; s; s - 2
};

/// The registers of a thread, and a step of the march.
template <class T, int V, int W, class Traits>
struct FirBackwardMarch {
  static constexpr int kDelay = Traits::kDelay, kHistory = Traits::kHistory;
  using Row = typename Traits::Row;
  using Gates = typename Traits::Gates;

  const FirBwdParams& p;
  const FirStrip& strip;
  const FirFilters<T, V, W>& filters;

  float u[kHistory][V];
  float past[3][2][V];               // z before t, by third
  float before[3][2][V];             // z before s; pre and value
  float du[W - 1][V] = {};           // du[k]: what dq up to now contribute to du of k steps ago
  float dz[3][2][V] = {};            // likewise of dc to dz, one step ago and two
  float d_featurizer[3][3][V] = {};  // [third][tap]
  float d_first[V] = {};             // of tap 0, per channel
  float d_taps[W] = {};              // of the others

  __device__ __forceinline__ FirBackwardMarch(const FirBwdParams& p, const FirStrip& strip,
                                              const FirFilters<T, V, W>& filters)
      : p(p), strip(strip), filters(filters) {
    const FirHistory<T, V, W> start(p, filters, strip);
#pragma unroll
    for (int i = 0; i < W - 1; ++i) {
#pragma unroll
      for (int j = 0; j < V; ++j) u[kHistory - 1 - i][j] = start.u[i][j];
    }
#pragma unroll
    for (int third = 0; third < 3; ++third) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < V; ++j) past[third][i][j] = before[third][i][j] = start.z[third][i][j];
      }
    }
  }

  /// Where u of k steps ago is when that of now is at i.
  __device__ static constexpr int ago(int i, int k) { return (i - k + kHistory) % kHistory; }

  /// Moves u by `steps`, so that there is room for as many new ones at the end.
  template <int kSteps>
  __device__ __forceinline__ void move_history() {
#pragma unroll
    for (int i = 0; i + kSteps < kHistory; ++i) {
#pragma unroll
      for (int j = 0; j < V; ++j) u[i][j] = u[i + kSteps][j];
    }
  }

  /// Adds d_c times z to the featurizer's gradient; z are the rows of three_taps.
  __device__ __forceinline__ void add_featurizer(int third, const float (&d_c)[V],
                                                 const float (&z)[V], const float (&z_past)[2][V]) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      d_featurizer[third][0][j] = fmaf(d_c[j], z[j], d_featurizer[third][0][j]);
      d_featurizer[third][1][j] = fmaf(d_c[j], z_past[0][j], d_featurizer[third][1][j]);
      d_featurizer[third][2][j] = fmaf(d_c[j], z_past[1][j], d_featurizer[third][2][j]);
    }
  }

  /// Takes d_c of a step; gives dz of two steps ago.
  __device__ __forceinline__ void push_featurizer(int third, const float (&d_c)[V],
                                                  float (&out)[V]) {
    const auto& taps = filters.featurizer[third];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      out[j] = fmaf(taps[2][j], d_c[j], dz[third][1][j]);
      dz[third][1][j] = fmaf(taps[1][j], d_c[j], dz[third][0][j]);
      dz[third][0][j] = taps[0][j] * d_c[j];
    }
  }

  /// What dz of the strip's step r has to do with states: adds the gradient of the featurizer's
  /// output state, and stores what comes before step 0, that of its input state.
  __device__ __forceinline__ void states_of_dz(int third, int r, float (&x)[V]) {
    const int64_t at = (int64_t{strip.b} * 2 * 3 + third) * p.width + strip.d;
    const auto* from = static_cast<const T*>(p.d_featurizer_state_out);
    const int row_in = strip.begin + r + 2, row_out = row_in - static_cast<int>(p.length);
    if (from != nullptr && row_out >= 0 && row_out < 2) {
#pragma unroll
      for (int j = 0; j < V; ++j) x[j] += load(from + at + row_out * 3 * p.width + j);
    }
    if (p.d_featurizer_state != nullptr && row_in >= 0 && row_in < 2) {
      store_vector<T, V>(static_cast<T*>(p.d_featurizer_state) + at + row_in * 3 * p.width, x);
    }
  }
  /// Likewise of du.
  __device__ __forceinline__ void states_of_du(int r, float (&x)[V]) {
    const int rows = static_cast<int>(p.num_taps) - 1;
    const int64_t at = int64_t{strip.b} * rows * p.width + strip.d;
    const int row_in = strip.begin + r + rows, row_out = row_in - static_cast<int>(p.length);
    if (p.d_state_out != nullptr && row_out >= 0 && row_out < rows) {
      const auto* from = static_cast<const float*>(p.d_state_out) + at + row_out * p.width;
#pragma unroll
      for (int j = 0; j < V; ++j) x[j] += from[j];
    }
    if (p.d_state != nullptr && row_in >= 0 && row_in < rows) {
      auto* to = static_cast<float*>(p.d_state) + at + row_in * p.width;
#pragma unroll
      for (int j = 0; j < V; ++j) to[j] = x[j];
    }
  }

  /// The shared memory of step t and, `late`, of step s = t - (W-1).
  struct Rows {
    const Row &now, &now_late, &late;
    Gates& gates;
    const Gates& late_gates;
  };

  /// The strip's step r, which is t. Its u goes to u[i]. `dx_now` is the post third of dx at t - 2,
  /// `dx_late` the pre third at s - 2. `states`: whether to mind them.
  __device__ __forceinline__ void step(FirOwned owned, bool states, int r, int i, Rows rows,
                                       T* dx_now, T* dx_late) {
    float z[3][V], c[3][V], dy[V], dq[V], d_post[V], du_s[V], out[V];
    unpack(rows.now[0][strip.column], z[kPost]);
    unpack(rows.now[1][strip.column], dy);
    unpack(rows.now_late[0][strip.column], z[kPre]);
    unpack(rows.now_late[1][strip.column], z[kValue]);
#pragma unroll
    for (int third = 0; third < 3; ++third) {
      three_taps(filters.featurizer[third], z[third], past[third], c[third]);
    }
    Vector<float, 2 * V> gates;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      gates.at[j] = c[kPre][j];
      gates.at[V + j] = c[kValue][j];
    }
    rows.gates[threadIdx.x] = gates;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      u[i][j] = c[kPre][j] * c[kValue][j];
      float q = 0.0f;
#pragma unroll
      for (int k = W - 1; k >= 0; --k) q = fmaf(filters.tap(k, j), u[ago(i, k)][j], q);
      dq[j] = c[kPost][j] * dy[j];
      d_post[j] = q * dy[j];
      du_s[j] = fmaf(filters.tap(W - 1, j), dq[j], du[W - 2][j]);
#pragma unroll
      for (int k = W - 2; k > 0; --k) du[k][j] = fmaf(filters.tap(k, j), dq[j], du[k - 1][j]);
      du[0][j] = filters.tap(0, j) * dq[j];
    }
    if (owned.t) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        d_first[j] = fmaf(dq[j], u[i][j], d_first[j]);
#pragma unroll
        for (int k = 1; k < W; ++k) d_taps[k] = fmaf(dq[j], u[ago(i, k)][j], d_taps[k]);
      }
      add_featurizer(kPost, d_post, z[kPost], past[kPost]);
    }
#pragma unroll
    for (int third = 0; third < 3; ++third) remember(past[third], z[third]);
    push_featurizer(kPost, d_post, out);
    if (states) states_of_dz(kPost, r - 2, out);
    if (owned.dz_post) store_vector<T, V>(dx_now, out);

    if (states) states_of_du(r - kDelay, du_s);
    if (!owned.delayed) return;
    gates = rows.late_gates[threadIdx.x];
#pragma unroll
    for (int third = kPre; third <= kValue; ++third) {
      unpack(rows.late[third - kPre][strip.column], z[third]);
      float d_c[V];
#pragma unroll
      for (int j = 0; j < V; ++j) d_c[j] = gates.at[third == kPre ? V + j : j] * du_s[j];
      if (owned.s) add_featurizer(third, d_c, z[third], before[third]);
      remember(before[third], z[third]);
      push_featurizer(third, d_c, out);
      if (states) states_of_dz(third, r - kDelay - 2, out);
      if (owned.dz) store_vector<T, V>(third == kPre ? dx_late : dx_late + p.width, out);
    }
  }
};

template <class T, int V, int kUnit, int W>
__global__ void __launch_bounds__(kFirMarchThreads, 1)
    fir_march_bwd_kernel(const __grid_constant__ FirBwdParams p,
                         const __grid_constant__ FirMarch plan) {
  using Traits = FirMarchBwd<T, V, kUnit, W>;
  using Copies = typename Traits::Copies;
  constexpr int kGroup = Traits::kGroup, kDelay = Traits::kDelay;
  const FirStrip strip(p, plan);
  if (strip.warp_d >= p.width) return;
  const Copies copies(strip);
  const T* z = static_cast<const T*>(p.x) + strip.b * p.x_stride_b;
  const T* dy = static_cast<const T*>(p.dy) + strip.b * p.dy_stride_b;
  {
    const int end = strip.begin + Traits::kAhead * kGroup;
#pragma unroll
    for (int third = 0; third < 3; ++third) {
      Copies::prefetch(p, strip, z + third * p.width, p.x_stride_l, strip.begin - (W + 1), end);
    }
    Copies::prefetch(p, strip, dy, p.dy_stride_l, strip.begin, end);
  }
  wait_for_earlier_kernels();

  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(shared_bytes);
  constexpr int kTail = W + 1;  // steps beyond the strip that its gradients reach
  const int rows = strip.steps + kTail;
  // Rows up to kTail beyond the strip that are the sequence's; of pre and value two are enough.
  const int beyond = min(static_cast<int>(p.length) - strip.begin - strip.steps, kTail);
  const int end = copies.channel < p.width ? strip.steps + beyond - copies.row : 0;
  const int end_late = end - max(beyond - 2, 0);
  z += (strip.begin + copies.row) * p.x_stride_l + copies.channel;
  dy += (strip.begin + copies.row) * p.dy_stride_l + copies.channel;
  const auto copy_group = [&](int first) {
    auto* row = shared.rows + first / kGroup % Traits::kSlots * kGroup;
    auto* late_row = shared.late_rows + first / kGroup % Traits::kLateSlots * kGroup;
#pragma unroll
    for (int i = 0; i < kGroup; i += Copies::kTogether) {
      const bool good = first + i < end, good_late = first + i < end_late;
      copies.copy(row, i, 0, z, good);
      copies.copy(row, i, 1, dy, good);
      copies.copy(late_row, i, 0, z + p.width, good_late);
      copies.copy(late_row, i, 1, z + 2 * p.width, good_late);
      z += Copies::kTogether * p.x_stride_l;
      dy += Copies::kTogether * p.dy_stride_l;
    }
    copies_commit();
  };
#pragma unroll
  for (int i = 0; i < Traits::kAhead; ++i) copy_group(i * kGroup);

  const FirFilters<T, V, W> filters(p, plan, strip.d);
  FirBackwardMarch<T, V, W, Traits> march(p, strip, filters);
  const int64_t N = 3 * p.width;
  T* dx = static_cast<T*>(p.dx) + (strip.b * p.length + strip.begin - 2) * N + strip.d;
  const bool states = p.d_featurizer_state != nullptr || p.d_featurizer_state_out != nullptr ||
                      p.d_state != nullptr || p.d_state_out != nullptr;
  // What the first and the last group of a strip of whole groups own is known at compile time.
  const bool whole =
      !states && kTail <= kGroup && strip.steps % kGroup == 0 && strip.steps > kGroup;
  for (int first = 0; first < rows; first += kGroup) {
    copies_wait<Traits::kAhead - 1>();
    __syncwarp();  // the group is there, and the one that its copies replace has been read
    copy_group(first + Traits::kAhead * kGroup);
    const int group = first / kGroup;
    // Row i of the group that came `back` groups ago, in a ring of so many slots.
    const auto in_ring = [&](int slots, int back, int i) {
      return (group + slots - back) % slots * kGroup + i;
    };
    // Step i of the group; its u goes to u[to].
    const auto step = [&](FirOwned owned, bool mind_states, int i, int to) {
      const int back = i >= kDelay ? 0 : (kDelay - i + kGroup - 1) / kGroup;
      const int late = i - kDelay + back * kGroup;
      march.step(owned, mind_states, first + i, to,
                 {shared.rows[in_ring(Traits::kSlots, 0, i)],
                  shared.late_rows[in_ring(Traits::kLateSlots, 0, i)],
                  shared.late_rows[in_ring(Traits::kLateSlots, back, late)],
                  shared.gates[in_ring(Traits::kGateSlots, 0, i)],
                  shared.gates[in_ring(Traits::kGateSlots, back, late)]},
                 dx, dx - kDelay * N + p.width);
      dx += N;
    };
    const auto group_of_steps = [&](auto owned) {
      if (!Traits::kRing) march.template move_history<kGroup>();
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        step(owned(i), false, i, Traits::kRing ? i : kDelay + i);
      }
    };
    if (first >= kTail && first + kGroup <= strip.steps) {
      group_of_steps([](int) { return FirOwned{true, true, true, true, true}; });
    } else if (whole && first == 0) {
      group_of_steps([](int i) {
        return FirOwned{true, i >= 2, i >= kDelay, i >= kDelay, i >= kDelay + 2};
      });
    } else if (whole && first == strip.steps) {
      group_of_steps([](int i) {
        return FirOwned{false, i < 2, true, i < kDelay, i < kDelay + 2};
      });
    } else {
#pragma unroll 1
      for (int i = 0; i < kGroup; ++i) {
        const int r = first + i, s = r - kDelay, n = strip.steps;
        march.template move_history<1>();
        step({r < n, r >= 2 && r - 2 < n, s >= 0, s < n, s >= 2 && s - 2 < n}, states, i,
             Traits::kHistory - 1);
      }
    }
  }

  // Partial sums of this strip; fir_plan.h has the layouts.
  const int64_t row = strip.b * plan.strips + strip.index;
  auto* d_f = static_cast<float*>(p.featurizer_partial) + row * 9 * p.width + strip.d * 3;
#pragma unroll
  for (int third = 0; third < 3; ++third) {
    Vector<float, V> values[3];
#pragma unroll
    for (int i = 0; i < 3 * V; ++i) {
      values[i / V].at[i % V] = march.d_featurizer[third][i % 3][i / 3];
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      *reinterpret_cast<Vector<float, V>*>(d_f + third * 3 * p.width + i * V) = values[i];
    }
  }
  const int64_t threads = p.width / V;
  auto* d_h = static_cast<float*>(p.taps_partial) + row * (p.width + (p.num_taps - 1) * threads);
#pragma unroll
  for (int j = 0; j < V; ++j) d_h[strip.d + j] = march.d_first[j];
#pragma unroll
  for (int k = 1; k < W; ++k) {
    if (k < p.num_taps) d_h[p.width + (k - 1) * threads + strip.d / V] = march.d_taps[k];
  }
}

constexpr int kSumThreads = 256, kSumParts = kSumThreads / 32;  // a warp sums a part of the strips
constexpr int kSumColumns = 4;                                  // of a thread

/// Sums the partials of all `strips`, always in the same order: d_featurizer [3D, 3] and d_skip by
/// columns; then d_taps, a warp for each.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    fir_march_sum_kernel(const __grid_constant__ FirBwdParams p, int strips, int vector) {
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32;
  const auto* d_f = static_cast<const float*>(p.featurizer_partial);
  const auto* d_h = static_cast<const float*>(p.taps_partial);
  const int width = static_cast<int>(p.width), taps = static_cast<int>(p.num_taps);
  const int threads = width / vector;
  const int f_columns = 9 * width, h_columns = width + (taps - 1) * threads;
  const int columns = f_columns + (p.d_skip != nullptr ? width : 0);
  const int column_blocks = ceil_div(columns, 32 * kSumColumns);
  const int block = static_cast<int>(blockIdx.x);
  wait_for_earlier_kernels();
  if (block < column_blocks) {
    __shared__ float parts[kSumParts][kSumColumns][32];
#pragma unroll
    for (int i = 0; i < kSumColumns; ++i) {
      const int column = (block * kSumColumns + i) * 32 + lane;
      const bool skip = column >= f_columns;
      const float* from = skip ? d_h + (column - f_columns) : d_f + column;
      float sum = 0;
      for (int64_t strip = part; strip < strips && column < columns; strip += kSumParts) {
        sum += from[strip * (skip ? h_columns : f_columns)];
      }
      parts[part][i][lane] = sum;
    }
    __syncthreads();
    const int column = (block * kSumColumns + part) * 32 + lane;
    if (part >= kSumColumns || column >= columns) return;
    float sum = parts[0][part][lane];
    for (int i = 1; i < kSumParts; ++i) sum += parts[i][part][lane];
    if (column < f_columns) {
      store_parameter<T>(p.d_featurizer, p.featurizer_is_T, column, sum);
    } else {
      store_parameter<T>(p.d_skip, p.skip_is_T, column - f_columns, sum);
    }
    return;
  }
  const int tap = (block - column_blocks) * kSumParts + part;  // of [G, W]
  const int groups = static_cast<int>(p.groups);
  if (tap >= groups * taps) return;
  const int g = tap / taps, k = tap % taps;
  const int count = k == 0 ? width / groups : threads / groups;  // partials of a strip
  const float* from = d_h + g * count + (k == 0 ? 0 : width + (k - 1) * threads);
  float sum = 0;
  for (int i = lane; i < strips * count; i += 32) {
    sum += from[int64_t{i / count} * h_columns + i % count];
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (lane == 0) store_parameter<T>(p.d_taps, p.taps_is_T, tap, sum);
}

template <class T>
Status run(const FirBwdParams& p, const FirMarch& plan, cudaStream_t stream) {
  return with_variant<kFirMarchBwdBytes / sizeof(T), sizeof(T)>(
      plan, [&]<int V, int kUnit, int W>() -> Status {
        const int shared = fir_march_shared(
            p, plan, static_cast<int>(sizeof(typename FirMarchBwd<T, V, kUnit, W>::Shared)));
        const dim3 grid(plan.columns, p.batch, plan.strips);
        const Status status = fir_march_launch<FirBwdParams>(fir_march_bwd_kernel<T, V, kUnit, W>,
                                                             grid, shared, stream, p, plan);
        if (!status.ok()) return status;
        const int64_t columns = (9 + (p.d_skip != nullptr)) * p.width;
        const int64_t blocks = fir_ceil_div(columns, 32 * kSumColumns) +
                               fir_ceil_div(p.groups * p.num_taps, kSumParts);
        launch_early(fir_march_sum_kernel<T>, dim3(static_cast<unsigned>(blocks)), kSumThreads, 0,
                     stream, p, static_cast<int>(p.batch) * plan.strips, V);
        return launch_status(plan.name);
      });
}

}  // namespace

Status fir_march_bwd(const FirBwdParams& p, const FirMarch& plan, DType dtype,
                     cudaStream_t stream) {
  return dtype == DType::kFloat32 ? run<float>(p, plan, stream)
                                  : run<__nv_bfloat16>(p, plan, stream);
}

}  // namespace sarissa::kernels
