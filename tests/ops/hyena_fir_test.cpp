// hyena_fir (Hyena-SE, Hyena-MR) against the golden vectors and a dense computation in double, and
// its contracts: states, strides, dtypes, determinism.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "sarissa/base/error.h"
#include "sarissa/ops/device.h"
#include "sarissa/ops/ops.h"
#include "tests/support/compare.h"
#include "tests/support/golden.h"

namespace sarissa {
namespace {

using at::Tensor;
using test::bit_equal;
using test::GoldenCase;
using test::relative_rms;

at::ScalarType state_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// The golden files interleave the projected channels (post, pre, value of channel 0, then of
// channel 1, ...), put the current step's tap last in the featurizer and in SE taps, and keep
// states as [B, channels, steps].

Tensor to_thirds(const Tensor& x, int64_t dim) {
  return x.unflatten(dim, {x.size(dim) / 3, 3}).transpose(dim, dim + 1).flatten(dim, dim + 1);
}
Tensor to_triples(const Tensor& x, int64_t dim) {
  return x.unflatten(dim, {3, x.size(dim) / 3}).transpose(dim, dim + 1).flatten(dim, dim + 1);
}

/// Inputs of a golden case as leaves in the golden layout, by their golden names.
struct GoldenInputs {
  std::map<std::string, Tensor> leaves;
  Tensor decay;  // MR only
  int64_t num_taps;

  GoldenInputs(const GoldenCase& g, at::ScalarType dtype, at::Device device)
      : num_taps(g.config()["K"]) {
    for (const char* name : {"featurizer", "h", "D", "state_feat_in", "state_inner_in"}) {
      if (g.has(name)) {
        const auto type = std::string(name) == "state_inner_in" ? state_type(dtype) : dtype;
        leaves[name] = g[name].to(device, type).requires_grad_(true);
      }
    }
    if (g.has("decay")) decay = g["decay"].to(device, state_type(dtype));
  }

  std::tuple<Tensor, ops::HyenaState> run(const Tensor& z_golden) const {
    // Under bf16 the MR taps stay fp32 next to bf16 z: parameters may be wider than z.
    const Tensor taps = decay.defined()
                            ? (leaves.at("h").to(decay.scalar_type()) * decay).slice(1, 0, num_taps)
                            : leaves.at("h").flip(1);
    std::optional<Tensor> skip;
    if (leaves.contains("D")) skip = leaves.at("D");
    std::optional<ops::HyenaState> state;
    if (leaves.contains("state_feat_in")) {
      state = {to_thirds(leaves.at("state_feat_in"), 1).transpose(1, 2),
               leaves.at("state_inner_in").transpose(1, 2)};
    }
    return ops::hyena_fir(to_thirds(z_golden, 2), to_thirds(leaves.at("featurizer").flip(1), 0),
                          taps, skip, state);
  }
};

Tensor golden_featurizer_state(const ops::HyenaState& s) {
  return to_triples(s.featurizer.transpose(1, 2), 1);
}
Tensor golden_inner_state(const ops::HyenaState& s) { return s.inner.transpose(1, 2); }

void expect_golden_case(const GoldenCase& g, at::ScalarType dtype, at::Device device) {
  const GoldenInputs in(g, dtype, device);
  std::map<std::string, Tensor> leaves = in.leaves;
  leaves["z"] = g["z"].to(device, dtype).requires_grad_(true);
  const auto [y, state] = in.run(leaves["z"]);
  EXPECT_GOLDEN(g, "y", y, dtype);
  std::vector<Tensor> outputs = {y}, upstream = {g["dy"].to(device, dtype)};
  const auto check_state = [&](const char* name, const Tensor& got) {
    if (g.has(name)) {
      EXPECT_GOLDEN(g, name, got, dtype);
    }
    const std::string gradient = std::string("d_") + name;
    if (g.has(gradient)) {
      outputs.push_back(got);
      upstream.push_back(g[gradient].to(device, got.scalar_type()));
    }
  };
  check_state("state_feat_out", golden_featurizer_state(state));
  check_state("state_inner_out", golden_inner_state(state));
  std::vector<Tensor> inputs;
  for (const auto& [name, leaf] : leaves) inputs.push_back(leaf);
  const auto gradients = torch::autograd::grad(outputs, inputs, upstream);
  size_t i = 0;
  for (const auto& [name, leaf] : leaves) {
    const std::string gradient = "d_" + name;
    EXPECT_GOLDEN(g, gradient, gradients[i++], dtype);
  }
}

/// The files stop at the states after every prefix; the rest of the run must follow from them.
void expect_golden_prefixes(const GoldenCase& g, at::ScalarType dtype, at::Device device) {
  const GoldenInputs in(g, dtype, device);
  const Tensor z = g["z"].to(device, dtype);
  const Tensor y = std::get<0>(in.run(z)).detach();
  const Tensor cuts = g["cuts"];
  std::vector<Tensor> featurizer, inner;
  for (int64_t i = 0; i < cuts.size(0); ++i) {
    const int64_t cut = cuts[i].item<int64_t>();
    const auto [head, state] = in.run(z.slice(1, 0, cut));
    featurizer.push_back(golden_featurizer_state(state));
    inner.push_back(golden_inner_state(state));
    GoldenInputs rest = in;
    rest.leaves["state_feat_in"] = featurizer.back();
    rest.leaves["state_inner_in"] = inner.back();
    const Tensor tail = std::get<0>(rest.run(z.slice(1, cut)));
    EXPECT_TRUE(bit_equal(at::cat({head, tail}, 1), y)) << g.name() << " cut at " << cut;
  }
  EXPECT_GOLDEN(g, "feat_after", at::stack(featurizer), dtype);
  EXPECT_GOLDEN(g, "inner_after", at::stack(inner), dtype);
}

/// value(t, c) = ((t k1 + c k2 + (t t mod q)) mod m + s) / d, [1, L, channels].
Tensor formula(const nlohmann::json& f, int64_t length, int64_t channels) {
  const auto number = [&](const char* name) { return f[name].get<int64_t>(); };
  const Tensor t = at::arange(length, at::kLong).unsqueeze(1);
  const Tensor c = at::arange(channels, at::kLong).unsqueeze(0);
  const Tensor value = (t * number("k1") + c * number("k2") + (t * t).remainder(number("q")))
                           .remainder(number("m")) +
                       number("s");
  return (value.to(at::kDouble) / static_cast<double>(number("d"))).unsqueeze(0);
}

void expect_golden_long(const GoldenCase& g, at::ScalarType dtype, at::Device device) {
  const auto& c = g.config();
  const Tensor z = formula(c["formulas"]["z"], c["L"], 3 * c["D"].get<int64_t>())
                       .to(device, dtype)
                       .requires_grad_(true);
  const Tensor dy = formula(c["formulas"]["dy"], c["L"], c["D"]).to(device, dtype);
  const GoldenInputs in(g, dtype, device);
  const Tensor y = std::get<0>(in.run(z));
  std::vector<Tensor> inputs = {z};
  for (const auto& [name, leaf] : in.leaves) inputs.push_back(leaf);
  const auto gradients = torch::autograd::grad({y}, inputs, {dy});
  const Tensor pos = g["pos"].to(device);
  EXPECT_GOLDEN(g, "y_at", y.index_select(1, pos), dtype);
  EXPECT_GOLDEN(g, "d_z_at", gradients[0].index_select(1, pos), dtype);
  size_t i = 1;
  for (const auto& [name, leaf] : in.leaves) {
    const std::string gradient = "d_" + name;
    EXPECT_GOLDEN(g, gradient, gradients[i++], dtype);
  }
}

/// Every golden case of the family; the decay tables hold no operator run.
void expect_golden(at::ScalarType dtype, at::Device device) {
  int cases = 0;
  for (const char* prefix : {"hyena_se_", "hyena_mr_"}) {
    for (const std::string& name : test::golden_cases(prefix)) {
      if (name == "hyena_mr_decay_tables") continue;
      const GoldenCase g(name);
      if (dtype == at::kBFloat16 && !g.is_bf16()) continue;
      ++cases;
      if (name.find("_long_") != std::string::npos) {
        expect_golden_long(g, dtype, device);
        continue;
      }
      expect_golden_case(g, dtype, device);
      if (g.has("cuts")) expect_golden_prefixes(g, dtype, device);
    }
  }
  EXPECT_GT(cases, 0);
}

TEST(HyenaFir, GoldenVectorsInDouble) { expect_golden(at::kDouble, at::kCPU); }
TEST(HyenaFir, GoldenVectorsInFloat) { expect_golden(at::kFloat, at::kCPU); }
TEST(HyenaFir, GoldenVectorsInBFloat16) { expect_golden(at::kBFloat16, at::kCPU); }

struct Shape {
  int64_t B, L, D, G, W;
};

std::ostream& operator<<(std::ostream& out, const Shape& s) {
  return out << "B" << s.B << " L" << s.L << " D" << s.D << " G" << s.G << " W" << s.W;
}

const std::vector<Shape> kShapes = {
    {1, 1, 1, 1, 1},      {2, 1, 3, 3, 2},      {2, 2, 20, 5, 7},   {3, 6, 15, 1, 7},
    {1, 7, 64, 4, 7},     {1, 8, 65, 13, 7},    {1, 257, 70, 7, 4}, {2, 127, 33, 11, 128},
    {1, 128, 16, 2, 128}, {1, 129, 17, 1, 128}, {1, 521, 12, 3, 9}, {1, 3, 6, 2, 300},
    {1, 601, 4, 2, 530},
};

/// z, featurizer, taps, skip, featurizer state, inner state; then the gradients of y and the
/// states.
struct Problem {
  std::vector<Tensor> inputs, upstream;  // double, on the CPU
};

Problem make_problem(const Shape& s, uint64_t seed = 7) {
  const auto r = [&](at::IntArrayRef sizes) { return test::randn(sizes, seed++); };
  Problem p;
  p.inputs = {r({s.B, s.L, 3 * s.D}), r({3 * s.D, 3}),       r({s.G, s.W}), r({s.D}),
              r({s.B, 2, 3 * s.D}),   r({s.B, s.W - 1, s.D})};
  p.upstream = {r({s.B, s.L, s.D}), r({s.B, 2, 3 * s.D}), r({s.B, s.W - 1, s.D})};
  return p;
}

const char* kNames[] = {"y",      "featurizer_state_out", "inner_state_out",
                        "dz",     "d_featurizer",         "d_taps",
                        "d_skip", "d_featurizer_state",   "d_inner_state"};

using Operator = std::function<std::vector<Tensor>(const std::vector<Tensor>&)>;

std::vector<Tensor> call(const std::vector<Tensor>& in) {
  const auto [y, state] = ops::hyena_fir(in[0], in[1], in[2], in[3], ops::HyenaState{in[4], in[5]});
  return {y, state.featurizer, state.inner};
}

/// y [.., D] = M [state; u] for one filter per channel, M[t, t + W-1 - k] = taps[k].
Tensor dense_fir(const Tensor& extended, const Tensor& taps, int64_t L) {
  const int64_t W = taps.size(1);
  const Tensor k = at::arange(L).unsqueeze(1) + (W - 1) - at::arange(L + W - 1).unsqueeze(0);
  const Tensor matrix = at::where(
      k.ge(0).logical_and(k.lt(W)),
      taps.index_select(1, k.clamp(0, W - 1).flatten()).view({taps.size(0), L, L + W - 1}),
      at::zeros({}, taps.options()));
  return at::einsum("cts,bsc->btc", {matrix, extended});
}

std::vector<Tensor> dense(const std::vector<Tensor>& in) {
  const int64_t L = in[0].size(1), D = in[3].size(0);
  const Tensor z = at::cat({in[4], in[0]}, 1);
  const auto tap = [&](int64_t k) { return in[1].select(1, k) * z.slice(1, 2 - k, 2 - k + L); };
  const auto c = (tap(0) + tap(1) + tap(2)).split(D, 2);
  const Tensor u = c[1] * c[2];
  const Tensor extended = at::cat({in[5], u}, 1);
  const Tensor taps = in[2].repeat_interleave(D / in[2].size(0), 0);
  return {c[0] * (dense_fir(extended, taps, L) + in[3] * u), z.slice(1, L), extended.slice(1, L)};
}

/// The operator's results and gradients. Parameters take `parameters`, the rest follows dtype.
std::vector<Tensor> run(const Operator& f, const Problem& p, at::ScalarType dtype,
                        at::Device device, at::ScalarType parameters) {
  const at::ScalarType inner = state_type(dtype);
  const at::ScalarType types[] = {dtype, parameters, parameters, parameters, dtype, inner};
  std::vector<Tensor> leaves, upstream;
  for (size_t i = 0; i < p.inputs.size(); ++i) {
    leaves.push_back(p.inputs[i].to(device, types[i]).detach().clone().requires_grad_(true));
  }
  std::vector<Tensor> results = f(leaves);
  for (size_t i = 0; i < results.size(); ++i) {
    upstream.push_back(p.upstream[i].to(device, results[i].scalar_type()));
  }
  for (Tensor& g : torch::autograd::grad(results, leaves, upstream)) results.push_back(g);
  return results;
}

std::vector<Tensor> run(const Problem& p, at::ScalarType dtype, at::Device device = at::kCPU) {
  return run(call, p, dtype, device, dtype);
}

void expect_dense(at::ScalarType dtype, at::Device device, double tolerance) {
  const test::PoisonMemory poison;
  for (const Shape& s : kShapes) {
    const Problem p = make_problem(s);
    const auto got = run(p, dtype, device);
    const auto want = run(dense, p, at::kDouble, at::kCPU, at::kDouble);
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT_LE(relative_rms(got[i], want[i]), tolerance) << s << ": " << kNames[i];
    }
  }
}

TEST(HyenaFir, MatchesTheDenseComputationInDouble) { expect_dense(at::kDouble, at::kCPU, 4e-15); }
TEST(HyenaFir, MatchesTheDenseComputationInFloat) { expect_dense(at::kFloat, at::kCPU, 2e-6); }

/// Error at most twice that of rounding the exact results to the output's dtype once.
void expect_bfloat16_rule(at::Device device) {
  for (const Shape& s : kShapes) {
    Problem p = make_problem(s);
    for (auto* tensors : {&p.inputs, &p.upstream}) {
      for (Tensor& t : *tensors) t = t.to(at::kBFloat16).to(at::kDouble);
    }
    const auto got = run(p, at::kBFloat16, device);
    const auto want = run(dense, p, at::kDouble, at::kCPU, at::kDouble);
    for (size_t i = 0; i < got.size(); ++i) {
      const bool inner = i == 2 || i == 8;  // fp32 states
      EXPECT_EQ(got[i].scalar_type(), inner ? at::kFloat : at::kBFloat16) << kNames[i];
      const double plain = relative_rms(want[i].to(got[i].scalar_type()), want[i]);
      EXPECT_LE(relative_rms(got[i], want[i]), std::max(1e-5, 2 * plain)) << s << ": " << kNames[i];
    }
  }
}

TEST(HyenaFir, BFloat16RoundsOnlyAtTheEnds) { expect_bfloat16_rule(at::kCPU); }

TEST(HyenaFir, ParametersMayBeFloatUnderAnyInput) {
  const Problem p = make_problem({2, 37, 20, 4, 7});
  for (const auto dtype : {at::kDouble, at::kBFloat16}) {
    const auto got = run(call, p, dtype, at::kCPU, at::kFloat);
    const auto want = run(dense, p, at::kDouble, at::kCPU, at::kDouble);
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT_LE(relative_rms(got[i], want[i]), dtype == at::kDouble ? 1e-6 : 2e-2) << kNames[i];
    }
    for (const size_t i : {4, 5, 6}) EXPECT_EQ(got[i].scalar_type(), at::kFloat) << kNames[i];
  }
}

TEST(HyenaFir, SkipAndStatesAreOptional) {
  const Problem p = make_problem({2, 37, 20, 4, 7});
  const auto& in = p.inputs;
  std::vector<Tensor> zeros = in;
  for (const size_t i : {3, 4, 5}) zeros[i] = at::zeros_like(in[i]);
  const auto want = call(zeros);
  const auto [y, state] = ops::hyena_fir(in[0], in[1], in[2], std::nullopt);
  EXPECT_TRUE(bit_equal(y, want[0]));
  EXPECT_TRUE(bit_equal(state.featurizer, want[1]));
  EXPECT_TRUE(bit_equal(state.inner, want[2]));

  const std::vector<Tensor> leaves = {in[0].clone().requires_grad_(true),
                                      in[2].clone().requires_grad_(true)};
  const Tensor bare = std::get<0>(ops::hyena_fir(leaves[0], in[1], leaves[1], std::nullopt));
  const auto got = torch::autograd::grad({bare}, leaves, {p.upstream[0]});
  Problem from_zero{zeros,
                    {p.upstream[0], at::zeros_like(p.upstream[1]), at::zeros_like(p.upstream[2])}};
  const auto gradients = run(from_zero, at::kDouble);
  EXPECT_TRUE(bit_equal(got[0], gradients[3]));
  EXPECT_TRUE(bit_equal(got[1], gradients[5]));
}

TEST(HyenaFir, GradientsMatchFiniteDifferences) {
  const Problem p = make_problem({2, 9, 6, 2, 5});
  const auto f = [](const std::vector<Tensor>& in) {
    const auto out = call(in);
    return at::cat({out[0].flatten(), out[1].flatten(), out[2].flatten()});
  };
  EXPECT_LE(test::gradient_error(f, p.inputs), 1e-7);
}

TEST(HyenaFir, EachOutputAloneSendsItsGradient) {
  const Problem p = make_problem({2, 11, 6, 2, 5});
  const auto gradients = [&](std::initializer_list<size_t> used) {
    std::vector<Tensor> leaves;
    for (const Tensor& t : p.inputs) leaves.push_back(t.clone().requires_grad_(true));
    const auto out = call(leaves);
    Tensor loss = at::zeros({}, out[0].options());
    for (const size_t i : used) loss = loss + out[i].sum();  // an expanded gradient
    auto grads = torch::autograd::grad({loss}, leaves, {}, std::nullopt, false, true);
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!grads[i].defined()) grads[i] = at::zeros_like(p.inputs[i]);
    }
    return grads;
  };
  const auto all = gradients({0, 1, 2});
  const auto y = gradients({0}), featurizer = gradients({1}), inner = gradients({2});
  for (size_t i = 0; i < all.size(); ++i) {
    EXPECT_LE(relative_rms(y[i] + featurizer[i] + inner[i], all[i]), 1e-14) << kNames[3 + i];
    EXPECT_GT(all[i].abs().max().item<double>(), 0.0) << kNames[3 + i];
  }
}

void expect_splits_equal(at::ScalarType dtype, at::Device device) {
  for (const Shape& s :
       {Shape{2, 37, 20, 4, 7}, Shape{1, 300, 70, 7, 128}, Shape{1, 11, 9, 3, 1}}) {
    const Problem p = make_problem(s);
    std::vector<Tensor> in;
    for (size_t i = 0; i < 4; ++i) in.push_back(p.inputs[i].to(device, dtype));
    const auto go = [&](int64_t begin, int64_t end, const std::optional<ops::HyenaState>& state) {
      return ops::hyena_fir(in[0].slice(1, begin, end), in[1], in[2], in[3], state);
    };
    const auto [y, state] = go(0, s.L, std::nullopt);
    for (const int64_t cut : {int64_t{0}, int64_t{1}, int64_t{2}, s.W - 1, s.L / 2, s.L - 1, s.L}) {
      if (cut > s.L) continue;
      const auto [y1, state1] = go(0, cut, std::nullopt);
      const auto [y2, state2] = go(cut, s.L, state1);
      EXPECT_TRUE(bit_equal(at::cat({y1, y2}, 1), y)) << s << " cut " << cut;
      EXPECT_TRUE(bit_equal(state2.featurizer, state.featurizer)) << s << " cut " << cut;
      EXPECT_TRUE(bit_equal(state2.inner, state.inner)) << s << " cut " << cut;
    }
    std::optional<ops::HyenaState> carried;
    for (int64_t t = 0; t < s.L; ++t) {
      const auto [step, next] = go(t, t + 1, carried);
      EXPECT_TRUE(bit_equal(step, y.slice(1, t, t + 1))) << s << " step " << t;
      carried = next;
    }
    EXPECT_TRUE(bit_equal(carried->inner, state.inner)) << s;
  }
}

TEST(HyenaFir, AnySplitAndSteppingGiveTheSameBits) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    expect_splits_equal(dtype, at::kCPU);
  }
}

/// The gradient through a split, states and all, is the gradient of the unsplit run.
TEST(HyenaFir, GradientsFlowThroughCarriedStates) {
  const Problem p = make_problem({2, 60, 12, 3, 31});
  const Operator split = [](const std::vector<Tensor>& in) {
    std::optional<ops::HyenaState> state{{in[4], in[5]}};
    std::vector<Tensor> y;
    for (const auto& [begin, end] : {std::pair{0, 1}, {1, 18}, {18, 50}, {50, 60}}) {
      auto [part, next] = ops::hyena_fir(in[0].slice(1, begin, end), in[1], in[2], in[3], state);
      y.push_back(part);
      state = next;
    }
    return std::vector<Tensor>{at::cat(y, 1), state->featurizer, state->inner};
  };
  const auto got = run(split, p, at::kDouble, at::kCPU, at::kDouble);
  const auto want = run(p, at::kDouble);
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_LE(relative_rms(got[i], want[i]), 1e-14) << kNames[i];
  }
}

void expect_strides_honoured(at::Device device) {
  const Problem p = make_problem({2, 37, 20, 4, 7});
  const auto want = run(p, at::kFloat, device);
  for (const bool channels_strided : {false, true}) {
    const auto view = [&](const Tensor& x) {
      const Tensor t = x.to(device, at::kFloat);
      return channels_strided && t.dim() > 1 ? t.transpose(-1, -2).contiguous().transpose(-1, -2)
                                             : test::strided_copy(t);
    };
    std::vector<Tensor> leaves, upstream;
    for (const Tensor& t : p.inputs) leaves.push_back(view(t).requires_grad_(true));
    for (const Tensor& t : p.upstream) upstream.push_back(view(t));
    auto got = call(leaves);
    for (Tensor& g : torch::autograd::grad(got, leaves, upstream)) got.push_back(g);
    for (size_t i = 0; i < want.size(); ++i) EXPECT_TRUE(bit_equal(got[i], want[i])) << kNames[i];
  }
}

TEST(HyenaFir, HonoursStrides) { expect_strides_honoured(at::kCPU); }

void expect_repeatable(at::Device device) {
  const Problem p = make_problem({2, 1100, 70, 7, 128});
  const auto once = run(p, at::kFloat, device);
  const auto again = run(p, at::kFloat, device);
  for (size_t i = 0; i < once.size(); ++i) EXPECT_TRUE(bit_equal(once[i], again[i])) << kNames[i];
}

TEST(HyenaFir, RunsAndThreadCountsGiveTheSameBits) {
  expect_repeatable(at::kCPU);
  const Problem p = make_problem({2, 1100, 70, 7, 128});
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const auto one = run(p, at::kFloat);
  at::set_num_threads(2);
  const auto two = run(p, at::kFloat);
  at::set_num_threads(threads);
  for (size_t i = 0; i < one.size(); ++i) EXPECT_TRUE(bit_equal(one[i], two[i])) << kNames[i];
}

TEST(HyenaFir, EmptyBatchesAndLengthsBehave) {
  const Problem p = make_problem({2, 0, 6, 2, 5});
  const auto got = run(p, at::kDouble);
  EXPECT_EQ(got[0].sizes(), at::IntArrayRef({2, 0, 6}));
  EXPECT_TRUE(bit_equal(got[1], p.inputs[4]));
  EXPECT_TRUE(bit_equal(got[2], p.inputs[5]));
  for (const size_t i : {4, 5, 6}) EXPECT_EQ(got[i].abs().max().item<double>(), 0.0) << kNames[i];
  EXPECT_TRUE(bit_equal(got[7], p.upstream[1]));
  EXPECT_TRUE(bit_equal(got[8], p.upstream[2]));

  const auto none = run(make_problem({0, 4, 6, 2, 5}), at::kDouble);
  EXPECT_EQ(none[0].sizes(), at::IntArrayRef({0, 4, 6}));
  for (const size_t i : {4, 5, 6}) EXPECT_EQ(none[i].abs().max().item<double>(), 0.0) << kNames[i];
}

TEST(HyenaFir, MetaTensorsGiveShapes) {
  const auto meta = at::TensorOptions().dtype(at::kBFloat16).device(at::kMeta);
  const auto [y, state] = ops::hyena_fir(at::empty({2, 9, 18}, meta), at::empty({18, 3}, meta),
                                         at::empty({3, 5}, meta), std::nullopt);
  EXPECT_TRUE(y.is_meta());
  EXPECT_EQ(y.sizes(), at::IntArrayRef({2, 9, 6}));
  EXPECT_EQ(state.featurizer.sizes(), at::IntArrayRef({2, 2, 18}));
  EXPECT_EQ(state.inner.sizes(), at::IntArrayRef({2, 4, 6}));
  EXPECT_EQ(state.inner.scalar_type(), at::kFloat);
}

void expect_refused(const std::vector<Tensor>& in, std::initializer_list<const char*> words) {
  std::string text = "no error";
  try {
    call(in);
  } catch (const c10::Error& e) {
    text = e.what_without_backtrace();
  }
  for (const char* word : words) {
    EXPECT_NE(text.find(word), std::string::npos) << "'" << word << "' is not in: " << text;
  }
}

TEST(HyenaFir, RefusesBadInputsByName) {
  const std::vector<Tensor> good = {at::zeros({2, 9, 18}), at::zeros({18, 3}),
                                    at::zeros({3, 5}),     at::zeros({6}),
                                    at::zeros({2, 2, 18}), at::zeros({2, 4, 6})};
  const auto with = [&](size_t i, const Tensor& t) {
    std::vector<Tensor> in = good;
    in[i] = t;
    return in;
  };
  expect_refused(with(0, good[0].to(at::kHalf)), {"sarissa::hyena_fir", "z is Half"});
  expect_refused(with(0, at::zeros({2, 9, 17})), {"z has shape [2, 9, 17]", "[B, L, 3D]"});
  expect_refused(with(1, at::zeros({18, 4})), {"featurizer has shape [18, 4]", "[18, 3]"});
  expect_refused(with(1, good[1].to(at::kDouble)), {"featurizer is Double"});
  expect_refused(with(2, at::zeros({4, 5})), {"taps has shape [4, 5]", "D = 6"});
  expect_refused(with(3, at::zeros({18})), {"skip has shape [18]", "[6]"});
  expect_refused(with(4, at::zeros({2, 3, 18})), {"featurizer_state has shape [2, 3, 18]"});
  expect_refused(with(5, at::zeros({2, 5, 6})), {"inner_state has shape [2, 5, 6]", "[2, 4, 6]"});
  expect_refused(with(5, good[5].to(at::kBFloat16)), {"inner_state is BFloat16", "Float"});
}

TEST(HyenaFirCuda, GoldenVectorsInFloat) {
  SKIP_WITHOUT_CUDA();
  expect_golden(at::kFloat, at::kCUDA);
}
TEST(HyenaFirCuda, GoldenVectorsInBFloat16) {
  SKIP_WITHOUT_CUDA();
  expect_golden(at::kBFloat16, at::kCUDA);
}
TEST(HyenaFirCuda, MatchesTheDenseComputationInDouble) {
  SKIP_WITHOUT_CUDA();
  expect_dense(at::kDouble, at::kCUDA, 4e-15);
}
TEST(HyenaFirCuda, MatchesTheDenseComputationInFloat) {
  SKIP_WITHOUT_CUDA();
  expect_dense(at::kFloat, at::kCUDA, 2e-6);
}
TEST(HyenaFirCuda, BFloat16RoundsOnlyAtTheEnds) {
  SKIP_WITHOUT_CUDA();
  expect_bfloat16_rule(at::kCUDA);
}
TEST(HyenaFirCuda, AnySplitAndSteppingGiveTheSameBits) {
  SKIP_WITHOUT_CUDA();
  for (const auto dtype : {at::kFloat, at::kBFloat16}) expect_splits_equal(dtype, at::kCUDA);
}
TEST(HyenaFirCuda, HonoursStrides) {
  SKIP_WITHOUT_CUDA();
  expect_strides_honoured(at::kCUDA);
}
TEST(HyenaFirCuda, RunsGiveTheSameBits) {
  SKIP_WITHOUT_CUDA();
  expect_repeatable(at::kCUDA);
}

}  // namespace
}  // namespace sarissa
