#include "tests/support/compare.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "sarissa/base/error.h"

namespace sarissa::test {

double relative_rms(const at::Tensor& got, const at::Tensor& want) {
  SARISSA_CHECK(got.sizes() == want.sizes(), "got shape ", got.sizes(), ", want ", want.sizes());
  const at::Tensor g = got.detach().to(at::kCPU, at::kDouble);
  const at::Tensor w = want.detach().to(at::kCPU, at::kDouble);
  const double scale = std::sqrt((w * w).sum().item<double>());
  const double error = std::sqrt(((g - w) * (g - w)).sum().item<double>());
  if (error != error) return std::numeric_limits<double>::infinity();
  return error == 0.0 ? 0.0 : error / scale;
}

bool bit_equal(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes() || a.scalar_type() != b.scalar_type()) return false;
  const at::Tensor x = a.detach().to(at::kCPU).contiguous();
  const at::Tensor y = b.detach().to(at::kCPU).contiguous();
  return std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0;
}

at::Tensor randn(at::IntArrayRef shape, uint64_t seed, at::TensorOptions options) {
  auto generator = at::detail::createCPUGenerator(seed);
  return at::randn(shape, generator, at::TensorOptions().dtype(at::kDouble))
      .to(options.device(), c10::typeMetaToScalarType(options.dtype()));
}

at::Tensor rand(at::IntArrayRef shape, uint64_t seed, double low, double high,
                at::TensorOptions options) {
  auto generator = at::detail::createCPUGenerator(seed);
  return (at::rand(shape, generator, at::TensorOptions().dtype(at::kDouble)) * (high - low) + low)
      .to(options.device(), c10::typeMetaToScalarType(options.dtype()));
}

at::Tensor strided_copy(const at::Tensor& x) {
  std::vector<int64_t> larger = x.sizes().vec();
  for (auto& n : larger) n += 3;
  at::Tensor buffer =
      at::full(larger, std::numeric_limits<double>::quiet_NaN(), x.options().requires_grad(false));
  at::Tensor view = buffer;
  for (int64_t d = 0; d < x.dim(); ++d) view = view.narrow(d, d == x.dim() - 1 ? 0 : 1, x.size(d));
  view.copy_(x.detach());
  return view;
}

double gradient_error(const std::function<at::Tensor(const std::vector<at::Tensor>&)>& f,
                      std::vector<at::Tensor> inputs, uint64_t seed) {
  for (auto& input : inputs) input = input.detach().clone().requires_grad_(true);
  const at::Tensor output = f(inputs);
  const at::Tensor weight =
      randn(output.sizes(), seed + 1000, output.options().requires_grad(false));
  const auto gradients = torch::autograd::grad({(output * weight).sum()}, inputs, {}, std::nullopt,
                                               false, /*allow_unused=*/true);
  double worst = 0.0;
  constexpr double kStep = 1e-6;
  constexpr int64_t kSamples = 40;
  for (size_t i = 0; i < inputs.size(); ++i) {
    at::Tensor values = inputs[i].detach();  // shares memory
    SARISSA_CHECK(values.is_contiguous() && values.scalar_type() == at::kDouble,
                  "gradient_error takes contiguous double inputs");
    const double scale =
        gradients[i].defined() ? std::max(1e-30, gradients[i].abs().max().item<double>()) : 1.0;
    double* p = values.mutable_data_ptr<double>();
    const int64_t stride = std::max<int64_t>(1, values.numel() / kSamples);
    for (int64_t k = 0; k < values.numel(); k += stride) {
      const double x = p[k];
      p[k] = x + kStep;
      const double up = (f(inputs).detach() * weight).sum().item<double>();
      p[k] = x - kStep;
      const double down = (f(inputs).detach() * weight).sum().item<double>();
      p[k] = x;
      const double numeric = (up - down) / (2 * kStep);
      const double exact = gradients[i].defined() ? gradients[i].flatten()[k].item<double>() : 0.0;
      worst = std::max(worst, std::abs(numeric - exact) / std::max(scale, std::abs(numeric)));
    }
  }
  return worst;
}

PoisonMemory::PoisonMemory() {
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true);
  at::globalContext().setDeterministicFillUninitializedMemory(true);
}
PoisonMemory::~PoisonMemory() { at::globalContext().setDeterministicAlgorithms(false, false); }

}  // namespace sarissa::test
