// kill -9 at any moment of a run that saves after every step: nothing is lost.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <thread>

#include "sarissa/base/log.h"
#include "sarissa/checkpoint/training.h"
#include "sarissa/train/trainer.h"
#include "tests/train/tiny_run.h"

namespace sarissa::train {
namespace {

namespace fs = std::filesystem;

// Starts a child that trains (resuming what is there) and returns its process id. The parent never
// computes: torch's threads do not survive a fork.
pid_t start_training(const RunConfig& config) {
  const pid_t child = ::fork();
  if (child != 0) return child;
  try {
    set_log_level(LogLevel::kWarning);
    train(config, {.resume = fs::exists(config.train.output + "/config.toml")});
    ::_exit(0);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    ::_exit(1);
  }
}

TEST(Kill, NothingIsLostAndTheRunGoesOn) {
  const test::TinyRun tiny;
  RunConfig unbroken = tiny.config("unbroken"), killed = tiny.config("killed");
  for (RunConfig* config : {&unbroken, &killed}) {
    config->train.steps = 50;
    config->train.checkpoint_every = 1;
    config->train.keep_last = 2;
    config->train.threads = 1;
    config->train.batch = 1;
    config->train.context = 16;
    config->eval.tokens = 16;
    config->log.every = 1;
  }
  unbroken.train.checkpoint_every = 0;
  int status = 0;
  ASSERT_EQ(::waitpid(start_training(unbroken), &status, 0) >= 0 && status == 0, true);

  const checkpoint::CheckpointFolder checkpoints(killed.train.output + "/checkpoints");
  const std::string latest_file = killed.train.output + "/checkpoints/latest";
  const Rng rng(static_cast<uint64_t>(::getpid()));
  int kills = 0, exited = 0;
  int64_t last = 0;
  std::string seen;  // what `latest` said when the child was started
  for (uint64_t attempt = 0; attempt < 200 && !exited; ++attempt) {
    const pid_t child = start_training(killed);
    ASSERT_GT(child, 0);
    // Once a start-up is over (a new step is saved), any moment will do.
    const auto pause = std::chrono::microseconds(rng.below(attempt, 20'000));
    for (int i = 0; i < 2000; ++i) {
      // Only its text: the child may prune what it names while we look.
      if (test::contents_of(latest_file) != seen) break;
      if (::waitpid(child, &status, WNOHANG) == child) {
        exited = 1;
        break;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    if (!exited) {
      std::this_thread::sleep_for(pause);
      ::kill(child, SIGKILL);
      ASSERT_EQ(::waitpid(child, &status, 0), child);
      if (WIFSIGNALED(status)) ++kills;
      exited = WIFEXITED(status);
    }
    const auto found = checkpoints.latest();  // throws when what `latest` names is not whole
    ASSERT_TRUE(found.has_value());
    EXPECT_GE(found->step, last) << "a saved step was lost";
    last = found->step;
    seen = test::contents_of(latest_file);
  }
  ASSERT_TRUE(exited) << "no progress past step " << last;
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  EXPECT_EQ(last, 50);
  EXPECT_GE(kills, 3) << "the run ended before it was killed often enough to tell";
  for (const char* file : {"model.safetensors", "config.json"}) {
    EXPECT_TRUE(test::contents_of(unbroken.train.output + "/model/" + file) ==
                test::contents_of(killed.train.output + "/model/" + file))
        << file << " differs from the unbroken run's";
  }
  RecordProperty("kills", kills);
}

}  // namespace
}  // namespace sarissa::train
