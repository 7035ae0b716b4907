// The plan of the backward of hyena_fir with many taps where few channels share them. Pure
// functions of the problem and of the shared memory of a multiprocessor.
#pragma once

#include <cstdint>

#include "sarissa/kernels/fir/fir_channel_plan.h"
#include "sarissa/kernels/fir/fir_tensor_bwd_plan.h"

namespace sarissa::kernels {

/// Blocks of u and of dq in shared memory: a tile and the one that the taps reach from there.
constexpr int kFirChannelBwdBlocks = 2 * kFirChannelBlocks;

/// Shared memory of a block of threads; fir_channel_bwd.cu has the layout.
constexpr int64_t fir_channel_bwd_shared(int64_t slices, int64_t lags) {
  constexpr int64_t kRowTiles = 6, kUAndDq = 2 * 16 * fir_channel_units(kFirChannelBwdBlocks);
  constexpr int64_t kFeaturizer = 9 * 4, kEdges = 2 * 3 * 2 * 4;
  return 16 * kRowTiles * fir_channel_row_units(slices) +
         kFirChannelSlice * slices * (kUAndDq + 4 * fir_tensor_pairs(lags) + kFeaturizer + kEdges);
}

/// How the backward takes a problem: a block of threads owns 8 * slices channels and a strip of
/// `steps` steps.
struct FirChannelBwd {
  int slices = 0;       // 0: it does not take the problem
  int lags = 0;         // that the kernel knows
  int group_width = 0;  // channels that share taps
  int columns = 0;      // blocks of threads side by side that hold all channels
  int steps = 0, strips = 0;
  int64_t shared_bytes = 0;
  const char* name = nullptr;

  explicit operator bool() const { return slices > 0; }
};

/// The plan for a multiprocessor with `shared` bytes of shared memory, of which each block of
/// threads takes 1024 besides its own. There is none for more than 128 taps, with states, for a
/// single step, and where dy is not aligned as z must be.
inline FirChannelBwd fir_channel_bwd_plan(const FirBwdParams& p, DType dtype, int64_t shared) {
  FirChannelBwd plan;
  if (!fir_channel_takes(p, dtype) || p.num_taps > kFirChannelTile || p.length == 1 ||
      fir_has_states(p) || !fir_tensor_rows(p, p.dy, p.dy_stride_b, p.dy_stride_l)) {
    return plan;
  }
  plan.lags = fir_channel_lags(p.num_taps);
  plan.group_width = static_cast<int>(p.width / p.groups);
  const int slices =
      kFirTensorBwdShare * (fir_channel_bwd_shared(4, plan.lags) + 1024) <= shared ? 4 : 2;
  plan.shared_bytes = fir_channel_bwd_shared(slices, plan.lags);
  if (plan.shared_bytes + 1024 > shared) return plan;
  plan.slices = slices;
  plan.name = slices == 4 ? "channel_32" : "channel_16";
  plan.columns = static_cast<int>(fir_ceil_div(p.width, kFirChannelSlice * slices));
  constexpr int64_t kOverhead = 2;  // tiles beside a strip
  const int64_t tiles = fir_ceil_div(p.length, kFirChannelTile);
  // Strips are those of the wider blocks on any GPU, and so are the bits of the gradients.
  const int64_t blocks = fir_ceil_div(p.width, kFirChannelSlice * 4) * p.batch;
  const int64_t strips = fir_tensor_bwd_strips(blocks, tiles, kOverhead);
  plan.steps = static_cast<int>(fir_ceil_div(tiles, strips)) * kFirChannelTile;
  plan.strips = static_cast<int>(fir_ceil_div(p.length, plan.steps));
  return plan;
}

/// Its workspace: of each strip the skip's gradient, then those of the taps for every channel, D +
/// D W.
inline FirWorkspace fir_channel_bwd_workspace(const FirBwdParams& p, const FirChannelBwd& plan) {
  return fir_strips_workspace(p, plan.strips, p.width * (1 + p.num_taps));
}

}  // namespace sarissa::kernels
