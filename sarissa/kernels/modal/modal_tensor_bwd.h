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
  int entries = 1;                  // of the batch that a team takes one after the other
  const char* name = nullptr;

  explicit operator bool() const { return teams > 0; }
  /// Of the problem; each has sums of its own.
  int64_t parts(const ModalInputs& in) const { return (in.batch + entries - 1) / entries * chunks; }
};

/// Multiprocessors that the plan counts on: those of an H100, not of the actual GPU, so that
/// gradients have the same bits everywhere.
constexpr int64_t kModalBwdMultiprocessors = 132;

/// How many chunks to cut `tiles` into, with `ctas` for each: the fewest that take the least time,
/// counted in tiles of a multiprocessor. A chunk starts a tile early; tiles of the first pass,
/// which all but one chunk take, are cheaper.
inline int modal_bwd_chunks(int64_t ctas, int64_t tiles) {
  constexpr int64_t kMost = 64;
  constexpr double kFirstPass = 0.35;
  const auto turns = [&](int64_t n) {
    return (n + kModalBwdMultiprocessors - 1) / kModalBwdMultiprocessors;
  };
  int64_t best = 1;
  auto least = static_cast<double>(turns(ctas) * tiles);
  for (int64_t chunks = 2; chunks <= std::min(kMost, tiles / 2); ++chunks) {
    const int64_t length = (tiles + chunks - 1) / chunks;
    const double time = static_cast<double>(turns(ctas * chunks) * (length + 1)) +
                        kFirstPass * static_cast<double>(turns(ctas * (chunks - 1)) * length);
    if (time < 0.98 * least) {
      least = time;
      best = chunks;
    }
  }
  return static_cast<int>(best);
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
  if (plan.chunks == 1) {
    constexpr int64_t kOverhead = 2;
    plan.entries = static_cast<int>(
        modal_entries(in.batch, plan.tiles, columns, kModalBwdMultiprocessors, kOverhead));
  }
  plan.name = plan.chunks > 1 ? "tensor_chunks" : "tensor";
  return plan;
}

/// Its workspace, in floats; modal_tensor_bwd.cu has the layouts.
struct ModalTensorBwdWorkspace {
  int64_t arriving, poles, skip, featurizer;

  ModalTensorBwdWorkspace(const ModalInputs& in, const ModalTensorBwd& plan) {
    const int64_t parts = plan.parts(in);
    arriving = in.batch * (plan.chunks - 1) * in.width * kModalTensorModes;
    poles = parts * in.width * in.modes;
    skip = parts * in.width;
    featurizer = parts * 9 * in.width;
  }
  int64_t total() const { return arriving + 2 * poles + skip + featurizer; }
};

/// The plan on the current GPU.
ModalTensorBwd modal_tensor_bwd_plan(const ModalInputs& in, DType dtype);
/// `stream` is a cudaStream_t.
Status modal_tensor_bwd(const ModalBwdParams& p, const ModalTensorBwd& plan, void* stream);

}  // namespace sarissa::kernels
