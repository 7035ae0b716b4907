// The house's one way down, read off the include lines: cli -> {train, infer, serve} -> parallel ->
// model -> ops -> kernels, with data, checkpoint and base at the side.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>

#include "tests/support/files.h"

namespace sarissa {
namespace {

namespace fs = std::filesystem;
using Layers = std::set<std::string>;

/// What each folder of sarissa/ may include besides itself.
const std::map<std::string, Layers> kMayInclude = {
    {"base", {}},
    {"kernels", {}},
    {"data", {"base"}},
    {"ops", {"base", "kernels"}},
    {"checkpoint", {"base"}},
    {"model", {"base", "checkpoint", "ops"}},
    {"parallel", {"base", "checkpoint", "model", "ops"}},
    {"infer", {"base", "checkpoint", "data", "model", "ops", "parallel"}},
    {"train", {"base", "checkpoint", "data", "infer", "model", "ops", "parallel"}},
    {"serve", {"base", "checkpoint", "data", "infer", "model", "ops"}},
    {"cli",
     {"base", "checkpoint", "data", "infer", "kernels", "model", "ops", "parallel", "serve",
      "train"}},
};

struct Include {
  std::string file, layer, target;
  bool torch;
};

std::vector<Include> includes_of(const fs::path& root) {
  static const std::regex ours(R"(^\s*#\s*include\s*"sarissa/([a-z]+)/)");
  static const std::regex torch(R"(^\s*#\s*include\s*[<"](torch|ATen|c10)/)");
  std::vector<Include> includes;
  for (const auto& entry : fs::recursive_directory_iterator(root / "sarissa")) {
    static const Layers kSources = {".h", ".cpp", ".cu", ".cuh"};
    if (!kSources.contains(entry.path().extension().string())) continue;
    const fs::path relative = fs::relative(entry.path(), root / "sarissa");
    const std::string layer = relative.begin()->string();
    std::ifstream file(entry.path());
    for (std::string line; std::getline(file, line);) {
      std::smatch match;
      if (std::regex_search(line, match, ours)) {
        includes.push_back({relative.string(), layer, match[1], false});
      } else if (std::regex_search(line, torch)) {
        includes.push_back({relative.string(), layer, "torch", true});
      }
    }
  }
  return includes;
}

TEST(Layers, IncludesFollowTheOneWayDown) {
  const auto includes = includes_of(test::source_root());
  EXPECT_GT(includes.size(), 100u) << "the scan found too little";
  for (const auto& include : includes) {
    const auto may = kMayInclude.find(include.layer);
    ASSERT_NE(may, kMayInclude.end())
        << "sarissa/" << include.layer << " has no place in the order";
    if (include.torch || include.target == include.layer) continue;
    EXPECT_TRUE(may->second.contains(include.target))
        << "sarissa/" << include.file << " includes sarissa/" << include.target;
  }
}

TEST(Layers, BaseDataAndKernelsKnowNoTorch) {
  static const Layers kWithoutTorch = {"base", "data", "kernels"};
  for (const auto& include : includes_of(test::source_root())) {
    EXPECT_FALSE(include.torch && kWithoutTorch.contains(include.layer))
        << "sarissa/" << include.file << " includes torch";
  }
}

}  // namespace
}  // namespace sarissa
