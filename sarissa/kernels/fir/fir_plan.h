// Sizes of the FIR family: workspace layouts, work items, chunks. Pure functions of the problem;
// nothing here depends on the number of threads, so neither does any result.
#pragma once

#include <algorithm>
#include <cstdint>

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
