// Backward of phalanx without a window, in one pass from right to left (swr_chained.cuh). A lane
// owns 4 bytes of channels; the rows b, c, v and dy of its chunk wait in shared memory that only
// this lane uses. `arriving` is the adjoint that comes from the right:
//   pw_i = dy_i c_i + arriving      arriving <- a_i pw_i      da_i = sum_p pw_i x_(i-1)
// Its chain is the forward's with dy c for the input. x at the tile's start is what the forward
// saved (SwrSaved).
#include "sarissa/kernels/swr/swr_chained.cuh"

namespace sarissa::kernels {
namespace {

// A third would fit, with 80 registers, and is slower.
constexpr int kCtas = 2;

template <class T, int kLanes>
struct BwdShared {
  static constexpr int V = ChainLane<T, kLanes>::V;
  using Rows = Vector<T, V>[kChunk][kChainThreads];
  Rows b, v, c, dy;
  typename ChainDecays<T, 32 / kLanes>::Shared decays[kChainWarps];
  // Of the warps' chunks, from zero: the adjoint before it, the state after it; the product.
  float adjoint[kChainWarps][V][32], end_state[kChainWarps][V][32], product[kChainWarps][32];
  float carry[V][32];  // the adjoint after the tile
  unsigned ticket;
};

template <class T, int kLanes>
__global__ void __launch_bounds__(kChainThreads, kCtas)
    swr_chained_bwd_kernel(SwrBwdParams params, Chain chain) {
  constexpr int V = ChainLane<T, kLanes>::V, kHeads = ChainLane<T, kLanes>::kHeads;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<BwdShared<T, kLanes>*>(shared_bytes);
  const SwrInputs& in = params.in;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  wait_for_earlier_kernels();
  const ChainTile tile(chain, shared.ticket);
  const int time_tile = chain.tiles - 1 - tile.n;
  const int64_t t0 = time_tile * kSwrTile + warp * kChunk;
  const ChainLane<T, kLanes> at(in, tile.column, t0);
  const ChainDecays<T, kHeads> decays(in, tile.row, tile.column, t0);
  const bool active = at.h < in.heads;
  const int64_t head = tile.row * in.heads + at.h;
  const int64_t state = head * in.width + at.p;  // of the lane's first channel

  {
    const int64_t gate = tile.row * in.gate_batch + t0 * in.gate_step + at.channel;
    const T* b = static_cast<const T*>(in.b) + gate;
    const T* c = static_cast<const T*>(in.c) + gate;
    const T* v = static_cast<const T*>(in.u) + tile.row * in.u_batch + t0 * in.u_step +
                 at.h * in.u_head + at.p;
    const T* dy = static_cast<const T*>(params.dx) + tile.row * params.dx_batch +
                  t0 * params.dx_step + at.h * params.dx_head + at.p;
#pragma unroll
    for (int i = 0; i < kChunk; ++i, c += in.gate_step, dy += params.dx_step) {
      copy_async<4>(&shared.c[i][tid], c, i < at.steps);
      copy_async<4>(&shared.dy[i][tid], dy, i < at.steps);
    }
    copies_commit();
#pragma unroll
    for (int i = 0; i < kChunk; ++i, b += in.gate_step, v += in.u_step) {
      copy_async<4>(&shared.b[i][tid], b, i < at.steps);
      copy_async<4>(&shared.v[i][tid], v, i < at.steps);
    }
    copies_commit();
  }
  // x before the tile, then before the chunk.
  float x0[V] = {};
  if (active) {
    const auto saved = load_vector<float, V>(
        static_cast<const float*>(params.saved.states) +
        (tile.row * params.saved.chunks + time_tile) * in.heads * in.width + at.channel);
#pragma unroll
    for (int k = 0; k < V; ++k) x0[k] = saved[k];
  }
  auto& coefficients = shared.decays[warp];
  decays.share(coefficients);
  const int my_head = lane / kLanes;

  copies_wait<1>();
  {
    float arriving[V] = {}, product = 1.0f;
#pragma unroll
    for (int i = kChunk - 1; i >= 0; --i) {
      const float a = coefficients[i][my_head];
      const Vector<T, V> c = shared.c[i][tid], dy = shared.dy[i][tid];
      product *= a;
#pragma unroll
      for (int k = 0; k < V; ++k) arriving[k] = a * (dy[k] * c[k] + arriving[k]);
    }
#pragma unroll
    for (int k = 0; k < V; ++k) shared.adjoint[warp][k][lane] = arriving[k];
    shared.product[warp][lane] = product;
  }
  copies_wait<0>();
  float x[kChunk][V];  // after each step: from zero, then the whole state
  {
    float w[V] = {};
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float a = coefficients[i][my_head];
      const Vector<T, V> b = shared.b[i][tid], v = shared.v[i][tid];
#pragma unroll
      for (int k = 0; k < V; ++k) x[i][k] = w[k] = a * w[k] + sigmoid<T>(b[k]) * v[k];
    }
#pragma unroll
    for (int k = 0; k < V; ++k) shared.end_state[warp][k][lane] = w[k];
  }
  // Lets the adjoint pass the chunk of warp j.
  const auto pass = [&](int j, float(&arriving)[V]) {
    const float product = shared.product[j][lane];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      arriving[k] = shared.adjoint[j][k][lane] + product * arriving[k];
    }
    return product;
  };
  __syncthreads();
  if (warp == kChainWarps - 1) {
    float q[V] = {}, carry[V], product = 1.0f;
#pragma unroll
    for (int j = kChainWarps - 1; j >= 0; --j) product *= pass(j, q);
    if (tile.n > 0) {
      publish(tile.message, ChainMessage::kAggregate, q, product);
      look_back(tile.message, chain.stride(), tile.n, carry);
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        carry[k] = active && params.dv_out != nullptr
                       ? static_cast<const float*>(params.dv_out)[state + k]
                       : 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      q[k] = fmaf(product, carry[k], q[k]);  // as look_back does
      shared.carry[k][lane] = carry[k];
    }
    publish(tile.message, ChainMessage::kState, q, product);
  }
  for (int j = 0; j < warp; ++j) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      x0[k] = shared.end_state[j][k][lane] + shared.product[j][lane] * x0[k];
    }
  }
  {
    float r = 1.0f;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      r *= coefficients[i][my_head];
#pragma unroll
      for (int k = 0; k < V; ++k) x[i][k] += r * x0[k];
    }
  }
  __syncthreads();

  float arriving[V];
#pragma unroll
  for (int k = 0; k < V; ++k) arriving[k] = shared.carry[k][lane];
  for (int j = kChainWarps - 1; j > warp; --j) pass(j, arriving);
  const float inverse_decay_max = 1.0f / static_cast<float>(in.decay_max);
  const int64_t last = tile.row * in.length + t0 + kChunk - 1;
  T* db = static_cast<T*>(params.db) + last * params.dgate_step + at.channel;
  T* dc = static_cast<T*>(params.dc) + last * params.dgate_step + at.channel;
  T* dv = static_cast<T*>(params.du) + last * params.du_step + at.channel;
  float share[kChunk];
#pragma unroll
  for (int i = kChunk - 1; i >= 0; --i) {
    const float a = coefficients[i][my_head];
    const Vector<T, V> b = shared.b[i][tid], v = shared.v[i][tid];
    const Vector<T, V> c = shared.c[i][tid], dy = shared.dy[i][tid];
    float dci[V], dvi[V], dbi[V], sum = 0.0f;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float gate = sigmoid<T>(b[k]);
      const float pw = dy[k] * c[k] + arriving[k];
      arriving[k] = a * pw;
      sum += pw * (i > 0 ? x[i > 0 ? i - 1 : 0][k] : x0[k]);
      const float du = pw * gate;
      dci[k] = dy[k] * x[i][k];
      dvi[k] = dy[k] + du;
      const float dgate = du * v[k];
      dbi[k] = dgate - dgate * gate;
    }
    share[i] = (1.0f - a * inverse_decay_max) * a * sum;
    if (i < at.steps) {
      store_vector<T, V>(dc, dci);
      store_vector<T, V>(dv, dvi);
      store_vector<T, V>(db, dbi);
    }
    dc -= params.dgate_step;
    db -= params.dgate_step;
    dv -= params.du_step;
  }
  const int begin = reduce_scatter<kLanes, kChunk>(share, lane);
  constexpr int kRows = kLanes < kChunk ? kChunk / kLanes : 1;
  // With more lanes than rows two lanes hold the same row.
  if (lane % (kLanes > kChunk ? 2 : 1) == 0) {
    T* const da =
        static_cast<T*>(params.da) + (tile.row * in.length + t0 + begin) * params.da_step + at.h;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (begin + i < at.steps) store(da + i * params.da_step, share[i]);
    }
  }

  if (time_tile > 0 || warp > 0) return;
  // From the adjoint before the first step to the gradients of the given state.
  float dr = 0.0f;
  const float r = active && in.r != nullptr ? static_cast<const float*>(in.r)[head] : 1.0f;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    if (!active) continue;
    if (in.v != nullptr) dr += arriving[k] * static_cast<const float*>(in.v)[state + k];
    static_cast<float*>(params.dw)[state + k] = arriving[k];
    static_cast<float*>(params.dv)[state + k] = r * arriving[k];
  }
  reduce_scatter<kLanes, 1>(&dr, lane);
  if (active && lane % kLanes == 0) static_cast<float*>(params.dr)[head] = dr;
}

}  // namespace

bool swr_chained_bwd_fits(const SwrBwdParams& params, DType dtype) {
  return params.in.window == 0 && swr_chained_inputs_fit(params.in, dtype) &&
         params.saved.states != nullptr && params.workspace != nullptr &&
         swr_lane_gradients_fit(params, dtype);
}

Status swr_chained_bwd(const SwrBwdParams& params, DType dtype, void* stream) {
  return swr_with_lanes(params.in, dtype, [&]<class T, int kLanes>() {
    return chain_launch(swr_chained_bwd_kernel<T, kLanes>, params,
                        Chain(params.in, sizeof(T), params.workspace), sizeof(BwdShared<T, kLanes>),
                        static_cast<cudaStream_t>(stream));
  });
}

}  // namespace sarissa::kernels
