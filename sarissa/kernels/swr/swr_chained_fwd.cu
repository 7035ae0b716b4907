// Forward of phalanx in one pass (swr_chained.cuh), for the full recurrence and for windows that
// divide a tile. A lane owns 4 bytes of channels; the rows b, v, c of its chunk wait in shared
// memory that only this lane uses. Twice it walks through them: from zero, for the end state, and
// from the state that arrives, for y.
//
// A window leaves T out: what arrives at a block is the end state from zero of the block before it,
// in the same tile or in the message of the tile before, whose chain stops there. Nothing is read
// twice, so this beats marching where strips are short: a short sequence, a long window.
#include "sarissa/kernels/swr/swr_chained.cuh"

namespace sarissa::kernels {
namespace {

// A fourth would fit, with 64 registers, and is slower.
constexpr int kCtas = 3;

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

/// kBlockWarps: the warps (chunks) of a block; 0: no window.
template <class T, int kLanes, int kBlockWarps>
__global__ void __launch_bounds__(kChainThreads, kCtas)
    swr_chained_fwd_kernel(SwrFwdParams params, Chain chain) {
  constexpr int V = ChainLane<T, kLanes>::V, kHeads = ChainLane<T, kLanes>::kHeads;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<FwdShared<T, kLanes>*>(shared_bytes);
  const SwrInputs& in = params.in;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  wait_for_earlier_kernels();
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
      copy_async<4>(&shared.b[i][tid], b, i < at.steps);
      copy_async<4>(&shared.v[i][tid], v, i < at.steps);
    }
    copies_commit();
#pragma unroll
    for (int i = 0; i < kChunk; ++i, c += in.gate_step) {
      copy_async<4>(&shared.c[i][tid], c, i < at.steps);
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
  const auto save_state = [&](int64_t number, const float(&x)[V]) {
    store_vector<float, V>(static_cast<float*>(params.saved.states) +
                               (tile.row * params.saved.chunks + number) * in.heads * in.width +
                               at.channel,
                           x);
  };
  __syncthreads();
  const bool saves = params.saved.states != nullptr && at.h < in.heads;
  if (warp == 0) {
    float x[V] = {}, carry[V] = {}, product = 1.0f;
    if constexpr (kBlockWarps == 0) {
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
      for (int k = 0; k < V; ++k) x[k] = fmaf(product, carry[k], x[k]);  // as look_back does
      publish(tile.message, ChainMessage::kState, x, product);
      if (saves) save_state(tile.n, carry);
    } else {
#pragma unroll
      for (int j = kChainWarps - kBlockWarps; j < kChainWarps; ++j) pass(j, x);
      publish(tile.message, ChainMessage::kAggregate, x, product);
      if (tile.n > 0) wait_for(tile.message - chain.stride(), carry);
    }
#pragma unroll
    for (int k = 0; k < V; ++k) shared.carry[k][lane] = carry[k];
  }
  copies_wait<0>();
  __syncthreads();

  // The state that arrives at the block (or tile), then at the chunk.
  constexpr int kSpan = kBlockWarps > 0 ? kBlockWarps : kChainWarps;
  const int block = warp / kSpan;  // in the tile
  const auto arriving = [&](int at_block, float(&x)[V]) {
#pragma unroll
    for (int k = 0; k < V; ++k) x[k] = at_block == 0 ? shared.carry[k][lane] : 0.0f;
    for (int j = (at_block - 1) * kSpan; at_block > 0 && j < at_block * kSpan; ++j) pass(j, x);
  };
  float x[V];
  arriving(block, x);
  for (int j = block * kSpan; j < warp; ++j) pass(j, x);
  if constexpr (kBlockWarps > 0) {
    const int64_t chunk = int64_t{tile.n} * kChainWarps + warp;
    if (saves && chunk < params.saved.chunks) {
      save_state(chunk, x);
      if (warp % kSpan == kSpan - 1 && at.p == 0) {
        float product = 1.0f, unused[V] = {};
        for (int j = block * kSpan; j <= warp; ++j) product *= pass(j, unused);
        static_cast<float*>(
            params.saved
                .products)[(tile.row * params.saved.chunks + chunk) / kSpan * in.heads + at.h] =
            product;
      }
    }
  }
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
  const int64_t head = tile.row * in.heads + at.h;
  float w[V] = {}, v[V], r = 1.0f;
  int32_t index = 0;
  if constexpr (kBlockWarps == 0) {
#pragma unroll
    for (int k = 0; k < V; ++k) v[k] = x[k];  // steps beyond the sequence left x as it is
  } else {
    index = static_cast<int32_t>(in.length % in.window);
    const int last = static_cast<int>((in.length - 1) % kSwrTile / in.window);
    arriving(index == 0 ? last + 1 : last, v);  // a complete block leaves its end state
    for (int j = last * kSpan; index != 0 && j < (last + 1) * kSpan; ++j) r *= pass(j, w);
  }
#pragma unroll
  for (int k = 0; k < V; ++k) {
    static_cast<float*>(params.w)[head * in.width + at.p + k] = w[k];
    static_cast<float*>(params.v)[head * in.width + at.p + k] = v[k];
  }
  if (at.p == 0) static_cast<float*>(params.r)[head] = r;
  if (at.channel == 0) params.index[tile.row] = index;
}

}  // namespace

bool swr_chained_inputs_fit(const SwrInputs& in, DType dtype) {
  if (!swr_lanes_fit(in, dtype) || in.kv_heads != in.heads) return false;
  const int64_t lane_channels = lanes_detail::channels_of_lane(dtype);
  return in.batch > 0 && in.length > kSwrChunk && in.length <= kSwrMarchLength &&
         swr_tiles(in.length) * in.batch *
                 ceil_div<int64_t>(in.heads * in.width, 32 * lane_channels) <=
             std::numeric_limits<int32_t>::max();
}

bool swr_chained_fwd_fits(const SwrFwdParams& params, DType dtype) {
  const SwrInputs& in = params.in;
  if (params.workspace == nullptr || !swr_chained_inputs_fit(in, dtype)) return false;
  // Where the blocks lie is known here only without a given state.
  return in.window == 0 ||
         (in.width == 16 && in.index == nullptr &&
          swr_chains_window(in.batch, in.length, in.heads * in.width, in.window,
                            dtype == DType::kBFloat16 ? 2 : 4, multiprocessors()));
}

Status swr_chained_fwd(const SwrFwdParams& params, DType dtype, void* stream) {
  return swr_with_lanes(params.in, dtype, [&]<class T, int kLanes>() -> Status {
    const auto run = [&](auto kernel) {
      return chain_launch(kernel, params, Chain(params.in, sizeof(T), params.workspace),
                          sizeof(FwdShared<T, kLanes>), static_cast<cudaStream_t>(stream));
    };
    if constexpr (ChainLane<T, kLanes>::V * kLanes == 16) {
      switch (params.in.window) {
        case 32:
          return run(swr_chained_fwd_kernel<T, kLanes, 2>);
        case 64:
          return run(swr_chained_fwd_kernel<T, kLanes, 4>);
        case 128:
          return run(swr_chained_fwd_kernel<T, kLanes, 8>);
      }
    }
    return run(swr_chained_fwd_kernel<T, kLanes, 0>);
  });
}

}  // namespace sarissa::kernels
