#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "sarissa/checkpoint/safetensors.h"
#include "tests/model/models.h"
#include "tests/support/files.h"

namespace sarissa::model {
namespace {

using checkpoint::NamedTensors;
using test::bit_equal;
using test::contents_of;
using test::stirred;
using test::TemporaryFolder;
using test::tiny;

const char* kEverything = "SE MR LI ATT PHX SWA";

void expect_same(const Decoder& got, const Decoder& want) {
  ASSERT_EQ(got.parameters().size(), want.parameters().size());
  for (size_t i = 0; i < want.parameters().size(); ++i) {
    EXPECT_EQ(got.parameters()[i].name, want.parameters()[i].name);
    EXPECT_TRUE(bit_equal(got.parameters()[i].value, want.parameters()[i].value))
        << want.parameters()[i].name;
  }
}

NamedTensors tensors_of(const std::string& path) {
  const checkpoint::SafetensorsFile file(path);
  NamedTensors tensors;
  for (const auto& name : file.names()) tensors.emplace_back(name, file.tensor(name));
  return tensors;
}

TEST(ModelDirectory, LoadOfSaveIsBitEqual) {
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kDouble}) {
    for (const bool tied : {false, true}) {
      ModelConfig config = tiny(kEverything);
      config.tie_embeddings = tied;
      const Decoder decoder = stirred(config, at::kCPU, dtype);
      const TemporaryFolder folder;
      save_model(folder / "new/model", decoder);
      const Decoder loaded = load_model(folder / "new/model", at::kCPU, dtype);
      expect_same(loaded, decoder);
      EXPECT_EQ(loaded.config().pattern, config.pattern);
      const at::Tensor tokens = test::random_tokens(1, 9, 1, config.vocab_size);
      EXPECT_TRUE(bit_equal(loaded.forward(tokens), decoder.forward(tokens)));
    }
  }
}

TEST(ModelDirectory, ShardsOfAnySizeLoadAlike) {
  const Decoder decoder = stirred(tiny(kEverything), at::kCPU, at::kFloat);
  const TemporaryFolder folder;
  for (const int64_t limit : {1, 5000, 20'000}) {
    const std::string directory = folder / std::to_string(limit);
    save_model(directory, decoder, limit);
    EXPECT_FALSE(std::filesystem::exists(directory + "/model.safetensors"));
    const auto index =
        nlohmann::json::parse(contents_of(directory + "/model.safetensors.index.json"));
    EXPECT_EQ(index["weight_map"].size(), decoder.parameters().size());
    EXPECT_EQ(index["metadata"]["total_size"].get<int64_t>(),
              4 * parameter_count(decoder.config()));
    expect_same(load_model(directory, at::kCPU, at::kFloat), decoder);
  }
}

TEST(ModelDirectory, SavingAgainReplacesTheOldForm) {
  const Decoder old_model = stirred(tiny(kEverything), at::kCPU, at::kFloat);
  const Decoder new_model(tiny(kEverything), 99, at::kCPU, at::kFloat);
  const TemporaryFolder folder;
  for (const auto& [first, second] :
       {std::pair{kMaxShardBytes, int64_t{5000}}, {int64_t{5000}, kMaxShardBytes}}) {
    const std::string directory = folder / std::to_string(first);
    save_model(directory, old_model, first);
    save_model(directory, new_model, second);
    expect_same(load_model(directory, at::kCPU, at::kFloat), new_model);
  }
}

TEST(ModelDirectory, LoadingConvertsTheDtype) {
  const Decoder decoder = stirred(tiny(kEverything), at::kCPU, at::kFloat);
  const TemporaryFolder folder;
  save_model(folder / "m", decoder);
  const Decoder low = load_model(folder / "m", at::kCPU, at::kBFloat16);
  for (size_t i = 0; i < decoder.parameters().size(); ++i) {
    const auto& want = decoder.parameters()[i];
    const auto& got = low.parameters()[i];
    EXPECT_EQ(got.value.scalar_type(), want.keep_fp32 ? at::kFloat : at::kBFloat16);
    EXPECT_TRUE(bit_equal(got.value, want.value.to(got.value.scalar_type()))) << want.name;
  }
}

TEST(ModelDirectory, WrongTensorsAreRefused) {
  const Decoder decoder = stirred(tiny(kEverything), at::kCPU, at::kFloat);
  const auto refused = [&](const std::string& part, auto change) {
    const TemporaryFolder folder;
    save_model(folder / "m", decoder);
    auto tensors = tensors_of(folder / "m/model.safetensors");
    change(tensors);
    checkpoint::write_safetensors(folder / "m/model.safetensors", tensors);
    EXPECT_REFUSED(load_model(folder / "m", at::kCPU, at::kFloat), part);
  };
  using Tensors = NamedTensors&;
  refused("tensor 'norm.weight' is missing", [](Tensors t) { t.pop_back(); });
  refused("did you mean 'norm.weight'?", [](Tensors t) { t.back().first = "norm.wieght"; });
  refused("is not part of the model", [](Tensors t) { t.emplace_back("x", at::ones({1})); });
  refused("'norm.weight' is [25], expected [24]",
          [](Tensors t) { t.back().second = at::ones({25}); });
  refused("'norm.weight' is [24, 1]", [](Tensors t) { t.back().second = at::ones({24, 1}); });
  refused("'norm.weight' has dtype Int",
          [](Tensors t) { t.back().second = at::ones({24}, at::kInt); });
}

TEST(ModelDirectory, WrongConfigsAreRefused) {
  const Decoder decoder(tiny("SE"), 1, at::kCPU, at::kFloat);
  const TemporaryFolder folder;
  save_model(folder / "m", decoder);
  const std::string good = contents_of(folder / "m/config.json");
  const auto refused = [&](const std::string& from, const std::string& to,
                           const std::string& part) {
    std::string text = good;
    const size_t at = text.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    text.replace(at, from.size(), to);
    folder.write("m/config.json", text);
    EXPECT_REFUSED(load_model_config(folder / "m"), part);
    EXPECT_REFUSED(load_model_config(folder / "m"), "config.json");
    EXPECT_REFUSED(load_model(folder / "m", at::kCPU, at::kFloat), part);
  };
  refused("\"dim\": 24", "\"dmi\": 24", "did you mean 'dim'?");
  refused("\"dim\": 24", "\"dim\": \"24\"", "expected an integer");
  refused("\"dim\": 24", "\"dim\": 24, \"dim\": 32", "two keys 'dim'");
  refused("\"dim\": 24", "\"dim\": -24", "model.dim = -24");
  refused("\"rope_base\": 100.0", "\"rope_base\": 1e999", "not valid JSON");
  refused("\"rope_base\": 100.0", "\"rope_base\": NaN", "not valid JSON");
  refused("\"norm_eps\": 1e-06", "\"norm_eps\": 0", "model.norm_eps");
  refused("{", "", "not valid JSON");
  folder.write("m/config.json", good);
  EXPECT_NO_THROW(load_model(folder / "m", at::kCPU, at::kFloat));
}

TEST(ModelDirectory, MissingAndDamagedFilesAreRefused) {
  const Decoder decoder(tiny("SE"), 1, at::kCPU, at::kFloat);
  const TemporaryFolder folder;
  EXPECT_REFUSED(load_model(folder / "none", at::kCPU, at::kFloat), "no such folder");
  save_model(folder / "m", decoder);
  const std::string whole = contents_of(folder / "m/model.safetensors");
  folder.write("m/model.safetensors", whole.substr(0, whole.size() - 1));
  EXPECT_REFUSED(load_model(folder / "m", at::kCPU, at::kFloat), "model.safetensors");
  std::filesystem::remove(folder / "m/model.safetensors");
  EXPECT_REFUSED(load_model(folder / "m", at::kCPU, at::kFloat), "model.safetensors");
  std::filesystem::remove(folder / "m/config.json");
  EXPECT_REFUSED(load_model(folder / "m", at::kCPU, at::kFloat), "config.json");
}

TEST(ModelDirectory, HostileIndexesAreRefused) {
  const Decoder decoder(tiny("SE"), 1, at::kCPU, at::kFloat);
  const TemporaryFolder folder;
  save_model(folder / "m", decoder, 1);
  const auto refused = [&](const std::string& text, const std::string& part) {
    folder.write("m/model.safetensors.index.json", text);
    EXPECT_REFUSED(load_model(folder / "m", at::kCPU, at::kFloat), part);
  };
  refused("[]", "expected a JSON object");
  refused("{}", "no weight_map");
  refused(R"({"weight_map": {"a": 1}})", "not a string");
  refused(R"({"weight_map": {"a": "../x.safetensors"}})", "leaves the folder");
  refused(R"({"weight_map": {"a": "/etc/passwd"}})", "leaves the folder");
  refused(R"({"weight_map": {"a": ""}})", "leaves the folder");
  refused(R"({"weight_map": {"a": ".."}})", "leaves the folder");
  refused(R"({"weight_map": {"a": "gone.safetensors"}})", "gone.safetensors");
  refused(R"({"weight_map": {}})", "is missing");
}

}  // namespace
}  // namespace sarissa::model
