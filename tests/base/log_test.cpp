#include "sarissa/base/log.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <thread>
#include <vector>

#include "sarissa/base/progress.h"

namespace sarissa {
namespace {

using namespace std::chrono_literals;

// Puts level and rank back after a test.
class Log : public testing::Test {
 protected:
  ~Log() override {
    set_log_level(LogLevel::kInfo);
    set_log_rank(0, 1);
  }

  static void say_all() {
    log_error("e");
    log_warning("w ", 1);
    log_info("i ", 2.5);
    log_debug("d");
  }

  // What `f` writes to stderr when that is a file.
  template <class F>
  static std::string written(F f) {
    testing::internal::CaptureStderr();
    f();
    return testing::internal::GetCapturedStderr();
  }
};

using ProgressTest = Log;

TEST_F(Log, LevelsDropMessages) {
  EXPECT_EQ(written(say_all), "error: e\nwarning: w 1\ni 2.5\n");
  set_log_level(LogLevel::kError);
  EXPECT_EQ(written(say_all), "error: e\n");
  set_log_level(LogLevel::kWarning);
  EXPECT_EQ(written(say_all), "error: e\nwarning: w 1\n");
  set_log_level(LogLevel::kDebug);
  EXPECT_EQ(written(say_all), "error: e\nwarning: w 1\ni 2.5\ndebug: d\n");
}

TEST_F(Log, RanksAreNamedAndOnlyRankZeroInforms) {
  set_log_rank(0, 2);
  EXPECT_EQ(written(say_all), "[rank 0] error: e\n[rank 0] warning: w 1\n[rank 0] i 2.5\n");
  set_log_rank(1, 2);
  EXPECT_EQ(written(say_all), "[rank 1] error: e\n[rank 1] warning: w 1\n");
  set_log_level(LogLevel::kDebug);
  EXPECT_EQ(written([] { log_info("i"); }), "[rank 1] i\n");
}

TEST_F(Log, LinesOfThreadsDoNotMix) {
  const std::string text = written([] {
    std::vector<std::thread> threads;
    for (char c = 'a'; c < 'e'; ++c) {
      threads.emplace_back([c] {
        for (int i = 0; i < 100; ++i) log_info(std::string(60, c));
      });
    }
    for (auto& thread : threads) thread.join();
  });
  EXPECT_EQ(text.size(), 4u * 100 * 61);
  for (size_t line = 0; line < text.size(); line += 61) {
    EXPECT_EQ(text.substr(line, 61), std::string(60, text[line]) + "\n");
  }
}

TEST(ProgressText, Counts) {
  EXPECT_EQ(short_count(0), "0");
  EXPECT_EQ(short_count(950), "950");
  EXPECT_EQ(short_count(1000), "1.00k");
  EXPECT_EQ(short_count(12345), "12.3k");
  EXPECT_EQ(short_count(999499), "999k");
  EXPECT_EQ(short_count(999900), "1.00M");
  EXPECT_EQ(short_count(4639675), "4.64M");
  EXPECT_EQ(short_count(2.5e9), "2.50G");
  EXPECT_EQ(short_count(7.2e15), "7200T");
}

TEST(ProgressText, Durations) {
  EXPECT_EQ(short_duration(0.4), "0:00");
  EXPECT_EQ(short_duration(7), "0:07");
  EXPECT_EQ(short_duration(754), "12:34");
  EXPECT_EQ(short_duration(3725), "1:02:05");
  EXPECT_EQ(short_duration(-1), "0:00");
}

TEST(ProgressText, Lines) {
  EXPECT_EQ(progress_line("reading x", 0, 100, 0, "bytes"), "reading x  0%");
  EXPECT_EQ(progress_line("reading x", 25, 100, 5, "bytes"), "reading x  25%  5 bytes/s  ETA 0:15");
  EXPECT_EQ(progress_line("reading x", 100, 100, 5, "bytes"), "reading x  100%  20 bytes/s");
  EXPECT_EQ(progress_line("reading x", 30000, 0, 10, "tokens"),
            "reading x  30.0k tokens  3.00k tokens/s");
}

TEST_F(ProgressTest, ShortWorkWritesNothingToAFile) {
  EXPECT_EQ(written([] {
              Progress progress("work", 10, "items");
              for (int i = 0; i <= 10; ++i) progress.update(i);
            }),
            "");
}

TEST_F(ProgressTest, LongWorkWritesPlainLinesToAFile) {
  const std::string text = written([] {
    Progress progress("work", 10, "items", 30ms);
    for (int i = 1; i <= 10; ++i) {
      std::this_thread::sleep_for(10ms);
      progress.update(i);
    }
  });
  const auto lines = std::count(text.begin(), text.end(), '\n');
  EXPECT_GE(lines, 2) << text;
  EXPECT_LE(lines, 5) << text;  // far fewer than the ten updates
  EXPECT_EQ(text.find_first_of("\r\033"), std::string::npos) << text;
  EXPECT_EQ(text.substr(0, 6), "work  ");
  EXPECT_NE(text.find("ETA"), std::string::npos);
  EXPECT_NE(text.rfind("work  100%"), std::string::npos) << text;
}

TEST_F(ProgressTest, QuietShowsNothing) {
  set_log_level(LogLevel::kWarning);
  EXPECT_EQ(written([] {
              Progress progress("work", 10, "items", 1ns);
              progress.update(5);
            }),
            "");
}

// stderr is the far end of a pseudo-terminal while this lives.
class Terminal {
 public:
  Terminal() {
    near_ = ::posix_openpt(O_RDWR | O_NOCTTY);
    ok_ = near_ >= 0 && ::grantpt(near_) == 0 && ::unlockpt(near_) == 0;
    const int far = ok_ ? ::open(::ptsname(near_), O_RDWR | O_NOCTTY) : -1;
    ok_ = far >= 0;
    saved_ = ::dup(STDERR_FILENO);
    if (ok_) ::dup2(far, STDERR_FILENO);
    if (far >= 0) ::close(far);
  }
  ~Terminal() {
    ::dup2(saved_, STDERR_FILENO);
    ::close(saved_);
    ::close(near_);
  }
  bool ok() const { return ok_; }

  std::string shown() const {
    ::fcntl(near_, F_SETFL, O_NONBLOCK);
    std::string text;
    char block[4096];
    for (ssize_t got; (got = ::read(near_, block, sizeof block)) > 0;) text.append(block, got);
    return text;
  }

 private:
  int near_ = -1, saved_ = -1;
  bool ok_ = false;
};

TEST_F(ProgressTest, ATerminalLineIsRedrawnAndRemoved) {
  std::string text;
  {
    const Terminal terminal;
    if (!terminal.ok()) GTEST_SKIP() << "this machine gives no pseudo-terminal";
    {
      Progress progress(std::string(200, 'w'), 4, "items");
      for (int i = 1; i <= 4; ++i) {
        std::this_thread::sleep_for(110ms);
        progress.update(i);
        if (i == 2) log_info("message");
      }
    }
    log_info("after");
    text = terminal.shown();
  }
  const std::string clear = "\r\033[K", line(79, 'w');  // cut to a terminal of 80 columns
  EXPECT_EQ(text, clear + line + clear + line + clear + "message\r\n" + line + clear + line +
                      clear + line + clear + "after\r\n");
}

}  // namespace
}  // namespace sarissa
