// Convolution by FFT: an independent way to the results of the filters, for tests.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/fft_irfft.h>
#include <ATen/ops/fft_rfft.h>

#include <bit>
#include <cstdint>

namespace sarissa::test {

/// y[t] = sum over k <= t of filter[d, k] x[t - k], zeros before x. x [B, L, D], filter [D, W];
/// differentiable.
inline at::Tensor fft_convolution(const at::Tensor& x_BLD, const at::Tensor& filter_DW) {
  const int64_t length = x_BLD.size(1);
  // Nothing may wrap around: at least L + W - 1.
  const auto size =
      static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(length + filter_DW.size(1) - 1)));
  const at::Tensor product =
      at::fft_rfft(x_BLD.transpose(1, 2), size) * at::fft_rfft(filter_DW, size);
  return at::fft_irfft(product, size).narrow(2, 0, length).transpose(1, 2);
}

}  // namespace sarissa::test
