#include "sarissa/checkpoint/training.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <nlohmann/json.hpp>

#include "sarissa/base/error.h"
#include "sarissa/base/file.h"
#include "sarissa/base/json.h"

namespace sarissa::checkpoint {
namespace {

namespace fs = std::filesystem;

constexpr const char* kMarker = "complete";
constexpr const char* kLatest = "latest";
constexpr const char* kStepPrefix = "step-";
// Names of unfinished work, which a later save() clears away.
constexpr const char* kPartialPrefix = ".partial-";
constexpr const char* kRemovedPrefix = ".removed-";

void sync_file(const fs::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  const bool synced = fd >= 0 && ::fsync(fd) == 0;
  const int reason = errno;
  if (fd >= 0) ::close(fd);
  SARISSA_CHECK(synced, "cannot flush ", path.string(), ": ", std::strerror(reason));
}

// Makes all files and folders below `path` durable, contents before names.
void sync_tree(const fs::path& path) {
  for (const auto& entry : fs::directory_iterator(path)) {
    entry.is_directory() ? sync_tree(entry.path()) : sync_file(entry.path());
  }
  sync_folder(path);
}

void move(const fs::path& from, const fs::path& to) {
  std::error_code error;
  fs::rename(from, to, error);
  SARISSA_CHECK(!error, "cannot rename ", from.string(), " to ", to.string(), ": ",
                error.message());
}

void make_folder(const fs::path& path) {
  std::error_code error;
  fs::create_directories(path, error);
  SARISSA_CHECK(!error, "cannot create ", path.string(), ": ", error.message());
}

// Fills a fresh folder `partial` and makes it durable; removes it when that fails.
void fill_folder(const fs::path& partial, const std::function<void(const fs::path&)>& fill) {
  std::error_code ignored;
  fs::remove_all(partial, ignored);
  make_folder(partial);
  try {
    fill(partial);
    sync_tree(partial);
  } catch (...) {
    fs::remove_all(partial, ignored);
    throw;
  }
}

// Moves `partial` to `path`; what was there goes away.
void put_in_place(const fs::path& partial, const fs::path& path, const fs::path& removed) {
  std::error_code ignored;
  fs::remove_all(removed, ignored);
  if (fs::exists(path)) move(path, removed);
  move(partial, path);
  sync_folder(path.parent_path());
  fs::remove_all(removed, ignored);
}

std::optional<int64_t> step_of(const std::string& name) {
  if (!name.starts_with(kStepPrefix)) return std::nullopt;
  const char* begin = name.data() + std::strlen(kStepPrefix);
  const char* end = name.data() + name.size();
  int64_t step = 0;
  const auto [last, error] = std::from_chars(begin, end, step);
  if (error != std::errc() || last != end || step < 0) return std::nullopt;
  return step;
}

nlohmann::ordered_json file_sizes(const fs::path& folder) {
  std::vector<std::pair<std::string, uint64_t>> files;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    if (!entry.is_regular_file()) continue;
    files.emplace_back(entry.path().lexically_relative(folder).generic_string(), entry.file_size());
  }
  std::sort(files.begin(), files.end());
  nlohmann::ordered_json sizes = nlohmann::ordered_json::object();
  for (const auto& [name, size] : files) sizes[name] = size;
  return sizes;
}

// What is wrong with a checkpoint, "" when it is complete.
std::string defect(const fs::path& folder) {
  if (!fs::is_directory(folder)) return "there is no such folder";
  const fs::path marker = folder / kMarker;
  if (!fs::is_regular_file(marker)) return "it was not finished (no file 'complete' in it)";
  try {
    const auto expected = parse_json_object(read_file(marker), marker.string());
    for (const auto& [name, size] : expected.items()) {
      std::error_code error;
      const uint64_t got = fs::file_size(folder / name, error);
      if (error) return str(name, " is missing");
      if (!size.is_number_unsigned() || got != size.get<uint64_t>()) {
        return str(name, " has ", got, " bytes, expected ", size.dump());
      }
    }
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

}  // namespace

fs::path CheckpointFolder::path_of(int64_t step) const { return folder_ / str(kStepPrefix, step); }

std::vector<int64_t> CheckpointFolder::complete_steps() const {
  std::vector<int64_t> steps;
  if (!fs::is_directory(folder_)) return steps;
  for (const auto& entry : fs::directory_iterator(folder_)) {
    const auto step = step_of(entry.path().filename().string());
    if (step && defect(entry.path()).empty()) steps.push_back(*step);
  }
  std::sort(steps.begin(), steps.end());
  return steps;
}

std::optional<CheckpointFolder::Entry> CheckpointFolder::latest() const {
  const fs::path file = folder_ / kLatest;
  if (!fs::exists(file)) return std::nullopt;
  std::string name = read_file(file);
  while (!name.empty() && std::isspace(static_cast<unsigned char>(name.back()))) name.pop_back();
  const auto step = step_of(name);
  SARISSA_CHECK(step, file.string(), ": contains '", name, "', expected a name such as step-100");
  const std::string problem = defect(path_of(*step));
  if (!problem.empty()) {
    std::string others;
    for (const int64_t other : complete_steps()) others += str(" step-", other);
    throw Error(str("checkpoint ", path_of(*step).string(), " cannot be used: ", problem, "; ",
                    others.empty() ? "there is no other complete one"
                                   : "write the name of a complete one into " + file.string() +
                                         " to go on from it:" + others));
  }
  return Entry{*step, path_of(*step)};
}

void CheckpointFolder::remove_leftovers() const {
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(folder_)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(kPartialPrefix) || name.starts_with(kRemovedPrefix)) {
      fs::remove_all(entry.path(), ignored);
    }
  }
}

void CheckpointFolder::save(int64_t step, const std::function<void(const fs::path&)>& fill) {
  make_folder(folder_);
  remove_leftovers();
  const auto newest = latest();
  SARISSA_CHECK(!newest || newest->step != step, "checkpoint ", path_of(step).string(),
                " is the latest one already");
  const fs::path path = path_of(step);
  const std::string name = path.filename().string();
  const fs::path partial = folder_ / (kPartialPrefix + name);
  fill_folder(partial, fill);
  const std::string sizes = file_sizes(partial).dump(1);
  put_in_place(partial, path, folder_ / (kRemovedPrefix + name));
  replace_file(path / kMarker, sizes + "\n");
  replace_file(folder_ / kLatest, name + "\n");
}

void CheckpointFolder::prune(int64_t keep) {
  const auto newest = latest();
  if (keep == 0 || !newest) return;
  std::vector<int64_t> steps = complete_steps();
  std::erase_if(steps, [&](int64_t step) { return step > newest->step; });
  const int64_t surplus = static_cast<int64_t>(steps.size()) - keep;
  for (int64_t i = 0; i < surplus; ++i) {
    if (steps[i] == newest->step) continue;
    // Renamed first: a half removed folder must not look complete.
    const fs::path path = path_of(steps[i]);
    const fs::path removed = folder_ / (kRemovedPrefix + path.filename().string());
    move(path, removed);
    std::error_code ignored;
    fs::remove_all(removed, ignored);
  }
}

void replace_folder(const fs::path& path, const std::function<void(const fs::path&)>& fill) {
  const std::string name = path.filename().string();
  const fs::path parent = path.has_parent_path() ? path.parent_path() : fs::path(".");
  const fs::path partial = parent / (kPartialPrefix + name);
  fill_folder(partial, fill);
  put_in_place(partial, parent / name, parent / (kRemovedPrefix + name));
}

}  // namespace sarissa::checkpoint
