// One step on CUDA, for decoding: a thread owns 4 neighbouring channels of a head (or one), reads
// their state, makes the step of README.md and writes the state. Nothing is worth keeping in flight
// but the reads themselves, so it needs few registers and fills the machine with threads. While the
// kernel before it ends, it already asks the L2 cache for what it reads. (Not for the index: so few
// bytes for which all threads ask are in the way.)
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
  const C* const w_in = static_cast<const C*>(in.w) + i;
  const C* const v_in = static_cast<const C*>(in.v) + i;
  const C* const r_in = static_cast<const C*>(in.r) + head;
  const int32_t* const index_in = in.index + row;
  const bool has_state = in.w != nullptr, full = in.window == 0;
  prefetch(w_in, has_state);
  prefetch(v_in, has_state);
  prefetch(r_in, has_state);
  prefetch(at.a);
  prefetch(at.u);
  prefetch(at.b, kGated);
  prefetch(at.c, kGated);
  wait_for_earlier_kernels();
  // All loads come before the first use of one: they take one memory latency together.
  const Vector<T, V> u = load_vector<T, V>(at.u);
  const auto b = kGated ? load_vector<T, V>(at.b) : u;
  const auto c = kGated ? load_vector<T, V>(at.c) : u;
  const auto a_in = load_vector<T, 1>(at.a);
  Vector<C, V> w_given = Vector<C, V>::zero(), v_given = Vector<C, V>::zero();
  C r = C(1);
  int32_t index_given = 0;
  if (has_state) {
    w_given = load_vector<C, V>(w_in);
    v_given = load_vector<C, V>(v_in);
    r = *r_in;
    if (!full) index_given = *index_in;
  }
  const int64_t index = SwrGrid(in.window, index_given, 1).index;
  const C a = kGated ? at.decay_max * sigmoid<T>(a_in[0]) : a_in[0];
  C w[V], v[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    v[j] = v_given[j];
    w[j] = full ? w_given[j] + r * v[j] : w_given[j];  // full: the whole state in w
  }
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
  return with_dtype(dtype, [&]<class T>() {
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
