// Plans of the tensor-core kernels of hyena_fir with many taps for groups that are no multiple of
// 16 channels: each channel has its own products. Pure functions of the problem and of the shared
// memory of a multiprocessor.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "sarissa/kernels/fir/fir_tensor_plan.h"

namespace sarissa::kernels {

/// Blocks of 16 steps in a tile, the columns of a product, and a tile's steps.
constexpr int kFirChannelBlocks = 8, kFirChannelTile = kFirBlockSide * kFirChannelBlocks;

/// Channels of a slice, 16 bytes of a row, and the warps that share one.
constexpr int kFirChannelSlice = 8, kFirChannelTeams = 2;

/// Units of 16 bytes in shared memory: of a tile of rows, with the two rows before it and a spare
/// unit after each 8 rows, and of a channel's u or dq in `blocks` blocks, with a spare one.
constexpr int64_t fir_channel_row_units(int64_t slices) {
  constexpr int64_t kRows = 2 + kFirChannelTile;
  return kRows * slices + kRows / 8;
}
constexpr int64_t fir_channel_units(int64_t blocks) { return 2 * blocks + 1; }

/// Lags that the kernels know when they are compiled; fewer taps are padded with zeros.
constexpr int kFirChannelLags[] = {3, 5, 9};
constexpr int fir_channel_lags(int64_t num_taps) {
  const int64_t lags = fir_tensor_lags(num_taps);
  for (const int known : kFirChannelLags) {
    if (lags <= known) return known;
  }
  return static_cast<int>(lags);
}
/// Blocks of u that a tile of the forward needs, rounded up to tiles.
constexpr int64_t fir_channel_history(int64_t lags) {
  return fir_ceil_div(lags - 1 + kFirChannelBlocks, kFirChannelBlocks) * kFirChannelBlocks;
}

inline bool fir_channel_takes(const FirParams& p, DType dtype) {
  return fir_many_taps(p, dtype) && !fir_tensor_takes(p, dtype);
}

/// How the forward takes a problem: a block of threads owns 8 * slices channels and a strip of
/// `steps` steps, and marches along it in tiles.
struct FirChannelFwd {
  int slices = 0;  // 0: it does not take the problem
  int lags = 0;
  int history = 0;        // blocks of u in shared memory, for each channel
  int history_bytes = 0;  // that they take
  int pairs = 0;          // of taps, for each channel
  int group_width = 0;    // channels that share taps
  int columns = 0;        // blocks of threads side by side that hold all channels
  int steps = 0, strips = 0;
  int lead = 0;  // steps that the first strip has more
  int64_t shared_bytes = 0;
  const char* name = nullptr;

  explicit operator bool() const { return slices > 0; }
  static constexpr int tile_blocks() { return kFirChannelBlocks; }
  static constexpr int tile_steps() { return kFirChannelTile; }
};

/// The plan for a GPU that has `shared` bytes of shared memory for all blocks of threads of a
/// multiprocessor, 1024 of which each block takes besides its own. Sums do not depend on it.
inline FirChannelFwd fir_channel_fwd_plan(const FirParams& p, DType dtype, int64_t shared) {
  FirChannelFwd best;
  if (!fir_channel_takes(p, dtype)) return best;
  int64_t best_time = std::numeric_limits<int64_t>::max();
  const auto consider = [&](int share, int slices, const char* name) {
    FirChannelFwd plan;
    plan.slices = slices;
    plan.name = name;
    plan.lags = fir_channel_lags(p.num_taps);
    plan.history = static_cast<int>(fir_channel_history(plan.lags));
    plan.history_bytes = static_cast<int>(16 * fir_channel_units(plan.history));
    plan.pairs = static_cast<int>(fir_tensor_pairs(plan.lags));
    plan.group_width = static_cast<int>(p.width / p.groups);
    plan.columns = static_cast<int>(fir_ceil_div(p.width, kFirChannelSlice * slices));
    constexpr int64_t kStages = 2, kThirds = 3;
    const int64_t channel_bytes =
        plan.history_bytes + 16 * fir_channel_units(2 * kFirChannelBlocks) + 4 * plan.pairs;
    plan.shared_bytes = 16 * kStages * kThirds * fir_channel_row_units(slices) +
                        kFirChannelSlice * slices * channel_bytes;
    if (share * (plan.shared_bytes + 1024) > shared) return;
    const int64_t time = fir_tensor_fwd_cut(p, share, plan);
    if (time >= best_time) return;
    best_time = time;
    best = plan;
  };
  // Rows of 64 bytes, shorter ones where so many taps would not fit.
  consider(2, 4, "channel_32");
  if (!best) consider(1, 4, "channel_32");
  if (!best) consider(1, 2, "channel_16");
  if (!best) consider(1, 1, "channel_8");
  return best;
}

}  // namespace sarissa::kernels
