// One step of hyena_fir (L = 1), as decoding takes it, with any number of taps.
//
// The state moves on by one row, so a step copies all of it; the sum of the taps is made on the
// way. A thread owns V neighbouring channels of one batch element and runs of kRun neighbouring
// taps: tap k belongs to the u of k steps ago, row W-1 - k of the state, which goes to row W-2 - k.
// A block spreads the runs over its threads, so that the whole state is on its way at once also
// where a single sequence is decoded. More threads run the featurizer, one for each third of z. In
// the end the first thread of each column of channels adds the sums of the runs in a fixed order,
// and tap 0, which is the step itself. Few taps are summed in order (kInOrder), as the march does:
// the first run continues the sum of the second.
#include "sarissa/kernels/fir/fir_step.cuh"

#include "sarissa/kernels/fir/fir_march.cuh"

namespace sarissa::kernels {
namespace {

/// Threads of a block at most: those of the runs, and of the gates.
template <bool kInOrder>
constexpr int kThreads = kInOrder ? (2 + 3) * 32 : kFirStepThreads + 3 * 8;

/// Taps first .. first + kRun - 1 of a group, as they lie in memory; those beyond p.num_taps are
/// zero. P is their type.
template <class P, int kRun>
struct RawRun {
  static constexpr int kWide = std::min<int>(16 / sizeof(P), kRun);
  Vector<P, kWide> at[kRun / kWide];

  __device__ void load(const FirParams& p, bool aligned, int64_t group, int first) {
    const P* from = static_cast<const P*>(p.taps) + group * p.num_taps + first;
    if (aligned && first + kRun <= p.num_taps) {
#pragma unroll
      for (int i = 0; i < kRun / kWide; ++i) at[i] = load_vector<P, kWide>(from + i * kWide);
    } else {
      Vector<P, 1> taps[kRun];  // all on their way before the first is packed
#pragma unroll
      for (int i = 0; i < kRun; ++i) taps[i] = load_vector<P, 1>(from + i, first + i < p.num_taps);
#pragma unroll
      for (int i = 0; i < kRun / kWide; ++i) {
        float packed[kWide];
#pragma unroll
        for (int j = 0; j < kWide; ++j) packed[j] = taps[i * kWide + j][0];
        at[i].set(packed);
      }
    }
  }
  __device__ float operator[](int i) const { return at[i / kWide][i % kWide]; }
};

/// Taps first .. first + kRun - 1 of a thread's channels and the rows of the state that belong to
/// them. Tap 0 is the step itself, which has no row.
template <class P, int V, int kRun, bool kShared>
struct Run {
  Vector<float, V> u[kRun];  // of first + i steps ago
  RawRun<P, kRun> taps[kShared ? 1 : V];

  /// All loads come before the first use of one: they take one memory latency together.
  __device__ void load(const FirParams& p, const FirStep& plan, int64_t b, int d, int group,
                       int first) {
    const int64_t D = p.width;
    const int W = static_cast<int>(p.num_taps);
    const float* state = static_cast<const float*>(p.state) + (b * (W - 1) + W - 1) * D + d;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int k = first + i;
      u[i] = load_vector<float, V>(state - k * D, k > 0 && k < W && p.state != nullptr);
    }
#pragma unroll
    for (int j = 0; j < (kShared ? 1 : V); ++j) {
      const int of_channel = kShared ? group : (d + j) / plan.group_width;
      taps[j].load(p, plan.runs_align, of_channel, first);
    }
  }
  __device__ float tap(int i, int j) const { return taps[kShared ? 0 : j][i]; }
  /// Continues `sum` with the run's products but tap 0's, the oldest first.
  __device__ void add(int first, float* sum) const {
#pragma unroll
    for (int i = kRun - 1; i >= 0; --i) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (first + i > 0) sum[j] = fmaf(tap(i, j), u[i].at[j], sum[j]);
      }
    }
  }
  /// Moves the rows on.
  __device__ void store(const FirParams& p, int64_t b, int d, int first) const {
    const int64_t D = p.width;
    const int W = static_cast<int>(p.num_taps);
    float* state_out = static_cast<float*>(p.state_out) + (b * (W - 1) + W - 2) * D + d;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int k = first + i;
      if (k > 0 && k < W - 1) *reinterpret_cast<Vector<float, V>*>(state_out - k * D) = u[i];
    }
  }
};

/// Prefetches the state of a thread's first run of taps, those taps and the skip.
template <class T, class P, int V, int kRun>
__device__ inline void prefetch_runs(const FirParams& p, int64_t b, int d, int group, int lane) {
  const int64_t D = p.width;
  const int W = static_cast<int>(p.num_taps), first = lane * kRun;
  const float* state = static_cast<const float*>(p.state) + (b * (W - 1) + W - 1) * D + d;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    const int k = first + i;
    prefetch(state - k * D, k > 0 && k < W && p.state != nullptr);
  }
  prefetch(static_cast<const P*>(p.taps) + group * p.num_taps + first, first < W);
  const int64_t bytes = p.skip_is_T ? sizeof(T) : sizeof(float);
  prefetch(static_cast<const char*>(p.skip) + d * bytes, lane == 0 && p.skip != nullptr);
}

/// The featurizer of one third of z; its state moves on where `mine`.
template <class T, int V>
__device__ inline Vector<float, V> gate(const FirParams& p, int64_t b, int64_t channel, bool mine) {
  const int64_t N = 3 * p.width;
  const T* state = static_cast<const T*>(p.featurizer_state) + b * 2 * N + channel;
  const auto now = load_vector<T, V>(static_cast<const T*>(p.x) + b * p.x_stride_b + channel);
  const auto past_1 = load_vector<T, V>(state + N, p.featurizer_state != nullptr);
  const auto past_2 = load_vector<T, V>(state, p.featurizer_state != nullptr);
  const auto taps = [&](int i) {
    return ParameterVector<T, V>(p.featurizer, p.featurizer_is_T, channel * 3 + i * V);
  };
  const ParameterVector<T, V> featurizer[3] = {taps(0), taps(1), taps(2)};
  if (mine && p.featurizer_state_out != nullptr) {
    T* out = static_cast<T*>(p.featurizer_state_out) + b * 2 * N + channel;
    *reinterpret_cast<Vector<T, V>*>(out) = past_1;
    *reinterpret_cast<Vector<T, V>*>(out + N) = now;
  }
  Vector<float, V> c;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const auto tap = [&](int k) { return featurizer[(3 * j + k) / V][(3 * j + k) % V]; };
    c.at[j] = three_taps(tap(0), tap(1), tap(2), now[j], past_1[j], past_2[j]);
  }
  return c;
}

/// Prefetches what `gate` reads.
template <class T, int V>
__device__ inline void prefetch_gate(const FirParams& p, int64_t b, int64_t channel) {
  const int64_t N = 3 * p.width;
  const T* state = static_cast<const T*>(p.featurizer_state) + b * 2 * N + channel;
  prefetch(static_cast<const T*>(p.x) + b * p.x_stride_b + channel);
  prefetch(state + N, p.featurizer_state != nullptr);
  prefetch(state, p.featurizer_state != nullptr);
  const int64_t bytes = p.featurizer_is_T ? sizeof(T) : sizeof(float);
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    prefetch(static_cast<const char*>(p.featurizer) + (channel * 3 + i * V) * bytes);
  }
}

/// P is the type of the taps; the channels of a thread share them or not.
template <class T, class P, int V, int kRun, bool kInOrder, bool kShared>
__global__ void __launch_bounds__(kThreads<kInOrder>)
    fir_step_kernel(const __grid_constant__ FirParams p, const __grid_constant__ FirStep plan) {
  constexpr int kMostColumns = 32;
  __shared__ Vector<float, V> gates[3][kMostColumns];
  __shared__ Vector<float, V> sums[128];  // of runs
  const int thread = static_cast<int>(threadIdx.x), columns = 1 << plan.column_bits;
  const int lane = thread >> plan.column_bits, column = thread & (columns - 1);
  // Columns beyond the last channel take the first ones again and write nothing.
  const int wanted = ((static_cast<int>(blockIdx.x) << plan.column_bits) + column) * V;
  const bool mine = wanted < p.width;
  const int d = mine ? wanted : 0;
  const int64_t b = blockIdx.y, D = p.width;

  const int group = d / plan.group_width;  // of the first channel

  const bool gates_thread = lane >= plan.runs;
  const int third = lane - plan.runs;
  if (gates_thread) {
    prefetch_gate<T, V>(p, b, third * D + d);
  } else {
    prefetch_runs<T, P, V, kRun>(p, b, d, group, lane);
  }
  wait_for_earlier_kernels();
  if (gates_thread) {
    gates[third][column] = gate<T, V>(p, b, third * D + d, mine);
    __syncthreads();
    return;
  }
  const ParameterVector<T, V> skip(p.skip, p.skip_is_T, d, lane == 0 && p.skip != nullptr);
  Run<P, V, kRun, kShared> run;
  float q[V] = {}, tap_0[V], y[V];
  const auto take = [&](int first) {
    run.load(p, plan, b, d, group, first);
    if (mine) run.store(p, b, d, first);
    if (first == 0) {
#pragma unroll
      for (int j = 0; j < V; ++j) tap_0[j] = run.tap(0, j);
    }
  };
  if constexpr (kInOrder) {
    take(lane * kRun);
    if (lane > 0) {
      run.add(lane * kRun, q);
      sums[column].set(q);
    }
  } else {
    for (int first = lane * kRun; first < p.num_taps; first += plan.runs * kRun) {
      take(first);
      run.add(first, q);
    }
    // The runs of a column that are in one warp.
    for (int offset = columns; offset < 32; offset *= 2) {
#pragma unroll
      for (int j = 0; j < V; ++j) q[j] += __shfl_xor_sync(~0u, q[j], offset);
    }
    if (thread % max(32, columns) < columns)
      sums[thread / max(32, columns) * columns + column].set(q);
  }
  __syncthreads();
  if (lane > 0 || !mine) return;

  if constexpr (kInOrder) {
    if (plan.runs > 1) {
      const Vector<float, V> second = sums[column];
#pragma unroll
      for (int j = 0; j < V; ++j) q[j] = second.at[j];
    }
    run.add(0, q);
  } else {  // those of all warps, in order
#pragma unroll
    for (int j = 0; j < V; ++j) q[j] = 0.0f;
    for (int i = 0; i < plan.runs * columns / max(32, columns); ++i) {
#pragma unroll
      for (int j = 0; j < V; ++j) q[j] += sums[i * columns + column][j];
    }
  }
  Vector<float, V> u;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    u.at[j] = gates[kPre][column][j] * gates[kValue][column][j];
    y[j] = gates[kPost][column][j] * fmaf(tap_0[j] + skip[j], u[j], q[j]);
  }
  store_vector<T, V>(static_cast<T*>(p.y) + b * D + d, y);
  if (p.num_taps > 1) {
    const int64_t last = b * (p.num_taps - 1) + p.num_taps - 2;
    *reinterpret_cast<Vector<float, V>*>(static_cast<float*>(p.state_out) + last * D + d) = u;
  }
}

template <class T, class P>
Status run(const FirParams& p, const FirStep& plan, cudaStream_t stream) {
  const auto launch = [&](auto* kernel) -> Status {
    const int columns = 1 << plan.column_bits;
    const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(p.width, columns * plan.vector)),
                    static_cast<unsigned>(p.batch));
    launch_early(kernel, grid, (plan.runs + 3) * columns, 0, stream, p, plan);
    return launch_status(plan.name);
  };
  const auto with_run = [&]<int kRun, bool kInOrder>() -> Status {
    if (plan.vector == 1) return launch(fir_step_kernel<T, P, 1, kRun, kInOrder, true>);
    return plan.group_width % 4 == 0 ? launch(fir_step_kernel<T, P, 4, kRun, kInOrder, true>)
                                     : launch(fir_step_kernel<T, P, 4, kRun, kInOrder, false>);
  };
  if (plan.run == kFirStepShortRun) return with_run.template operator()<kFirStepShortRun, true>();
  return plan.in_order ? with_run.template operator()<kFirStepRun, true>()
                       : with_run.template operator()<kFirStepRun, false>();
}

}  // namespace

Status fir_step(const FirParams& p, const FirStep& plan, DType dtype, cudaStream_t stream) {
  if (dtype == DType::kFloat32) return run<float, float>(p, plan, stream);
  return p.taps_is_T ? run<__nv_bfloat16, __nv_bfloat16>(p, plan, stream)
                     : run<__nv_bfloat16, float>(p, plan, stream);
}

}  // namespace sarissa::kernels
