#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "sarissa/ops/device.h"
#include "sarissa/ops/ops.h"
#include "tests/support/compare.h"

namespace sarissa {
namespace {

using at::Tensor;
using test::randn;
using test::relative_rms;

at::ScalarType compute_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

/// Targets over all classes; every fifth token has none.
Tensor targets_of(int64_t rows, int64_t classes) {
  const Tensor targets = at::arange(rows, at::kLong).mul(7919).remainder(classes);
  for (int64_t n = 3; n < rows; n += 5) targets[n] = -100;
  return targets;
}

Tensor composition(const Tensor& logits, const Tensor& targets) {
  const Tensor wanted = targets.clamp_min(0).unsqueeze(1);
  const Tensor loss = -logits.log_softmax(1).gather(1, wanted).squeeze(1);
  return loss.masked_fill(targets == -100, 0.0);
}

/// Per-token losses and the gradient of the logits.
std::vector<Tensor> run(int64_t rows, int64_t classes, at::ScalarType dtype, at::Device device,
                        bool plain) {
  const auto options = at::TensorOptions().dtype(dtype).device(device);
  const Tensor logits =
      test::strided_copy((randn({rows, classes}, 1) * 4).to(at::kBFloat16).to(options))
          .requires_grad_();
  const Tensor targets = targets_of(rows, classes).to(device);
  const Tensor loss = plain ? composition(logits, targets) : ops::cross_entropy(logits, targets);
  const Tensor upstream = randn({rows}, 2).to(at::kFloat).to(loss.options());
  return {loss, torch::autograd::grad({loss}, {logits}, {upstream})[0]};
}

void check_all_types(at::Device device) {
  const std::pair<int64_t, int64_t> problems[] = {{1, 1},    {1, 2},    {5, 7},    {6, 31},
                                                  {33, 512}, {9, 1033}, {4, 50257}};
  for (const auto& [rows, classes] : problems) {
    const auto want = run(rows, classes, at::kDouble, at::kCPU, true);
    for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
      const auto got = run(rows, classes, dtype, device, false);
      const auto plain = run(rows, classes, compute_type(dtype), at::kCPU, true);
      EXPECT_EQ(got[0].scalar_type(), compute_type(dtype));
      EXPECT_EQ(got[1].scalar_type(), dtype);
      const double floor = dtype == at::kDouble ? 1e-13 : 1e-6;
      EXPECT_LE(relative_rms(got[0], want[0]), std::max(floor, 2 * relative_rms(plain[0], want[0])))
          << "loss of " << rows << " x " << classes << " in " << dtype;
      EXPECT_LE(relative_rms(got[1], want[1]),
                std::max(dtype == at::kBFloat16 ? 1e-3 : floor,
                         2 * relative_rms(plain[1].to(dtype), want[1])))
          << "gradient of " << rows << " x " << classes << " in " << dtype;
    }
  }
}

TEST(CrossEntropy, MatchesCompositionInDouble) {
  const test::PoisonMemory poison;
  check_all_types(at::kCPU);
}

TEST(CrossEntropy, GradientMatchesFiniteDifferences) {
  const Tensor targets = targets_of(6, 11);
  const auto f = [&](const std::vector<Tensor>& in) { return ops::cross_entropy(in[0], targets); };
  EXPECT_LE(test::gradient_error(f, {randn({6, 11}, 1)}), 1e-7);
}

TEST(CrossEntropy, LargeLogitsNeitherOverflowNorVanish) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    Tensor logits = at::full({2, 40}, -2e4, dtype);
    logits[0][3] = 2e4;
    logits[1][3] = 2e4;
    logits[1][35] = 2e4;
    const Tensor loss = ops::cross_entropy(logits, at::tensor({3, 35}, at::kLong));
    EXPECT_EQ(loss[0].item<double>(), 0.0);
    EXPECT_NEAR(loss[1].item<double>(), std::log(2.0), 2e-3);  // 2e4 + log 2 in float
    const Tensor masked = at::full({1, 40}, -INFINITY, dtype);
    masked[0][5] = 1.0;
    EXPECT_EQ(ops::cross_entropy(masked, at::tensor({5}, at::kLong)).item<double>(), 0.0);
  }
}

TEST(CrossEntropy, RepeatsBitForBitOnAnyNumberOfThreads) {
  at::set_num_threads(1);
  const auto one = run(400, 513, at::kFloat, at::kCPU, false);
  at::set_num_threads(2);
  const auto two = run(400, 513, at::kFloat, at::kCPU, false);
  EXPECT_TRUE(test::bit_equal(one[0], two[0]));
  EXPECT_TRUE(test::bit_equal(one[1], two[1]));
}

TEST(CrossEntropy, EmptyAndMetaInputs) {
  EXPECT_EQ(ops::cross_entropy(at::zeros({0, 5}), at::zeros({0}, at::kLong)).size(0), 0);
  const Tensor meta = ops::cross_entropy(
      at::empty({4, 5}, at::TensorOptions().device(at::kMeta).dtype(at::kBFloat16)),
      at::empty({4}, at::TensorOptions().device(at::kMeta).dtype(at::kLong)));
  EXPECT_EQ(meta.sizes(), at::IntArrayRef({4}));
  EXPECT_EQ(meta.scalar_type(), at::kFloat);
}

TEST(CrossEntropy, RefusesBadInputsByName) {
  const auto message = [](const Tensor& logits, const Tensor& targets) -> std::string {
    try {
      ops::cross_entropy(logits, targets);
    } catch (const c10::Error& e) {
      return e.what_without_backtrace();
    }
    return "no error";
  };
  const Tensor logits = randn({3, 5}, 1);
  EXPECT_NE(
      message(logits, at::tensor({0, 5, 1}, at::kLong)).find("targets[1] is 5; expected 0 .. 4"),
      std::string::npos);
  EXPECT_NE(message(logits, at::tensor({0, 1, -1}, at::kLong)).find("targets[2] is -1"),
            std::string::npos);
  EXPECT_NE(message(logits, at::zeros({2}, at::kLong)).find("targets is Long [2]"),
            std::string::npos);
  EXPECT_NE(message(logits, at::zeros({3}, at::kInt)).find("targets is Int"), std::string::npos);
  EXPECT_NE(message(logits.to(at::kHalf), at::zeros({3}, at::kLong)).find("logits is Half"),
            std::string::npos);
}

/// The loss and the gradients of hidden, head and weights.
std::vector<Tensor> run_linear(int64_t tokens, int64_t width, int64_t classes, at::ScalarType dtype,
                               at::Device device, bool plain) {
  const auto options = at::TensorOptions().dtype(dtype).device(device);
  const auto values = [&](at::IntArrayRef shape, uint64_t seed, double scale) {
    return (randn(shape, seed) * scale).to(at::kBFloat16).to(options);
  };
  const Tensor hidden = test::strided_copy(values({tokens, width}, 1, 1.0)).requires_grad_();
  const Tensor head =
      values({classes, width}, 2, 1.0 / std::sqrt(static_cast<double>(width))).requires_grad_();
  const Tensor targets = targets_of(tokens, classes).to(device);
  Tensor weights = (randn({tokens}, 3).abs() / static_cast<double>(tokens)).to(at::kFloat);
  weights = weights.to(device, compute_type(dtype));
  weights[0] = 0.0;
  weights.requires_grad_();
  const Tensor loss =
      plain ? (composition(hidden.matmul(head.t()).to(weights.scalar_type()), targets) * weights)
                  .sum()
            : ops::linear_cross_entropy(hidden, head, targets, weights);
  const auto gradients = torch::autograd::grad({loss * 3.0}, {hidden, head, weights});
  return {loss, gradients[0], gradients[1], gradients[2]};
}

void check_linear(at::Device device) {
  const std::tuple<int64_t, int64_t, int64_t> problems[] = {
      {1, 1, 1}, {7, 5, 11}, {300, 33, 512}, {200, 8, 70001}};  // the last needs two chunks
  for (const auto& [tokens, width, classes] : problems) {
    const auto want = run_linear(tokens, width, classes, at::kDouble, at::kCPU, true);
    for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
      const auto got = run_linear(tokens, width, classes, dtype, device, false);
      const auto plain = run_linear(tokens, width, classes, dtype, at::kCPU, true);
      const double floor = dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 3e-6 : 3e-3;
      for (size_t i = 0; i < got.size(); ++i) {
        EXPECT_EQ(got[i].scalar_type(), plain[i].scalar_type());
        EXPECT_LE(relative_rms(got[i], want[i]),
                  std::max(floor, 2 * relative_rms(plain[i], want[i])))
            << "result " << i << " of " << tokens << " x " << width << " x " << classes << " in "
            << dtype;
      }
    }
  }
}

TEST(LinearCrossEntropy, MatchesCompositionInDouble) {
  const test::PoisonMemory poison;
  check_linear(at::kCPU);
}

TEST(LinearCrossEntropy, GradientMatchesFiniteDifferences) {
  const Tensor targets = targets_of(9, 7);
  const auto f = [&](const std::vector<Tensor>& in) {
    return ops::linear_cross_entropy(in[0], in[1], targets, in[2]);
  };
  EXPECT_LE(test::gradient_error(f, {randn({9, 5}, 1), randn({7, 5}, 2), randn({9}, 3)}), 1e-7);
}

TEST(LinearCrossEntropy, NeedsNoGradient) {
  const Tensor hidden = randn({9, 5}, 1).requires_grad_(), head = randn({7, 5}, 2).requires_grad_();
  const Tensor targets = targets_of(9, 7), weights = at::ones({9}, at::kDouble);
  const Tensor with = ops::linear_cross_entropy(hidden, head, targets, weights);
  {
    const c10::NoGradGuard guard;
    const Tensor without = ops::linear_cross_entropy(hidden, head, targets, weights);
    EXPECT_FALSE(without.requires_grad());
    EXPECT_EQ(without.item<double>(), with.item<double>());
  }
  // Only one of the inputs asks.
  const Tensor dhead = torch::autograd::grad({with}, {head})[0];
  const Tensor only = ops::linear_cross_entropy(hidden.detach(), head, targets, weights);
  EXPECT_TRUE(test::bit_equal(torch::autograd::grad({only}, {head})[0], dhead));
  EXPECT_EQ(ops::linear_cross_entropy(hidden.narrow(0, 0, 0), head, targets.narrow(0, 0, 0),
                                      weights.narrow(0, 0, 0))
                .item<double>(),
            0.0);
}

TEST(LinearCrossEntropy, RefusesBadInputsByName) {
  const auto message = [](const Tensor& hidden, const Tensor& head, const Tensor& targets,
                          const Tensor& weights) -> std::string {
    try {
      ops::linear_cross_entropy(hidden, head, targets, weights);
    } catch (const c10::Error& e) {
      return e.what_without_backtrace();
    }
    return "no error";
  };
  const Tensor hidden = randn({3, 5}, 1), head = randn({7, 5}, 2);
  const Tensor targets = at::zeros({3}, at::kLong), weights = at::ones({3}, at::kDouble);
  EXPECT_NE(message(hidden[0], head, targets, weights).find("hidden has shape"), std::string::npos);
  EXPECT_NE(message(hidden, head.t(), targets, weights).find("head is Double [5, 7]"),
            std::string::npos);
  EXPECT_NE(message(hidden, head, targets.narrow(0, 0, 2), weights).find("targets is Long [2]"),
            std::string::npos);
  EXPECT_NE(message(hidden, head, targets, weights.to(at::kFloat)).find("weights is Float"),
            std::string::npos);
  EXPECT_NE(message(hidden, head, targets + 7, weights).find("targets[0] is 7"), std::string::npos);
}

TEST(CrossEntropy, CudaMatchesCompositionInDouble) {
  SKIP_WITHOUT_CUDA();
  const test::PoisonMemory poison;
  check_all_types(at::kCUDA);
}

TEST(CrossEntropy, CudaGivesNanForBadTargets) {
  SKIP_WITHOUT_CUDA();
  const Tensor logits = randn({3, 5}, 1).to(at::kCUDA, at::kFloat).requires_grad_();
  const Tensor loss = ops::cross_entropy(logits, at::tensor({1, 5, -7}, at::kLong).to(at::kCUDA));
  EXPECT_TRUE(std::isfinite(loss[0].item<float>()));
  EXPECT_TRUE(std::isnan(loss[1].item<float>()));
  EXPECT_TRUE(std::isnan(loss[2].item<float>()));
  EXPECT_TRUE(torch::autograd::grad({loss.sum()}, {logits})[0][1].isnan().all().item<bool>());
}

TEST(LinearCrossEntropy, CudaMatchesCompositionInDouble) {
  SKIP_WITHOUT_CUDA();
  const test::PoisonMemory poison;
  check_linear(at::kCUDA);
}

}  // namespace
}  // namespace sarissa
