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
/// them a CTA for every `entries` batch entries, or for one entry `ranks` CTAs that take its tiles
/// of time in turn.
struct ModalTensorFwd {
  int columns = 0;  // 0: it does not take the problem
  int entries = 1;
  int ranks = 1;

  explicit operator bool() const { return columns > 0; }
};
constexpr int kModalTensorTile = 256;
constexpr int kModalTensorMostRanks = 16;

/// Rows of z are copied in units of 16 bytes. One step is left to the kernels for steps.
///
/// As many ranks as fit beside each other, a multiprocessor each. Outputs do not depend on their
/// number where it is not 1, and the first tile not even there: so appended tokens do not change
/// the outputs before them. Nor do they depend on entries; the kernel looks up to 3 tiles ahead, so
/// that entries that follow one another must have as many.
inline ModalTensorFwd modal_tensor_fwd_plan(const ModalInputs& in, DType dtype,
                                            int multiprocessors) {
  constexpr int64_t kMost = int64_t{1} << 28;
  const bool aligned = reinterpret_cast<uintptr_t>(in.u) % 16 == 0 &&
                       (in.batch == 1 || in.u_batch_stride % 8 == 0) && in.u_time_stride % 8 == 0;
  if (!in.gated() || dtype != DType::kBFloat16 || in.length <= 1 || in.length > kMost ||
      in.modes > kModalTensorModes || in.width % kModalTensorChannels != 0 || in.width > kMost ||
      in.batch < 1 || in.batch > 65535 || !aligned) {
    return {};
  }
  const int64_t columns = in.width / kModalTensorChannels;
  const int64_t tiles = (in.length + kModalTensorTile - 1) / kModalTensorTile;
  const int64_t ranks =
      std::min({multiprocessors / (columns * in.batch), tiles, int64_t{kModalTensorMostRanks}});
  constexpr int64_t kOverhead = 3, kLeastTiles = 3;
  const int64_t entries = ranks > 1 || tiles < kLeastTiles
                              ? 1
                              : modal_entries(in.batch, tiles, columns, multiprocessors, kOverhead);
  return {static_cast<int>(columns), static_cast<int>(entries),
          static_cast<int>(std::max<int64_t>(1, ranks))};
}

}  // namespace sarissa::kernels
