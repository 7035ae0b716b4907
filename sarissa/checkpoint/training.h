// Training checkpoints that survive a crash at any moment.
//
//   FOLDER/step-120/...        the files of a checkpoint
//   FOLDER/step-120/complete   the marker: a JSON object of every file's size
//   FOLDER/latest              "step-120"
//
// A checkpoint is written under a temporary name, its files and folders are fsynced, it is renamed,
// then marked, then `latest` is replaced. So `latest` always names a complete checkpoint; it is
// read, never guessed from the folders.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace sarissa::checkpoint {

class CheckpointFolder {
 public:
  /// `folder` is made by the first save().
  explicit CheckpointFolder(std::filesystem::path folder) : folder_(std::move(folder)) {}

  struct Entry {
    int64_t step = 0;
    std::filesystem::path path;
  };

  /// The checkpoint that `latest` names; none when nothing was saved. Throws sarissa::Error when it
  /// is missing or damaged (a file's size differs from the marker), naming what can be used
  /// instead.
  std::optional<Entry> latest() const;

  /// Steps of all complete checkpoints, ascending.
  std::vector<int64_t> complete_steps() const;

  /// Writes the checkpoint of `step`: `fill` writes files into the (temporary) folder that it is
  /// given. An older folder of the same step is replaced, unless `latest` names it, which is an
  /// error. When `fill` or the disk fails, throws and leaves the earlier checkpoints as they were.
  void save(int64_t step, const std::function<void(const std::filesystem::path&)>& fill);

  /// Removes all complete checkpoints but the `keep` newest up to the one `latest` names, which is
  /// always kept. keep 0: removes nothing. Newer ones (of a run that was taken back by editing
  /// `latest`) are left alone.
  void prune(int64_t keep);

 private:
  std::filesystem::path path_of(int64_t step) const;
  void remove_leftovers() const;

  std::filesystem::path folder_;
};

/// Replaces the folder `path` by what `fill` writes: under a temporary name, fsynced, then renamed.
/// After a crash the old or the new folder is there, or for one moment neither.
void replace_folder(const std::filesystem::path& path,
                    const std::function<void(const std::filesystem::path&)>& fill);

}  // namespace sarissa::checkpoint
