// CPU stages of the FIR family. Everything is one primitive, correlate_tile: the FIR runs over the
// taps, its adjoint over the taps in reverse, and the taps' gradient over time. The double
// instantiation is the specification of the operators.
#include <algorithm>
#include <cstdint>

#include "sarissa/kernels/common/cpu.h"
#include "sarissa/kernels/common/featurizer.h"
#include "sarissa/kernels/fir/fir.h"
#include "sarissa/kernels/fir/fir_plan.h"

namespace sarissa::kernels {
namespace {

static_assert(kFirBlock <= kFeaturizerMaxChannels);

template <class C>
constexpr int64_t kLanes = 64 / sizeof(C);
template <class C>
constexpr int64_t kBlockPanels = kFirBlock / kLanes<C>;

/// Half a panel row, an AVX2 register: a tile of 8 with 4 taps stays within its 16 registers.
template <class C>
struct Half {
  typedef C Vector __attribute__((vector_size(32), may_alias));
  static constexpr int64_t kSize = 32 / sizeof(C);
};

/// out[r] = sum over i < n, ascending, of w[i] x[r + i] for kTile rows r; rows are panel rows and
/// consecutive w are w_step elements apart. The order of each sum does not depend on kTile or r:
/// how time is cut into tiles never shows in the result.
template <class C, int64_t kTile>
SARISSA_INLINE void correlate_tile(const C* x, const C* w, int64_t w_step, int64_t n, C* out,
                                   int64_t out_step) {
  using Vector = typename Half<C>::Vector;
  constexpr int64_t kHalves = kLanes<C> / Half<C>::kSize;  // per row
  const int64_t w_halves = w_step / Half<C>::kSize;
  constexpr int64_t kTaps = 4;  // taps per pass over the rows: each row loaded serves four sums
  for (int64_t lane = 0; lane < kLanes<C>; lane += Half<C>::kSize) {
    const auto* x_half = reinterpret_cast<const Vector*>(x + lane);
    const auto* w_half = reinterpret_cast<const Vector*>(w + lane);
    Vector sum[kTile] = {};
    int64_t i = 0;
    for (; i + kTaps <= n; i += kTaps) {
      Vector tap[kTaps];
      for (int64_t j = 0; j < kTaps; ++j) tap[j] = w_half[(i + j) * w_halves];
#pragma GCC unroll 16
      for (int64_t s = 0; s < kTile + kTaps - 1; ++s) {
        const Vector row = x_half[(i + s) * kHalves];
#pragma GCC unroll 4
        for (int64_t j = 0; j < kTaps; ++j) {
          if (s - j >= 0 && s - j < kTile) sum[s - j] += tap[j] * row;
        }
      }
    }
    for (; i < n; ++i) {
      const Vector tap = w_half[i * w_halves];
#pragma GCC unroll 8
      for (int64_t r = 0; r < kTile; ++r) sum[r] += tap * x_half[(i + r) * kHalves];
    }
    for (int64_t r = 0; r < kTile; ++r) {
      *reinterpret_cast<Vector*>(out + r * out_step + lane) = sum[r];
    }
  }
}

/// The same for `rows` <= kFirTile rows; up to kFirTile rows of out are written.
template <class C>
SARISSA_INLINE void correlate(const C* x, const C* w, int64_t w_step, int64_t n, int64_t rows,
                              C* out, int64_t out_step) {
  if (rows == 1) {
    correlate_tile<C, 1>(x, w, w_step, n, out, out_step);
  } else {
    correlate_tile<C, kFirTile>(x, w, w_step, n, out, out_step);
  }
}

/// A range of rows of one batch element for up to kFirBlock channels: what a work item covers.
struct Item {
  int64_t b, channel, n;  // batch element, first channel, channels
  int64_t chunk, begin, end;

  /// Items are ordered [batch][block of channels][chunk of `rows`].
  Item(int64_t index, int64_t width, int64_t rows) {
    const int64_t chunks = std::max<int64_t>(1, fir_ceil_div(rows, kFirTimeChunk));
    const int64_t blocks = fir_ceil_div(width, kFirBlock);
    chunk = index % chunks;
    channel = index / chunks % blocks * kFirBlock;
    b = index / chunks / blocks;
    n = std::min(kFirBlock, width - channel);
    begin = chunk * kFirTimeChunk;
    end = std::min(rows, begin + kFirTimeChunk);
  }
};

template <class T>
struct Fir {
  using C = compute_t<T>;
  const FirParams& p;
  FirPanels panels{p, sizeof(C)};
  int64_t D = p.width;
  int64_t history = p.num_taps - 1;  // rows of the state
  bool gated = p.featurizer != nullptr;

  C* u_panel(int64_t b, int64_t panel) const {
    return static_cast<C*>(p.u) + (b * panels.panels + panel) * panels.u_rows * kLanes<C>;
  }
  C* packed_taps(int64_t panel) const {
    return static_cast<C*>(p.packed_taps) + panel * p.num_taps * kLanes<C>;
  }
  const T* x(int64_t b, int64_t channel) const {
    return static_cast<const T*>(p.x) + b * p.x_stride_b + channel;
  }
  /// Rows of z from one channel of [0, 3D).
  FeaturizerRows<T> z_rows(int64_t b, int64_t channel) const {
    const T* state = static_cast<const T*>(p.featurizer_state);
    return {x(b, channel), p.x_stride_l, state + b * kFeaturizerHistory * 3 * D + channel, 3 * D};
  }
  const C* featurizer(int64_t channel) const {
    return static_cast<const C*>(p.featurizer) + channel;
  }
  /// The featurizer's output at step t; `third` 0 is post, 1 pre, 2 value.
  void featurize(const Item& item, int third, int64_t t, C* c) const {
    const int64_t channel = third * D + item.channel;
    featurize_row(z_rows(item.b, channel), t, featurizer(channel), 3 * D, item.n, c);
  }
  /// Copies one row of kFirBlock channels into the block's panels, and back.
  static void scatter(const C* row, C* first_panel, int64_t panel_size, int64_t count) {
    for (int64_t q = 0; q < count; ++q) {
      std::copy(row + q * kLanes<C>, row + (q + 1) * kLanes<C>, first_panel + q * panel_size);
    }
  }

  void pack_taps(int64_t panel) const {
    const C* taps = static_cast<const C*>(p.taps);
    const C* skip = static_cast<const C*>(p.skip);
    C* out = packed_taps(panel);
    for (int64_t lane = 0; lane < kLanes<C>; ++lane) {
      const int64_t d = panel * kLanes<C> + lane;
      const int64_t g = d / (D / p.groups);
      for (int64_t k = 0; k < p.num_taps; ++k) {
        out[k * kLanes<C> + lane] = d < D ? taps[g * p.num_taps + k] : C{0};
      }
      if (d < D && skip != nullptr) out[lane] += skip[d];
    }
  }

  /// Panels of one item's channels.
  int64_t count(const Item& item) const { return fir_ceil_div(item.n, kLanes<C>); }

  void gate(int64_t index) const {
    const Item item(index, D, panels.u_rows);
    const C* state = static_cast<const C*>(p.state);
    C* state_out = static_cast<C*>(p.state_out);
    alignas(64) C u[kFirBlock] = {};
    alignas(64) C pre[kFirBlock];
    alignas(64) C value[kFirBlock];
    for (int64_t r = item.begin; r < item.end; ++r) {
      const int64_t t = r - history;
      if (t >= p.length || (t < 0 && state == nullptr)) {
        std::fill(u, u + kFirBlock, C{0});
      } else if (t < 0) {
        const C* from = state + (item.b * history + r) * D + item.channel;
        std::copy(from, from + item.n, u);
      } else if (gated) {
        featurize(item, 1, t, pre);
        featurize(item, 2, t, value);
        for (int64_t i = 0; i < item.n; ++i) u[i] = pre[i] * value[i];
      } else {
        const T* from = x(item.b, item.channel) + t * p.x_stride_l;
        for (int64_t i = 0; i < item.n; ++i) u[i] = static_cast<C>(from[i]);
      }
      scatter(u, u_panel(item.b, item.channel / kLanes<C>) + r * kLanes<C>,
              panels.u_rows * kLanes<C>, count(item));
      if (state_out != nullptr && r >= p.length && r < p.length + history) {
        C* to = state_out + (item.b * history + r - p.length) * D + item.channel;
        std::copy(u, u + item.n, to);
      }
    }
  }

  /// q of the steps [t, t + rows), kFirBlock channels apart.
  void filter(const Item& item, int64_t t, int64_t rows, C* q) const {
    for (int64_t i = 0; i < count(item); ++i) {
      const int64_t panel = item.channel / kLanes<C> + i;
      correlate(u_panel(item.b, panel) + t * kLanes<C>, packed_taps(panel) + history * kLanes<C>,
                -kLanes<C>, p.num_taps, rows, q + i * kLanes<C>, kFirBlock);
    }
  }

  void fwd(int64_t index) const {
    const Item item(index, D, p.length);
    alignas(64) C q[kFirTile * kFirBlock];
    alignas(64) C post[kFirBlock];
    for (int64_t t = item.begin; t < item.end; t += kFirTile) {
      const int64_t rows = std::min(kFirTile, item.end - t);
      filter(item, t, rows, q);
      for (int64_t s = 0; s < rows; ++s) {
        C* __restrict__ row = q + s * kFirBlock;
        if (gated) {
          featurize(item, 0, t + s, post);
          for (int64_t i = 0; i < item.n; ++i) row[i] *= post[i];
        }
        T* __restrict__ y = static_cast<T*>(p.y) + (item.b * p.length + t + s) * D + item.channel;
        for (int64_t i = 0; i < item.n; ++i) y[i] = static_cast<T>(row[i]);
      }
    }
  }
};

template <class T>
struct FirBwd : Fir<T> {
  using C = compute_t<T>;
  using Base = Fir<T>;
  using Base::count;
  using Base::D;
  using Base::gated;
  using Base::history;
  using Base::panels;
  const FirBwdParams& p;

  explicit FirBwd(const FirBwdParams& params) : Base{params}, p(params) {}

  C* dq_panel(int64_t b, int64_t panel) const {
    return static_cast<C*>(p.dq) + (b * panels.panels + panel) * panels.dq_rows * kLanes<C>;
  }
  C* taps_partial(int64_t chunk, int64_t panel) const {
    return static_cast<C*>(p.taps_partial) +
           (chunk * panels.panels + panel) * p.num_taps * kLanes<C>;
  }

  /// q = taps * u, y = post q: dq = post dy, d_post = q dy.
  void output(int64_t index) const {
    const Item item(index, D, p.length);
    const int64_t panel_size = panels.dq_rows * kLanes<C>;
    C* dq = dq_panel(item.b, item.channel / kLanes<C>);
    if (item.begin == 0) {
      for (int64_t i = 0; i < count(item); ++i) {
        C* from = dq + i * panel_size;
        std::fill(from, from + history * kLanes<C>, C{0});
        std::fill(from + (history + p.length) * kLanes<C>, from + panel_size, C{0});
      }
    }
    alignas(64) C q[kFirTile * kFirBlock];
    alignas(64) C row[kFirBlock] = {};
    alignas(64) C post[kFirBlock];
    for (int64_t t = item.begin; t < item.end; t += kFirTile) {
      const int64_t rows = std::min(kFirTile, item.end - t);
      if (gated) this->filter(item, t, rows, q);
      for (int64_t s = 0; s < rows; ++s) {
        const T* __restrict__ dy = static_cast<const T*>(p.dy) + item.b * p.dy_stride_b +
                                   (t + s) * p.dy_stride_l + item.channel;
        for (int64_t i = 0; i < item.n; ++i) row[i] = static_cast<C>(dy[i]);
        if (gated) {
          C* __restrict__ d_post =
              static_cast<C*>(p.dc) + (item.b * p.length + t + s) * D + item.channel;
          const C* __restrict__ q_row = q + s * kFirBlock;
          for (int64_t i = 0; i < item.n; ++i) d_post[i] = row[i] * q_row[i];
          this->featurize(item, 0, t + s, post);
          for (int64_t i = 0; i < item.n; ++i) row[i] *= post[i];
        }
        Base::scatter(row, dq + (history + t + s) * kLanes<C>, panel_size, count(item));
      }
    }
  }

  /// d_taps[k] = sum over t of dq[t] u[t - k], per channel, over one time chunk.
  void taps(int64_t index) const {
    const int64_t panel = index % panels.panels;
    const int64_t chunk = index / panels.panels;  // over [batch][chunk]
    const int64_t b = chunk / fir_gradient_chunks(p);
    const int64_t begin = chunk % fir_gradient_chunks(p) * fir_gradient_chunk(p);
    const int64_t steps = std::min(p.length - begin, fir_gradient_chunk(p));
    const C* u = this->u_panel(b, panel) + begin * kLanes<C>;
    const C* dq = dq_panel(b, panel) + (history + begin) * kLanes<C>;
    C* out = taps_partial(chunk, panel);
    alignas(64) C tile[kFirTile * kLanes<C>];
    // Row r of the tile is tap W-1 - (i + r): u's rows start W-1 steps before dq's.
    for (int64_t i = 0; i < p.num_taps; i += kFirTile) {
      const int64_t rows = std::min(kFirTile, p.num_taps - i);
      correlate(u + i * kLanes<C>, dq, kLanes<C>, steps, rows, tile, kLanes<C>);
      for (int64_t r = 0; r < rows; ++r) {
        const C* row = tile + r * kLanes<C>;
        std::copy(row, row + kLanes<C>, out + (history - i - r) * kLanes<C>);
      }
    }
  }

  void sum_taps(int64_t panel) const {
    C* __restrict__ sum = taps_partial(0, panel);
    for (int64_t chunk = 1; chunk < p.batch * fir_gradient_chunks(p); ++chunk) {
      const C* __restrict__ from = taps_partial(chunk, panel);
      for (int64_t i = 0; i < p.num_taps * kLanes<C>; ++i) sum[i] += from[i];
    }
  }

  void sum_groups(int64_t g) const {
    C* d_taps = static_cast<C*>(p.d_taps) + g * p.num_taps;
    const int64_t channels = D / p.groups;
    std::fill(d_taps, d_taps + p.num_taps, C{0});
    for (int64_t d = g * channels; d < (g + 1) * channels; ++d) {
      const C* from = taps_partial(0, d / kLanes<C>) + d % kLanes<C>;
      for (int64_t k = 0; k < p.num_taps; ++k) d_taps[k] += from[k * kLanes<C>];
      if (p.d_skip != nullptr) static_cast<C*>(p.d_skip)[d] = from[0];  // skip adds to tap 0
    }
  }

  /// du[t] = sum over k of taps[k] dq[t + k], for t >= -(W-1); du replaces u, which no later stage
  /// reads.
  void input(int64_t index) const {
    const Item item(index, D, p.length + history);
    C* d_state = static_cast<C*>(p.d_state);
    const C* d_state_out = static_cast<const C*>(p.d_state_out);
    alignas(64) C tile[kFirTile * kFirBlock];
    for (int64_t r = item.begin; r < item.end; r += kFirTile) {
      const int64_t rows = std::min(kFirTile, item.end - r);
      for (int64_t i = 0; i < count(item); ++i) {
        const int64_t panel = item.channel / kLanes<C> + i;
        correlate(dq_panel(item.b, panel) + r * kLanes<C>, this->packed_taps(panel), kLanes<C>,
                  p.num_taps, rows, tile + i * kLanes<C>, kFirBlock);
      }
      for (int64_t s = r; s < r + rows; ++s) {
        C* __restrict__ du = tile + (s - r) * kFirBlock;
        const int64_t t = s - history;
        if (d_state_out != nullptr && s >= p.length) {
          const C* __restrict__ from =
              d_state_out + (item.b * history + s - p.length) * D + item.channel;
          for (int64_t i = 0; i < item.n; ++i) du[i] += from[i];
        }
        if (t < 0) {
          if (d_state == nullptr) continue;
          std::copy(du, du + item.n, d_state + (item.b * history + s) * D + item.channel);
        } else if (gated) {
          Base::scatter(du, this->u_panel(item.b, item.channel / kLanes<C>) + s * kLanes<C>,
                        panels.u_rows * kLanes<C>, count(item));
        } else {
          T* __restrict__ dx = static_cast<T*>(p.dx) + (item.b * p.length + t) * D + item.channel;
          for (int64_t i = 0; i < item.n; ++i) dx[i] = static_cast<T>(du[i]);
        }
      }
    }
  }

  /// d_pre = value du, d_value = pre du, and the featurizer's backward of all three thirds.
  void featurizer(int64_t index) const {
    const Item item(index, D, p.length);
    const int64_t chunks = std::max<int64_t>(1, fir_ceil_div(p.length, kFirTimeChunk));
    const C* d_post = static_cast<const C*>(p.dc) + item.b * p.length * D + item.channel;
    const C* du = this->u_panel(item.b, item.channel / kLanes<C>) + history * kLanes<C>;
    for (int third = 0; third < 3; ++third) {
      const auto dc_row = [&](int64_t t, C* __restrict__ out) [[gnu::always_inline]] {
        if (third == 0) {
          std::copy(d_post + t * D, d_post + t * D + item.n, out);
          return;
        }
        this->featurize(item, third == 1 ? 2 : 1, t, out);
        for (int64_t i = 0; i < item.n; i += kLanes<C>) {
          const C* __restrict__ from =
              du + (i / kLanes<C>)*panels.u_rows * kLanes<C> + t * kLanes<C>;
          for (int64_t l = 0; l < kLanes<C>; ++l) out[i + l] *= from[l];
        }
      };
      const int64_t channel = third * D + item.channel;
      const int64_t state = item.b * kFeaturizerHistory * 3 * D + channel;
      const T* d_state_out = static_cast<const T*>(p.d_featurizer_state_out);
      featurizer_bwd(
          FeaturizerBwd<T>{
              .rows = this->z_rows(item.b, channel),
              .length = p.length,
              .n = item.n,
              .f = Base::featurizer(channel),
              .f_stride = 3 * D,
              .d_state_out = d_state_out == nullptr ? nullptr : d_state_out + state,
              .d_state_out_stride = 3 * D,
              .dz = static_cast<T*>(p.dx) + item.b * p.length * 3 * D + channel,
              .dz_stride = 3 * D,
              .d_state = static_cast<T*>(p.d_featurizer_state) + state,
              .d_state_stride = 3 * D,
              .d_f = static_cast<C*>(p.featurizer_partial) +
                     (item.b * chunks + item.chunk) * 3 * 3 * D + channel,
              .d_f_stride = 3 * D,
          },
          item.begin, item.end, dc_row);
    }
  }

  void sum_featurizer(int64_t block) const {
    const int64_t chunks = std::max<int64_t>(1, fir_ceil_div(p.length, kFirTimeChunk));
    const int64_t begin = block * kFirBlock;
    const int64_t end = std::min(3 * D, begin + kFirBlock);
    for (int64_t k = 0; k < kFeaturizerTaps; ++k) {
      C* __restrict__ sum = static_cast<C*>(p.d_featurizer) + k * 3 * D;
      std::fill(sum + begin, sum + end, C{0});
      for (int64_t r = 0; r < p.batch * chunks; ++r) {
        const C* __restrict__ from =
            static_cast<const C*>(p.featurizer_partial) + (r * kFeaturizerTaps + k) * 3 * D;
        for (int64_t i = begin; i < end; ++i) sum[i] += from[i];
      }
    }
  }
};

}  // namespace

// One stage: a wrapper per element type, compiled for each instruction set, and the dispatch.
#define SARISSA_FIR_STAGE(name, Params, Kernel, method)                                       \
  SARISSA_CPU_CLONES                                                                          \
  [[gnu::flatten]] static void name##_double(const Params& p, int64_t begin, int64_t end) {   \
    const Kernel<double> kernel{p};                                                           \
    for (int64_t i = begin; i < end; ++i) kernel.method(i);                                   \
  }                                                                                           \
  SARISSA_CPU_CLONES                                                                          \
  [[gnu::flatten]] static void name##_float(const Params& p, int64_t begin, int64_t end) {    \
    const Kernel<float> kernel{p};                                                            \
    for (int64_t i = begin; i < end; ++i) kernel.method(i);                                   \
  }                                                                                           \
  SARISSA_CPU_CLONES                                                                          \
  [[gnu::flatten]] static void name##_bfloat16(const Params& p, int64_t begin, int64_t end) { \
    const Kernel<BFloat16> kernel{p};                                                         \
    for (int64_t i = begin; i < end; ++i) kernel.method(i);                                   \
  }                                                                                           \
  Status name(const Params& p, DType dtype, int64_t begin, int64_t end) {                     \
    switch (dtype) {                                                                          \
      case DType::kFloat64:                                                                   \
        name##_double(p, begin, end);                                                         \
        break;                                                                                \
      case DType::kFloat32:                                                                   \
        name##_float(p, begin, end);                                                          \
        break;                                                                                \
      case DType::kBFloat16:                                                                  \
        name##_bfloat16(p, begin, end);                                                       \
        break;                                                                                \
    }                                                                                         \
    return {};                                                                                \
  }

SARISSA_FIR_STAGE(fir_pack_taps_cpu, FirParams, Fir, pack_taps)
SARISSA_FIR_STAGE(fir_gate_cpu, FirParams, Fir, gate)
SARISSA_FIR_STAGE(fir_fwd_cpu, FirParams, Fir, fwd)
SARISSA_FIR_STAGE(fir_bwd_output_cpu, FirBwdParams, FirBwd, output)
SARISSA_FIR_STAGE(fir_bwd_taps_cpu, FirBwdParams, FirBwd, taps)
SARISSA_FIR_STAGE(fir_sum_taps_cpu, FirBwdParams, FirBwd, sum_taps)
SARISSA_FIR_STAGE(fir_sum_groups_cpu, FirBwdParams, FirBwd, sum_groups)
SARISSA_FIR_STAGE(fir_bwd_input_cpu, FirBwdParams, FirBwd, input)
SARISSA_FIR_STAGE(fir_bwd_featurizer_cpu, FirBwdParams, FirBwd, featurizer)
SARISSA_FIR_STAGE(fir_sum_featurizer_cpu, FirBwdParams, FirBwd, sum_featurizer)

#undef SARISSA_FIR_STAGE

}  // namespace sarissa::kernels
