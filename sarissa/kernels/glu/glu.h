// Gated linear units: act(gate) * up; see README.md.
#pragma once

#include <cstdint>

#include "sarissa/kernels/common/dtype.h"
#include "sarissa/kernels/common/status.h"

namespace sarissa::kernels {

enum class Activation { kSilu, kGelu, kIdentity };

/// Rows hold [gate | up], each `width` contiguous elements; *_row are row strides in elements.
struct GluParams {
  int64_t rows, width;
  Activation activation;
  const void* gate_up;  // [rows, 2 width]
  int64_t gate_up_row;
  void* y;         // fwd: [rows, width] contiguous
  const void* dy;  // bwd: [rows, width]
  int64_t dy_row;
  void* dgate_up;  // bwd: [rows, 2 width] contiguous
};

/// Rows [begin, end).
Status glu_fwd_cpu(const GluParams& params, DType dtype, int64_t begin, int64_t end);
Status glu_bwd_cpu(const GluParams& params, DType dtype, int64_t begin, int64_t end);

Status glu_fwd_cuda(const GluParams& params, DType dtype, void* stream);
Status glu_bwd_cuda(const GluParams& params, DType dtype, void* stream);

}  // namespace sarissa::kernels
