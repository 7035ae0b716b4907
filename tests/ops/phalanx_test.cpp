// phalanx against golden layers and against its gates written out around the step semantics.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "sarissa/ops/device.h"
#include "sarissa/ops/ops.h"
#include "tests/ops/swr_reference.h"
#include "tests/support/compare.h"
#include "tests/support/golden.h"

namespace sarissa {
namespace {

using namespace sarissa::test;
using ops::kFullRecurrence;

struct Shape {
  int64_t batch, length, heads, kv_heads, width, window;
  double decay_max = 1.0;

  int64_t channels() const { return heads + (2 * kv_heads + heads) * width; }
  std::string describe() const {
    std::ostringstream out;
    out << "B" << batch << " L" << length << " H" << heads << " Hkv" << kv_heads << " P" << width
        << " window " << window << " decay_max " << decay_max;
    return out.str();
  }
};

// The operator, and the reference, as functions of a case's one input, abcv.
SwrFunction op(const Shape& s) {
  return [=](const std::vector<at::Tensor>& in, const std::optional<SwrState>& state) {
    return ops::phalanx(in[0], s.heads, s.kv_heads, s.window, s.decay_max, state);
  };
}

SwrFunction reference(const Shape& s) {
  return [=](const std::vector<at::Tensor>& in, const std::optional<SwrState>& state) {
    const int64_t H = s.heads, K = s.kv_heads, P = s.width;
    const int64_t B = in[0].size(0), L = in[0].size(1);
    const auto parts = in[0].split_with_sizes({H, K * P, K * P, H * P}, 2);
    const auto per_head = [&](const at::Tensor& gate) {
      return gate.reshape({B, L, K, P}).repeat_interleave(H / K, 2);
    };
    const at::Tensor v = parts[3].reshape({B, L, H, P});
    const at::Tensor u = per_head(at::sigmoid(parts[1])) * v;
    const auto [x, out] = reference_swr(s.decay_max * at::sigmoid(parts[0]), u, s.window, state);
    return SwrResult{(per_head(parts[2]) * x + v).reshape({B, L, H * P}), out};
  };
}

// The plain computation for half-precision inputs: float inside, rounded once at the end.
SwrFunction plain_bf16(const Shape& s) {
  return [=](const std::vector<at::Tensor>& in, const std::optional<SwrState>& state) {
    auto [y, out] = reference(s)({in[0].to(at::kFloat)}, state);
    return SwrResult{y.to(at::kBFloat16), out};
  };
}

SwrCase random_case(const Shape& s, bool with_state, uint64_t seed) {
  SwrCase out =
      random_swr_case(s.batch, s.length, s.heads, s.width, s.window, with_state, seed + 100);
  // Decay logits of +-3 on average, so that some coefficients are near 0 and near decay_max.
  const at::Tensor abcv = randn({s.batch, s.length, s.channels()}, seed);
  abcv.narrow(2, 0, s.heads).mul_(3.0);
  out.inputs = {abcv};
  out.dx = randn({s.batch, s.length, s.heads * s.width}, seed + 1);
  return out;
}

std::vector<Shape> shapes() {
  std::vector<Shape> out;
  for (const int64_t window : {0, 1, 5, 16, 17}) {
    out.push_back({2, 43, 4, 2, 5, window});
  }
  for (const int64_t length : {1, 2, 15, 16, 17}) out.push_back({1, length, 2, 2, 16, 16, 0.8});
  out.push_back({2, 50, 6, 1, 16, 16, 0.9});
  out.push_back({1, 75, 4, 4, 16, 40});
  out.push_back({1, 33, 2, 1, 67, 16});  // wider than a warp
  return out;
}

// ---- golden layers: linear projections around the operator

void check_golden(at::Device device, at::ScalarType dtype) {
  for (const std::string& name : golden_cases("phalanx_")) {
    const GoldenCase golden(name);
    if (dtype == at::kBFloat16 && !golden.is_bf16()) continue;
    const auto& config = golden.config();
    const Shape s{config["B"], config["L"],         config["H"],        config["Hkv"],
                  config["P"], config["block_len"], config["decay_max"]};
    std::map<std::string, at::Tensor> leaves;
    const auto leaf = [&](const std::string& key) {
      return leaves[key] = golden[key].to(device, dtype).requires_grad_(true);
    };
    const at::Tensor x = leaf("x");
    std::vector<at::Tensor> projections;
    for (const std::string part : {"a", "b", "c", "v"}) {
      const std::string prefix = "proj_" + part;
      const bool bias = part != "v";
      projections.push_back(
          at::linear(x, leaf(prefix + ".weight"), bias ? leaf(prefix + ".bias") : at::Tensor()));
    }
    const auto state_type = dtype == at::kDouble ? at::kDouble : at::kFloat;
    std::optional<SwrState> state;
    if (golden.has("v0")) {
      leaves["v0"] = golden["v0"].to(device, state_type).requires_grad_(true);
      const auto options = leaves["v0"].options().requires_grad(false);
      state = SwrState{at::zeros({s.batch, s.heads, s.width}, options),
                       at::ones({s.batch, s.heads}, options), leaves["v0"],
                       at::zeros({s.batch}, options.dtype(at::kInt))};
    }
    const auto [inner, out] = op(s)({at::cat(projections, 2)}, state);
    const at::Tensor y = at::linear(inner, leaf("proj_out.weight"));
    EXPECT_GOLDEN(golden, "y", y, dtype);
    EXPECT_GOLDEN(golden, "w_out", out.w, dtype);
    EXPECT_GOLDEN(golden, "r_out", out.r, dtype);
    EXPECT_GOLDEN(golden, "v_out", out.v, dtype);
    EXPECT_TRUE((out.index.cpu() == golden["i_out"].item<int64_t>()).all().item<bool>()) << name;

    std::vector<std::string> names;
    std::vector<at::Tensor> inputs;
    for (const auto& [key, value] : leaves) {
      names.push_back(key);
      inputs.push_back(value);
    }
    const auto gradients = torch::autograd::grad({y}, inputs, {golden["dy"].to(device, dtype)});
    for (size_t i = 0; i < names.size(); ++i) {
      EXPECT_GOLDEN(golden, "d_" + names[i], gradients[i], dtype);
    }

    // The stored intermediates: s = SWR(a, sigmoid(b) v).
    const at::Tensor gate = at::sigmoid(projections[1].detach())
                                .view({s.batch, s.length, s.kv_heads, s.width})
                                .repeat_interleave(s.heads / s.kv_heads, 2);
    const at::Tensor a = s.decay_max * at::sigmoid(projections[0].detach());
    EXPECT_GOLDEN(golden, "a", a, dtype);
    const auto [recurrence, unused] =
        ops::swr(a, gate * projections[3].detach().view(gate.sizes()), s.window, state);
    EXPECT_GOLDEN(golden, "s", recurrence.reshape({s.batch, s.length, s.heads * s.width}), dtype);
  }
}

TEST(Phalanx, GoldenDouble) { check_golden(at::kCPU, at::kDouble); }
TEST(Phalanx, GoldenFloat) { check_golden(at::kCPU, at::kFloat); }
TEST(Phalanx, GoldenBf16) { check_golden(at::kCPU, at::kBFloat16); }

// ---- against the gates and the step semantics written out

void check_against_reference(at::Device device, at::ScalarType dtype) {
  uint64_t seed = 1;
  for (const Shape& s : shapes()) {
    for (const bool state : {false, true}) {
      const SwrCase given = random_case(s, state, seed += 1000).to(device, dtype);
      const Named got = run(op(s), given);
      const Named want = run(reference(s), given.to(at::kCPU, at::kDouble));
      if (dtype == at::kBFloat16) {
        expect_as_good_as(got, run(plain_bf16(s), given.to(at::kCPU, dtype)), want, 1e-6,
                          s.describe());
      } else {
        expect_near(got, want, dtype == at::kDouble ? 1e-13 : 3e-6, s.describe());
      }
    }
  }
}

TEST(Phalanx, StepSemanticsDouble) { check_against_reference(at::kCPU, at::kDouble); }
TEST(Phalanx, StepSemanticsFloat) { check_against_reference(at::kCPU, at::kFloat); }
TEST(Phalanx, StepSemanticsBf16) { check_against_reference(at::kCPU, at::kBFloat16); }

TEST(Phalanx, FiniteDifferences) {
  for (const int64_t window : {int64_t{0}, int64_t{5}}) {
    const Shape s{2, 13, 4, 2, 3, window, 0.9};
    const SwrCase c = random_case(s, true, 77);
    const auto f = [&](const std::vector<at::Tensor>& in) {
      const auto [y, out] = op(s)({in[0]}, SwrState{in[1], in[2], in[3], c.state->index});
      return at::cat({y.flatten(), out.w.flatten(), out.r.flatten(), out.v.flatten()});
    };
    EXPECT_LE(gradient_error(f, {c.inputs[0], c.state->w, c.state->r, c.state->v}), 1e-7);
  }
}

// bf16 sigmoids reach 0 and 1 exactly; nothing may become non-finite there.
TEST(Phalanx, SaturatedGates) {
  const Shape s{1, 40, 2, 1, 4, 16};
  for (const double logit : {-200.0, 200.0}) {
    for (const at::ScalarType dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
      SwrCase c = random_case(s, true, 5);
      c.inputs[0].narrow(2, 0, s.heads + s.kv_heads * s.width).fill_(logit);
      for (const auto& [name, value] : run(op(s), c.to(at::kCPU, dtype))) {
        EXPECT_TRUE(value.isfinite().all().item<bool>()) << name << " at " << logit;
      }
    }
  }
}

// ---- splits, strides, memory, threads

void check_splits(at::Device device, at::ScalarType dtype) {
  for (const int64_t window : {0, 5, 16}) {
    const Shape s{2, 59, 4, 2, 16, window, 0.9};
    const SwrCase c = random_case(s, true, 5 + window).to(device, dtype);
    const auto [whole, final_state] = op(s)(c.inputs, c.state);
    for (const std::vector<int64_t>& cuts :
         {std::vector<int64_t>{23, 36}, {16, 0, 43}, std::vector<int64_t>(59, 1)}) {
      std::vector<at::Tensor> pieces;
      std::optional<SwrState> state = c.state;
      int64_t begin = 0;
      for (const int64_t n : cuts) {
        const auto [y, next] = op(s)(steps_of(c.inputs, begin, n), state);
        pieces.push_back(y);
        state = next;
        begin += n;
      }
      EXPECT_TRUE(bit_equal(at::cat(pieces, 1), whole)) << "window " << window;
      EXPECT_TRUE(bit_equal(state->w, final_state.w)) << "window " << window;
      EXPECT_TRUE(bit_equal(state->r, final_state.r)) << "window " << window;
      EXPECT_TRUE(bit_equal(state->v, final_state.v)) << "window " << window;
      EXPECT_TRUE(bit_equal(state->index, final_state.index)) << "window " << window;
    }
  }
}

TEST(Phalanx, AnySplitEqualsTheWhole) {
  check_splits(at::kCPU, at::kDouble);
  check_splits(at::kCPU, at::kFloat);
  check_splits(at::kCPU, at::kBFloat16);
}

void check_strides(at::Device device) {
  const Shape s{2, 21, 4, 2, 5, 6};
  const SwrCase c = random_case(s, true, 91).to(device, at::kFloat);
  const Named want = run(op(s), c);
  SwrCase strided = c;
  strided.inputs[0] = strided_copy(c.inputs[0]);
  strided.dx = strided_copy(c.dx);
  expect_bit_equal(run(op(s), strided), want, "strided");
  SwrCase transposed = c;
  transposed.inputs[0] = c.inputs[0].transpose(1, 2).contiguous().transpose(1, 2);
  transposed.dx = c.dx.transpose(0, 2).contiguous().transpose(0, 2);
  expect_bit_equal(run(op(s), transposed), want, "transposed");
}

TEST(Phalanx, StridedInputs) { check_strides(at::kCPU); }

void check_repeats(at::Device device) {
  const PoisonMemory poison;
  for (const Shape& s : shapes()) {
    const SwrCase c = random_case(s, true, 3).to(device, at::kFloat);
    const Named first = run(op(s), c);
    for (const auto& [name, value] : first) {
      EXPECT_TRUE(value.isfinite().all().item<bool>()) << s.describe() << ": " << name;
    }
    expect_bit_equal(run(op(s), c), first, s.describe());
  }
}

TEST(Phalanx, WritesEverythingAndRepeats) { check_repeats(at::kCPU); }

TEST(Phalanx, ThreadsDoNotChangeBits) {
  const int threads = at::get_num_threads();
  const Shape s{3, 600, 6, 3, 16, 16};
  const SwrCase c = random_case(s, true, 9).to(at::kCPU, at::kFloat);
  at::set_num_threads(1);
  const Named one = run(op(s), c);
  for (const int n : {2, 3}) {
    at::set_num_threads(n);
    expect_bit_equal(run(op(s), c), one, "threads");
  }
  at::set_num_threads(threads);
}

// ---- empty problems, Meta, errors

TEST(Phalanx, EmptyProblems) {
  for (const int64_t window : {0, 4}) {
    const Shape s{2, 0, 2, 1, 3, window};
    const SwrCase c = random_case(s, true, 51);
    expect_near(run(op(s), c), run(reference(s), c), 1e-15, "no steps");
    const auto [y, state] = ops::phalanx(at::empty({0, 5, s.channels()}), 2, 1, window, 1.0);
    EXPECT_EQ(y.sizes(), at::IntArrayRef({0, 5, 6}));
  }
}

TEST(Phalanx, MetaGivesShapesAndTypes) {
  const Shape s{2, 9, 4, 2, 5, 16};
  const auto options = at::TensorOptions().device(at::kMeta).dtype(at::kBFloat16);
  const auto [y, state] = op(s)({at::empty({2, 9, s.channels()}, options)}, std::nullopt);
  EXPECT_TRUE(y.is_meta());
  EXPECT_EQ(y.sizes(), at::IntArrayRef({2, 9, 20}));
  EXPECT_EQ(y.scalar_type(), at::kBFloat16);
  EXPECT_EQ(state.v.sizes(), at::IntArrayRef({2, 4, 5}));
  EXPECT_EQ(state.v.scalar_type(), at::kFloat);
}

void expect_refused(const std::function<void()>& call, const std::string& part) {
  try {
    call();
    ADD_FAILURE() << "accepted; expected an error with '" << part << "'";
  } catch (const c10::Error& e) {
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
  }
}

TEST(Phalanx, RefusesBadInputs) {
  const Shape s{2, 5, 4, 2, 3, 4};
  const at::Tensor abcv = at::randn({2, 5, s.channels()});
  const auto [y, state] = op(s)({abcv}, std::nullopt);
  expect_refused([&] { ops::phalanx(abcv, 4, 3, 4, 1.0); }, "kv_heads is 3");
  expect_refused([&] { ops::phalanx(abcv, 0, 1, 4, 1.0); }, "heads is 0");
  expect_refused([&] { ops::phalanx(abcv.narrow(2, 0, 27), 4, 2, 4, 1.0); }, "C = 27");
  expect_refused([&] { ops::phalanx(abcv.narrow(2, 0, 4), 4, 2, 4, 1.0); }, "C = 4");
  expect_refused([&] { ops::phalanx(abcv[0], 4, 2, 4, 1.0); }, "abcv has shape");
  expect_refused([&] { ops::phalanx(abcv, 4, 2, -2, 1.0); }, "window is -2");
  expect_refused([&] { ops::phalanx(abcv, 4, 2, 4, 0.0); }, "decay_max is 0");
  expect_refused([&] { ops::phalanx(abcv, 4, 2, 4, 1.5); }, "decay_max is 1.5");
  expect_refused([&] { ops::phalanx(abcv.to(at::kHalf), 4, 2, 4, 1.0); }, "abcv is Half");
  SwrState bad = state;
  bad.r = state.r.narrow(1, 0, 3);
  expect_refused([&] { ops::phalanx(abcv, 4, 2, 4, 1.0, bad); }, "r has shape");
  bad = state;
  bad.index = at::full({2}, -1, at::kInt);
  expect_refused([&] { ops::phalanx(abcv, 4, 2, 4, 1.0, bad); }, "index[0] is -1");
}

// ---- the same on a GPU

// A product of a hundred small coefficients is below what single precision can hold: there it may
// be anything just as small.
Named without_tiny_products(Named named) {
  named["r"] = named["r"].masked_fill(named["r"] < 1e-30, 0.0);
  return named;
}

TEST(PhalanxCuda, Golden) {
  SKIP_WITHOUT_CUDA();
  check_golden(at::kCUDA, at::kDouble);
  check_golden(at::kCUDA, at::kFloat);
  check_golden(at::kCUDA, at::kBFloat16);
}
TEST(PhalanxCuda, StepSemantics) {
  SKIP_WITHOUT_CUDA();
  check_against_reference(at::kCUDA, at::kDouble);
  check_against_reference(at::kCUDA, at::kFloat);
  check_against_reference(at::kCUDA, at::kBFloat16);
}
TEST(PhalanxCuda, AnySplitEqualsTheWhole) {
  SKIP_WITHOUT_CUDA();
  check_splits(at::kCUDA, at::kDouble);
  check_splits(at::kCUDA, at::kFloat);
  check_splits(at::kCUDA, at::kBFloat16);
}
TEST(PhalanxCuda, StridedInputs) {
  SKIP_WITHOUT_CUDA();
  check_strides(at::kCUDA);
}
TEST(PhalanxCuda, WritesEverythingAndRepeats) {
  SKIP_WITHOUT_CUDA();
  check_repeats(at::kCUDA);
}
// Long sequences, and so many channels that a strip of time holds several blocks.
// The marching kernels: windows on both sides of what is folded and what is saved, chunks that the
// window does not fill, heads of every number of lanes, channels that do not fill a CTA, several
// strips, one step less and more than whole blocks.
TEST(PhalanxCuda, MarchingKernels) {
  SKIP_WITHOUT_CUDA();
  const PoisonMemory poison;
  const auto check = [](const Shape& s, at::ScalarType dtype, bool with_state) {
    const SwrCase c = random_case(s, with_state, 23).to(at::kCUDA, dtype);
    const Named got = run(op(s), c);
    const std::string kernel = ops::last_kernel();
    const char* const expected = s.window > 32 ? "march_saved" : "march_folded";
    EXPECT_TRUE(kernel.starts_with(expected)) << s.describe() << ": " << kernel;
    const Named want = run(op(s), c.to(at::kCPU, dtype).to(at::kCPU, at::kDouble));
    expect_near(without_tiny_products(got), without_tiny_products(want),
                dtype == at::kBFloat16 ? 5e-3 : 5e-6, s.describe());
    expect_bit_equal(run(op(s), c), got, s.describe());
  };
  for (const bool with_state : {false, true}) {
    for (const int64_t window : {8, 15, 16, 17, 32, 33, 48, 64, 100, 128, 256}) {
      for (const int64_t length : {2, 255, 256, 257, 523}) {
        check({2, length, 6, 6, 16, window, 0.9}, at::kBFloat16, with_state);
      }
      check({3, 301, 3, 3, 8, window}, at::kFloat, with_state);
    }
    for (const int64_t width : {8, 16, 32, 64}) {
      check({2, 211, 10, 10, width, 16}, at::kBFloat16, with_state);
      check({2, 211, 10, 10, width, 32}, at::kBFloat16, with_state);  // the largest ring
      check({2, 211, 10, 10, width, 80}, at::kBFloat16, with_state);
    }
    check({1, 4099, 256, 256, 16, 16}, at::kBFloat16, with_state);
    check({1, 4099, 256, 256, 16, 128}, at::kBFloat16, with_state);
    check({2, 1030, 64, 64, 16, 64}, at::kBFloat16, with_state);
    // Packed rows: chunks that the window does not fill; more CTAs than multiprocessors.
    check({2, 307, 64, 64, 16, 100}, at::kBFloat16, with_state);
    check({40, 70, 64, 64, 16, 64}, at::kBFloat16, with_state);
    for (const int64_t window : {16, 32, 64}) {  // packed rows of shared kv heads
      check({2, 307, 64, 16, 16, window}, at::kBFloat16, with_state);
      check({1, 211, 128, 64, 16, window}, at::kBFloat16, with_state);
      check({1, 99, 256, 64, 16, window}, at::kBFloat16, with_state);
    }
    for (const int64_t kv_heads : {1, 3, 10}) {  // shared by 2 and by 4 heads
      for (const int64_t window : {8, 16, 20, 32, 64, 100}) {
        for (const int64_t group : {2, 4}) {
          check({2, 301, group * kv_heads, kv_heads, 16, window}, at::kBFloat16, with_state);
          check({1, 301, group * kv_heads, kv_heads, 16, window}, at::kFloat, with_state);
        }
      }
    }
  }
}
// The chained kernels: the full recurrence, and the forward of windows that divide a tile; lengths
// around blocks and tiles, more tiles than a look-back reads at once, ragged columns.
TEST(PhalanxCuda, ChainedKernels) {
  SKIP_WITHOUT_CUDA();
  const PoisonMemory poison;
  const auto check = [](const Shape& s, at::ScalarType dtype, bool with_state) {
    const SwrCase c = random_case(s, with_state, 29).to(at::kCUDA, dtype);
    op(s)(c.inputs, c.state);
    EXPECT_EQ(ops::last_kernel(), "chained") << s.describe();
    const Named got = run(op(s), c);
    if (s.window == kFullRecurrence) {
      EXPECT_EQ(ops::last_kernel(), "chained") << s.describe();
    }
    const Named want = run(op(s), c.to(at::kCPU, dtype).to(at::kCPU, at::kDouble));
    expect_near(without_tiny_products(got), without_tiny_products(want),
                dtype == at::kBFloat16 ? 5e-3 : 5e-6, s.describe());
    expect_bit_equal(run(op(s), c), got, s.describe());
  };
  for (const int64_t length : {17, 127, 128, 129, 500, 2049}) {
    for (const bool with_state : {false, true}) {
      check({2, length, 6, 6, 16, kFullRecurrence, 0.9}, at::kBFloat16, with_state);
      check({1, length, 3, 3, 8, kFullRecurrence}, at::kFloat, with_state);
    }
    for (const int64_t window : {32, 64, 128}) {
      check({2, length, 6, 6, 16, window, 0.9}, at::kBFloat16, false);
      check({1, length, 3, 3, 16, window}, at::kFloat, false);
    }
  }
  check({1, 512, 256, 256, 16, 64}, at::kBFloat16, false);
  check({1, 8190, 10, 10, 32, kFullRecurrence}, at::kBFloat16, true);
}
TEST(PhalanxCuda, LargeProblemsMatchTheCpu) {
  SKIP_WITHOUT_CUDA();
  for (const Shape& s :
       {Shape{1, 5003, 8, 2, 16, 16}, Shape{2, 2011, 3, 3, 40, 100},
        Shape{1, 1009, 6, 1, 16, kFullRecurrence, 0.9}, Shape{2, 300, 128, 32, 64, 16}}) {
    const SwrCase c = random_case(s, true, 15);
    const Named want = run(op(s), c.to(at::kCPU, at::kFloat).to(at::kCPU, at::kDouble));
    expect_near(run(op(s), c.to(at::kCUDA, at::kFloat)), want, 5e-6, s.describe());
  }
}

}  // namespace
}  // namespace sarissa
