// One step on CUDA, for decoding: a thread owns 4 neighbouring channels of a head (or one), reads
// their state, makes the step of README.md and writes the state. Nothing is worth keeping in flight
// but the reads themselves, so it needs few registers and fills the machine with threads.
#include "sarissa/kernels/swr/swr_cuda.cuh"

namespace sarissa::kernels {
namespace {

template <class T, int V, bool kGated>
__global__ void __launch_bounds__(kSwrThreads) swr_step_kernel(SwrFwdParams params) {
  using C = compute_t<T>;
  const SwrInputs& in = params.in;
  const int64_t channels = in.heads * in.width;
  const int64_t i = (int64_t{blockIdx.x} * kSwrThreads + threadIdx.x) * V;
  if (i >= in.batch * channels) return;
  const int64_t row = i / channels, channel = i % channels;
  const int64_t h = channel / in.width, p = channel % in.width;
  const int64_t head = row * in.heads + h;

  const SwrChannel<T, kGated> at(in, row, h, p);
  wait_for_earlier_kernels();
  C w[V] = {}, v[V] = {}, r = C(1);
  int64_t index = 0;
  if (in.w != nullptr) {
    const auto w_in = load_vector<C, V>(static_cast<const C*>(in.w) + i);
    const auto v_in = load_vector<C, V>(static_cast<const C*>(in.v) + i);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      w[j] = w_in[j];
      v[j] = v_in[j];
    }
    r = static_cast<const C*>(in.r)[head];
    if (in.window > 0) index = swr_grid(in, row).index;
  }
  const bool full = in.window == 0;
  if (full) {  // the whole state in w
#pragma unroll
    for (int j = 0; j < V; ++j) w[j] += r * v[j];
  }
  const C a = at.coefficient(0);
  const Vector<T, V> u = load_vector<T, V>(at.u);
  const auto b = kGated ? load_vector<T, V>(at.b) : u;
  const auto c = kGated ? load_vector<T, V>(at.c) : u;
  r = full ? C(1) : r * a;
  C out[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    C input = u[j];
    if constexpr (kGated) input *= sigmoid<T>(b[j]);
    w[j] = a * w[j] + input;
    out[j] = full ? w[j] : w[j] + r * v[j];
    if constexpr (kGated) out[j] = c[j] * out[j] + u[j];
  }
  store_vector<T, V>(static_cast<T*>(params.x) + i, out);

  const bool complete = !full && index + 1 == in.window;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    v[j] = full || complete ? w[j] : v[j];
    w[j] = full || complete ? C(0) : w[j];
  }
  store_vector<C, V>(static_cast<C*>(params.w) + i, w);
  store_vector<C, V>(static_cast<C*>(params.v) + i, v);
  if (p == 0) static_cast<C*>(params.r)[head] = complete ? C(1) : r;
  if (channel == 0) params.index[row] = full || complete ? 0 : static_cast<int32_t>(index + 1);
}

template <class T, int V, bool kGated>
Status launch(const SwrFwdParams& params, cudaStream_t stream) {
  const SwrInputs& in = params.in;
  const int64_t ctas = ceil_div<int64_t>(in.batch * in.heads * in.width, int64_t{V} * kSwrThreads);
  launch_early(swr_step_kernel<T, V, kGated>, dim3(static_cast<unsigned>(ctas)), kSwrThreads, 0,
               stream, params);
  return launch_status("step");
}

}  // namespace

Status swr_step_cuda(const SwrFwdParams& params, DType dtype, void* stream) {
  return swr_with_dtype(dtype, [&]<class T>() {
    constexpr int V = 8 / sizeof(T);
    const auto s = static_cast<cudaStream_t>(stream);
    if constexpr (V > 1) {
      using C = compute_t<T>;
      if (swr_vectors_fit<T, V>(params) && vector_aligned<C, V>(params.in.w, {}) &&
          vector_aligned<C, V>(params.in.v, {}) && vector_aligned<C, V>(params.w, {}) &&
          vector_aligned<C, V>(params.v, {})) {
        return params.in.gated ? launch<T, V, true>(params, s) : launch<T, V, false>(params, s);
      }
    }
    return params.in.gated ? launch<T, 1, true>(params, s) : launch<T, 1, false>(params, s);
  });
}

}  // namespace sarissa::kernels
