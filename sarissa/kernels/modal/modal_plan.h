// Which kernel takes a problem of the modal family on a GPU. Pure functions of the problem.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "sarissa/kernels/modal/modal.h"

namespace sarissa::kernels {

/// The step kernel: threads of a channel, neighbouring modes that one takes at a time, modes at
/// most.
constexpr int kModalStepLanes = 4, kModalStepModes = 4;
constexpr int kModalStepMostModes = 64;

/// The step kernel takes one step (L = 1) of hyena_modal with up to 64 modes that come in fours,
/// aligned to 16 bytes.
inline bool modal_step_takes(const ModalInputs& in, DType dtype) {
  constexpr int64_t kMost = int64_t{1} << 26;
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return in.gated() && dtype != DType::kFloat64 && in.length == 1 && in.modes > 0 &&
         in.modes % kModalStepModes == 0 && in.modes <= kModalStepMostModes && in.width <= kMost &&
         in.batch <= 65535 && aligned(in.log_poles) && aligned(in.residues) && aligned(in.state);
}

/// The tensor core kernels of hyena_modal: bfloat16, channels in columns of kModalTensorChannels,
/// each with kModalTensorModes modes. Those that the problem lacks do nothing.
constexpr int kModalTensorChannels = 32;
constexpr int kModalTensorModes = 16;

/// What the forward saves for the backward: float [B, entries, D, kModalTensorModes], entry k the
/// states (before residues) just before step k kModalSavedSteps. The number of entries depends on
/// sizes alone, so that a traced call sees that of the real one; 0: nothing is saved.
constexpr int kModalSavedSteps = 128;
inline int64_t modal_saved_entries(int64_t length, int64_t width, int64_t modes, DType dtype) {
  const bool wanted = dtype == DType::kBFloat16 && length > 1 && modes <= kModalTensorModes &&
                      width % kModalTensorChannels == 0;
  return wanted ? (length + kModalSavedSteps - 1) / kModalSavedSteps : 0;
}

/// How many of `batch` entries a CTA of the tensor core kernels marches through one after the
/// other, of `tiles` tiles each, with `columns` CTAs side by side: as the time is least, counted in
/// tiles of a multiprocessor. A CTA begins with `overhead` of them, for its tables and to fill its
/// pipeline.
inline int64_t modal_entries(int64_t batch, int64_t tiles, int64_t columns, int64_t multiprocessors,
                             int64_t overhead) {
  constexpr int64_t kMost = 64;
  int64_t best = 1, least = std::numeric_limits<int64_t>::max();
  for (int64_t entries = 1; entries <= std::min(batch, kMost); ++entries) {
    const int64_t ctas = columns * ((batch + entries - 1) / entries);
    const int64_t turns = (ctas + multiprocessors - 1) / multiprocessors;
    const int64_t time = turns * (entries * tiles + overhead);
    if (time < least) {
      best = entries;
      least = time;
    }
    if (turns == 1) break;
  }
  return best;
}

/// How the tensor core forward takes a problem: `columns` of channels side by side, and for each of
/// them a CTA for every `entries` batch entries, or for one entry `ranks` CTAs, a cluster, that
/// take its tiles of time in turn.
struct ModalTensorFwd {
  int columns = 0;      // 0: it does not take the problem
  bool narrow = false;  // columns of kModalTensorNarrow channels in tiles twice as long
  int entries = 1;
  int ranks = 1;  // several: narrow columns and one batch entry

  explicit operator bool() const { return columns > 0; }
};
constexpr int kModalTensorTile = 256;
constexpr int kModalTensorNarrow = kModalTensorChannels / 2;
constexpr int kModalTensorMostRanks = 8;  // the largest cluster that all GPUs with clusters have

/// Rows of z are copied in units of 16 bytes. One step is left to the kernels for steps.
///
/// Columns are narrow where all of them run beside each other, a multiprocessor each: B and D
/// decide that, so appended tokens do not change the outputs before them. Then as many ranks as run
/// at once; `clusters_at_once(ranks)` says how many clusters of so many CTAs the GPU has room for.
/// Outputs do not depend on the number of ranks. Nor do they depend on entries; the kernel looks up
/// to 3 tiles ahead, so that entries that follow one another must have as many.
template <class ClustersAtOnce>
ModalTensorFwd modal_tensor_fwd_plan(const ModalInputs& in, DType dtype, int multiprocessors,
                                     const ClustersAtOnce& clusters_at_once) {
  constexpr int64_t kMost = int64_t{1} << 28;
  const bool aligned = reinterpret_cast<uintptr_t>(in.u) % 16 == 0 &&
                       (in.batch == 1 || in.u_batch_stride % 8 == 0) && in.u_time_stride % 8 == 0;
  if (!in.gated() || dtype != DType::kBFloat16 || in.length <= 1 || in.length > kMost ||
      in.modes > kModalTensorModes || in.width % kModalTensorChannels != 0 || in.width > kMost ||
      in.batch < 1 || in.batch > 65535 || !aligned) {
    return {};
  }
  const auto tiles = [&](int64_t steps) { return (in.length + steps - 1) / steps; };
  ModalTensorFwd plan;
  plan.columns = static_cast<int>(in.width / kModalTensorNarrow);
  plan.narrow = plan.columns * in.batch <= multiprocessors;
  if (plan.narrow) {
    const auto fit = [&](int ranks) {
      return ranks <= tiles(2 * kModalTensorTile) &&
             ranks * plan.columns * in.batch <= multiprocessors &&
             clusters_at_once(ranks) >= plan.columns * in.batch;
    };
    plan.ranks = kModalTensorMostRanks;
    while (plan.ranks > 1 && !fit(plan.ranks)) --plan.ranks;
    return plan;
  }
  plan.columns = static_cast<int>(in.width / kModalTensorChannels);
  constexpr int64_t kOverhead = 3, kLeastTiles = 3;
  if (tiles(kModalTensorTile) >= kLeastTiles) {
    plan.entries = static_cast<int>(
        modal_entries(in.batch, tiles(kModalTensorTile), plan.columns, multiprocessors, kOverhead));
  }
  return plan;
}

}  // namespace sarissa::kernels
