// Runs one fuzz target as a test: over its committed corpus, then over mutations of it that are the
// same in every run, for SARISSA_FUZZ_SECONDS (2 at first). `fuzz_NAME FILE...` runs the target
// over these files instead, to look at a finding.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include "sarissa/base/log.h"
#include "sarissa/base/rng.h"
#include "tests/fuzz/fuzz.h"
#include "tests/support/files.h"

namespace sarissa::fuzz {
namespace {

constexpr size_t kLongestInput = size_t{1} << 16;

constexpr unsigned kLongestRun = 20;  // seconds for one input; more is a hang

const std::string* current_input = nullptr;

// Where a failing input is kept, to be replayed.
std::string save(const std::string& input) {
  const auto path = std::filesystem::temp_directory_path() / "sarissa-fuzz-" SARISSA_FUZZ_NAME;
  std::ofstream(path, std::ios::binary) << input;
  return path.string();
}

// A crash or a hang: keeps the input and gives up.
void on_signal(int signal) {
  std::signal(signal, SIG_DFL);
  std::cerr << (signal == SIGALRM ? "hang" : "crash") << ", input: " << save(*current_input)
            << std::endl;
  std::raise(signal);
}

// "" when the target is content, else what escaped from it.
std::string finding(const std::string& input) {
  current_input = &input;
  ::alarm(kLongestRun);
  try {
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
    return "";
  } catch (const std::exception& error) {
    return error.what();
  } catch (...) {
    return "an exception of an unknown type";
  }
}

std::vector<std::string> corpus() {
  std::vector<std::filesystem::path> paths;
  const auto folder =
      std::filesystem::path(test::source_root()) / "tests/fuzz/corpus/" SARISSA_FUZZ_NAME;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    paths.push_back(entry.path());
  std::sort(paths.begin(), paths.end());
  std::vector<std::string> inputs;
  for (const auto& path : paths) inputs.push_back(test::contents_of(path));
  return inputs;
}

class Mutator {
 public:
  explicit Mutator(std::vector<std::string> inputs) : inputs_(std::move(inputs)) {}

  // One to four changes to an input of the corpus.
  std::string next() {
    std::string input = pick();
    const uint64_t changes = 1 + draw(4);
    for (uint64_t i = 0; i < changes; ++i) change(input);
    input.resize(std::min(input.size(), kLongestInput));
    return input;
  }

 private:
  uint64_t draw(uint64_t bound) { return rng_.below(drawn_++, bound); }
  const std::string& pick() { return inputs_[draw(inputs_.size())]; }
  size_t position(const std::string& input) { return draw(input.size() + 1); }

  void change(std::string& input) {
    const uint64_t kind = input.empty() ? 4 : draw(7);
    if (kind == 0) {  // flip a bit
      input[draw(input.size())] ^= static_cast<char>(1 << draw(8));
    } else if (kind == 1) {  // a byte that formats care about, or any
      const std::string special("\0\n\r\t >;{}[]\"\\,:-\x7f\x80\xff\x1f\x8b", 21);
      const bool any = draw(3) == 0;
      input[draw(input.size())] =
          any ? static_cast<char>(draw(256)) : special[draw(special.size())];
    } else if (kind == 2) {  // truncate
      input.resize(draw(input.size()));
    } else if (kind == 3) {  // remove a piece
      const size_t at = draw(input.size());
      input.erase(at, 1 + draw(std::min<size_t>(64, input.size() - at)));
    } else if (kind == 4) {  // splice: the head of this input, the tail of another
      const std::string& other = pick();
      input = input.substr(0, position(input)) + other.substr(position(other));
    } else if (kind == 5) {  // repeat a piece
      const size_t at = draw(input.size());
      input.insert(at, input.substr(at, 1 + draw(64)));
    } else {  // a number at its limits, little-endian
      const uint64_t limits[] = {0,
                                 1,
                                 0x7f,
                                 0x7fffffff,
                                 0x80000000,
                                 0xffffffff,
                                 0x7fffffffffffffff,
                                 0x8000000000000000,
                                 0xffffffffffffffff};
      uint64_t value = limits[draw(std::size(limits))] + draw(3) - 1;
      const size_t width = size_t{1} << draw(4);
      const size_t at = draw(input.size());
      for (size_t i = at; i < std::min(at + width, input.size()); ++i, value >>= 8) {
        input[i] = static_cast<char>(value);
      }
    }
  }

  const std::vector<std::string> inputs_;
  const Rng rng_{1};
  uint64_t drawn_ = 0;
};

TEST(Fuzz, Corpus) {
  const std::vector<std::string> inputs = corpus();
  ASSERT_GE(inputs.size(), 3u) << "tests/fuzz/corpus/" SARISSA_FUZZ_NAME " is too small";
  for (const auto& input : inputs) EXPECT_EQ(finding(input), "") << "input: " << save(input);
  EXPECT_EQ(finding(""), "");
}

TEST(Fuzz, Mutations) {
  const char* given = std::getenv("SARISSA_FUZZ_SECONDS");
  const auto end = std::chrono::steady_clock::now() +
                   std::chrono::duration<double>(given ? std::atof(given) : 2.0);
  Mutator mutator(corpus());
  int64_t runs = 0;
  for (; std::chrono::steady_clock::now() < end; ++runs) {
    const std::string input = mutator.next();
    ASSERT_EQ(finding(input), "") << "run " << runs << ", input: " << save(input);
  }
  RecordProperty("runs", static_cast<int>(runs));
  EXPECT_GT(runs, 20) << "the target is too slow to be fuzzed";
}

}  // namespace
}  // namespace sarissa::fuzz

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  for (const int signal : {SIGALRM, SIGABRT, SIGSEGV, SIGBUS, SIGFPE}) {
    std::signal(signal, sarissa::fuzz::on_signal);
  }
  sarissa::set_log_level(sarissa::LogLevel::kError);
  if (argc == 1) return RUN_ALL_TESTS();
  int findings = 0;
  for (int i = 1; i < argc; ++i) {
    const std::string what = sarissa::fuzz::finding(sarissa::test::contents_of(argv[i]));
    std::cout << argv[i] << ": " << (what.empty() ? "ok" : what) << "\n";
    findings += !what.empty();
  }
  return findings == 0 ? 0 : 1;
}
