#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "sarissa/ops/device.h"
#include "sarissa/ops/ops.h"
#include "tests/support/compare.h"

namespace sarissa {
namespace {

using at::Tensor;
using test::randn;
using test::relative_rms;

constexpr double kEps = 1e-5;

struct Problem {
  std::vector<int64_t> shape;
  bool residual;
};

/// y, sum and the gradients of x, residual (when there is one) and weight.
std::vector<Tensor> run(const Problem& problem, at::ScalarType dtype, at::Device device,
                        bool composition) {
  const auto options = at::TensorOptions().dtype(dtype).device(device);
  // Values that bf16 holds, so that every dtype solves the same problem.
  const auto values = [&](at::IntArrayRef shape, uint64_t seed) {
    return randn(shape, seed).to(at::kBFloat16).to(options);
  };
  const int64_t width = problem.shape.back();
  std::vector<Tensor> inputs{test::strided_copy(values(problem.shape, 1))};
  if (problem.residual) inputs.push_back(test::strided_copy(values(problem.shape, 2)));
  inputs.push_back(values({width}, 3) * 0.25 + 1);
  for (Tensor& input : inputs) input.requires_grad_(true);
  const Tensor &x = inputs.front(), &weight = inputs.back();
  Tensor y, sum;
  if (composition) {
    sum = problem.residual ? x + inputs[1] : x;
    y = weight * sum * (sum.square().mean(-1, true) + kEps).rsqrt();
  } else {
    const auto residual = problem.residual ? std::optional(inputs[1]) : std::nullopt;
    std::tie(y, sum) = ops::residual_rms_norm(x, residual, weight, kEps);
  }
  std::vector<Tensor> out{y, sum};
  const auto gradients =
      torch::autograd::grad({y, sum}, inputs, {values(problem.shape, 4), values(problem.shape, 5)});
  out.insert(out.end(), gradients.begin(), gradients.end());
  return out;
}

void check_all_types(const Problem& problem, at::Device device) {
  const auto want = run(problem, at::kDouble, at::kCPU, true);
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    const auto got = run(problem, dtype, device, false);
    // The plain computation of the same dtype: bf16 inputs, fp32 arithmetic, bf16 results.
    const auto plain =
        run(problem, dtype == at::kDouble ? at::kDouble : at::kFloat, at::kCPU, true);
    const double floor = dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 2e-6 : 1e-3;
    ASSERT_EQ(got.size(), want.size());
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT_EQ(got[i].scalar_type(), dtype);
      EXPECT_LE(relative_rms(got[i], want[i]),
                std::max(floor, 2 * relative_rms(plain[i].to(dtype), want[i])))
          << "result " << i << " of shape " << at::IntArrayRef(problem.shape) << " in " << dtype;
    }
  }
}

const std::vector<Problem> kProblems = {
    {{1, 1}, true},       {{3, 7}, true},     {{2, 5, 33}, false},
    {{2, 5, 33}, true},   {{130, 96}, true},  {{4, 1031}, false},
    {{3, 2, 4096}, true}, {{1000, 24}, true}, {{7, 16384}, true},
};

TEST(Norm, MatchesCompositionInDouble) {
  const test::PoisonMemory poison;
  for (const Problem& problem : kProblems) check_all_types(problem, at::kCPU);
}

TEST(Norm, GradientMatchesFiniteDifferences) {
  const auto f = [](const std::vector<Tensor>& in) {
    const auto [y, sum] = ops::residual_rms_norm(in[0], in[1], in[2], kEps);
    return at::cat({y, sum});
  };
  EXPECT_LE(test::gradient_error(f, {randn({6, 11}, 1), randn({6, 11}, 2), randn({11}, 3)}), 1e-7);
}

TEST(Norm, GradientOfOneResultAlone) {
  const Tensor x = randn({4, 9}, 1).requires_grad_(), weight = randn({9}, 3).requires_grad_();
  const Tensor residual = randn({4, 9}, 2);
  const auto [y, sum] = ops::residual_rms_norm(x, residual, weight, kEps);
  // sum() sends an expanded gradient.
  const auto of_sum = torch::autograd::grad({sum.sum()}, {x, weight}, {}, true, false, true);
  EXPECT_TRUE(at::equal(of_sum[0], at::ones_like(x)));
  EXPECT_FALSE(of_sum[1].defined());
  const auto of_y = torch::autograd::grad({y.sum()}, {x, weight}, {}, true);
  const Tensor s = x + residual;
  const auto want = torch::autograd::grad(
      {(weight * s * (s.square().mean(-1, true) + kEps).rsqrt()).sum()}, {x, weight});
  EXPECT_LE(relative_rms(of_y[0], want[0]), 1e-13);
  EXPECT_LE(relative_rms(of_y[1], want[1]), 1e-13);
}

TEST(Norm, TransposedInputAndEmptyBatch) {
  const Tensor x = randn({9, 4}, 1).t(), weight = randn({9}, 2);
  const auto [y, sum] = ops::residual_rms_norm(x, std::nullopt, weight, kEps);
  const Tensor want =
      std::get<0>(ops::residual_rms_norm(x.contiguous(), std::nullopt, weight, kEps));
  EXPECT_TRUE(test::bit_equal(y, want));
  EXPECT_TRUE(sum.is_same(x));

  const Tensor none = at::zeros({0, 5, 9}, at::kDouble).requires_grad_();
  const Tensor w = weight.clone().requires_grad_();
  const Tensor empty = std::get<0>(ops::residual_rms_norm(none, none, w, kEps));
  EXPECT_EQ(empty.sizes(), none.sizes());
  const auto gradients = torch::autograd::grad({empty.sum()}, {none, w});
  EXPECT_EQ(gradients[0].sizes(), none.sizes());
  EXPECT_TRUE(at::equal(gradients[1], at::zeros_like(weight)));
}

TEST(Norm, RepeatsBitForBitOnAnyNumberOfThreads) {
  const Problem problem{{777, 65}, true};
  at::set_num_threads(1);
  const auto one = run(problem, at::kFloat, at::kCPU, false);
  at::set_num_threads(2);
  const auto two = run(problem, at::kFloat, at::kCPU, false);
  const auto again = run(problem, at::kFloat, at::kCPU, false);
  for (size_t i = 0; i < one.size(); ++i) {
    EXPECT_TRUE(test::bit_equal(one[i], two[i])) << i;
    EXPECT_TRUE(test::bit_equal(two[i], again[i])) << i;
  }
}

TEST(Norm, MetaTensorsGiveShapes) {
  const Tensor x = at::empty({2, 3, 8}, at::TensorOptions().dtype(at::kBFloat16).device(at::kMeta));
  const auto [y, sum] = ops::residual_rms_norm(x, x, at::empty({8}, x.options()), kEps);
  EXPECT_EQ(y.sizes(), x.sizes());
  EXPECT_EQ(sum.sizes(), x.sizes());
  EXPECT_TRUE(y.is_meta());
}

/// The message of the error that f throws.
template <class F>
std::string error_of(const F& f) {
  try {
    f();
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  }
  return "no error";
}

TEST(Norm, RefusesBadInputsByName) {
  const Tensor x = randn({4, 8}, 1), weight = randn({8}, 2);
  const auto message = [](const Tensor& x, const std::optional<Tensor>& residual,
                          const Tensor& weight, double eps) {
    return error_of([&] { ops::residual_rms_norm(x, residual, weight, eps); });
  };
  EXPECT_NE(message(x.to(at::kHalf), {}, weight.to(at::kHalf), kEps).find("x is Half"),
            std::string::npos);
  EXPECT_NE(message(x, {}, randn({7}, 1), kEps).find("weight has shape [7]; expected [8]"),
            std::string::npos);
  EXPECT_NE(message(x, {}, weight.to(at::kFloat), kEps).find("weight is Float"), std::string::npos);
  EXPECT_NE(message(x, randn({8}, 1), weight, kEps).find("residual has shape [8]"),
            std::string::npos);
  EXPECT_NE(message(x, x.to(at::kFloat), weight, kEps).find("residual is Float"),
            std::string::npos);
  EXPECT_NE(message(x, {}, weight, -1).find("eps is -1"), std::string::npos);
}

TEST(Norm, CudaMatchesCompositionInDouble) {
  SKIP_WITHOUT_CUDA();
  const test::PoisonMemory poison;
  for (const Problem& problem : kProblems) check_all_types(problem, at::kCUDA);
}

TEST(Norm, CudaRepeatsBitForBit) {
  SKIP_WITHOUT_CUDA();
  const Problem problem{{3000, 520}, true};
  const auto first = run(problem, at::kBFloat16, at::kCUDA, false);
  const auto again = run(problem, at::kBFloat16, at::kCUDA, false);
  for (size_t i = 0; i < first.size(); ++i) EXPECT_TRUE(test::bit_equal(first[i], again[i])) << i;
}

}  // namespace
}  // namespace sarissa
