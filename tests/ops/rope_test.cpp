#include <ATen/ATen.h>
#include <ATen/Parallel.h>
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

/// In double, one rotation matrix entry at a time.
Tensor composition(const Tensor& x, const Tensor& inv_freq, int64_t position, double scale) {
  const int64_t length = x.size(1), half = x.size(3) / 2;
  const Tensor steps = (at::arange(length, at::kDouble) + position) / scale;
  const Tensor angle = (steps.unsqueeze(1) * inv_freq.to(at::kCPU, at::kDouble))
                           .reshape({length, 1, half})
                           .to(x.options());
  const Tensor low = x.narrow(3, 0, half), high = x.narrow(3, half, half);
  return at::cat({low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()},
                 3);
}

void check_all_types(at::Device device) {
  struct Problem {
    int64_t batch, length, heads, width, position;
    double scale;
  };
  const Problem problems[] = {{1, 1, 1, 2, 0, 1.0},
                              {2, 37, 3, 16, 5, 1.0},
                              {1, 64, 4, 64, 1000, 4.0},
                              {2, 3, 2, 300, 123456, 1.0},
                              {1, 11, 2, 128, 10'000'000, 1.0}};
  for (const Problem& p : problems) {
    const Tensor inv_freq = ops::rope_inverse_frequencies(p.width, 10000.0, device);
    // q is the first third of a packed projection.
    const Tensor packed = randn({p.batch, p.length, 3 * p.heads, p.width}, 1).to(at::kBFloat16);
    const Tensor upstream = randn({p.batch, p.length, p.heads, p.width}, 2).to(at::kBFloat16);
    const auto run = [&](at::ScalarType dtype, bool plain) {
      const auto options = at::TensorOptions().dtype(dtype).device(plain ? at::kCPU : device);
      const Tensor qkv = packed.to(options).requires_grad_();
      const Tensor q = qkv.narrow(2, 0, p.heads);
      const Tensor y = plain ? composition(q, inv_freq, p.position, p.scale)
                             : ops::rope(q, inv_freq, p.position, p.scale);
      return std::vector<Tensor>{y, torch::autograd::grad({y}, {qkv}, {upstream.to(options)})[0]};
    };
    const auto want = run(at::kDouble, true);
    for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
      const auto got = run(dtype, false);
      // Cosine and sine of a double angle of up to 1e7 radians are good to 1e-9.
      const double bound = dtype == at::kDouble ? 1e-9 : dtype == at::kFloat ? 3e-7 : 3e-3;
      for (size_t i = 0; i < 2; ++i) {
        EXPECT_EQ(got[i].scalar_type(), dtype);
        EXPECT_LE(relative_rms(got[i], want[i]), bound)
            << "result " << i << " at position " << p.position << " width " << p.width << " in "
            << dtype;
      }
    }
  }
}

TEST(Rope, MatchesCompositionInDouble) {
  const test::PoisonMemory poison;
  check_all_types(at::kCPU);
}

TEST(Rope, RotatesByTheAngle) {
  // One pair at (1, 0), frequency 1: step t lands at (cos t, sin t).
  const Tensor x = at::tensor({1.0, 0.0}).repeat({1, 9, 1, 1});
  const Tensor y = ops::rope(x, at::ones({1}, at::kFloat), 3, 2.0);
  for (int t = 0; t < 9; ++t) {
    EXPECT_NEAR(y[0][t][0][0].item<double>(), std::cos((3 + t) / 2.0), 1e-14);
    EXPECT_NEAR(y[0][t][0][1].item<double>(), std::sin((3 + t) / 2.0), 1e-14);
  }
}

TEST(Rope, SplitAnywhereEqualsUnsplit) {
  const Tensor x = randn({2, 20, 3, 24}, 1).to(at::kFloat);
  const Tensor inv_freq = ops::rope_inverse_frequencies(24, 1e6, at::kCPU);
  const Tensor whole = ops::rope(x, inv_freq, 77, 1.0);
  for (const int64_t cut : {1, 7, 19}) {
    const Tensor parts = at::cat({ops::rope(x.narrow(1, 0, cut), inv_freq, 77, 1.0),
                                  ops::rope(x.narrow(1, cut, 20 - cut), inv_freq, 77 + cut, 1.0)},
                                 1);
    EXPECT_TRUE(test::bit_equal(parts, whole)) << cut;
  }
}

TEST(Rope, TransposedEmptyAndMetaInputs) {
  const Tensor inv_freq = ops::rope_inverse_frequencies(8, 1e4, at::kCPU);
  const Tensor x = randn({2, 8, 3, 5}, 1).permute({0, 3, 2, 1});
  EXPECT_TRUE(
      test::bit_equal(ops::rope(x, inv_freq, 0, 1.0), ops::rope(x.contiguous(), inv_freq, 0, 1.0)));
  EXPECT_EQ(ops::rope(at::zeros({2, 0, 3, 8}), inv_freq, 0, 1.0).size(1), 0);
  const auto meta = at::TensorOptions().device(at::kMeta).dtype(at::kFloat);
  EXPECT_EQ(ops::rope(at::empty({1, 2, 3, 8}, meta), at::empty({4}, meta), 0, 1.0).sizes(),
            at::IntArrayRef({1, 2, 3, 8}));
}

TEST(Rope, RepeatsBitForBitOnAnyNumberOfThreads) {
  const Tensor x = randn({2, 300, 4, 32}, 1).to(at::kFloat);
  const Tensor inv_freq = ops::rope_inverse_frequencies(32, 1e4, at::kCPU);
  at::set_num_threads(1);
  const Tensor one = ops::rope(x, inv_freq, 9, 1.0);
  at::set_num_threads(2);
  EXPECT_TRUE(test::bit_equal(one, ops::rope(x, inv_freq, 9, 1.0)));
}

TEST(Rope, InverseFrequencies) {
  const Tensor f = ops::rope_inverse_frequencies(128, 10000.0, at::kCPU);
  ASSERT_EQ(f.sizes(), at::IntArrayRef({64}));
  EXPECT_EQ(f[0].item<float>(), 1.0f);
  EXPECT_FLOAT_EQ(f[32].item<float>(), 0.01f);
  EXPECT_FLOAT_EQ(f[63].item<float>(), static_cast<float>(std::pow(10000.0, -126.0 / 128)));
  EXPECT_THROW(ops::rope_inverse_frequencies(7, 1e4, at::kCPU), c10::Error);
  EXPECT_THROW(ops::rope_inverse_frequencies(8, -1, at::kCPU), c10::Error);
}

TEST(Rope, RefusesBadInputsByName) {
  const Tensor f = ops::rope_inverse_frequencies(8, 1e4, at::kCPU);
  const auto message = [](const Tensor& x, const Tensor& inv_freq, double scale) -> std::string {
    try {
      ops::rope(x, inv_freq, 0, scale);
    } catch (const c10::Error& e) {
      return e.what_without_backtrace();
    }
    return "no error";
  };
  const Tensor x = randn({1, 2, 3, 8}, 1);
  EXPECT_NE(message(randn({1, 2, 8}, 1), f, 1).find("expected [B, L, H, P]"), std::string::npos);
  EXPECT_NE(message(x.to(at::kHalf), f, 1).find("x is Half"), std::string::npos);
  EXPECT_NE(message(x, f.narrow(0, 0, 3), 1).find("inv_freq is Float [3]"), std::string::npos);
  EXPECT_NE(message(x, f.to(at::kDouble), 1).find("inv_freq is Double"), std::string::npos);
  EXPECT_NE(message(x, f, 0).find("scale is 0"), std::string::npos);
}

TEST(Rope, CudaMatchesCompositionInDouble) {
  SKIP_WITHOUT_CUDA();
  const test::PoisonMemory poison;
  check_all_types(at::kCUDA);
}

}  // namespace
}  // namespace sarissa
