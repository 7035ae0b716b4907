// Layouts that the operators want of the last dimension.
#pragma once

#include <ATen/core/Tensor.h>

namespace sarissa::ops {

/// x [..., C] as [N, C] rows with contiguous elements: a view where the strides allow it.
inline at::Tensor as_rows(const at::Tensor& x) {
  const int64_t width = x.size(-1);
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  const at::Tensor packed = x.stride(-1) == 1 || width <= 1 ? x : x.contiguous();
  return packed.reshape({rows, width});
}

/// Distance of neighbouring rows in elements.
inline int64_t row_stride(const at::Tensor& rows) { return rows.size(0) > 1 ? rows.stride(0) : 0; }

/// x, or a copy of it where channels (the last dimension) are not neighbours in memory.
inline at::Tensor channels_contiguous(const at::Tensor& x) {
  return x.dim() > 0 && x.size(-1) > 1 && x.stride(-1) != 1 ? x.contiguous() : x;
}

}  // namespace sarissa::ops
