// Which kernel takes a problem of the modal family on a GPU. Pure functions of the problem.
#pragma once

#include <cstdint>

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

/// Whether the kernel that takes the problem on a GPU is native: it reads the featurizer and the
/// skip as the operator has them (see modal.h).
inline bool modal_fwd_is_native(const ModalInputs& in, DType dtype) {
  return modal_step_takes(in, dtype);
}
inline bool modal_bwd_is_native(const ModalInputs&, DType) { return false; }

}  // namespace sarissa::kernels
