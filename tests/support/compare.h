// Comparisons and random inputs shared by the operator and model tests.
#pragma once

#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <functional>
#include <vector>

namespace sarissa::test {

/// ||got - want|| / ||want|| in double; 0 / 0 is 0, NaN is infinity.
double relative_rms(const at::Tensor& got, const at::Tensor& want);

/// Same shape, dtype and bits (NaN equals the same NaN).
bool bit_equal(const at::Tensor& a, const at::Tensor& b);

/// Standard normal values, the same for the same seed on every machine (drawn on the CPU in double,
/// then converted).
at::Tensor randn(at::IntArrayRef shape, uint64_t seed,
                 at::TensorOptions options = at::TensorOptions().dtype(at::kDouble));

/// Uniform values in [low, high).
at::Tensor rand(at::IntArrayRef shape, uint64_t seed, double low, double high,
                at::TensorOptions options = at::TensorOptions().dtype(at::kDouble));

/// A tensor of the same values that is a strided view into a larger NaN-filled buffer: kernels must
/// honour strides and never read outside.
at::Tensor strided_copy(const at::Tensor& x);

/// Central finite differences: checks d(sum(f(inputs) * weight))/d(inputs[i]) from autograd, for
/// double inputs that require grad, at a sample of positions. Returns the largest error relative to
/// the largest gradient.
double gradient_error(const std::function<at::Tensor(const std::vector<at::Tensor>&)>& f,
                      std::vector<at::Tensor> inputs, uint64_t seed = 1);

/// Fills new CPU and CUDA memory with NaN while alive (at::globalContext deterministic fill), so an
/// element that a kernel forgot to write shows.
class PoisonMemory {
 public:
  PoisonMemory();
  ~PoisonMemory();
};

}  // namespace sarissa::test

/// Skips a *Cuda* test on a machine without a GPU, saying why.
#define SKIP_WITHOUT_CUDA()              \
  if (!::sarissa::ops::cuda_available()) \
  GTEST_SKIP() << "without a CUDA device: " << ::sarissa::ops::cuda_unavailable_reason()
