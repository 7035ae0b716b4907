// The tensor core backward of hyena_modal: how it takes a problem, a pure function, and its launch.
#pragma once

#include "sarissa/kernels/modal/modal_plan.h"

namespace sarissa::kernels {
/// The tensor core backward of hyena_modal: a team of warps owns kModalTeamChannels channels and
/// marches in tiles of kModalBwdTile steps.
constexpr int kModalTeamChannels = 16;
constexpr int kModalBwdTile = 256;

struct ModalTensorBwd {
  int teams = 0;  // of a CTA, side by side; 0: it does not take the problem
  int tiles = 0;
  int chunks = 1, chunk_tiles = 0;  // of time
  /// Of the first pass over chunks: a piece of a chunk has kModalArrivingWarps runs of `spans`
  /// times `span_steps` steps.
  int pieces = 0, spans = 0, span_steps = 0;
  int entries = 1;  // of the batch that a team takes one after the other
  const char* name = nullptr;

  explicit operator bool() const { return teams > 0; }
  /// Of the problem; each has sums of its own.
  int64_t parts(const ModalInputs& in) const { return (in.batch + entries - 1) / entries * chunks; }
};

/// Multiprocessors that the plan counts on: those of an H100, not of the actual GPU, so that
/// gradients have the same bits everywhere.
constexpr int64_t kModalBwdMultiprocessors = 132;
/// Tiles that the tables and the sums of a CTA cost as much as.
constexpr int64_t kModalBwdOverhead = 2;

/// How many chunks to cut `tiles` into, with `ctas` for each: the fewest that take the least time,
/// counted in tiles of a multiprocessor. Chunks want two more kernels, of which the first goes over
/// all of them but one.
inline int modal_bwd_chunks(int64_t ctas, int64_t tiles) {
  constexpr int64_t kMost = 64;
  constexpr double kKernels = 1.0, kFirstPass = 0.15;
  int64_t best = 1;
  double least = std::numeric_limits<double>::max();
  for (int64_t chunks = 1; chunks <= std::min(kMost, tiles); ++chunks) {
    const int64_t length = (tiles + chunks - 1) / chunks;
    const int64_t turns = (ctas * chunks + kModalBwdMultiprocessors - 1) / kModalBwdMultiprocessors;
    auto time = static_cast<double>(turns * (length + kModalBwdOverhead));
    if (chunks > 1) {
      time += kKernels + kFirstPass / static_cast<double>(kModalBwdMultiprocessors) *
                             static_cast<double>(ctas * (chunks - 1) * length);
    }
    if (time < 0.98 * least) {
      least = time;
      best = chunks;
    }
  }
  return static_cast<int>(best);
}

/// The first pass: warps of a CTA, CTAs of a multiprocessor, steps that a warp takes at a time, and
/// steps at most that it takes with powers of poles rounded to float.
constexpr int kModalArrivingWarps = 8, kModalArrivingCtas = 3;
constexpr int kModalArrivingSteps = 8, kModalArrivingSpan = 128;

/// Cuts each chunk of `plan` into pieces for the first pass, `ctas` for each of all chunks
/// together: the fewest that take the least time, counted in steps of a warp. A warp's tables and
/// the sum over warps cost as much as some steps.
inline void modal_bwd_cut_chunks(int64_t ctas, ModalTensorBwd& plan) {
  constexpr int64_t kMost = 64, kOverhead = 24;
  constexpr int64_t kPlaces = kModalBwdMultiprocessors * kModalArrivingCtas;
  const int64_t chunk_steps = int64_t{plan.chunk_tiles} * kModalBwdTile;
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t pieces = 1; pieces <= kMost; ++pieces) {
    const int64_t run = up(chunk_steps, pieces * kModalArrivingWarps);
    const int64_t spans = up(run, kModalArrivingSpan);
    const int64_t span_steps = up(up(run, spans), kModalArrivingSteps) * kModalArrivingSteps;
    const int64_t time = up(ctas * pieces, kPlaces) * (spans * span_steps + kOverhead);
    if (time < least) {
      least = time;
      plan.pieces = static_cast<int>(pieces);
      plan.spans = static_cast<int>(spans);
      plan.span_steps = static_cast<int>(span_steps);
    }
  }
}

/// Whether the kernel can copy rows of z or dy, in units of 16 bytes.
inline bool modal_tensor_rows_fit(const void* rows, int64_t batch, int64_t batch_stride,
                                  int64_t time_stride) {
  constexpr int64_t kMost = int64_t{1} << 23;
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && (batch == 1 || batch_stride % 8 == 0) &&
         time_stride % 8 == 0 && time_stride >= 0 && time_stride <= kMost;
}

/// Native (modal.h), and needs what the forward saved; dy must fit as z does. `team_bytes`: shared
/// memory of a team; `shared_bytes`: what a CTA can have.
inline ModalTensorBwd modal_tensor_bwd_plan(const ModalInputs& in, DType dtype, int64_t team_bytes,
                                            int64_t shared_bytes) {
  constexpr int64_t kMostLength = int64_t{1} << 28, kMostWidth = int64_t{1} << 23;
  ModalTensorBwd plan;
  if (!in.gated() || dtype != DType::kBFloat16 || in.length < 1 || in.length > kMostLength ||
      in.modes > kModalTensorModes || in.width % kModalTensorChannels != 0 ||
      in.width > kMostWidth || in.batch < 1 || in.batch > 65535 ||
      !modal_tensor_rows_fit(in.u, in.batch, in.u_batch_stride, in.u_time_stride) ||
      team_bytes > shared_bytes) {
    return plan;
  }
  constexpr int kTeams = kModalTensorChannels / kModalTeamChannels;
  plan.teams = kTeams * team_bytes <= shared_bytes ? kTeams : 1;
  plan.tiles = static_cast<int>((in.length + kModalBwdTile - 1) / kModalBwdTile);
  const int64_t columns = in.width / kModalTensorChannels;
  const int chunks = modal_bwd_chunks(columns * in.batch, plan.tiles);
  plan.chunk_tiles = (plan.tiles + chunks - 1) / chunks;
  plan.chunks = (plan.tiles + plan.chunk_tiles - 1) / plan.chunk_tiles;
  if (plan.chunks > 1) {
    modal_bwd_cut_chunks(columns * in.batch * (plan.chunks - 1), plan);
  } else {
    plan.entries = static_cast<int>(
        modal_entries(in.batch, plan.tiles, columns, kModalBwdMultiprocessors, kModalBwdOverhead));
  }
  plan.name = plan.chunks > 1 ? "tensor_chunks" : "tensor";
  return plan;
}

/// Its workspace, in floats; modal_tensor_bwd.cu has the layouts.
struct ModalTensorBwdWorkspace {
  int64_t arriving, seams, poles, skip, featurizer;

  ModalTensorBwdWorkspace(const ModalInputs& in, const ModalTensorBwd& plan) {
    const int64_t parts = plan.parts(in);
    const int64_t seam_count = in.batch * (plan.chunks - 1);
    arriving = seam_count * plan.pieces * in.width * kModalTensorModes;
    seams = seam_count * 12 * in.width;
    poles = parts * in.width * in.modes;
    skip = parts * in.width;
    featurizer = parts * 9 * in.width;
  }
  int64_t total() const { return arriving + seams + 2 * poles + skip + featurizer; }
};

/// The plan on the current GPU.
ModalTensorBwd modal_tensor_bwd_plan(const ModalInputs& in, DType dtype);
/// `stream` is a cudaStream_t.
Status modal_tensor_bwd(const ModalBwdParams& p, const ModalTensorBwd& plan, void* stream);

}  // namespace sarissa::kernels
