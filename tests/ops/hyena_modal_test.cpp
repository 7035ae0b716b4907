#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <functional>
#include <set>

#include "sarissa/kernels/modal/modal_plan.h"
#include "sarissa/kernels/modal/modal_tensor_bwd.h"
#include "sarissa/ops/device.h"
#include "sarissa/ops/dispatch.h"
#include "sarissa/ops/ops.h"
#include "tests/support/compare.h"
#include "tests/support/fft.h"
#include "tests/support/golden.h"

namespace sarissa {
namespace {

using at::Tensor;
using ops::HyenaState;
using test::bit_equal;
using test::GoldenCase;
using test::relative_rms;

at::ScalarType compute_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

void expect_golden(const GoldenCase& golden, const std::string& tensor, const Tensor& got,
                   at::ScalarType dtype) {
  EXPECT_LE(test::golden_error(got, golden[tensor]), golden.tolerance(tensor, dtype))
      << golden.name() << ": " << tensor << " in " << dtype;
}

// The golden files interleave the projected channels (3j, 3j+1, 3j+2 = post, pre, value of channel
// j), put the featurizer's current tap last, and keep its state as [B, 3D, 2].

/// Thirds in place of triples along `dim`.
Tensor thirds(const Tensor& t, int64_t dim) {
  std::vector<Tensor> parts;
  for (int64_t k = 0; k < 3; ++k) parts.push_back(t.slice(dim, k, std::nullopt, 3));
  return at::cat(parts, dim);
}
/// The inverse of thirds().
Tensor triples(const Tensor& t, int64_t dim) {
  return at::stack(t.chunk(3, dim), dim + 1).flatten(dim, dim + 1);
}

Tensor featurizer_state_from(const Tensor& golden) { return thirds(golden, 1).transpose(1, 2); }
Tensor featurizer_state_to(const Tensor& ours) { return triples(ours.transpose(1, 2), 1); }

/// A golden case's inputs as leaves in the golden layout, and our operator on them.
struct GoldenRun {
  at::ScalarType dtype;
  at::Device device;
  Tensor featurizer, p, gamma, log_poles, residues, skip, featurizer_state, inner_state;

  GoldenRun(const GoldenCase& golden, at::ScalarType dtype, at::Device device)
      : dtype(dtype), device(device) {
    const at::ScalarType compute = compute_type(dtype);
    const auto leaf = [&](const char* name, at::ScalarType type) {
      if (!golden.has(name)) return Tensor();
      return golden[name].to(device, type, false, true).requires_grad_(true);
    };
    featurizer = leaf("featurizer", compute);
    // exp and the product are not this operator's: in double, so that only its own error is seen.
    p = leaf("p", at::kDouble);
    gamma = leaf("gamma", at::kDouble);
    log_poles = p.defined() ? -(p.exp() * gamma.exp()) : leaf("log_poles", compute);
    residues = leaf("R", compute);
    skip = leaf("D", compute);
    featurizer_state = leaf("state_feat_in", dtype);
    inner_state = leaf("state_inner_in", compute);
  }

  std::tuple<Tensor, HyenaState> operator()(const Tensor& z) const {
    std::optional<HyenaState> state;
    if (featurizer_state.defined()) {
      state = HyenaState{featurizer_state_from(featurizer_state), inner_state};
    }
    return ops::hyena_modal(thirds(z, 2), thirds(featurizer, 0).flip(1),
                            log_poles.to(compute_type(dtype)), residues, skip, state);
  }

  /// The leaves that exist with the golden names of their gradients.
  std::vector<std::pair<std::string, Tensor>> leaves() const {
    std::vector<std::pair<std::string, Tensor>> found;
    const auto add = [&](const char* name, const Tensor& t) {
      if (t.defined() && t.is_leaf()) found.emplace_back(name, t);
    };
    add("d_featurizer", featurizer);
    add("d_p", p);
    add("d_gamma", gamma);
    add("d_log_poles", log_poles);
    add("d_R", residues);
    add("d_D", skip);
    add("d_state_feat_in", featurizer_state);
    add("d_state_inner_in", inner_state);
    return found;
  }
};

/// Checks one hyena_li case; returns the names of the results it compared.
std::set<std::string> check_golden(const GoldenCase& golden, at::ScalarType dtype,
                                   at::Device device) {
  const GoldenRun run(golden, dtype, device);
  std::set<std::string> compared;
  const auto expect = [&](const std::string& name, const Tensor& got) {
    expect_golden(golden, name, got, dtype);
    compared.insert(name);
  };
  const Tensor z = golden["z"].to(device, dtype, false, true).requires_grad_(true);
  const auto [y, state] = run(z);
  expect("y", y);
  if (golden.has("state_feat_out")) expect("state_feat_out", featurizer_state_to(state.featurizer));
  if (golden.has("state_inner_out")) expect("state_inner_out", state.inner);

  std::vector<Tensor> outputs{y}, upstream{golden["dy"].to(device, dtype)};
  if (golden.has("d_state_feat_out")) {
    outputs.insert(outputs.end(), {state.featurizer, state.inner});
    upstream.push_back(featurizer_state_from(golden["d_state_feat_out"]).to(device, dtype));
    upstream.push_back(golden["d_state_inner_out"].to(device, state.inner.scalar_type()));
  }
  std::vector<Tensor> inputs{z};
  for (const auto& [name, t] : run.leaves()) inputs.push_back(t);
  const auto grads = torch::autograd::grad(outputs, inputs, upstream);
  expect("d_z", grads[0]);
  for (size_t i = 1; i < grads.size(); ++i) expect(run.leaves()[i - 1].first, grads[i]);

  if (golden.has("filter") && dtype != at::kBFloat16) {
    // The bare filter: the modal operator's response to an impulse.
    Tensor impulse =
        at::zeros({1, golden["filter"].size(1), golden["filter"].size(0)}, z.options());
    impulse.select(1, 0).fill_(1);
    const Tensor h = std::get<0>(
        ops::modal(impulse, run.log_poles.to(compute_type(dtype)), run.residues, std::nullopt));
    expect("filter", h[0].t());
  }
  if (golden.has("cuts")) {
    const Tensor cuts = golden["cuts"];
    std::vector<Tensor> featurizer_after, inner_after;
    for (int64_t i = 0; i < cuts.numel(); ++i) {
      const auto [none, after] = run(z.narrow(1, 0, cuts[i].item<int64_t>()));
      featurizer_after.push_back(featurizer_state_to(after.featurizer));
      inner_after.push_back(after.inner);
    }
    expect("feat_after", at::stack(featurizer_after));
    expect("inner_after", at::stack(inner_after));
  }
  return compared;
}

std::vector<at::ScalarType> dtypes_of(const GoldenCase& golden) {
  std::vector<at::ScalarType> dtypes{at::kDouble, at::kFloat};
  if (golden.is_bf16()) dtypes.push_back(at::kBFloat16);
  return dtypes;
}

TEST(HyenaModal, GoldenVectors) {
  const test::PoisonMemory poison;
  int cases = 0;
  for (const std::string& name : test::golden_cases("hyena_li_")) {
    const GoldenCase golden(name);
    if (golden.op() != "hyena_li") continue;
    ++cases;
    for (const auto dtype : dtypes_of(golden)) {
      const auto compared = check_golden(golden, dtype, at::kCPU);
      if (dtype != at::kDouble) continue;
      // Every result that the file holds was compared.
      for (const char* result : {"y", "state_feat_out", "state_inner_out", "d_z", "d_featurizer",
                                 "d_p", "d_gamma", "d_log_poles", "d_R", "d_D", "d_state_feat_in",
                                 "d_state_inner_in", "filter", "feat_after", "inner_after"}) {
        EXPECT_EQ(golden.has(result), compared.contains(result)) << name << ": " << result;
      }
    }
  }
  EXPECT_GE(cases, 1);
}

/// ((t k1 + c k2 + (t t mod q)) mod m + s) / d
Tensor by_formula(const nlohmann::json& f, int64_t length, int64_t channels) {
  const Tensor t = at::arange(length, at::kLong).unsqueeze(1), c = at::arange(channels, at::kLong);
  const int64_t k1 = f["k1"], k2 = f["k2"], q = f["q"], m = f["m"], s = f["s"], d = f["d"];
  const Tensor value = (t * k1 + c * k2 + (t * t).remainder(q)).remainder(m) + s;
  return (value.to(at::kDouble) / static_cast<double>(d)).unsqueeze(0);
}

void check_golden_long(at::Device device) {
  for (const std::string& name : test::golden_cases("hyena_li_long")) {
    const GoldenCase golden(name);
    const int64_t length = golden.config()["L"], width = golden.config()["D"];
    const auto& formulas = golden.config()["formulas"];
    const Tensor pos = golden["pos"];
    for (const auto dtype : {at::kDouble, at::kFloat}) {
      const GoldenRun run(golden, dtype, device);
      const Tensor z =
          by_formula(formulas["z"], length, 3 * width).to(device, dtype).requires_grad_(true);
      const auto [y, state] = run(z);
      expect_golden(golden, "y_at", y.cpu().index_select(1, pos), dtype);
      std::vector<Tensor> inputs{z};
      for (const auto& [gradient, t] : run.leaves()) inputs.push_back(t);
      const auto grads = torch::autograd::grad(
          {y}, inputs, {by_formula(formulas["dy"], length, width).to(device, dtype)});
      expect_golden(golden, "d_z_at", grads[0].cpu().index_select(1, pos), dtype);
      for (size_t i = 1; i < grads.size(); ++i) {
        expect_golden(golden, run.leaves()[i - 1].first, grads[i], dtype);
      }
    }
  }
}

TEST(HyenaModal, GoldenLongSequence) { check_golden_long(at::kCPU); }

/// hyena_modal with all that it returns: y, both states and what it saves.
const auto& hyena_modal_operator() {
  using Optional = std::optional<Tensor>;
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor& z, const Tensor& featurizer, const Tensor& log_poles, const Tensor& residues,
      const Optional& skip, const Optional& featurizer_state, const Optional& inner_state,
      bool save);
  static const auto op = ops::find_operator<Signature>("sarissa::hyena_modal");
  return op;
}

struct Shape {
  int64_t batch, length, width, groups, modes;
  bool skip = true, state = true;
};

std::ostream& operator<<(std::ostream& out, const Shape& s) {
  return out << "B" << s.batch << " L" << s.length << " D" << s.width << " G" << s.groups << " N"
             << s.modes << (s.skip ? " skip" : "") << (s.state ? " state" : "");
}

/// Inputs and upstream gradients in double: those of element type exact in bfloat16.
struct Problem {
  Shape shape;
  Tensor z, featurizer, log_poles, residues, skip, featurizer_state, inner_state;
  Tensor dy, dfeaturizer_state, dinner_state;

  explicit Problem(const Shape& s, uint64_t seed = 1) : shape(s) {
    const auto bf16 = [&](at::IntArrayRef sizes) {
      return test::randn(sizes, seed++).to(at::kBFloat16).to(at::kDouble);
    };
    const auto f32 = [](const Tensor& t) { return t.to(at::kFloat).to(at::kDouble); };
    z = bf16({s.batch, s.length, 3 * s.width});
    featurizer = bf16({3 * s.width, 3});
    log_poles = f32(-test::rand({s.groups, s.modes}, seed++, -9.0, 0.5).exp());
    residues = f32(test::randn({s.groups, s.modes}, seed++) / std::sqrt(s.modes + 1.0));
    if (s.skip) skip = bf16({s.width});
    if (s.state) {
      featurizer_state = bf16({s.batch, 2, 3 * s.width});
      inner_state = f32(test::randn({s.batch, s.width, s.modes}, seed++));
    }
    dy = bf16({s.batch, s.length, s.width});
    dfeaturizer_state = bf16({s.batch, 2, 3 * s.width});
    dinner_state = f32(test::randn({s.batch, s.width, s.modes}, seed++));
  }
};

using Operator = std::function<std::tuple<Tensor, HyenaState>(
    const Tensor& z, const Tensor& featurizer, const Tensor& log_poles, const Tensor& residues,
    const std::optional<Tensor>& skip, const std::optional<HyenaState>& state)>;

std::tuple<Tensor, HyenaState> fused(const Tensor& z, const Tensor& featurizer,
                                     const Tensor& log_poles, const Tensor& residues,
                                     const std::optional<Tensor>& skip,
                                     const std::optional<HyenaState>& state) {
  return ops::hyena_modal(z, featurizer, log_poles, residues, skip, state);
}

/// The gates in ATen around the modal operator, everything in the compute type; y is rounded to
/// z's.
std::tuple<Tensor, HyenaState> composed(const Tensor& z, const Tensor& featurizer,
                                        const Tensor& log_poles, const Tensor& residues,
                                        const std::optional<Tensor>& skip,
                                        const std::optional<HyenaState>& state) {
  const Tensor before =
      state ? state->featurizer : at::zeros({z.size(0), 2, z.size(2)}, z.options());
  const Tensor rows = at::cat({before, z}, 1), x = rows.to(compute_type(z.scalar_type()));
  const int64_t length = z.size(1);
  Tensor c = at::zeros({1}, x.options());
  for (int64_t k = 0; k < 3; ++k) {
    c = c + featurizer.select(1, k) * x.narrow(1, 2 - k, length);  // tap k meets z[t - k]
  }
  const auto part = c.chunk(3, 2);
  const auto [q, inner] = ops::modal(part[1] * part[2], log_poles, residues, skip,
                                     state ? std::optional(state->inner) : std::nullopt);
  return {(part[0] * q).to(z.scalar_type()), {rows.narrow(1, length, 2), inner}};
}

const char* const kNames[] = {"y",
                              "featurizer_state_out",
                              "inner_state_out",
                              "dz",
                              "dfeaturizer",
                              "dlog_poles",
                              "dresidues",
                              "dskip",
                              "dfeaturizer_state",
                              "dinner_state"};

/// Outputs and gradients, in the order of kNames.
std::vector<Tensor> run(const Operator& op, const Problem& p, at::ScalarType dtype,
                        at::Device device = at::kCPU) {
  const at::ScalarType compute = compute_type(dtype);
  const auto leaf = [&](const Tensor& t, at::ScalarType type) {
    return t.defined() ? t.to(device, type, false, true).requires_grad_(true) : Tensor();
  };
  const Tensor z = leaf(p.z, dtype), featurizer = leaf(p.featurizer, compute),
               log_poles = leaf(p.log_poles, compute), residues = leaf(p.residues, compute),
               skip = leaf(p.skip, compute), featurizer_state = leaf(p.featurizer_state, dtype),
               inner_state = leaf(p.inner_state, compute);
  const auto [y, out] =
      op(z, featurizer, log_poles, residues, skip.defined() ? std::optional(skip) : std::nullopt,
         p.shape.state ? std::optional(HyenaState{featurizer_state, inner_state}) : std::nullopt);
  std::vector<Tensor> leaves;
  for (const Tensor& t :
       {z, featurizer, log_poles, residues, skip, featurizer_state, inner_state}) {
    if (t.defined()) leaves.push_back(t);
  }
  const auto grads =
      torch::autograd::grad({y, out.featurizer, out.inner}, leaves,
                            {p.dy.to(device, dtype), p.dfeaturizer_state.to(device, dtype),
                             p.dinner_state.to(device, compute)});
  std::vector<Tensor> all{y.detach(), out.featurizer.detach(), out.inner.detach()};
  size_t next = 0;
  for (const Tensor& t :
       {z, featurizer, log_poles, residues, skip, featurizer_state, inner_state}) {
    all.push_back(t.defined() ? grads[next++] : Tensor());
  }
  return all;
}

void expect_close(const std::vector<Tensor>& got, const std::vector<Tensor>& want, double tolerance,
                  const Shape& shape) {
  for (size_t i = 0; i < want.size(); ++i) {
    if (!want[i].defined()) continue;
    EXPECT_LE(relative_rms(got[i], want[i]), tolerance) << kNames[i] << " of " << shape;
  }
}

void expect_bit_equal(const std::vector<Tensor>& got, const std::vector<Tensor>& want,
                      const Shape& shape) {
  for (size_t i = 0; i < want.size(); ++i) {
    if (!want[i].defined()) continue;
    EXPECT_TRUE(bit_equal(got[i], want[i])) << kNames[i] << " of " << shape;
  }
}

const Shape kShapes[] = {
    {2, 37, 5, 5, 16},                 // one group per channel
    {1, 64, 24, 6, 16, false, true},   // a whole chunk, no skip
    {3, 65, 17, 17, 16, true, false},  // one step more, one channel more than a tile
    {2, 66, 16, 8, 4},                 //
    {1, 63, 32, 1, 16, false, false},  // one group, one step less
    {2, 127, 12, 4, 3},                // modes that fill no register block
    {1, 129, 33, 11, 21},              //
    {2, 1, 18, 9, 16},                 // one decode step: half of the old state stays
    {2, 2, 3, 3, 5},                   //
    {2, 3, 3, 3, 5, true, false},      //
    {2, 11, 4, 2, 0},                  // no modes: the skip alone
    {17, 1, 70, 35, 16},               // steps of more than one turn, of channels to spare,
    {2, 1, 64, 64, 64},                // of many modes,
    {9, 1, 33, 1, 20, false, false},   // of modes that fill no thread, from the start
};

TEST(HyenaModal, MatchesGatesAroundModalInDouble) {
  const test::PoisonMemory poison;
  for (const Shape& shape : kShapes) {
    const Problem p(shape);
    expect_close(run(fused, p, at::kDouble), run(composed, p, at::kDouble), 1e-12, shape);
  }
}

TEST(HyenaModal, MatchesGatesAroundModalInFloat) {
  const test::PoisonMemory poison;
  for (const Shape& shape : kShapes) {
    const Problem p(shape);
    expect_close(run(fused, p, at::kFloat), run(composed, p, at::kDouble), 3e-6, shape);
  }
}

TEST(HyenaModal, Bfloat16IsAsGoodAsFloatArithmeticOnBfloat16) {
  const test::PoisonMemory poison;
  for (const Shape& shape : kShapes) {
    const Problem p(shape);
    const auto want = run(composed, p, at::kDouble), got = run(fused, p, at::kBFloat16),
               same = run(composed, p, at::kBFloat16);
    for (size_t i = 0; i < want.size(); ++i) {
      if (!want[i].defined()) continue;
      EXPECT_LE(relative_rms(got[i], want[i]), std::max(3e-6, 2 * relative_rms(same[i], want[i])))
          << kNames[i] << " of " << shape;
    }
  }
}

TEST(HyenaModal, MatchesFiniteDifferences) {
  const Problem p({2, 9, 4, 2, 3});
  const auto f = [](const std::vector<Tensor>& in) {
    const auto [y, state] =
        ops::hyena_modal(in[0], in[1], in[2], in[3], in[4], HyenaState{in[5], in[6]});
    return at::cat({y.flatten(), state.featurizer.flatten(), state.inner.flatten()});
  };
  EXPECT_LE(test::gradient_error(f, {p.z, p.featurizer, p.log_poles, p.residues, p.skip,
                                     p.featurizer_state, p.inner_state}),
            1e-7);
}

/// The same layer of plain operators and FFTs, with the filter written out, where `dtype` and
/// `device` say.
void expect_fft_layer(const Shape& shape, at::ScalarType dtype, at::Device device,
                      double tolerance) {
  const Problem p(shape);
  const auto on = [&](const Tensor& t) { return t.to(device, dtype); };
  const Tensor z = on(p.z), featurizer = on(p.featurizer), log_poles = on(p.log_poles),
               residues = on(p.residues), skip = on(p.skip);
  const int64_t length = shape.length;
  const Tensor x = at::constant_pad_nd(z, {0, 0, 2, 0});
  Tensor mixed = at::zeros_like(z);
  for (int64_t k = 0; k < 3; ++k) {
    mixed = mixed + featurizer.select(1, k) * x.narrow(1, 2 - k, length);
  }
  const auto part = mixed.chunk(3, 2);
  const Tensor u = part[1] * part[2], t = at::arange(length, at::kDouble).to(device);
  const Tensor filter_DL = (residues.unsqueeze(2) * (log_poles.unsqueeze(2) * t).exp())
                               .sum(1)
                               .repeat_interleave(p.shape.width / p.shape.groups, 0)
                               .to(dtype);
  const Tensor want = part[0] * (test::fft_convolution(u, filter_DL) + skip * u);
  const Tensor got = std::get<0>(ops::hyena_modal(z, featurizer, log_poles, residues, skip));
  EXPECT_LE(relative_rms(got, want), tolerance) << p.shape;
}

TEST(HyenaModal, MatchesFftLayer) {
  expect_fft_layer({2, 500, 6, 3, 16}, at::kDouble, at::kCPU, 1e-13);
  expect_fft_layer({1, 3001, 40, 40, 16}, at::kDouble, at::kCPU, 1e-13);
  expect_fft_layer({1, 3001, 40, 40, 16}, at::kFloat, at::kCPU, 3e-6);
}

TEST(HyenaModal, SplitAnywhereEqualsUnsplitBitForBit) {
  const Problem p({2, 133, 19, 19, 16});
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    const at::ScalarType compute = compute_type(dtype);
    const Tensor z = p.z.to(dtype), featurizer = p.featurizer.to(compute),
                 log_poles = p.log_poles.to(compute), residues = p.residues.to(compute),
                 skip = p.skip.to(compute);
    const HyenaState start{p.featurizer_state.to(dtype), p.inner_state.to(compute)};
    const auto step = [&](int64_t from, int64_t count, const HyenaState& state) {
      return ops::hyena_modal(z.narrow(1, from, count), featurizer, log_poles, residues, skip,
                              state);
    };
    const auto [y, end] = step(0, p.shape.length, start);
    for (const int64_t cut : {0, 1, 2, 3, 63, 64, 65, 131, 132, 133}) {
      const auto [y1, s1] = step(0, cut, start);
      const auto [y2, s2] = step(cut, p.shape.length - cut, s1);
      EXPECT_TRUE(bit_equal(at::cat({y1, y2}, 1), y)) << "cut at " << cut << " in " << dtype;
      EXPECT_TRUE(bit_equal(s2.featurizer, end.featurizer)) << cut;
      EXPECT_TRUE(bit_equal(s2.inner, end.inner)) << cut;
    }
    HyenaState state = start;  // decoding
    std::vector<Tensor> steps;
    for (int64_t t = 0; t < p.shape.length; ++t) {
      auto [out, next] = step(t, 1, state);
      steps.push_back(out);
      state = next;
    }
    EXPECT_TRUE(bit_equal(at::cat(steps, 1), y)) << dtype;
    EXPECT_TRUE(bit_equal(state.featurizer, end.featurizer)) << dtype;
    EXPECT_TRUE(bit_equal(state.inner, end.inner)) << dtype;
  }
}

TEST(HyenaModal, GradientsFlowThroughASplit) {
  const Problem p({2, 100, 9, 3, 16});
  const auto whole = run(fused, p, at::kDouble);
  for (const int64_t cut : {1, 2, 64, 99}) {
    const Operator split =
        [&](const Tensor& z, const Tensor& featurizer, const Tensor& log_poles,
            const Tensor& residues, const std::optional<Tensor>& skip,
            const std::optional<HyenaState>& state) -> std::tuple<Tensor, HyenaState> {
      const auto [y1, s1] =
          fused(z.narrow(1, 0, cut), featurizer, log_poles, residues, skip, state);
      const auto [y2, s2] =
          fused(z.narrow(1, cut, z.size(1) - cut), featurizer, log_poles, residues, skip, s1);
      return {at::cat({y1, y2}, 1), s2};
    };
    expect_close(run(split, p, at::kDouble), whole, 1e-13, p.shape);
  }
}

/// Tokens that are appended change nothing that was there.
void expect_prefixes_equal(const Shape& shape, at::ScalarType dtype, at::Device device,
                           std::initializer_list<int64_t> lengths) {
  const Problem p(shape);
  const auto on = [&](const Tensor& t, at::ScalarType type) { return t.to(device, type); };
  const auto y = [&](int64_t length) {
    return std::get<0>(ops::hyena_modal(on(p.z, dtype).narrow(1, 0, length),
                                        on(p.featurizer, at::kFloat), on(p.log_poles, at::kFloat),
                                        on(p.residues, at::kFloat), on(p.skip, at::kFloat)));
  };
  const Tensor all = y(shape.length);
  for (const int64_t length : lengths) {
    EXPECT_TRUE(bit_equal(y(length), all.narrow(1, 0, length)))
        << shape << " in " << dtype << ", prefix of " << length;
  }
}

TEST(HyenaModal, AppendedTokensDoNotChangeThePast) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    expect_prefixes_equal({1, 200, 40, 40, 16}, dtype, at::kCPU, {1, 2, 31, 64, 65, 130, 199});
  }
}

TEST(HyenaModal, StridedInputs) {
  const Problem p({2, 70, 18, 9, 16});
  const auto strided = [&](at::ScalarType dtype, bool wide) {
    const at::ScalarType compute = compute_type(dtype);
    const auto of = [&](const Tensor& t, at::ScalarType type) {
      return wide ? test::strided_copy(t.to(type)) : t.to(type);
    };
    const auto [y, state] =
        ops::hyena_modal(of(p.z, dtype), of(p.featurizer, compute), of(p.log_poles, compute),
                         of(p.residues, compute), of(p.skip, compute),
                         HyenaState{of(p.featurizer_state, dtype), of(p.inner_state, compute)});
    return at::cat({y.to(at::kDouble).flatten(), state.featurizer.to(at::kDouble).flatten(),
                    state.inner.to(at::kDouble).flatten()});
  };
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    EXPECT_TRUE(bit_equal(strided(dtype, true), strided(dtype, false))) << dtype;
  }
}

TEST(HyenaModal, ExpandedAndMissingGradients) {
  const Problem p({2, 30, 6, 3, 4});
  for (const int which : {0, 1, 2}) {
    const auto gradients = [&](const Operator& op) {
      std::vector<Tensor> leaves{
          p.z.clone(),    p.featurizer.clone(),       p.log_poles.clone(),  p.residues.clone(),
          p.skip.clone(), p.featurizer_state.clone(), p.inner_state.clone()};
      for (Tensor& t : leaves) t.requires_grad_(true);
      const auto [y, state] = op(leaves[0], leaves[1], leaves[2], leaves[3], leaves[4],
                                 HyenaState{leaves[5], leaves[6]});
      const Tensor loss = (which == 0 ? y : which == 1 ? state.featurizer : state.inner).sum();
      return torch::autograd::grad({loss}, leaves, {}, std::nullopt, false, true);
    };
    const auto got = gradients(fused), want = gradients(composed);
    for (size_t i = 0; i < want.size(); ++i) {
      const Tensor expected = want[i].defined() ? want[i] : at::zeros_like(got[i]);
      EXPECT_LE(relative_rms(got[i], expected), 1e-12) << "leaf " << i << ", output " << which;
    }
  }
}

TEST(HyenaModal, RepeatedAndThreadedRunsAreBitEqual) {
  const Problem p({3, 260, 70, 10, 16});
  const int threads = at::get_num_threads();
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const auto first = run(fused, p, dtype);
    expect_bit_equal(run(fused, p, dtype), first, p.shape);
    at::set_num_threads(1);
    const auto one = run(fused, p, dtype);
    at::set_num_threads(2);
    const auto two = run(fused, p, dtype);
    at::set_num_threads(threads);
    expect_bit_equal(one, first, p.shape);
    expect_bit_equal(two, first, p.shape);
  }
}

TEST(HyenaModal, EmptyBatchAndLength) {
  for (const Shape& shape : {Shape{2, 0, 6, 3, 4}, Shape{0, 5, 6, 3, 4}}) {
    const Problem p(shape);
    const auto all = run(fused, p, at::kFloat);
    EXPECT_TRUE(bit_equal(all[1], p.featurizer_state.to(at::kFloat)));
    EXPECT_TRUE(bit_equal(all[2], p.inner_state.to(at::kFloat)));
    for (const int i : {4, 5, 6, 7}) EXPECT_TRUE(all[i].eq(0).all().item<bool>()) << kNames[i];
    EXPECT_TRUE(bit_equal(all[8], p.dfeaturizer_state.to(at::kFloat)));
    EXPECT_TRUE(bit_equal(all[9], p.dinner_state.to(at::kFloat)));
  }
}

TEST(HyenaModal, MetaTensorsGetShapes) {
  const auto meta = at::TensorOptions().device(at::kMeta).dtype(at::kBFloat16);
  const auto meta_float = meta.dtype(at::kFloat);
  const Tensor poles = at::empty({4, 3}, meta_float);
  const auto [y, state] = ops::hyena_modal(at::empty({2, 7, 36}, meta),
                                           at::empty({36, 3}, meta_float), poles, poles, {});
  EXPECT_EQ(y.sizes(), (at::IntArrayRef{2, 7, 12}));
  EXPECT_EQ(state.featurizer.sizes(), (at::IntArrayRef{2, 2, 36}));
  EXPECT_EQ(state.featurizer.scalar_type(), at::kBFloat16);
  EXPECT_EQ(state.inner.sizes(), (at::IntArrayRef{2, 12, 3}));
  EXPECT_EQ(state.inner.scalar_type(), at::kFloat);
}

TEST(HyenaModalPlan, TensorCoresTakeAlignedColumnsOfBfloat16) {
  kernels::ModalInputs in;
  in.batch = 2, in.length = 5000, in.width = 4096, in.groups = 4096, in.modes = 16;
  in.featurizer = in.u = reinterpret_cast<const void*>(uintptr_t{1} << 20);
  in.u_batch_stride = 3 * 4096 * 5000, in.u_time_stride = 3 * 4096;
  const auto clusters_at_once = [](int ranks) { return 132 / 16 * (16 / ranks); };
  const auto plan = [&](int multiprocessors = 132) {
    return kernels::modal_tensor_fwd_plan(in, kernels::DType::kBFloat16, multiprocessors,
                                          clusters_at_once);
  };
  EXPECT_EQ(plan().columns, 128);
  EXPECT_FALSE(plan().narrow);
  EXPECT_EQ(plan().ranks, 1);
  // A CTA takes as many batch entries as keep all multiprocessors busy.
  EXPECT_EQ(plan().entries, 2);
  EXPECT_EQ(plan(256).entries, 1);
  in.length = 512;  // two tiles: too short for the pipeline
  EXPECT_EQ(plan().entries, 1);
  in.length = 5000;
  EXPECT_FALSE(kernels::modal_tensor_fwd_plan(in, kernels::DType::kFloat32, 132, clusters_at_once));
  const auto refused = [&](auto&& change) {
    const kernels::ModalInputs before = in;
    change();
    const bool result = !plan();
    in = before;
    return result;
  };
  EXPECT_TRUE(refused([&] { in.modes = 17; }));
  EXPECT_TRUE(refused([&] { in.width = 4096 + 16; }));
  EXPECT_TRUE(refused([&] { in.length = 1; }));
  EXPECT_TRUE(refused([&] { in.u_time_stride += 4; }));
  EXPECT_TRUE(refused([&] { in.featurizer = nullptr; }));
  // Few channels: narrow columns, and as many ranks as there is room and there are tiles.
  in.batch = 1, in.width = 2048;
  EXPECT_TRUE(plan().narrow);
  EXPECT_EQ(plan().columns, 128);
  EXPECT_EQ(plan().ranks, 1);
  EXPECT_FALSE(plan(127).narrow);
  in.width = 1024;
  EXPECT_EQ(plan().ranks, 2);
  EXPECT_EQ(plan(127).ranks, 1);
  EXPECT_FALSE(plan(20).narrow);
  in.width = 512;
  EXPECT_EQ(plan().ranks, 4);
  in.batch = 2;
  EXPECT_EQ(plan().ranks, 2);
  EXPECT_EQ(plan().entries, 1);
  in.batch = 1, in.length = 1500;
  EXPECT_EQ(plan().ranks, 3);
  in.length = 512;
  EXPECT_EQ(plan().ranks, 1);
  in.length = 1 << 20, in.width = 32;
  EXPECT_EQ(plan().ranks, kernels::kModalTensorMostRanks);
  // A GPU with room for fewer clusters, or none.
  const auto ranks = [&](auto&& clusters) {
    return kernels::modal_tensor_fwd_plan(in, kernels::DType::kBFloat16, 132, clusters).ranks;
  };
  EXPECT_EQ(ranks([](int ranks) { return ranks <= 5 ? 2 : 1; }), 5);
  EXPECT_EQ(ranks([](int) { return 0; }), 1);
}

TEST(HyenaModalPlan, BatchEntriesFollowOneAnotherWhereThatSavesTime) {
  const auto entries = [](int64_t batch, int64_t columns) {
    return kernels::modal_entries(batch, 8, columns, 132, 3);
  };
  EXPECT_EQ(entries(1, 128), 1);
  EXPECT_EQ(entries(4, 128), 4);
  EXPECT_EQ(entries(4, 64), 2);
  EXPECT_EQ(entries(3, 68), 1);  // 3 in 68 CTAs would leave half of the multiprocessors idle
  EXPECT_EQ(entries(4, 32), 1);  // all run at once
  EXPECT_EQ(entries(65535, 128), 64);
}

TEST(HyenaModal, SavesOnlyWhereAskedAndTheSameShapeEverywhere) {
  for (const auto device : {at::kCPU, at::kMeta}) {
    const auto saved = [&](int64_t length, int64_t width, at::ScalarType dtype, bool save) {
      const auto of = [&](at::IntArrayRef shape, at::ScalarType type) {
        return at::zeros(shape, at::TensorOptions().device(device).dtype(type));
      };
      const auto compute = compute_type(dtype);
      const Tensor poles = of({width, 3}, compute);
      return std::get<3>(hyena_modal_operator().call(of({2, length, 3 * width}, dtype),
                                                     of({3 * width, 3}, compute), poles, poles, {},
                                                     {}, {}, save))
          .sizes()
          .vec();
    };
    using Sizes = std::vector<int64_t>;
    EXPECT_EQ(saved(129, 32, at::kBFloat16, true), (Sizes{2, 2, 32, 16}));
    EXPECT_EQ(saved(129, 32, at::kBFloat16, false), (Sizes{2, 0, 32, 16}));
    EXPECT_EQ(saved(129, 32, at::kFloat, true), (Sizes{2, 0, 32, 16}));
    EXPECT_EQ(saved(129, 20, at::kBFloat16, true), (Sizes{2, 0, 20, 16}));
    EXPECT_EQ(saved(1, 32, at::kBFloat16, true), (Sizes{2, 0, 32, 16}));
  }
}

TEST(HyenaModal, RefusesBadInputsByName) {
  const Problem p({2, 5, 6, 3, 4});
  const HyenaState good{p.featurizer_state, p.inner_state};
  const auto expect = [&](const std::string& part, const Tensor& z, const Tensor& featurizer,
                          const HyenaState& state) {
    try {
      ops::hyena_modal(z, featurizer, p.log_poles, p.residues, p.skip, state);
      ADD_FAILURE() << "no error; expected " << part;
    } catch (const std::exception& e) {
      EXPECT_NE(std::string(e.what()).find("sarissa::hyena_modal: " + part), std::string::npos)
          << e.what();
    }
  };
  expect("z is Half", p.z.to(at::kHalf), p.featurizer, good);
  expect("z has 17 channels", p.z.narrow(2, 0, 17), p.featurizer, good);
  expect("featurizer has shape [18, 2]", p.z, p.featurizer.narrow(1, 0, 2), good);
  expect("featurizer has shape [3, 18]", p.z, p.featurizer.t(), good);
  expect("featurizer_state is Float", p.z, p.featurizer,
         {p.featurizer_state.to(at::kFloat), p.inner_state});
  expect("inner_state is Double [2, 4, 6]", p.z, p.featurizer,
         {p.featurizer_state, p.inner_state.transpose(1, 2)});
}

TEST(HyenaModal, CudaGoldenVectors) {
  SKIP_WITHOUT_CUDA();
  const test::PoisonMemory poison;
  for (const std::string& name : test::golden_cases("hyena_li_")) {
    const GoldenCase golden(name);
    if (golden.op() != "hyena_li") continue;
    for (const auto dtype : dtypes_of(golden)) check_golden(golden, dtype, at::kCUDA);
  }
}

TEST(HyenaModal, CudaGoldenLongSequence) {
  SKIP_WITHOUT_CUDA();
  check_golden_long(at::kCUDA);
}

/// The backward on tensor cores rounds u, dq, q, du and parts of the filter to bfloat16, 2^-9 each;
/// a gradient that is a sum of few terms can have several of these errors.
constexpr double kTensorTolerance = 8e-3;

/// Whether the tensor core kernels take a sequence in bfloat16.
bool on_tensor_cores(const Shape& s) {
  return s.length > 1 && s.width % kernels::kModalTensorChannels == 0 &&
         s.modes <= kernels::kModalTensorModes;
}

TEST(HyenaModal, CudaMatchesTheCpuInDouble) {
  SKIP_WITHOUT_CUDA();
  const test::PoisonMemory poison;
  std::vector<Shape> shapes(std::begin(kShapes), std::end(kShapes));
  shapes.push_back({2, 1031, 130, 26, 16});
  shapes.push_back({1, 2048, 256, 256, 16, true, false});
  for (const Shape& shape : shapes) {
    const Problem p(shape);
    const auto want = run(fused, p, at::kDouble);
    expect_close(run(fused, p, at::kDouble, at::kCUDA), want, 1e-12, shape);
    expect_close(run(fused, p, at::kFloat, at::kCUDA), want, 3e-6, shape);
    const auto got = run(fused, p, at::kBFloat16, at::kCUDA);
    if (on_tensor_cores(shape)) {
      expect_close(got, want, kTensorTolerance, shape);
      continue;
    }
    // The only roundings to bfloat16 are those of the results y, dz and dfeaturizer_state.
    expect_close(got, want, 2.5e-3, shape);
    for (const int i : {2, 4, 5, 6, 7, 9}) {
      if (!want[i].defined()) continue;
      EXPECT_LE(relative_rms(got[i], want[i]), 3e-6) << kNames[i] << " of " << shape;
    }
  }
}

TEST(HyenaModal, TensorBackwardPlan) {
  alignas(16) static char memory[16];
  const auto plan = [](int64_t batch, int64_t length, int64_t width, int64_t shared = 227 << 10) {
    kernels::ModalInputs in{
        .batch = batch, .length = length, .width = width, .groups = width, .modes = 16};
    in.u = in.featurizer = memory;
    in.u_time_stride = 3 * width;
    in.u_batch_stride = length * 3 * width;
    return kernels::modal_tensor_bwd_plan(in, kernels::DType::kBFloat16, 100 << 10, shared);
  };
  EXPECT_EQ(plan(1, 8192, 4096).chunks, 1);
  EXPECT_EQ(plan(4, 2048, 4096).entries, 4);
  EXPECT_EQ(plan(1, 8192, 4096).entries, 1);
  EXPECT_EQ(plan(1, 1 << 20, 1024).chunks, 4);  // 32 columns on 132 multiprocessors
  EXPECT_EQ(plan(1, 1 << 20, 3072).chunks, 4);  // in three turns
  for (const int64_t length : {2, 255, 256, 257, 5000, 100000, 1 << 20}) {
    for (const int64_t width : {32, 96, 1024, 4096}) {
      const auto p = plan(2, length, width);
      EXPECT_EQ(p.tiles, (length + 255) / 256);
      EXPECT_TRUE(p.chunks == 1 || p.entries == 1) << length << " " << width;
      EXPECT_GE(p.chunks * p.chunk_tiles, p.tiles) << length << " " << width;
      EXPECT_LT((p.chunks - 1) * p.chunk_tiles, p.tiles) << length << " " << width;
      EXPECT_EQ(p.teams, 2);
      const int piece = p.spans * p.span_steps * kernels::kModalArrivingWarps;
      EXPECT_EQ(p.pieces > 0, p.chunks > 1) << length << " " << width;
      EXPECT_TRUE(p.chunks == 1 || p.pieces * piece >= p.chunk_tiles * 256)
          << length << " " << width;
      EXPECT_EQ(p.span_steps % kernels::kModalArrivingSteps, 0) << length << " " << width;
      EXPECT_LE(p.span_steps, kernels::kModalArrivingSpan) << length << " " << width;
    }
  }
  EXPECT_EQ(plan(1, 8192, 4096, 163 << 10).teams, 1);  // less shared memory
  EXPECT_FALSE(plan(1, 8192, 4096, 99 << 10));
  EXPECT_FALSE(plan(1, 8192, 48));
}

TEST(HyenaModal, CudaTensorBackwardMatchesTheCpuInDouble) {
  SKIP_WITHOUT_CUDA();
  const test::PoisonMemory poison;
  struct Case {
    Shape shape;
    const char* kernel;
    double tolerance = 1.2e-2;  // gradients that are sums of few products can cancel
  };
  const Case cases[] = {
      {{2, 37, 32, 32, 16}, "tensor"},       // less than a tile
      {{1, 2, 64, 2, 3}, "tensor", 4e-2},    // fewer steps than the featurizer, modes
      {{1, 256, 32, 32, 16}, "tensor"},      // one tile
      {{2, 300, 4096, 64, 16}, "tensor"},    // a team takes both entries
      {{3, 257, 4096, 4096, 16}, "tensor"},  // all three
      {{3, 2031, 96, 6, 12, false, false}, "tensor_chunks"},  //
      {{2, 2048, 32, 32, 16}, "tensor_chunks"},               //
      {{2, 2049, 32, 8, 16}, "tensor_chunks"},                // the last chunk is one step
      {{1, 40000, 64, 64, 16}, "tensor_chunks"},              // many pieces
      {{1, 4999, 64, 1, 16}, "tensor_chunks"},                // one group
      {{1, 300, 48, 48, 16}, "stages"},                       // channels that fill no column
      {{1, 300, 32, 32, 17}, "stages"},                       // too many modes
  };
  for (const auto& [shape, kernel, tolerance] : cases) {
    const Problem p(shape);
    const auto want = run(fused, p, at::kDouble), got = run(fused, p, at::kBFloat16, at::kCUDA);
    EXPECT_EQ(ops::last_kernel(), kernel) << shape;
    expect_close(got, want, tolerance, shape);
    EXPECT_LE(relative_rms(got[3], want[3]), 5e-3) << "dz of " << shape;
    expect_bit_equal(run(fused, p, at::kBFloat16, at::kCUDA), got, shape);
  }
}

TEST(HyenaModal, CudaTensorBackwardTakesParametersOfEitherTypeAndAnyStrides) {
  SKIP_WITHOUT_CUDA();
  for (const Shape& shape : {Shape{1, 300, 64, 64, 16, true, false}, Shape{2, 300, 64, 8, 16}}) {
    const Problem p(shape);
    const auto gradients = [&](at::ScalarType parameters, bool odd) {
      // Without its first element a buffer begins at an odd address.
      const auto on = [&](const Tensor& t, at::ScalarType type) {
        if (!t.defined()) return t;
        Tensor flat = t.to(at::kCUDA, type).flatten();
        if (odd) flat = at::cat({flat.narrow(0, 0, 1), flat}).narrow(0, 1, t.numel());
        return flat.view(t.sizes()).detach().requires_grad_(true);
      };
      const std::vector<Tensor> leaves{on(p.z, at::kBFloat16), on(p.featurizer, parameters),
                                       on(p.log_poles, at::kFloat), on(p.residues, at::kFloat),
                                       on(p.skip, parameters)};
      std::optional<HyenaState> state;
      if (shape.state) {
        state = HyenaState{on(p.featurizer_state, at::kBFloat16), on(p.inner_state, at::kFloat)};
      }
      // z alone stays aligned: without that another kernel takes it.
      const Tensor z = odd ? leaves[0].clone() : leaves[0];
      const auto [y, after] =
          ops::hyena_modal(z, leaves[1], leaves[2], leaves[3], leaves[4], state);
      const auto grads = torch::autograd::grad(
          {y, after.featurizer}, leaves,
          {on(p.dy, at::kBFloat16).detach(), on(p.dfeaturizer_state, at::kBFloat16).detach()});
      EXPECT_EQ(ops::last_kernel(), "tensor");
      return grads;
    };
    const auto want = gradients(at::kFloat, false);
    for (const bool odd : {false, true}) {
      const auto got = gradients(at::kBFloat16, odd);
      for (size_t i = 0; i < want.size(); ++i) {
        EXPECT_TRUE(bit_equal(got[i], want[i].to(got[i].scalar_type()))) << i << " of " << shape;
      }
      EXPECT_EQ(got[1].scalar_type(), at::kBFloat16);
      EXPECT_EQ(got[4].scalar_type(), at::kBFloat16);
    }
  }
}

TEST(HyenaModal, CudaTensorBackwardKeepsPolesCloseToOne) {
  SKIP_WITHOUT_CUDA();
  const double poles[] = {0.5, 0.9, 1 - 1e-3, 1 - 1e-5, 1 - 1e-7};
  for (const int64_t width : {32, 4096}) {  // with chunks of time and without
    const Shape shape{1, width == 32 ? 20000 : 2500, width, 32, 5};
    Problem p(shape);
    p.log_poles = at::tensor(at::ArrayRef<double>(poles), at::kDouble)
                      .log()
                      .to(at::kFloat)
                      .to(at::kDouble)
                      .expand({shape.groups, 5})
                      .contiguous();
    const auto want = run(fused, p, at::kDouble), got = run(fused, p, at::kBFloat16, at::kCUDA);
    EXPECT_EQ(ops::last_kernel(), width == 32 ? "tensor_chunks" : "tensor");
    expect_close(got, want, kTensorTolerance, shape);
    for (int64_t n = 0; n < 5; ++n) {
      for (const int i : {5, 6}) {
        EXPECT_LE(relative_rms(got[i].select(1, n), want[i].select(1, n)), kTensorTolerance)
            << kNames[i] << " of pole " << poles[n] << " of " << shape;
      }
      EXPECT_LE(relative_rms(got[9].select(2, n), want[9].select(2, n)), kTensorTolerance)
          << kNames[9] << " of pole " << poles[n] << " of " << shape;
    }
  }
}

TEST(HyenaModal, CudaSplitsAndRepeatsAreBitEqual) {
  SKIP_WITHOUT_CUDA();
  const Problem p({2, 133, 70, 35, 16});
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const auto first = run(fused, p, dtype, at::kCUDA);
    expect_bit_equal(run(fused, p, dtype, at::kCUDA), first, p.shape);
    const auto on = [&](const Tensor& t, at::ScalarType type) { return t.to(at::kCUDA, type); };
    const HyenaState start{on(p.featurizer_state, dtype), on(p.inner_state, at::kFloat)};
    const auto step = [&](int64_t from, int64_t count, const HyenaState& state) {
      return ops::hyena_modal(on(p.z, dtype).narrow(1, from, count), on(p.featurizer, at::kFloat),
                              on(p.log_poles, at::kFloat), on(p.residues, at::kFloat),
                              on(p.skip, at::kFloat), state);
    };
    for (const int64_t cut : {0, 1, 2, 15, 16, 17, 64, 100, 132}) {
      const auto [y1, s1] = step(0, cut, start);
      const auto [y2, s2] = step(cut, p.shape.length - cut, s1);
      // A step sums the modes in another order.
      const double rounding = cut == 1 || cut == 132 ? (dtype == at::kFloat ? 1e-6 : 3e-3) : 0;
      EXPECT_LE(relative_rms(at::cat({y1, y2}, 1), first[0]), rounding) << "cut at " << cut;
      EXPECT_TRUE(bit_equal(s2.featurizer, first[1])) << "cut at " << cut << " in " << dtype;
      EXPECT_TRUE(bit_equal(s2.inner, first[2])) << "cut at " << cut << " in " << dtype;
    }
  }
}

TEST(HyenaModal, CudaAppendedTokensDoNotChangeThePast) {
  SKIP_WITHOUT_CUDA();
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    for (const Shape& shape : {Shape{2, 1300, 64, 64, 16}, Shape{1, 1300, 40, 20, 16}}) {
      expect_prefixes_equal(shape, dtype, at::kCUDA,
                            {2, 15, 16, 17, 127, 128, 129, 255, 256, 257, 512, 1000, 1299});
    }
  }
}

TEST(HyenaModal, CudaMatchesFftLayerOnTheGpu) {
  SKIP_WITHOUT_CUDA();
  expect_fft_layer({2, 500, 6, 3, 16}, at::kFloat, at::kCUDA, 3e-6);
  expect_fft_layer({1, 3001, 64, 64, 16}, at::kFloat, at::kCUDA, 3e-6);
}

TEST(HyenaModal, CudaStepsFollowTheSequence) {
  SKIP_WITHOUT_CUDA();
  const Problem p({3, 40, 64, 64, 16});
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const auto on = [&](const Tensor& t, at::ScalarType type) { return t.to(at::kCUDA, type); };
    for (const auto parameters : {at::kFloat, dtype}) {
      const Tensor z = on(p.z, dtype), featurizer = on(p.featurizer, parameters),
                   log_poles = on(p.log_poles, at::kFloat), residues = on(p.residues, at::kFloat),
                   skip = on(p.skip, parameters);
      const auto [y, end] = ops::hyena_modal(z, featurizer, log_poles, residues, skip);
      std::optional<HyenaState> state;
      std::vector<Tensor> steps;
      for (int64_t t = 0; t < p.shape.length; ++t) {
        const auto [step, next] =
            ops::hyena_modal(z.narrow(1, t, 1), featurizer, log_poles, residues, skip, state);
        EXPECT_EQ(ops::last_kernel(), "step");
        steps.push_back(step);
        state = next;
      }
      // The sequence in bfloat16 runs on tensor cores.
      EXPECT_LE(relative_rms(at::cat(steps, 1), y), dtype == at::kFloat ? 1e-6 : 4e-3) << dtype;
      EXPECT_TRUE(bit_equal(state->featurizer, end.featurizer)) << dtype;
      EXPECT_LE(relative_rms(state->inner, end.inner), dtype == at::kFloat ? 1e-6 : 1e-5) << dtype;
    }
  }
}

/// What the tensor core forward is to compute: u in float, everything after it in `compute`.
std::tuple<Tensor, Tensor> from_float_u(const Problem& p, at::ScalarType compute) {
  const auto of = [&](const Tensor& t) { return t.defined() ? t.to(compute) : t; };
  const Tensor before = p.shape.state
                            ? p.featurizer_state
                            : at::zeros({p.shape.batch, 2, 3 * p.shape.width}, at::kDouble);
  const Tensor rows = at::cat({before, p.z}, 1).to(at::kFloat);
  // Products of bfloat16 values are exact in float, so these sums have the bits of the kernel's.
  Tensor c;
  for (const int64_t k : {2, 1, 0}) {
    const Tensor term =
        p.featurizer.to(at::kFloat).select(1, k) * rows.narrow(1, 2 - k, p.shape.length);
    c = c.defined() ? c + term : term;
  }
  const auto part = c.chunk(3, 2);
  const Tensor u = (part[1] * part[2]).to(compute);
  const auto [q, inner] =
      ops::modal(u, of(p.log_poles), of(p.residues),
                 p.skip.defined() ? std::optional(of(p.skip)) : std::nullopt,
                 p.shape.state ? std::optional(of(p.inner_state)) : std::nullopt);
  return {part[0].to(compute) * q, inner};
}

struct TensorRun {
  Tensor y, saved;
  HyenaState state;
};
/// hyena_modal of steps [from, from + count) in bfloat16 on the GPU, on the tensor cores.
TensorRun run_tensor(const Problem& p, int64_t from, int64_t count,
                     const std::optional<HyenaState>& start, bool save = false) {
  const auto on = [](const Tensor& t, at::ScalarType type) { return t.to(at::kCUDA, type); };
  const auto [y, featurizer_state, inner, saved] = hyena_modal_operator().call(
      on(p.z, at::kBFloat16).narrow(1, from, count), on(p.featurizer, at::kFloat),
      on(p.log_poles, at::kFloat), on(p.residues, at::kFloat),
      p.skip.defined() ? std::optional(on(p.skip, at::kFloat)) : std::nullopt,
      start ? std::optional(start->featurizer) : std::nullopt,
      start ? std::optional(start->inner) : std::nullopt, save);
  if (count > 1) {
    EXPECT_EQ(ops::last_kernel().substr(0, 6), "tensor");
  }
  return {y, saved, {featurizer_state, inner}};
}
std::optional<HyenaState> start_of(const Problem& p) {
  if (!p.shape.state) return std::nullopt;
  return HyenaState{p.featurizer_state.to(at::kCUDA, at::kBFloat16),
                    p.inner_state.to(at::kCUDA, at::kFloat)};
}

// Wide columns for more than 132 narrow ones, one or more ranks for fewer.
const Shape kTensorShapes[] = {
    {2, 700, 64, 8, 16},                //
    {1, 1031, 96, 96, 5, false, true},  // fewer modes
    {1, 255, 32, 1, 16, true, false},   // less than a tile
    {3, 17, 64, 64, 1},                 // a step more than a block
    {1, 2, 32, 32, 16},                 //
    {2, 1025, 2176, 2176, 16},          // wide columns
    {1, 1100, 2048, 64, 16},            // one rank
    {1, 6000, 256, 16, 16},             // eight
};

TEST(HyenaModal, CudaTensorForwardMatchesDouble) {
  SKIP_WITHOUT_CUDA();
  const test::PoisonMemory poison;
  for (const Shape& shape : kTensorShapes) {
    const Problem p(shape);
    const auto got = run_tensor(p, 0, shape.length, start_of(p));
    const auto [y, inner] = from_float_u(p, at::kDouble);
    // Two roundings to bfloat16, of q and of y.
    EXPECT_LE(relative_rms(got.y, y), 3.3e-3) << shape;
    EXPECT_LE(relative_rms(got.state.inner, inner), 1e-5) << shape;
    const Tensor rows = at::cat(
        {p.shape.state ? p.featurizer_state : at::zeros({shape.batch, 2, 3 * shape.width}), p.z},
        1);
    EXPECT_TRUE(bit_equal(got.state.featurizer.to(at::kDouble),
                          rows.narrow(1, shape.length, 2).to(at::kDouble)))
        << shape;
    const auto again = run_tensor(p, 0, shape.length, start_of(p));
    EXPECT_TRUE(bit_equal(again.y, got.y) && bit_equal(again.state.inner, got.state.inner))
        << shape;
  }
}

TEST(HyenaModal, CudaTensorPolesNearOneAreAsGoodAsThePlainRecurrence) {
  SKIP_WITHOUT_CUDA();
  const std::vector<double> poles{1e-3, 0.5, 0.9, 1 - 1e-3, 1 - 1e-5, 1 - 1e-7};
  const auto count = static_cast<int64_t>(poles.size());
  Problem p({1, 300000, 32, 32, count, true, false});
  p.log_poles =
      at::tensor(poles, at::kDouble).log().to(at::kFloat).to(at::kDouble).expand({32, count});
  for (int64_t channel = 0; channel < 24; ++channel) {  // one pole each, then mixtures
    p.residues[channel].zero_();
    p.residues[channel][channel % count] = 1;
    p.skip[channel] = 0;
  }
  const auto got = run_tensor(p, 0, p.shape.length, std::nullopt);
  const auto [want, inner] = from_float_u(p, at::kDouble);
  const Tensor plain = std::get<0>(from_float_u(p, at::kFloat)).to(at::kBFloat16);
  for (int64_t channel = 0; channel < 32; ++channel) {
    const auto of = [&](const Tensor& y) { return y.select(2, channel); };
    EXPECT_LE(relative_rms(of(got.y), of(want)), 2 * relative_rms(of(plain), of(want)))
        << "channel " << channel;
  }
  EXPECT_LE(relative_rms(got.state.inner, inner), 2e-5);
}

/// A random walk through the difference of two poles: what is slow in u cancels, and little is
/// left.
TEST(HyenaModal, CudaTensorKeepsWhatCancellingModesLeave) {
  SKIP_WITHOUT_CUDA();
  constexpr int64_t kLength = 50000, kWidth = 32;
  const double pairs[][2] = {{1e-3, 0.5}, {0.5, 0.9}, {0.9, 1 - 1e-3}, {0.5, 1 - 1e-3}};
  Problem p({1, kLength, kWidth, kWidth, 2, true, false});
  const Tensor walk = at::cumsum(test::randn({1, kLength, kWidth}, 7), 1);
  p.z.narrow(2, kWidth, kWidth).fill_(1.0703125);  // pre-gate; exact in bfloat16
  p.z.narrow(2, 2 * kWidth, kWidth).copy_(walk.to(at::kBFloat16));
  p.skip.zero_();
  for (int64_t channel = 0; channel < kWidth; ++channel) {
    for (int64_t n = 0; n < 2; ++n) {
      const double pole = pairs[channel % 4][n];
      p.log_poles[channel][n] = static_cast<float>(std::log(pole));
      p.residues[channel][n] = static_cast<float>(n == 0 ? 1 - pole : pole - 1);
    }
  }
  const auto got = run_tensor(p, 0, kLength, std::nullopt);
  const Tensor want = std::get<0>(from_float_u(p, at::kDouble));
  const Tensor plain = std::get<0>(from_float_u(p, at::kFloat)).to(at::kBFloat16);
  for (int64_t channel = 0; channel < kWidth; ++channel) {
    const auto of = [&](const Tensor& y) { return y.select(2, channel); };
    EXPECT_LE(relative_rms(of(got.y), of(want)), 2 * relative_rms(of(plain), of(want)))
        << "channel " << channel;
  }
}

TEST(HyenaModal, CudaTensorSplitsLeaveTheStateOfTheWhole) {
  SKIP_WITHOUT_CUDA();
  for (const Shape& shape : {Shape{2, 1100, 64, 8, 16}, Shape{1, 530, 2176, 2176, 16},
                             Shape{1, 530, 1568, 49, 16}, Shape{1, 9000, 32, 32, 16}}) {
    const Problem p(shape);
    const auto whole = run_tensor(p, 0, shape.length, start_of(p));
    for (const int64_t cut : {1L, 2L, 15L, 16L, 129L, 256L, 300L, shape.length - 1}) {
      const auto first = run_tensor(p, 0, cut, start_of(p));
      const auto second = run_tensor(p, cut, shape.length - cut, first.state);
      // A cut of one step is not rounded as the others are.
      EXPECT_LE(relative_rms(at::cat({first.y, second.y}, 1), whole.y), 2e-3) << cut;
      EXPECT_LE(relative_rms(second.state.inner, whole.state.inner), 1e-5) << cut;
      EXPECT_TRUE(bit_equal(second.state.featurizer, whole.state.featurizer)) << cut;
      if (cut > 1) {
        EXPECT_TRUE(bit_equal(first.y, whole.y.narrow(1, 0, cut))) << cut;
      }
    }
  }
}

/// A CTA may march through several batch entries; each comes out as if it were alone.
TEST(HyenaModal, CudaBatchEntriesAreBitEqualToThemselvesAlone) {
  SKIP_WITHOUT_CUDA();
  const test::PoisonMemory poison;
  for (const Shape& shape : {Shape{3, 800, 4096, 64, 16}, Shape{5, 769, 4096, 4096, 7, true, false},
                             Shape{3, 300, 4096, 4096, 16}}) {
    const Problem all(shape);
    const auto got = run_tensor(all, 0, shape.length, start_of(all), true);
    for (int64_t b = 0; b < shape.batch; ++b) {
      Problem one = all;
      one.shape.batch = 1;
      one.z = all.z.narrow(0, b, 1);
      if (shape.state) {
        one.featurizer_state = all.featurizer_state.narrow(0, b, 1);
        one.inner_state = all.inner_state.narrow(0, b, 1);
      }
      const auto alone = run_tensor(one, 0, shape.length, start_of(one), true);
      const auto expect_equal = [&](const Tensor& entry, const Tensor& want, const char* name) {
        EXPECT_TRUE(bit_equal(entry.narrow(0, b, 1), want)) << name << " " << b << " of " << shape;
      };
      expect_equal(got.y, alone.y, "y");
      expect_equal(got.state.inner, alone.state.inner, "inner state");
      expect_equal(got.state.featurizer, alone.state.featurizer, "featurizer state");
      expect_equal(got.saved, alone.saved, "saved");
    }
  }
}

TEST(HyenaModal, CudaSavesTheStatesBeforeEveryFewSteps) {
  SKIP_WITHOUT_CUDA();
  const test::PoisonMemory poison;
  for (const Shape& shape : {Shape{2, 700, 64, 8, 12}, Shape{1, 385, 2176, 2176, 16}}) {
    const Problem p(shape);
    const auto got = run_tensor(p, 0, shape.length, start_of(p), true);
    constexpr int64_t kSteps = kernels::kModalSavedSteps;
    const int64_t entries = (shape.length + kSteps - 1) / kSteps;
    ASSERT_EQ(got.saved.sizes(), (at::IntArrayRef{shape.batch, entries, shape.width, 16}));
    EXPECT_TRUE(got.saved.narrow(3, shape.modes, 16 - shape.modes).eq(0).all().item<bool>());
    for (int64_t k = 0; k < entries; ++k) {
      const Tensor saved = got.saved.select(1, k).narrow(2, 0, shape.modes);
      const Tensor want = k == 0 ? p.inner_state.to(at::kCUDA, at::kFloat)
                                 : run_tensor(p, 0, k * kSteps, start_of(p)).state.inner;
      EXPECT_LE(relative_rms(saved, want), 1e-5) << shape << ", entry " << k;
    }
    // Strides that the tensor cores do not take: the general kernel saves too.
    const Tensor z =
        at::constant_pad_nd(p.z.to(at::kCUDA, at::kBFloat16), {0, 1}).narrow(2, 0, 3 * shape.width);
    const auto on = [](const Tensor& t) { return t.to(at::kCUDA, at::kFloat); };
    const auto [y, a, b, saved] =
        hyena_modal_operator().call(z, on(p.featurizer), on(p.log_poles), on(p.residues),
                                    on(p.skip), start_of(p)->featurizer, start_of(p)->inner, true);
    EXPECT_LE(relative_rms(saved, got.saved), 3e-3) << shape;
  }
}

TEST(HyenaModal, CudaEmptyBatchAndLength) {
  SKIP_WITHOUT_CUDA();
  for (const Shape& shape : {Shape{2, 0, 6, 3, 4}, Shape{0, 5, 6, 3, 4}}) {
    const Problem p(shape);
    const auto all = run(fused, p, at::kFloat, at::kCUDA);
    EXPECT_TRUE(bit_equal(all[1], p.featurizer_state.to(at::kFloat)));
    for (const int i : {4, 5, 6, 7}) EXPECT_TRUE(all[i].eq(0).all().item<bool>()) << kNames[i];
    EXPECT_TRUE(bit_equal(all[9], p.dinner_state.to(at::kFloat)));
  }
}

}  // namespace
}  // namespace sarissa
