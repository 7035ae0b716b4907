// What an operator computed against the CPU loops in double precision.
#pragma once

#include "sarissa/cli/op_cases.h"

namespace sarissa::cli {

/// ||got - want|| / ||want||, taken in double precision on the CPU; infinite when something is not
/// finite or the shapes differ.
double relative_error(const at::Tensor& got, const at::Tensor& want);

/// The largest relative_error of the packed fields of the last dimension (see Selection).
double relative_error(const at::Tensor& got, const at::Tensor& want,
                      const std::vector<int64_t>& fields);

/// The relative error allowed. bfloat16 rounds each value to 2^-9 relative, and a gradient passes a
/// few roundings; float32 sums a few hundred terms.
double error_bound(at::ScalarType dtype);

/// "bfloat16" or "float32".
const char* dtype_name(at::ScalarType dtype);

/// The largest error of the case's parts in `outputs`, which are those of the last
/// outputs[0].size(1) steps where the inputs have more (after a run in pieces).
double forward_error(const Case& test, const Tensors& inputs, const Tensors& outputs);

/// The largest error of the case's parts in `gradients`, one per input.
double backward_error(const Case& test, const Tensors& inputs, const Tensors& cotangents,
                      const Tensors& gradients);

}  // namespace sarissa::cli
