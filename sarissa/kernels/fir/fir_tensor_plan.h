// Plans of the tensor-core kernels of hyena_fir with many taps. Pure functions of the problem and
// of the shared memory that a block may have.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sarissa/kernels/fir/fir_plan.h"

namespace sarissa::kernels {

/// Channels and steps of a block, the unit of the tensor-core kernels. Blocks lie on the grid of
/// steps that starts at step 0, wherever a strip starts: what is summed, and in which order,
/// depends on the step alone.
constexpr int kFirBlockSide = 16;

/// Blocks that reach the current one: itself and those that the oldest taps lie in.
constexpr int64_t fir_tensor_lags(int64_t num_taps) {
  return fir_ceil_div(num_taps - 1, kFirBlockSide) + 1;
}

/// Pairs of neighbouring taps in shared memory, for each warp: see TapPairs in fir_tensor.cuh.
constexpr int64_t fir_tensor_pairs(int64_t lags) { return kFirBlockSide * (lags + 1); }

/// Rows of [B, L, channels] that the kernels can copy in units of 16 bytes.
inline bool fir_tensor_rows(const FirParams& p, const void* rows, int64_t stride_b,
                            int64_t stride_l) {
  constexpr int64_t kElements = 8;
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 &&
         (p.batch == 1 || stride_b % kElements == 0) && stride_l % kElements == 0;
}

/// The tensor cores take bfloat16, more taps than the march does, and groups of a multiple of 16
/// channels.
inline bool fir_tensor_takes(const FirParams& p, DType dtype) {
  constexpr int64_t kMostTaps = 1024, kMost = int64_t{1} << 28;
  return p.featurizer != nullptr && dtype == DType::kBFloat16 && p.num_taps >= 15 &&
         p.num_taps <= kMostTaps && p.width / p.groups % kFirBlockSide == 0 && p.length > 0 &&
         p.length <= kMost && p.width <= kMost / 16 && p.batch <= 65535 &&
         fir_tensor_rows(p, p.x, p.x_stride_b, p.x_stride_l);
}

/// How the forward on tensor cores takes a problem: a block of `warps` warps owns 16 channels for
/// each and a strip of `steps` steps, and marches in tiles of `tile` blocks.
struct FirTensorFwd {
  int warps = 0;  // 0: the tensor cores do not take the problem
  int tile = 0;
  int lags = 0;
  int history = 0;      // blocks of u that a warp keeps
  int group_width = 0;  // channels that share taps
  int columns = 0;      // blocks side by side that hold all channels
  int steps = 0, strips = 0;
  int64_t shared_bytes = 0;
  const char* name = nullptr;

  explicit operator bool() const { return warps > 0; }
};

/// The plan for blocks of at most `most_shared` bytes of shared memory.
inline FirTensorFwd fir_tensor_fwd_plan(const FirParams& p, DType dtype, int64_t most_shared) {
  FirTensorFwd plan;
  if (!fir_tensor_takes(p, dtype)) return plan;
  plan.lags = static_cast<int>(fir_tensor_lags(p.num_taps));
  const auto choose = [&](int warps, int tile, const char* name) {
    plan.warps = warps;
    plan.tile = tile;
    plan.name = name;
    plan.history = static_cast<int>(fir_ceil_div(plan.lags - 1 + tile, tile) * tile);
    constexpr int64_t kBlockBytes = 2 * kFirBlockSide * kFirBlockSide, kStages = 2, kThirds = 3;
    const int64_t row_bytes = 2 * kFirBlockSide * warps;
    plan.shared_bytes = kStages * kThirds * (2 + kFirBlockSide * tile) * row_bytes +
                        warps * (plan.history * kBlockBytes + fir_tensor_pairs(plan.lags) * 4);
    return plan.shared_bytes <= most_shared;
  };
  constexpr int kManyLags = 17;
  if (!(plan.lags >= kManyLags && choose(4, 4, "tensor_64x64")) &&
      !choose(4, 2, "tensor_64x32") && !choose(2, 2, "tensor_32x32")) {
    return {};
  }
  plan.group_width = static_cast<int>(p.width / p.groups);
  plan.columns = static_cast<int>(fir_ceil_div(p.width, kFirBlockSide * plan.warps));
  const int64_t tile_steps = kFirBlockSide * plan.tile;
  const int64_t strips = std::max<int64_t>(1, 4 * kFirMultiprocessors / (plan.columns * p.batch));
  plan.steps = static_cast<int>(
      fir_ceil_div(fir_ceil_div(p.length, strips), tile_steps) * tile_steps);
  plan.strips = static_cast<int>(fir_ceil_div(p.length, plan.steps));
  return plan;
}

}  // namespace sarissa::kernels
