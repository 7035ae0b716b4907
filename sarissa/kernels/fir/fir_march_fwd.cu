// Forward of hyena_fir with few taps by marching; see fir_march.cuh.
#include "sarissa/kernels/fir/fir_march.cuh"

namespace sarissa::kernels {
namespace {

/// Constants of the forward: elements T, V channels per thread, copies of kUnit bytes, W taps.
template <class T, int V, int kUnit, int W>
struct FirMarchFwd {
  static constexpr int kGroup = 32 * V * sizeof(T) == 64 ? 8 : 4;  // rows between waits for copies
  static constexpr int kAhead = 4;                                 // groups on their way
  static constexpr int kSlots = kAhead + 1;
  using Copies = FirCopies<T, V, kUnit, 3, kGroup>;
  static constexpr int kSharedBytes = kSlots * kGroup * sizeof(typename Copies::Row);
  /// Steps before a strip that are marched for what the strip needs of them.
  static constexpr int kWarm = (W + 1 + kGroup - 1) / kGroup * kGroup;
};

/// The blocks after the last strip: the states at L.
template <class T, int V, int W>
__device__ void store_states(const FirParams& p, const FirStrip& strip,
                             const FirFilters<T, V, W>& filters) {
  const FirHistory<T, V, W> end(p, filters, strip);
  if (p.state_out != nullptr) {
    auto* out = static_cast<float*>(p.state_out) + strip.b * (p.num_taps - 1) * p.width + strip.d;
#pragma unroll
    for (int i = 0; i < W - 1; ++i) {
      const int64_t row = p.num_taps - 2 - i;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (row >= 0) out[row * p.width + j] = end.u[i][j];
      }
    }
  }
  if (p.featurizer_state_out != nullptr) {
    auto* out = static_cast<T*>(p.featurizer_state_out) + strip.b * 6 * p.width + strip.d;
#pragma unroll
    for (int third = 0; third < 3; ++third) {
      store_vector<T, V>(out + third * p.width, end.z[third][1]);
      store_vector<T, V>(out + (3 + third) * p.width, end.z[third][0]);
    }
  }
}

template <class T, int V, int kUnit, int W>
__global__ void __launch_bounds__(kFirMarchThreads, 1)
    fir_march_fwd_kernel(const __grid_constant__ FirParams p,
                         const __grid_constant__ FirMarch plan) {
  using Traits = FirMarchFwd<T, V, kUnit, W>;
  using Copies = typename Traits::Copies;
  constexpr int kGroup = Traits::kGroup;
  const FirStrip strip(p, plan);
  if (strip.warp_d >= p.width) return;
  const bool is_end = strip.index == plan.strips;
  const int warm = strip.index == 0 || is_end ? 0 : Traits::kWarm;

  extern __shared__ __align__(16) unsigned char shared[];
  auto* ring = reinterpret_cast<typename Copies::Row*>(shared);
  const Copies copies(strip);
  const T* const z = static_cast<const T*>(p.x) + strip.b * p.x_stride_b;
#pragma unroll
  for (int third = 0; third < 3; ++third) {
    const int first = strip.begin - warm;
    Copies::prefetch(p, strip, z + third * p.width, p.x_stride_l, first,
                     first + Traits::kAhead * kGroup);
  }
  wait_for_earlier_kernels();
  const T* next = z + (strip.begin - warm + copies.row) * p.x_stride_l + copies.channel;
  // Rows of the strip, numbered from its begin, that this lane copies: of post two before it.
  const int end = copies.channel < p.width ? strip.steps - copies.row : -Traits::kWarm - 32;
  const int post_begin = -2 - copies.row;
  const auto copy_group = [&](int first) {
    auto* slot = ring + (first + warm) / kGroup % Traits::kSlots * kGroup;
#pragma unroll
    for (int i = 0; i < kGroup; i += Copies::kTogether, next += Copies::kTogether * p.x_stride_l) {
      const bool good = first + i < end;
      copies.copy(slot, i, kPost, next, good && first + i >= post_begin);
      copies.copy(slot, i, kPre, next + p.width, good);
      copies.copy(slot, i, kValue, next + 2 * p.width, good);
    }
    copies_commit();
  };
#pragma unroll
  for (int i = 0; i < Traits::kAhead; ++i) copy_group(i * kGroup - warm);

  const FirFilters<T, V, W> filters(p, plan, strip.d);
  if (is_end) {
    store_states<T>(p, strip, filters);
    return;
  }

  // sums[k]: what u up to now contribute to q in k + 1 steps. Each new u moves every sum one step
  // nearer, so q adds its taps from the oldest to the newest, wherever a strip starts. It starts
  // from the states, or W + 1 steps early: earlier ones do not reach it.
  float sums[W - 1][V] = {}, past[3][2][V] = {};
  const auto push = [&](const float(&u)[V]) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
#pragma unroll
      for (int k = 0; k < W - 2; ++k) sums[k][j] = fmaf(filters.taps[k + 1], u[j], sums[k + 1][j]);
      sums[W - 2][j] = filters.taps[W - 1] * u[j];
    }
  };
  if (strip.index == 0 && p.featurizer_state != nullptr) {
    const T* from = static_cast<const T*>(p.featurizer_state) + strip.b * 6 * p.width + strip.d;
#pragma unroll
    for (int third = 0; third < 3; ++third) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        unpack(load_vector<T, V>(from + ((1 - i) * 3 + third) * p.width), past[third][i]);
      }
    }
  }
  if (strip.index == 0 && p.state != nullptr) {
    const int rows = static_cast<int>(p.num_taps) - 1;
    const auto* from = static_cast<const float*>(p.state) + strip.b * rows * p.width + strip.d;
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
      float u[V];
#pragma unroll
      for (int j = 0; j < V; ++j) u[j] = from[row * p.width + j];
      push(u);
    }
  }

  T* y = static_cast<T*>(p.y) + (strip.b * p.length + strip.begin - warm) * p.width + strip.d;
  for (int first = -warm; first < strip.steps; first += kGroup) {
    copies_wait<Traits::kAhead - 1>();
    __syncwarp();  // the group is there, and the one before has been read
    copy_group(first + Traits::kAhead * kGroup);
    const auto* slot = ring + (first + warm) / kGroup % Traits::kSlots * kGroup;
#pragma unroll
    for (int i = 0; i < kGroup; ++i, y += p.width) {
      float z[3][V], c[3][V], u[V], out[V];
#pragma unroll
      for (int third = 0; third < 3; ++third) {
        unpack(slot[i][third][strip.column], z[third]);
        three_taps(filters.featurizer[third], z[third], past[third], c[third]);
        remember(past[third], z[third]);
      }
#pragma unroll
      for (int j = 0; j < V; ++j) {
        u[j] = c[kPre][j] * c[kValue][j];
        out[j] = c[kPost][j] * fmaf(filters.first[j], u[j], sums[0][j]);
      }
      push(u);
      const int row = first + i;
      if (row >= 0 && row < strip.steps) store_vector<T, V>(y, out);
    }
  }
}

template <class T>
Status run(const FirParams& p, const FirMarch& plan, cudaStream_t stream) {
  return with_variant<kFirMarchFwdBytes / sizeof(T), sizeof(T)>(
      plan, [&]<int V, int kUnit, int W>() -> Status {
        const int shared = fir_march_shared(p, plan, FirMarchFwd<T, V, kUnit, W>::kSharedBytes);
        const dim3 grid(plan.columns, p.batch, plan.strips + 1);
        return fir_march_launch<FirParams>(fir_march_fwd_kernel<T, V, kUnit, W>, grid, shared,
                                           stream, p, plan);
      });
}

}  // namespace

Status fir_march_fwd(const FirParams& p, const FirMarch& plan, DType dtype, cudaStream_t stream) {
  return dtype == DType::kFloat32 ? run<float>(p, plan, stream)
                                  : run<__nv_bfloat16>(p, plan, stream);
}

}  // namespace sarissa::kernels
