// Cross entropy of rows of logits; see README.md.
#pragma once

#include <cstdint>

#include "sarissa/kernels/common/dtype.h"
#include "sarissa/kernels/common/status.h"

namespace sarissa::kernels {

constexpr int64_t kIgnoreTarget = -100;

/// Rows of `classes` contiguous logits. A target of kIgnoreTarget gives loss 0 and gradient 0; one
/// outside [0, classes) gives NaN and reads nothing. "compute" is float, double for double logits.
struct CrossEntropyParams {
  int64_t rows, classes;
  const void* logits;      // [rows, classes]
  int64_t logits_row;      // row stride in elements
  const int64_t* targets;  // [rows]
  void* loss;              // [rows] compute; the backward reads it
  const void* dloss;       // bwd: [rows] compute
  void* dlogits;           // bwd: [rows, classes] contiguous
};

/// Rows [begin, end).
Status cross_entropy_fwd_cpu(const CrossEntropyParams& params, DType dtype, int64_t begin,
                             int64_t end);
Status cross_entropy_bwd_cpu(const CrossEntropyParams& params, DType dtype, int64_t begin,
                             int64_t end);

Status cross_entropy_fwd_cuda(const CrossEntropyParams& params, DType dtype, void* stream);
Status cross_entropy_bwd_cuda(const CrossEntropyParams& params, DType dtype, void* stream);

}  // namespace sarissa::kernels
