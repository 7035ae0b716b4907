// The plan of the backward of hyena_fir with many taps on tensor cores. Pure functions of the
// problem and of the shared memory of a multiprocessor.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sarissa/kernels/fir/fir_tensor_plan.h"

namespace sarissa::kernels {

/// Warps of a block of threads, each with 16 channels, and steps of a tile.
constexpr int kFirTensorBwdWarps = 4, kFirTensorBwdTile = 32;

/// Blocks of threads that share a multiprocessor.
constexpr int kFirTensorBwdShare = 2;

/// Tiles that the oldest of so many blocks of 16 taps reaches, beside its own.
constexpr int fir_tensor_bwd_delay(int lags) { return lags / 2; }

/// Shared memory of a block of threads; fir_tensor_bwd.cu has the layout.
constexpr int64_t fir_tensor_bwd_shared(int lags) {
  const int64_t delay = fir_tensor_bwd_delay(lags);
  const int64_t row_tiles = 2 * (delay + 2) + 2 * 2, block_tiles = 2 * (delay + 1);
  constexpr int64_t kRowTile = 2 * kFirTensorBwdTile * kFirTensorBwdWarps * kFirBlockSide;
  constexpr int64_t kBlockTile = 2 * kFirTensorBwdTile * kFirBlockSide + 8 * 16;
  constexpr int64_t kFilters = 9 * 4 * kFirBlockSide, kBeside = 6 * 4 * kFirBlockSide;
  return row_tiles * kRowTile +
         kFirTensorBwdWarps * (block_tiles * kBlockTile + kFilters + kBeside);
}

/// How the backward on tensor cores takes a problem: a block of threads owns 64 channels and a
/// strip of `steps` steps.
struct FirTensorBwd {
  int lags = 0;     // blocks of 16 taps that the kernel knows; 0: it does not take the problem
  int columns = 0;  // blocks of threads side by side that hold all channels
  int steps = 0, strips = 0;
  const char* name = nullptr;

  explicit operator bool() const { return lags > 0; }
};

/// Strips of `tiles` tiles of time, `blocks` blocks of threads for each of them.
inline int64_t fir_tensor_bwd_strips(int64_t blocks, int64_t tiles, int64_t overhead) {
  constexpr int64_t kPlaces = kFirTensorBwdShare * kFirMultiprocessors;
  constexpr int64_t kMostTurns = 4;
  const int64_t most = std::clamp<int64_t>(kMostTurns * kPlaces / blocks, 1, tiles);
  return fir_strips(blocks, kPlaces, tiles, overhead, most);
}

/// Whether states come in or go out, or gradients of them.
inline bool fir_has_states(const FirBwdParams& p) {
  return p.state != nullptr || p.featurizer_state != nullptr || p.d_state_out != nullptr ||
         p.d_featurizer_state_out != nullptr;
}

/// What the backward on tensor cores takes, whatever the number of taps: no single step, and rows
/// of dy aligned as those of z must be.
inline bool fir_tensor_bwd_takes(const FirBwdParams& p, DType dtype) {
  return fir_tensor_takes(p, dtype) && p.length > 1 &&
         fir_tensor_rows(p, p.dy, p.dy_stride_b, p.dy_stride_l);
}

/// Blocks of 16 taps at most: up to 129 taps. Longer filters have a plan of their own.
constexpr int kFirTensorBwdMostLags = 9;

/// The plan for a multiprocessor with `shared` bytes of shared memory, of which each block of
/// threads takes 1024 besides its own.
inline FirTensorBwd fir_tensor_bwd_plan(const FirBwdParams& p, DType dtype, int64_t shared) {
  constexpr int kLags[] = {3, 5, kFirTensorBwdMostLags};
  constexpr const char* kNames[] = {"tensor_w33", "tensor_w65", "tensor_w129"};
  constexpr int64_t kOverhead = 6;
  FirTensorBwd plan;
  if (!fir_tensor_bwd_takes(p, dtype)) return plan;
  const int64_t lags = fir_tensor_lags(p.num_taps);
  const int kernel = lags <= kLags[0] ? 0 : lags <= kLags[1] ? 1 : 2;
  if (lags > kLags[kernel] || fir_tensor_bwd_shared(kLags[kernel]) + 1024 > shared) return plan;
  plan.lags = kLags[kernel];
  plan.name = kNames[kernel];
  plan.columns = static_cast<int>(fir_ceil_div(p.width, kFirBlockSide * kFirTensorBwdWarps));
  const int64_t tiles = fir_ceil_div(p.length, kFirTensorBwdTile);
  const int64_t strips = fir_tensor_bwd_strips(plan.columns * p.batch, tiles, kOverhead);
  plan.steps = static_cast<int>(fir_ceil_div(tiles, strips)) * kFirTensorBwdTile;
  plan.strips = static_cast<int>(fir_ceil_div(p.length, plan.steps));
  return plan;
}

/// The workspace of `strips` strips: of each the skip's gradient, then those of the taps for every
/// 16 channels, D + (D / 16) W.
inline FirWorkspace fir_tensor_strips_workspace(const FirBwdParams& p, int64_t strips) {
  return fir_strips_workspace(p, strips, p.width + p.width / kFirBlockSide * p.num_taps);
}
inline FirWorkspace fir_tensor_bwd_workspace(const FirBwdParams& p, const FirTensorBwd& plan) {
  return fir_tensor_strips_workspace(p, plan.strips);
}

}  // namespace sarissa::kernels
