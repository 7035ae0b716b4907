// The training loop: learning, accumulation, resuming, stopping.
#include "sarissa/train/trainer.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <chrono>
#include <cmath>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <thread>

#include "sarissa/model/decoder.h"
#include "sarissa/ops/device.h"
#include "sarissa/train/interrupt.h"
#include "sarissa/train/run_directory.h"
#include "tests/support/compare.h"
#include "tests/train/tiny_run.h"

namespace sarissa::train {
namespace {

namespace fs = std::filesystem;
using test::TinyRun;

std::vector<nlohmann::json> records(const std::string& run) {
  std::vector<nlohmann::json> result;
  std::istringstream lines(test::contents_of(run + "/metrics.jsonl"));
  for (std::string line; std::getline(lines, line);) result.push_back(nlohmann::json::parse(line));
  return result;
}

// Records without what depends on the clock and the memory.
std::vector<nlohmann::json> timeless(std::vector<nlohmann::json> list) {
  for (auto& record : list) {
    for (const char* key : {"tok_per_s", "mfu", "mem_gib", "ms"}) record.erase(key);
  }
  return list;
}

// All files of a checkpoint or model directory but the configuration, by name.
std::map<std::string, std::string> files_of(const std::string& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    const std::string name = fs::relative(entry.path(), folder).string();
    if (!entry.is_regular_file() || name == "config.toml" || name == "complete") continue;
    files[name] = test::contents_of(entry.path().string());
  }
  return files;
}

void expect_same_files(const std::string& a, const std::string& b) {
  const auto left = files_of(a), right = files_of(b);
  EXPECT_GE(left.size(), 2u);
  EXPECT_EQ(left.size(), right.size());
  for (const auto& [name, contents] : left) {
    ASSERT_TRUE(right.contains(name)) << name;
    EXPECT_TRUE(contents == right.at(name)) << name << " differs between " << a << " and " << b;
  }
}

std::vector<at::Tensor> weights_of(const std::string& run) {
  const model::Decoder decoder = model::load_model(run + "/model", at::kCPU, at::kFloat);
  std::vector<at::Tensor> weights;
  for (const auto& parameter : decoder.parameters()) weights.push_back(parameter.value.detach());
  return weights;
}

double difference(const std::string& run_a, const std::string& run_b) {
  const auto a = weights_of(run_a), b = weights_of(run_b);
  std::vector<at::Tensor> flat_a, flat_b;
  for (size_t i = 0; i < a.size(); ++i) {
    flat_a.push_back(a[i].flatten().to(at::kFloat));
    flat_b.push_back(b[i].flatten().to(at::kFloat));
  }
  return test::relative_rms(at::cat(flat_a), at::cat(flat_b));
}

// Interrupts this process as soon as `run` has logged step `step`.
class InterruptAt {
 public:
  InterruptAt(std::string run, int64_t step, int signal)
      : thread_([run = std::move(run), step, signal] {
          for (int i = 0; i < 10000; ++i) {
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
            const std::string text = test::contents_of(run + "/metrics.jsonl");
            if (text.find("{\"step\":" + std::to_string(step) + ",") != std::string::npos) break;
          }
          ::kill(::getpid(), signal);
        }) {}
  ~InterruptAt() { thread_.join(); }

 private:
  std::thread thread_;
};

TEST(Trainer, LearnsAndWritesARunDirectory) {
  TinyRun tiny;
  RunConfig config = tiny.config("run");
  config.train.steps = 60;
  config.optim.lr = 1e-2;
  config.eval.every = 30;
  config.log.every = 5;
  const TrainResult result = train(config);
  EXPECT_EQ(result.step, 60);
  EXPECT_EQ(exit_code(result), 0);
  ASSERT_TRUE(result.evaluation.has_value());
  // The corpus repeats a handful of words: their letters are predictable, their frequencies tell
  // little.
  EXPECT_LT(result.evaluation->loss, 0.5 * tiny.unigram_entropy());

  const std::string run = config.train.output;
  EXPECT_NO_THROW(model::load_model(run + "/model", at::kCPU, at::kFloat));
  EXPECT_EQ(test::contents_of(run + "/checkpoints/latest"), "step-60\n");
  EXPECT_NO_THROW(load_run_config(run + "/config.toml", {}));
  std::vector<int64_t> steps, evaluations;
  for (const auto& record : records(run)) {
    const int64_t step = record["step"];
    if (record.contains("eval_loss")) {
      evaluations.push_back(step);
      EXPECT_NEAR(record["bits_per_byte"].get<double>(),
                  record["eval_loss"].get<double>() / std::log(2.0), 1e-12);
      continue;
    }
    steps.push_back(step);
    EXPECT_EQ(record["tokens"], step * config.train.batch * config.train.context);
    EXPECT_TRUE(record["mfu"].is_null());
    for (const char* key : {"loss", "lr", "grad_norm", "tok_per_s", "mem_gib", "ms"}) {
      EXPECT_GT(record[key].get<double>(), 0) << key;
    }
  }
  EXPECT_EQ(steps, (std::vector<int64_t>{1, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60}));
  EXPECT_EQ(evaluations, (std::vector<int64_t>{30, 60}));
  EXPECT_NEAR(records(run).front()["loss"].get<double>(), std::log(512.0), 0.5);
}

TEST(Trainer, MicroBatchesGiveTheSameUpdate) {
  TinyRun tiny;
  RunConfig whole = tiny.config("whole"), split = tiny.config("split");
  for (RunConfig* config : {&whole, &split}) {
    config->data.train = tiny.masked_dna();  // rows with different numbers of scored tokens
    config->data.format = "fasta";
    config->train.steps = 4;
    config->train.batch = 8;
    config->log.every = 1;
  }
  split.train.micro_batch = 2;
  train(whole);
  train(split);
  EXPECT_LT(difference(whole.train.output, split.train.output), 2e-5);
  const auto a = records(whole.train.output), b = records(split.train.output);
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    if (!a[i].contains("loss")) continue;
    EXPECT_NEAR(a[i]["loss"].get<double>(), b[i]["loss"].get<double>(), 1e-4) << i;
  }
}

void check_resume(const std::string& device, const std::string& dtype) {
  TinyRun tiny;
  RunConfig unbroken = tiny.config("unbroken"), broken = tiny.config("broken");
  for (RunConfig* config : {&unbroken, &broken}) {
    config->train.steps = 20;
    config->train.device = device;
    config->train.dtype = dtype;
    config->train.checkpoint_every = 10;
    config->eval.every = 5;
    config->log.every = 3;
  }
  train(unbroken);
  EXPECT_EQ(train(broken, {.stop_after = 10}).step, 10);
  EXPECT_EQ(test::contents_of(broken.train.output + "/checkpoints/latest"), "step-10\n");
  EXPECT_EQ(train(broken, {.resume = true}).step, 20);
  expect_same_files(unbroken.train.output + "/checkpoints/step-20",
                    broken.train.output + "/checkpoints/step-20");
  expect_same_files(unbroken.train.output + "/model", broken.train.output + "/model");
  EXPECT_EQ(timeless(records(unbroken.train.output)), timeless(records(broken.train.output)));
}

TEST(Trainer, ResumesBitForBit) { check_resume("cpu", "float32"); }
TEST(Trainer, ResumesBitForBitInBf16) { check_resume("cpu", "bfloat16"); }

TEST(TrainerCuda, ResumesBitForBit) {
  SKIP_WITHOUT_CUDA();
  check_resume("cuda", "float32");
}
TEST(TrainerCuda, ResumesBitForBitInBf16) {
  SKIP_WITHOUT_CUDA();
  check_resume("cuda", "bfloat16");
}

TEST(TrainerCuda, LearnsAsOnTheCpu) {
  SKIP_WITHOUT_CUDA();
  TinyRun tiny;
  RunConfig cpu = tiny.config("cpu"), cuda = tiny.config("cuda");
  cuda.train.device = "cuda";
  cpu.train.steps = cuda.train.steps = 5;
  train(cpu);
  train(cuda);
  EXPECT_LT(difference(cpu.train.output, cuda.train.output), 1e-2);
}

TEST(Trainer, DropsRecordsAfterTheCheckpointItResumesFrom) {
  TinyRun tiny;
  RunConfig unbroken = tiny.config("unbroken"), crashed = tiny.config("crashed");
  for (RunConfig* config : {&unbroken, &crashed}) {
    config->train.steps = 12;
    config->train.checkpoint_every = 4;
    config->log.every = 1;
  }
  train(unbroken);
  train(crashed, {.stop_after = 9});
  // As if the process had died after step 9, in the middle of a record.
  fs::remove_all(crashed.train.output + "/checkpoints/step-9");
  std::ofstream(crashed.train.output + "/checkpoints/latest") << "step-8\n";
  std::ofstream(crashed.train.output + "/metrics.jsonl", std::ios::app) << "{\"step\":10,\"to";
  train(crashed, {.resume = true});
  EXPECT_EQ(timeless(records(unbroken.train.output)), timeless(records(crashed.train.output)));
  expect_same_files(unbroken.train.output + "/model", crashed.train.output + "/model");
}

TEST(Trainer, ResumesARunThatDiedBeforeItsFirstCheckpoint) {
  TinyRun tiny;
  RunConfig config = tiny.config("run");
  train(config, {.stop_after = 3});
  fs::remove_all(config.train.output + "/checkpoints");
  EXPECT_EQ(train(config, {.resume = true}).step, config.train.steps);
}

TEST(Trainer, GivesTheSameWeightsForAnyNumberOfThreads) {
  TinyRun tiny;
  RunConfig one = tiny.config("one"), two = tiny.config("two");
  one.train.threads = 1;
  two.train.threads = 2;
  train(one);
  train(two);
  expect_same_files(one.train.output + "/model", two.train.output + "/model");
}

TEST(Trainer, RefusesADirectoryThatHasARun) {
  TinyRun tiny;
  RunConfig config = tiny.config("run");
  config.train.steps = 2;
  train(config);
  EXPECT_REFUSED(train(config), "add --resume");
  EXPECT_REFUSED(train(config), config.train.output);
  EXPECT_EQ(train(config, {.resume = true}).step, 2);  // complete: nothing is left to do
}

TEST(Trainer, RefusesToResumeNothing) {
  TinyRun tiny;
  EXPECT_REFUSED(train(tiny.config("none"), {.resume = true}), "no run to resume");
}

TEST(Trainer, RefusesToResumeAnotherModel) {
  TinyRun tiny;
  RunConfig config = tiny.config("run");
  train(config, {.stop_after = 2});
  RunConfig other = config;
  other.model.mlp_dim = 128;
  EXPECT_REFUSED(train(other, {.resume = true}), "model.mlp_dim = 128");
  other = config;
  other.train.dtype = "bfloat16";
  EXPECT_REFUSED(train(other, {.resume = true}), "train.dtype");
}

TEST(Trainer, ResumesWithOtherSettingsAndKeepsThem) {
  TinyRun tiny;
  RunConfig config = tiny.config("run");
  train(config, {.stop_after = 2});
  config.train.steps = 6;
  config.optim.lr = 1e-4;
  config.optim.schedule = "constant";
  EXPECT_EQ(train(config, {.resume = true}).step, 6);
  EXPECT_EQ(load_run_config(config.train.output + "/config.toml", {}).optim.lr, 1e-4);
  EXPECT_EQ(records(config.train.output).back()["step"], 6);
}

TEST(Trainer, RefusesADirectoryThatAnotherProcessHas) {
  TinyRun tiny;
  const RunConfig config = tiny.config("run");
  RunDirectory other(config.train.output);
  other.open();
  EXPECT_REFUSED(train(config), "another process trains in it");
}

TEST(Trainer, NamesAnOutputThatCannotBeWritten) {
  TinyRun tiny;
  RunConfig config = tiny.config("run");
  config.train.output = config.data.train + "/run";  // below a file
  EXPECT_REFUSED(train(config), config.train.output);
}

TEST(Trainer, InterruptWritesACheckpointAndTheRunGoesOn) {
  TinyRun tiny;
  for (const int signal : {SIGINT, SIGTERM}) {
    RunConfig unbroken = tiny.config(str("unbroken-", signal));
    RunConfig broken = tiny.config(str("broken-", signal));
    unbroken.train.steps = broken.train.steps = 200;
    unbroken.log.every = broken.log.every = 1;
    TrainResult result;
    {
      const InterruptAt interrupt(broken.train.output, 3, signal);
      result = train(broken);
    }
    EXPECT_EQ(result.signal, signal);
    EXPECT_EQ(exit_code(result), 128 + signal);
    EXPECT_GE(result.step, 3);
    ASSERT_LT(result.step, 200);
    EXPECT_EQ(test::contents_of(broken.train.output + "/checkpoints/latest"),
              str("step-", result.step, "\n"));
    EXPECT_FALSE(fs::exists(broken.train.output + "/model"));
    const int64_t rest = result.step + 2;
    train(broken, {.resume = true, .stop_after = rest});
    train(unbroken, {.stop_after = rest});
    const std::string checkpoint = str("/checkpoints/step-", rest);
    expect_same_files(unbroken.train.output + checkpoint, broken.train.output + checkpoint);
  }
}

TEST(InterruptGuardDeathTest, SecondSignalEndsTheProcess) {
  EXPECT_EXIT(
      {
        const InterruptGuard guard;
        ::raise(SIGINT);
        if (guard.signal() != SIGINT) ::_exit(1);
        ::raise(SIGINT);
        ::_exit(2);
      },
      ::testing::ExitedWithCode(130), "");
}

TEST(Trainer, StopsOnAGradientThatIsNotFinite) {
  TinyRun tiny;
  RunConfig config = tiny.config("run");
  config.train.checkpoint_every = 1;
  config.optim.lr = 1e30;
  config.optim.warmup = 0;
  EXPECT_REFUSED(train(config), "step 2: the gradient norm is nan; first not finite: gradient of ");
  EXPECT_EQ(test::contents_of(config.train.output + "/checkpoints/latest"), "step-1\n");
  EXPECT_TRUE(records(config.train.output).back()["grad_norm"].is_null());
  EXPECT_EQ(records(config.train.output).back()["step"], 2);
  EXPECT_FALSE(fs::exists(config.train.output + "/model"));
}

TEST(Trainer, NamesTheFirstTensorAndBlockThatAreNotFinite) {
  TinyRun tiny;
  RunConfig config = tiny.config("run");
  train(config, {.stop_after = 2});
  const std::string folder = config.train.output + "/checkpoints/step-2/model";
  std::string poisoned;
  {
    model::Decoder decoder = model::load_model(folder, at::kCPU, at::kFloat);
    for (auto& parameter : decoder.parameters()) {
      if (!parameter.name.starts_with("blocks.1.") || !poisoned.empty()) continue;
      parameter.value.detach().flatten()[0] = std::nan("");
      poisoned = parameter.name;
    }
    model::save_model(folder, decoder);
  }
  ASSERT_FALSE(poisoned.empty());
  EXPECT_REFUSED(train(config, {.resume = true}), "step 3: the loss is nan");
  EXPECT_TRUE(records(config.train.output).back()["loss"].is_null());
  EXPECT_REFUSED(train(config, {.resume = true}), "parameter " + poisoned);
  EXPECT_REFUSED(train(config, {.resume = true}), "output of blocks.1 ");
  EXPECT_REFUSED(train(config, {.resume = true}), "last good checkpoint is of step 2");
}

}  // namespace
}  // namespace sarissa::train
