// The states are not stored. A first sweep over time keeps the states before every span of kSpan
// steps; the backward walks the spans from the last to the first and, in each, recomputes the
// states before every kSteps steps, and inside those keeps the states in registers.
#include "sarissa/kernels/modal/modal.cuh"
#include "sarissa/kernels/modal/modal_tensor_bwd.h"

namespace sarissa::kernels {
namespace {

constexpr int kModesTogether = 4;
constexpr int64_t kSpan = 64;
constexpr int kSteps = 8;  // in registers

/// A span of `length` steps falls into pieces of kSteps steps and then of single steps.
struct Pieces {
  static constexpr int64_t kMost = kSpan / kSteps + kSteps - 2;

  int64_t full, count;
  __device__ explicit Pieces(int64_t length)
      : full(length / kSteps), count(length / kSteps + length % kSteps) {}
  __device__ int64_t start(int64_t i) const {
    return i < full ? i * kSteps : full * kSteps + i - full;
  }
};

/// to = the states after kCount steps from t, `from` those before. Modes are at distance D.
template <int kCount, class T>
__device__ void advance(const ModalChannel<T>& channel, int64_t t, const device_compute_t<T>* from,
                        device_compute_t<T>* to) {
  device_compute_t<T> u[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) u[i] = channel.u(t + i);
  for_modes<kModesTogether>(channel.modes, [&]<int M>(int64_t n) {
    Modes<M, T> modes(channel, n, from);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
        modes.s[m] = recur(modes.high[m], modes.low[m], modes.s[m], u[i]);
      }
    }
    modes.store(channel, n, to);
  });
}

/// What a thread carries from the end of the sequence to its start.
template <class C>
struct BwdCarry {
  C* adjoint;   // [N] (distance D): lambda p of the step to the right
  C* dlambda;   // [N] (distance D)
  C* dresidue;  // [N] (distance D)
  C dskip = 0;
  C dc[3][2] = {};  // gradients of the featurizer's output at the two steps to the right
  C dtaps[3][3] = {};
};

/// The backward of kCount steps from t. `states` are those before them.
template <int kCount, class T>
__device__ void bwd_steps(const ModalBwdParams& p, const ModalChannel<T>& channel, int64_t t,
                          const device_compute_t<T>* states, BwdCarry<device_compute_t<T>>& carry) {
  using C = device_compute_t<T>;
  const T* dy = static_cast<const T*>(p.dy) + channel.b * p.dy_batch_stride + t * p.dy_time_stride +
                channel.channel;
  C u[kCount], q[kCount], dq[kCount], du[kCount];
  C dskip = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const C gate = channel.gated ? channel.c(kPost, t + i) : C{1};
    u[i] = channel.u(t + i);
    dq[i] = gate * load(dy + i * p.dy_time_stride);
    q[i] = channel.skip * u[i];
    du[i] = channel.skip * dq[i];
    dskip = fused(dq[i], u[i], dskip);
  }
  carry.dskip += dskip;

  for_modes<kModesTogether>(channel.modes, [&]<int M>(int64_t n) {
    Modes<M, T> modes(channel, n, states);
    C before[kCount][M], dresidue[M] = {}, dlambda[M] = {}, g[M];
#pragma unroll
    for (int m = 0; m < M; ++m) g[m] = carry.adjoint[(n + m) * channel.width];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
        before[i][m] = modes.s[m];
        modes.s[m] = recur(modes.high[m], modes.low[m], modes.s[m], u[i]);
        q[i] = fused(modes.residue[m], modes.s[m], q[i]);
        dresidue[m] = fused(dq[i], modes.s[m], dresidue[m]);
      }
    }
#pragma unroll
    for (int i = kCount - 1; i >= 0; --i) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const C adjoint = fused(modes.residue[m], dq[i], g[m]);  // p_t
        du[i] += adjoint;
        dlambda[m] = fused(adjoint, before[i][m], dlambda[m]);
        g[m] = recur(modes.high[m], modes.low[m], adjoint, C{0});
      }
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
      carry.adjoint[(n + m) * channel.width] = g[m];
      carry.dresidue[(n + m) * channel.width] += dresidue[m];
      carry.dlambda[(n + m) * channel.width] += dlambda[m];
    }
  });

  if (!channel.gated) {
    T* out =
        static_cast<T*>(p.du) + (channel.b * p.in.length + t) * channel.width + channel.channel;
#pragma unroll
    for (int i = 0; i < kCount; ++i) store(out + i * channel.width, du[i]);
    return;
  }
  const int64_t width = 3 * channel.width;
  C dtaps[3][3] = {};
#pragma unroll
  for (int i = kCount - 1; i >= 0; --i) {
    const int64_t row = t + i;
    const C dc[3] = {load(dy + i * p.dy_time_stride) * q[i], du[i] * channel.c(kValue, row),
                     du[i] * channel.c(kPre, row)};
#pragma unroll
    for (int third = 0; third < 3; ++third) {
      const C* taps = channel.taps(third);
      C dz = taps[0] * dc[third] + taps[width] * carry.dc[third][0] +
             taps[2 * width] * carry.dc[third][1];
      const int64_t column = third * channel.width + channel.channel;
      const int64_t state_row = row - (p.in.length - 2);
      if (state_row >= 0 && p.dfeaturizer_state_out != nullptr) {
        dz += load(static_cast<const T*>(p.dfeaturizer_state_out) +
                   (channel.b * 2 + state_row) * width + column);
      }
      store(static_cast<T*>(p.du) + (channel.b * p.in.length + row) * width + column, dz);
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        dtaps[third][k] = fused(dc[third], channel.columns[third].at(row - k), dtaps[third][k]);
      }
      carry.dc[third][1] = carry.dc[third][0];
      carry.dc[third][0] = dc[third];
    }
  }
#pragma unroll
  for (int third = 0; third < 3; ++third) {
#pragma unroll
    for (int k = 0; k < 3; ++k) carry.dtaps[third][k] += dtaps[third][k];
  }
}

template <class T>
__global__ void __launch_bounds__(kModalThreads, 1)
    modal_bwd_kernel(ModalBwdParams p, ModalTables<device_compute_t<T>> tables,
                     device_compute_t<T>* workspace) {
  using C = device_compute_t<T>;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  const int64_t states_size = p.in.batch * p.in.modes * p.in.width;
  for (int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
       index < p.in.batch * p.in.width; index += step) {
    const ModalChannel<T> channel(p.in, tables, index);
    const int64_t width = channel.width, length = p.in.length;
    const int64_t spans = ceil_div(length, kSpan);
    // [1 + Pieces::kMost + max(1, spans)] buffers of states [B, N, D]
    C* adjoint = workspace + channel.at_BND();
    C* pieces = adjoint + states_size;
    C* checkpoints = pieces + Pieces::kMost * states_size;

    const C* state_in = static_cast<const C*>(p.in.state);
    const C* dstate_out = static_cast<const C*>(p.dstate_out);
    BwdCarry<C> carry;
    carry.adjoint = adjoint;
    carry.dlambda = static_cast<C*>(p.dlog_poles_BND) + channel.at_BND();
    carry.dresidue = static_cast<C*>(p.dresidues_BND) + channel.at_BND();
    for (int64_t n = 0; n < channel.modes; ++n) {
      checkpoints[n * width] = state_in ? state_in[channel.at_BDN() + n] : C{0};
      adjoint[n * width] = dstate_out ? dstate_out[channel.at_BDN() + n] : C{0};
      carry.dlambda[n * width] = 0;
      carry.dresidue[n * width] = 0;
    }
    for (int64_t k = 0; k + 1 < spans; ++k) {
      const C* from = checkpoints + k * states_size;
      C* to = checkpoints + (k + 1) * states_size;
      for (int64_t t = k * kSpan; t < (k + 1) * kSpan; t += kSteps) {
        advance<kSteps>(channel, t, from, to);
        from = to;
      }
    }
    for (int64_t k = spans - 1; k >= 0; --k) {
      const int64_t start = k * kSpan;
      const Pieces span(length - start < kSpan ? length - start : kSpan);
      // States before piece 0 are the checkpoint, before piece i > 0 at pieces + (i - 1).
      const auto states = [&](int64_t i) {
        return i == 0 ? checkpoints + k * states_size : pieces + (i - 1) * states_size;
      };
      for (int64_t i = 0; i + 1 < span.count; ++i) {
        const int64_t t = start + span.start(i);
        if (i < span.full) {
          advance<kSteps>(channel, t, states(i), states(i + 1));
        } else {
          advance<1>(channel, t, states(i), states(i + 1));
        }
      }
      for (int64_t i = span.count - 1; i >= 0; --i) {
        const int64_t t = start + span.start(i);
        if (i < span.full) {
          bwd_steps<kSteps>(p, channel, t, states(i), carry);
        } else {
          bwd_steps<1>(p, channel, t, states(i), carry);
        }
      }
    }

    C* dstate = static_cast<C*>(p.dstate) + channel.at_BDN();
    for (int64_t n = 0; n < channel.modes; ++n) {
      dstate[n] = adjoint[n * width];
      carry.dlambda[n * width] *= tables.high[n * channel.groups + channel.group];  // dlog_pole
    }
    static_cast<C*>(p.dskip_BD)[index] = carry.dskip;
    if (!channel.gated) continue;
    for (int third = 0; third < 3; ++third) {
      const int64_t column = third * width + channel.channel;
      for (int k = 0; k < 3; ++k) {
        static_cast<C*>(p.dfeaturizer_BKC)[(channel.b * 3 + k) * 3 * width + column] =
            carry.dtaps[third][k];
      }
      const C* taps = channel.taps(third);
      for (int64_t r = 0; r < 2; ++r) {  // steps -2 and -1
        C dz = r == 0 ? taps[6 * width] * carry.dc[third][0]
                      : taps[3 * width] * carry.dc[third][0] + taps[6 * width] * carry.dc[third][1];
        const int64_t state_row =
            r - length;  // step r - 2 as a row of the state after the last step
        if (state_row >= 0 && p.dfeaturizer_state_out != nullptr) {
          dz += load(static_cast<const T*>(p.dfeaturizer_state_out) +
                     (channel.b * 2 + state_row) * 3 * width + column);
        }
        store(static_cast<T*>(p.dfeaturizer_state) + (channel.b * 2 + r) * 3 * width + column, dz);
      }
    }
  }
}

/// Sum over the batch and over the D/G neighbouring channels of each group: [B, K, D] -> [G, K].
template <class C>
__global__ void modal_sum_kernel(const C* partials, int64_t batch, int64_t k_count, int64_t width,
                                 int64_t groups, C* sums) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  const int64_t per_group = width / groups;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < groups * k_count;
       i += step) {
    const int64_t g = i % groups, k = i / groups;
    C sum = 0;
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
        sum += partials[(b * k_count + k) * width + c];
      }
    }
    sums[g * k_count + k] = sum;
  }
}

template <class T>
Status launch(const ModalBwdParams& p, cudaStream_t stream) {
  using C = device_compute_t<T>;
  const ModalInputs& in = p.in;
  C* workspace = static_cast<C*>(p.workspace);
  const ModalTables<C> tables = make_modal_tables(in, workspace, stream);
  modal_bwd_kernel<T><<<modal_grid(in), kModalThreads, 0, stream>>>(p, tables, workspace);
  const auto sum = [&](void* partials, int64_t k_count, int64_t width, int64_t groups, void* sums) {
    if (groups * k_count == 0) return;
    modal_sum_kernel<C><<<grid_of(groups * k_count), 256, 0, stream>>>(
        static_cast<const C*>(partials), in.batch, k_count, width, groups, static_cast<C*>(sums));
  };
  sum(p.dlog_poles_BND, in.modes, in.width, in.groups, p.dlog_poles);
  sum(p.dresidues_BND, in.modes, in.width, in.groups, p.dresidues);
  sum(p.dskip_BD, 1, in.width, in.width, p.dskip);
  if (in.gated()) sum(p.dfeaturizer_BKC, 1, 9 * in.width, 9 * in.width, p.dfeaturizer);
  return launch_status("stages");
}

template <class C>
int64_t workspace_bytes(const ModalInputs& in) {
  const int64_t buffers = 1 + Pieces::kMost + std::max<int64_t>(1, ceil_div(in.length, kSpan));
  return modal_tables_bytes<C>(in) +
         buffers * in.batch * in.modes * in.width * static_cast<int64_t>(sizeof(C));
}

}  // namespace

bool modal_bwd_is_native_cuda(const ModalInputs& in, DType dtype) {
  return static_cast<bool>(modal_tensor_bwd_plan(in, dtype));
}

int64_t modal_bwd_workspace_cuda(const ModalBwdParams& params, DType dtype) {
  const ModalInputs& in = params.in;
  if (params.saved != nullptr) {
    if (const ModalTensorBwd plan = modal_tensor_bwd_plan(in, dtype)) {
      return ModalTensorBwdWorkspace(in, plan).total() * static_cast<int64_t>(sizeof(float));
    }
  }
  return dtype == DType::kFloat64 ? workspace_bytes<double>(in) : workspace_bytes<float>(in);
}

Status modal_bwd_cuda(const ModalBwdParams& params, DType dtype, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (params.saved != nullptr) {
    if (const ModalTensorBwd plan = modal_tensor_bwd_plan(params.in, dtype)) {
      return modal_tensor_bwd(params, plan, stream);
    }
  }
  return with_dtype(dtype, [&]<class T>() { return launch<T>(params, s); });
}

}  // namespace sarissa::kernels
