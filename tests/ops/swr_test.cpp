// swr against golden vectors, dense matrices and the step semantics; planning functions.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <limits>

#include "sarissa/kernels/swr/swr_plan.h"
#include "sarissa/ops/device.h"
#include "sarissa/ops/ops.h"
#include "tests/ops/swr_reference.h"
#include "tests/support/compare.h"
#include "tests/support/golden.h"

namespace sarissa {
namespace {

using namespace sarissa::test;
using ops::kFullRecurrence;

// The operator, and the reference, as functions of a case's inputs {a, u}.
SwrFunction op(int64_t window) {
  return [=](const std::vector<at::Tensor>& in, const std::optional<SwrState>& state) {
    return ops::swr(in[0], in[1], window, state);
  };
}
SwrFunction reference(int64_t window) {
  return [=](const std::vector<at::Tensor>& in, const std::optional<SwrState>& state) {
    return reference_swr(in[0], in[1], window, state);
  };
}
// The plain computation for half-precision inputs: float inside, rounded once at the end.
SwrFunction plain_bf16(int64_t window) {
  return [=](const std::vector<at::Tensor>& in, const std::optional<SwrState>& state) {
    auto [x, out] = reference_swr(in[0].to(at::kFloat), in[1].to(at::kFloat), window, state);
    return SwrResult{x.to(at::kBFloat16), out};
  };
}

// ---- golden vectors: stored [B, H, L] and [B, H, P, L]

at::Tensor time_major(const at::Tensor& x) {
  return (x.dim() == 3 ? x.permute({0, 2, 1}) : x.permute({0, 3, 1, 2})).contiguous();
}
at::Tensor time_minor(const at::Tensor& x) {
  return x.dim() == 3 ? x.permute({0, 2, 1}) : x.permute({0, 2, 3, 1});
}

SwrCase golden_case(const GoldenCase& golden, bool jagged) {
  SwrCase out;
  out.inputs = {time_major(golden["a"]), time_major(golden["u"])};
  out.dx = time_major(golden["dx"]);
  if (golden.has("v0")) {
    const at::Tensor v = golden["v0"];
    const int64_t index = golden.config().value("initial_index_in_block", 0);
    out.state = SwrState{golden.has("w0") ? golden["w0"] : at::zeros_like(v),
                         golden.has("r0") ? golden["r0"] : at::ones({v.size(0), v.size(1)}), v,
                         at::full({v.size(0)}, index, at::kInt)};
  }
  if (jagged) {
    if (golden.has("d_w_out")) out.dw = golden["d_w_out"];
    if (golden.has("d_r_out")) out.dr = golden["d_r_out"];
    if (golden.has("d_v_out")) out.dv = golden["d_v_out"];
  }
  return out;
}

void check_index(const GoldenCase& golden, const std::string& name, const at::Tensor& index) {
  const int64_t want = golden[name].item<int64_t>();
  EXPECT_TRUE((index.cpu() == want).all().item<bool>()) << golden.name() << ": " << name;
}

void check_jagged(const GoldenCase& golden, at::Device device, at::ScalarType dtype) {
  const std::string suffix = golden.has("x_jagged") ? "_jagged" : "";
  const int64_t window = golden.config()["block_len"];
  const SwrCase problem = golden_case(golden, true).to(device, dtype);
  const Named got = run(op(window), problem);
  EXPECT_GOLDEN(golden, "x" + suffix, time_minor(got.at("x")), dtype);
  EXPECT_GOLDEN(golden, "da" + suffix, time_minor(got.at("d_input0")), dtype);
  EXPECT_GOLDEN(golden, "du" + suffix, time_minor(got.at("d_input1")), dtype);
  if (golden.has("w_out")) {
    EXPECT_GOLDEN(golden, "w_out", got.at("w"), dtype);
    EXPECT_GOLDEN(golden, "r_out", got.at("r"), dtype);
    EXPECT_GOLDEN(golden, "v_out", got.at("v"), dtype);
    check_index(golden, "i_out", got.at("index"));
  }
  if (golden.has("v0")) {
    EXPECT_GOLDEN(golden, "dv0" + suffix, got.at("d_v"), dtype);
  }
  if (golden.has("w0")) {
    EXPECT_GOLDEN(golden, "dw0" + suffix, got.at("d_w"), dtype);
    EXPECT_GOLDEN(golden, "dr0" + suffix, got.at("d_r"), dtype);
  }
  if (golden.has("w_after")) {
    std::vector<at::Tensor> w, r, v, index;
    for (int64_t n = 0; n <= problem.dx.size(1); ++n) {
      const auto [x, state] = op(window)(steps_of(problem.inputs, 0, n), problem.state);
      w.push_back(state.w);
      r.push_back(state.r);
      v.push_back(state.v);
      index.push_back(state.index.cpu());
    }
    EXPECT_GOLDEN(golden, "w_after", at::stack(w), dtype);
    EXPECT_GOLDEN(golden, "r_after", at::stack(r), dtype);
    EXPECT_GOLDEN(golden, "v_after", at::stack(v), dtype);
    EXPECT_TRUE(at::stack(index).select(1, 0).to(at::kLong).equal(golden["i_after"]))
        << golden.name();
  }
}

void check_full(const GoldenCase& golden, at::Device device, at::ScalarType dtype) {
  if (!golden.has("x_full")) return;
  const Named got = run(op(kFullRecurrence), golden_case(golden, false).to(device, dtype));
  EXPECT_GOLDEN(golden, "x_full", time_minor(got.at("x")), dtype);
  EXPECT_GOLDEN(golden, "da_full", time_minor(got.at("d_input0")), dtype);
  EXPECT_GOLDEN(golden, "du_full", time_minor(got.at("d_input1")), dtype);
  EXPECT_GOLDEN(golden, "x_full_out", got.at("v"), dtype);
  if (golden.has("v0")) {
    EXPECT_GOLDEN(golden, "dv0_full", got.at("d_v"), dtype);
  }
  EXPECT_TRUE((got.at("w") == 0).all().item<bool>());
  EXPECT_TRUE((got.at("r") == 1).all().item<bool>());
  EXPECT_TRUE((got.at("index") == 0).all().item<bool>());
}

// Inputs by the file's formula, results at chosen steps.
void check_long(const GoldenCase& golden, at::Device device, at::ScalarType dtype) {
  const auto& config = golden.config();
  const int64_t L = config["L"], H = config["H"], P = config["P"];
  const auto values = [&](const char* name, int64_t channels) {
    const auto& f = config["formulas"][name];
    const at::Tensor t = at::arange(L, at::kLong).view({L, 1});
    const at::Tensor c = at::arange(channels, at::kLong);
    const at::Tensor n = (t * f["k1"].get<int64_t>() + c * f["k2"].get<int64_t>() +
                          (t * t).remainder(f["q"].get<int64_t>()))
                             .remainder(f["m"].get<int64_t>()) +
                         f["s"].get<int64_t>();
    return n.to(at::kDouble) / f["d"].get<double>();
  };
  SwrCase problem;
  problem.inputs = {values("a", H).view({1, L, H}), values("u", H * P).view({1, L, H, P})};
  problem.dx = values("dx", H * P).view({1, L, H, P});
  const Named got = run(op(config["block_len"]), problem.to(device, dtype));
  const at::Tensor pos = golden["pos"].to(device);
  EXPECT_GOLDEN(golden, "x_at", time_minor(got.at("x").index_select(1, pos)), dtype);
  EXPECT_GOLDEN(golden, "da_at", time_minor(got.at("d_input0").index_select(1, pos)), dtype);
  EXPECT_GOLDEN(golden, "du_at", time_minor(got.at("d_input1").index_select(1, pos)), dtype);
}

// Every file of the family must be of a kind that is checked here.
void check_golden(at::Device device, at::ScalarType dtype) {
  for (const std::string& name : golden_cases("swr_")) {
    const GoldenCase golden(name);
    if (dtype == at::kBFloat16 && !golden.is_bf16()) continue;
    if (golden.op() == "swr_long") {
      check_long(golden, device, dtype);
    } else {
      ASSERT_TRUE(golden.op() == "swr_jagged" || golden.op() == "swr_jagged+full") << name;
      check_jagged(golden, device, dtype);
      check_full(golden, device, dtype);
    }
  }
}

TEST(Swr, GoldenDouble) { check_golden(at::kCPU, at::kDouble); }
TEST(Swr, GoldenFloat) { check_golden(at::kCPU, at::kFloat); }
TEST(Swr, GoldenBf16) { check_golden(at::kCPU, at::kBFloat16); }

// ---- the hierarchical decomposition, in dense matrices

// The matrix of the operator for one head: column j is the answer to a unit input at step j.
at::Tensor operator_matrix(const at::Tensor& a_L, int64_t window) {
  const int64_t L = a_L.size(0);
  const auto [x, state] =
      ops::swr(a_L.view({1, L, 1}), at::eye(L, at::kDouble).view({1, L, 1, L}), window);
  return x.view({L, L});
}

// L = (I - A Z)^-1, Z the shift by one step.
at::Tensor solve_matrix(const at::Tensor& a) {
  const int64_t L = a.size(0);
  at::Tensor m = at::eye(L, at::kDouble);
  for (int64_t i = 1; i < L; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      m[i][j] = a.slice(0, j + 1, i + 1).prod();
    }
  }
  return m;
}

TEST(Swr, DenseDecomposition) {
  for (const auto& [length, window] :
       std::vector<std::pair<int64_t, int64_t>>{{12, 3}, {12, 4}, {13, 5}, {11, 16}, {9, 1}}) {
    const int64_t b = (length - 1) / window + 1;
    const at::Tensor a = rand({length}, 11 + length, 0.0, 1.0);
    a[length - 1] = 0.0;
    at::Tensor local = at::zeros({length, length}, at::kDouble);  // blockdiag(L_1..L_b)
    at::Tensor G = at::zeros({length, b}, at::kDouble);
    at::Tensor R = at::zeros({b, length}, at::kDouble);
    at::Tensor C = at::zeros({b, b}, at::kDouble);
    for (int64_t k = 0; k < b; ++k) {
      const int64_t begin = k * window, n = std::min(window, length - begin);
      const at::Tensor a_k = a.narrow(0, begin, n);
      local.narrow(0, begin, n).narrow(1, begin, n).copy_(solve_matrix(a_k));
      G.narrow(0, begin, n).select(1, k).copy_(a_k.cumprod(0));
      R[k].narrow(0, begin, n).copy_(local[begin + n - 1].narrow(0, begin, n));
      C[k][k] = a_k.prod();
    }
    const at::Tensor Z = at::diag(at::ones({b - 1}, at::kDouble), -1);
    const at::Tensor T = at::linalg_inv(at::eye(b, at::kDouble) - C.matmul(Z));
    const at::Tensor full = local + G.matmul(Z).matmul(T).matmul(R);
    EXPECT_LE(relative_rms(full, solve_matrix(a)), 1e-14);
    EXPECT_LE(relative_rms(operator_matrix(a, kFullRecurrence), full), 1e-14);
    const at::Tensor jagged = local + G.matmul(Z).matmul(R);  // T = I
    EXPECT_LE(relative_rms(operator_matrix(a, window), jagged), 1e-14);
    // Where there are three blocks the window does cut something off.
    if (b > 2) {
      EXPECT_GT(relative_rms(operator_matrix(a, window), full), 1e-9);
    }
  }
}

// ---- against the step semantics

struct Shape {
  int64_t batch, length, heads, width, window;
};

std::vector<Shape> shapes() {
  std::vector<Shape> out;
  for (const int64_t window : {0, 1, 2, 7, 16, 17, 33}) {
    for (const int64_t length :
         {int64_t{1}, int64_t{2}, window - 1, window, window + 1, int64_t{53}}) {
      if (length >= 1) out.push_back({2, length, 3, 5, window});
    }
  }
  out.push_back({1, 100, 2, 16, 16});  // the width that has its own code
  out.push_back({2, 70, 2, 16, 48});
  out.push_back({3, 31, 1, 1, 8});
  out.push_back({1, 41, 2, 67, 16});  // wider than a warp
  return out;
}

std::string describe(const Shape& s, bool state) {
  std::ostringstream out;
  out << "B" << s.batch << " L" << s.length << " H" << s.heads << " P" << s.width << " window "
      << s.window << (state ? " with state" : "");
  return out.str();
}

void check_against_reference(at::Device device, at::ScalarType dtype) {
  uint64_t seed = 1;
  for (const Shape& s : shapes()) {
    for (const bool state : {false, true}) {
      const SwrCase exact =
          random_swr_case(s.batch, s.length, s.heads, s.width, s.window, state, seed += 20);
      const SwrCase given = exact.to(device, dtype);
      const Named got = run(op(s.window), given);
      const Named want = run(reference(s.window), given.to(at::kCPU, at::kDouble));
      const std::string what = describe(s, state);
      if (dtype == at::kBFloat16) {
        expect_as_good_as(got, run(plain_bf16(s.window), given.to(at::kCPU, dtype)), want, 1e-6,
                          what);
      } else {
        expect_near(got, want, dtype == at::kDouble ? 1e-13 : 2e-6, what);
      }
    }
  }
}

TEST(Swr, StepSemanticsDouble) { check_against_reference(at::kCPU, at::kDouble); }
TEST(Swr, StepSemanticsFloat) { check_against_reference(at::kCPU, at::kFloat); }
TEST(Swr, StepSemanticsBf16) { check_against_reference(at::kCPU, at::kBFloat16); }

TEST(Swr, FiniteDifferences) {
  for (const int64_t window : {int64_t{0}, int64_t{5}}) {
    const SwrCase c = random_swr_case(2, 13, 2, 3, window, true, 77);
    const auto f = [&](const std::vector<at::Tensor>& in) {
      const auto [x, out] =
          ops::swr(in[0], in[1], window, SwrState{in[2], in[3], in[4], c.state->index});
      return at::cat({x.flatten(), out.w.flatten(), out.r.flatten(), out.v.flatten()});
    };
    EXPECT_LE(gradient_error(f, {c.inputs[0], c.inputs[1], c.state->w, c.state->r, c.state->v}),
              1e-7);
  }
}

// ---- splits, strides, memory, threads

void check_splits(at::Device device, at::ScalarType dtype) {
  for (const int64_t window : {0, 1, 5, 16, 40}) {
    const SwrCase c = random_swr_case(2, 59, 2, 16, window, true, 5 + window).to(device, dtype);
    const auto [whole, final_state] = op(window)(c.inputs, c.state);
    for (const std::vector<int64_t>& cuts :
         {std::vector<int64_t>{23, 36}, {16, 16, 27}, {0, 59}, std::vector<int64_t>(59, 1)}) {
      std::vector<at::Tensor> pieces;
      std::optional<SwrState> state = c.state;
      int64_t begin = 0;
      for (const int64_t n : cuts) {
        const auto [x, next] = op(window)(steps_of(c.inputs, begin, n), state);
        pieces.push_back(x);
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

TEST(Swr, AnySplitEqualsTheWhole) {
  check_splits(at::kCPU, at::kDouble);
  check_splits(at::kCPU, at::kFloat);
  check_splits(at::kCPU, at::kBFloat16);
}

// Gradients through a carried state equal those of the whole.
TEST(Swr, GradientsFlowThroughStates) {
  for (const int64_t window : {0, 7, 16}) {
    const SwrCase c = random_swr_case(2, 50, 2, 4, window, true, 31 + window);
    const SwrFunction split = [&](const std::vector<at::Tensor>& in,
                                  const std::optional<SwrState>& state) {
      const auto [first, middle] = op(window)(steps_of(in, 0, 19), state);
      const auto [second, out] = op(window)(steps_of(in, 19, 31), middle);
      return SwrResult{at::cat({first, second}, 1), out};
    };
    expect_near(run(split, c), run(op(window), c), 1e-13, "split gradients");
  }
}

void check_strides(at::Device device) {
  for (const int64_t window : {0, 6}) {
    const SwrCase c = random_swr_case(2, 21, 3, 5, window, true, 91).to(device, at::kFloat);
    SwrCase strided = c;
    for (auto& x : strided.inputs) x = strided_copy(x);
    strided.state = SwrState{strided_copy(c.state->w), strided_copy(c.state->r),
                             strided_copy(c.state->v), c.state->index};
    strided.dx = strided_copy(c.dx);
    strided.dw = strided_copy(c.dw);
    const Named want = run(op(window), c);
    expect_bit_equal(run(op(window), strided), want, "strided");
    SwrCase transposed = c;  // channels not innermost in memory
    for (auto& x : transposed.inputs) x = x.transpose(1, -1).contiguous().transpose(1, -1);
    transposed.dx = c.dx.transpose(1, 3).contiguous().transpose(1, 3);
    expect_bit_equal(run(op(window), transposed), want, "transposed");
    SwrCase expanded = c;
    expanded.dx = at::ones({1}, c.dx.options()).expand(c.dx.sizes());
    SwrCase ones = c;
    ones.dx = at::ones_like(c.dx);
    expect_bit_equal(run(op(window), expanded), run(op(window), ones), "expanded gradient");
  }
}

TEST(Swr, StridedInputs) { check_strides(at::kCPU); }

void check_repeats(at::Device device) {
  const PoisonMemory poison;
  for (const Shape& s : shapes()) {
    const SwrCase c = random_swr_case(s.batch, s.length, s.heads, s.width, s.window, true, 3)
                          .to(device, at::kFloat);
    const Named first = run(op(s.window), c);
    for (const auto& [name, value] : first) {
      EXPECT_TRUE(value.isfinite().all().item<bool>()) << describe(s, true) << ": " << name;
    }
    expect_bit_equal(run(op(s.window), c), first, describe(s, true));
  }
}

TEST(Swr, WritesEverythingAndRepeats) { check_repeats(at::kCPU); }

TEST(Swr, ThreadsDoNotChangeBits) {
  const int threads = at::get_num_threads();
  for (const int64_t window : {0, 16}) {
    const SwrCase c = random_swr_case(3, 1000, 5, 16, window, true, 9).to(at::kCPU, at::kFloat);
    at::set_num_threads(1);
    const Named one = run(op(window), c);
    for (const int n : {2, 3}) {
      at::set_num_threads(n);
      expect_bit_equal(run(op(window), c), one, "threads");
    }
  }
  at::set_num_threads(threads);
}

// ---- gradients that are not asked for or not given

TEST(Swr, PartialGradients) {
  const SwrCase c = random_swr_case(1, 20, 2, 4, 8, true, 41);
  const Named all = run(op(8), c);
  {  // only a, and no gradient of x: the state alone is used
    const at::Tensor a = c.inputs[0].clone().requires_grad_(true);
    const auto [x, out] = ops::swr(a, c.inputs[1], 8, c.state);
    const auto got = torch::autograd::grad({(out.w * c.dw).sum()}, {a});
    SwrCase only_w = c;
    only_w.dx = at::zeros_like(c.dx);
    only_w.dr = only_w.dv = at::Tensor();
    EXPECT_LE(relative_rms(got[0], run(reference(8), only_w).at("d_input0")), 1e-13);
  }
  {  // only the initial state
    const at::Tensor v = c.state->v.clone().requires_grad_(true);
    const auto [x, out] =
        ops::swr(c.inputs[0], c.inputs[1], 8, SwrState{c.state->w, c.state->r, v, c.state->index});
    const auto got = torch::autograd::grad({x}, {v}, {c.dx});
    SwrCase only_x = c;
    only_x.dw = only_x.dr = only_x.dv = at::Tensor();
    EXPECT_LE(relative_rms(got[0], run(reference(8), only_x).at("d_v")), 1e-13);
    EXPECT_FALSE(out.index.requires_grad());
  }
}

// ---- empty problems, Meta, errors

TEST(Swr, EmptyProblems) {
  for (const int64_t window : {0, 4}) {
    const SwrCase c = random_swr_case(2, 0, 2, 3, window, true, 51);
    const Named got = run(op(window), c);
    EXPECT_EQ(got.at("x").sizes(), at::IntArrayRef({2, 0, 2, 3}));
    const Named want = run(reference(window), c);
    expect_near(got, want, 1e-15, "no steps");
    const auto [x, state] = ops::swr(at::empty({0, 5, 2}), at::empty({0, 5, 2, 3}), window);
    EXPECT_EQ(x.sizes(), at::IntArrayRef({0, 5, 2, 3}));
    EXPECT_EQ(state.w.sizes(), at::IntArrayRef({0, 2, 3}));
  }
}

TEST(Swr, MetaGivesShapesAndTypes) {
  const auto options = at::TensorOptions().device(at::kMeta).dtype(at::kBFloat16);
  const auto [x, state] =
      ops::swr(at::empty({2, 9, 3}, options), at::empty({2, 9, 3, 5}, options), 4);
  EXPECT_TRUE(x.is_meta());
  EXPECT_EQ(x.sizes(), at::IntArrayRef({2, 9, 3, 5}));
  EXPECT_EQ(x.scalar_type(), at::kBFloat16);
  EXPECT_EQ(state.w.sizes(), at::IntArrayRef({2, 3, 5}));
  EXPECT_EQ(state.r.sizes(), at::IntArrayRef({2, 3}));
  EXPECT_EQ(state.v.scalar_type(), at::kFloat);
  EXPECT_EQ(state.index.scalar_type(), at::kInt);
}

void expect_refused(const std::function<void()>& call, const std::string& part) {
  try {
    call();
    ADD_FAILURE() << "accepted; expected an error with '" << part << "'";
  } catch (const c10::Error& e) {
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
  }
}

TEST(Swr, RefusesBadInputs) {
  const at::Tensor a = at::rand({2, 5, 3}), u = at::randn({2, 5, 3, 4});
  const auto [x, state] = ops::swr(a, u, 4);
  expect_refused([&] { ops::swr(a, u, -1); }, "window is -1");
  expect_refused([&] { ops::swr(a, u, int64_t{1} << 31); }, "window");
  expect_refused([&] { ops::swr(a, u[0], 4); }, "u has shape");
  expect_refused([&] { ops::swr(a.narrow(1, 0, 4), u, 4); }, "a has shape");
  expect_refused([&] { ops::swr(a.to(at::kDouble), u, 4); }, "a is Double");
  expect_refused([&] { ops::swr(a.to(at::kHalf), u.to(at::kHalf), 4); }, "u is Half");
  expect_refused([&] { ops::swr(a.to(at::kInt), u.to(at::kInt), 4); }, "u is Int");
  SwrState bad = state;
  bad.index = at::full({2}, 4, at::kInt);
  expect_refused([&] { ops::swr(a, u, 4, bad); }, "index[0] is 4");
  bad = state;
  bad.index = state.index.to(at::kLong);
  expect_refused([&] { ops::swr(a, u, 4, bad); }, "index is Long");
  bad = state;
  bad.w = state.w.to(at::kDouble);
  expect_refused([&] { ops::swr(a, u, 4, bad); }, "w is Double");
  bad = state;
  bad.v = state.v.narrow(2, 0, 3);
  expect_refused([&] { ops::swr(a, u, 4, bad); }, "v has shape");
}

// ---- planning

TEST(SwrPlan, HorizonIsTheSmallestThatFits) {
  using kernels::swr_horizon;
  for (const double rho : {1e-9, 0.1, 0.5, 0.8, 0.99, 0.9999}) {
    for (const double tolerance : {1e-12, 1e-4, 0.1, 0.5, 1.0, 20.0}) {
      const auto tail = [&](int64_t k) { return std::pow(rho, k + 1.0) / (1.0 - rho); };
      const int64_t k = swr_horizon(rho, tolerance);
      EXPECT_GE(k, 0);
      EXPECT_LE(tail(k), tolerance) << rho << " " << tolerance;
      if (k > 0) {
        EXPECT_GT(tail(k - 1), tolerance) << rho << " " << tolerance;
      }
    }
  }
  EXPECT_EQ(swr_horizon(0.5, 0.5), 1);    // 0.25 / 0.5
  EXPECT_EQ(swr_horizon(0.8, 1e-4), 48);  // 8.9e-5; 1.1e-4 at 47
  EXPECT_EQ(swr_horizon(0.0, 1e-30), 0);
  EXPECT_EQ(swr_horizon(1.0, 1e-4), std::numeric_limits<int64_t>::max());
  EXPECT_EQ(swr_horizon(0.9, 0.0), std::numeric_limits<int64_t>::max());
}

TEST(SwrPlan, ChunksTileTheSteps) {
  for (const int64_t window : {0, 1, 2, 15, 16, 17, 31, 32, 33, 50}) {
    for (int64_t length = 0; length < 120; length += 7) {
      int64_t most_blocks = 0, most_chunks = 0;
      for (int64_t index = 0; index < std::max<int64_t>(window, 1); ++index) {
        const kernels::SwrGrid grid(window, index, length);
        most_blocks = std::max(most_blocks, grid.blocks());
        most_chunks = std::max(most_chunks, grid.chunks());
        int64_t t = 0;
        for (int64_t c = 0; c < grid.chunks(); ++c) {
          ASSERT_EQ(grid.chunk_begin(c), t);
          const int64_t end = grid.chunk_end(c), k = grid.block_of(c);
          ASSERT_GT(end, t);
          ASSERT_LE(end - t, kernels::kSwrChunk);
          ASSERT_GE(t, grid.block_begin(k));
          ASSERT_LE(end, grid.block_end(k));
          ASSERT_EQ(c == grid.first_chunk(k), t == grid.block_begin(k));
          for (; t < end; ++t) ASSERT_EQ(grid.chunk_of(t), c);
        }
        ASSERT_EQ(t, length);
        if (window > 0 && length > 0) {
          EXPECT_EQ(grid.last_block_complete(), (index + length) % window == 0);
        }
      }
      EXPECT_EQ(kernels::swr_max_blocks(window, length), most_blocks)
          << "window " << window << " length " << length;
      EXPECT_GE(kernels::swr_max_chunks(window, length), most_chunks);
      EXPECT_LE(kernels::swr_max_chunks(window, length), 2 * most_chunks + 2);
    }
  }
}

TEST(SwrPlan, StripsCoverAllBlocks) {
  for (const int64_t blocks : {1, 2, 7, 128, 100000}) {
    for (const int64_t channels : {1, 64, 4096, 1 << 20}) {
      const int64_t strip = kernels::swr_strip_blocks(blocks, channels);
      EXPECT_GE(strip, 1);
      const int64_t strips = (blocks - 1) / strip + 1;
      EXPECT_LE(strips, std::max<int64_t>(1, (int64_t{1} << 18) / channels));
    }
  }
}

TEST(SwrPlan, MarchingStripsCoverAllBlocks) {
  for (const int64_t window : {8, 16, 32, 64, 256}) {
    for (const int64_t length : {1, 100, 2048, 131072}) {
      for (const int64_t channels : {16, 1024, 4096}) {
        const auto plan = kernels::swr_march_plan(1, length, channels / 16, channels / 16, 16,
                                                  window, 2, 288, 132, 227 << 10);
        EXPECT_EQ(plan.columns, channels == 16 ? 64 : 128);
        EXPECT_GE(plan.ctas * plan.columns * 2, channels);
        EXPECT_EQ(plan.max_blocks, kernels::swr_max_blocks(window, length));
        EXPECT_GE(plan.strips * plan.strip_blocks, plan.max_blocks);
        EXPECT_LT((plan.strips - 1) * plan.strip_blocks, plan.max_blocks);
        EXPECT_LE(plan.strips * plan.ctas, 132);
        // What is walked, two blocks where the left one is folded, what is made ready, and what is
        // on its way.
        EXPECT_LE(plan.slots, window > 32 ? 3 : 6);
      }
    }
  }
}

TEST(SwrPlan, MarchTakesWhatFitsInSharedMemory) {
  const auto columns = [](int64_t window, int64_t group, int64_t shared_kb) {
    const int64_t slot_bytes = group == 1 ? 288 : 448;
    const auto plan = kernels::swr_march_plan(1, 2048, 256, 256 / group, 16, window, 2, slot_bytes,
                                              132, shared_kb << 10);
    return plan.columns;
  };
  // An H100, an A100 and smaller cards.
  EXPECT_EQ(columns(16, 1, 227), 128);
  EXPECT_EQ(columns(16, 1, 163), 128);
  EXPECT_EQ(columns(16, 1, 99), 64);
  EXPECT_EQ(columns(32, 1, 163), 64);
  EXPECT_EQ(columns(32, 1, 99), 0);
  EXPECT_EQ(columns(64, 1, 99), 64);
  // A thread owns two of the heads that share a kv head, and so more of the ring.
  for (const int64_t group : {2, 4}) {
    EXPECT_EQ(columns(16, group, 227), 128);
    EXPECT_EQ(columns(32, group, 227), 64);
    EXPECT_EQ(columns(64, group, 227), 128);
    EXPECT_EQ(columns(16, group, 163), 64);
    EXPECT_EQ(columns(32, group, 163), 0);
    EXPECT_EQ(columns(16, group, 99), 0);
    EXPECT_EQ(columns(64, group, 99), 64);
  }
}

// Where steps start with a block there is none more than they fill, and none is planned for.
TEST(SwrPlan, StripsOfAlignedSteps) {
  EXPECT_EQ(kernels::swr_max_blocks(16, 2048, true), 128);
  EXPECT_EQ(kernels::swr_max_blocks(16, 2049, true), 129);
  EXPECT_EQ(kernels::swr_max_blocks(16, 1, true), 1);
  for (const bool aligned : {false, true}) {
    const auto plan =
        kernels::swr_march_plan(1, 2048, 256, 64, 16, 16, 2, 448, 132, 227 << 10, aligned);
    EXPECT_EQ(plan.ctas, 8);
    EXPECT_EQ(plan.strips, aligned ? 16 : 15);
    EXPECT_EQ(plan.strip_blocks, aligned ? 8 : 9);
    EXPECT_EQ(plan.max_blocks, 129);  // of what the forward has saved
  }
}

TEST(SwrPlan, LongWindowsAndFullRecurrencesSave) {
  using kernels::DType;
  const auto sizes = [](int64_t length, int64_t window, DType dtype) {
    return kernels::swr_saved_sizes(2, length, 3, 16, window, dtype);
  };
  EXPECT_EQ(sizes(1000, 32, DType::kBFloat16).total(), 0);
  EXPECT_EQ(sizes(1, 64, DType::kBFloat16).total(), 0);
  EXPECT_EQ(sizes(1000, 64, DType::kFloat64).total(), 0);
  // 1000 steps touch at most 17 blocks of 64 steps, of 4 chunks each.
  EXPECT_EQ(sizes(1000, 64, DType::kFloat32).chunks, 17 * 4);
  EXPECT_EQ(sizes(1000, 64, DType::kFloat32).states, 2 * 17 * 4 * 3 * 16);
  EXPECT_EQ(sizes(1000, 64, DType::kFloat32).products, 2 * 17 * 3);
  // A full recurrence: 8 tiles of 128 steps.
  EXPECT_EQ(sizes(1000, 0, DType::kBFloat16).chunks, 8);
  EXPECT_EQ(sizes(1000, 0, DType::kBFloat16).states, 2 * 8 * 3 * 16);
  EXPECT_EQ(sizes(1000, 0, DType::kBFloat16).products, 0);
}

// ---- the same on a GPU

TEST(SwrCuda, GoldenFloat) {
  SKIP_WITHOUT_CUDA();
  check_golden(at::kCUDA, at::kFloat);
}
TEST(SwrCuda, GoldenDoubleAndBf16) {
  SKIP_WITHOUT_CUDA();
  check_golden(at::kCUDA, at::kDouble);
  check_golden(at::kCUDA, at::kBFloat16);
}
TEST(SwrCuda, StepSemantics) {
  SKIP_WITHOUT_CUDA();
  check_against_reference(at::kCUDA, at::kDouble);
  check_against_reference(at::kCUDA, at::kFloat);
  check_against_reference(at::kCUDA, at::kBFloat16);
}
TEST(SwrCuda, AnySplitEqualsTheWhole) {
  SKIP_WITHOUT_CUDA();
  check_splits(at::kCUDA, at::kDouble);
  check_splits(at::kCUDA, at::kFloat);
  check_splits(at::kCUDA, at::kBFloat16);
}
TEST(SwrCuda, StridedInputs) {
  SKIP_WITHOUT_CUDA();
  check_strides(at::kCUDA);
}
TEST(SwrCuda, WritesEverythingAndRepeats) {
  SKIP_WITHOUT_CUDA();
  check_repeats(at::kCUDA);
}
// Long sequences, and so many channels that a strip of time holds several blocks.
TEST(SwrCuda, LargeProblemsMatchTheCpu) {
  SKIP_WITHOUT_CUDA();
  for (const Shape& s :
       {Shape{1, 5003, 7, 16, 16}, Shape{2, 4099, 3, 40, 100}, Shape{1, 3001, 5, 16, 0},
        Shape{1, 40000, 1, 3, 128}, Shape{2, 600, 128, 64, 16}}) {
    const SwrCase c = random_swr_case(s.batch, s.length, s.heads, s.width, s.window, true, 15);
    const Named want = run(op(s.window), c.to(at::kCPU, at::kFloat).to(at::kCPU, at::kDouble));
    expect_near(run(op(s.window), c.to(at::kCUDA, at::kFloat)), want, 2e-6, describe(s, true));
  }
}

}  // namespace
}  // namespace sarissa
