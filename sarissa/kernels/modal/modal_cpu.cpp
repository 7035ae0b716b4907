// Plain loop over time, vectorised over channels. A work item is one batch entry and one tile of
// kLanes channels; it walks the sequence in chunks of kChunk steps that live in the first-level
// cache, and inside a chunk it takes the modes a few at a time.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "sarissa/kernels/common/cpu.h"
#include "sarissa/kernels/common/featurizer.h"
#include "sarissa/kernels/modal/modal.h"

namespace sarissa::kernels {
namespace {

constexpr int64_t kChunk = 64;     // steps between two checkpoints of the backward
constexpr int kModesTogether = 4;  // independent chains that hide the latency of the recurrence
constexpr int kThirds = 3;         // of z: post-gate, pre-gate, value
enum Third { kPost, kPre, kValue };

template <class C>
constexpr int kLanes = 64 / sizeof(C);  // one cache line of channels

template <class C>
using Row = C[kLanes<C>];

/// lambda = exp(log_pole) as an unevaluated sum high + low of two C. In single precision high alone
/// would carry the rounding of lambda, 2^-25, into every step: for lambda = 1 - 1e-7 that is a
/// third of 1 - lambda, a time constant wrong by a third. From 1/2 on high is 1: its product with s
/// is exact, so that the step is as good without a fused multiply-add as with one. Below 1/2 it is
/// lambda rounded, for s + (lambda - 1) s would cancel. In double `low` is zero and is not used.
template <class C>
SARISSA_INLINE void pole(C log_pole, C& high, C& low) {
  const double lambda = std::exp(static_cast<double>(log_pole));
  if (sizeof(C) < sizeof(double) && lambda >= 0.5) {
    high = C{1};
    low = static_cast<C>(std::expm1(static_cast<double>(log_pole)));
    return;
  }
  high = static_cast<C>(lambda);
  low = static_cast<C>(lambda - static_cast<double>(high));
}

/// lambda * s + u.
template <class C>
SARISSA_INLINE C recur(C high, C low, C s, C u) {
  if constexpr (sizeof(C) == sizeof(double)) return high * s + u;
  return high * s + (low * s + u);
}

/// The first `lanes` elements of p in compute precision; zeros in the other lanes, and everywhere
/// if p is null.
template <class T>
SARISSA_INLINE void load_row(const T* p, int lanes, Row<compute_t<T>>& row) {
  using C = compute_t<T>;
  if (p != nullptr && lanes == kLanes<C>) {
    for (int w = 0; w < kLanes<C>; ++w) row[w] = static_cast<C>(p[w]);
    return;
  }
  for (int w = 0; w < kLanes<C>; ++w) {
    row[w] = p != nullptr && w < lanes ? static_cast<C>(p[w]) : C{0};
  }
}

template <class T>
SARISSA_INLINE void store_row(const Row<compute_t<T>>& row, int lanes, T* p) {
  using C = compute_t<T>;
  if (lanes == kLanes<C>) {
    for (int w = 0; w < kLanes<C>; ++w) p[w] = static_cast<T>(row[w]);
    return;
  }
  for (int w = 0; w < lanes; ++w) p[w] = static_cast<T>(row[w]);
}

/// Hands out parts of the workspace.
class Workspace {
 public:
  explicit Workspace(void* base) : next_(static_cast<char*>(base)) {}
  template <class C>
  Row<C>* rows(int64_t count) {
    auto* part = reinterpret_cast<Row<C>*>(next_);
    next_ += count * static_cast<int64_t>(sizeof(Row<C>));
    return part;
  }

 private:
  char* next_;
};

/// The channels of one work item, their filter and their inputs.
template <class T>
struct Tile {
  using C = compute_t<T>;
  static constexpr int kW = kLanes<C>;

  const ModalInputs& in;
  int64_t b, channel;           // batch entry, first channel
  int lanes;                    // channels that exist, the other lanes are zeros
  Row<C>*high, *low, *residue;  // [N]
  Row<C> skip;
  Row<C> taps[kThirds][kFeaturizerTaps];

  SARISSA_INLINE Tile(const ModalInputs& inputs, int64_t item, Workspace& workspace) : in(inputs) {
    const int64_t tiles = (in.width + kW - 1) / kW;
    b = item / tiles;
    channel = item % tiles * kW;
    lanes = static_cast<int>(std::min<int64_t>(kW, in.width - channel));
    high = workspace.rows<C>(in.modes);
    low = workspace.rows<C>(in.modes);
    residue = workspace.rows<C>(in.modes);
    for (int64_t n = 0; n < in.modes; ++n) {
      int64_t last_group = -1;
      for (int w = 0; w < kW; ++w) {
        if (w >= lanes) {
          high[n][w] = low[n][w] = residue[n][w] = C{0};
          continue;
        }
        const int64_t group = (channel + w) / (in.width / in.groups);
        if (group == last_group) {  // exp is the expensive part of short calls
          high[n][w] = high[n][w - 1];
          low[n][w] = low[n][w - 1];
        } else {
          pole(static_cast<const C*>(in.log_poles)[group * in.modes + n], high[n][w], low[n][w]);
        }
        residue[n][w] = static_cast<const C*>(in.residues)[group * in.modes + n];
        last_group = group;
      }
    }
    load_row(in.skip ? static_cast<const C*>(in.skip) + channel : nullptr, lanes, skip);
    if (!in.gated()) return;
    const C* featurizer = static_cast<const C*>(in.featurizer);
    for (int third = 0; third < kThirds; ++third) {
      for (int k = 0; k < kFeaturizerTaps; ++k) {
        load_row(featurizer + (k * kThirds + third) * in.width + channel, lanes, taps[third][k]);
      }
    }
  }

  /// Row t of z's third (of u: third 0); t = -1, -2 are the carried state.
  SARISSA_INLINE const T* z_row(int third, int64_t t) const {
    const int64_t c = third * in.width + channel;
    if (t >= 0) {
      return static_cast<const T*>(in.u) + b * in.u_batch_stride + t * in.u_time_stride + c;
    }
    return static_cast<const T*>(in.featurizer_state) + (b * 2 + 2 + t) * 3 * in.width + c;
  }

  /// [N] rows of a [B, D, N] state tensor; zeros if it is null.
  SARISSA_INLINE void load_state(const void* state_BDN, Row<C>* s) const {
    const C* p = static_cast<const C*>(state_BDN);
    for (int64_t n = 0; n < in.modes; ++n) {
      for (int w = 0; w < kW; ++w) {
        const bool given = p != nullptr && w < lanes;
        s[n][w] = given ? p[(b * in.width + channel + w) * in.modes + n] : C{0};
      }
    }
  }

  SARISSA_INLINE void store_state(const Row<C>* s, void* state_BDN) const {
    C* p = static_cast<C*>(state_BDN);
    for (int w = 0; w < lanes; ++w) {
      for (int64_t n = 0; n < in.modes; ++n) {
        p[(b * in.width + channel + w) * in.modes + n] = s[n][w];
      }
    }
  }
};

/// One chunk of inputs: u, and what it was made of if there are gates.
template <class T>
struct Chunk {
  using C = compute_t<T>;
  Row<C> u[kChunk];
  Row<C> z[kThirds][kChunk + 2];  // z[third][i] is step start - 2 + i
  Row<C> c[kThirds][kChunk];      // featurizer output

  SARISSA_INLINE void load(const Tile<T>& tile, int64_t start, int64_t count) {
    if (!tile.in.gated()) {
      for (int64_t i = 0; i < count; ++i) load_row(tile.z_row(0, start + i), tile.lanes, u[i]);
      return;
    }
    for (int third = 0; third < kThirds; ++third) {
      const auto& taps = tile.taps[third];
      for (int64_t i = 0; i < count + 2; ++i) {
        load_row(tile.z_row(third, start - 2 + i), tile.lanes, z[third][i]);
      }
      for (int64_t i = 0; i < count; ++i) {
        three_tap_row(z[third][i + 2], z[third][i + 1], z[third][i], taps[0], kLanes<C>, kLanes<C>,
                      c[third][i]);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int w = 0; w < kLanes<C>; ++w) u[i][w] = c[kPre][i][w] * c[kValue][i][w];
    }
  }
};

/// Runs modes n .. n + M - 1 over a chunk: s <- lambda s + u, q += residue s.
template <int M, class C>
SARISSA_INLINE void run_modes(const Row<C>* __restrict u, int64_t count,
                              const Row<C>* __restrict high, const Row<C>* __restrict low,
                              const Row<C>* __restrict residue, Row<C>* __restrict s,
                              Row<C>* __restrict q) {
  for (int64_t i = 0; i < count; ++i) {
    for (int w = 0; w < kLanes<C>; ++w) {
      C sum = q[i][w];
      for (int m = 0; m < M; ++m) {
        s[m][w] = recur(high[m][w], low[m][w], s[m][w], u[i][w]);
        sum = residue[m][w] * s[m][w] + sum;
      }
      q[i][w] = sum;
    }
  }
}

/// q = skip u + sum of the modes over a chunk; s [N] moves from its start to its end.
template <class T>
SARISSA_INLINE void run_chunk(const Tile<T>& tile, const Chunk<T>& chunk, int64_t count,
                              Row<compute_t<T>>* s, Row<compute_t<T>>* q) {
  using C = compute_t<T>;
  for (int64_t i = 0; i < count; ++i) {
    for (int w = 0; w < kLanes<C>; ++w) q[i][w] = tile.skip[w] * chunk.u[i][w];
  }
  int64_t n = 0;
  for (; n + kModesTogether <= tile.in.modes; n += kModesTogether) {
    run_modes<kModesTogether, C>(chunk.u, count, tile.high + n, tile.low + n, tile.residue + n,
                                 s + n, q);
  }
  for (; n < tile.in.modes; ++n) {
    run_modes<1, C>(chunk.u, count, tile.high + n, tile.low + n, tile.residue + n, s + n, q);
  }
}

template <class T>
SARISSA_INLINE void fwd_item(const ModalFwdParams& params, int64_t item) {
  using C = compute_t<T>;
  const ModalInputs& in = params.in;
  Workspace workspace(params.workspace);
  const Tile<T> tile(in, item, workspace);
  Row<C>* s = workspace.rows<C>(in.modes);
  Chunk<T>& chunk =
      *reinterpret_cast<Chunk<T>*>(workspace.rows<C>(sizeof(Chunk<T>) / sizeof(Row<C>)));
  Row<C>* q = workspace.rows<C>(kChunk);

  tile.load_state(in.state, s);
  T* y = static_cast<T*>(params.y) + tile.b * in.length * in.width + tile.channel;
  for (int64_t start = 0; start < in.length; start += kChunk) {
    const int64_t count = std::min(kChunk, in.length - start);
    chunk.load(tile, start, count);
    run_chunk(tile, chunk, count, s, q);
    for (int64_t i = 0; i < count; ++i) {
      if (in.gated()) {
        for (int w = 0; w < kLanes<C>; ++w) q[i][w] = chunk.c[kPost][i][w] * q[i][w];
      }
      store_row(q[i], tile.lanes, y + (start + i) * in.width);
    }
  }
  tile.store_state(s, params.state_out);
  if (!in.gated()) return;
  for (int third = 0; third < kThirds; ++third) {
    for (int64_t r = 0; r < 2; ++r) {
      const T* z = tile.z_row(third, in.length - 2 + r);
      T* out = static_cast<T*>(params.featurizer_state_out) + (tile.b * 2 + r) * 3 * in.width +
               third * in.width + tile.channel;
      for (int w = 0; w < tile.lanes; ++w) out[w] = z[w];
    }
  }
}

/// The adjoint of a chunk, for modes n .. n + M - 1. With p_t = residue dq_t + lambda p_(t+1):
/// du += p, dresidue += dq s, dlambda += p_t s_(t-1). The states are recomputed from s, their
/// values before the chunk; `g` holds lambda p of the step after the chunk and then of its first
/// step. q += residue s as in the forward: the post-gate's gradient needs it.
template <int M, class C>
SARISSA_INLINE void run_modes_bwd(const Row<C>* __restrict u, const Row<C>* __restrict dq,
                                  int64_t count, const Row<C>* __restrict high,
                                  const Row<C>* __restrict low, const Row<C>* __restrict residue,
                                  Row<C>* __restrict s, Row<C>* __restrict g, Row<C>* __restrict q,
                                  Row<C>* __restrict du, Row<C>* __restrict dresidue,
                                  Row<C>* __restrict dlambda, Row<C>* __restrict before) {
  Row<C> sum_ds[M] = {}, sum_ps[M] = {};  // over the chunk: a short sum before a long one
  for (int64_t i = 0; i < count; ++i) {
    for (int w = 0; w < kLanes<C>; ++w) {
      C sum = q[i][w];
      for (int m = 0; m < M; ++m) {
        before[i * M + m][w] = s[m][w];
        s[m][w] = recur(high[m][w], low[m][w], s[m][w], u[i][w]);
        sum = residue[m][w] * s[m][w] + sum;
        sum_ds[m][w] = dq[i][w] * s[m][w] + sum_ds[m][w];
      }
      q[i][w] = sum;
    }
  }
  for (int64_t i = count - 1; i >= 0; --i) {
    for (int w = 0; w < kLanes<C>; ++w) {
      C sum = du[i][w];
      for (int m = 0; m < M; ++m) {
        const C p = residue[m][w] * dq[i][w] + g[m][w];
        sum += p;
        sum_ps[m][w] = p * before[i * M + m][w] + sum_ps[m][w];
        g[m][w] = recur(high[m][w], low[m][w], p, C{0});
      }
      du[i][w] = sum;
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int w = 0; w < kLanes<C>; ++w) {
      dresidue[m][w] += sum_ds[m][w];
      dlambda[m][w] += sum_ps[m][w];
    }
  }
}

template <class T>
SARISSA_INLINE void bwd_item(const ModalBwdParams& params, int64_t item) {
  using C = compute_t<T>;
  constexpr int kW = kLanes<C>;
  const ModalInputs& in = params.in;
  Workspace workspace(params.workspace);
  const Tile<T> tile(in, item, workspace);
  const int lanes = tile.lanes;
  Row<C>* g = workspace.rows<C>(in.modes);
  Chunk<T>& chunk =
      *reinterpret_cast<Chunk<T>*>(workspace.rows<C>(sizeof(Chunk<T>) / sizeof(Row<C>)));
  Row<C>* q = workspace.rows<C>(kChunk);
  Row<C>* dq = workspace.rows<C>(kChunk);
  Row<C>* du = workspace.rows<C>(kChunk);
  Row<C>* dresidue = workspace.rows<C>(in.modes);
  Row<C>* dlambda = workspace.rows<C>(in.modes);
  Row<C>* before = workspace.rows<C>(kChunk * kModesTogether);
  Row<C>* dc = workspace.rows<C>(kThirds * (kChunk + 2));  // [third][step], two steps to the right
  Row<C>* checkpoints = workspace.rows<C>(in.modes * ((in.length + kChunk - 1) / kChunk + 1));

  // The state before every chunk.
  const int64_t chunks = (in.length + kChunk - 1) / kChunk;
  tile.load_state(in.state, checkpoints);
  for (int64_t k = 0; k + 1 < chunks; ++k) {
    Row<C>* s = checkpoints + (k + 1) * in.modes;
    std::memcpy(s, checkpoints + k * in.modes, in.modes * sizeof(Row<C>));
    chunk.load(tile, k * kChunk, kChunk);
    run_chunk(tile, chunk, kChunk, s, q);
  }

  tile.load_state(params.dstate_out, g);
  std::memset(dresidue, 0, in.modes * sizeof(Row<C>));
  std::memset(dlambda, 0, in.modes * sizeof(Row<C>));
  std::memset(dc, 0, kThirds * (kChunk + 2) * sizeof(Row<C>));
  Row<C> dskip = {};
  Row<C> dtaps[kThirds][kFeaturizerTaps] = {};
  const int64_t channels = in.gated() ? kThirds * in.width : in.width;  // of du

  // Gradient of the last two z, which are the featurizer's state afterwards. t in [-2, L).
  const auto dfeaturizer_row = [&](int third, int64_t t) -> const T* {
    const int64_t r = t - (in.length - 2);
    if (params.dfeaturizer_state_out == nullptr || r < 0) return nullptr;
    return static_cast<const T*>(params.dfeaturizer_state_out) + (tile.b * 2 + r) * 3 * in.width +
           third * in.width + tile.channel;
  };

  for (int64_t k = chunks - 1; k >= 0; --k) {
    const int64_t start = k * kChunk;
    const int64_t count = std::min(kChunk, in.length - start);
    chunk.load(tile, start, count);
    Row<C> skip_sum = {};
    for (int64_t i = 0; i < count; ++i) {
      load_row(static_cast<const T*>(params.dy) + tile.b * params.dy_batch_stride +
                   (start + i) * params.dy_time_stride + tile.channel,
               lanes, dq[i]);
      if (in.gated()) {
        // dc of the post-gate is dy q: keep dy there until q is known.
        std::memcpy(dc[kPost * (kChunk + 2) + i], dq[i], sizeof(Row<C>));
        for (int w = 0; w < kW; ++w) dq[i][w] *= chunk.c[kPost][i][w];
      }
      for (int w = 0; w < kW; ++w) {
        q[i][w] = tile.skip[w] * chunk.u[i][w];
        du[i][w] = tile.skip[w] * dq[i][w];
        skip_sum[w] = dq[i][w] * chunk.u[i][w] + skip_sum[w];
      }
    }
    for (int w = 0; w < kW; ++w) dskip[w] += skip_sum[w];

    Row<C>* s = checkpoints + k * in.modes;
    int64_t n = 0;
    for (; n + kModesTogether <= in.modes; n += kModesTogether) {
      run_modes_bwd<kModesTogether, C>(chunk.u, dq, count, tile.high + n, tile.low + n,
                                       tile.residue + n, s + n, g + n, q, du, dresidue + n,
                                       dlambda + n, before);
    }
    for (; n < in.modes; ++n) {
      run_modes_bwd<1, C>(chunk.u, dq, count, tile.high + n, tile.low + n, tile.residue + n, s + n,
                          g + n, q, du, dresidue + n, dlambda + n, before);
    }

    T* out = static_cast<T*>(params.du) + (tile.b * in.length + start) * channels + tile.channel;
    if (!in.gated()) {
      for (int64_t i = 0; i < count; ++i) store_row(du[i], lanes, out + i * channels);
      continue;
    }
    Row<C>* dpost = dc + kPost * (kChunk + 2);
    Row<C>* dpre = dc + kPre * (kChunk + 2);
    Row<C>* dvalue = dc + kValue * (kChunk + 2);
    for (int64_t i = 0; i < count; ++i) {
      for (int w = 0; w < kW; ++w) {
        dpost[i][w] *= q[i][w];
        dpre[i][w] = du[i][w] * chunk.c[kValue][i][w];
        dvalue[i][w] = du[i][w] * chunk.c[kPre][i][w];
      }
    }
    for (int third = 0; third < kThirds; ++third) {
      Row<C>* d = dc + third * (kChunk + 2);
      const auto& taps = tile.taps[third];
      Row<C> tap_sum[kFeaturizerTaps] = {};
      for (int64_t i = 0; i < count; ++i) {
        Row<C> dz, from_state;
        three_tap_row(d[i], d[i + 1], d[i + 2], taps[0], kW, kW, dz);
        load_row(dfeaturizer_row(third, start + i), lanes, from_state);
        for (int w = 0; w < kW; ++w) {
          dz[w] += from_state[w];
          tap_sum[0][w] = d[i][w] * chunk.z[third][i + 2][w] + tap_sum[0][w];
          tap_sum[1][w] = d[i][w] * chunk.z[third][i + 1][w] + tap_sum[1][w];
          tap_sum[2][w] = d[i][w] * chunk.z[third][i][w] + tap_sum[2][w];
        }
        store_row(dz, lanes, out + i * channels + third * in.width);
      }
      for (int tap = 0; tap < kFeaturizerTaps; ++tap) {
        for (int w = 0; w < kW; ++w) dtaps[third][tap][w] += tap_sum[tap][w];
      }
      // The chunk to the left sees this chunk's first two steps behind its own last one.
      Row<C> first[2];
      std::memcpy(first, d, sizeof(first));
      std::memcpy(d + kChunk, first, sizeof(first));
    }
  }

  // What is left belongs to the sequence's start and to the parameters.
  tile.store_state(g, params.dstate);
  for (int64_t n = 0; n < in.modes; ++n) {
    const int64_t at = (tile.b * in.modes + n) * in.width + tile.channel;
    for (int w = 0; w < kW; ++w) {
      dlambda[n][w] *= tile.high[n][w] + tile.low[n][w];  // dlog_pole = lambda dlambda
    }
    store_row<C>(dlambda[n], lanes, static_cast<C*>(params.dlog_poles_BND) + at);
    store_row<C>(dresidue[n], lanes, static_cast<C*>(params.dresidues_BND) + at);
  }
  store_row<C>(dskip, lanes, static_cast<C*>(params.dskip_BD) + tile.b * in.width + tile.channel);
  if (!in.gated()) return;
  for (int third = 0; third < kThirds; ++third) {
    const int64_t c = third * in.width + tile.channel;
    for (int tap = 0; tap < kFeaturizerTaps; ++tap) {
      store_row<C>(dtaps[third][tap], lanes,
                   static_cast<C*>(params.dfeaturizer_BKC) +
                       (tile.b * kFeaturizerTaps + tap) * 3 * in.width + c);
    }
    const Row<C>* d = dc + third * (kChunk + 2) + kChunk;  // steps 0 and 1
    const auto& taps = tile.taps[third];
    for (int64_t r = 0; r < 2; ++r) {  // steps -2 and -1
      Row<C> dz;
      load_row(dfeaturizer_row(third, r - 2), lanes, dz);
      for (int w = 0; w < kW; ++w) {
        dz[w] += r == 0 ? taps[2][w] * d[0][w] : taps[1][w] * d[0][w] + taps[2][w] * d[1][w];
      }
      store_row(dz, lanes,
                static_cast<T*>(params.dfeaturizer_state) + (tile.b * 2 + r) * 3 * in.width + c);
    }
  }
}

/// Sum over the batch and over the D/G neighbouring channels of each group: [B, K, D] -> [G, K].
template <class C>
void sum_groups(const void* partials, int64_t batch, int64_t k_count, int64_t width, int64_t groups,
                void* sums) {
  const C* from = static_cast<const C*>(partials);
  C* to = static_cast<C*>(sums);
  const int64_t per_group = width / groups;
  std::fill(to, to + groups * k_count, C{0});
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t k = 0; k < k_count; ++k) {
      for (int64_t c = 0; c < width; ++c) {
        to[c / per_group * k_count + k] += from[(b * k_count + k) * width + c];
      }
    }
  }
}

template <class C>
void sum(const ModalBwdParams& params) {
  const ModalInputs& in = params.in;
  sum_groups<C>(params.dlog_poles_BND, in.batch, in.modes, in.width, in.groups, params.dlog_poles);
  sum_groups<C>(params.dresidues_BND, in.batch, in.modes, in.width, in.groups, params.dresidues);
  sum_groups<C>(params.dskip_BD, in.batch, 1, in.width, in.width, params.dskip);
  if (in.gated()) {
    const int64_t channels = 3 * in.width;
    // Every tap of every channel is a group of its own, so the taps stay outermost.
    sum_groups<C>(params.dfeaturizer_BKC, in.batch, 1, kFeaturizerTaps * channels,
                  kFeaturizerTaps * channels, params.dfeaturizer);
  }
}

SARISSA_CPU_CLONES void fwd_double(const ModalFwdParams& params, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) fwd_item<double>(params, item);
}
SARISSA_CPU_CLONES void fwd_float(const ModalFwdParams& params, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) fwd_item<float>(params, item);
}
SARISSA_CPU_CLONES void fwd_bfloat16(const ModalFwdParams& params, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) fwd_item<BFloat16>(params, item);
}
SARISSA_CPU_CLONES void bwd_double(const ModalBwdParams& params, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) bwd_item<double>(params, item);
}
SARISSA_CPU_CLONES void bwd_float(const ModalBwdParams& params, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) bwd_item<float>(params, item);
}
SARISSA_CPU_CLONES void bwd_bfloat16(const ModalBwdParams& params, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) bwd_item<BFloat16>(params, item);
}

constexpr int64_t kRowBytes = 64;

int64_t lanes_of(DType dtype) { return dtype == DType::kFloat64 ? kLanes<double> : kLanes<float>; }

/// Rows that forward and backward have in common: tables, a state, a chunk with gates, q.
int64_t common_rows(const ModalInputs& in) {
  return 4 * in.modes + static_cast<int64_t>(sizeof(Chunk<float>)) / kRowBytes + kChunk;
}
static_assert(sizeof(Chunk<float>) == sizeof(Chunk<double>) && sizeof(Row<float>) == kRowBytes);

}  // namespace

int64_t modal_items_cpu(const ModalInputs& in, DType dtype) {
  const int64_t lanes = lanes_of(dtype);
  return in.batch * ((in.width + lanes - 1) / lanes);
}

int64_t modal_fwd_workspace_cpu(const ModalInputs& in, DType) {
  return common_rows(in) * kRowBytes;
}

int64_t modal_bwd_workspace_cpu(const ModalInputs& in, DType) {
  const int64_t checkpoints = (in.length + kChunk - 1) / kChunk + 1;
  const int64_t rows = common_rows(in) + 2 * kChunk + 2 * in.modes + kChunk * kModesTogether +
                       kThirds * (kChunk + 2) + checkpoints * in.modes;
  return rows * kRowBytes;
}

Status modal_fwd_cpu(const ModalFwdParams& params, DType dtype, int64_t begin, int64_t end) {
  switch (dtype) {
    case DType::kFloat64:
      fwd_double(params, begin, end);
      break;
    case DType::kFloat32:
      fwd_float(params, begin, end);
      break;
    case DType::kBFloat16:
      fwd_bfloat16(params, begin, end);
      break;
  }
  return {};
}

Status modal_bwd_cpu(const ModalBwdParams& params, DType dtype, int64_t begin, int64_t end) {
  switch (dtype) {
    case DType::kFloat64:
      bwd_double(params, begin, end);
      break;
    case DType::kFloat32:
      bwd_float(params, begin, end);
      break;
    case DType::kBFloat16:
      bwd_bfloat16(params, begin, end);
      break;
  }
  return {};
}

Status modal_sum_cpu(const ModalBwdParams& params, DType dtype) {
  dtype == DType::kFloat64 ? sum<double>(params) : sum<float>(params);
  return {};
}

}  // namespace sarissa::kernels
