// Forward on CUDA by marching: a thread owns V neighbouring channels of a head and a strip of
// blocks. It starts one block to the left of the strip, whose local end state is the strip's first
// carry, and holds the next kRing rows in registers, so that memory is never waited for. A full
// recurrence is one strip.
#include "sarissa/kernels/common/vector.cuh"
#include "sarissa/kernels/swr/swr_cuda.cuh"

namespace sarissa::kernels {
namespace {

/// Rows that a thread holds in registers ahead of its arithmetic.
constexpr int kRing = 8;

/// One row of a thread's channels, as stored.
template <class T, int V, bool kGated>
struct Row {
  Vector<T, 1> a;
  Vector<T, V> u;
};
template <class T, int V>
struct Row<T, V, true> {
  Vector<T, 1> a;
  Vector<T, V> u, b, c;
};

template <class T, int V, bool kGated, bool kFull, bool kSaves>
__global__ void __launch_bounds__(kSwrThreads)
    swr_fwd_kernel(SwrFwdParams params, int64_t strips, int64_t strip_blocks) {
  using C = compute_t<T>;
  const SwrInputs& in = params.in;
  const int64_t channels = in.heads * in.width;
  const int64_t lanes = channels / V;  // threads per strip
  const int64_t i = int64_t{blockIdx.x} * kSwrThreads + threadIdx.x;
  if (i >= in.batch * strips * lanes) return;
  const int64_t channel = i % lanes * V;
  const int64_t strip = i / lanes % strips;
  const int64_t row = i / lanes / strips;
  const int64_t h = channel / in.width, p = channel % in.width;

  const SwrGrid grid = swr_grid(in, row);
  const int64_t blocks = grid.blocks();
  const int64_t first = strip * strip_blocks;
  if (first >= blocks) return;
  const int64_t end = min(first + strip_blocks, blocks);
  const int64_t begin = grid.block_begin(first);   // the first step that is this strip's
  const int64_t stop = grid.block_end(end - 1);    // and the first that is not
  const int64_t warm = first > 0 ? first - 1 : 0;  // the block that the march starts with
  // Where the current block is complete; beyond `stop` for an incomplete last block.
  int64_t boundary = (warm + 1) * grid.window - grid.index;

  const SwrChannel<T, kGated> at(in, row, h, p);
  C w[V], v[V], r = C(1);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const SwrStart<C> start(in, row, h, p + j);
    w[j] = warm == 0 ? start.w : C(0);
    v[j] = start.v;
    if (warm == 0) r = start.r;
  }

  int64_t t = grid.block_begin(warm);
  T* x = static_cast<T*>(params.x) + (row * in.length + t) * channels + channel;
  // What the backward wants saved of the strip's blocks: the states before its chunks, and the
  // products of its blocks.
  C* saved_state = nullptr;
  C* saved_product = nullptr;
  int64_t chunk_begin = begin;  // where the next chunk begins
  const auto save_state = [&] {
    C state[V];
#pragma unroll
    for (int j = 0; j < V; ++j) state[j] = w[j] + r * v[j];
    store_vector<C, V>(saved_state, state);
    saved_state += channels;
  };
  if constexpr (kSaves) {
    const int64_t per_block = swr_chunks_per_block(in.window);
    const int64_t skipped = first == 0 ? grid.index / kSwrChunk : 0;  // chunks before the start
    saved_state = static_cast<C*>(params.saved.states) +
                  (row * params.saved.chunks + first * per_block + skipped) * channels + channel;
    saved_product = static_cast<C*>(params.saved.products) +
                    (row * params.saved.chunks / per_block + first) * in.heads + h;
    if (first == 0) {
      save_state();
      chunk_begin = min((skipped + 1) * kSwrChunk - grid.index, boundary);
    }
  }
  SwrChannel<T, kGated> next = at;  // what is fetched next: row `fetched`
  int64_t fetched = t;
  next.advance(t);
  Row<T, V, kGated> ring[kRing];
  // No branches here nor in march_row: a branch would end the compiler's view of what is in flight,
  // and each row would wait for its own loads.
  const auto fetch = [&](Row<T, V, kGated>& to) {
    const bool good = fetched < stop;
    to.a = load_vector<T, 1>(next.a, good);
    to.u = load_vector<T, V>(next.u, good);
    if constexpr (kGated) {
      to.b = load_vector<T, V>(next.b, good);
      to.c = load_vector<T, V>(next.c, good && fetched >= begin);
    }
    next.advance(1);
    ++fetched;
  };
  const auto march_row = [&](Row<T, V, kGated>& ring_row) {
    const Row<T, V, kGated> now = ring_row;
    fetch(ring_row);
    C a = now.a[0], out[V];
    if constexpr (kGated) a = at.decay_max * sigmoid<T>(a);
    if constexpr (!kFull) r *= a;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      C u = now.u[j];
      if constexpr (kGated) u *= sigmoid<T>(now.b[j]);
      w[j] = a * w[j] + u;
      out[j] = kFull ? w[j] : w[j] + r * v[j];
      if constexpr (kGated) out[j] = now.c[j] * out[j] + now.u[j];
    }
    if (t >= begin) store_vector<T, V>(x, out);
    x += channels;
    ++t;
    if constexpr (!kFull) {
      const bool complete = t == boundary;
      if constexpr (kSaves) {
        if (complete && t > begin) {
          if (p == 0) *saved_product = r;
          saved_product += in.heads;
        }
      }
      boundary += complete ? grid.window : 0;
      r = complete ? C(1) : r;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        v[j] = complete ? w[j] : v[j];
        w[j] = complete ? C(0) : w[j];
      }
      if constexpr (kSaves) {
        if (t == chunk_begin && t < stop) {
          save_state();
          chunk_begin = min(chunk_begin + kSwrChunk, boundary);
        }
      }
    }
  };
#pragma unroll
  for (int k = 0; k < kRing; ++k) fetch(ring[k]);
  while (t + kRing <= stop) {
#pragma unroll
    for (int k = 0; k < kRing; ++k) march_row(ring[k]);
  }
#pragma unroll
  for (int k = 0; k < kRing; ++k) {
    if (t < stop) march_row(ring[k]);
  }
  if (end < blocks) return;
  if (kSaves && p == 0 && !grid.last_block_complete()) *saved_product = r;
  const int64_t state = row * channels + channel;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    static_cast<C*>(params.w)[state + j] = kFull ? C(0) : w[j];
    static_cast<C*>(params.v)[state + j] = kFull ? w[j] : v[j];
  }
  if (p == 0) static_cast<C*>(params.r)[row * in.heads + h] = r;
  if (channel == 0) {
    params.index[row] = kFull ? 0 : static_cast<int32_t>((grid.index + in.length) % grid.window);
  }
}

template <class T, int V, bool kGated, bool kFull, bool kSaves>
Status launch(const SwrFwdParams& params, cudaStream_t stream) {
  const SwrInputs& in = params.in;
  const int64_t lanes = in.heads * in.width / V;
  const SwrStrips plan = swr_fwd_strips(in.batch, in.length, in.window, lanes, multiprocessors());
  const int64_t ctas = ceil_div<int64_t>(in.batch * lanes * plan.strips, kSwrThreads);
  swr_fwd_kernel<T, V, kGated, kFull, kSaves>
      <<<static_cast<unsigned>(ctas), kSwrThreads, 0, stream>>>(params, plan.strips, plan.blocks);
  return launch_status(V > 1 ? "march_vector" : "march");
}

template <class T, int V, bool kGated>
Status choose(const SwrFwdParams& params, cudaStream_t stream) {
  if (params.in.window == 0) return launch<T, V, kGated, true, false>(params, stream);
  if constexpr (kGated && !std::is_same_v<T, double>) {
    if (params.saved.states != nullptr) return launch<T, V, true, false, true>(params, stream);
  }
  return launch<T, V, kGated, false, false>(params, stream);
}

template <class T, bool kGated>
Status choose_vector(const SwrFwdParams& params, cudaStream_t stream) {
  constexpr int V = 8 / sizeof(T);  // 8 bytes: with 128 threads a row segment is 1 KiB
  if constexpr (V > 1) {
    if (swr_vectors_fit<T, V>(params)) return choose<T, V, kGated>(params, stream);
  }
  return choose<T, 1, kGated>(params, stream);
}

}  // namespace

Status swr_fwd_cuda(const SwrFwdParams& params, DType dtype, void* stream) {
  if (params.in.length == 1 && params.saved.states == nullptr) {
    return swr_step_cuda(params, dtype, stream);
  }
  if (swr_chained_fwd_fits(params, dtype)) return swr_chained_fwd(params, dtype, stream);
  return swr_with_dtype(dtype, [&]<class T>() {
    const auto s = static_cast<cudaStream_t>(stream);
    return params.in.gated ? choose_vector<T, true>(params, s) : choose_vector<T, false>(params, s);
  });
}

}  // namespace sarissa::kernels
