// Rotary position embedding in half-split pairing; see README.md.
#pragma once

#include <cstdint>

#include "sarissa/kernels/common/dtype.h"
#include "sarissa/kernels/common/status.h"

namespace sarissa::kernels {

/// The pair (d, d + pairs) of step t turns by direction * (position + t) / scale * inv_freq[d]
/// radians: direction +1 is the forward, -1 the backward. Strides in elements; the head's width is
/// contiguous.
struct RopeParams {
  int64_t batch, length, heads, pairs;
  const void* x;  // [batch, length, heads, 2 pairs]
  int64_t x_batch, x_step, x_head;
  const float* inv_freq;  // [pairs]
  double position, scale;
  int direction;
  void* y;  // [batch, length, heads, 2 pairs] contiguous
};

/// Rows [begin, end) of the batch * length rows.
Status rope_cpu(const RopeParams& params, DType dtype, int64_t begin, int64_t end);

Status rope_cuda(const RopeParams& params, DType dtype, void* stream);

}  // namespace sarissa::kernels
