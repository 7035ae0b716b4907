// RMSNorm with the residual addition before it; see README.md for the maths.
#pragma once

#include <cstdint>

#include "sarissa/kernels/common/dtype.h"
#include "sarissa/kernels/common/status.h"

namespace sarissa::kernels {

/// Rows of `width` contiguous elements; *_row are row strides in elements.
struct RmsNormFwdParams {
  int64_t rows, width;
  const void* x;  // [rows, width]
  int64_t x_row;
  const void* residual;  // [rows, width], or null: the sum is x
  int64_t residual_row;
  const void* weight;  // [width]
  double eps;
  void* sum;  // [rows, width] contiguous; null when residual is
  void* y;    // [rows, width] contiguous
};

/// Weight gradients are summed in `parts` runs of rows_per_part neighbouring rows (the last may be
/// shorter), then over the runs in a fixed order: nothing depends on threads or scheduling.
struct RmsNormBwdParams {
  int64_t rows, width, parts, rows_per_part;
  const void* dy;  // [rows, width]
  int64_t dy_row;
  const void* dsum;  // [rows, width], or null: zeros
  int64_t dsum_row;
  const void* sum;  // [rows, width]
  int64_t sum_row;
  const void* weight;  // [width]
  double eps;
  void* dx;       // [rows, width] contiguous: the gradient of x and of the residual
  void* partial;  // [parts, width] workspace, float (double for double)
  void* dweight;  // [width]
};

/// Rows [begin, end).
Status rms_norm_fwd_cpu(const RmsNormFwdParams& params, DType dtype, int64_t begin, int64_t end);
/// dx and partial of the runs [begin, end).
Status rms_norm_bwd_cpu(const RmsNormBwdParams& params, DType dtype, int64_t begin, int64_t end);
/// dweight from partial, for the channels [begin, end).
Status rms_norm_bwd_weight_cpu(const RmsNormBwdParams& params, DType dtype, int64_t begin,
                               int64_t end);

Status rms_norm_fwd_cuda(const RmsNormFwdParams& params, DType dtype, void* stream);
Status rms_norm_bwd_cuda(const RmsNormBwdParams& params, DType dtype, void* stream);
Status rms_norm_bwd_weight_cuda(const RmsNormBwdParams& params, DType dtype, void* stream);

}  // namespace sarissa::kernels
