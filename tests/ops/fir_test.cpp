// fir against a dense matrix in double, and its contracts: states, strides, dtypes, determinism.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "sarissa/kernels/fir/fir_plan.h"
#include "sarissa/ops/device.h"
#include "sarissa/ops/ops.h"
#include "tests/ops/fir_problem.h"
#include "tests/support/compare.h"
#include "tests/support/fft.h"

namespace sarissa {
namespace {

using at::Tensor;
using test::bit_equal;
using test::relative_rms;
using Shape = test::FirShape;

// Lengths 1, 2, W-1, W, W+1 and primes; widths that are no multiple of a vector; chunk and tile
// boundaries (256 and 512 steps, 8 rows, 64 channels).
const std::vector<Shape> kShapes = {
    {1, 1, 1, 1, 1},       {2, 5, 3, 3, 1},      {2, 1, 8, 2, 2},       {1, 2, 20, 4, 7},
    {2, 6, 20, 5, 7},      {3, 7, 15, 1, 7},     {1, 8, 64, 4, 7},      {1, 257, 70, 7, 4},
    {2, 127, 33, 11, 128}, {1, 128, 16, 2, 128}, {1, 129, 65, 13, 128}, {1, 521, 12, 3, 9},
    {1, 13, 6, 2, 300},    {1, 601, 4, 2, 530},
};
// Filters as long as the sequence and longer, across time chunks of any size.
const std::vector<Shape> kLongShapes = {{1, 1500, 2, 1, 1500}, {1, 1500, 3, 1, 3000}};
const std::vector<Shape> kFftShapes = {
    {2, 301, 20, 5, 17}, {2, 1500, 6, 3, 1500}, {1, 1500, 20, 5, 3000}, {2, 2100, 6, 6, 128}};

struct Problem {
  Tensor u, taps, state, dy, d_state;  // double, on the CPU
};

Problem make_problem(const Shape& s, uint64_t seed = 7) {
  return {test::randn({s.B, s.L, s.D}, seed), test::randn({s.G, s.W}, seed + 1),
          test::randn({s.B, s.W - 1, s.D}, seed + 2), test::randn({s.B, s.L, s.D}, seed + 3),
          test::randn({s.B, s.W - 1, s.D}, seed + 4)};
}

/// y, state_out and the gradients of u, taps, state.
std::vector<Tensor> run(const std::function<std::tuple<Tensor, Tensor>(Tensor, Tensor, Tensor)>& f,
                        const Problem& p, at::ScalarType dtype, at::Device device,
                        at::ScalarType taps_dtype) {
  const auto leaf = [&](const Tensor& t, at::ScalarType type) {
    return t.to(device, type).detach().clone().requires_grad_(true);
  };
  const std::vector<Tensor> inputs = {leaf(p.u, dtype), leaf(p.taps, taps_dtype),
                                      leaf(p.state, dtype)};
  const auto [y, state_out] = f(inputs[0], inputs[1], inputs[2]);
  std::vector<Tensor> results = {y, state_out};
  for (Tensor& g : torch::autograd::grad({y, state_out}, inputs,
                                         {p.dy.to(device, dtype), p.d_state.to(device, dtype)})) {
    results.push_back(g);
  }
  return results;
}

std::tuple<Tensor, Tensor> call_fir(Tensor u, Tensor taps, Tensor state) {
  return ops::fir(u, taps, state);
}

std::vector<Tensor> run_fir(const Problem& p, at::ScalarType dtype, at::Device device = at::kCPU) {
  return run(call_fir, p, dtype, device, dtype);
}

/// The definition as a matrix per group: y = M [state; u], M[t, t + W-1 - k] = taps[k].
std::tuple<Tensor, Tensor> dense_fir(Tensor u, Tensor taps, Tensor state) {
  const int64_t L = u.size(1), D = u.size(2), G = taps.size(0), W = taps.size(1);
  const Tensor t = at::arange(L).unsqueeze(1);
  const Tensor column = at::arange(L + W - 1).unsqueeze(0);
  const Tensor k = t + (W - 1) - column;
  const Tensor inside = k.ge(0).logical_and(k.lt(W));
  const Tensor matrix =
      at::where(inside, taps.index_select(1, k.clamp(0, W - 1).flatten()).view({G, L, L + W - 1}),
                at::zeros({}, taps.options()));
  const Tensor extended = at::cat({state, u}, 1);
  const Tensor y =
      at::einsum("gts,bsgc->btgc", {matrix, extended.view({u.size(0), L + W - 1, G, D / G})});
  return {y.reshape(u.sizes()), extended.slice(1, L)};
}

const char* kNames[] = {"y", "state_out", "du", "d_taps", "d_state"};

/// The definition by FFT.
std::tuple<Tensor, Tensor> fft_fir(Tensor u, Tensor taps, Tensor state) {
  const Tensor extended = at::cat({state, u}, 1);
  const Tensor taps_DW = taps.repeat_interleave(u.size(2) / taps.size(0), 0);
  return {test::fft_convolution(extended, taps_DW).slice(1, taps.size(1) - 1),
          extended.slice(1, u.size(1))};
}

using Reference = std::tuple<Tensor, Tensor>(Tensor u, Tensor taps, Tensor state);

void expect_equal(Reference* reference, const std::vector<Shape>& shapes, at::ScalarType dtype,
                  at::Device device, double tolerance) {
  const test::PoisonMemory poison;
  for (const Shape& s : shapes) {
    const Problem p = make_problem(s);
    const auto got = run_fir(p, dtype, device);
    const auto want = run(reference, p, at::kDouble, at::kCPU, at::kDouble);
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT_LE(relative_rms(got[i], want[i]), tolerance) << s << ": " << kNames[i];
    }
  }
}
void expect_dense(at::ScalarType dtype, at::Device device, double tolerance) {
  expect_equal(dense_fir, kShapes, dtype, device, tolerance);
}
/// Sums of thousands of products are less exact.
void expect_long_filters(at::ScalarType dtype, at::Device device, double tolerance) {
  expect_equal(dense_fir, kLongShapes, dtype, device, tolerance);
}

TEST(Fir, MatchesTheDenseMatrixInDouble) { expect_dense(at::kDouble, at::kCPU, 2e-15); }
TEST(Fir, MatchesTheDenseMatrixInFloat) { expect_dense(at::kFloat, at::kCPU, 1e-6); }
TEST(Fir, FiltersAsLongAsTheSequenceInDouble) { expect_long_filters(at::kDouble, at::kCPU, 1e-14); }
TEST(Fir, FiltersAsLongAsTheSequenceInFloat) { expect_long_filters(at::kFloat, at::kCPU, 5e-6); }
TEST(Fir, MatchesFftConvolution) {
  expect_equal(fft_fir, kFftShapes, at::kDouble, at::kCPU, 1e-14);
}

/// bf16 in and out with fp32 arithmetic: at most twice the error of the plain computation that
/// reads bf16, computes in double and rounds the result.
void expect_bfloat16_rule(at::Device device) {
  std::vector<Shape> shapes = kShapes;
  shapes.insert(shapes.end(), kLongShapes.begin(), kLongShapes.end());
  for (const Shape& s : shapes) {
    Problem p = make_problem(s);
    for (Tensor* t : {&p.u, &p.taps, &p.state, &p.dy, &p.d_state}) {
      *t = t->to(at::kBFloat16).to(at::kDouble);
    }
    const auto got = run_fir(p, at::kBFloat16, device);
    const auto want = run(dense_fir, p, at::kDouble, at::kCPU, at::kDouble);
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT_EQ(got[i].scalar_type(), at::kBFloat16);
      const double plain = relative_rms(want[i].to(at::kBFloat16), want[i]);
      EXPECT_LE(relative_rms(got[i], want[i]), std::max(1e-5, 2 * plain)) << s << ": " << kNames[i];
    }
  }
}

TEST(Fir, BFloat16RoundsOnlyAtTheEnds) { expect_bfloat16_rule(at::kCPU); }

TEST(Fir, TapsMayBeFloatUnderAnyInput) {
  const Problem p = make_problem({2, 37, 20, 4, 7});
  for (const auto dtype : {at::kDouble, at::kBFloat16}) {
    const auto got = run(call_fir, p, dtype, at::kCPU, at::kFloat);
    const auto want = run(dense_fir, p, at::kDouble, at::kCPU, at::kDouble);
    EXPECT_EQ(got[0].scalar_type(), dtype);
    EXPECT_EQ(got[3].scalar_type(), at::kFloat);
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT_LE(relative_rms(got[i], want[i]), dtype == at::kDouble ? 1e-6 : 1e-2) << kNames[i];
    }
  }
}

TEST(Fir, GradientsMatchFiniteDifferences) {
  const Problem p = make_problem({2, 9, 6, 2, 5});
  const auto f = [](const std::vector<Tensor>& in) {
    const auto [y, state] = ops::fir(in[0], in[1], in[2]);
    return at::cat({y, state}, 1);
  };
  EXPECT_LE(test::gradient_error(f, {p.u, p.taps, p.state}), 1e-8);
}

void expect_splits_equal(at::ScalarType dtype, at::Device device) {
  for (const Shape& s :
       {Shape{2, 37, 20, 4, 7}, Shape{1, 300, 70, 7, 128}, Shape{1, 11, 9, 3, 1}}) {
    const Problem p = make_problem(s);
    const Tensor u = p.u.to(device, dtype), taps = p.taps.to(device, dtype);
    const auto [y, state] = ops::fir(u, taps);
    for (const int64_t cut : {int64_t{0}, int64_t{1}, s.W - 1, s.L / 2, s.L - 1, s.L}) {
      if (cut > s.L) continue;
      const auto [y1, state1] = ops::fir(u.slice(1, 0, cut), taps);
      const auto [y2, state2] = ops::fir(u.slice(1, cut), taps, state1);
      EXPECT_TRUE(bit_equal(at::cat({y1, y2}, 1), y)) << s << " cut " << cut;
      EXPECT_TRUE(bit_equal(state2, state)) << s << " cut " << cut;
    }
    std::optional<Tensor> carried;
    for (int64_t t = 0; t < s.L; ++t) {
      const auto [step, next] = ops::fir(u.slice(1, t, t + 1), taps, carried);
      EXPECT_TRUE(bit_equal(step, y.slice(1, t, t + 1))) << s << " step " << t;
      carried = next;
    }
    EXPECT_TRUE(bit_equal(*carried, state)) << s;
  }
}

/// Tokens that are appended change nothing that was there.
void expect_prefixes_equal(at::ScalarType dtype, at::Device device) {
  for (const Shape& s : {Shape{2, 600, 20, 4, 7}, Shape{1, 600, 64, 4, 128}}) {
    const Problem p = make_problem(s);
    const Tensor u = p.u.to(device, dtype), taps = p.taps.to(device, dtype);
    const Tensor all = std::get<0>(ops::fir(u, taps));
    for (const int64_t length : {1, 2, 63, 64, 255, 256, 257, 511, 512, 599}) {
      const Tensor y = std::get<0>(ops::fir(u.slice(1, 0, length), taps));
      EXPECT_TRUE(bit_equal(y, all.slice(1, 0, length))) << s << " prefix of " << length;
    }
  }
}

TEST(Fir, AppendedTokensDoNotChangeThePast) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    expect_prefixes_equal(dtype, at::kCPU);
  }
}

TEST(Fir, AnySplitAndSteppingGiveTheSameBits) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    expect_splits_equal(dtype, at::kCPU);
  }
}

void expect_strides_honoured(at::Device device) {
  const Problem p = make_problem({2, 37, 20, 4, 7});
  const auto want = run_fir(p, at::kFloat, device);
  Tensor u = p.u.to(device, at::kFloat), taps = p.taps.to(device, at::kFloat);
  Tensor state = p.state.to(device, at::kFloat);
  const Tensor dy = p.dy.to(device, at::kFloat), d_state = p.d_state.to(device, at::kFloat);
  for (const bool channels_strided : {false, true}) {
    const auto view = [&](const Tensor& t) {
      return channels_strided ? t.transpose(-1, -2).contiguous().transpose(-1, -2)
                              : test::strided_copy(t);
    };
    const std::vector<Tensor> inputs = {view(u).requires_grad_(true),
                                        view(taps).requires_grad_(true),
                                        view(state).requires_grad_(true)};
    const auto [y, state_out] = ops::fir(inputs[0], inputs[1], inputs[2]);
    const auto grads = torch::autograd::grad({y, state_out}, inputs, {view(dy), view(d_state)});
    const Tensor got[] = {y, state_out, grads[0], grads[1], grads[2]};
    for (size_t i = 0; i < want.size(); ++i) EXPECT_TRUE(bit_equal(got[i], want[i])) << kNames[i];
  }
}

TEST(Fir, HonoursStrides) { expect_strides_honoured(at::kCPU); }

TEST(Fir, TakesExpandedAndMissingGradients) {
  const Problem p = make_problem({2, 11, 6, 2, 5});
  const auto gradients = [&](bool use_y, bool use_state) {
    const std::vector<Tensor> inputs = {p.u.clone().requires_grad_(true),
                                        p.taps.clone().requires_grad_(true),
                                        p.state.clone().requires_grad_(true)};
    const auto [y, state] = ops::fir(inputs[0], inputs[1], inputs[2]);
    Tensor loss = at::zeros({}, p.u.options());
    if (use_y) loss = loss + y.sum();  // an expanded gradient
    if (use_state) loss = loss + state.sum();
    return torch::autograd::grad({loss}, inputs);
  };
  const auto both = gradients(true, true), y = gradients(true, false), s = gradients(false, true);
  for (size_t i = 0; i < both.size(); ++i) {
    EXPECT_LE(relative_rms(y[i] + s[i], both[i]), 1e-14) << i;
    EXPECT_GT(both[i].abs().max().item<double>(), 0.0);
  }
}

TEST(Fir, OnlyTheInputsThatAskGetGradients) {
  const Problem p = make_problem({1, 9, 6, 2, 5});
  const Tensor taps = p.taps.clone().requires_grad_(true);
  const auto [y, state] = ops::fir(p.u, taps);
  EXPECT_TRUE(y.requires_grad());
  const auto grads = torch::autograd::grad({y}, {taps}, {p.dy});
  Problem from_zero = p;
  from_zero.state = at::zeros_like(p.state);
  from_zero.d_state = at::zeros_like(p.d_state);
  EXPECT_TRUE(bit_equal(grads[0], run_fir(from_zero, at::kDouble)[3]));
  EXPECT_FALSE(std::get<0>(ops::fir(p.u, p.taps)).requires_grad());
}

void expect_repeatable(at::Device device) {
  const Problem p = make_problem({2, 1100, 70, 7, 128});
  const auto once = run_fir(p, at::kFloat, device);
  const auto again = run_fir(p, at::kFloat, device);
  for (size_t i = 0; i < once.size(); ++i) EXPECT_TRUE(bit_equal(once[i], again[i])) << kNames[i];
}

TEST(Fir, RunsAndThreadCountsGiveTheSameBits) {
  expect_repeatable(at::kCPU);
  const Problem p = make_problem({2, 1100, 70, 7, 128});
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const auto one = run_fir(p, at::kFloat);
  at::set_num_threads(2);
  const auto two = run_fir(p, at::kFloat);
  at::set_num_threads(threads);
  for (size_t i = 0; i < one.size(); ++i) EXPECT_TRUE(bit_equal(one[i], two[i])) << kNames[i];
}

TEST(Fir, EmptyBatchesAndLengthsBehave) {
  const Problem p = make_problem({2, 0, 6, 2, 5});
  const auto got = run_fir(p, at::kFloat);
  EXPECT_EQ(got[0].sizes(), at::IntArrayRef({2, 0, 6}));
  EXPECT_TRUE(bit_equal(got[1], p.state.to(at::kFloat)));
  EXPECT_TRUE(bit_equal(got[3], at::zeros({2, 5})));
  EXPECT_TRUE(bit_equal(got[4], p.d_state.to(at::kFloat)));

  const auto none = run_fir(make_problem({0, 4, 6, 2, 5}), at::kFloat);
  EXPECT_EQ(none[0].sizes(), at::IntArrayRef({0, 4, 6}));
  EXPECT_EQ(none[1].sizes(), at::IntArrayRef({0, 4, 6}));
  EXPECT_TRUE(bit_equal(none[3], at::zeros({2, 5})));
}

TEST(Fir, MetaTensorsGiveShapes) {
  const auto meta = at::TensorOptions().dtype(at::kBFloat16).device(at::kMeta);
  const auto [y, state] = ops::fir(at::empty({2, 9, 6}, meta), at::empty({3, 5}, meta));
  EXPECT_TRUE(y.is_meta());
  EXPECT_EQ(y.sizes(), at::IntArrayRef({2, 9, 6}));
  EXPECT_EQ(state.sizes(), at::IntArrayRef({2, 4, 6}));
  EXPECT_EQ(state.scalar_type(), at::kBFloat16);
}

/// The message of the error that f throws.
std::string message(const std::function<void()>& f) {
  try {
    f();
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  }
  return "no error";
}

void expect_refused(const std::function<void()>& f, std::initializer_list<const char*> words) {
  const std::string text = message(f);
  for (const char* word : words) {
    EXPECT_NE(text.find(word), std::string::npos) << "'" << word << "' is not in: " << text;
  }
}

TEST(Fir, RefusesBadInputsByName) {
  const Tensor u = at::zeros({2, 9, 6}), taps = at::zeros({3, 5});
  expect_refused([&] { ops::fir(u.to(at::kHalf), taps); }, {"sarissa::fir", "u is Half"});
  expect_refused([&] { ops::fir(u.to(at::kLong), taps); }, {"sarissa::fir", "u is Long"});
  expect_refused([&] { ops::fir(u[0], taps); }, {"u has shape [9, 6]", "[B, L, D]"});
  expect_refused([&] { ops::fir(u, at::zeros({4, 5})); }, {"taps has shape [4, 5]", "D = 6"});
  expect_refused([&] { ops::fir(u, at::zeros({3, 0})); }, {"taps has shape [3, 0]"});
  expect_refused([&] { ops::fir(u, taps.to(at::kDouble)); }, {"taps is Double", "Float"});
  expect_refused(
      [&] {
        ops::fir(u, taps, at::zeros({2, 5, 6}));
      },
      {"state has shape [2, 5, 6]", "expected [2, 4, 6]"});
  expect_refused(
      [&] {
        ops::fir(u, taps, at::zeros({2, 4, 6}).to(at::kBFloat16));
      },
      {"state is BFloat16", "expected Float"});
}

TEST(FirPlan, FilterGradientWorkspaceStaysBelowTheOthers) {
  for (const int64_t W : {1, 7, 128, 1024, 5000}) {
    kernels::FirParams p{};
    p.batch = 1;
    p.length = 1 << 20;
    p.width = 4096;
    p.groups = 256;
    p.num_taps = W;
    const auto sizes = kernels::fir_workspace_cpu(p, sizeof(float));
    const int64_t chunk = W * p.width;
    EXPECT_LE(sizes.taps_partial, sizes.u + chunk) << W;
    EXPECT_LE(kernels::fir_workspace_cuda(p).taps_partial, sizes.u + 2 * chunk) << W;
  }
}

TEST(FirCuda, MatchesTheDenseMatrixInDouble) {
  SKIP_WITHOUT_CUDA();
  expect_dense(at::kDouble, at::kCUDA, 2e-15);
}
TEST(FirCuda, MatchesTheDenseMatrixInFloat) {
  SKIP_WITHOUT_CUDA();
  expect_dense(at::kFloat, at::kCUDA, 1e-6);
}
TEST(FirCuda, FiltersAsLongAsTheSequence) {
  SKIP_WITHOUT_CUDA();
  expect_long_filters(at::kDouble, at::kCUDA, 1e-14);
  expect_long_filters(at::kFloat, at::kCUDA, 5e-6);
}
TEST(FirCuda, MatchesFftConvolutionOnTheGpu) {
  SKIP_WITHOUT_CUDA();
  for (const Shape& s : kFftShapes) {
    const Problem p = make_problem(s);
    const auto got = run_fir(p, at::kFloat, at::kCUDA);
    const auto want = run(fft_fir, p, at::kFloat, at::kCUDA, at::kFloat);
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT_LE(relative_rms(got[i], want[i]), 5e-6) << s << ": " << kNames[i];
    }
  }
}
TEST(FirCuda, AppendedTokensDoNotChangeThePast) {
  SKIP_WITHOUT_CUDA();
  for (const auto dtype : {at::kFloat, at::kBFloat16}) expect_prefixes_equal(dtype, at::kCUDA);
}
TEST(FirCuda, BFloat16RoundsOnlyAtTheEnds) {
  SKIP_WITHOUT_CUDA();
  expect_bfloat16_rule(at::kCUDA);
}
TEST(FirCuda, AnySplitAndSteppingGiveTheSameBits) {
  SKIP_WITHOUT_CUDA();
  for (const auto dtype : {at::kFloat, at::kBFloat16}) expect_splits_equal(dtype, at::kCUDA);
}
TEST(FirCuda, HonoursStrides) {
  SKIP_WITHOUT_CUDA();
  expect_strides_honoured(at::kCUDA);
}
TEST(FirCuda, RunsGiveTheSameBits) {
  SKIP_WITHOUT_CUDA();
  expect_repeatable(at::kCUDA);
}

}  // namespace
}  // namespace sarissa
