#include "sarissa/model/mixers/kv_cache.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <set>

#include "tests/support/compare.h"

namespace sarissa::model {
namespace {

using test::bit_equal;
using test::randn;

TEST(KvCache, HoldsWhatWasAppended) {
  for (const int64_t batch : {1, 3}) {
    const at::Tensor all = randn({batch, 50, 2, 4}, 1);
    at::Tensor cache = at::empty({batch, 0, 2, 4}, all.options());
    int64_t begin = 0;
    for (const int64_t length : {7, 0, 1, 1, 20, 1, 1, 1, 18}) {
      append_steps(cache, all.narrow(1, begin, length));
      begin += length;
      EXPECT_TRUE(bit_equal(cache, all.narrow(1, 0, begin))) << batch << " " << begin;
    }
    EXPECT_EQ(begin, 50);
  }
}

TEST(KvCache, StepsRarelyMoveTheBuffer) {
  for (const int64_t batch : {1, 2}) {
    at::Tensor cache = at::empty({batch, 0, 1, 4});
    std::set<const void*> buffers;
    for (int i = 0; i < 1000; ++i) {
      append_steps(cache, at::full({batch, 1, 1, 4}, i));
      buffers.insert(cache.storage().data());
    }
    EXPECT_LE(buffers.size(), 14u) << batch;
    EXPECT_EQ(cache.select(1, 617)[0][0][0].item<float>(), 617);
  }
}

TEST(KvCache, SlidingWindowMovesRarelyAndStaysSmall) {
  constexpr int64_t kKeep = 31;
  const at::Tensor all = randn({2, 2000, 1, 4}, 2);
  at::Tensor cache = at::empty({2, 0, 1, 4}, all.options());
  append_steps(cache, all.narrow(1, 0, 1000));
  keep_last_steps(cache, kKeep);
  EXPECT_LE(cache.storage().nbytes(), 4 * cache.nbytes() + 4096);
  int moves = 0;
  const void* buffer = nullptr;
  for (int64_t t = 1000; t < 2000; ++t) {
    append_steps(cache, all.narrow(1, t, 1));
    moves += cache.storage().data() != buffer;
    buffer = cache.storage().data();
    keep_last_steps(cache, kKeep);
    ASSERT_TRUE(bit_equal(cache, all.narrow(1, t + 1 - kKeep, kKeep))) << t;
    ASSERT_LE(cache.storage().nbytes(), 4 * cache.nbytes() + 4096);
  }
  EXPECT_LE(moves, 1000 / kKeep + 2);
}

TEST(KvCache, KeepingNoStepsLeavesAnEmptyCache) {
  at::Tensor cache = at::empty({2, 0, 1, 4});
  append_steps(cache, at::ones({2, 3, 1, 4}));
  keep_last_steps(cache, 0);
  EXPECT_EQ(cache.sizes(), (std::vector<int64_t>{2, 0, 1, 4}));
  append_steps(cache, at::ones({2, 1, 1, 4}));
  EXPECT_TRUE(bit_equal(cache, at::ones({2, 1, 1, 4})));
}

TEST(KvCache, CopiedHandlesAreNeverOverwritten) {
  at::Tensor cache = at::empty({1, 0, 1, 2});
  for (int i = 0; i < 3; ++i) append_steps(cache, at::full({1, 1, 1, 2}, i));
  at::Tensor other = cache;
  const at::Tensor view = cache.select(3, 0);
  const at::Tensor before = cache.clone();
  append_steps(cache, at::full({1, 1, 1, 2}, 10));
  append_steps(other, at::full({1, 1, 1, 2}, 20));
  append_steps(cache, at::full({1, 1, 1, 2}, 11));
  append_steps(other, at::full({1, 1, 1, 2}, 21));
  EXPECT_TRUE(bit_equal(view, before.select(3, 0)));
  const auto values = [](const at::Tensor& t) { return t.select(3, 0).flatten(); };
  EXPECT_TRUE(bit_equal(values(cache), at::tensor({0.f, 1.f, 2.f, 10.f, 11.f})));
  EXPECT_TRUE(bit_equal(values(other), at::tensor({0.f, 1.f, 2.f, 20.f, 21.f})));
}

TEST(KvCache, ClonesWithTheStridesOfAnotherBufferAreSafe) {
  // clone() of one row keeps the row's stride, which promises room that the new memory lacks.
  at::Tensor cache = at::empty({1, 0, 1, 2});
  for (int i = 0; i < 5; ++i) append_steps(cache, at::full({1, 1, 1, 2}, i));
  at::Tensor copy = cache.clone();
  for (int i = 5; i < 40; ++i) append_steps(copy, at::full({1, 1, 1, 2}, i));
  EXPECT_TRUE(bit_equal(copy.select(3, 0).flatten(), at::arange(40).to(at::kFloat)));
}

TEST(KvCache, GradientsFlowThroughAppendedAndKeptSteps) {
  at::Tensor first = randn({1, 3, 1, 2}, 3).requires_grad_(true);
  at::Tensor second = randn({1, 2, 1, 2}, 4).requires_grad_(true);
  at::Tensor cache = at::empty({1, 0, 1, 2}, at::kDouble);
  append_steps(cache, first);
  append_steps(cache, second);
  keep_last_steps(cache, 4);
  torch::autograd::backward({cache.sum()}, {});
  EXPECT_EQ(first.grad().sum().item<double>(), 4);  // its last two steps
  EXPECT_EQ(second.grad().sum().item<double>(), 4);
}

}  // namespace
}  // namespace sarissa::model
