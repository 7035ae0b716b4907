#include "sarissa/train/optimizer.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "sarissa/ops/device.h"
#include "tests/support/compare.h"
#include "tests/support/files.h"

namespace sarissa::train {
namespace {

using model::Parameter;

OptimConfig no_clipping() {
  OptimConfig config;
  config.clip = 0;
  return config;
}

Parameter parameter(const std::string& name, const at::Tensor& value, bool decay) {
  return {name, value.clone().set_requires_grad(true), decay, false};
}

at::Tensor finite_loss(at::Device device = at::kCPU) {
  return at::ones({}, at::TensorOptions(device));
}

// The formulas of optimizer.h in double.
struct Reference {
  at::Tensor x, m, v;
  explicit Reference(const at::Tensor& start)
      : x(start.to(at::kDouble)), m(at::zeros_like(x)), v(at::zeros_like(x)) {}
  void step(const at::Tensor& gradient, double lr, const OptimConfig& config, double decay,
            int64_t t) {
    const at::Tensor g = gradient.to(at::kDouble);
    m = config.beta1 * m + (1 - config.beta1) * g;
    v = config.beta2 * v + (1 - config.beta2) * g * g;
    const at::Tensor m_hat = m / (1 - std::pow(config.beta1, t));
    const at::Tensor v_hat = v / (1 - std::pow(config.beta2, t));
    x = x - lr * decay * x - lr * m_hat / (v_hat.sqrt() + config.eps);
  }
};

void check_against_reference(at::Device device) {
  const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
  const OptimConfig config = no_clipping();
  const at::Tensor start = test::randn({37, 19}, 1, options);
  std::vector<Parameter> parameters = {parameter("matrix", start, true),
                                       parameter("norm", start, false)};
  AdamW optimizer(parameters, config);
  Reference decayed(start.cpu()), plain(start.cpu());
  for (int64_t t = 1; t <= 20; ++t) {
    const at::Tensor gradient = test::randn({37, 19}, 100 + t, options);
    for (auto& p : parameters) p.value.mutable_grad() = gradient.clone();
    optimizer.accumulate();
    optimizer.step(0.01, finite_loss(device));
    optimizer.confirm();
    optimizer.clear_gradients();
    decayed.step(gradient.cpu(), 0.01, config, config.weight_decay, t);
    plain.step(gradient.cpu(), 0.01, config, 0, t);
  }
  EXPECT_LT(test::relative_rms(parameters[0].value.detach().cpu(), decayed.x), 1e-6);
  EXPECT_LT(test::relative_rms(parameters[1].value.detach().cpu(), plain.x), 1e-6);
  EXPECT_GT(test::relative_rms(parameters[1].value.detach().cpu(), decayed.x), 1e-3);
}

TEST(AdamW, MatchesItsFormulas) { check_against_reference(at::kCPU); }

TEST(AdamWCuda, MatchesItsFormulas) {
  SKIP_WITHOUT_CUDA();
  check_against_reference(at::kCUDA);
}

// Updates of 1e-4 on weights near 1 vanish in bf16 (steps of 2^-8) but not in its masters.
TEST(AdamW, SmallUpdatesOfBf16WeightsAddUpInTheMasters) {
  std::vector<Parameter> parameters = {
      parameter("w", at::ones({64}, at::TensorOptions().dtype(at::kBFloat16)), false)};
  AdamW optimizer(parameters, no_clipping());
  for (int64_t t = 1; t <= 200; ++t) {
    parameters[0].value.mutable_grad() = at::ones_like(parameters[0].value.detach());
    optimizer.accumulate();
    optimizer.step(1e-4, finite_loss());
    optimizer.confirm();
    optimizer.clear_gradients();
  }
  // A constant gradient moves every weight by lr per update.
  EXPECT_NEAR(parameters[0].value.detach()[0].item<double>(), 0.98, 0.004);
}

TEST(AdamW, Bf16GradientsOfMicroBatchesAreSummedInFp32) {
  std::vector<Parameter> parameters = {
      parameter("w", at::zeros({1}, at::TensorOptions().dtype(at::kBFloat16)), false)};
  AdamW optimizer(parameters, no_clipping());
  // 256 + 255 * 1: in bf16 every one of the ones would be lost.
  for (int64_t i = 0; i < 256; ++i) {
    parameters[0].value.mutable_grad() =
        at::full({1}, i == 0 ? 256.0 : 1.0, parameters[0].value.options());
    optimizer.accumulate();
  }
  EXPECT_EQ(optimizer.step(1e-3, finite_loss()).item<double>(), 511.0);
}

TEST(AdamW, ClipsTheGlobalNorm) {
  OptimConfig config = no_clipping();
  config.clip = 1.0;
  const at::Tensor start = at::zeros({100}, at::kFloat);
  std::vector<Parameter> clipped = {parameter("a", start, false), parameter("b", start, false)};
  std::vector<Parameter> scaled = {parameter("a", start, false), parameter("b", start, false)};
  AdamW with_clip(clipped, config), without(scaled, no_clipping());
  const at::Tensor a = test::randn({100}, 1, at::kFloat), b = test::randn({100}, 2, at::kFloat);
  const double norm = at::cat({a, b}).to(at::kDouble).norm().item<double>();
  ASSERT_GT(norm, 2.0);
  clipped[0].value.mutable_grad() = a.clone();
  clipped[1].value.mutable_grad() = b.clone();
  scaled[0].value.mutable_grad() = a / norm;
  scaled[1].value.mutable_grad() = b / norm;
  EXPECT_NEAR(with_clip.step(0.1, finite_loss()).item<double>(), norm, 1e-5 * norm);
  without.step(0.1, finite_loss());
  for (const char* name : {"moment1.a", "moment2.a", "moment1.b", "moment2.b"}) {
    for (size_t i = 0; i < with_clip.pack().size(); ++i) {
      if (with_clip.pack()[i].first != name) continue;
      EXPECT_LT(test::relative_rms(with_clip.pack()[i].second, without.pack()[i].second), 1e-6);
    }
  }
}

TEST(AdamW, NothingChangesWhenSomethingIsNotFinite) {
  const double bad[] = {std::numeric_limits<double>::infinity(),
                        std::numeric_limits<double>::quiet_NaN()};
  for (const double value : bad) {
    for (const bool in_loss : {true, false}) {
      for (const auto dtype : {at::kFloat, at::kBFloat16}) {
        std::vector<Parameter> parameters = {
            parameter("w", at::ones({8}, at::TensorOptions().dtype(dtype)), true)};
        AdamW optimizer(parameters, OptimConfig{});
        at::Tensor gradient = at::ones({8}, parameters[0].value.options());
        if (!in_loss) gradient[3] = value;
        parameters[0].value.mutable_grad() = gradient;
        optimizer.accumulate();
        const at::Tensor loss = in_loss ? at::full({}, value) : finite_loss();
        optimizer.step(0.1, loss);
        EXPECT_TRUE(at::equal(parameters[0].value.detach(), at::ones_like(gradient)));
        for (const auto& [name, tensor] : optimizer.pack()) {
          const double want = name.starts_with("master") ? 1 : 0;
          EXPECT_TRUE(at::equal(tensor, at::full_like(tensor, want))) << name;
        }
        EXPECT_EQ(optimizer.first_non_finite(), in_loss ? "" : "gradient of w");
        optimizer.clear_gradients();
        EXPECT_EQ(optimizer.first_non_finite(), "");
      }
    }
  }
}

TEST(AdamW, NamesTheFirstNonFiniteParameter) {
  std::vector<Parameter> parameters = {parameter("a", at::ones({8}, at::kFloat), true),
                                       parameter("b", at::ones({8}, at::kFloat), true)};
  const AdamW optimizer(parameters, OptimConfig{});
  parameters[1].value.detach()[5] = std::nan("");
  EXPECT_EQ(optimizer.first_non_finite(), "parameter b");
}

TEST(AdamW, PackAndUnpackContinueExactly) {
  const test::TemporaryFolder folder;
  const at::Tensor start = test::randn({50}, 1, at::TensorOptions().dtype(at::kBFloat16));
  const auto run = [&](AdamW& optimizer, Parameter& p, int64_t first, int64_t last) {
    for (int64_t t = first; t <= last; ++t) {
      p.value.mutable_grad() = test::randn({50}, 100 + t, p.value.detach().options());
      optimizer.accumulate();
      optimizer.step(0.01, finite_loss());
      optimizer.confirm();
      optimizer.clear_gradients();
    }
  };
  std::vector<Parameter> whole = {parameter("w", start, true)};
  AdamW unbroken(whole, OptimConfig{});
  run(unbroken, whole[0], 1, 5);
  const std::string file = folder / "optimizer.safetensors";
  checkpoint::write_safetensors(file, unbroken.pack());
  std::vector<Parameter> resumed = {parameter("w", whole[0].value.detach(), true)};
  AdamW again(resumed, OptimConfig{});
  again.unpack(checkpoint::SafetensorsFile(file), 5);
  run(unbroken, whole[0], 6, 9);
  run(again, resumed[0], 6, 9);
  for (size_t i = 0; i < again.pack().size(); ++i) {
    EXPECT_TRUE(test::bit_equal(again.pack()[i].second, unbroken.pack()[i].second));
  }
  EXPECT_TRUE(test::bit_equal(resumed[0].value.detach(), whole[0].value.detach()));
}

TEST(AdamW, UnpackNamesWhatDoesNotFit) {
  const test::TemporaryFolder folder;
  std::vector<Parameter> small = {parameter("w", at::ones({4}, at::kFloat), true)};
  std::vector<Parameter> large = {parameter("w", at::ones({8}, at::kFloat), true)};
  std::vector<Parameter> other = {parameter("x", at::ones({4}, at::kFloat), true)};
  const std::string file = folder / "optimizer.safetensors";
  checkpoint::write_safetensors(file, AdamW(small, OptimConfig{}).pack());
  const checkpoint::SafetensorsFile stored(file);
  EXPECT_REFUSED(AdamW(large, OptimConfig{}).unpack(stored, 1), "moment1.w");
  EXPECT_REFUSED(AdamW(other, OptimConfig{}).unpack(stored, 1), "moment1.x");
}

TEST(GlobalNorm, IsRightAndDoesNotDependOnThreads) {
  std::vector<at::Tensor> tensors = {test::randn({300'001}, 1, at::kFloat),
                                     test::randn({7}, 2, at::kFloat),
                                     test::randn({333, 77}, 3, at::kFloat)};
  double sum = 0;
  for (const auto& tensor : tensors) sum += tensor.to(at::kDouble).square().sum().item<double>();
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const double one = global_norm(tensors).item<double>();
  at::set_num_threads(2);
  const double two = global_norm(tensors).item<double>();
  at::set_num_threads(threads);
  EXPECT_NEAR(one, std::sqrt(sum), 1e-7 * std::sqrt(sum));
  EXPECT_EQ(one, two);
}

}  // namespace
}  // namespace sarissa::train
