// Sizes of the FIR family: workspace layouts, work items, chunks. Pure functions of the problem;
// nothing here depends on the number of threads, so neither does any result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "sarissa/kernels/fir/fir.h"

namespace sarissa::kernels {

/// Steps of one time chunk of the CPU stages.
constexpr int64_t kFirTimeChunk = 256;

/// Time steps that the CPU kernel accumulates at once: panels hold kFirTile - 1 spare rows, so that
/// the last tile needs no special case.
constexpr int64_t kFirTile = 8;

/// A CPU work item covers this many neighbouring channels, so that it reads whole runs of x.
constexpr int64_t kFirBlock = 64;

constexpr int64_t fir_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Steps per partial sum of the filter gradients. At least W, so that the partial sums
/// [B, chunks, W, D] never outgrow u [B, W-1+L, D] by more than the last chunk.
inline int64_t fir_gradient_chunk(const FirParams& p) { return std::max<int64_t>(512, p.num_taps); }
inline int64_t fir_gradient_chunks(const FirParams& p) {
  return std::max<int64_t>(1, fir_ceil_div(p.length, fir_gradient_chunk(p)));
}

/// The CPU workspace keeps u and dq in panels [B, panels, rows, lanes]: a row of a panel is one
/// cache line of neighbouring channels and the rows of a panel are contiguous, whatever D is. (With
/// rows D apart, the W rows that a step reads fall into few cache sets when D is a power of two.)
/// Lanes beyond D are zero.
struct FirPanels {
  int64_t lanes;    // channels per panel
  int64_t panels;   // ceil(D / lanes)
  int64_t u_rows;   // W-1 of history, L, spare
  int64_t dq_rows;  // W-1 zeros, L, W-1 zeros, spare

  FirPanels(const FirParams& p, int64_t bytes_per_element)
      : lanes(64 / bytes_per_element),
        panels(fir_ceil_div(p.width, lanes)),
        u_rows(p.length + p.num_taps - 1 + kFirTile - 1),
        dq_rows(p.length + 2 * (p.num_taps - 1) + kFirTile - 1) {}
};

/// Work items of the CPU stages.
struct FirItems {
  int64_t pack_taps, gate, fwd, bwd_output, bwd_taps, sum_taps, sum_groups, bwd_input,
      bwd_featurizer, sum_featurizer;

  FirItems(const FirParams& p, int64_t bytes_per_element) {
    const FirPanels panels(p, bytes_per_element);
    const int64_t columns = p.batch * fir_ceil_div(p.width, kFirBlock);
    const int64_t chunks = std::max<int64_t>(1, fir_ceil_div(p.length, kFirTimeChunk));
    pack_taps = panels.panels;
    gate = columns * fir_ceil_div(panels.u_rows, kFirTimeChunk);
    fwd = columns * chunks;
    bwd_output = columns * chunks;
    bwd_taps = p.batch * fir_gradient_chunks(p) * panels.panels;
    sum_taps = panels.panels;
    sum_groups = p.groups;
    bwd_input =
        columns * std::max<int64_t>(1, fir_ceil_div(p.length + p.num_taps - 1, kFirTimeChunk));
    bwd_featurizer = columns * chunks;
    sum_featurizer = fir_ceil_div(3 * p.width, kFirBlock);
  }
};

/// Workspace in elements of the arithmetic type; the last four serve the backward alone.
struct FirWorkspace {
  int64_t u, packed_taps, dq, dc, taps_partial, featurizer_partial;
};

/// CPU layouts: u, dq panels; packed_taps [panels, W, lanes]; dc [B, L, D] (the post third);
/// taps_partial [B * gradient chunks, panels, W, lanes]; featurizer_partial [B * chunks, 3, 3D].
inline FirWorkspace fir_workspace_cpu(const FirParams& p, int64_t bytes_per_element) {
  const FirPanels panels(p, bytes_per_element);
  const int64_t gated = p.featurizer != nullptr ? 1 : 0;
  const int64_t chunks = std::max<int64_t>(1, fir_ceil_div(p.length, kFirTimeChunk));
  const int64_t taps = panels.panels * p.num_taps * panels.lanes;
  return {
      .u = p.batch * panels.panels * panels.u_rows * panels.lanes,
      .packed_taps = taps,
      .dq = p.batch * panels.panels * panels.dq_rows * panels.lanes,
      .dc = gated * p.batch * p.length * p.width,
      .taps_partial = p.batch * fir_gradient_chunks(p) * taps,
      .featurizer_partial = gated * p.batch * chunks * 3 * 3 * p.width,
  };
}

/// Threads of a block of the marching kernels.
constexpr int kFirMarchThreads = 128;

/// Multiprocessors for which the march cuts time: those of an H100. Not the actual GPU's, so that
/// gradients have the same bits everywhere.
constexpr int kFirMultiprocessors = 132;

/// Neighbouring channels of a thread of the march, in bytes, where the groups allow it.
constexpr int kFirMarchFwdBytes = 8, kFirMarchBwdBytes = 4;

/// How the marching kernels of hyena_fir take a problem: a thread owns `vector` neighbouring
/// channels and a strip of `steps` steps.
struct FirMarch {
  int vector = 0;  // 0: the march does not take the problem
  int unit = 0;    // bytes that an instruction copies: 16, or an element where rows are not aligned
  int taps = 0;    // the kernel's W; taps that the problem lacks are zero
  int group_width = 0;  // channels that share taps
  int columns = 0;      // blocks side by side that hold all channels
  int steps = 0, strips = 0;
  const char* name = nullptr;

  explicit operator bool() const { return vector > 0; }
};

/// The march takes hyena_fir with up to 14 taps, and counts in 32 bits.
inline bool fir_march_takes(const FirParams& p, DType dtype) {
  constexpr int64_t kMost = int64_t{1} << 28;
  return p.featurizer != nullptr && dtype != DType::kFloat64 && p.num_taps <= 14 &&
         p.length <= kMost && p.width * 16 <= kMost && p.batch <= 65535;
}

/// Into how many strips, `most` at most, to cut `length` (in steps or tiles), each of them `blocks`
/// blocks of threads, of which `places` march at a time. The march lasts as long as the strips that
/// follow each other in one place, each with some overhead.
inline int64_t fir_strips(int64_t blocks, int64_t places, int64_t length, int64_t overhead,
                          int64_t most) {
  int64_t best = 1, best_time = std::numeric_limits<int64_t>::max();
  for (int64_t strips = 1; strips <= most; ++strips) {
    const int64_t turns = fir_ceil_div(blocks * strips, places);
    const int64_t time = turns * (fir_ceil_div(length, strips) + overhead);
    if (time < best_time) {
      best = strips;
      best_time = time;
    }
  }
  return best;
}

/// Strips of the march: a multiprocessor takes one block at a time.
inline int64_t fir_march_strips(int64_t blocks, int64_t length, int64_t overhead) {
  constexpr int64_t kShortest = 32, kMostTurns = 4;
  const int64_t most =
      std::max<int64_t>(1, std::min(length / kShortest, kMostTurns * kFirMultiprocessors / blocks));
  return fir_strips(blocks, kFirMultiprocessors, length, overhead, most);
}

/// The plan with `bytes` of neighbouring channels per thread, or one channel where a group is no
/// multiple of that. Rows of z and dy are copied in units of 16 bytes where they are so aligned.
/// (What the operator allocates is.)
inline FirMarch fir_march_plan(const FirParams& p, DType dtype, int bytes, const void* dy,
                               int64_t dy_stride_b, int64_t dy_stride_l) {
  FirMarch plan;
  if (!fir_march_takes(p, dtype)) return plan;
  const int element = dtype == DType::kFloat32 ? 4 : 2;
  const auto aligned = [&](const void* row, int64_t stride_b, int64_t stride_l) {
    const int64_t elements = 16 / element;
    return reinterpret_cast<uintptr_t>(row) % 16 == 0 &&
           (p.batch == 1 || stride_b % elements == 0) &&
           (p.length == 1 || stride_l % elements == 0);
  };
  const bool wide = p.width % (16 / element) == 0 && aligned(p.x, p.x_stride_b, p.x_stride_l) &&
                    aligned(dy, dy_stride_b, dy_stride_l) && aligned(p.featurizer_state, 0, 0) &&
                    aligned(p.featurizer, 0, 0) && aligned(p.state, 0, 0);
  plan.group_width = static_cast<int>(p.width / p.groups);
  plan.unit = wide ? 16 : element;
  plan.vector = wide && plan.group_width % (bytes / element) == 0 ? bytes / element : 1;
  constexpr int kTaps[] = {4, 7, 14};
  const int taps = p.num_taps <= kTaps[0] ? 0 : p.num_taps <= kTaps[1] ? 1 : 2;
  plan.taps = kTaps[taps];
  constexpr const char* kNames[3][3] = {{"march_v1_w4", "march_v1_w7", "march_v1_w14"},
                                        {"march_v2_w4", "march_v2_w7", "march_v2_w14"},
                                        {"march_v4_w4", "march_v4_w7", "march_v4_w14"}};
  plan.name = kNames[plan.vector / 2][taps];

  plan.columns = static_cast<int>(fir_ceil_div(p.width, kFirMarchThreads * plan.vector));
  const int64_t length = std::max<int64_t>(1, p.length);
  const int64_t strips = fir_march_strips(plan.columns * p.batch, length, 16 + plan.taps);
  constexpr int64_t kGroup = 8;  // rows that the kernels unroll
  plan.steps = static_cast<int>(fir_ceil_div(fir_ceil_div(length, strips), kGroup) * kGroup);
  plan.strips = static_cast<int>(fir_ceil_div(length, plan.steps));
  return plan;
}

inline FirMarch fir_march_fwd_plan(const FirParams& p, DType dtype) {
  return fir_march_plan(p, dtype, kFirMarchFwdBytes, nullptr, 0, 0);
}
inline FirMarch fir_march_bwd_plan(const FirBwdParams& p, DType dtype) {
  return fir_march_plan(p, dtype, kFirMarchBwdBytes, p.dy, p.dy_stride_b, p.dy_stride_l);
}

/// Taps of a run of the step kernel, which one thread sums in order. Two runs can be summed in
/// order, too.
constexpr int kFirStepShortRun = 4, kFirStepRun = 8;
/// Most threads of the step kernel's blocks that take runs.
constexpr int kFirStepThreads = 256;

/// How the step kernel takes one step (L = 1) of hyena_fir: a thread owns `vector` neighbouring
/// channels and every `runs`-th run of taps; a block has 2^column_bits such columns side by side.
struct FirStep {
  int vector = 0;  // 0: the step kernel does not take the problem
  int run = 0, runs = 0, column_bits = 0;
  bool in_order = false;    // the sum is in the order of the taps, the oldest first; at most 2 runs
  int group_width = 0;      // channels that share taps
  bool runs_align = false;  // a run of any group's taps starts at a multiple of 16 bytes
  const char* name = nullptr;

  explicit operator bool() const { return vector > 0; }
};

/// The plan of one step. Any number of taps; V is 4 where channels come in fours and rows of 4 are
/// aligned. Up to 16 taps are summed in order, as the march does; more are spread over as many
/// threads as it takes to have the whole state on its way at once.
inline FirStep fir_step_plan(const FirParams& p, DType dtype) {
  FirStep plan;
  constexpr int64_t kMost = int64_t{1} << 26;
  if (p.featurizer == nullptr || dtype == DType::kFloat64 || p.length != 1 || p.batch > 65535 ||
      p.width > kMost || p.num_taps > kMost) {
    return plan;
  }
  const int64_t element = dtype == DType::kFloat32 ? 4 : 2;
  constexpr int64_t kVector = 4;
  const auto aligned = [](const void* pointer, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
  };
  const bool fours = p.width % kVector == 0 && aligned(p.x, kVector * element) &&
                     (p.batch == 1 || p.x_stride_b % kVector == 0) &&
                     aligned(p.featurizer_state, kVector * element) &&
                     aligned(p.featurizer, kVector * 4) && aligned(p.skip, kVector * 4) &&
                     aligned(p.state, kVector * 4);
  plan.vector = fours ? kVector : 1;
  plan.group_width = static_cast<int>(p.width / p.groups);
  plan.in_order = p.num_taps <= 2 * kFirStepRun;
  plan.run = p.num_taps <= 2 * kFirStepShortRun ? kFirStepShortRun : kFirStepRun;
  const int64_t tap = p.taps_is_T ? element : 4;
  plan.runs_align = aligned(p.taps, 16) && p.num_taps * tap % 16 == 0;
  // Rows of 8 columns are 128 bytes of the state; fewer runs leave room for more.
  const int64_t wanted = fir_ceil_div(p.num_taps, plan.run);
  plan.runs = 1;
  plan.column_bits = 5;
  while (plan.runs < wanted && plan.runs < kFirStepThreads / 8) plan.runs *= 2;
  while (plan.column_bits > 3 && plan.runs << plan.column_bits > 128) --plan.column_bits;
  plan.name = fours ? "step_v4" : "step_v1";
  return plan;
}

/// The workspace of a backward that marches along strips and sums the gradients of each, `taps` of
/// them for taps and skip: featurizer_partial [B, strips, 3D, 3]; taps_partial [B, strips, taps].
inline FirWorkspace fir_strips_workspace(const FirParams& p, int64_t strips, int64_t taps) {
  const int64_t partials = p.batch * strips;
  return {
      .u = 0,
      .packed_taps = 0,
      .dq = 0,
      .dc = 0,
      .taps_partial = partials * taps,
      .featurizer_partial = partials * 9 * p.width,
  };
}

/// The march's workspace, for the backward alone: of each strip tap 0 of each channel, then the
/// other taps of each thread, D + (W-1) D / vector.
inline FirWorkspace fir_march_workspace(const FirParams& p, const FirMarch& plan) {
  return fir_strips_workspace(p, plan.strips, p.width + (p.num_taps - 1) * (p.width / plan.vector));
}

/// CUDA layouts: u [B, W-1+L, D]; dq [B, L, D]; dc [B, L, 3D]; taps_partial [B * gradient chunks +
/// 1, W, D], the last one their sum; featurizer_partial [B * gradient chunks, 3, 3D].
inline FirWorkspace fir_workspace_cuda(const FirParams& p) {
  const int64_t gated = p.featurizer != nullptr ? 1 : 0;
  const int64_t partials = p.batch * fir_gradient_chunks(p);
  return {
      .u = p.batch * (p.length + p.num_taps - 1) * p.width,
      .packed_taps = 0,
      .dq = p.batch * p.length * p.width,
      .dc = gated * p.batch * p.length * 3 * p.width,
      .taps_partial = (partials + 1) * p.num_taps * p.width,
      .featurizer_partial = gated * partials * 3 * 3 * p.width,
  };
}

}  // namespace sarissa::kernels
