// A run directory:
//
//   config.toml      the resolved configuration
//   metrics.jsonl    one record per logged step and per evaluation
//   events.out.tfevents.*   the same for TensorBoard
//   checkpoints/     see sarissa/checkpoint/training.h
//   model/           the trained model, at the end of the run
#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "sarissa/checkpoint/training.h"

namespace sarissa::train {

class RunDirectory {
 public:
  explicit RunDirectory(std::filesystem::path path);
  ~RunDirectory();
  RunDirectory(const RunDirectory&) = delete;
  RunDirectory& operator=(const RunDirectory&) = delete;

  /// Whether a run was started here.
  bool has_run() const;

  /// Makes the directory and takes hold of it until this object goes away. Throws UsageError when
  /// another process has it, sarissa::Error when it cannot be written.
  void open();

  std::filesystem::path path() const { return path_; }
  std::filesystem::path config() const { return path_ / "config.toml"; }
  std::filesystem::path metrics() const { return path_ / "metrics.jsonl"; }
  std::filesystem::path model() const { return path_ / "model"; }
  checkpoint::CheckpointFolder& checkpoints() { return checkpoints_; }

 private:
  std::filesystem::path path_;
  checkpoint::CheckpointFolder checkpoints_;
  int lock_ = -1;
};

/// metrics.jsonl: records are appended and flushed one by one.
class MetricsFile {
 public:
  /// Opens `path` and drops the records after `last_step`, which a resumed run writes again, and a
  /// last line that a crash cut short.
  MetricsFile(const std::filesystem::path& path, int64_t last_step);
  ~MetricsFile();
  MetricsFile(const MetricsFile&) = delete;
  MetricsFile& operator=(const MetricsFile&) = delete;

  void append(const nlohmann::ordered_json& record);

 private:
  std::filesystem::path path_;
  std::FILE* file_ = nullptr;
};

}  // namespace sarissa::train
