// One step of hyena_fir with few taps (L = 1), as decoding takes it: a thread owns V neighbouring
// channels of one batch element. The same sums in the same order as the march.
#include "sarissa/kernels/fir/fir_march.cuh"

namespace sarissa::kernels {
namespace {

template <class T, int V, int W>
__global__ void __launch_bounds__(kFirMarchThreads)
    fir_march_step_kernel(const __grid_constant__ FirParams p,
                          const __grid_constant__ FirMarch plan) {
  const int thread =
      static_cast<int>(blockIdx.x) * kFirMarchThreads + static_cast<int>(threadIdx.x);
  const int d = thread * V;
  if (d >= p.width) return;
  const int64_t b = blockIdx.y, N = 3 * p.width;
  const int rows = static_cast<int>(p.num_taps) - 1;  // of the state

  // All loads come before their first use: they take one memory latency together.
  const T* z = static_cast<const T*>(p.x) + b * p.x_stride_b + d;
  const T* z_state = static_cast<const T*>(p.featurizer_state) + b * 2 * N + d;
  const float* u_state = static_cast<const float*>(p.state) + b * rows * p.width + d;
  Vector<T, V> z_now[3], z_past[2][3];  // z_past[i] is i + 1 steps ago
  Vector<float, V> u_past[W - 1];       // likewise
#pragma unroll
  for (int third = 0; third < 3; ++third) {
    z_now[third] = load_vector<T, V>(z + third * p.width);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      z_past[i][third] =
          load_vector<T, V>(z_state + (1 - i) * N + third * p.width, p.featurizer_state != nullptr);
    }
  }
  if (p.state != nullptr && rows > 0) {
#pragma unroll
    for (int i = 0; i < W - 1; ++i) {
      u_past[i] = load_vector<float, V>(u_state + max(rows - 1 - i, 0) * p.width);
    }
  } else {
#pragma unroll
    for (int i = 0; i < W - 1; ++i) u_past[i] = Vector<float, V>::zero();
  }
  const FirFilters<T, V, W> filters(p, plan, d);

  float c[3][V], y[V];
#pragma unroll
  for (int third = 0; third < 3; ++third) {
    float now[V], past[2][V];
    unpack(z_now[third], now);
    unpack(z_past[0][third], past[0]);
    unpack(z_past[1][third], past[1]);
    three_taps(filters.featurizer[third], now, past, c[third]);
  }
  Vector<float, V> u;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    u.at[j] = c[kPre][j] * c[kValue][j];
    float q = 0.0f;
#pragma unroll
    for (int i = W - 2; i >= 0; --i) {
      q = fmaf(filters.taps[i + 1], i < rows ? u_past[i].at[j] : 0.0f, q);
    }
    y[j] = c[kPost][j] * fmaf(filters.first[j], u.at[j], q);
  }
  store_vector<T, V>(static_cast<T*>(p.y) + b * p.width + d, y);

  if (p.state_out != nullptr) {
    float* out = static_cast<float*>(p.state_out) + b * rows * p.width + d;
    const auto put = [&](int row, const Vector<float, V>& x) {
      if (row >= 0) *reinterpret_cast<Vector<float, V>*>(out + row * p.width) = x;
    };
    put(rows - 1, u);
#pragma unroll
    for (int i = 0; i < W - 2; ++i) put(rows - 2 - i, u_past[i]);
  }
  if (p.featurizer_state_out != nullptr) {
    T* out = static_cast<T*>(p.featurizer_state_out) + b * 2 * N + d;
#pragma unroll
    for (int third = 0; third < 3; ++third) {
      *reinterpret_cast<Vector<T, V>*>(out + third * p.width) = z_past[0][third];
      *reinterpret_cast<Vector<T, V>*>(out + N + third * p.width) = z_now[third];
    }
  }
}

template <class T>
Status run(const FirParams& p, const FirMarch& plan, cudaStream_t stream) {
  return with_variant<kFirMarchFwdBytes / sizeof(T), 16>(
      plan, [&]<int V, int kUnit, int W>() -> Status {
        return fir_march_launch<FirParams>(fir_march_step_kernel<T, V, W>,
                                           dim3(plan.columns, p.batch), 0, stream, p, plan);
      });
}

}  // namespace

Status fir_march_step(const FirParams& p, const FirMarch& plan, DType dtype, cudaStream_t stream) {
  return dtype == DType::kFloat32 ? run<float>(p, plan, stream)
                                  : run<__nv_bfloat16>(p, plan, stream);
}

}  // namespace sarissa::kernels
