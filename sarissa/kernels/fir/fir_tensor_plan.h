// Plans of the tensor-core kernels of hyena_fir with many taps. Pure functions of the problem and
// of the shared memory that a block may have.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

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

/// Pairs of neighbouring taps that a warp reads from shared memory: see TapPairs of fir_tensor.cuh.
constexpr int64_t fir_tensor_pairs(int64_t lags) { return kFirBlockSide * (lags + 2); }

/// Rows of [B, L, channels] that the kernels can copy in units of 16 bytes.
inline bool fir_tensor_rows(const FirParams& p, const void* rows, int64_t stride_b,
                            int64_t stride_l) {
  constexpr int64_t kElements = 8;
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 &&
         (p.batch == 1 || stride_b % kElements == 0) && stride_l % kElements == 0;
}

/// What the tensor cores take, whatever the groups: bfloat16, more taps than the march does, and
/// channels in units of 16 bytes.
inline bool fir_many_taps(const FirParams& p, DType dtype) {
  constexpr int64_t kMostTaps = 1024, kMost = int64_t{1} << 28;
  return p.featurizer != nullptr && dtype == DType::kBFloat16 && p.num_taps >= 15 &&
         p.num_taps <= kMostTaps && p.width % 8 == 0 && p.length > 0 && p.length <= kMost &&
         p.width <= kMost / 16 && p.batch <= 65535 &&
         fir_tensor_rows(p, p.x, p.x_stride_b, p.x_stride_l);
}
/// Groups of a multiple of 16 channels have products of their own.
inline bool fir_tensor_takes(const FirParams& p, DType dtype) {
  return fir_many_taps(p, dtype) && p.width / p.groups % kFirBlockSide == 0;
}

/// Blocks of a tile that one warp of the forward computes together.
constexpr int kFirTensorFwdBlocks = 2;

/// How the forward on tensor cores takes a problem: a block of threads owns 16 * slices channels
/// and a strip of `steps` steps, and marches along it in tiles. `teams` warps share the steps of a
/// slice of 16 channels.
struct FirTensorFwd {
  int slices = 0;  // 0: the tensor cores do not take the problem
  int teams = 0;
  int stages = 0;  // tiles of z in shared memory
  int lags = 0;
  int history = 0;      // blocks of u in shared memory, for each slice
  int pairs = 0;        // of taps, for each slice
  int group_width = 0;  // channels that share taps
  int columns = 0;      // blocks of threads side by side that hold all channels
  int steps = 0, strips = 0;
  int lead = 0;  // steps that the first strip has more
  int64_t shared_bytes = 0;
  const char* name = nullptr;

  explicit operator bool() const { return slices > 0; }
  int tile_blocks() const { return kFirTensorFwdBlocks * teams; }
  int tile_steps() const { return kFirBlockSide * tile_blocks(); }
};

/// Lays out the shared memory of a variant.
inline FirTensorFwd fir_tensor_fwd_variant(const FirParams& p, int slices, int teams, int stages,
                                           const char* name) {
  FirTensorFwd plan;
  plan.slices = slices;
  plan.teams = teams;
  plan.stages = stages;
  plan.name = name;
  plan.lags = static_cast<int>(fir_tensor_lags(p.num_taps));
  plan.group_width = static_cast<int>(p.width / p.groups);
  plan.columns = static_cast<int>(fir_ceil_div(p.width, kFirBlockSide * slices));
  const int tile = plan.tile_blocks();
  plan.history = static_cast<int>(fir_ceil_div(plan.lags - 1 + tile, tile) * tile);
  plan.pairs = static_cast<int>(fir_tensor_pairs(plan.lags));
  constexpr int64_t kBlockBytes = 2 * kFirBlockSide * kFirBlockSide, kThirds = 3, kRowsBefore = 2;
  const int64_t row_bytes = 2 * kFirBlockSide * slices;
  plan.shared_bytes = stages * kThirds * (kRowsBefore + plan.tile_steps()) * row_bytes +
                      slices * (plan.history * kBlockBytes + plan.pairs * 4);
  return plan;
}

/// Cuts time into strips such that it lasts least with `share` blocks of threads at a time on each
/// multiprocessor; returns how long, in a unit of its own. The first strip need not start early, so
/// it may be longer by what the others lose.
template <class Plan>
int64_t fir_tensor_fwd_cut(const FirParams& p, int share, Plan& plan) {
  const int64_t places = share * kFirMultiprocessors, blocks = plan.columns * p.batch;
  const int64_t tiles = fir_ceil_div(p.length, plan.tile_steps());
  const int64_t before = fir_ceil_div(plan.lags - 1, plan.tile_blocks());
  // A tile before the strip takes half the time of one in it, less where the taps are many, and the
  // start as long as it. Alone on a multiprocessor, a block of threads leaves memory idle at times.
  constexpr int64_t kBefore = 32;
  const int64_t inside = 64 + std::max<int64_t>(0, plan.lags - 17) * 7 / 8;
  constexpr int64_t kMostTurns = 4;
  const int64_t most = std::clamp<int64_t>(kMostTurns * places / blocks, 1, tiles);
  int64_t best_time = std::numeric_limits<int64_t>::max();
  for (int64_t strips = 1; strips <= most; ++strips) {
    const int64_t lost = strips > 1 ? before * kBefore : 0, most_lead = lost / inside;
    if (most_lead >= tiles) break;
    const int64_t turns = fir_ceil_div(blocks * strips, places);
    const int64_t strip_tiles = fir_ceil_div(tiles - most_lead, strips);
    const int64_t lead = std::max<int64_t>(0, tiles - strips * strip_tiles);
    const int64_t time =
        turns * (strip_tiles * inside + lost + kBefore) * (share == 1 ? 83 : 80 * share);
    if (time >= best_time) continue;
    best_time = time;
    plan.steps = static_cast<int>(strip_tiles) * plan.tile_steps();
    plan.lead = static_cast<int>(lead) * plan.tile_steps();
    plan.strips = static_cast<int>(fir_ceil_div(p.length - plan.lead, plan.steps));
  }
  return best_time;
}

/// The plan for a GPU that has `shared` bytes of shared memory for all blocks of threads of a
/// multiprocessor, 1024 of which each block takes besides its own. Sums do not depend on it.
inline FirTensorFwd fir_tensor_fwd_plan(const FirParams& p, DType dtype, int64_t shared) {
  FirTensorFwd best;
  if (!fir_tensor_takes(p, dtype)) return best;
  int64_t best_time = std::numeric_limits<int64_t>::max();
  const auto consider = [&](int share, int slices, int teams, int stages, const char* name) {
    FirTensorFwd plan = fir_tensor_fwd_variant(p, slices, teams, stages, name);
    if (share * (plan.shared_bytes + 1024) > shared) return;
    if (share == 1) plan.shared_bytes = std::max(plan.shared_bytes, shared / 2);  // alone
    const int64_t time = fir_tensor_fwd_cut(p, share, plan);
    if (time >= best_time) return;
    best_time = time;
    best = plan;
  };
  // Two blocks of threads on a multiprocessor hide each other's waits; one needs more tiles on
  // their way, where there is room, and fewer steps are computed twice.
  consider(2, 4, 2, 2, "tensor_64x64_s2");
  consider(1, 4, 2, 3, "tensor_64x64_s3");
  if (!best) consider(1, 4, 2, 2, "tensor_64x64_s2");
  if (!best) consider(1, 2, 1, 2, "tensor_32x32_s2");
  return best;
}

/// Whether the kernel that takes the forward on a GPU reads parameters as the operator has them:
/// see fir.h.
inline bool fir_fwd_is_native(const FirParams& p, DType dtype) {
  return fir_step_plan(p, dtype) || fir_march_takes(p, dtype) || fir_many_taps(p, dtype);
}

}  // namespace sarissa::kernels
