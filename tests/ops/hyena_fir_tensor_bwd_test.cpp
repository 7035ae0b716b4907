// The backward of hyena_fir (Hyena-MR) on tensor cores: its plan, and all gradients against the
// operator on the CPU in double.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "sarissa/kernels/fir/fir_channel_bwd_plan.h"
#include "sarissa/kernels/fir/fir_tensor_bwd_plan.h"
#include "sarissa/kernels/fir/fir_tensor_long_bwd_plan.h"
#include "sarissa/ops/device.h"
#include "sarissa/ops/ops.h"
#include "tests/ops/fir_problem.h"
#include "tests/support/compare.h"

namespace sarissa {
namespace {

using at::Tensor;
using kernels::DType;
using kernels::FirChannelBwd;
using kernels::FirTensorBwd;
using kernels::FirTensorLongBwd;
using test::bit_equal;
using test::kA100;
using test::kH100;
using test::kSmall;
using test::plan_problem;
using test::relative_rms;
using Shape = test::FirShape;

FirTensorBwd plan_of(const Shape& s, int64_t shared = kH100) {
  return fir_tensor_bwd_plan(plan_problem(s), DType::kBFloat16, shared);
}

/// What a plan refuses of a problem that it otherwise takes.
template <class PlanOf>
void expect_refuses_states(const PlanOf& plan_of, const Shape& s) {
  EXPECT_TRUE(plan_of(plan_problem(s), DType::kBFloat16, kH100)) << s;
  auto given = plan_problem(s), returned = plan_problem(s);
  given.state = given.x;
  EXPECT_FALSE(plan_of(given, DType::kBFloat16, kH100)) << s;
  returned.d_state_out = returned.x;
  EXPECT_FALSE(plan_of(returned, DType::kBFloat16, kH100)) << s;
}
template <class PlanOf>
void expect_refuses_odd_rows(const PlanOf& plan_of, const Shape& s) {
  auto odd = plan_problem(s);
  EXPECT_TRUE(plan_of(odd, DType::kBFloat16, kH100)) << s;
  odd.dy_stride_l += 4;
  EXPECT_FALSE(plan_of(odd, DType::kBFloat16, kH100)) << s;
}

TEST(HyenaFirTensorBwdPlan, TakesManyTapsInGroupsOfSixteenChannels) {
  EXPECT_STREQ(plan_of({2, 99, 4096, 256, 15}).name, "tensor_w33");
  EXPECT_STREQ(plan_of({2, 99, 4096, 256, 33}).name, "tensor_w33");
  EXPECT_STREQ(plan_of({2, 99, 4096, 256, 34}).name, "tensor_w65");
  EXPECT_STREQ(plan_of({2, 99, 4096, 256, 65}).name, "tensor_w65");
  EXPECT_STREQ(plan_of({2, 99, 80, 5, 66}).name, "tensor_w129");
  EXPECT_STREQ(plan_of({2, 99, 64, 1, 129}).name, "tensor_w129");
  EXPECT_STREQ(plan_of({2, 99, 64, 1, 129}, kA100).name, "tensor_w129");
  EXPECT_FALSE(plan_of({2, 99, 64, 1, 129}, kSmall));
  EXPECT_TRUE(plan_of({2, 99, 64, 1, 65}, kSmall));
  EXPECT_FALSE(plan_of({2, 99, 4096, 256, 14}));
  EXPECT_FALSE(plan_of({2, 99, 4096, 256, 1025}));
  EXPECT_FALSE(plan_of({2, 1, 4096, 256, 128}));
  EXPECT_FALSE(plan_of({2, 99, 64, 8, 128}));
  EXPECT_FALSE(fir_tensor_bwd_plan(plan_problem({2, 99, 64, 4, 128}), DType::kFloat32, kH100));
  EXPECT_FALSE(plan_of({2, 99, 4096, 256, 130}));
  auto carried = plan_problem({2, 99, 64, 4, 129});
  carried.d_state_out = carried.x;
  EXPECT_TRUE(fir_tensor_bwd_plan(carried, DType::kBFloat16, kH100));
  expect_refuses_odd_rows(kernels::fir_tensor_bwd_plan, {2, 99, 64, 4, 128});
}

/// Strips of whole tiles that cover the sequence, none of them empty, and columns of `channels`.
template <class Plan>
void expect_cover(const Plan& plan, const Shape& s, int tile, int channels) {
  EXPECT_EQ(plan.steps % tile, 0) << s;
  EXPECT_GE(int64_t{plan.steps} * plan.strips, s.L) << s;
  EXPECT_LT(int64_t{plan.steps} * (plan.strips - 1), s.L) << s;
  EXPECT_GE(plan.columns * channels, s.D) << s;
  EXPECT_LT((plan.columns - 1) * channels, s.D) << s;
  EXPECT_LE(plan.strips, 65535) << s;
}

TEST(HyenaFirTensorBwdPlan, StripsCoverTimeAndFillTheMachine) {
  for (const Shape& s :
       {Shape{1, 2, 64, 4, 15}, Shape{2, 65, 80, 5, 128}, Shape{1, 2048, 4096, 256, 128},
        Shape{1, 131072, 4096, 256, 128}, Shape{8, 1024, 4096, 256, 128},
        Shape{300, 77, 256, 16, 30}, Shape{1, 1000003, 64, 4, 100}}) {
    expect_cover(plan_of(s), s, kernels::kFirTensorBwdTile, 64);
  }
  EXPECT_EQ(plan_of({1, 2048, 4096, 256, 128}).strips, 4);
  EXPECT_EQ(plan_of({1, 131072, 4096, 256, 128}).strips, 4);
  EXPECT_EQ(plan_of({4, 2048, 4096, 256, 128}).strips, 1);
}

FirTensorLongBwd long_plan_of(const Shape& s, int64_t shared = kH100) {
  return fir_tensor_long_bwd_plan(plan_problem(s), DType::kBFloat16, shared);
}

TEST(HyenaFirTensorLongBwdPlan, TakesMoreTapsWithoutStates) {
  const auto lags_of = [](int64_t taps) { return long_plan_of({2, 99, 4096, 256, taps}).lags; };
  EXPECT_STREQ(long_plan_of({2, 99, 80, 5, 130}).name, "tensor_long");
  EXPECT_EQ(lags_of(129), 0);
  EXPECT_EQ(lags_of(130), 5);
  EXPECT_EQ(lags_of(257), 5);
  EXPECT_EQ(lags_of(258), 9);
  EXPECT_EQ(lags_of(513), 9);
  EXPECT_EQ(lags_of(514), 17);
  EXPECT_EQ(lags_of(1024), 17);
  EXPECT_EQ(lags_of(1025), 0);
  EXPECT_FALSE(long_plan_of({2, 1, 4096, 256, 256}));
  EXPECT_FALSE(long_plan_of({2, 99, 64, 8, 256}));
  EXPECT_FALSE(fir_tensor_long_bwd_plan(plan_problem({2, 99, 64, 4, 256}), DType::kFloat32, kH100));
  expect_refuses_states(kernels::fir_tensor_long_bwd_plan, {2, 99, 64, 4, 256});
  expect_refuses_odd_rows(kernels::fir_tensor_long_bwd_plan, {2, 99, 64, 4, 256});
}

TEST(HyenaFirTensorLongBwdPlan, HistoryHoldsTheTapsAndTwoBlocksShareAMultiprocessor) {
  for (int64_t taps = 130; taps <= 1024; ++taps) {
    const FirTensorLongBwd plan = long_plan_of({1, 8192, 4096, 256, taps});
    // The oldest block that a stride needs lies in the oldest stride, and the tap in its lags.
    EXPECT_GE(plan.delay * kernels::kFirLongStride, taps - 1) << taps;
    EXPECT_GE(16 * (kernels::kFirLongWarps * (plan.lags - 1)) + 1, taps) << taps;
    EXPECT_GE(2 * plan.reach + 1, kernels::fir_tensor_lags(taps) - 1) << taps;
    EXPECT_LE(plan.reach, plan.delay * kernels::kFirLongWarps) << taps;
    EXPECT_LE(2 * (plan.shared_bytes + 1024), kH100) << taps;
  }
}

TEST(HyenaFirTensorLongBwdPlan, StripsCoverTimeAndFillTheMachine) {
  for (const Shape& s : {Shape{1, 2, 64, 4, 130}, Shape{2, 129, 80, 5, 256},
                         Shape{1, 2048, 4096, 256, 512}, Shape{1, 131072, 4096, 256, 1024},
                         Shape{300, 77, 256, 16, 200}, Shape{1, 1000003, 64, 4, 1000}}) {
    expect_cover(long_plan_of(s), s, kernels::kFirLongStride, 16);
  }
  EXPECT_EQ(long_plan_of({1, 2048, 4096, 256, 1024}).strips, 1);
  EXPECT_EQ(long_plan_of({1, 131072, 4096, 256, 1024}).strips, 1);
  EXPECT_EQ(long_plan_of({1, 8192, 1024, 64, 256}).strips, 4);
}

FirChannelBwd channel_plan_of(const Shape& s, int64_t shared = kH100) {
  return fir_channel_bwd_plan(plan_problem(s), DType::kBFloat16, shared);
}

TEST(HyenaFirChannelBwdPlan, TakesOtherGroupsUpTo128TapsWithoutStates) {
  for (const int64_t width : {1, 2, 4, 8}) {
    EXPECT_STREQ(channel_plan_of({2, 99, 4096, 4096 / width, 128}).name, "channel_32");
  }
  EXPECT_STREQ(channel_plan_of({2, 99, 72, 3, 15}).name, "channel_32");
  EXPECT_STREQ(channel_plan_of({2, 99, 4096, 4096, 128}, kA100).name, "channel_16");
  EXPECT_STREQ(channel_plan_of({2, 99, 4096, 4096, 128}, kSmall).name, "channel_16");
  EXPECT_FALSE(channel_plan_of({2, 99, 64, 4, 128}));
  EXPECT_FALSE(channel_plan_of({2, 99, 64, 64, 14}));
  EXPECT_FALSE(channel_plan_of({2, 99, 64, 64, 129}));
  EXPECT_FALSE(channel_plan_of({2, 1, 64, 64, 128}));
  expect_refuses_states(kernels::fir_channel_bwd_plan, {2, 99, 64, 64, 128});
  expect_refuses_odd_rows(kernels::fir_channel_bwd_plan, {2, 99, 64, 64, 128});
}

/// Strips, and with them the bits of the gradients, are the same on any GPU.
TEST(HyenaFirChannelBwdPlan, StripsCoverTime) {
  for (const Shape& s :
       {Shape{1, 2, 64, 64, 15}, Shape{2, 129, 72, 3, 128}, Shape{1, 2048, 4096, 4096, 128},
        Shape{1, 131072, 4096, 512, 128}, Shape{300, 77, 256, 256, 30}}) {
    const FirChannelBwd plan = channel_plan_of(s);
    expect_cover(plan, s, kernels::kFirChannelTile, 8 * plan.slices);
    EXPECT_LE(plan.shared_bytes + 1024, kH100) << s;
    for (const int64_t shared : {kA100, kSmall}) {
      const FirChannelBwd other = channel_plan_of(s, shared);
      EXPECT_EQ(other.steps, plan.steps) << s;
      EXPECT_LE(other.shared_bytes + 1024, shared) << s;
    }
  }
}

/// Gradients of z, featurizer, taps, skip, featurizer state, inner state.
const char* kNames[] = {"dz", "d_featurizer", "d_taps", "d_skip", "d_featurizer_state", "d_state"};

/// The inputs in that order, then the gradients of y and of both states; in double.
struct Problem {
  std::vector<Tensor> inputs, upstream;

  explicit Problem(const Shape& s, uint64_t seed = 17) {
    const auto r = [&](at::IntArrayRef sizes) {
      return test::randn(sizes, seed++).to(at::kBFloat16).to(at::kDouble);
    };
    inputs = {r({s.B, s.L, 3 * s.D}), r({3 * s.D, 3}),       r({s.G, s.W}), r({s.D}),
              r({s.B, 2, 3 * s.D}),   r({s.B, s.W - 1, s.D})};
    upstream = {r({s.B, s.L, s.D}), r({s.B, 2, 3 * s.D}), r({s.B, s.W - 1, s.D})};
  }
};

enum class With { kNothing, kSkip, kStateIn, kStateOut, kAll };

/// Gradients of what `with` has; the others stay undefined.
std::vector<Tensor> gradients(const Problem& p, With with, at::ScalarType dtype, at::Device device,
                              at::ScalarType parameters) {
  const auto inner = dtype == at::kDouble ? at::kDouble : at::kFloat;
  const at::ScalarType types[] = {dtype, parameters, parameters, parameters, dtype, inner};
  std::vector<Tensor> in;
  for (size_t i = 0; i < 6; ++i) {
    in.push_back(p.inputs[i].to(device, types[i]).detach().clone().requires_grad_(true));
  }
  const bool skip = with != With::kNothing, states = with == With::kStateIn || with == With::kAll;
  std::optional<Tensor> maybe_skip;
  if (skip) maybe_skip = in[3];
  std::optional<ops::HyenaState> state;
  if (states) state = {in[4], in[5]};
  const auto [y, out] = ops::hyena_fir(in[0], in[1], in[2], maybe_skip, state);
  std::vector<Tensor> results = {y}, upstream = {p.upstream[0].to(device, dtype)};
  if (with == With::kStateOut || with == With::kAll) {
    results.insert(results.end(), {out.featurizer, out.inner});
    upstream.insert(upstream.end(),
                    {p.upstream[1].to(device, dtype), p.upstream[2].to(device, inner)});
  }
  std::vector<Tensor> leaves = {in[0], in[1], in[2]};
  if (skip) leaves.push_back(in[3]);
  if (states) leaves.insert(leaves.end(), {in[4], in[5]});
  return torch::autograd::grad(results, leaves, upstream);
}

std::vector<Tensor> gradients_on_gpu(const Problem& p, With with, at::ScalarType parameters) {
  return gradients(p, with, at::kBFloat16, at::kCUDA, parameters);
}

/// On the way from dy to dz up to three values are rounded to bfloat16 besides dz (u or dq, q or
/// du, and float taps); few values average less.
double tolerance(const Shape& s, at::ScalarType parameters) {
  const double many = parameters == at::kFloat ? 4.5e-3 : 3.6e-3;
  return s.L < 64 ? 10 * many : 1.3 * many;
}

TEST(HyenaFirTensorBwdCuda, GradientsMatchTheCpuInDouble) {
  SKIP_WITHOUT_CUDA();
  const test::PoisonMemory poison;
  for (const Shape& s :
       {Shape{2, 2, 64, 4, 15}, Shape{1, 15, 16, 1, 128}, Shape{2, 31, 80, 5, 17},
        Shape{1, 33, 144, 9, 33}, Shape{2, 64, 64, 4, 64}, Shape{1, 65, 48, 3, 129},
        Shape{2, 129, 64, 2, 128}, Shape{1, 300, 128, 2, 66}, Shape{3, 521, 80, 5, 128},
        Shape{1, 1031, 192, 12, 100}, Shape{1, 3000, 1024, 64, 128}}) {
    const Problem p(s);
    for (const With with :
         {With::kNothing, With::kSkip, With::kStateIn, With::kStateOut, With::kAll}) {
      const auto want = gradients(p, with, at::kDouble, at::kCPU, at::kDouble);
      for (const auto parameters : {at::kBFloat16, at::kFloat}) {
        const auto got = gradients_on_gpu(p, with, parameters);
        ASSERT_EQ(ops::last_kernel(), plan_of(s).name) << s;
        for (size_t i = 0; i < got.size(); ++i) {
          EXPECT_LE(relative_rms(got[i], want[i]), tolerance(s, parameters))
              << s << " with " << static_cast<int>(with) << ": " << kNames[i];
        }
        const auto again = gradients_on_gpu(p, with, parameters);
        for (size_t i = 0; i < got.size(); ++i) {
          EXPECT_TRUE(bit_equal(again[i], got[i])) << s << ": " << kNames[i];
        }
      }
    }
  }
}

TEST(HyenaFirTensorBwdCuda, GradientsOfNarrowGroupsMatchTheCpuInDouble) {
  SKIP_WITHOUT_CUDA();
  const test::PoisonMemory poison;
  for (const Shape& s :
       {Shape{2, 2, 64, 64, 15}, Shape{1, 33, 72, 3, 33}, Shape{2, 64, 64, 32, 64},
        Shape{1, 128, 40, 10, 128}, Shape{2, 129, 64, 8, 128}, Shape{1, 300, 128, 128, 66},
        Shape{3, 521, 80, 40, 128}, Shape{1, 1031, 24, 6, 100}, Shape{1, 3000, 1024, 1024, 128}}) {
    const Problem p(s);
    for (const With with : {With::kNothing, With::kSkip}) {
      const auto want = gradients(p, with, at::kDouble, at::kCPU, at::kDouble);
      for (const auto parameters : {at::kBFloat16, at::kFloat}) {
        const auto got = gradients_on_gpu(p, with, parameters);
        ASSERT_EQ(ops::last_kernel(), channel_plan_of(s).name) << s;
        const auto again = gradients_on_gpu(p, with, parameters);
        for (size_t i = 0; i < got.size(); ++i) {
          EXPECT_LE(relative_rms(got[i], want[i]), tolerance(s, parameters))
              << s << " with " << static_cast<int>(with) << ": " << kNames[i];
          EXPECT_TRUE(bit_equal(again[i], got[i])) << s << ": " << kNames[i];
        }
      }
    }
  }
}

/// More taps than the march of the other tests takes: each number of lags, few steps and many,
/// one strip and several, a last tap alone in its lag.
TEST(HyenaFirTensorBwdCuda, LongFiltersMatchTheCpuInDouble) {
  SKIP_WITHOUT_CUDA();
  const test::PoisonMemory poison;
  for (const Shape& s :
       {Shape{1, 2, 16, 1, 257}, Shape{1, 64, 64, 4, 130}, Shape{2, 150, 80, 5, 200},
        Shape{1, 700, 64, 2, 384}, Shape{2, 515, 48, 3, 257}, Shape{1, 1030, 32, 2, 513},
        Shape{1, 900, 32, 1, 545}, Shape{1, 1500, 1024, 64, 1024}}) {
    const Problem p(s);
    for (const With with : {With::kNothing, With::kSkip}) {
      const auto want = gradients(p, with, at::kDouble, at::kCPU, at::kDouble);
      const auto got = gradients_on_gpu(p, with, at::kBFloat16);
      ASSERT_EQ(ops::last_kernel(), "tensor_long") << s;
      const auto again = gradients_on_gpu(p, with, at::kBFloat16);
      for (size_t i = 0; i < got.size(); ++i) {
        EXPECT_LE(relative_rms(got[i], want[i]), tolerance(s, at::kBFloat16))
            << s << ": " << kNames[i];
        EXPECT_TRUE(bit_equal(again[i], got[i])) << s << ": " << kNames[i];
      }
    }
  }
}

/// What no tensor core takes: more taps with states, narrow groups with states.
TEST(HyenaFirTensorBwdCuda, OtherShapesFallBack) {
  SKIP_WITHOUT_CUDA();
  for (const Shape& s : {Shape{1, 300, 64, 4, 200}, Shape{1, 300, 64, 4, 1024},
                         Shape{2, 129, 64, 8, 128}, Shape{2, 129, 72, 3, 128}}) {
    const Problem p(s);
    const auto want = gradients(p, With::kAll, at::kDouble, at::kCPU, at::kDouble);
    const auto got = gradients_on_gpu(p, With::kAll, at::kBFloat16);
    EXPECT_EQ(ops::last_kernel(), "stages") << s;
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT_LE(relative_rms(got[i], want[i]), 3.4e-3) << s << ": " << kNames[i];
    }
  }
}

/// Rows of z and of dy inside wider rows.
TEST(HyenaFirTensorBwdCuda, StridedRowsGiveTheSameBits) {
  SKIP_WITHOUT_CUDA();
  const Problem p({2, 131, 64, 4, 128});
  std::vector<Tensor> in;
  for (size_t i = 0; i < 4; ++i) in.push_back(p.inputs[i].to(at::kCUDA, at::kBFloat16));
  const Tensor dy = p.upstream[0].to(at::kCUDA, at::kBFloat16);
  const auto inside = [](const Tensor& x) {
    const int64_t width = x.size(2);
    const Tensor wide = at::full({x.size(0), x.size(1), width + 16}, std::nan(""), x.options());
    wide.slice(2, 8, 8 + width).copy_(x);
    return wide.slice(2, 8, 8 + width);
  };
  const auto dz = [&](const Tensor& z, const Tensor& upstream) {
    const Tensor leaf = z.detach().requires_grad_(true);
    const Tensor y = std::get<0>(ops::hyena_fir(leaf, in[1], in[2], in[3]));
    const Tensor d = torch::autograd::grad({y}, {leaf}, {upstream})[0];
    EXPECT_EQ(ops::last_kernel(), "tensor_w129");
    return d;
  };
  const Tensor want = dz(in[0], dy);
  EXPECT_TRUE(bit_equal(dz(inside(in[0]), dy), want));
  EXPECT_TRUE(bit_equal(dz(in[0], inside(dy)), want));
}

/// Cuts carry the gradients of the states: split and unsplit runs agree.
TEST(HyenaFirTensorBwdCuda, GradientsFlowThroughCarriedStates) {
  SKIP_WITHOUT_CUDA();
  const Shape s = {2, 300, 64, 4, 128};
  const Problem p(s);
  const auto want = gradients(p, With::kSkip, at::kDouble, at::kCPU, at::kDouble);
  std::vector<Tensor> in;
  for (size_t i = 0; i < 4; ++i) {
    in.push_back(p.inputs[i].to(at::kCUDA, at::kBFloat16).requires_grad_(true));
  }
  std::optional<ops::HyenaState> state;
  std::vector<Tensor> parts;
  for (const auto& [begin, end] : {std::pair{0, 17}, {17, 150}, {150, 300}}) {
    auto [y, next] = ops::hyena_fir(in[0].slice(1, begin, end), in[1], in[2], in[3], state);
    parts.push_back(y);
    state = next;
  }
  const auto got =
      torch::autograd::grad({at::cat(parts, 1)}, in, {p.upstream[0].to(at::kCUDA, at::kBFloat16)});
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_LE(relative_rms(got[i], want[i]), 6e-3) << kNames[i];
  }
}

}  // namespace
}  // namespace sarissa
