#include "sarissa/train/config.h"

#include <gtest/gtest.h>

#include "tests/support/files.h"

namespace sarissa::train {
namespace {

using test::TemporaryFolder;

constexpr const char* kSmall = R"(
[model]
pattern = "SE ATT"
dim = 32
heads = 2
[data]
train = "corpus.txt"
[train]
steps = 12
batch = 8
[optim]
lr = 0.002
)";

class Config : public ::testing::Test {
 protected:
  RunConfig load(const std::string& text, const std::vector<std::string>& overrides = {}) {
    return load_run_config(folder_.write("run.toml", text), overrides);
  }
  TemporaryFolder folder_;
};

TEST_F(Config, ReadsValuesAndKeepsDefaults) {
  const RunConfig config = load(kSmall);
  EXPECT_EQ(config.model.pattern, "SE ATT");
  EXPECT_EQ(config.model.dim, 32);
  EXPECT_EQ(config.train.steps, 12);
  EXPECT_EQ(config.optim.lr, 0.002);
  EXPECT_EQ(config.optim.beta2, OptimConfig{}.beta2);
}

TEST_F(Config, OverridesWin) {
  const RunConfig config = load(kSmall, {"optim.lr=3e-4", "model.dim=64", "log.tensorboard=false",
                                         "eval.sample_prompt=a=b.c"});
  EXPECT_EQ(config.optim.lr, 3e-4);
  EXPECT_EQ(config.model.dim, 64);
  EXPECT_FALSE(config.log.tensorboard);
  EXPECT_EQ(config.eval.sample_prompt, "a=b.c");
}

TEST_F(Config, EveryKeyCanBeOverriddenWithItsOwnValue) {
  const RunConfig config = load(kSmall);
  std::vector<std::string> overrides;
  std::string section;
  std::istringstream lines(to_toml(config));
  for (std::string line; std::getline(lines, line);) {
    if (line.empty()) continue;
    if (line[0] == '[') {
      section = line.substr(1, line.size() - 2);
      continue;
    }
    std::string value = line.substr(line.find(" = ") + 3);
    // Text is taken without quotes on the command line; the newline of sample_prompt is escaped.
    if (value[0] == '"') value = value == "\"\\n\"" ? "\n" : value.substr(1, value.size() - 2);
    overrides.push_back(section + "." + line.substr(0, line.find(" = ")) + "=" + value);
  }
  EXPECT_GT(overrides.size(), 50u);
  EXPECT_EQ(to_toml(load(kSmall, overrides)), to_toml(config));
}

TEST_F(Config, TomlReadsBackToTheSameValues) {
  RunConfig config = load(kSmall);
  config.optim.lr = 0.1 + 0.2;  // needs 17 digits
  config.eval.sample_prompt = "\"quoted\"\n\t\\";
  const RunConfig again = load(to_toml(config));
  EXPECT_TRUE(differences(config, again).empty());
  EXPECT_EQ(to_toml(again), to_toml(config));
}

TEST_F(Config, PresetIsTheStartAndOtherKeysChangeIt) {
  const std::string name = model::preset_names().front();
  const RunConfig config =
      load("[model]\nnorm_eps = 0.001\npreset = \"" + name + "\"\n[data]\ntrain = \"x.txt\"\n");
  model::ModelConfig want = model::preset(name);
  EXPECT_EQ(config.model.pattern, want.pattern);
  EXPECT_EQ(config.model.dim, want.dim);
  EXPECT_EQ(config.model.norm_eps, 0.001);
}

TEST_F(Config, PresetCanBeOverridden) {
  const std::string name = model::preset_names().back();
  const RunConfig config =
      load("[model]\npreset = \"" + model::preset_names().front() + "\"\n[data]\ntrain = \"x\"\n",
           {"model.preset=" + name});
  EXPECT_EQ(config.model.dim, model::preset(name).dim);
  EXPECT_EQ(config.model.pattern, model::preset(name).pattern);
}

TEST_F(Config, UnknownNamesAreErrorsWithLineAndNearestName) {
  EXPECT_REFUSED(load("[optim]\nlr = 0.1\nweight_decai = 0.1\n"), "run.toml:3");
  EXPECT_REFUSED(load("[optim]\nweight_decai = 0.1\n"), "did you mean 'weight_decay'?");
  EXPECT_REFUSED(load("[optimm]\nlr = 0.1\n"), "did you mean 'optim'?");
  EXPECT_REFUSED(load("[optimm]\nlr = 0.1\n"), "run.toml:1");
  EXPECT_REFUSED(load("lr = 0.1\n"), "before the first section");
  EXPECT_REFUSED(load(kSmall, {"optim.lrr=1"}), "did you mean 'lr'?");
  EXPECT_REFUSED(load(kSmall, {"trian.steps=1"}), "did you mean 'train'?");
  EXPECT_REFUSED(load(kSmall, {"steps=1"}), "--section.key=value");
  EXPECT_REFUSED(load(kSmall, {"model.preset=quickstrat"}), "quickst");
}

TEST_F(Config, WrongTypesAreErrors) {
  EXPECT_REFUSED(load("[train]\nsteps = \"ten\"\n"), "run.toml:2");
  EXPECT_REFUSED(load("[train]\nsteps = 1.5\n"), "integer");
  EXPECT_REFUSED(load(kSmall, {"train.steps=ten"}), "train.steps=ten");
  EXPECT_REFUSED(load(kSmall, {"optim.lr=nan"}), "optim.lr=nan");
}

TEST_F(Config, ImpossibleValuesNameTheKeyTheValueAndTheFix) {
  const auto refuse = [&](const std::string& override, const std::string& part) {
    EXPECT_REFUSED(load(kSmall, {override}), part);
    EXPECT_REFUSED(load(kSmall, {override}), override.substr(0, override.find('=')));
  };
  refuse("train.micro_batch=3", "must divide train.batch (8)");
  refuse("train.steps=0", "must be at least 1");
  refuse("train.context=0", "must be at least 1");
  refuse("train.dtype=float16", "expected one of auto, float32, bfloat16");
  refuse("train.device=gpu", "expected auto, cpu, cuda or cuda:N");
  refuse("optim.lr=0", "must be above 0");
  refuse("optim.lr=-1", "must be above 0");
  refuse("optim.schedule=cosin", "did you mean 'cosine'?");
  refuse("optim.beta2=1", "[0, 1)");
  refuse("optim.clip=-1", "at least 0");
  refuse("eval.batch=0", "must be at least 1");
  refuse("log.every=0", "must be at least 1");
  refuse("data.validation_fraction=0.99", "leaves nothing to train on");
  refuse("data.train=", "name the file");
  EXPECT_REFUSED(load(kSmall, {"model.dim=33"}), "33");
}

TEST_F(Config, MissingFileIsNamed) {
  EXPECT_REFUSED(load_run_config(folder_ / "none.toml", {}), "none.toml");
}

TEST_F(Config, DifferencesNameKeyAndValues) {
  const auto found = differences(load(kSmall), load(kSmall, {"model.dim=64", "optim.lr=1e-4"}));
  ASSERT_EQ(found.size(), 2u);
  EXPECT_EQ(found[0].key, "model.dim");
  EXPECT_EQ(found[0].a, "32");
  EXPECT_EQ(found[0].b, "64");
  EXPECT_EQ(found[1].key, "optim.lr");
}

TEST(ParseOverrides, TakesBothSpellings) {
  const auto got = parse_overrides({"--optim.lr=1", "--train.steps", "5"}, {});
  EXPECT_EQ(got, (std::vector<std::string>{"optim.lr=1", "train.steps=5"}));
}

TEST(ParseOverrides, RefusesOthers) {
  EXPECT_REFUSED(parse_overrides({"--resum"}, {"--resume"}), "did you mean '--resume'?");
  EXPECT_REFUSED(parse_overrides({"other.toml"}, {}), "unexpected argument 'other.toml'");
  EXPECT_REFUSED(parse_overrides({"--train.steps"}, {}), "the value is missing");
}

TEST(ConfigHelp, NamesEverySection) {
  for (const char* key : {"--model.pattern", "--data.train", "--train.steps", "--optim.lr",
                          "--eval.every", "--log.tensorboard", "--model.preset"}) {
    EXPECT_NE(config_help().find(key), std::string::npos) << key;
  }
}

}  // namespace
}  // namespace sarissa::train
