// The first pass of the tensor core backward of hyena_modal where time is cut in chunks: the
// adjoint that each chunk but the leftmost sends to its left, from zero,
//
//   lambda residue (sum over t of lambda^(t - t0) dq[t]),      t0 the first step of the chunk.
//
// It reads a third of z and dy, and takes the sum step by step: with one lane for a channel, and
// its 16 modes in registers, that is 16 fused multiply-adds a step, which keep up with memory.
// Tensor cores would want each channel's steps transposed.
//
// A CTA takes 32 channels of a piece of a chunk. Its warps share the piece's steps in runs, each
// run falls into spans. In a span powers of lambda are those of lambda rounded to float; from span
// to span lambda^steps is good to 2^-49, so that poles close to 1 keep their time constants.
#pragma once

#include "sarissa/kernels/common/vector.cuh"
#include "sarissa/kernels/modal/modal_tensor.cuh"
#include "sarissa/kernels/modal/modal_tensor_bwd.h"

namespace sarissa::kernels {
namespace modal_bwd {

constexpr int kArrivingChannels = 32, kArrivingThreads = 32 * kModalArrivingWarps;
static_assert(kArrivingChannels == kModalTensorChannels);

/// Where the pieces' sums lie: [B, chunks - 1, pieces, D, kModalTensorModes].
__host__ __device__ inline int64_t arriving_at(const ModalInputs& in, const ModalTensorBwd& plan,
                                               int64_t batch, int chunk, int piece) {
  return ((batch * (plan.chunks - 1) + chunk - 1) * plan.pieces + piece) * in.width *
         kModalTensorModes;
}

struct ArrivingShared {
  static constexpr int kStages = 4, kSteps = kModalArrivingSteps, kModes = kModalTensorModes;
  /// Between modes: channels of one mode, and modes of one channel, are in different banks.
  static constexpr int kMode = kArrivingChannels + 1;
  struct Stage {
    __nv_bfloat16 z[kSteps][kArrivingChannels];  // two steps earlier than dy's
    __nv_bfloat16 dy[kSteps][kArrivingChannels];
  };

  union {
    Stage stages[kModalArrivingWarps][kStages];
    float sums[kModalArrivingWarps][kModes][kMode];
  };
  float lambda[kModes][kMode];
  float decay_high[kModes][kMode], decay_low[kModes][kMode];  // of a span
};

static __global__ void __launch_bounds__(kArrivingThreads, kModalArrivingCtas)
    modal_tensor_arriving_kernel(ModalBwdParams p, ModalTensorBwd plan, float* arriving) {
  using Shared = ArrivingShared;
  using Bf16 = __nv_bfloat16;
  constexpr int kSteps = Shared::kSteps, kStages = Shared::kStages, kModes = Shared::kModes;
  // Tables and sums over warps: lanes that each have two modes of one channel.
  constexpr int kTableLanes = kArrivingThreads / kArrivingChannels;
  static_assert(kModes == 2 * kTableLanes);
  constexpr int kStage = sizeof(Shared::Stage);
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared*>(shared_bytes);

  const ModalInputs& in = p.in;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int channel0 = blockIdx.x * kArrivingChannels, batch = blockIdx.y;
  const int chunk = 1 + blockIdx.z / plan.pieces, piece = blockIdx.z % plan.pieces;
  const int chunk_steps = plan.chunk_tiles * kModalBwdTile, run = plan.spans * plan.span_steps;
  const int length = static_cast<int>(in.length);
  const int offset = piece * kModalArrivingWarps * run;  // of the piece in the chunk
  const int chunk_first = chunk * chunk_steps, first = chunk_first + offset + warp * run;
  const int end = min(length - chunk_first, chunk_steps) + chunk_first;

  // What the run has inside the chunk, from its last step on.
  int steps_left = max(0, min(run, ceil_div(end - first, kSteps) * kSteps));

  // First what the tables want, which would wait behind the copies of all CTAs. L2 is asked for it
  // while the kernel before ends.
  const int table_channel = threadIdx.x / kTableLanes, table_mode = threadIdx.x % kTableLanes;
  if (table_mode < in.modes) {
    const int64_t at = ModalMode::at(in, channel0 + table_channel, table_mode);
    prefetch(static_cast<const float*>(in.log_poles) + at);
    prefetch(static_cast<const float*>(in.residues) + at);
  }
  prefetch(static_cast<const char*>(in.featurizer) +
           (in.featurizer_is_T ? 2 : 4) * 3 * (channel0 + lane));
  wait_for_earlier_kernels();
  const auto mode_of = [&](int i) {
    return ModalMode(in, channel0 + table_channel, table_mode + i * kTableLanes);
  };
  const ModalMode modes[2] = {mode_of(0), mode_of(1)};
  const auto tap = [&](int k) {
    return ParameterVector<Bf16, 1>(in.featurizer, in.featurizer_is_T, (channel0 + lane) * 3 + k);
  };
  const ParameterVector<Bf16, 1> taps_read[3] = {tap(0), tap(1), tap(2)};
  // z of the two steps right of the first that the loop reads.
  const auto z_at = [&](int t) {
    return load_vector<Bf16, 1>(static_cast<const Bf16*>(in.u) + batch * in.u_batch_stride +
                                    t * in.u_time_stride + channel0 + lane,
                                t < length);
  };
  const Vector<Bf16, 1> z_right[2] = {z_at(first + steps_left - 1), z_at(first + steps_left - 2)};

  // Copies of a lane: 16 bytes of a row of each stream.
  const int copy_row = lane / 4, copy_part = lane % 4 * 8;
  const Bf16* z = static_cast<const Bf16*>(in.u) + batch * in.u_batch_stride +
                  (int64_t{first} + steps_left + copy_row - 2) * in.u_time_stride + channel0 +
                  copy_part;
  const Bf16* dy = static_cast<const Bf16*>(p.dy) + batch * p.dy_batch_stride +
                   (int64_t{first} + steps_left + copy_row) * p.dy_time_stride + channel0 +
                   copy_part;
  int rows_left = end - (first + steps_left + copy_row);
  int steps_to_load = steps_left;
  unsigned char* const ring = reinterpret_cast<unsigned char*>(shared.stages[warp]);
  const auto load = [&](int stage) {
    if (steps_to_load > 0) {
      steps_to_load -= kSteps;
      z -= kSteps * in.u_time_stride;
      dy -= kSteps * p.dy_time_stride;
      rows_left += kSteps;
      unsigned char* const to = ring + stage + 2 * (copy_row * kArrivingChannels + copy_part);
      copy_async_line(to, z, rows_left + 2 > 0);
      copy_async_line(to + sizeof(Shared::Stage::z), dy, rows_left > 0);
    }
    copies_commit();
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) load(stage * kStage);

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int n = table_mode + i * kTableLanes;
    const FloatPair decay(plan.spans > 1 ? modes[i].exact_power(plan.span_steps) : 0.0);
    shared.lambda[n][table_channel] = modal_power(modes[i].log_pole, 1);
    shared.decay_high[n][table_channel] = decay.high;
    shared.decay_low[n][table_channel] = decay.low;
  }
  const float taps[3] = {taps_read[0][0], taps_read[1][0], taps_read[2][0]};
  float z0 = z_right[0][0], z1 = z_right[1][0];
  __syncthreads();

  float sums[kModes] = {};
  if (steps_left > 0) {
    float lambda[kModes];
#pragma unroll
    for (int n = 0; n < kModes; ++n) lambda[n] = shared.lambda[n][lane];
    int stage = 0, free = (kStages - 1) * kStage;
    while (steps_left > 0) {
      // Spans are counted from the run's first step.
      const int next = (steps_left - 1) / plan.span_steps * plan.span_steps;
      float now[kModes] = {};
      for (; steps_left > next; steps_left -= kSteps) {
        copies_wait<kStages - 2>();
        __syncwarp();
        load(free);
        const auto& from = *reinterpret_cast<const Shared::Stage*>(ring + stage);
#pragma unroll
        for (int i = kSteps - 2; i >= 0; i -= 2) {
          float dq[2];
#pragma unroll
          for (int k = 1; k >= 0; --k) {
            const float z2 = kernels::load(&from.z[i + k][lane]);
            const float c = three_taps(taps[0], taps[1], taps[2], z0, z1, z2);
            dq[k] = kernels::load(&from.dy[i + k][lane]) * c;
            z0 = z1;
            z1 = z2;
          }
          const uint32_t pair = pack_pair(dq[0], dq[1]);  // rounded as in the march
#pragma unroll
          for (int n = 0; n < kModes; ++n) now[n] = fmaf(lambda[n], now[n], high_of(pair));
#pragma unroll
          for (int n = 0; n < kModes; ++n) now[n] = fmaf(lambda[n], now[n], low_of(pair));
        }
        free = stage;
        stage = (stage + kStage) % (kStages * kStage);
      }
#pragma unroll
      for (int n = 0; n < kModes; ++n) {
        sums[n] = fmaf(shared.decay_high[n][lane], sums[n],
                       fmaf(shared.decay_low[n][lane], sums[n], now[n]));
      }
    }
  }

  // The sum over warps, by the threads of the tables.
  copies_wait<0>();
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kModes; ++n) shared.sums[warp][n][lane] = sums[n];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int n = table_mode + i * kTableLanes;
    const ModalMode mode = mode_of(i);
    const float decay = modal_power(mode.log_pole, run);
    float sum = 0.0f;
#pragma unroll
    for (int w = kModalArrivingWarps - 1; w >= 0; --w) {
      sum = fmaf(decay, sum, shared.sums[w][n][table_channel]);
    }
    sum *= mode.residue * modal_power(mode.log_pole, offset + 1);
    const int64_t channel = channel0 + table_channel;
    if (p.dstate_out != nullptr && mode.there && chunk == plan.chunks - 1 && piece == 0) {
      sum =
          fmaf(modal_power(mode.log_pole, length - chunk_first),
               static_cast<const float*>(p.dstate_out)[(batch * in.width + channel) * in.modes + n],
               sum);
    }
    arriving[arriving_at(in, plan, batch, chunk, piece) + channel * kModes + n] = sum;
  }
}

}  // namespace modal_bwd
}  // namespace sarissa::kernels
