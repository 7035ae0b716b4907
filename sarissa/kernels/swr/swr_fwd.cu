// Forward on CUDA by marching: a thread owns V neighbouring channels of a head and a strip of
// blocks. It starts one block to the left of the strip, whose local end state is the strip's first
// carry. Rows are fetched ahead, so that memory is never waited for: through a ring in shared
// memory (SharedRows) or, for any shape, into registers (RegisterRows). A full recurrence is one
// strip.
#include "sarissa/kernels/common/vector.cuh"
#include "sarissa/kernels/swr/swr_cuda.cuh"

namespace sarissa::kernels {
namespace {

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

/// The steps of a strip that are fetched: [warm, stop), c only from `begin` on.
struct Steps {
  int64_t warm, begin, stop;
};

/// Rows that a thread fetches into registers, kGroup steps ahead.
template <class T, int V, bool kGated>
class RegisterRows {
 public:
  static constexpr int kGroup = 8;
  using Row = sarissa::kernels::Row<T, V, kGated>;

  __device__ RegisterRows(const SwrInputs& in, int64_t row, int64_t channel, const Steps& steps)
      : next_(in, row, channel / in.width, channel % in.width),
        steps_(steps),
        fetched_(steps.warm) {
    next_.advance(fetched_);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) fetch(ring_[k]);
  }
  __device__ static void prefetch_first(const SwrInputs&, int64_t, int64_t, const Steps&) {}
  __device__ void begin_group() {}
  /// Row k of the group.
  __device__ Row take(int k) {
    const Row now = ring_[k];
    fetch(ring_[k]);
    return now;
  }

 private:
  // No branches here: a branch would end the compiler's view of what is in flight, and each row
  // would wait for its own loads.
  __device__ void fetch(Row& to) {
    const bool good = fetched_ < steps_.stop;
    to.a = load_vector<T, 1>(next_.a, good);
    to.u = load_vector<T, V>(next_.u, good);
    if constexpr (kGated) {
      to.b = load_vector<T, V>(next_.b, good);
      to.c = load_vector<T, V>(next_.c, good && fetched_ >= steps_.begin);
    }
    next_.advance(1);
    ++fetched_;
  }

  SwrChannel<T, kGated> next_;  // of row fetched_
  Steps steps_;
  int64_t fetched_;
  Row ring_[kGroup];
};

/// Rows that come through a ring in shared memory. The lanes of a warp copy for each other, in
/// units of 16 bytes (a: 4); each warp has its part of the ring to itself, so there is no barrier.
/// See swr_ring_fits for what it takes.
template <class T, int V>
class SharedRows {
 public:
  static constexpr int kGroup = 4;
  using Row = sarissa::kernels::Row<T, V, true>;
  static constexpr int kSlots = kSwrRingAhead + 1;
  struct Slot {
    Vector<T, V> u[kGroup][kSwrThreads], b[kGroup][kSwrThreads], c[kGroup][kSwrThreads];
    uint32_t a[kSwrThreads / 32][32];  // of a warp: kGroup rows of its heads
  };
  static constexpr int kSharedBytes = kSlots * sizeof(Slot);

  __device__ SharedRows(const SwrInputs& in, int64_t row, int64_t channel, const Steps& steps)
      : units_(in, row, unit_channel(channel) / in.width, unit_channel(channel) % in.width),
        a_row_words_(static_cast<int>(32 * V / in.width * sizeof(T) / 4)),
        a_at_(lane() * V / static_cast<int>(in.width)),
        steps_(steps),
        fetched_(steps.warm) {
    units_.advance(fetched_ + lane() / kUnits);
    const int64_t head = (channel - lane() * V) / in.width;  // the warp's first
    a_ = static_cast<const T*>(in.a) + row * in.a_batch + head +
         (fetched_ + lane() / a_row_words_) * in.a_step +
         lane() % a_row_words_ * (4 / static_cast<int>(sizeof(T)));
#pragma unroll
    for (int i = 0; i < kSwrRingAhead; ++i) copy_group();
  }
  /// Asks L2 for about as many of the warp's rows as the first copies are of, while the kernels
  /// before this one end. h: the head of this lane; the warp's channels are whole heads.
  __device__ static void prefetch_first(const SwrInputs& in, int64_t row, int64_t h,
                                        const Steps& steps) {
    const SwrChannel<T, true> at(in, row, h - lane() * V / static_cast<int>(in.width), 0);
    const auto rows = [&](const T* from, int64_t stride, int64_t begin, int elements) {
      prefetch_rows(from, stride, begin, min(begin + kSwrRingAhead * kGroup, steps.stop), elements);
    };
    rows(at.u, at.u_step, steps.warm, 32 * V);
    rows(at.b, at.gate_step, steps.warm, 32 * V);
    rows(at.c, at.gate_step, steps.begin, 32 * V);
    rows(at.a, at.a_step, steps.warm, 1);
  }
  /// Waits for the next kGroup rows and starts copies of later ones.
  __device__ void begin_group() {
    copies_wait<kSwrRingAhead - 1>();
    __syncwarp();  // the group is there, and the one before has been read
    copy_group();
    read_ = read_ + 1 == kSlots ? 0 : read_ + 1;
  }
  /// Row k of the group.
  __device__ Row take(int k) const {
    const Slot& slot = slots()[read_];
    const int tid = threadIdx.x;
    Row now;
    now.u = slot.u[k][tid];
    now.b = slot.b[k][tid];
    now.c = slot.c[k][tid];
    const auto* a = reinterpret_cast<const T*>(slot.a[tid / 32] + k * a_row_words_);
    now.a = load_vector<T, 1>(a + a_at_);
    return now;
  }

 private:
  static constexpr int kElements = 16 / static_cast<int>(sizeof(T));  // of a unit
  static constexpr int kUnits = 32 * V / kElements;                   // of a row and stream
  static constexpr int kTogether = 32 / kUnits;  // rows copied by a warp at once

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static int64_t unit_channel(int64_t channel) {
    return channel - lane() * V + lane() % kUnits * kElements;
  }
  __device__ static Slot* slots() {
    extern __shared__ __align__(16) unsigned char shared[];
    return reinterpret_cast<Slot*>(shared);
  }
  __device__ void copy_group() {
    Slot& slot = slots()[write_];
    write_ = write_ + 1 == kSlots ? 0 : write_ + 1;
    const int to = static_cast<int>(threadIdx.x) - lane() + lane() % kUnits * kElements / V;
#pragma unroll
    for (int i = 0; i < kGroup; i += kTogether) {
      const int k = i + lane() / kUnits;
      const bool good = fetched_ + k < steps_.stop;
      copy_async<16>(&slot.u[k][to], units_.u, good);
      copy_async<16>(&slot.b[k][to], units_.b, good);
      copy_async<16>(&slot.c[k][to], units_.c, good && fetched_ + k >= steps_.begin);
      units_.advance(kTogether);
    }
    const int a_row = lane() / a_row_words_;
    if (a_row < kGroup) {
      copy_async<4>(&slot.a[threadIdx.x / 32][lane()], a_, fetched_ + a_row < steps_.stop);
    }
    a_ += kGroup * units_.a_step;
    copies_commit();
    fetched_ += kGroup;
  }

  SwrChannel<T, true> units_;  // what this lane copies next
  const T* a_;                 // likewise
  int a_row_words_, a_at_;     // words of a row of the warp's a; this lane's head in it
  Steps steps_;
  int64_t fetched_;
  int write_ = 0, read_ = kSlots - 1;
};

template <class T, int V, bool kGated, bool kFull, bool kSaves, class Rows>
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

  {
    // The strip as it is without a state: that may not be read before the wait.
    const int64_t begin = min(strip * strip_blocks * in.window, in.length);
    Rows::prefetch_first(in, row, h, {max(begin - in.window, int64_t{0}), begin, in.length});
  }
  wait_for_earlier_kernels();
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

  const C decay_max = static_cast<C>(in.decay_max);
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
  Rows rows(in, row, channel, {t, begin, stop});
  // No branches, see RegisterRows.
  const auto march_row = [&](int k) {
    const Row<T, V, kGated> now = rows.take(k);
    C a = now.a[0], out[V];
    if constexpr (kGated) a = decay_max * sigmoid<T>(a);
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
  constexpr int kGroup = Rows::kGroup;
  while (t + kGroup <= stop) {
    rows.begin_group();
#pragma unroll
    for (int k = 0; k < kGroup; ++k) march_row(k);
  }
  rows.begin_group();
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    if (t < stop) march_row(k);
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
  const auto go = [&]<class Rows>(const SwrStrips& plan, size_t shared, const char* name) {
    const auto kernel = swr_fwd_kernel<T, V, kGated, kFull, kSaves, Rows>;
    const Status allowed = allow_shared_memory(kernel, shared);
    if (!allowed.ok()) return allowed;
    const int64_t ctas = ceil_div<int64_t>(in.batch * lanes * plan.strips, kSwrThreads);
    launch_early(kernel, dim3(static_cast<unsigned>(ctas)), kSwrThreads, shared, stream, params,
                 plan.strips, plan.blocks);
    return launch_status(name);
  };
  if constexpr (kGated && !kFull && V > 1) {
    if (swr_ring_fits<T, V>(params)) {
      const SwrStrips plan =
          swr_ring_strips(in.batch, in.length, in.window, lanes, multiprocessors());
      using Rows = SharedRows<T, V>;
      return go.template operator()<Rows>(plan, alone_on_multiprocessor(Rows::kSharedBytes),
                                          "march_ring");
    }
  }
  const SwrStrips plan = swr_fwd_strips(in.batch, in.length, in.window, lanes, multiprocessors());
  return go.template operator()<RegisterRows<T, V, kGated>>(plan, 0,
                                                            V > 1 ? "march_vector" : "march");
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
  return with_dtype(dtype, [&]<class T>() {
    const auto s = static_cast<cudaStream_t>(stream);
    return params.in.gated ? choose_vector<T, true>(params, s) : choose_vector<T, false>(params, s);
  });
}

}  // namespace sarissa::kernels
