// The check that stands before every time of `sarissa bench ops`: right results pass it, wrong ones
// do not, whichever output or gradient they are in.
#include "sarissa/cli/op_check.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <limits>

#include "sarissa/cli/op_cases.h"

namespace sarissa::cli {
namespace {

// More steps than the longest window but one, fewer than the longest filter.
constexpr int64_t kBatch = 2, kLength = 75, kWidth = 64;
constexpr double kWrong = 1.05;  // an error of 0.05, and 0.01 are allowed

class OpCheckTest : public testing::TestWithParam<LayerCase> {
 protected:
  OpCheckTest() : test_(GetParam().make(kBatch, kLength, kWidth)) {
    at::Generator generator = at::detail::createCPUGenerator(1);
    for (const Input& input : test_.inputs) inputs_.push_back(draw(input, kType, generator));
    outputs_ = test_.call.run(inputs_, nullptr);
    for (const at::Tensor& output : outputs_) {
      cotangents_.push_back(draw({.shape = output.sizes().vec()}, kType, generator));
    }
    gradients_ = test_.call.bwd(test_.call.save(inputs_, outputs_), cotangents_);
  }

  double forward(const Tensors& outputs) const { return forward_error(test_, inputs_, outputs); }
  double backward(const Tensors& gradients) const {
    return backward_error(test_, inputs_, cotangents_, gradients);
  }

  static constexpr at::ScalarType kType = at::kBFloat16;
  const double bound_ = error_bound(kType);
  const c10::NoGradGuard no_grad_;
  Case test_;
  Tensors inputs_, outputs_, cotangents_, gradients_;
};

TEST_P(OpCheckTest, RightResultsAreWithinTheBound) {
  EXPECT_LE(forward(outputs_), bound_);
  EXPECT_LE(backward(gradients_), bound_);
}

TEST_P(OpCheckTest, AWrongOutputIsAboveTheBound) {
  for (size_t i = 0; i < outputs_.size(); ++i) {
    Tensors wrong = outputs_;
    wrong[i] = wrong[i] * kWrong;
    EXPECT_GT(forward(wrong), bound_) << "output " << i;
    wrong[i] = at::zeros_like(wrong[i]);
    EXPECT_GT(forward(wrong), bound_) << "output " << i;
  }
}

TEST_P(OpCheckTest, AWrongGradientIsAboveTheBound) {
  for (size_t i = 0; i < gradients_.size(); ++i) {
    Tensors wrong = gradients_;
    wrong[i] = wrong[i] * kWrong;
    EXPECT_GT(backward(wrong), bound_) << "gradient " << i;
  }
}

// What a kernel that skips elements leaves behind in poisoned memory.
TEST_P(OpCheckTest, UnwrittenElementsAreInfinitelyWrong) {
  Tensors outputs = outputs_, gradients = gradients_;
  outputs[0] = outputs[0].clone();
  outputs[0].select(0, 0).select(0, 0).fill_(std::numeric_limits<double>::quiet_NaN());
  EXPECT_EQ(forward(outputs), std::numeric_limits<double>::infinity());
  gradients[0] = at::full(gradients[0].sizes(), std::numeric_limits<double>::quiet_NaN());
  EXPECT_EQ(backward(gradients), std::numeric_limits<double>::infinity());
}

INSTANTIATE_TEST_SUITE_P(LayerCases, OpCheckTest, testing::ValuesIn(layer_cases()),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(RelativeErrorTest, IsOfNorms) {
  const at::Tensor want = at::ones({2, 8}, at::kDouble);
  EXPECT_EQ(relative_error(want, want), 0.0);
  EXPECT_NEAR(relative_error(want * 1.25, want), 0.25, 1e-12);
  EXPECT_GT(relative_error(want * 1.25, want), error_bound(at::kBFloat16));
}

TEST(RelativeErrorTest, OtherShapesAreInfinitelyWrong) {
  const at::Tensor want = at::ones({2, 8});
  EXPECT_EQ(relative_error(want.transpose(0, 1), want), std::numeric_limits<double>::infinity());
}

TEST(RelativeErrorTest, ASmallFieldIsNotHiddenBehindALargeOne) {
  const at::Tensor want = at::ones({3, 10}, at::kDouble);
  want.narrow(1, 2, 8).fill_(1e6);
  const at::Tensor got = want.clone();
  got.narrow(1, 0, 2).mul_(2.0);
  EXPECT_LT(relative_error(got, want), error_bound(at::kFloat));
  EXPECT_NEAR(relative_error(got, want, {2, 8}), 1.0, 1e-12);
}

}  // namespace
}  // namespace sarissa::cli
