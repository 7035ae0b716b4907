#include "sarissa/model/decoder.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <cstdlib>

#include "sarissa/checkpoint/safetensors.h"
#include "sarissa/ops/device.h"
#include "sarissa/ops/ops.h"
#include "tests/model/models.h"
#include "tests/support/files.h"

namespace sarissa::model {
namespace {

using test::bit_equal;
using test::forward_in_chunks;
using test::forward_in_steps;
using test::random_tokens;
using test::relative_rms;
using test::stirred;
using test::tiny;
using test::tiny_names;

constexpr double kExact = 1e-12;  // double, another order of operations
constexpr double kFloat = 2e-5;

/// A scalar that depends on every logit.
at::Tensor loss_of(const at::Tensor& logits) {
  return (logits * test::randn(logits.sizes(), 77, logits.options().requires_grad(false))).sum();
}

std::vector<at::Tensor> gradients(Decoder& decoder, const at::Tensor& loss) {
  std::vector<at::Tensor> values;
  for (auto& parameter : decoder.parameters()) values.push_back(parameter.value);
  return torch::autograd::grad({loss}, values);
}

class EachModel : public testing::TestWithParam<std::string> {
 protected:
  ModelConfig config_ = tiny(GetParam());
};

INSTANTIATE_TEST_SUITE_P(Tiny, EachModel, testing::ValuesIn(tiny_names()), [](const auto& info) {
  std::string name = info.param;
  for (char& c : name) c = c == ' ' ? '_' : c;
  return name;
});

TEST_P(EachModel, ParameterCountIsRight) {
  for (const bool change : {false, true}) {
    config_.tie_embeddings = change;
    config_.output_bias = change;
    const Decoder decoder(config_, 1, at::kCPU, at::kFloat);
    int64_t count = 0;
    for (const auto& parameter : decoder.parameters()) count += parameter.value.numel();
    EXPECT_EQ(parameter_count(config_), count);
  }
}

TEST_P(EachModel, StepByStepEqualsForward) {
  const Decoder decoder = stirred(config_);
  const at::Tensor tokens = random_tokens(2, 33, 1, config_.vocab_size);
  EXPECT_LE(relative_rms(forward_in_steps(decoder, tokens), decoder.forward(tokens)), kExact);
  const Decoder single = stirred(config_, at::kCPU, at::kFloat);
  EXPECT_LE(relative_rms(forward_in_steps(single, tokens), single.forward(tokens)), kFloat);
}

TEST_P(EachModel, SplitAnywhereEqualsUnsplit) {
  const Decoder decoder = stirred(config_);
  const at::Tensor tokens = random_tokens(2, 23, 2, config_.vocab_size);
  const at::Tensor whole = decoder.forward(tokens);
  for (int64_t cut = 0; cut <= 23; ++cut) {
    EXPECT_LE(relative_rms(forward_in_chunks(decoder, tokens, {cut}), whole), kExact) << cut;
  }
  EXPECT_LE(relative_rms(forward_in_chunks(decoder, tokens, {1, 1, 3, 10, 17, 18}), whole), kExact);
}

TEST_P(EachModel, LaterTokensDoNotChangeEarlierLogits) {
  const Decoder decoder = stirred(config_);
  const at::Tensor tokens = random_tokens(1, 29, 3, config_.vocab_size);
  const at::Tensor whole = decoder.forward(tokens);
  for (const int64_t length : {1, 2, 5, 6, 7, 13, 28}) {
    const at::Tensor prefix = decoder.forward(tokens.narrow(1, 0, length));
    EXPECT_LE(relative_rms(prefix, whole.narrow(1, 0, length)), kExact) << length;
    at::Tensor other = tokens.clone();
    other.narrow(1, length, 29 - length).fill_(0);
    EXPECT_LE(relative_rms(decoder.forward(other).narrow(1, 0, length), prefix), kExact) << length;
  }
}

TEST_P(EachModel, EarlierTokensMatter) {
  const Decoder decoder = stirred(config_);
  const at::Tensor tokens = random_tokens(1, 8, 3, config_.vocab_size);
  at::Tensor other = tokens.clone();
  other[0][5] = (tokens[0][5] + 1) % config_.vocab_size;
  EXPECT_GT(relative_rms(decoder.forward(other)[0][7], decoder.forward(tokens)[0][7]), 1e-4);
}

TEST_P(EachModel, BatchRowsAreIndependent) {
  const Decoder decoder = stirred(config_);
  const at::Tensor tokens = random_tokens(3, 17, 4, config_.vocab_size);
  const at::Tensor together = decoder.forward(tokens);
  for (int64_t row = 0; row < 3; ++row) {
    EXPECT_LE(relative_rms(decoder.forward(tokens.narrow(0, row, 1)), together.narrow(0, row, 1)),
              kExact);
  }
  at::Tensor other = tokens.clone();
  other[1].fill_(3);
  EXPECT_TRUE(bit_equal(decoder.forward(other).narrow(0, 2, 1), together.narrow(0, 2, 1)));
}

TEST_P(EachModel, SavedStateContinuesBitForBit) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const Decoder decoder = stirred(config_, at::kCPU, dtype);
    const at::Tensor tokens = random_tokens(2, 30, 5, config_.vocab_size);
    State state = decoder.initial_state(2);
    decoder.forward(tokens.narrow(1, 0, 13), &state);

    const test::TemporaryFolder folder;
    checkpoint::write_safetensors(folder / "state", state.pack());
    const checkpoint::SafetensorsFile file(folder / "state");
    std::vector<std::pair<std::string, at::Tensor>> packed;
    for (const auto& name : file.names()) packed.emplace_back(name, file.tensor(name));
    State restored = decoder.initial_state(2);
    restored.unpack(packed);
    EXPECT_EQ(restored.position, 13);
    EXPECT_EQ(restored.bytes(), state.bytes());

    const at::Tensor next = tokens.narrow(1, 13, 17);
    EXPECT_TRUE(bit_equal(decoder.forward(next, &restored), decoder.forward(next, &state)));
  }
}

TEST_P(EachModel, CopiesOfAStateGoTheirOwnWays) {
  const Decoder decoder = stirred(config_);
  const at::Tensor tokens = random_tokens(1, 20, 6, config_.vocab_size);
  const at::Tensor others = random_tokens(1, 10, 7, config_.vocab_size);
  State state = decoder.initial_state(1);
  for (int64_t t = 0; t < 10; ++t) decoder.forward(tokens.narrow(1, t, 1), &state);
  const auto continue_with = [&](State& from, const at::Tensor& next) {
    std::vector<at::Tensor> logits;
    for (int64_t t = 0; t < 10; ++t) logits.push_back(decoder.forward(next.narrow(1, t, 1), &from));
    return at::cat(logits, 1);
  };
  State deep = state.clone();
  State shallow = state;
  State untouched = state.clone();
  const at::Tensor next = tokens.narrow(1, 10, 10);
  const at::Tensor a = continue_with(deep, others);
  const at::Tensor b = continue_with(shallow, others);
  const at::Tensor want = continue_with(untouched, next);
  EXPECT_TRUE(bit_equal(a, b));
  EXPECT_TRUE(bit_equal(continue_with(state, next), want));
}

TEST_P(EachModel, GradientsEqualFiniteDifferences) {
  Decoder decoder = stirred(config_);
  const at::Tensor tokens = random_tokens(2, 11, 8, config_.vocab_size);
  const auto loss = [&] { return loss_of(decoder.forward(tokens)); };
  decoder.requires_grad(true);
  const auto from_autograd = gradients(decoder, loss());
  decoder.requires_grad(false);
  constexpr double kStep = 1e-5;
  for (size_t i = 0; i < from_autograd.size(); ++i) {
    const at::Tensor value = decoder.parameters()[i].value.flatten();  // shares memory
    const at::Tensor gradient = from_autograd[i].flatten();
    const double scale = gradient.abs().max().item<double>();
    EXPECT_GT(scale, 0) << decoder.parameters()[i].name << " has no gradient";
    auto* p = value.mutable_data_ptr<double>();
    for (int64_t k = static_cast<int64_t>(i) % 3; k < value.numel(); k += value.numel() / 4 + 1) {
      const double x = p[k];
      p[k] = x + kStep;
      const double up = loss().item<double>();
      p[k] = x - kStep;
      const double down = loss().item<double>();
      p[k] = x;
      EXPECT_NEAR((up - down) / (2 * kStep), gradient[k].item<double>(), 1e-6 * scale + 1e-7)
          << decoder.parameters()[i].name << "[" << k << "]";
    }
  }
}

TEST_P(EachModel, GradientsFlowThroughStates) {
  Decoder decoder = stirred(config_);
  decoder.requires_grad(true);
  const at::Tensor tokens = random_tokens(2, 19, 9, config_.vocab_size);
  const auto whole = gradients(decoder, loss_of(decoder.forward(tokens)));
  for (const auto& cuts : {std::vector<int64_t>{8}, std::vector<int64_t>{1, 2, 12}}) {
    const auto split = gradients(decoder, loss_of(forward_in_chunks(decoder, tokens, cuts)));
    for (size_t i = 0; i < whole.size(); ++i) {
      EXPECT_LE(relative_rms(split[i], whole[i]), 1e-11) << decoder.parameters()[i].name;
    }
  }
}

/// Two or more parts of a sequence in one process: keeps the states that cross the cuts.
class PartsInOrder final : public SequenceContext {
 public:
  explicit PartsInOrder(size_t blocks) : crossing_(blocks) {}
  void start_part(int64_t offset) { offset_ = offset; }

  bool split() const override { return true; }
  int64_t offset() const override { return offset_; }
  void receive(int64_t block, LayerState& state) override {
    if (offset_ > 0) state = crossing_.at(block);
  }
  void send(int64_t block, const LayerState& state) override { crossing_.at(block) = state; }

 private:
  int64_t offset_ = 0;
  std::vector<LayerState> crossing_;
};

TEST_P(EachModel, PartsLinkedByASequenceContextEqualTheWhole) {
  Decoder decoder = stirred(config_);
  decoder.requires_grad(true);
  const at::Tensor tokens = random_tokens(2, 21, 10, config_.vocab_size);
  const at::Tensor whole = decoder.forward(tokens);
  PartsInOrder context(config_.layers().size());
  std::vector<at::Tensor> parts;
  for (const auto& [begin, length] : {std::pair{0, 9}, {9, 5}, {14, 7}}) {
    context.start_part(begin);
    parts.push_back(decoder.forward(tokens.narrow(1, begin, length), nullptr, context));
  }
  const at::Tensor joined = at::cat(parts, 1);
  EXPECT_LE(relative_rms(joined, whole), kExact);
  const auto want = gradients(decoder, loss_of(whole));
  const auto got = gradients(decoder, loss_of(joined));
  for (size_t i = 0; i < want.size(); ++i) EXPECT_LE(relative_rms(got[i], want[i]), 1e-11);
}

TEST_P(EachModel, Bfloat16IsCloseToFloat32) {
  // The same rounded parameters, so that only the arithmetic differs.
  const Decoder low = stirred(config_, at::kCPU, at::kBFloat16);
  Decoder high(config_, 1, at::kCPU, at::kDouble);
  for (size_t i = 0; i < low.parameters().size(); ++i) {
    high.parameters()[i].value.copy_(low.parameters()[i].value);
  }
  const at::Tensor tokens = random_tokens(2, 40, 11, config_.vocab_size);
  const at::Tensor logits = low.forward(tokens);
  EXPECT_EQ(logits.scalar_type(), at::kBFloat16);
  EXPECT_LE(relative_rms(logits, high.forward(tokens)), 0.04);
  EXPECT_LE(relative_rms(forward_in_steps(low, tokens), high.forward(tokens)), 0.04);
}

/// Logits and gradients of a forward and backward pass.
std::vector<at::Tensor> one_pass(Decoder& decoder, const at::Tensor& tokens) {
  const at::Tensor logits = decoder.forward(tokens);
  auto results = gradients(decoder, loss_of(logits));
  results.push_back(logits.detach());
  return results;
}

TEST_P(EachModel, RunsAgreeBitForBit) {
  Decoder decoder = stirred(config_, at::kCPU, at::kFloat);
  decoder.requires_grad(true);
  const at::Tensor tokens = random_tokens(4, 64, 12, config_.vocab_size);
  const auto first = one_pass(decoder, tokens), again = one_pass(decoder, tokens);
  for (size_t i = 0; i < first.size(); ++i) EXPECT_TRUE(bit_equal(first[i], again[i])) << i;
}

// The operators sum in an order of their own; matrix products do so for any number of threads only
// in this mode of MKL, which it reads at its first call.
const bool kReproducibleProducts = ::setenv("MKL_CBWR", "AUTO,STRICT", 1) == 0;

TEST(Decoder, ThreadCountsAgreeBitForBit) {
  ASSERT_TRUE(kReproducibleProducts);
  ModelConfig config = tiny("SE MR LI ATT PHX SWA");
  config.dim = 96;  // wide and long enough that every operator is split between the threads
  config.mlp_dim = 128;
  Decoder decoder = stirred(config, at::kCPU, at::kFloat);
  decoder.requires_grad(true);
  const at::Tensor tokens = random_tokens(4, 300, 12, config.vocab_size);
  const auto one = one_pass(decoder, tokens);
  at::set_num_threads(2);
  const auto two = one_pass(decoder, tokens);
  at::set_num_threads(3);
  const auto three = one_pass(decoder, tokens);
  at::set_num_threads(1);
  for (size_t i = 0; i < one.size(); ++i) {
    EXPECT_TRUE(bit_equal(one[i], two[i])) << i;
    EXPECT_TRUE(bit_equal(one[i], three[i])) << i;
  }
}

TEST_P(EachModel, UnwrittenMemoryDoesNotShow) {
  const test::PoisonMemory poison;
  Decoder decoder = stirred(config_);
  decoder.requires_grad(true);
  const at::Tensor tokens = random_tokens(2, 31, 13, config_.vocab_size);
  const at::Tensor logits = forward_in_chunks(decoder, tokens, {7, 8});
  EXPECT_TRUE(at::isfinite(logits).all().item<bool>());
  for (const auto& gradient : gradients(decoder, loss_of(logits))) {
    EXPECT_TRUE(at::isfinite(gradient).all().item<bool>());
  }
}

TEST_P(EachModel, StateStaysAsSmallAsItShould) {
  const Decoder decoder = stirred(config_, at::kCPU, at::kFloat);
  const auto bytes_after = [&](int64_t length) {
    State state = decoder.initial_state(2);
    decoder.forward(random_tokens(2, length, 14, config_.vocab_size), &state);
    EXPECT_EQ(state.position, length);
    return state.bytes();
  };
  int64_t attention_layers = 0;
  for (const auto kind : config_.layers()) attention_layers += kind == MixerKind::kAttention;
  const int64_t row = 2 * config_.kv_heads * (config_.dim / config_.heads) * 4;  // keys and values
  EXPECT_EQ(bytes_after(50) - bytes_after(20), attention_layers * 2 * 30 * row);
}

TEST_P(EachModel, EmptyInputsBehave) {
  const Decoder decoder = stirred(config_);
  EXPECT_EQ(decoder.forward(at::empty({2, 0}, at::kLong)).sizes(),
            (std::vector<int64_t>{2, 0, config_.vocab_size}));
  State state = decoder.initial_state(0);
  EXPECT_EQ(decoder.forward(at::empty({0, 5}, at::kLong), &state).sizes(),
            (std::vector<int64_t>{0, 5, config_.vocab_size}));
}

TEST(Decoder, RefusesWhatDoesNotFit) {
  const ModelConfig config = tiny("SE MR LI ATT PHX SWA");
  const Decoder decoder(config, 1, at::kCPU, at::kFloat);
  EXPECT_REFUSED(decoder.forward(at::zeros({2, 3})), "tokens are Float [2, 3]");
  EXPECT_REFUSED(decoder.forward(at::zeros({3}, at::kLong)), "tokens are Long [3]");
  State state = decoder.initial_state(2);
  EXPECT_REFUSED(decoder.forward(at::zeros({3, 1}, at::kLong), &state), "of 2 sequences");
  State empty;
  EXPECT_REFUSED(decoder.forward(at::zeros({2, 1}, at::kLong), &empty), "0 layers");
  state.position = 4;
  EXPECT_REFUSED(decoder.forward(at::zeros({2, 1}, at::kLong), &state), "block 3");
  EXPECT_REFUSED(Decoder(config, 1, at::kCPU, at::kHalf), "Half");
  ModelConfig bad = config;
  bad.heads = 5;
  EXPECT_REFUSED(Decoder(bad, 1, at::kCPU, at::kFloat), "model.heads = 5");
}

TEST(Decoder, UnpackRefusesStatesOfOtherModels) {
  const Decoder decoder(tiny("SE MR LI ATT PHX SWA"), 1, at::kCPU, at::kFloat);
  const auto refused = [&](const std::string& part, auto change) {
    auto packed = decoder.initial_state(2).pack();
    change(packed);
    State state = decoder.initial_state(2);
    EXPECT_REFUSED(state.unpack(packed), part);
  };
  using Packed = std::vector<std::pair<std::string, at::Tensor>>&;
  refused("'position' is missing", [](Packed p) { p.erase(p.begin()); });
  refused("'layers.5.values' is missing", [](Packed p) { p.pop_back(); });
  refused("'layers.6.keys'", [](Packed p) { p.emplace_back("layers.6.keys", at::ones({1})); });
  refused("same name", [](Packed p) { p.push_back(p.back()); });
  refused("'layers.0.featurizer' is", [](Packed p) { p[1].second = at::ones({2, 2}); });
  refused("'layers.0.featurizer' is", [](Packed p) { p[1].second = p[1].second.to(at::kDouble); });
  refused("negative", [](Packed p) { p[0].second = at::scalar_tensor(-1, at::kLong); });
  refused("'position' is not", [](Packed p) { p[0].second = at::ones({1}); });
}

std::map<std::string, at::Tensor> values_of(const Decoder& decoder) {
  std::map<std::string, at::Tensor> values;
  for (const auto& p : decoder.parameters()) values.emplace(p.name, p.value);
  EXPECT_EQ(values.size(), decoder.parameters().size()) << "two parameters have the same name";
  return values;
}

TEST(Initialisation, DependsOnSeedAndNameAlone) {
  ModelConfig config = tiny("SE MR LI ATT PHX SWA");
  const Decoder decoder(config, 7, at::kCPU, at::kFloat);
  at::set_num_threads(2);
  const auto again = values_of(Decoder(config, 7, at::kCPU, at::kFloat));
  at::set_num_threads(1);
  const auto other = values_of(Decoder(config, 8, at::kCPU, at::kFloat));
  const auto low = values_of(Decoder(config, 7, at::kCPU, at::kBFloat16));
  config.pattern += " SE";
  const auto longer = values_of(Decoder(config, 7, at::kCPU, at::kFloat));
  for (const auto& p : decoder.parameters()) {
    EXPECT_TRUE(bit_equal(p.value, again.at(p.name))) << p.name;
    const bool constant = (p.value == p.value.flatten()[0]).all().item<bool>();
    EXPECT_TRUE(constant || p.name.ends_with("in_proj.bias") ||
                !bit_equal(p.value, other.at(p.name)))
        << p.name;
    EXPECT_TRUE(bit_equal(p.value.to(low.at(p.name).scalar_type()), low.at(p.name))) << p.name;
    EXPECT_EQ(low.at(p.name).scalar_type(), p.keep_fp32 ? at::kFloat : at::kBFloat16) << p.name;
    // wang_init divides by the number of blocks, so only its scale changes.
    const bool scaled = p.name.ends_with("out_proj.weight") || p.name.ends_with("down.weight");
    const at::Tensor want = scaled ? p.value * 6.0 / 7.0 : p.value;
    EXPECT_LE(relative_rms(longer.at(p.name), want), 1e-6) << p.name;
  }
}

TEST(Initialisation, HasThePapersScales) {
  ModelConfig config;
  config.pattern = "SE MR LI PHX";
  config.dim = 256;
  config.tie_embeddings = false;
  const auto values = values_of(Decoder(config, 3, at::kCPU, at::kFloat));
  const auto deviation = [&](const std::string& name) {
    return values.at(name).std().item<double>();
  };
  const double small = std::sqrt(2.0 / (5 * 256)), wang = 2.0 / (4 * std::sqrt(256.0));
  EXPECT_NEAR(deviation("embedding.weight") / small, 1, 0.02);
  EXPECT_NEAR(deviation("head.weight") / small, 1, 0.02);
  EXPECT_NEAR(deviation("blocks.0.mixer.in_proj.weight") / small, 1, 0.02);
  EXPECT_NEAR(deviation("blocks.0.mlp.gate_up.weight") / small, 1, 0.02);
  EXPECT_NEAR(deviation("blocks.0.mixer.out_proj.weight") / wang, 1, 0.02);
  EXPECT_NEAR(deviation("blocks.0.mlp.down.weight") / wang, 1, 0.02);
  EXPECT_NEAR(deviation("blocks.0.mixer.featurizer") / (1.0 / 3), 1, 0.05);  // U(-b, b): b / sqrt 3
  EXPECT_LE(values.at("blocks.0.mixer.taps").abs().max().item<double>(), std::sqrt(1.0 / 3));
  EXPECT_NEAR(deviation("blocks.1.mixer.taps") / (1e-5 / std::sqrt(8192.0)), 1, 0.1);
  const at::Tensor rate = at::exp(values.at("blocks.2.mixer.log_rate"));
  EXPECT_GE(rate.min().item<double>(), 0.01 / std::exp(1.0) - 1e-6);
  EXPECT_LE(rate.max().item<double>(), 0.1 / std::exp(1.0) + 1e-6);
  EXPECT_NEAR(deviation("blocks.2.mixer.residues") / 0.025, 1, 0.05);
  // Phalanx: memories 1 / (1 - sigmoid(bias)) from 2 steps to twice the window of 16.
  const at::Tensor bias = values.at("blocks.3.mixer.in_proj.bias");
  const at::Tensor memory = 1 / (1 - at::sigmoid(bias.narrow(0, 0, 16)));
  EXPECT_NEAR(memory[0].item<double>(), 2, 1e-4);
  EXPECT_NEAR(memory[15].item<double>(), 32, 1e-2);
  EXPECT_TRUE((bias.narrow(0, 16, bias.size(0) - 16) == 0).all().item<bool>());
  EXPECT_TRUE((values.at("norm.weight") == 1).all().item<bool>());
}

TEST(Initialisation, MrDecayIsThePapersTable) {
  // A model that differs only in having the decay multiplied into the taps computes the same.
  ModelConfig with = tiny("MR");
  ModelConfig without = with;
  without.mr_decay = "none";
  const Decoder decayed = stirred(with);
  Decoder plain = stirred(without);
  for (auto& p : plain.parameters()) {
    if (!p.name.ends_with("mixer.taps")) continue;
    for (int64_t g = 0; g < with.mr_groups; ++g) {
      // normal: a from 10^-1 to 10^2, tau from 0 to 1 over 20 steps.
      const double a = std::pow(10.0, -1 + 3.0 * static_cast<double>(g) / 5);
      for (int64_t k = 0; k < with.mr_taps; ++k) {
        p.value[g][k] *= std::exp(-a * static_cast<double>(k) / 19);
      }
    }
  }
  const at::Tensor tokens = random_tokens(1, 25, 15, with.vocab_size);
  EXPECT_LE(relative_rms(plain.forward(tokens), decayed.forward(tokens)), 1e-12);
}

TEST(Initialisation, MatricesDecayAndNothingElse) {
  const Decoder decoder(tiny("SE MR LI ATT PHX SWA"), 1, at::kCPU, at::kFloat);
  for (const auto& p : decoder.parameters()) {
    const bool matrix = p.name == "embedding.weight" || p.name.ends_with("proj.weight") ||
                        p.name.ends_with("gate_up.weight") || p.name.ends_with("down.weight");
    EXPECT_EQ(p.decay, matrix) << p.name;
    EXPECT_EQ(p.keep_fp32, p.name.ends_with("log_rate") || p.name.ends_with("residues")) << p.name;
  }
}

TEST(Initialisation, FreshModelsPredictAlmostUniformly) {
  for (const char* name : {"sh2-1m", "phalanx-1m", "swa-1m", "transformer-1m"}) {
    const ModelConfig config = preset(name);
    const Decoder decoder(config, 1, at::kCPU, at::kFloat);
    const at::Tensor tokens = random_tokens(2, 65, 16, 256);
    const at::Tensor logits = decoder.forward(tokens.narrow(1, 0, 64));
    const double loss = ops::cross_entropy(logits.flatten(0, 1), tokens.narrow(1, 1, 64).flatten())
                            .mean()
                            .item<double>();
    EXPECT_NEAR(loss, std::log(512.0), 0.5) << name;
  }
}

// The same on a GPU.

class EachModelCuda : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { SKIP_WITHOUT_CUDA(); }
  ModelConfig config_ = tiny(GetParam());
};

INSTANTIATE_TEST_SUITE_P(Tiny, EachModelCuda, testing::ValuesIn(tiny_names()),
                         [](const auto& info) {
                           std::string name = info.param;
                           for (char& c : name) c = c == ' ' ? '_' : c;
                           return name;
                         });

TEST_P(EachModelCuda, LogitsAndGradientsEqualTheCpus) {
  Decoder cpu = stirred(config_);
  cpu.requires_grad(true);
  const at::Tensor tokens = random_tokens(2, 45, 1, config_.vocab_size);
  const at::Tensor want = cpu.forward(tokens);
  const auto want_gradients = gradients(cpu, loss_of(want));
  for (const auto& [dtype, tolerance] :
       {std::pair{at::kDouble, 1e-10}, {at::kFloat, 1e-4}, {at::kBFloat16, 0.05}}) {
    Decoder gpu = stirred(config_, at::kCUDA, dtype);
    gpu.requires_grad(true);
    const at::Tensor got = gpu.forward(tokens.to(at::kCUDA));
    EXPECT_LE(relative_rms(got, want), tolerance) << dtype;
    if (dtype == at::kBFloat16) continue;  // tiny widths: single gradients are mostly rounding
    const auto got_gradients = gradients(gpu, loss_of(got));
    for (size_t i = 0; i < got_gradients.size(); ++i) {
      EXPECT_LE(relative_rms(got_gradients[i], want_gradients[i]), 10 * tolerance)
          << cpu.parameters()[i].name << " " << dtype;
    }
  }
}

TEST_P(EachModelCuda, SplitsAndStepsEqualForward) {
  const Decoder decoder = stirred(config_, at::kCUDA, at::kFloat);
  const at::Tensor tokens = random_tokens(2, 37, 2, config_.vocab_size).to(at::kCUDA);
  const at::Tensor whole = decoder.forward(tokens);
  EXPECT_LE(relative_rms(forward_in_steps(decoder, tokens), whole), 1e-4);
  for (const int64_t cut : {1, 5, 6, 17, 36}) {
    EXPECT_LE(relative_rms(forward_in_chunks(decoder, tokens, {cut}), whole), 1e-4) << cut;
  }
}

TEST_P(EachModelCuda, RunsAgreeBitForBit) {
  Decoder decoder = stirred(config_, at::kCUDA, at::kBFloat16);
  decoder.requires_grad(true);
  const at::Tensor tokens = random_tokens(4, 128, 3, config_.vocab_size).to(at::kCUDA);
  const auto first = one_pass(decoder, tokens), again = one_pass(decoder, tokens);
  for (size_t i = 0; i < first.size(); ++i) EXPECT_TRUE(bit_equal(first[i], again[i])) << i;
}

TEST(DecoderCuda, ParametersEqualTheCpus) {
  SKIP_WITHOUT_CUDA();
  const ModelConfig config = tiny("SE MR LI ATT PHX SWA");
  const auto cpu = values_of(Decoder(config, 5, at::kCPU, at::kBFloat16));
  const Decoder gpu(config, 5, at::kCUDA, at::kBFloat16);
  for (const auto& p : gpu.parameters()) {
    EXPECT_TRUE(bit_equal(p.value, cpu.at(p.name))) << p.name;
  }
}

TEST(DecoderCuda, StateMovesBetweenDevices) {
  SKIP_WITHOUT_CUDA();
  const ModelConfig config = tiny("SE MR LI ATT PHX SWA");
  const Decoder gpu = stirred(config, at::kCUDA, at::kFloat);
  const Decoder cpu = stirred(config, at::kCPU, at::kFloat);
  const at::Tensor tokens = random_tokens(1, 20, 4, config.vocab_size);
  State state = gpu.initial_state(1);
  gpu.forward(tokens.narrow(1, 0, 11).to(at::kCUDA), &state);
  State moved = cpu.initial_state(1);
  moved.unpack(state.pack());
  const at::Tensor got = cpu.forward(tokens.narrow(1, 11, 9), &moved);
  EXPECT_LE(relative_rms(got, cpu.forward(tokens).narrow(1, 11, 9)), 1e-4);
}

}  // namespace
}  // namespace sarissa::model
