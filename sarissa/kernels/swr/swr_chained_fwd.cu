// Forward of phalanx without a window, in one pass (swr_chained.cuh). A lane owns 4 bytes of
// channels; the rows b, v, c of its chunk wait in shared memory that only this lane uses. Twice it
// walks through them: from zero, for the end state, and from the state that arrives, for y.
#include "sarissa/kernels/swr/swr_chained.cuh"

namespace sarissa::kernels {
namespace {

// A fourth would fit, with 64 registers, and is slower.
constexpr int kCtas = 3;
constexpr int kChunk = kSwrChunk;

template <class T, int kLanes>
struct FwdShared {
  static constexpr int V = ChainLane<T, kLanes>::V;
  Vector<T, V> b[kChunk][kChainThreads], v[kChunk][kChainThreads], c[kChunk][kChainThreads];
  typename ChainDecays<T, 32 / kLanes>::Shared decays[kChainWarps];
  float end_state[kChainWarps][V][32];  // of the warps' chunks, from zero
  float product[kChainWarps][32];
  float carry[V][32];  // the state before the tile
  unsigned ticket;
};

template <class T, int kLanes>
__global__ void __launch_bounds__(kChainThreads, kCtas)
    swr_chained_fwd_kernel(SwrFwdParams params, Chain chain) {
  constexpr int V = ChainLane<T, kLanes>::V, kHeads = ChainLane<T, kLanes>::kHeads;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<FwdShared<T, kLanes>*>(shared_bytes);
  const SwrInputs& in = params.in;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const ChainTile tile(chain, shared.ticket);
  const int64_t t0 = tile.n * kSwrTile + warp * kChunk;
  const ChainLane<T, kLanes> at(in, tile.column, t0);
  const ChainDecays<T, kHeads> decays(in, tile.row, tile.column, t0);

  {
    const int64_t gate = tile.row * in.gate_batch + t0 * in.gate_step + at.channel;
    const T* b = static_cast<const T*>(in.b) + gate;
    const T* c = static_cast<const T*>(in.c) + gate;
    const T* v = static_cast<const T*>(in.u) + tile.row * in.u_batch + t0 * in.u_step +
                 at.h * in.u_head + at.p;
#pragma unroll
    for (int i = 0; i < kChunk; ++i, b += in.gate_step, v += in.u_step) {
      copy_async_4(&shared.b[i][tid], b, i < at.steps);
      copy_async_4(&shared.v[i][tid], v, i < at.steps);
    }
    copies_commit();
#pragma unroll
    for (int i = 0; i < kChunk; ++i, c += in.gate_step) {
      copy_async_4(&shared.c[i][tid], c, i < at.steps);
    }
    copies_commit();
  }
  auto& coefficients = shared.decays[warp];
  decays.share(coefficients);
  const int my_head = lane / kLanes;
  // x <- a x + sigmoid(b) v
  const auto step = [&](int i, const Vector<T, V>& v, float(&x)[V]) {
    const float a = coefficients[i][my_head];
    const Vector<T, V> b = shared.b[i][tid];
#pragma unroll
    for (int k = 0; k < V; ++k) x[k] = a * x[k] + sigmoid<T>(b[k]) * v[k];
    return a;
  };

  copies_wait<1>();
  {
    float x[V] = {}, product = 1.0f;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) product *= step(i, shared.v[i][tid], x);
#pragma unroll
    for (int k = 0; k < V; ++k) shared.end_state[warp][k][lane] = x[k];
    shared.product[warp][lane] = product;
  }
  // Lets x pass the chunk of warp j.
  const auto pass = [&](int j, float(&x)[V]) {
    const float product = shared.product[j][lane];
#pragma unroll
    for (int k = 0; k < V; ++k) x[k] = shared.end_state[j][k][lane] + product * x[k];
    return product;
  };
  __syncthreads();
  if (warp == 0) {
    float x[V] = {}, carry[V], product = 1.0f;
#pragma unroll
    for (int j = 0; j < kChainWarps; ++j) product *= pass(j, x);
    if (tile.n > 0) {
      publish(tile.message, ChainMessage::kAggregate, x, product);
      look_back(tile.message, chain.stride(), tile.n, carry);
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        carry[k] = at.h < in.heads ? SwrStart<float>(in, tile.row, at.h, at.p + k).w : 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      x[k] = fmaf(product, carry[k], x[k]);  // as look_back does
      shared.carry[k][lane] = carry[k];
    }
    publish(tile.message, ChainMessage::kState, x, product);
    if (params.saved.states != nullptr && at.h < in.heads) {
      store_vector<float, V>(static_cast<float*>(params.saved.states) +
                                 (tile.row * params.saved.chunks + tile.n) * in.heads * in.width +
                                 at.channel,
                             carry);
    }
  }
  copies_wait<0>();
  __syncthreads();

  float x[V];
#pragma unroll
  for (int k = 0; k < V; ++k) x[k] = shared.carry[k][lane];
  for (int j = 0; j < warp; ++j) pass(j, x);
  const int64_t channels = in.heads * in.width;
  T* y = static_cast<T*>(params.x) + (tile.row * in.length + t0) * channels + at.channel;
#pragma unroll
  for (int i = 0; i < kChunk; ++i, y += channels) {
    const Vector<T, V> v = shared.v[i][tid], c = shared.c[i][tid];
    step(i, v, x);
    float out[V];
#pragma unroll
    for (int k = 0; k < V; ++k) out[k] = c[k] * x[k] + v[k];
    if (i < at.steps) store_vector<T, V>(y, out);
  }
  if (tile.n + 1 < chain.tiles || warp + 1 < kChainWarps || at.h >= in.heads) return;
  // Steps beyond the sequence left x as it is.
  const int64_t head = tile.row * in.heads + at.h;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    static_cast<float*>(params.w)[head * in.width + at.p + k] = 0.0f;
    static_cast<float*>(params.v)[head * in.width + at.p + k] = x[k];
  }
  if (at.p == 0) static_cast<float*>(params.r)[head] = 1.0f;
  if (at.channel == 0) params.index[tile.row] = 0;
}

}  // namespace

bool swr_chained_inputs_fit(const SwrInputs& in, DType dtype) {
  if (!in.gated || in.window != 0 || in.kv_heads != in.heads || dtype == DType::kFloat64) {
    return false;
  }
  const int64_t bytes = dtype == DType::kBFloat16 ? 2 : 4;
  const int64_t V = kSwrMarchBytes / bytes;
  const int64_t lanes = in.width / V;
  const auto aligned = [](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % kSwrMarchBytes == 0;
  };
  return in.width % V == 0 && (lanes == 4 || lanes == 8 || lanes == 16 || lanes == 32) &&
         in.batch > 0 && in.length > kSwrChunk && in.length <= kSwrMarchLength &&
         swr_tiles(in.length) * in.batch * ceil_div<int64_t>(in.heads * in.width, 32 * V) <=
             std::numeric_limits<int32_t>::max() &&
         aligned(in.b) && aligned(in.c) && aligned(in.u) && in.gate_batch % V == 0 &&
         in.gate_step % V == 0 && in.u_batch % V == 0 && in.u_step % V == 0 && in.u_head % V == 0;
}

bool swr_chained_fwd_fits(const SwrFwdParams& params, DType dtype) {
  return swr_chained_inputs_fit(params.in, dtype) && params.workspace != nullptr;
}

Status swr_chained_fwd(const SwrFwdParams& params, DType dtype, void* stream) {
  return chain_with_lanes(params.in, dtype, [&]<class T, int kLanes>() {
    return chain_launch(swr_chained_fwd_kernel<T, kLanes>, params,
                        Chain(params.in, sizeof(T), params.workspace), sizeof(FwdShared<T, kLanes>),
                        static_cast<cudaStream_t>(stream));
  });
}

}  // namespace sarissa::kernels
