#include "sarissa/infer/score.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/matmul.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "sarissa/base/error.h"
#include "sarissa/data/corpus.h"

namespace sarissa::infer {
namespace {

// Logits held at once in fp32: 64 MiB whatever the vocabulary.
constexpr int64_t kLogitElements = int64_t{1} << 24;

at::Tensor to_tensor(const std::vector<int64_t>& tokens, at::Device device) {
  at::Tensor host = at::empty({static_cast<int64_t>(tokens.size())}, at::kLong);
  std::copy(tokens.begin(), tokens.end(), host.data_ptr<int64_t>());
  return host.to(device);
}

// log p(targets[t] | tokens up to t) from hidden states [L, D].
void emit_logprobs(const model::Decoder& decoder, const at::Tensor& hidden_LD,
                   const at::Tensor& targets_L, Score& score, const TakeLogProbs& take) {
  const int64_t length = targets_L.size(0);
  const int64_t rows = std::max<int64_t>(1, kLogitElements / decoder.head().size(0));
  for (int64_t begin = 0; begin < length; begin += rows) {
    const int64_t count = std::min(rows, length - begin);
    const at::Tensor logits_LV =
        at::matmul(hidden_LD.narrow(0, begin, count), decoder.head().t()).to(at::kFloat);
    const at::Tensor picked = at::gather(at::log_softmax(logits_LV, -1), 1,
                                         targets_L.narrow(0, begin, count).unsqueeze(1))
                                  .squeeze(1)
                                  .cpu();
    const float* logprobs = picked.data_ptr<float>();
    for (int64_t t = 0; t < count; ++t) score.sum += logprobs[t];
    score.terms += count;
    if (take) take(logprobs, count);
  }
}

}  // namespace

double Score::mean() const {
  return terms > 0 ? sum / static_cast<double>(terms) : std::numeric_limits<double>::quiet_NaN();
}

Score score_record(const model::Decoder& decoder, const ReadPiece& read,
                   const ScoreOptions& options, const TakeLogProbs& take) {
  SARISSA_CHECK(options.chunk >= 1, "chunk is ", options.chunk, "; it must be at least 1");
  c10::NoGradGuard no_grad;
  Score score;
  model::State state = decoder.initial_state(1);
  // `context` is the last token seen whose successor is not scored yet.
  std::vector<int64_t> context;
  if (options.bos) context.push_back(data::kEndOfDocument);
  while (true) {
    const std::string piece = read(static_cast<size_t>(options.chunk));
    if (piece.empty()) return score;
    score.tokens += static_cast<int64_t>(piece.size());
    // Inputs are the tokens before each target: one position behind the piece.
    std::vector<int64_t> tokens = context;
    for (const char c : piece) tokens.push_back(static_cast<unsigned char>(c));
    context = {tokens.back()};
    const int64_t terms = static_cast<int64_t>(tokens.size()) - 1;
    if (terms == 0) continue;
    const at::Tensor all = to_tensor(tokens, decoder.device());
    const at::Tensor hidden_BLD = decoder.hidden(all.narrow(0, 0, terms).unsqueeze(0), &state);
    emit_logprobs(decoder, hidden_BLD.squeeze(0), all.narrow(0, 1, terms), score, take);
  }
}

ReadPiece read_string(std::string text) {
  struct Cursor {
    std::string text;
    size_t position = 0;
  };
  auto cursor = std::make_shared<Cursor>(Cursor{std::move(text)});
  return [cursor](size_t limit) {
    const size_t count = std::min(limit, cursor->text.size() - cursor->position);
    std::string piece = cursor->text.substr(cursor->position, count);
    cursor->position += count;
    return piece;
  };
}

}  // namespace sarissa::infer
