#include "sarissa/checkpoint/training.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>

#include "sarissa/base/file.h"
#include "tests/support/files.h"

namespace sarissa::checkpoint {
namespace {

namespace fs = std::filesystem;

void write(const fs::path& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

class Checkpoints : public ::testing::Test {
 protected:
  void save(int64_t step) {
    checkpoints_.save(step, [&](const fs::path& folder) {
      fs::create_directory(folder / "model");
      write(folder / "model" / "weights", std::string(100, 'w'));
      write(folder / "state", str("state of ", step));
    });
  }
  fs::path path(const std::string& name) const { return temporary_ / ("checkpoints/" + name); }

  test::TemporaryFolder temporary_;
  CheckpointFolder checkpoints_{temporary_ / "checkpoints"};
};

TEST_F(Checkpoints, NothingSavedIsNone) {
  EXPECT_FALSE(checkpoints_.latest().has_value());
  EXPECT_TRUE(checkpoints_.complete_steps().empty());
  checkpoints_.prune(1);
}

TEST_F(Checkpoints, LatestIsTheLastSaved) {
  save(9);
  save(10);
  ASSERT_TRUE(checkpoints_.latest().has_value());
  EXPECT_EQ(checkpoints_.latest()->step, 10);
  EXPECT_EQ(read_file(checkpoints_.latest()->path / "state"), "state of 10");
  EXPECT_EQ(checkpoints_.complete_steps(), (std::vector<int64_t>{9, 10}));
}

TEST_F(Checkpoints, LatestIsReadNotGuessed) {
  save(5);
  save(6);
  write(path("latest"), "step-5\n");
  EXPECT_EQ(checkpoints_.latest()->step, 5);
  save(6);  // the run comes to step 6 again
  EXPECT_EQ(checkpoints_.latest()->step, 6);
}

TEST_F(Checkpoints, UnfinishedWorkIsIgnoredAndClearedAway) {
  save(5);
  fs::create_directories(path(".partial-step-6/model"));
  write(path(".partial-step-6/state"), "half");
  fs::create_directories(path("step-6"));  // renamed, not yet marked
  write(path("step-6/state"), "no marker");
  EXPECT_EQ(checkpoints_.latest()->step, 5);
  EXPECT_EQ(checkpoints_.complete_steps(), (std::vector<int64_t>{5}));
  save(6);
  EXPECT_EQ(read_file(path("step-6/state")), "state of 6");
  EXPECT_FALSE(fs::exists(path(".partial-step-6")));
}

TEST_F(Checkpoints, DamageIsNamedWithWhatCanBeUsedInstead) {
  save(5);
  save(6);
  save(7);
  fs::resize_file(path("step-7/model/weights"), 50);
  EXPECT_REFUSED(checkpoints_.latest(), "model/weights has 50 bytes, expected 100");
  EXPECT_REFUSED(checkpoints_.latest(), "step-5 step-6");
  fs::remove(path("step-7/model/weights"));
  EXPECT_REFUSED(checkpoints_.latest(), "model/weights is missing");
  fs::remove_all(path("step-7"));
  EXPECT_REFUSED(checkpoints_.latest(), "no such folder");
  write(path("latest"), "step-6.5");
  EXPECT_REFUSED(checkpoints_.latest(), "'step-6.5'");
}

TEST_F(Checkpoints, FailedSaveLeavesTheEarlierOnes) {
  save(5);
  EXPECT_THROW(checkpoints_.save(6,
                                 [](const fs::path& folder) {
                                   write(folder / "state", "half");
                                   throw Error("disk full");
                                 }),
               Error);
  EXPECT_EQ(checkpoints_.latest()->step, 5);
  EXPECT_FALSE(fs::exists(path("step-6")));
  EXPECT_FALSE(fs::exists(path(".partial-step-6")));
}

TEST_F(Checkpoints, FullDiskIsAClearErrorAndLeavesTheEarlierOnes) {
  save(5);
  // A limit on the size of files fails writes as a full disk does.
  std::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit small{4096, before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  EXPECT_REFUSED(checkpoints_.save(6,
                                   [](const fs::path& folder) {
                                     replace_file(folder / "state", std::string(100000, 'x'));
                                   }),
                 "state");
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  EXPECT_EQ(checkpoints_.latest()->step, 5);
  save(6);
  EXPECT_EQ(checkpoints_.latest()->step, 6);
}

TEST_F(Checkpoints, UnwritableFolderIsNamed) {
  const std::string file = temporary_.write("file", "not a folder");
  CheckpointFolder inside(fs::path(file) / "checkpoints");
  EXPECT_REFUSED(inside.save(1, [](const fs::path&) {}), "file/checkpoints");
}

TEST_F(Checkpoints, PruneKeepsTheNewest) {
  for (int64_t step = 1; step <= 5; ++step) save(step);
  checkpoints_.prune(0);
  EXPECT_EQ(checkpoints_.complete_steps().size(), 5u);
  checkpoints_.prune(2);
  EXPECT_EQ(checkpoints_.complete_steps(), (std::vector<int64_t>{4, 5}));
  checkpoints_.prune(1);
  EXPECT_EQ(checkpoints_.complete_steps(), (std::vector<int64_t>{5}));
  checkpoints_.prune(1);
  EXPECT_EQ(checkpoints_.latest()->step, 5);
}

TEST_F(Checkpoints, PruneNeverRemovesTheOneInUse) {
  for (int64_t step = 1; step <= 5; ++step) save(step);
  write(path("latest"), "step-2\n");
  checkpoints_.prune(1);
  EXPECT_EQ(checkpoints_.complete_steps(), (std::vector<int64_t>{2, 3, 4, 5}));
  EXPECT_EQ(checkpoints_.latest()->step, 2);
}

TEST_F(Checkpoints, TheLatestStepCannotBeReplaced) {
  save(5);
  EXPECT_REFUSED(save(5), "latest one already");
  EXPECT_EQ(read_file(path("step-5/state")), "state of 5");
}

TEST(ReplaceFolder, PutsTheNewInPlaceOfTheOld) {
  const test::TemporaryFolder temporary;
  const fs::path path = temporary / "model";
  replace_folder(path, [](const fs::path& folder) { write(folder / "old", "1"); });
  replace_folder(path, [](const fs::path& folder) { write(folder / "new", "2"); });
  EXPECT_FALSE(fs::exists(path / "old"));
  EXPECT_EQ(read_file(path / "new"), "2");
  EXPECT_EQ(temporary.files(), 1u);
}

}  // namespace
}  // namespace sarissa::checkpoint
