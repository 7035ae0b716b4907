// What the chained kernels of the full recurrence share. L = blockdiag(L_t) + G Z T R with T kept:
// a block is a tile of kSwrTile steps and one column of channels (4 bytes per lane of a warp),
// which a CTA holds on the chip. Its warps take kSwrChunk steps each; their end states are folded
// in shared memory (T of the CTA), those of the tiles through messages in global memory (T of the
// grid).
//
// A tile first publishes R: its aggregate, the end state from zero and the product of its
// coefficients. Then it looks back for the state in which the tile before ended, and publishes the
// state in which it ends itself, in place of the aggregate. The state is always the same chain,
//   state_n = end_state_n + product_n state_(n-1),
// whether its links are made by their own tiles or again by a later one that finds only aggregates:
// the bits do not depend on the timing.
//
// Tiles are handed out by a ticket in the order of the chain, columns fastest, so a tile waits only
// for tiles that already run: some tile can always go on, however few CTAs are resident.
#pragma once

#include "sarissa/kernels/swr/swr_lanes.cuh"

namespace sarissa::kernels {

constexpr int kChunk = kSwrChunk;
constexpr int kChainWarps = static_cast<int>(kSwrTile / kSwrChunk);
constexpr int kChainThreads = 32 * kChainWarps;
/// Messages that are read at once when looking back: so many links of the chain are made in the
/// time of one read.
constexpr int kChainReach = 8;

/// What a tile tells the later ones about a lane's channels. 16 bytes, read and written as a whole:
/// a message is there or not, and needs no flag or fence beside it.
struct alignas(16) ChainMessage {
  enum : uint32_t { kNothing = 0, kAggregate = 1, kState = 2 };
  float value[2];  // the end state from zero, or the state
  float product;   // of the tile's coefficients
  uint32_t kind;
};
static_assert(sizeof(ChainMessage) == kSwrMessage * sizeof(float) &&
              sizeof(ChainMessage) == sizeof(uint4));

__device__ inline ChainMessage peek(const ChainMessage* from) {
  union {
    uint64_t halves[2];
    ChainMessage message;
  };
  asm volatile("{.reg .b128 m; ld.relaxed.gpu.global.b128 m, [%2]; mov.b128 {%0, %1}, m;}"
               : "=l"(halves[0]), "=l"(halves[1])
               : "l"(from)
               : "memory");
  return message;
}
template <int V>
__device__ inline void publish(ChainMessage* to, uint32_t kind, const float (&value)[V],
                               float product) {
  union {
    uint64_t halves[2];
    ChainMessage message;
  };
  message = {{value[0], value[V - 1]}, product, kind};
  asm volatile(
      "{.reg .b128 m; mov.b128 m, {%1, %2}; st.relaxed.gpu.global.b128 [%0], m;}" ::"l"(to),
      "l"(halves[0]), "l"(halves[1])
      : "memory");
}

/// The state in which the tile before `own` ended; `tiles` of its column, at least one, lie before
/// it, `stride` messages apart.
template <int V>
__device__ inline void look_back(const ChainMessage* own, int64_t stride, int tiles,
                                 float (&x)[V]) {
  // From the farthest to the nearest; the first tile of the column stands for those before it,
  // which changes nothing, since it only ever tells its state.
  ChainMessage m[kChainReach];
  bool found, complete;
  do {
    found = false;
    complete = true;
#pragma unroll
    for (int k = 0; k < kChainReach; ++k) m[k] = peek(own - min(kChainReach - k, tiles) * stride);
#pragma unroll
    for (int k = 0; k < kChainReach; ++k) {
      found = found || m[k].kind == ChainMessage::kState;
      complete = complete && m[k].kind != ChainMessage::kNothing;
    }
  } while (!(found && complete));
#pragma unroll
  for (int j = 0; j < V; ++j) x[j] = 0.0f;
#pragma unroll
  for (int k = 0; k < kChainReach; ++k) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float next = fmaf(m[k].product, x[j], m[k].value[j]);
      x[j] = m[k].kind == ChainMessage::kState ? m[k].value[j] : next;
    }
  }
}

/// The aggregate of another tile.
template <int V>
__device__ inline void wait_for(const ChainMessage* other, float (&x)[V]) {
  ChainMessage m;
  do {
    m = peek(other);
  } while (m.kind == ChainMessage::kNothing);
#pragma unroll
  for (int j = 0; j < V; ++j) x[j] = m.value[j];
}

/// The messages of a launch behind its ticket.
struct Chain {
  int tiles, columns, batch;
  unsigned* ticket;
  ChainMessage* messages;  // [tiles, B, columns, 32], tiles in the order of the chain

  /// bytes: of an element.
  Chain(const SwrInputs& in, int64_t bytes, void* workspace)
      : tiles(static_cast<int>(swr_tiles(in.length))),
        columns(
            static_cast<int>(ceil_div<int64_t>(in.heads * in.width * bytes, 32 * kSwrMarchBytes))),
        batch(static_cast<int>(in.batch)),
        ticket(static_cast<unsigned*>(workspace)),
        messages(static_cast<ChainMessage*>(workspace) + 1) {}

  int64_t ctas() const { return int64_t{tiles} * batch * columns; }
  /// Takes back the ticket and all messages.
  void clear(cudaStream_t stream) const { clear_early(ticket, 1 + ctas() * 32, stream); }
  /// Messages between the tiles of a column.
  __device__ int64_t stride() const { return int64_t{batch} * columns * 32; }
};

/// A CTA's tile, number n in the order of the chain.
struct ChainTile {
  int n, row, column;
  ChainMessage* message;  // this lane's

  /// All threads; `shared` is free again after the next barrier.
  __device__ ChainTile(const Chain& chain, unsigned& shared) {
    if (threadIdx.x == 0) shared = atomicAdd(chain.ticket, 1u);
    __syncthreads();
    const unsigned id = shared, columns = chain.columns, batch = chain.batch;
    column = static_cast<int>(id % columns);
    row = static_cast<int>(id / columns % batch);
    n = static_cast<int>(id / columns / batch);
    message = chain.messages + int64_t{id} * 32 + threadIdx.x % 32;
  }
};

/// Where a lane's channels are. Heads of kLanes lanes do not cross a warp.
template <class T, int kLanes>
struct ChainLane {
  static constexpr int V = kSwrMarchBytes / sizeof(T);  // channels of a lane
  static constexpr int kHeads = 32 / kLanes;            // heads of a warp
  int64_t channel, h;
  int p;
  int steps;  // of the warp's chunk in the sequence; 0 for lanes beyond the channels

  /// t0: the chunk's first step.
  __device__ ChainLane(const SwrInputs& in, int column, int64_t t0)
      : channel((int64_t{column} * 32 + threadIdx.x % 32) * V),
        h(channel / (kLanes * V)),
        p(static_cast<int>(channel % (kLanes * V))),
        steps(h < in.heads ? static_cast<int>(max(int64_t{0}, min(in.length - t0, kSwrChunk)))
                           : 0) {}
};

/// The coefficients of a warp's chunk for its heads, 1 outside the sequence: fetched early by one
/// lane per step and head, shared later.
template <class T, int kHeads>
class ChainDecays {
 public:
  using Shared = float[kSwrChunk][kHeads];

  __device__ ChainDecays(const SwrInputs& in, int row, int column, int64_t t0)
      : decay_max_(static_cast<float>(in.decay_max)) {
    const int64_t first_head = int64_t{column} * kHeads;
    const T* const a = static_cast<const T*>(in.a) + row * in.a_batch + first_head;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const int i = step(k), h = head(k);
      good_[k] = i < kSwrChunk && t0 + i < in.length && first_head + h < in.heads;
      if (good_[k]) raw_[k] = a[(t0 + i) * in.a_step + h];
    }
  }
  __device__ void share(Shared& to) const {
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      if (step(k) < kSwrChunk) {
        to[step(k)][head(k)] = good_[k] ? decay_max_ * sigmoid<T>(load(&raw_[k])) : 1.0f;
      }
    }
    __syncwarp();
  }

 private:
  static constexpr int kPerLane = (static_cast<int>(kSwrChunk) * kHeads + 31) / 32;
  __device__ static int step(int k) {
    return (k * 32 + static_cast<int>(threadIdx.x) % 32) / kHeads;
  }
  __device__ static int head(int k) { return static_cast<int>(threadIdx.x) % 32 % kHeads; }
  float decay_max_;
  T raw_[kPerLane];
  bool good_[kPerLane];
};

/// Clears the chain and launches one CTA per tile.
template <class Kernel, class Params>
Status chain_launch(Kernel kernel, const Params& params, const Chain& chain, size_t shared_bytes,
                    cudaStream_t stream) {
  const Status allowed = allow_shared_memory(kernel, shared_bytes);
  if (!allowed.ok()) return allowed;
  chain.clear(stream);
  launch_early(kernel, dim3(static_cast<unsigned>(chain.ctas())), kChainThreads, shared_bytes,
               stream, params, chain);
  return launch_status("chained");
}

}  // namespace sarissa::kernels
