// One step of hyena_modal (L = 1), as decoding takes it. Four threads share a channel. Each owns
// every fourth quad of its modes; the first three run the featurizer of one third of z each. They
// make the step of two batch entries, which share the poles' exponentials, computed in double. The
// states get the same bits as from the recurrence of modal_fwd.cu.
#include "sarissa/kernels/modal/modal_step.cuh"

#include "sarissa/kernels/common/vector.cuh"
#include "sarissa/kernels/modal/modal.cuh"
#include "sarissa/kernels/modal/modal_plan.h"

namespace sarissa::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kLanes = kModalStepLanes, kWide = kModalStepModes;
constexpr int kChannels = kThreads / kLanes;  // of a block

using Quad = Vector<float, kWide>;

/// kEntries batch entries, or what is left of them, of kChannels channels; kQuads quads of modes
/// for each thread, those beyond the last mode empty.
template <class T, int kQuads, int kEntries>
__global__ void __launch_bounds__(kThreads)
    modal_step_kernel(const __grid_constant__ ModalFwdParams p) {
  const ModalInputs& in = p.in;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kLanes, third = min(lane, static_cast<int>(kValue));
  // Threads beyond the last channel take it once more and write nothing.
  const int wanted = static_cast<int>(blockIdx.x) * kChannels + thread / kLanes;
  const bool mine = wanted < in.width;
  const int channel = mine ? wanted : static_cast<int>(in.width) - 1;
  const int group = channel / static_cast<int>(in.width / in.groups);
  const int64_t first = int64_t{blockIdx.y} * kEntries;  // batch entry

  const int64_t N = 3 * in.width, z_channel = third * in.width + channel;
  const T* z = static_cast<const T*>(in.u) + first * in.u_batch_stride + z_channel;
  const T* z_state = static_cast<const T*>(in.featurizer_state) + first * 2 * N + z_channel;
  const int64_t per_entry = in.width * in.modes;  // states
  const int64_t first_state = first * per_entry + channel * in.modes + lane * kWide;
  const float* state = static_cast<const float*>(in.state) + first_state;
  const float* log_pole = static_cast<const float*>(in.log_poles) + group * in.modes + lane * kWide;
  const float* residue = static_cast<const float*>(in.residues) + group * in.modes + lane * kWide;
  constexpr int kNext = kLanes * kWide;  // modes to a thread's next quad
  const auto has = [&](int quad) { return quad * kNext + lane * kWide < in.modes; };

  // Blocks that start later find the wait over: for them it would only be work.
  constexpr unsigned kFirstBlocks = 1024;
  if (blockIdx.y * gridDim.x + blockIdx.x < kFirstBlocks) {
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      prefetch(log_pole + quad * kNext, has(quad));
      prefetch(residue + quad * kNext, has(quad));
#pragma unroll
      for (int i = 0; i < kEntries; ++i) {
        prefetch(state + i * per_entry + quad * kNext,
                 first + i < in.batch && in.state != nullptr && has(quad));
      }
    }
    // Worth its instructions only where a step is short.
    if constexpr (kEntries == 1) {
      prefetch(z);
      prefetch(z_state, in.featurizer_state != nullptr);
      prefetch(z_state + N, in.featurizer_state != nullptr);
      const int64_t bytes = in.featurizer_is_T ? sizeof(T) : sizeof(float);
      prefetch(static_cast<const char*>(in.featurizer) + z_channel * 3 * bytes);
      const int64_t skip_bytes = in.skip_is_T ? sizeof(T) : sizeof(float);
      prefetch(static_cast<const char*>(in.skip) + channel * skip_bytes, in.skip != nullptr);
    }
  }
  wait_for_earlier_kernels();
  // All loads come before the first use of one: they take one memory latency together.
  Quad log_poles[kQuads], residues[kQuads];
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
    log_poles[quad] = load_vector<float, kWide>(log_pole + quad * kNext, has(quad));
    residues[quad] = load_vector<float, kWide>(residue + quad * kNext, has(quad));
  }
  const auto tap = [&](int k) {
    return ParameterVector<T, 1>(in.featurizer, in.featurizer_is_T, z_channel * 3 + k);
  };
  const ParameterVector<T, 1> taps[3] = {tap(0), tap(1), tap(2)};
  const ParameterVector<T, 1> skip(in.skip, in.skip_is_T, channel, in.skip != nullptr);
  Quad s[kEntries][kQuads];
  Vector<T, 1> rows[kEntries][3];  // of z, i steps ago
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    const bool good = first + i < in.batch;
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      s[i][quad] = load_vector<float, kWide>(state + i * per_entry + quad * kNext,
                                             good && in.state != nullptr && has(quad));
    }
    rows[i][0] = load_vector<T, 1>(z + i * in.u_batch_stride, good);
#pragma unroll
    for (int ago = 1; ago < 3; ++ago) {
      rows[i][ago] = load_vector<T, 1>(z_state + (i * 2 + 2 - ago) * N,
                                       good && in.featurizer_state != nullptr);
    }
  }

  float u[kEntries], post[kEntries], q[kEntries];
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    const float c =
        three_taps(taps[0][0], taps[1][0], taps[2][0], rows[i][0][0], rows[i][1][0], rows[i][2][0]);
    u[i] = __shfl_sync(~0u, c, kPre, kLanes) * __shfl_sync(~0u, c, kValue, kLanes);
    post[i] = c;  // of lane kPost
    q[i] = 0.0f;
  }
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      const double lambda = exp(static_cast<double>(log_poles[quad][j]));
      const auto high = static_cast<float>(lambda);
      const auto low = static_cast<float>(lambda - static_cast<double>(high));
#pragma unroll
      for (int i = 0; i < kEntries; ++i) {
        float& x = s[i][quad].at[j];
        x = recur(high, low, x, u[i]);
        q[i] = fmaf(residues[quad][j], x, q[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
#pragma unroll
    for (int offset = 1; offset < kLanes; offset *= 2) {
      q[i] += __shfl_xor_sync(~0u, q[i], offset);
    }
  }

  if (!mine) return;
  float* state_out = static_cast<float*>(p.state_out) + first_state;
  T* z_state_out = static_cast<T*>(p.featurizer_state_out) + first * 2 * N + z_channel;
  T* y = static_cast<T*>(p.y) + first * in.width + channel;
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    if (first + i >= in.batch) break;
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      if (has(quad)) {
        *reinterpret_cast<Quad*>(state_out + i * per_entry + quad * kNext) = s[i][quad];
      }
    }
    if (lane < 3) {
      z_state_out[i * 2 * N] = rows[i][1].at[0];
      z_state_out[(i * 2 + 1) * N] = rows[i][0].at[0];
    }
    if (lane == kPost) store(y + i * in.width, post[i] * fmaf(skip[0], u[i], q[i]));
  }
}

template <class T, int kQuads, int kEntries>
Status launch(const ModalFwdParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(p.in.width, kChannels)),
                  static_cast<unsigned>(ceil_div<int64_t>(p.in.batch, kEntries)));
  launch_early(modal_step_kernel<T, kQuads, kEntries>, grid, kThreads, 0, stream, p);
  return launch_status("step");
}

template <class T>
Status run(const ModalFwdParams& p, cudaStream_t stream) {
  constexpr int kMost = kModalStepMostModes / (kLanes * kWide);
  const bool few = p.in.modes <= kLanes * kWide;
  if (p.in.batch == 1) return few ? launch<T, 1, 1>(p, stream) : launch<T, kMost, 1>(p, stream);
  return few ? launch<T, 1, 2>(p, stream) : launch<T, kMost, 2>(p, stream);
}

}  // namespace

Status modal_step(const ModalFwdParams& p, DType dtype, cudaStream_t stream) {
  return dtype == DType::kFloat32 ? run<float>(p, stream) : run<__nv_bfloat16>(p, stream);
}

}  // namespace sarissa::kernels
