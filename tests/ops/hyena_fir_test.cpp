// hyena_fir (Hyena-SE, Hyena-MR) against the golden vectors and a dense computation in double, and
// its contracts: states, strides, dtypes, determinism.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "sarissa/base/error.h"
#include "sarissa/kernels/fir/fir_plan.h"
#include "sarissa/ops/device.h"
#include "sarissa/ops/ops.h"
#include "tests/ops/fir_problem.h"
#include "tests/support/compare.h"
#include "tests/support/fft.h"
#include "tests/support/golden.h"

namespace sarissa {
namespace {

using at::Tensor;
using test::bit_equal;
using test::GoldenCase;
using test::plan_problem;
using test::relative_rms;
using Shape = test::FirShape;

at::ScalarType state_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

/// On a GPU many taps are summed in another order by a step than by a sequence, and in bfloat16 the
/// tensor cores round u and taps besides: outputs then agree but for that. States do bit for bit.
void expect_same_outputs(const Tensor& got, const Tensor& want, int64_t num_taps,
                         const std::string& where) {
  const bool rounds = got.scalar_type() == at::kBFloat16;
  if (got.is_cpu() || num_taps <= (rounds ? 14 : 16)) {
    EXPECT_TRUE(bit_equal(got, want)) << where;
  } else {
    EXPECT_LE(relative_rms(got, want), rounds ? 8e-3 : 1e-6) << where;
  }
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
    expect_same_outputs(at::cat({head, tail}, 1), y, in.num_taps, str(g.name(), " cut ", cut));
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

const std::vector<Shape> kShapes = {
    {1, 1, 1, 1, 1},
    {2, 1, 3, 3, 2},
    {2, 2, 20, 5, 7},
    {3, 6, 15, 1, 7},
    {1, 7, 64, 4, 7},
    {1, 8, 65, 13, 7},
    {1, 257, 70, 7, 4},
    {2, 127, 33, 11, 128},
    {1, 128, 16, 2, 128},
    {1, 129, 17, 1, 128},
    {1, 521, 12, 3, 9},
    {1, 3, 6, 2, 300},
    {1, 601, 4, 2, 530},
    // Of the marching kernels: strips and their edges, whole and ragged groups of rows, 1, 2 and 4
    // channels per thread, warps that are not full, rows that are no multiple of 16 bytes.
    {1, 64, 64, 4, 7},
    {1, 65, 64, 4, 4},
    {2, 71, 64, 16, 14},
    {1, 97, 272, 17, 7},
    {3, 139, 48, 24, 14},
    {1, 130, 36, 9, 2},
    {1, 95, 24, 24, 5},
    {2, 1, 64, 4, 14},
    {1, 9, 40, 10, 14},
    {1, 130, 130, 1, 10},
    // Of the step kernel: one run of taps and many, groups that share taps and not, ragged widths.
    {3, 1, 64, 8, 16},
    {3, 1, 264, 33, 17},
    {2, 1, 64, 8, 128},
    {2, 1, 36, 18, 128},
    {1, 1, 30, 5, 40},
    {2, 1, 12, 3, 1030},
};
// Filters as long as the sequence and longer, across time chunks of any size.
const std::vector<Shape> kLongShapes = {{1, 1500, 2, 1, 1500}, {1, 1500, 1, 1, 3000}};
const std::vector<Shape> kFftShapes = {
    {2, 301, 20, 5, 17}, {2, 1500, 6, 3, 1500}, {1, 1500, 20, 5, 3000}, {2, 2100, 64, 4, 128}};

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

/// The same by FFT.
Tensor fft_fir(const Tensor& extended, const Tensor& taps, int64_t) {
  return test::fft_convolution(extended, taps).slice(1, taps.size(1) - 1);
}

/// The operator composed of simple ones around fir(extended u, taps per channel, L).
std::vector<Tensor> composed(const std::vector<Tensor>& in,
                             Tensor (*fir)(const Tensor&, const Tensor&, int64_t)) {
  const int64_t L = in[0].size(1), D = in[3].size(0);
  const Tensor z = at::cat({in[4], in[0]}, 1);
  const auto tap = [&](int64_t k) { return in[1].select(1, k) * z.slice(1, 2 - k, 2 - k + L); };
  const auto c = (tap(0) + tap(1) + tap(2)).split(D, 2);
  const Tensor u = c[1] * c[2];
  const Tensor extended = at::cat({in[5], u}, 1);
  const Tensor taps = in[2].repeat_interleave(D / in[2].size(0), 0);
  return {c[0] * (fir(extended, taps, L) + in[3] * u), z.slice(1, L), extended.slice(1, L)};
}
std::vector<Tensor> dense(const std::vector<Tensor>& in) { return composed(in, dense_fir); }
std::vector<Tensor> by_fft(const std::vector<Tensor>& in) { return composed(in, fft_fir); }

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

void expect_equal(const Operator& reference, const std::vector<Shape>& shapes, at::ScalarType dtype,
                  at::Device device, double tolerance) {
  const test::PoisonMemory poison;
  for (const Shape& s : shapes) {
    const Problem p = make_problem(s);
    const auto got = run(p, dtype, device);
    const auto want = run(reference, p, at::kDouble, at::kCPU, at::kDouble);
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT_LE(relative_rms(got[i], want[i]), tolerance) << s << ": " << kNames[i];
    }
  }
}
void expect_dense(at::ScalarType dtype, at::Device device, double tolerance) {
  expect_equal(dense, kShapes, dtype, device, tolerance);
}
/// Sums of thousands of products are less exact.
void expect_long_filters(at::ScalarType dtype, at::Device device, double tolerance) {
  expect_equal(dense, kLongShapes, dtype, device, tolerance);
}

TEST(HyenaFir, MatchesTheDenseComputationInDouble) { expect_dense(at::kDouble, at::kCPU, 4e-15); }
TEST(HyenaFir, MatchesTheDenseComputationInFloat) { expect_dense(at::kFloat, at::kCPU, 2e-6); }
TEST(HyenaFir, FiltersAsLongAsTheSequenceInDouble) {
  expect_long_filters(at::kDouble, at::kCPU, 1e-14);
}
TEST(HyenaFir, FiltersAsLongAsTheSequenceInFloat) {
  expect_long_filters(at::kFloat, at::kCPU, 5e-6);
}
TEST(HyenaFir, MatchesFftConvolution) {
  expect_equal(by_fft, kFftShapes, at::kDouble, at::kCPU, 1e-14);
}

/// Error at most twice that of rounding the exact results to the output's dtype once.
void expect_bfloat16_rule(at::Device device) {
  std::vector<Shape> shapes = kShapes;
  shapes.insert(shapes.end(), kLongShapes.begin(), kLongShapes.end());
  for (const Shape& s : shapes) {
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

void expect_float_parameters(at::ScalarType dtype, at::Device device, const Shape& s) {
  const Problem p = make_problem(s);
  const auto got = run(call, p, dtype, device, at::kFloat);
  const auto want = run(dense, p, at::kDouble, at::kCPU, at::kDouble);
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_LE(relative_rms(got[i], want[i]), dtype == at::kDouble ? 1e-6 : 2e-2) << kNames[i];
  }
  for (const size_t i : {4, 5, 6}) EXPECT_EQ(got[i].scalar_type(), at::kFloat) << kNames[i];
}

TEST(HyenaFir, ParametersMayBeFloatUnderAnyInput) {
  for (const auto dtype : {at::kDouble, at::kBFloat16}) {
    expect_float_parameters(dtype, at::kCPU, {2, 37, 20, 4, 7});
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
  for (const Shape& s : {Shape{2, 37, 20, 4, 7}, Shape{1, 300, 70, 7, 128}, Shape{1, 11, 9, 3, 1},
                         Shape{2, 131, 64, 4, 7}, Shape{1, 70, 40, 10, 14}, Shape{1, 67, 24, 3, 3},
                         Shape{1, 40, 32, 2, 16}}) {
    const Problem p = make_problem(s);
    std::vector<Tensor> in;
    for (size_t i = 0; i < 4; ++i) in.push_back(p.inputs[i].to(device, dtype));
    const auto go = [&](int64_t begin, int64_t end, const std::optional<ops::HyenaState>& state) {
      return ops::hyena_fir(in[0].slice(1, begin, end), in[1], in[2], in[3], state);
    };
    const auto [y, state] = go(0, s.L, std::nullopt);
    for (const int64_t cut : {int64_t{0}, int64_t{1}, int64_t{2}, s.W - 1, int64_t{31}, int64_t{32},
                              int64_t{33}, s.L / 2, s.L - 1, s.L}) {
      if (cut > s.L) continue;
      const auto [y1, state1] = go(0, cut, std::nullopt);
      const auto [y2, state2] = go(cut, s.L, state1);
      expect_same_outputs(at::cat({y1, y2}, 1), y, s.W, str(s, " cut ", cut));
      EXPECT_TRUE(bit_equal(state2.featurizer, state.featurizer)) << s << " cut " << cut;
      EXPECT_TRUE(bit_equal(state2.inner, state.inner)) << s << " cut " << cut;
    }
    std::optional<ops::HyenaState> carried;
    for (int64_t t = 0; t < s.L; ++t) {
      const auto [step, next] = go(t, t + 1, carried);
      expect_same_outputs(step, y.slice(1, t, t + 1), s.W, str(s, " step ", t));
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

/// Tokens that are appended change nothing that was there.
void expect_prefixes_equal(at::ScalarType dtype, at::Device device) {
  for (const Shape& s : {Shape{2, 600, 64, 4, 7}, Shape{2, 600, 64, 4, 128}}) {
    const Problem p = make_problem(s);
    std::vector<Tensor> in;
    for (size_t i = 0; i < 4; ++i) in.push_back(p.inputs[i].to(device, dtype));
    const auto y = [&](int64_t length) {
      return std::get<0>(ops::hyena_fir(in[0].slice(1, 0, length), in[1], in[2], in[3]));
    };
    const Tensor all = y(s.L);
    for (const int64_t length : {2, 15, 16, 17, 63, 64, 255, 256, 257, 511, 512, 599}) {
      EXPECT_TRUE(bit_equal(y(length), all.slice(1, 0, length))) << s << " prefix of " << length;
    }
  }
}

TEST(HyenaFir, AppendedTokensDoNotChangeThePast) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    expect_prefixes_equal(dtype, at::kCPU);
  }
}

/// The gradient through a split, states and all, is the gradient of the unsplit run.
void expect_gradients_through_states(const Shape& s, at::ScalarType dtype, at::Device device,
                                     double tolerance) {
  const Problem p = make_problem(s);
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
  const auto got = run(split, p, dtype, device, dtype);
  const auto want = run(p, at::kDouble);
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_LE(relative_rms(got[i], want[i]), tolerance) << s << ": " << kNames[i];
  }
}

TEST(HyenaFir, GradientsFlowThroughCarriedStates) {
  expect_gradients_through_states({2, 60, 12, 3, 31}, at::kDouble, at::kCPU, 1e-14);
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
  for (const Shape& s :
       {Shape{2, 1100, 70, 7, 128}, Shape{2, 1100, 64, 4, 7}, Shape{3, 1, 64, 4, 128}}) {
    const Problem p = make_problem(s);
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      const auto once = run(p, dtype, device);
      const auto again = run(p, dtype, device);
      for (size_t i = 0; i < once.size(); ++i) {
        EXPECT_TRUE(bit_equal(once[i], again[i])) << s << ": " << kNames[i];
      }
    }
  }
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

void expect_empty_behaves(at::ScalarType dtype, at::Device device) {
  const Problem p = make_problem({2, 0, 6, 2, 5});
  const auto got = run(p, dtype, device);
  const auto same = [&](const Tensor& x, const Tensor& want) {
    return bit_equal(x, want.to(device, x.scalar_type()));
  };
  EXPECT_EQ(got[0].sizes(), at::IntArrayRef({2, 0, 6}));
  EXPECT_TRUE(same(got[1], p.inputs[4]));
  EXPECT_TRUE(same(got[2], p.inputs[5]));
  for (const size_t i : {4, 5, 6}) EXPECT_EQ(got[i].abs().max().item<double>(), 0.0) << kNames[i];
  EXPECT_TRUE(same(got[7], p.upstream[1]));
  EXPECT_TRUE(same(got[8], p.upstream[2]));

  const auto none = run(make_problem({0, 4, 6, 2, 5}), dtype, device);
  EXPECT_EQ(none[0].sizes(), at::IntArrayRef({0, 4, 6}));
  for (const size_t i : {4, 5, 6}) EXPECT_EQ(none[i].abs().max().item<double>(), 0.0) << kNames[i];
}

TEST(HyenaFir, EmptyBatchesAndLengthsBehave) { expect_empty_behaves(at::kDouble, at::kCPU); }

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

using kernels::DType;
using kernels::FirMarch;

TEST(HyenaFirPlan, MarchTakesFewGatedTaps) {
  for (const int64_t W : {1, 7, 14}) {
    EXPECT_TRUE(fir_march_takes(plan_problem({1, 9, 64, 4, W}), DType::kFloat32));
    EXPECT_TRUE(fir_march_takes(plan_problem({1, 9, 64, 4, W}), DType::kBFloat16));
    EXPECT_FALSE(fir_march_takes(plan_problem({1, 9, 64, 4, W}), DType::kFloat64));
  }
  EXPECT_FALSE(fir_march_takes(plan_problem({1, 9, 64, 4, 15}), DType::kFloat32));
  EXPECT_FALSE(fir_march_takes(plan_problem({70000, 9, 64, 4, 7}), DType::kFloat32));
  auto ungated = plan_problem({1, 9, 64, 4, 7});
  ungated.featurizer = nullptr;
  EXPECT_FALSE(fir_march_takes(ungated, DType::kFloat32));
  EXPECT_FALSE(fir_march_fwd_plan(ungated, DType::kFloat32));
}

TEST(HyenaFirPlan, ThreadsOwnAsManyChannelsAsGroupsAndAlignmentAllow) {
  const auto expect = [](const kernels::FirBwdParams& p, DType dtype, const char* fwd,
                         const char* bwd, int unit) {
    const FirMarch forward = fir_march_fwd_plan(p, dtype), backward = fir_march_bwd_plan(p, dtype);
    EXPECT_STREQ(forward.name, fwd);
    EXPECT_STREQ(backward.name, bwd);
    EXPECT_EQ(forward.unit, unit);
  };
  constexpr auto kBF16 = DType::kBFloat16, kF32 = DType::kFloat32;
  expect(plan_problem({1, 99, 4096, 256, 7}), kBF16, "march_v4_w7", "march_v2_w7", 16);
  expect(plan_problem({1, 99, 4096, 256, 7}), kF32, "march_v2_w7", "march_v1_w7", 16);
  expect(plan_problem({1, 99, 4096, 256, 4}), kBF16, "march_v4_w4", "march_v2_w4", 16);
  expect(plan_problem({1, 99, 4096, 256, 1}), kBF16, "march_v4_w4", "march_v2_w4", 16);
  expect(plan_problem({1, 99, 4096, 256, 8}), kBF16, "march_v4_w14", "march_v2_w14", 16);
  expect(plan_problem({1, 99, 4096, 2048, 7}), kBF16, "march_v1_w7", "march_v2_w7", 16);
  expect(plan_problem({1, 99, 4096, 4096, 7}), kBF16, "march_v1_w7", "march_v1_w7", 16);
  expect(plan_problem({1, 99, 4100, 1025, 7}), kBF16, "march_v1_w7", "march_v1_w7", 2);
  expect(plan_problem({1, 99, 4100, 1025, 7}), kF32, "march_v2_w7", "march_v1_w7", 16);
  auto odd = plan_problem({2, 99, 64, 4, 7});
  odd.x = reinterpret_cast<const void*>(uintptr_t{4096 + 8});
  expect(odd, kBF16, "march_v1_w7", "march_v1_w7", 2);
  odd = plan_problem({2, 99, 64, 4, 7});
  odd.x_stride_l += 4;
  expect(odd, kBF16, "march_v1_w7", "march_v1_w7", 2);
  odd = plan_problem({2, 99, 64, 4, 7});
  odd.x_stride_b += 4;
  expect(odd, kBF16, "march_v1_w7", "march_v1_w7", 2);
  odd.batch = 1;  // a stride that nothing uses
  expect(odd, kBF16, "march_v4_w7", "march_v2_w7", 16);
  odd.dy_stride_l = 65;  // of the backward alone
  expect(odd, kBF16, "march_v4_w7", "march_v1_w7", 16);
}

TEST(HyenaFirPlan, StepsSpreadTapsOverThreads) {
  const auto plan = [](const Shape& s) {
    return kernels::fir_step_plan(plan_problem(s), DType::kBFloat16);
  };
  const auto layout = [&](int64_t W) {
    const kernels::FirStep step = plan({2, 1, 4096, 256, W});
    return std::tuple(step.run, step.runs, 1 << step.column_bits);
  };
  EXPECT_EQ(layout(1), std::tuple(4, 1, 32));
  EXPECT_EQ(layout(4), std::tuple(4, 1, 32));
  EXPECT_EQ(layout(5), std::tuple(4, 2, 32));
  EXPECT_EQ(layout(8), std::tuple(4, 2, 32));
  EXPECT_EQ(layout(9), std::tuple(8, 2, 32));
  EXPECT_EQ(layout(16), std::tuple(8, 2, 32));
  EXPECT_EQ(layout(17), std::tuple(8, 4, 32));
  EXPECT_EQ(layout(128), std::tuple(8, 16, 8));
  EXPECT_EQ(layout(1024), std::tuple(8, 32, 8));
  EXPECT_EQ(layout(100000), std::tuple(8, 32, 8));
  for (int64_t W = 1; W < 2000; ++W) {
    const auto [run, runs, columns] = layout(W);
    EXPECT_EQ(runs * columns % 32, 0) << W;
    EXPECT_LE(runs * columns, kernels::kFirStepThreads) << W;
    EXPECT_EQ(plan({2, 1, 4096, 256, W}).in_order, W <= 16) << W;
    if (W <= 16) {
      EXPECT_LE(runs, 2) << W;
      EXPECT_GE(run * runs, W);
    }
  }
  EXPECT_STREQ(plan({2, 1, 4096, 256, 128}).name, "step_v4");
  EXPECT_STREQ(plan({2, 1, 36, 18, 128}).name, "step_v4");
  EXPECT_STREQ(plan({2, 1, 30, 5, 128}).name, "step_v1");
  auto odd = plan_problem({2, 1, 64, 4, 128});
  odd.state = reinterpret_cast<const void*>(uintptr_t{4096 + 4});
  EXPECT_STREQ(kernels::fir_step_plan(odd, DType::kFloat32).name, "step_v1");
  EXPECT_FALSE(plan({2, 2, 64, 4, 128}));
  EXPECT_FALSE(plan({70000, 1, 64, 4, 128}));
  EXPECT_FALSE(kernels::fir_step_plan(odd, DType::kFloat64));
  odd.featurizer = nullptr;
  EXPECT_FALSE(kernels::fir_step_plan(odd, DType::kFloat32));
}

TEST(HyenaFirPlan, StripsCoverTimeAndFillTheMachine) {
  for (const Shape& s :
       {Shape{1, 0, 64, 4, 7}, Shape{1, 1, 64, 4, 7}, Shape{2, 33, 64, 4, 14},
        Shape{1, 1021, 1024, 64, 7}, Shape{1, 2048, 4096, 256, 7}, Shape{1, 131072, 4096, 256, 7},
        Shape{8, 2048, 4096, 256, 7}, Shape{12, 2048, 4096, 256, 7}, Shape{64, 1, 4096, 256, 7},
        Shape{300, 77, 256, 16, 4}}) {
    const auto p = plan_problem(s);
    for (const FirMarch& plan :
         {fir_march_fwd_plan(p, DType::kBFloat16), fir_march_bwd_plan(p, DType::kBFloat16)}) {
      EXPECT_EQ(plan.steps % 8, 0) << s;
      EXPECT_GE(plan.steps, 32 < s.L ? 32 : 8) << s;
      EXPECT_GE(int64_t{plan.steps} * plan.strips, s.L) << s;
      EXPECT_LT(int64_t{plan.steps} * (plan.strips - 1), std::max<int64_t>(1, s.L)) << s;
      EXPECT_GE(plan.columns * kernels::kFirMarchThreads * plan.vector, s.D) << s;
    }
  }
  // One strip for each multiprocessor, or as near as whole strips come.
  const auto strips = [](const Shape& s) {
    return std::pair{fir_march_fwd_plan(plan_problem(s), DType::kBFloat16).strips,
                     fir_march_bwd_plan(plan_problem(s), DType::kBFloat16).strips};
  };
  EXPECT_EQ(strips({1, 8192, 4096, 256, 7}), std::pair(16, 8));
  EXPECT_EQ(strips({4, 8192, 4096, 256, 7}), std::pair(4, 2));
  EXPECT_EQ(strips({8, 8192, 4096, 256, 7}), std::pair(2, 1));
  EXPECT_EQ(strips({1, 8192, 2048, 128, 7}), std::pair(32, 16));
}

TEST(HyenaFirPlan, MarchNeedsNoWorkspaceOfTheSequencesSize) {
  const auto p = plan_problem({1, 131072, 4096, 256, 7});
  const FirMarch plan = fir_march_bwd_plan(p, DType::kBFloat16);
  const kernels::FirWorkspace sizes = fir_march_workspace(p, plan);
  EXPECT_EQ(sizes.u + sizes.packed_taps + sizes.dq + sizes.dc, 0);
  EXPECT_EQ(sizes.featurizer_partial, plan.strips * 9 * 4096);
  EXPECT_EQ(sizes.taps_partial, plan.strips * (4096 + 6 * 2048));
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
TEST(HyenaFirCuda, FiltersAsLongAsTheSequence) {
  SKIP_WITHOUT_CUDA();
  expect_long_filters(at::kDouble, at::kCUDA, 1e-14);
  expect_long_filters(at::kFloat, at::kCUDA, 5e-6);
}
TEST(HyenaFirCuda, MatchesFftConvolutionOnTheGpu) {
  SKIP_WITHOUT_CUDA();
  for (const Shape& s : kFftShapes) {
    const Problem p = make_problem(s);
    const auto got = run(p, at::kFloat, at::kCUDA);
    const auto want = run(by_fft, p, at::kFloat, at::kCUDA, at::kFloat);
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT_LE(relative_rms(got[i], want[i]), 5e-6) << s << ": " << kNames[i];
    }
  }
}
TEST(HyenaFirCuda, AppendedTokensDoNotChangeThePast) {
  SKIP_WITHOUT_CUDA();
  for (const auto dtype : {at::kFloat, at::kBFloat16}) expect_prefixes_equal(dtype, at::kCUDA);
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
TEST(HyenaFirCuda, GradientsFlowThroughCarriedStates) {
  SKIP_WITHOUT_CUDA();
  for (const Shape& s :
       {Shape{2, 60, 12, 3, 31}, Shape{2, 60, 16, 4, 7}, Shape{1, 60, 64, 4, 14}}) {
    expect_gradients_through_states(s, at::kFloat, at::kCUDA, 2e-6);
  }
}
TEST(HyenaFirCuda, ParametersMayBeFloatUnderAnyInput) {
  SKIP_WITHOUT_CUDA();
  for (const Shape& s : {Shape{2, 37, 20, 4, 7}, Shape{2, 137, 64, 4, 7}, Shape{3, 1, 64, 4, 14}}) {
    for (const auto dtype : {at::kDouble, at::kBFloat16}) {
      expect_float_parameters(dtype, at::kCUDA, s);
    }
  }
}
TEST(HyenaFirCuda, EmptyBatchesAndLengthsBehave) {
  SKIP_WITHOUT_CUDA();
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    expect_empty_behaves(dtype, at::kCUDA);
  }
}

/// Without states in or out, as in training, the march takes its shortest way.
TEST(HyenaFirCuda, RunsWithoutStatesMatchTheDenseComputation) {
  SKIP_WITHOUT_CUDA();
  const test::PoisonMemory poison;
  for (const Shape& s : {Shape{1, 64, 64, 4, 7}, Shape{2, 96, 48, 3, 4}, Shape{1, 88, 64, 4, 14},
                         Shape{2, 104, 272, 17, 7}, Shape{1, 5, 16, 1, 7}}) {
    Problem p = make_problem(s);
    for (const size_t i : {3, 4, 5}) p.inputs[i].zero_();  // no skip either
    for (const size_t i : {1, 2}) p.upstream[i].zero_();
    const auto want = run(dense, p, at::kDouble, at::kCPU, at::kDouble);
    std::vector<Tensor> leaves;
    for (const size_t i : {0, 1, 2}) {
      leaves.push_back(p.inputs[i].to(at::kCUDA, at::kFloat).requires_grad_(true));
    }
    const auto [y, state] = ops::hyena_fir(leaves[0], leaves[1], leaves[2], std::nullopt);
    const auto gradients =
        torch::autograd::grad({y}, leaves, {p.upstream[0].to(at::kCUDA, at::kFloat)});
    EXPECT_LE(relative_rms(y, want[0]), 2e-6) << s;
    for (const size_t i : {0, 1, 2}) {
      EXPECT_LE(relative_rms(gradients[i], want[3 + i]), 2e-6) << s << ": " << kNames[3 + i];
    }
  }
}

TEST(HyenaFirCuda, NamesItsKernel) {
  SKIP_WITHOUT_CUDA();
  const auto kernels_of = [](const Shape& s, at::ScalarType dtype) {
    const Problem p = make_problem(s);
    const Tensor z = p.inputs[0].to(at::kCUDA, dtype).requires_grad_(true);
    const Tensor y = std::get<0>(ops::hyena_fir(z, p.inputs[1].to(at::kCUDA, dtype),
                                                p.inputs[2].to(at::kCUDA, dtype), std::nullopt));
    const std::string forward = ops::last_kernel();
    torch::autograd::grad({y}, {z}, {p.upstream[0].to(at::kCUDA, dtype)});
    return forward + " " + ops::last_kernel();
  };
  EXPECT_EQ(kernels_of({1, 40, 64, 4, 7}, at::kBFloat16), "march_v4_w7 march_v2_w7");
  EXPECT_EQ(kernels_of({1, 40, 64, 4, 12}, at::kFloat), "march_v2_w14 march_v1_w14");
  EXPECT_EQ(kernels_of({3, 1, 64, 4, 7}, at::kBFloat16), "step_v4 march_v2_w7");
  EXPECT_EQ(kernels_of({3, 1, 64, 4, 128}, at::kFloat), "step_v4 stages");
  EXPECT_EQ(kernels_of({1, 40, 64, 4, 15}, at::kFloat), "stages stages");
  EXPECT_EQ(kernels_of({1, 40, 64, 4, 7}, at::kDouble), "stages stages");
}

/// Rows of z inside wider rows, aligned and not: the channels of a thread change, its bits do not.
TEST(HyenaFirCuda, StridedRowsGiveTheSameBits) {
  SKIP_WITHOUT_CUDA();
  const Problem p = make_problem({2, 131, 64, 4, 7});
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    std::vector<Tensor> in;
    for (const Tensor& t : p.inputs) in.push_back(t.to(at::kCUDA, dtype));
    in[5] = p.inputs[5].to(at::kCUDA, at::kFloat);
    const auto want = call(in);
    for (const int64_t shift : {0, 1, 8}) {
      const Tensor wide = at::full({2, 131, 3 * 64 + 16}, std::nan(""), in[0].options());
      std::vector<Tensor> strided = in;
      strided[0] = wide.slice(2, shift, shift + 3 * 64);
      strided[0].copy_(in[0]);
      const auto got = call(strided);
      for (size_t i = 0; i < got.size(); ++i) {
        EXPECT_TRUE(bit_equal(got[i], want[i])) << shift << ": " << kNames[i];
      }
    }
  }
}
TEST(HyenaFirCuda, RunsGiveTheSameBits) {
  SKIP_WITHOUT_CUDA();
  expect_repeatable(at::kCUDA);
}

}  // namespace
}  // namespace sarissa
