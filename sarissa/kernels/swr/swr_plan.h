// Pure planning functions of the swr family: the grid of blocks and chunks, workspace sizes, how
// CUDA threads share the work, and the horizon of a bounded decay.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "sarissa/kernels/common/dtype.h"

#ifdef __CUDACC__
#define SARISSA_HOST_DEVICE __host__ __device__
#else
#define SARISSA_HOST_DEVICE
#endif

namespace sarissa::kernels {

/// The backward keeps the local state once per chunk of at most this many steps and recomputes the
/// steps between. CUDA holds a chunk in registers.
constexpr int64_t kSwrChunk = 16;

/// The blocks of one batch row, and their chunks. Position s = index + t counts from the first step
/// of the block in which the sequence starts; block k is the positions [k window, (k+1) window). A
/// chunk is at most kSwrChunk neighbouring positions of one block. A full recurrence is one endless
/// block that starts at step 0.
struct SwrGrid {
  static constexpr int64_t kEndless = int64_t{1} << 62;

  /// window 0: full recurrence, index ignored. An index outside [0, window) is clamped, so that a
  /// bad state on a GPU cannot lead a kernel outside its tensors.
  SARISSA_HOST_DEVICE SwrGrid(int64_t window, int64_t index, int64_t length)
      : window(window == 0 ? kEndless : window),
        index(window == 0 || index < 0 ? 0 : (index < window ? index : window - 1)),
        length(length),
        chunks_per_block((this->window - 1) / kSwrChunk + 1) {}

  /// Blocks that hold steps; 1 when there are no steps.
  SARISSA_HOST_DEVICE int64_t blocks() const {
    return length == 0 ? 1 : (index + length - 1) / window + 1;
  }
  SARISSA_HOST_DEVICE bool last_block_complete() const {
    return length > 0 && (index + length) % window == 0;
  }
  /// Steps [block_begin(k), block_end(k)) of block k.
  SARISSA_HOST_DEVICE int64_t block_begin(int64_t k) const {
    return k == 0 ? 0 : k * window - index;
  }
  SARISSA_HOST_DEVICE int64_t block_end(int64_t k) const {
    return k + 1 < blocks() ? (k + 1) * window - index : length;
  }

  /// Chunks that hold steps, numbered from 0.
  SARISSA_HOST_DEVICE int64_t chunks() const { return length == 0 ? 0 : chunk_of(length - 1) + 1; }
  SARISSA_HOST_DEVICE int64_t chunk_of(int64_t t) const {
    const int64_t s = index + t;
    return s / window * chunks_per_block + s % window / kSwrChunk - index / kSwrChunk;
  }
  SARISSA_HOST_DEVICE int64_t block_of(int64_t chunk) const {
    return (chunk + index / kSwrChunk) / chunks_per_block;
  }
  /// First chunk of block k.
  SARISSA_HOST_DEVICE int64_t first_chunk(int64_t k) const {
    return k == 0 ? 0 : k * chunks_per_block - index / kSwrChunk;
  }
  /// Steps [chunk_begin(c), chunk_end(c)) of chunk c.
  SARISSA_HOST_DEVICE int64_t chunk_begin(int64_t chunk) const {
    const int64_t c = chunk + index / kSwrChunk;
    const int64_t t = c / chunks_per_block * window + c % chunks_per_block * kSwrChunk - index;
    return t > 0 ? t : 0;
  }
  SARISSA_HOST_DEVICE int64_t chunk_end(int64_t chunk) const {
    const int64_t in_block = (chunk + index / kSwrChunk) % chunks_per_block;
    const int64_t block = block_of(chunk);
    const int64_t block_end = (block + 1) * window;
    const int64_t s = block * window + (in_block + 1) * kSwrChunk;
    const int64_t t = (s < block_end ? s : block_end) - index;
    return t < length ? t : length;
  }

  int64_t window, index, length, chunks_per_block;
};

/// The most blocks that `length` steps can touch, wherever in a block they start; `aligned`: when
/// they start with a block.
SARISSA_HOST_DEVICE inline int64_t swr_max_blocks(int64_t window, int64_t length,
                                                  bool aligned = false) {
  if (window == 0 || length == 0) return 1;
  return (length - 1 + (aligned ? 0 : window - 1)) / window + 1;
}

/// At least the chunks that `length` steps can touch, wherever in a block they start.
inline int64_t swr_max_chunks(int64_t window, int64_t length) {
  if (length == 0) return 0;
  // A chunk is the only one of its block, or is full, or is the first or last of the sequence, or
  // is the last of its block.
  const int64_t full_chunks = window == 0 || window > kSwrChunk ? length / kSwrChunk + 1 : 0;
  return full_chunks + swr_max_blocks(window, length);
}

/// The chained kernels of the full recurrence: a CTA owns a tile of time and the channels of a
/// warp.
constexpr int64_t kSwrTile = 128;
inline int64_t swr_tiles(int64_t length) { return (length + kSwrTile - 1) / kSwrTile; }

/// What the chained kernels need to pass states from tile to tile, in fp32 elements: a ticket and,
/// per tile and at most per channel, a message.
constexpr int64_t kSwrMessage = 4;
inline int64_t swr_chain_workspace(int64_t batch, int64_t length, int64_t heads, int64_t width) {
  return kSwrMessage * (1 + batch * swr_tiles(length) * ((heads * width + 31) / 32 * 32));
}

/// Windows for which there are chained forward kernels.
inline bool swr_chainable(int64_t window) {
  return window == 0 || window == 32 || window == 64 || window == 128;
}

/// Workspace of the forward in elements of the arithmetic type.
inline int64_t swr_fwd_workspace(int64_t batch, int64_t length, int64_t heads, int64_t width,
                                 int64_t window, bool gated, bool cuda) {
  return cuda && gated && swr_chainable(window) ? swr_chain_workspace(batch, length, heads, width)
                                                : 0;
}

/// How the backward's workspace is laid out, in elements of the arithmetic type.
struct SwrWorkspace {
  int64_t chunks;      // chunks per batch row, at most
  int64_t end_states;  // [B, chunks, H, P] local state after each chunk
  int64_t products;  // [B, chunks, slices, H] product of the block's coefficients after each chunk
  int64_t scratch;   // CPU: [items, scratch_per_item]
  int64_t gate_shares;  // CUDA: [2, B, L, H, P] gradients of b and c per head
  int64_t
      decay_shares;  // CUDA: [slices, B, L, H] and [slices, B, H] gradients of a and r per slice
  int64_t scratch_per_item;
  int64_t chain;  // CUDA, full recurrence: swr_chain_workspace, in place of all other parts
  int64_t total() const {
    return std::max(chain, end_states + products + scratch + gate_shares + decay_shares);
  }
};

/// Channels of a head that one warp of the CUDA backward reduces over; wider heads are cut in
/// slices.
constexpr int64_t kSwrSliceWidth = 32;
inline int64_t swr_slices(int64_t width) { return (width - 1) / kSwrSliceWidth + 1; }

inline SwrWorkspace swr_bwd_workspace(int64_t batch, int64_t length, int64_t heads,
                                      int64_t kv_heads, int64_t width, int64_t window, bool gated,
                                      bool cuda) {
  const int64_t slices = cuda ? swr_slices(width) : 1;
  SwrWorkspace ws{};
  ws.chunks = swr_max_chunks(window, length);
  ws.end_states = batch * ws.chunks * heads * width;
  ws.products = batch * ws.chunks * slices * heads;
  if (cuda) {
    if (gated && kv_heads < heads) ws.gate_shares = 2 * batch * length * heads * width;
    if (slices > 1) ws.decay_shares = slices * batch * heads * (length + 1);
    if (gated && window == 0) ws.chain = swr_chain_workspace(batch, length, heads, width);
  } else {
    ws.scratch_per_item = (4 * kSwrChunk + 2) * width;
    ws.scratch = batch * kv_heads * ws.scratch_per_item;
  }
  return ws;
}

/// How marching kernels cut time: every strip but the last has `blocks` blocks.
struct SwrStrips {
  int64_t strips, blocks;
};

/// Cuts max_blocks blocks into at most `wanted` strips of equal length.
inline SwrStrips swr_strips(int64_t max_blocks, int64_t wanted) {
  const int64_t blocks = (max_blocks - 1) / std::clamp<int64_t>(wanted, 1, max_blocks) + 1;
  return {(max_blocks - 1) / blocks + 1, blocks};
}

/// Blocks per strip of the general backward: a CUDA thread owns one channel and one strip, and
/// recomputes one block beside it; strips as long as the machine stays filled keep that share
/// small.
inline int64_t swr_strip_blocks(int64_t max_blocks, int64_t channels) {
  constexpr int64_t kThreads = int64_t{1} << 18;  // about two waves of a 132-SM GPU
  return swr_strips(max_blocks, kThreads / std::max<int64_t>(1, channels)).blocks;
}

/// Strips of the forward, `lanes` threads per batch row and strip. Two CTAs of 128 threads per
/// multiprocessor have enough reads in flight; more strips would only repeat more blocks.
inline SwrStrips swr_fwd_strips(int64_t batch, int64_t length, int64_t window, int64_t lanes,
                                int multiprocessors) {
  const int64_t threads = int64_t{multiprocessors} * 2 * 128;
  return swr_strips(swr_max_blocks(window, length), threads / std::max<int64_t>(1, batch * lanes));
}

/// Groups of 4 rows that the ring of the marching forward has on their way.
constexpr int kSwrRingAhead = 4;

/// Strips of the marches with a ring. A multiprocessor takes one CTA of 128 threads at a time: more
/// rows on their way than those of one are slower. So the march lasts as long as the strips that a
/// multiprocessor takes in turn, each with a block beside it and some steps to get going. `aligned`
/// as in swr_max_blocks.
inline SwrStrips swr_ring_strips(int64_t batch, int64_t length, int64_t window, int64_t lanes,
                                 int multiprocessors, bool aligned = false) {
  constexpr int64_t kMostTurns = 4, kStart = 16;
  const int64_t max_blocks = swr_max_blocks(window, length, aligned);
  const int64_t ctas = batch * lanes / 128 + 1;  // of a strip
  const int64_t most = std::clamp<int64_t>(kMostTurns * multiprocessors / ctas, 1, max_blocks);
  SwrStrips best{};
  int64_t best_steps = std::numeric_limits<int64_t>::max();
  for (int64_t wanted = 1; wanted <= most; ++wanted) {
    const SwrStrips strips = swr_strips(max_blocks, wanted);
    const int64_t turns =
        (batch * lanes * strips.strips + 128 * multiprocessors - 1) / (128 * multiprocessors);
    const int64_t steps = turns * ((strips.blocks + 1) * window + kStart);
    if (steps < best_steps) {
      best = strips;
      best_steps = steps;
    }
  }
  return best;
}

/// Whether a forward with a window is better chained than marched: its strips would be shorter than
/// 8 windows, so that reading the block beside each costs more than the chain's messages (measured
/// at 4096 channels on an H100).
inline bool swr_chains_window(int64_t batch, int64_t length, int64_t channels, int64_t window,
                              int64_t bytes_per_element, int multiprocessors) {
  return window > 0 && swr_chainable(window) &&
         swr_ring_strips(batch, length, window, channels * bytes_per_element / 8, multiprocessors)
                 .blocks < 8;
}

/// The marching backward of phalanx: a thread owns kSwrMarchBytes of neighbouring channels, of each
/// of its heads, and kSwrMarchAhead chunks are on their way.
constexpr int kSwrMarchBytes = 4;
constexpr int kSwrMarchAhead = 1;
/// Below this window most rows of its chunks would be empty.
constexpr int64_t kSwrMarchMinWindow = 8;
/// Steps and chunks are counted in 32 bits.
constexpr int64_t kSwrMarchLength = int64_t{1} << 30;

SARISSA_HOST_DEVICE inline int64_t swr_chunks_per_block(int64_t window) {
  return (window - 1) / kSwrChunk + 1;
}

/// Whether a backward on a GPU wants what the forward can save (SwrSaved). The marching one with
/// few chunks per block folds them again instead.
inline bool swr_saves(int64_t window) { return window == 0 || swr_chunks_per_block(window) > 2; }

/// Sizes of SwrSaved in elements of the arithmetic type; all 0 where nothing is saved.
struct SwrSavedSizes {
  int64_t chunks, states, products;
  int64_t total() const { return states + products; }
};

inline SwrSavedSizes swr_saved_sizes(int64_t batch, int64_t length, int64_t heads, int64_t width,
                                     int64_t window, DType dtype) {
  // One step at a time is inference, which saves nothing.
  if (!swr_saves(window) || dtype == DType::kFloat64 || length <= 1) return {0, 0, 0};
  if (window == 0) {
    const int64_t tiles = swr_tiles(length);
    return {tiles, batch * tiles * heads * width, 0};
  }
  const int64_t blocks = swr_max_blocks(window, length);
  const int64_t chunks = blocks * swr_chunks_per_block(window);
  return {chunks, batch * chunks * heads * width, batch * blocks * heads};
}

struct SwrMarch {
  int columns = 0;  // of a CTA, a thread to each role: 128 or 64; 0: there is no room for it
  int chunks_per_block;
  int slots;     // chunks in the ring of shared memory
  bool wide;     // rows are copied in units of 16 bytes
  int64_t ctas;  // beside each other
  int64_t strips, strip_blocks;
  int64_t max_blocks;

  explicit operator bool() const { return columns > 0; }
};

/// Heads of a thread of the marching backward: two of those that share a kv head.
constexpr int swr_march_own_heads(int64_t group) { return group > 1 ? 2 : 1; }

/// Columns, one to a thread, that hold all channels. `group` heads share a kv head.
inline int64_t swr_march_all_columns(int64_t channels, int64_t group, int64_t bytes_per_element) {
  return (channels * bytes_per_element - 1) / (kSwrMarchBytes * swr_march_own_heads(group)) + 1;
}

/// Chunks that the ring must hold: the one being made ready and those before it that are still
/// needed, the one that is walked, and when folding the rest of its block and the one to its left.
inline int swr_march_slots(int64_t window) {
  return static_cast<int>(swr_saves(window) ? 2 : 2 * swr_chunks_per_block(window) + 1) +
         kSwrMarchAhead;
}

/// Columns of a CTA for `columns` in all, or 0 (SwrMarch). A chunk takes `slot_bytes` of shared
/// memory for each column, of which a CTA can have `shared`. 64 columns where 128 do not fit, or
/// would be half empty.
inline int swr_march_columns(int64_t columns, int64_t window, int64_t slot_bytes, int64_t shared) {
  const auto fits = [&](int64_t n) { return swr_march_slots(window) * n * slot_bytes <= shared; };
  return fits(128) && (columns > 64 || !fits(64)) ? 128 : fits(64) ? 64 : 0;
}

/// Strips as in the forward's ring: a multiprocessor takes one CTA at a time. `slot_bytes` and
/// `shared` as in swr_march_columns, `aligned` as in swr_max_blocks.
inline SwrMarch swr_march_plan(int64_t batch, int64_t length, int64_t heads, int64_t kv_heads,
                               int64_t width, int64_t window, int64_t bytes_per_element,
                               int64_t slot_bytes, int multiprocessors, int64_t shared,
                               bool aligned = false) {
  SwrMarch plan{};
  const int64_t columns = swr_march_all_columns(heads * width, heads / kv_heads, bytes_per_element);
  plan.columns = swr_march_columns(columns, window, slot_bytes, shared);
  if (!plan) return plan;
  plan.chunks_per_block = static_cast<int>(swr_chunks_per_block(window));
  plan.slots = swr_march_slots(window);
  plan.ctas = (columns - 1) / plan.columns + 1;
  plan.max_blocks = swr_max_blocks(window, length);
  const SwrStrips strips =
      swr_ring_strips(batch, length, window, plan.ctas * 128, multiprocessors, aligned);
  plan.strips = strips.strips;
  plan.strip_blocks = strips.blocks;
  return plan;
}

/// Horizon of decays bounded by rho: the smallest K >= 0 such that everything further back than K
/// steps weighs at most `tolerance` in total, sum_(k > K) rho^k = rho^(K+1) / (1 - rho) <=
/// tolerance (Sliding Window Recurrences, arXiv 2512.13921). rho in [0, 1), tolerance > 0; the
/// largest int64 when there is no such K.
inline int64_t swr_horizon(double rho, double tolerance) {
  if (rho == 0.0 && tolerance >= 0.0) return 0;
  if (!(rho > 0.0 && rho < 1.0 && tolerance > 0.0)) return std::numeric_limits<int64_t>::max();
  const auto tail = [rho](double k) { return std::pow(rho, k + 1.0) / (1.0 - rho); };
  // The logarithms give K up to rounding; the definition itself decides.
  double k = std::ceil(std::log(tolerance * (1.0 - rho)) / std::log(rho)) - 1.0;
  k = std::max(k, 0.0);
  while (k > 0.0 && tail(k - 1.0) <= tolerance) k -= 1.0;
  while (tail(k) > tolerance) k += 1.0;
  return static_cast<int64_t>(k);
}

}  // namespace sarissa::kernels
