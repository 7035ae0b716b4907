// The plan of the backward of hyena_fir with 130 to 1024 taps on tensor cores. Pure functions of
// the problem and of the shared memory of a multiprocessor.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sarissa/kernels/fir/fir_tensor_bwd_plan.h"

namespace sarissa::kernels {

/// Warps of a block of threads, which share 16 channels, and the steps of a stride: a tile for each
/// warp.
constexpr int kFirLongWarps = 4;
constexpr int kFirLongStride = kFirLongWarps * kFirTensorBwdTile;

/// How the backward of long filters takes a problem: a block of threads owns 16 channels and a
/// strip of `steps` steps.
struct FirTensorLongBwd {
  int lags = 0;     // of 16 steps, for each warp, as compiled; 0: it does not take the problem
  int reach = 0;    // tiles that the oldest tap reaches beside its own
  int delay = 0;    // strides that hold those tiles
  int history = 0;  // tiles of u, and of dq, in shared memory
  int pairs = 0;    // of taps in shared memory
  int columns = 0;  // blocks of threads side by side that hold all channels
  int steps = 0, strips = 0;
  int64_t shared_bytes = 0;
  const char* name = nullptr;

  explicit operator bool() const { return lags > 0; }
};

/// Shared memory of a block of threads; fir_tensor_long_bwd.cu has the layout.
constexpr int64_t fir_tensor_long_bwd_shared(const FirTensorLongBwd& plan) {
  constexpr int64_t kBlockTile = 2 * kFirTensorBwdTile * kFirBlockSide + 8 * 16;
  constexpr int64_t kFeaturizer = 9 * 4 * kFirBlockSide, kResults = 4 * kFirLongWarps * kBlockTile;
  constexpr int64_t kProduct = 4 * kFirBlockSide * kFirBlockSide;
  // At the end the sums of the taps' gradient take the place of the tiles.
  return kFeaturizer + kResults +
         std::max(2 * plan.history * kBlockTile + 4 * plan.pairs,
                  kFirLongWarps * plan.lags * kProduct);
}

/// The plan for a multiprocessor with `shared` bytes of shared memory, of which each block of
/// threads takes 1024 besides its own. There is none for up to 129 taps, nor with states.
inline FirTensorLongBwd fir_tensor_long_bwd_plan(const FirBwdParams& p, DType dtype,
                                                 int64_t shared) {
  // A warp sums the gradients of a quarter of the taps, in so many lags: the last holds no more
  // than the ends of those before it.
  constexpr int kLags[] = {5, 9, 17};
  FirTensorLongBwd plan;
  if (!fir_tensor_bwd_takes(p, dtype) || fir_has_states(p)) return plan;
  const int lags = static_cast<int>(fir_tensor_lags(p.num_taps));
  if (lags <= kFirTensorBwdMostLags) return plan;
  FirTensorLongBwd longer;
  for (const int most : kLags) {
    longer.lags = most;
    if (lags <= kFirLongWarps * (most - 1) + 1) break;
  }
  longer.reach = lags / 2;
  longer.delay = static_cast<int>(fir_ceil_div((lags - 1) * kFirBlockSide, kFirLongStride));
  longer.history = (longer.delay + 1) * kFirLongWarps;
  longer.pairs = static_cast<int>(fir_tensor_pairs(2 * longer.reach + 2));
  longer.shared_bytes = fir_tensor_long_bwd_shared(longer);
  if (longer.shared_bytes + 1024 > shared) return plan;
  longer.name = "tensor_long";
  longer.columns = static_cast<int>(p.width / kFirBlockSide);
  // Beside a strip, strides of u before it and of dq behind it are made twice.
  constexpr int64_t kOverhead = 2;
  const int64_t strides = fir_ceil_div(p.length, kFirLongStride);
  const int64_t strips =
      fir_tensor_bwd_strips(longer.columns * p.batch, strides, kOverhead + longer.delay / 2);
  longer.steps = static_cast<int>(fir_ceil_div(strides, strips)) * kFirLongStride;
  longer.strips = static_cast<int>(fir_ceil_div(p.length, longer.steps));
  return longer;
}

/// Its workspace is that of the march with fewer taps.
inline FirWorkspace fir_tensor_long_bwd_workspace(const FirBwdParams& p,
                                                  const FirTensorLongBwd& plan) {
  return fir_tensor_strips_workspace(p, plan.strips);
}

}  // namespace sarissa::kernels
