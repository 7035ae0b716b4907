// The forward of hyena_fir (Hyena-MR) on tensor cores: its plan, and its contracts against the
// operator on the CPU in double.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "sarissa/kernels/fir/fir_channel_plan.h"
#include "sarissa/kernels/fir/fir_tensor_plan.h"
#include "sarissa/ops/device.h"
#include "sarissa/ops/ops.h"
#include "tests/ops/fir_problem.h"
#include "tests/support/compare.h"

namespace sarissa {
namespace {

using at::Tensor;
using kernels::DType;
using kernels::FirChannelFwd;
using kernels::FirTensorFwd;
using test::bit_equal;
using test::kA100;
using test::kH100;
using test::kSmall;
using test::plan_problem;
using test::relative_rms;
using Shape = test::FirShape;

constexpr auto kBF16 = DType::kBFloat16;

/// The plan of 4096 channels in `groups` groups, with any number of taps, fits every GPU.
template <class MakePlan>
void expect_every_gpu_takes(int64_t groups, const MakePlan& make_plan) {
  for (const int64_t shared : {kH100, kA100, kSmall}) {
    for (int64_t W = 15; W <= 1024; ++W) {
      const auto plan = make_plan(plan_problem({1, 8192, 4096, groups, W}), kBF16, shared);
      ASSERT_TRUE(plan) << W << " taps, " << shared;
      EXPECT_LE(plan.shared_bytes + 1024, shared) << W;
      EXPECT_GE(16 * (plan.lags - 1), W - 1) << W;
      EXPECT_GE(plan.history, plan.lags - 1 + plan.tile_blocks()) << W;
      EXPECT_EQ(plan.history % plan.tile_blocks(), 0) << W;
    }
  }
}

/// Strips hold all steps, and columns of slices of `slice` channels all channels.
template <class Plan>
void expect_strips_cover_time(const Plan& plan, int64_t slice, const Shape& s) {
  EXPECT_EQ(plan.steps % plan.tile_steps(), 0) << s;
  EXPECT_EQ(plan.lead % plan.tile_steps(), 0) << s;
  if (plan.strips == 1) EXPECT_EQ(plan.lead, 0) << s;
  EXPECT_GE(plan.lead + int64_t{plan.steps} * plan.strips, s.L) << s;
  EXPECT_LT(plan.lead + int64_t{plan.steps} * (plan.strips - 1), s.L) << s;
  EXPECT_GE(plan.columns * slice * plan.slices, s.D) << s;
}

TEST(HyenaFirTensorPlan, TakesManyTapsInGroupsOfSixteenChannels) {
  const auto takes = [](const Shape& s) { return fir_tensor_takes(plan_problem(s), kBF16); };
  for (const int64_t W : {15, 16, 128, 1024}) EXPECT_TRUE(takes({2, 99, 4096, 256, W})) << W;
  EXPECT_TRUE(takes({2, 99, 80, 5, 128}));
  EXPECT_TRUE(takes({2, 99, 96, 3, 128}));
  EXPECT_TRUE(takes({2, 99, 64, 1, 128}));
  EXPECT_FALSE(takes({2, 99, 4096, 256, 14}));
  EXPECT_FALSE(takes({2, 99, 4096, 256, 1025}));
  EXPECT_FALSE(takes({2, 99, 64, 8, 128}));
  EXPECT_FALSE(takes({2, 99, 48, 2, 128}));
  EXPECT_FALSE(takes({70000, 99, 64, 4, 128}));
  EXPECT_FALSE(fir_tensor_takes(plan_problem({2, 99, 64, 4, 128}), DType::kFloat32));
  auto odd = plan_problem({2, 99, 64, 4, 128});
  odd.x_stride_l += 4;
  EXPECT_FALSE(fir_tensor_takes(odd, kBF16));
  odd = plan_problem({2, 99, 64, 4, 128});
  odd.x = reinterpret_cast<const void*>(uintptr_t{4096 + 2});
  EXPECT_FALSE(fir_tensor_takes(odd, kBF16));
  odd = plan_problem({2, 99, 64, 4, 128});
  odd.featurizer = nullptr;
  EXPECT_FALSE(fir_tensor_takes(odd, kBF16));
  EXPECT_FALSE(fir_tensor_fwd_plan(odd, kBF16, kH100));
}

TEST(HyenaFirTensorPlan, FitsTheSharedMemoryOfEveryGpu) {
  expect_every_gpu_takes(256, kernels::fir_tensor_fwd_plan);
  const auto name = [](int64_t W, int64_t shared) {
    return fir_tensor_fwd_plan(plan_problem({1, 65536, 4096, 256, W}), kBF16, shared).name;
  };
  EXPECT_STREQ(name(1024, kSmall), "tensor_32x32_s2");
  EXPECT_STREQ(name(1024, kA100), "tensor_32x32_s2");
}

TEST(HyenaFirTensorPlan, StripsCoverTime) {
  for (const Shape& s : {Shape{1, 2, 64, 4, 15}, Shape{2, 65, 80, 5, 128},
                         Shape{1, 2048, 4096, 256, 128}, Shape{1, 131072, 4096, 256, 128},
                         Shape{8, 1024, 4096, 256, 128}, Shape{1, 8192, 4096, 256, 1024},
                         Shape{300, 77, 256, 16, 30}, Shape{1, 1000003, 64, 4, 500}}) {
    expect_strips_cover_time(fir_tensor_fwd_plan(plan_problem(s), kBF16, kH100), 16, s);
  }
}

TEST(HyenaFirChannelPlan, TakesOtherGroups) {
  const auto takes = [](const Shape& s) { return fir_channel_takes(plan_problem(s), kBF16); };
  for (const int64_t W : {15, 16, 128, 1024}) EXPECT_TRUE(takes({2, 99, 4096, 4096, W})) << W;
  for (const int64_t width : {1, 2, 4, 8}) EXPECT_TRUE(takes({2, 99, 64, 64 / width, 128}));
  EXPECT_TRUE(takes({2, 99, 72, 3, 128}));
  EXPECT_TRUE(takes({2, 99, 8, 1, 128}));
  EXPECT_FALSE(takes({2, 99, 64, 4, 128}));
  EXPECT_FALSE(takes({2, 99, 60, 60, 128}));
  EXPECT_FALSE(takes({2, 99, 64, 64, 14}));
  EXPECT_FALSE(takes({2, 99, 64, 64, 1025}));
  EXPECT_FALSE(fir_channel_takes(plan_problem({2, 99, 64, 64, 128}), DType::kFloat32));
  EXPECT_FALSE(fir_channel_fwd_plan(plan_problem({2, 99, 64, 4, 128}), kBF16, kH100));
}

TEST(HyenaFirChannelPlan, FitsTheSharedMemoryOfEveryGpu) {
  expect_every_gpu_takes(4096, kernels::fir_channel_fwd_plan);
  const auto name = [](int64_t W, int64_t shared) {
    return fir_channel_fwd_plan(plan_problem({1, 8192, 4096, 4096, W}), kBF16, shared).name;
  };
  EXPECT_STREQ(name(128, kH100), "channel_32");
  EXPECT_STREQ(name(128, kA100), "channel_32");
  EXPECT_STREQ(name(1024, kH100), "channel_16");
  EXPECT_STREQ(name(1024, kSmall), "channel_8");
}

TEST(HyenaFirChannelPlan, StripsCoverTime) {
  for (const Shape& s : {Shape{1, 2, 64, 64, 15}, Shape{2, 129, 72, 3, 128},
                         Shape{1, 8192, 4096, 512, 128}, Shape{1, 131072, 4096, 4096, 128},
                         Shape{1, 8192, 4096, 4096, 1024}, Shape{300, 77, 256, 256, 30}}) {
    expect_strips_cover_time(fir_channel_fwd_plan(plan_problem(s), kBF16, kH100), 8, s);
  }
}

/// z, featurizer, taps, skip, featurizer state, inner state, all values of bfloat16; in double.
struct Problem {
  Tensor z, featurizer, taps, skip, featurizer_state, inner_state;

  explicit Problem(const Shape& s, uint64_t seed = 11) {
    const auto r = [&](at::IntArrayRef sizes) {
      return test::randn(sizes, seed++).to(at::kBFloat16).to(at::kDouble);
    };
    z = r({s.B, s.L, 3 * s.D});
    featurizer = r({3 * s.D, 3});
    taps = r({s.G, s.W});
    skip = r({s.D});
    featurizer_state = r({s.B, 2, 3 * s.D});
    inner_state = r({s.B, s.W - 1, s.D});
  }

  Problem on_gpu(at::ScalarType parameters) const {
    Problem p = *this;
    for (Tensor* t : {&p.z, &p.featurizer_state}) *t = t->to(at::kCUDA, at::kBFloat16);
    for (Tensor* t : {&p.featurizer, &p.taps, &p.skip}) *t = t->to(at::kCUDA, parameters);
    p.inner_state = inner_state.to(at::kCUDA, at::kFloat);
    return p;
  }

  std::tuple<Tensor, ops::HyenaState> run(bool with_skip = true, bool with_state = true) const {
    std::optional<Tensor> maybe_skip;
    if (with_skip) maybe_skip = skip;
    std::optional<ops::HyenaState> state;
    if (with_state) state = {featurizer_state, inner_state};
    return ops::hyena_fir(z, featurizer, taps, maybe_skip, state);
  }
};

const std::vector<Shape> kShapes = {
    {1, 2, 64, 4, 15},        {2, 15, 16, 1, 128},   {1, 16, 80, 5, 17},     {2, 17, 64, 4, 64},
    {1, 31, 144, 9, 33},      {2, 33, 48, 3, 128},   {1, 64, 64, 2, 128},    {2, 65, 64, 1, 16},
    {1, 127, 96, 3, 129},     {2, 128, 128, 8, 100}, {1, 129, 64, 4, 130},   {1, 300, 192, 12, 128},
    {3, 521, 80, 5, 128},     {1, 1031, 64, 4, 257}, {1, 1500, 64, 4, 1024}, {2, 40, 64, 4, 1024},
    {1, 3000, 1024, 64, 128},
};

/// Groups that are no multiple of 16 channels.
const std::vector<Shape> kNarrowShapes = {
    {2, 17, 128, 128, 64},  {1, 31, 256, 32, 33},       {2, 127, 64, 16, 128},
    {1, 128, 72, 3, 100},   {2, 129, 64, 32, 15},       {1, 300, 40, 5, 129},
    {3, 521, 80, 80, 128},  {1, 1031, 64, 64, 257},     {1, 1500, 64, 8, 1024},
    {2, 40, 128, 32, 1023}, {1, 3000, 1024, 1024, 128},
};

/// The bfloat16 rule: at most twice the error of rounding the exact result once. u and taps are
/// rounded before they are multiplied, besides y.
void expect_match(const std::vector<Shape>& shapes, const std::string& kernel) {
  const test::PoisonMemory poison;
  for (const Shape& s : shapes) {
    const Problem exact(s);
    const Problem p = exact.on_gpu(at::kBFloat16);
    for (const bool with_skip : {false, true}) {
      for (const bool with_state : {false, true}) {
        const auto [want, want_state] = exact.run(with_skip, with_state);
        const auto [got, state] = p.run(with_skip, with_state);
        ASSERT_EQ(ops::last_kernel().substr(0, kernel.size()), kernel) << s;
        EXPECT_LE(relative_rms(got, want), 2 * relative_rms(want.to(at::kBFloat16), want)) << s;
        EXPECT_TRUE(bit_equal(state.featurizer.cpu(), want_state.featurizer.to(at::kBFloat16)))
            << s;
        EXPECT_LE(relative_rms(state.inner, want_state.inner), 3e-7) << s;
        const auto [again, again_state] = p.run(with_skip, with_state);
        EXPECT_TRUE(bit_equal(again, got)) << s;
        EXPECT_TRUE(bit_equal(again_state.inner, state.inner)) << s;
      }
    }
  }
}

TEST(HyenaFirTensorCuda, MatchesTheCpuInDouble) {
  SKIP_WITHOUT_CUDA();
  expect_match(kShapes, "tensor_");
}
TEST(HyenaFirTensorCuda, NarrowGroupsMatchTheCpuInDouble) {
  SKIP_WITHOUT_CUDA();
  expect_match(kNarrowShapes, "channel_");
}

TEST(HyenaFirTensorCuda, TakesFloatParameters) {
  SKIP_WITHOUT_CUDA();
  for (const Shape& s : {Shape{2, 137, 64, 4, 128}, Shape{1, 70, 80, 5, 31},
                         Shape{2, 137, 64, 64, 128}, Shape{1, 270, 80, 10, 31}}) {
    Problem exact(s);
    const Tensor wide = exact.taps = test::randn({s.G, s.W}, 3);
    const Tensor want = std::get<0>(exact.run());
    EXPECT_LE(relative_rms(std::get<0>(exact.on_gpu(at::kFloat).run()), want), 5e-3) << s;
    // The same bits as from taps that were rounded before.
    const Tensor got = std::get<0>(exact.on_gpu(at::kBFloat16).run());
    EXPECT_TRUE(bit_equal(std::get<0>(exact.on_gpu(at::kFloat).run()), got)) << s;
  }
}

/// Sums depend on the step alone: a cut at a multiple of 16 and appended tokens change no bit of y.
/// Any other cut changes the order of sums. States are the same bits always.
TEST(HyenaFirTensorCuda, SplitsCarryTheStates) {
  SKIP_WITHOUT_CUDA();
  for (const Shape& s :
       {Shape{1, 300, 64, 4, 128}, Shape{2, 131, 80, 5, 33}, Shape{1, 700, 64, 4, 500},
        Shape{1, 4096, 1024, 64, 128}, Shape{1, 300, 64, 64, 128}, Shape{2, 131, 40, 5, 33},
        Shape{1, 700, 64, 16, 500}, Shape{1, 4096, 1024, 512, 128}}) {
    const Problem p = Problem(s).on_gpu(at::kBFloat16);
    const auto [y, state] = p.run();
    for (const int64_t cut : {int64_t{2}, int64_t{16}, int64_t{31}, int64_t{32}, s.W - 1, s.W,
                              int64_t{64}, int64_t{112}, s.L - 2, s.L / 32 * 16}) {
      Problem head = p, tail = p;
      head.z = p.z.slice(1, 0, cut);
      tail.z = p.z.slice(1, cut);
      const auto [y1, state1] = head.run();
      tail.featurizer_state = state1.featurizer;
      tail.inner_state = state1.inner;
      const auto [y2, state2] = tail.run();
      EXPECT_TRUE(bit_equal(y1, y.slice(1, 0, cut))) << s << " cut " << cut;
      EXPECT_TRUE(bit_equal(state2.featurizer, state.featurizer)) << s << " cut " << cut;
      EXPECT_TRUE(bit_equal(state2.inner, state.inner)) << s << " cut " << cut;
      if (cut % 16 == 0) {
        EXPECT_TRUE(bit_equal(y2, y.slice(1, cut))) << s << " cut " << cut;
      } else {
        EXPECT_LE(relative_rms(y2, y.slice(1, cut)), 1e-3) << s << " cut " << cut;
      }
    }
  }
}

/// Steps sum in single precision, what is not rounded before.
TEST(HyenaFirTensorCuda, StepsFollowTheSequence) {
  SKIP_WITHOUT_CUDA();
  for (const Shape& s : {Shape{2, 40, 64, 4, 128}, Shape{2, 140, 64, 32, 128}}) {
    const Problem p = Problem(s).on_gpu(at::kBFloat16);
    const auto [y, state] = p.run();
    Problem step = p;
    std::vector<Tensor> rows;
    for (int64_t t = 0; t < s.L; ++t) {
      step.z = p.z.slice(1, t, t + 1);
      const auto [row, next] = step.run();
      rows.push_back(row);
      step.featurizer_state = next.featurizer;
      step.inner_state = next.inner;
    }
    EXPECT_LE(relative_rms(at::cat(rows, 1), y), 5e-3) << s;
    EXPECT_TRUE(bit_equal(step.inner_state, state.inner)) << s;
  }
}

TEST(HyenaFirTensorCuda, StridedRowsGiveTheSameBits) {
  SKIP_WITHOUT_CUDA();
  for (const int64_t groups : {4, 16}) {
    const Problem p = Problem({2, 131, 64, groups, 128}).on_gpu(at::kBFloat16);
    const auto [y, state] = p.run();
    for (const int64_t shift : {0, 8, 1}) {
      const Tensor wide = at::full({2, 131, 3 * 64 + 16}, std::nan(""), p.z.options());
      Problem strided = p;
      strided.z = wide.slice(2, shift, shift + 3 * 64);
      strided.z.copy_(p.z);
      const auto [got, got_state] = strided.run();
      if (shift % 8 == 0) {
        EXPECT_TRUE(bit_equal(got, y)) << shift;
      } else {  // not aligned: another kernel
        EXPECT_EQ(ops::last_kernel(), "stages");
        EXPECT_LE(relative_rms(got, y), 5e-3);
      }
      EXPECT_TRUE(bit_equal(got_state.featurizer, state.featurizer)) << shift;
    }
  }
}

}  // namespace
}  // namespace sarissa
