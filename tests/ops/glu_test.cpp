#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "sarissa/base/error.h"
#include "sarissa/ops/device.h"
#include "sarissa/ops/ops.h"
#include "tests/support/compare.h"

namespace sarissa {
namespace {

using at::Tensor;
using ops::Gate;
using test::randn;
using test::relative_rms;

constexpr Gate kGates[] = {Gate::kSilu, Gate::kGelu, Gate::kIdentity};

Tensor composition(const Tensor& gate_up, Gate gate) {
  const int64_t width = gate_up.size(-1) / 2;
  const Tensor g = gate_up.narrow(-1, 0, width), up = gate_up.narrow(-1, width, width);
  switch (gate) {
    case Gate::kSilu:
      return at::silu(g) * up;
    case Gate::kGelu:
      return at::gelu(g) * up;
    case Gate::kIdentity:
      return g * up;
  }
  return {};
}

/// The result and the gradient.
std::vector<Tensor> run(std::vector<int64_t> shape, Gate gate, at::ScalarType dtype,
                        at::Device device, bool plain) {
  const auto options = at::TensorOptions().dtype(dtype).device(device);
  const auto values = [&](at::IntArrayRef sizes, uint64_t seed) {
    return (randn(sizes, seed) * 3).to(at::kBFloat16).to(options);
  };
  const Tensor x = test::strided_copy(values(shape, 1)).requires_grad_();
  const Tensor y = plain ? composition(x, gate) : ops::glu(x, gate);
  const Tensor upstream = test::strided_copy(values(y.sizes(), 2));
  return {y, torch::autograd::grad({y}, {x}, {upstream})[0]};
}

void check_all_types(at::Device device) {
  const std::vector<std::vector<int64_t>> shapes = {{1, 2},    {2},       {5, 14},     {2, 3, 66},
                                                    {33, 512}, {2, 2062}, {3, 4, 4096}};
  for (const auto& shape : shapes) {
    for (const Gate gate : kGates) {
      const auto want = run(shape, gate, at::kDouble, at::kCPU, true);
      for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
        const auto got = run(shape, gate, dtype, device, false);
        const auto plain =
            run(shape, gate, dtype == at::kDouble ? at::kDouble : at::kFloat, at::kCPU, true);
        const double floor = dtype == at::kDouble ? 1e-14 : dtype == at::kFloat ? 5e-7 : 1e-3;
        for (size_t i = 0; i < 2; ++i) {
          EXPECT_EQ(got[i].scalar_type(), dtype);
          EXPECT_LE(relative_rms(got[i], want[i]),
                    std::max(floor, 2 * relative_rms(plain[i].to(dtype), want[i])))
              << "result " << i << " of " << at::IntArrayRef(shape) << " in " << dtype << ", gate "
              << static_cast<int>(gate);
        }
      }
    }
  }
}

TEST(Glu, MatchesCompositionInDouble) {
  const test::PoisonMemory poison;
  check_all_types(at::kCPU);
}

TEST(Glu, GradientMatchesFiniteDifferences) {
  for (const Gate gate : kGates) {
    const auto f = [&](const std::vector<Tensor>& in) { return ops::glu(in[0], gate); };
    EXPECT_LE(test::gradient_error(f, {randn({4, 22}, 1)}), 1e-7) << static_cast<int>(gate);
  }
}

TEST(Glu, LargeGatesStayFinite) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    // 40 columns, so the vectorised loops and their tails both see them.
    const Tensor gate = at::tensor({-1e30, -1e4, -100.0, -89.0, 0.0, 89.0, 1e4, 1e30}).repeat(5);
    const Tensor x = at::cat({gate, at::ones({40}, at::kDouble)}).to(dtype).requires_grad_();
    const Tensor value = gate.to(dtype).to(at::kDouble);
    for (const Gate g : {Gate::kSilu, Gate::kGelu}) {
      const Tensor y = ops::glu(x, g);
      // Far from zero the gates are max(gate, 0).
      EXPECT_LE((y.to(at::kDouble) - value.clamp_min(0)).abs().max().item<double>(), 1e-30)
          << "gate " << static_cast<int>(g) << " in " << dtype;
      const Tensor slope = torch::autograd::grad({y.sum()}, {x})[0].narrow(0, 0, 40);
      const Tensor want = at::where(value == 0, 0.5, at::where(value > 0, 1.0, 0.0));
      EXPECT_LE((slope.to(at::kDouble) - want).abs().max().item<double>(), 1e-30)
          << "gate " << static_cast<int>(g) << " in " << dtype;
    }
  }
}

TEST(Glu, FloatIsAccurateEverywhere) {
  const Tensor gate = at::linspace(-12, 12, 20001, at::kFloat);
  const Tensor x = at::stack({gate, at::ones_like(gate)}, 1);
  for (const Gate g : {Gate::kSilu, Gate::kGelu}) {
    const Tensor y = ops::glu(x, g), want = ops::glu(x.to(at::kDouble), g);
    EXPECT_LE((y - want).abs().max().item<double>(), 1.2e-6) << static_cast<int>(g);
  }
}

TEST(Glu, TransposedEmptyAndMetaInputs) {
  const Tensor x = randn({10, 4}, 1).t();
  EXPECT_TRUE(test::bit_equal(ops::glu(x, Gate::kSilu), ops::glu(x.contiguous(), Gate::kSilu)));
  EXPECT_EQ(ops::glu(at::zeros({0, 3, 8}), Gate::kSilu).sizes(), at::IntArrayRef({0, 3, 4}));
  const Tensor meta = ops::glu(at::empty({2, 3, 8}, at::TensorOptions(at::kMeta)), Gate::kGelu);
  EXPECT_EQ(meta.sizes(), at::IntArrayRef({2, 3, 4}));
}

TEST(Glu, RepeatsBitForBitOnAnyNumberOfThreads) {
  at::set_num_threads(1);
  const auto one = run({300, 514}, Gate::kSilu, at::kFloat, at::kCPU, false);
  at::set_num_threads(2);
  const auto two = run({300, 514}, Gate::kSilu, at::kFloat, at::kCPU, false);
  EXPECT_TRUE(test::bit_equal(one[0], two[0]));
  EXPECT_TRUE(test::bit_equal(one[1], two[1]));
}

TEST(Glu, ParsesGateNames) {
  EXPECT_EQ(ops::parse_gate("swiglu"), Gate::kSilu);
  EXPECT_EQ(ops::parse_gate("gelu"), Gate::kGelu);
  EXPECT_EQ(ops::parse_gate("bilinear"), Gate::kIdentity);
  try {
    ops::parse_gate("swigul");
    FAIL() << "accepted";
  } catch (const UsageError& e) {
    EXPECT_NE(std::string(e.what()).find("did you mean 'swiglu'"), std::string::npos) << e.what();
  }
}

TEST(Glu, RefusesBadInputsByName) {
  EXPECT_THROW(ops::glu(randn({3, 5}, 1), Gate::kSilu), c10::Error);
  try {
    ops::glu(randn({3, 6}, 1).to(at::kHalf), Gate::kSilu);
    FAIL() << "accepted";
  } catch (const c10::Error& e) {
    EXPECT_NE(std::string(e.what()).find("gate_up is Half"), std::string::npos) << e.what();
  }
}

TEST(Glu, CudaMatchesCompositionInDouble) {
  SKIP_WITHOUT_CUDA();
  const test::PoisonMemory poison;
  check_all_types(at::kCUDA);
}

}  // namespace
}  // namespace sarissa
