#include "sarissa/train/evaluate.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "sarissa/data/corpus.h"
#include "tests/train/tiny_run.h"

namespace sarissa::train {
namespace {

class Evaluate : public ::testing::Test {
 protected:
  static model::Decoder decoder() {
    model::Decoder result(test::TinyRun().config("x").model, 3, at::kCPU, at::kFloat);
    result.requires_grad(false);
    return result;
  }
  std::shared_ptr<const data::Corpus> open(const std::string& path) const {
    return data::open_corpus(path, data::DataConfig{});
  }

  // The same by the definition: each window alone, logits and log-softmax in double.
  static EvalResult by_definition(const model::Decoder& model, const data::Corpus& corpus,
                                  int64_t context, int64_t windows) {
    double sum = 0, count = 0;
    for (int64_t window = 0; window < windows; ++window) {
      const int64_t begin = window * context;
      const int64_t length = std::min(context + 1, corpus.size() - begin);
      std::vector<int32_t> tokens(length);
      std::vector<uint8_t> mask(length);
      corpus.read(begin, length, tokens.data(), mask.data());
      const at::Tensor row = at::from_blob(tokens.data(), {1, length}, at::kInt).to(at::kLong);
      const at::Tensor log_probs =
          model.forward(row.narrow(1, 0, length - 1)).to(at::kDouble).log_softmax(-1);
      for (int64_t t = 1; t < length; ++t) {
        if (mask[t] == 0) continue;
        sum -= log_probs[0][t - 1][tokens[t]].item<double>();
        ++count;
      }
    }
    return {sum / count, sum / count / std::log(2.0), std::exp(sum / count), std::llround(count)};
  }

  test::TemporaryFolder folder_;
};

TEST_F(Evaluate, ScoresEveryTokenAfterTheFirstOfAWindow) {
  const std::string text = test::contents_of(test::TinyRun().corpus()).substr(0, 200);
  const auto corpus = open(folder_.write("text.txt", text));
  const model::Decoder model = decoder();
  // 199 tokens to score: six windows of 30 and one of 19.
  const EvalResult want = by_definition(model, *corpus, 30, 7);
  ASSERT_EQ(want.tokens, 199);
  for (const int64_t batch : {1, 2, 7, 64}) {
    const EvalResult got = evaluate(model, corpus, 30, batch, 0);
    EXPECT_EQ(got.tokens, 199) << batch;
    EXPECT_NEAR(got.loss, want.loss, 1e-5) << batch;
    EXPECT_NEAR(got.bits_per_byte, want.bits_per_byte, 1e-5) << batch;
    EXPECT_NEAR(got.perplexity, want.perplexity, 1e-2) << batch;
  }
}

TEST_F(Evaluate, StopsAfterTheWindowsThatHoldMaxTokens) {
  const std::string text = test::contents_of(test::TinyRun().corpus()).substr(0, 200);
  const auto corpus = open(folder_.write("text.txt", text));
  const model::Decoder model = decoder();
  EXPECT_EQ(evaluate(model, corpus, 30, 4, 60).tokens, 60);
  EXPECT_EQ(evaluate(model, corpus, 30, 4, 61).tokens, 90);
  EXPECT_NEAR(evaluate(model, corpus, 30, 4, 60).loss, by_definition(model, *corpus, 30, 2).loss,
              1e-5);
}

TEST_F(Evaluate, LeavesMaskedTokensOut) {
  const auto corpus = open(folder_.write("dna.fasta", ">a\nACGTNNNNACGTACGTTTGANNACGT\n"));
  const model::Decoder model = decoder();
  const EvalResult got = evaluate(model, corpus, 7, 2, 0);
  const EvalResult want = by_definition(model, *corpus, 7, (corpus->size() - 1 + 6) / 7);
  EXPECT_EQ(got.tokens, want.tokens);
  EXPECT_LT(got.tokens, corpus->size() - 6);
  EXPECT_NEAR(got.loss, want.loss, 1e-5);
}

TEST_F(Evaluate, RefusesDataWithNothingToScore) {
  const auto corpus = open(folder_.write("dna.fasta", ">a\nNNNNNNNNNNNN\n"));
  EXPECT_ANY_THROW(evaluate(decoder(), data::slice(corpus, 2, 8), 4, 2, 0));
}

}  // namespace
}  // namespace sarissa::train
