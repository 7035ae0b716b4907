#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <limits>

#include "sarissa/ops/device.h"
#include "sarissa/ops/ops.h"
#include "tests/support/compare.h"

namespace sarissa {
namespace {

using at::Tensor;
using test::randn;
using test::relative_rms;

struct Problem {
  int64_t batch, length, keys, heads, kv_heads, width, window;
};

std::ostream& operator<<(std::ostream& out, const Problem& p) {
  return out << "B " << p.batch << " L " << p.length << " S " << p.keys << " H " << p.heads
             << " Hkv " << p.kv_heads << " P " << p.width << " window " << p.window;
}

/// The softmax over a dense [L, S] mask.
Tensor dense(const Tensor& q, const Tensor& k, const Tensor& v, int64_t window) {
  const int64_t length = q.size(1), keys = k.size(1), groups = q.size(2) / k.size(2);
  const Tensor row = (at::arange(length, at::kLong) + (keys - length)).unsqueeze(1);
  const Tensor distance = (row - at::arange(keys, at::kLong)).to(q.device());
  Tensor hidden = distance < 0;
  if (window > 0) hidden = hidden.logical_or(distance >= window);
  const Tensor kk = k.repeat_interleave(groups, 2).permute({0, 2, 3, 1});
  const Tensor vv = v.repeat_interleave(groups, 2).transpose(1, 2);
  const Tensor scores = q.transpose(1, 2).matmul(kk) / std::sqrt(static_cast<double>(q.size(3)));
  return scores.masked_fill(hidden, -std::numeric_limits<double>::infinity())
      .softmax(-1)
      .matmul(vv)
      .transpose(1, 2);
}

/// The result and the gradients of q, k and v.
std::vector<Tensor> run(const Problem& p, at::ScalarType dtype, at::Device device, bool plain) {
  const auto options = at::TensorOptions().dtype(dtype).device(device);
  const auto values = [&](at::IntArrayRef shape, uint64_t seed) {
    return randn(shape, seed).to(at::kBFloat16).to(options);
  };
  const Tensor q = test::strided_copy(values({p.batch, p.length, p.heads, p.width}, 1));
  // k and v are halves of one cache.
  const Tensor kv = values({p.batch, p.keys, 2 * p.kv_heads, p.width}, 2);
  Tensor k = kv.narrow(2, 0, p.kv_heads), v = kv.narrow(2, p.kv_heads, p.kv_heads);
  for (Tensor t : {q, k, v}) t.requires_grad_(true);
  const Tensor y = plain ? dense(q, k, v, p.window) : ops::attention(q, k, v, p.window);
  std::vector<Tensor> out{y};
  const auto gradients = torch::autograd::grad({y}, {q, k, v}, {values(y.sizes(), 3)});
  out.insert(out.end(), gradients.begin(), gradients.end());
  return out;
}

const std::vector<Problem> kProblems = {
    {1, 1, 1, 1, 1, 8, 0},       {2, 33, 33, 4, 2, 16, 0},    {1, 70, 70, 2, 1, 24, 0},
    {2, 1, 41, 4, 2, 16, 0},     {2, 5, 41, 4, 1, 8, 0},      {1, 64, 200, 2, 2, 16, 0},
    {1, 1, 41, 2, 1, 8, 7},      {2, 50, 50, 4, 2, 8, 2},     {2, 50, 50, 4, 2, 8, 50},
    {1, 50, 50, 2, 2, 8, 1000},  {1, 64, 64, 2, 1, 8, 9},     {1, 65, 65, 2, 1, 8, 64},
    {2, 200, 200, 4, 2, 16, 17}, {2, 131, 131, 2, 1, 8, 65},  {1, 300, 300, 2, 1, 8, 100},
    {1, 100, 103, 2, 1, 8, 17},  {1, 200, 500, 2, 1, 16, 90}, {2, 7, 300, 2, 1, 8, 128},
    {1, 130, 150, 3, 1, 12, 33}, {1, 400, 699, 2, 1, 8, 300}, {2, 330, 360, 2, 2, 8, 300},
};

void check(at::ScalarType dtype, at::Device device, double floor) {
  for (const Problem& p : kProblems) {
    const auto want = run(p, at::kDouble, at::kCPU, true);
    const auto plain = run(p, dtype, at::kCPU, true);
    const auto got = run(p, dtype, device, false);
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT_EQ(got[i].scalar_type(), dtype);
      EXPECT_LE(relative_rms(got[i], want[i]), std::max(floor, 2 * relative_rms(plain[i], want[i])))
          << "result " << i << " of " << p << " in " << dtype;
    }
  }
}

TEST(Attention, MatchesDenseSoftmaxInDouble) {
  const test::PoisonMemory poison;
  check(at::kDouble, at::kCPU, 1e-13);
}

TEST(Attention, MatchesDenseSoftmaxInFloat) {
  const test::PoisonMemory poison;
  check(at::kFloat, at::kCPU, 2e-6);
}

TEST(Attention, MatchesDenseSoftmaxInBFloat16) {
  const test::PoisonMemory poison;
  check(at::kBFloat16, at::kCPU, 5e-3);
}

TEST(Attention, SplitAnywhereEqualsUnsplit) {
  const Tensor q = randn({1, 150, 2, 8}, 1), k = randn({1, 150, 1, 8}, 2);
  const Tensor v = randn({1, 150, 1, 8}, 3);
  for (const int64_t window : {0, 20}) {
    const Tensor whole = ops::attention(q, k, v, window);
    for (const int64_t cut : {1, 20, 149}) {
      const Tensor head =
          ops::attention(q.narrow(1, 0, cut), k.narrow(1, 0, cut), v.narrow(1, 0, cut), window);
      const Tensor tail = ops::attention(q.narrow(1, cut, 150 - cut), k, v, window);
      EXPECT_LE(relative_rms(at::cat({head, tail}, 1), whole), 1e-14) << cut << ", " << window;
    }
  }
}

TEST(Attention, LongPrefixIsCutIntoChunks) {
  const Problem p{1, 300, 40000, 1, 1, 4, 0};
  const auto want = run(p, at::kDouble, at::kCPU, true), got = run(p, at::kDouble, at::kCPU, false);
  for (size_t i = 0; i < got.size(); ++i) EXPECT_LE(relative_rms(got[i], want[i]), 1e-12) << i;
}

TEST(Attention, WindowNeedsMemoryLinearInLength) {
  // An [L, L] mask or score matrix would need 40 GB.
  const int64_t length = 100'000, window = 16;
  const auto options = at::TensorOptions().dtype(at::kFloat);
  const Tensor q = randn({1, length, 1, 4}, 1, options), k = randn({1, length, 1, 4}, 2, options);
  const Tensor v = randn({1, length, 1, 4}, 3, options);
  const Tensor y = ops::attention(q, k, v, window);
  for (const int64_t t : {0, 15, 63, 64, 65, 50'000, 99'999}) {
    const int64_t first = std::max<int64_t>(0, t - window + 1), seen = t + 1 - first;
    const Tensor want =
        dense(q.narrow(1, t, 1), k.narrow(1, first, seen), v.narrow(1, first, seen), 0);
    EXPECT_LE(relative_rms(y.narrow(1, t, 1), want), 1e-5) << t;
  }
}

TEST(Attention, WindowOfOneReturnsTheValues) {
  const Problem p{2, 150, 170, 4, 2, 8, 1};
  const auto got = run(p, at::kFloat, at::kCPU, false), want = run(p, at::kFloat, at::kCPU, true);
  EXPECT_LE(relative_rms(got[0], want[0]), 1e-6);
  // The scores do not matter, so their gradients vanish.
  EXPECT_LE(got[1].abs().max().item<double>(), 1e-5);
  EXPECT_LE(got[2].abs().max().item<double>(), 1e-5);
  EXPECT_LE(relative_rms(got[3], want[3]), 1e-6);
}

TEST(Attention, EmptyInputsAndRepeats) {
  const Tensor none = at::zeros({0, 3, 2, 8});
  EXPECT_EQ(ops::attention(none, none, none, 0).sizes(), none.sizes());
  const Problem p{2, 200, 230, 4, 2, 16, 17};
  const auto first = run(p, at::kFloat, at::kCPU, false),
             again = run(p, at::kFloat, at::kCPU, false);
  for (size_t i = 0; i < first.size(); ++i) EXPECT_TRUE(test::bit_equal(first[i], again[i])) << i;
}

TEST(Attention, RefusesBadInputsByName) {
  const Tensor q = randn({1, 4, 4, 8}, 1), k = randn({1, 6, 2, 8}, 2);
  const auto message = [](const Tensor& q, const Tensor& k, const Tensor& v,
                          int64_t window) -> std::string {
    try {
      ops::attention(q, k, v, window);
    } catch (const c10::Error& e) {
      return e.what_without_backtrace();
    }
    return "no error";
  };
  EXPECT_NE(message(q[0], k, k, 0).find("q has shape"), std::string::npos);
  EXPECT_NE(message(q, k.narrow(1, 0, 3), k.narrow(1, 0, 3), 0).find("k has shape"),
            std::string::npos);
  EXPECT_NE(message(q, randn({1, 6, 3, 8}, 1), k, 0).find("k has shape"), std::string::npos);
  EXPECT_NE(message(q, k, k.narrow(1, 0, 5), 0).find("v has shape"), std::string::npos);
  EXPECT_NE(message(q, k, k.to(at::kFloat), 0).find("v is Float"), std::string::npos);
  EXPECT_NE(message(q, k, k, -1).find("window is -1"), std::string::npos);
}

TEST(Attention, CudaMatchesDenseSoftmax) {
  SKIP_WITHOUT_CUDA();
  check(at::kDouble, at::kCUDA, 1e-12);
  check(at::kFloat, at::kCUDA, 5e-6);
  check(at::kBFloat16, at::kCUDA, 5e-3);
}

}  // namespace
}  // namespace sarissa
