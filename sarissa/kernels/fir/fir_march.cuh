// The marching kernels of hyena_fir with few taps: what the forward and the backward share.
//
// A thread owns V neighbouring channels of one batch element and a strip of time, and walks along
// it. What later steps need of earlier ones stays in its registers. Rows come through a ring in
// shared memory; the lanes of a warp copy for each other, in units of up to 16 bytes, and nothing
// is shared between warps, so there is no barrier.
#pragma once

#include "sarissa/kernels/common/featurizer.cuh"
#include "sarissa/kernels/common/vector.cuh"
#include "sarissa/kernels/fir/fir.h"
#include "sarissa/kernels/fir/fir_plan.h"

namespace sarissa::kernels {

constexpr int kPost = 0, kPre = 1, kValue = 2;  // the thirds of a row of z

/// Which strip and channels a thread has. Threads beyond the last channel do the work of their
/// warp's first lane once more. The strip after the last one has no steps.
struct FirStrip {
  int b, d;                 // batch element, first channel
  int column;               // the thread of the block whose channels these are
  int warp_d, warp_column;  // of the warp's first lane
  int index;                // of the strip
  int begin, steps;         // of the sequence

  __device__ FirStrip(const FirParams& p, const FirMarch& plan) {
    const int V = plan.vector, thread = static_cast<int>(threadIdx.x);
    const int length = static_cast<int>(p.length);
    warp_column = thread / 32 * 32;
    warp_d = (static_cast<int>(blockIdx.x) * kFirMarchThreads + warp_column) * V;
    d = warp_d + thread % 32 * V;
    column = d < p.width ? thread : warp_column;
    d = d < p.width ? d : warp_d;
    b = static_cast<int>(blockIdx.y);
    index = static_cast<int>(blockIdx.z);
    begin = min(index * plan.steps, length);
    steps = min(plan.steps, length - begin);
  }
};

/// A warp's part of the ring. A row is kStreams vectors for each thread of the block.
template <class T, int V, int kUnit, int kStreams, int kGroup>
struct FirCopies {
  using Row = Vector<T, V>[kStreams][kFirMarchThreads];
  static constexpr int kUnits = 32 * static_cast<int>(sizeof(Vector<T, V>)) / kUnit;  // of a stream
  static constexpr int kTogether = 32 / kUnits;  // rows that one copy instruction covers
  static constexpr int kElements = kUnit / static_cast<int>(sizeof(T));
  static_assert(kTogether >= 1 && kGroup % kTogether == 0);

  int row;      // of kTogether, that this lane copies
  int channel;  // the first that it copies
  int at;       // where they are in a stream of a row

  __device__ explicit FirCopies(const FirStrip& strip) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    row = lane / kUnits;
    channel = strip.warp_d + lane % kUnits * kElements;
    at = strip.warp_column * V + lane % kUnits * kElements;
  }
  /// Asks L2 for the warp's channels of steps [begin, end) of a stream, while the kernels before
  /// this one end.
  __device__ static void prefetch(const FirParams& p, const FirStrip& strip, const T* stream,
                                  int64_t stride, int begin, int end) {
    prefetch_rows(stream + strip.warp_d, stride, max(begin, 0),
                  min(end, static_cast<int>(p.length)),
                  min(32 * V, static_cast<int>(p.width) - strip.warp_d));
  }
  /// Copies the lane's part of one stream of rows i + row.
  __device__ void copy(Row* slot, int i, int stream, const T* from, bool good) const {
    auto* to = reinterpret_cast<T*>(slot[i + row][stream]);
    copy_async<kUnit>(to + at, from, good);
  }
};

/// out = taps[0] x + taps[1] (x one step ago) + taps[2] (x two steps ago), the oldest first.
template <int V>
__device__ inline void three_taps(const float (&taps)[3][V], const float (&x)[V],
                                  const float (&past)[2][V], float (&out)[V]) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    out[j] = three_taps(taps[0][j], taps[1][j], taps[2][j], x[j], past[0][j], past[1][j]);
  }
}

/// Makes x the latest of the past.
template <int V>
__device__ inline void remember(float (&past)[2][V], const float (&x)[V]) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    past[1][j] = past[0][j];
    past[0][j] = x[j];
  }
}

template <class T, int V>
__device__ inline void unpack(const Vector<T, V>& from, float (&to)[V]) {
#pragma unroll
  for (int j = 0; j < V; ++j) to[j] = from[j];
}

/// Element `at` of a parameter, or of its gradient: of type T like z, or float.
template <class T>
__device__ inline float load_parameter(const void* p, bool is_T, int64_t at) {
  return is_T ? load(static_cast<const T*>(p) + at) : static_cast<const float*>(p)[at];
}
template <class T>
__device__ inline void store_parameter(void* p, bool is_T, int64_t at, float x) {
  if (is_T) {
    store(static_cast<T*>(p) + at, x);
  } else {
    static_cast<float*>(p)[at] = x;
  }
}

/// The featurizer's taps of V channels from d on, in each third.
template <class T, int V>
__device__ inline void load_featurizer(const FirParams& p, int d, float (&to)[3][3][V]) {
  const auto load_from = [&]<class P>(const P* f) {
#pragma unroll
    for (int third = 0; third < 3; ++third) {
      Vector<P, V> values[3];
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        values[i] = load_vector<P, V>(f + (third * p.width + d) * 3 + i * V);
      }
#pragma unroll
      for (int i = 0; i < 3 * V; ++i) to[third][i % 3][i / 3] = values[i / V][i % V];
    }
  };
  if (p.featurizer_is_T) {
    load_from(static_cast<const T*>(p.featurizer));
  } else {
    load_from(static_cast<const float*>(p.featurizer));
  }
}

/// Filters of V channels. Taps beyond p.num_taps are zero.
template <class T, int V, int W>
struct FirFilters {
  float featurizer[3][3][V];  // [third][tap]
  float first[V];             // tap 0 and the skip
  float taps[W];              // from tap 1 on

  __device__ FirFilters(const FirParams& p, const FirMarch& plan, int d) {
    load_featurizer<T>(p, d, featurizer);
    const int64_t group = d / plan.group_width;
#pragma unroll
    for (int k = 0; k < W; ++k) {
      taps[k] = 0.0f;
      if (k < p.num_taps) taps[k] = load_parameter<T>(p.taps, p.taps_is_T, group * p.num_taps + k);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      first[j] = taps[0];
      if (p.skip != nullptr) first[j] += load_parameter<T>(p.skip, p.skip_is_T, d + j);
    }
  }

  __device__ float tap(int k, int j) const { return k == 0 ? first[j] : taps[k]; }
};

/// What came before a step: the last u, and the last two rows of z. Before step 0 they are the
/// states. Every strip starts from one, and the states that go out are the one at L.
template <class T, int V, int W>
struct FirHistory {
  float u[W - 1][V];  // u[i] is i + 1 steps ago
  float z[3][2][V];   // [third][i], likewise

  __device__ FirHistory(const FirParams& p, const FirFilters<T, V, W>& filters,
                        const FirStrip& strip) {
    constexpr int kRows = W + 1;  // rows of z that W - 1 values of u need
    const int begin = strip.begin;
    const int64_t N = 3 * p.width;
    const auto* x = static_cast<const T*>(p.x) + strip.b * p.x_stride_b + strip.d;
    const auto* x_state = static_cast<const T*>(p.featurizer_state) + strip.b * 2 * N + strip.d;
    const auto* u_state =
        static_cast<const float*>(p.state) + strip.b * (p.num_taps - 1) * p.width + strip.d;
    // All loads come before their first use: they take one memory latency together.
    Vector<T, V> rows[kRows][3];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int t = begin - 1 - i;
      const bool in_state = t < 0 && t >= -2 && p.featurizer_state != nullptr;
      const T* row = t >= 0 ? x + t * p.x_stride_l : x_state + (t + 2) * N;
#pragma unroll
      for (int third = 0; third < 3; ++third) {
        if (third == kPost && i >= 2) continue;
        rows[i][third] = load_vector<T, V>(row + third * p.width, t >= 0 || in_state);
      }
    }
#pragma unroll
    for (int i = 0; i < W - 1; ++i) {
      const int64_t row = begin - 1 - i + p.num_taps - 1;  // of the state, where t < 0
      const bool in_state = begin - 1 - i < 0 && row >= 0 && p.state != nullptr;
#pragma unroll
      for (int j = 0; j < V; ++j) u[i][j] = in_state ? u_state[row * p.width + j] : 0.0f;
    }
#pragma unroll
    for (int third = 0; third < 3; ++third) {
#pragma unroll
      for (int i = 0; i < 2; ++i) unpack(rows[i][third], z[third][i]);
    }
#pragma unroll
    for (int i = 0; i < W - 1; ++i) {
      if (begin - 1 - i < 0) continue;
      float c[3][V];
#pragma unroll
      for (int third = kPre; third <= kValue; ++third) {
        float now[V], past[2][V];
        unpack(rows[i][third], now);
        unpack(rows[i + 1][third], past[0]);
        unpack(rows[i + 2][third], past[1]);
        three_taps(filters.featurizer[third], now, past, c[third]);
      }
#pragma unroll
      for (int j = 0; j < V; ++j) u[i][j] = c[kPre][j] * c[kValue][j];
    }
  }
};

/// Calls f<V, kUnit, W>() for the plan: V is 1 or kMost.
template <int kMost, int kElementBytes, class F>
Status with_variant(const FirMarch& plan, const F& f) {
  const auto with_taps = [&]<int V, int kUnit>() -> Status {
    switch (plan.taps) {
      case 4:
        return f.template operator()<V, kUnit, 4>();
      case 7:
        return f.template operator()<V, kUnit, 7>();
      default:
        return f.template operator()<V, kUnit, 14>();
    }
  };
  if (plan.unit < 16) return with_taps.template operator()<1, kElementBytes>();
  if constexpr (kMost > 1) {
    if (plan.vector == kMost) return with_taps.template operator()<kMost, 16>();
  }
  return with_taps.template operator()<1, 16>();
}

/// Bytes of shared memory for blocks that need `bytes`: so much that each has a multiprocessor to
/// itself. Two side by side have more rows on their way than the memory takes well, and are slower
/// than one after the other; and where there is a place for every block, two could still meet on
/// the first multiprocessor that the kernel before leaves. Many short strips may share.
inline int fir_march_shared(const FirParams& p, const FirMarch& plan, int bytes) {
  constexpr int kFar = 128;
  const int64_t blocks = plan.columns * p.batch * plan.strips;
  if (blocks > kFirMultiprocessors && plan.steps < kFar) return bytes;
  return static_cast<int>(alone_on_multiprocessor(bytes));
}

/// Launches blocks of kFirMarchThreads threads with `shared` bytes.
template <class Params>
Status fir_march_launch(void (*kernel)(Params, FirMarch), dim3 grid, int shared,
                        cudaStream_t stream, const Params& p, const FirMarch& plan) {
  const Status allowed = allow_shared_memory(kernel, static_cast<size_t>(shared));
  if (!allowed.ok()) return allowed;
  launch_early(kernel, grid, kFirMarchThreads, static_cast<size_t>(shared), stream, p, plan);
  return launch_status(plan.name);
}

Status fir_march_fwd(const FirParams& p, const FirMarch& plan, DType dtype, cudaStream_t stream);
Status fir_march_bwd(const FirBwdParams& p, const FirMarch& plan, DType dtype, cudaStream_t stream);

}  // namespace sarissa::kernels
