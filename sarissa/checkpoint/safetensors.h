// safetensors files: an 8-byte little-endian header length, a JSON header, raw row-major data.
// Format: https://huggingface.co/docs/safetensors (the layout is stable and documented there).
#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace sarissa::checkpoint {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

/// A memory-mapped safetensors file. Everything in the header is checked when it is opened: sizes,
/// ranges, overlaps, dtypes. Throws sarissa::Error with one line that names the file.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path);
  ~SafetensorsFile();
  SafetensorsFile(SafetensorsFile&&) noexcept;

  /// Names in the order of their data.
  const std::vector<std::string>& names() const;
  bool contains(const std::string& name) const;
  const std::map<std::string, std::string>& metadata() const;

  /// The tensor on the CPU, a copy that outlives the file. Throws when there is no such name.
  at::Tensor tensor(const std::string& name) const;
  std::vector<int64_t> shape(const std::string& name) const;
  at::ScalarType dtype(const std::string& name) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Writes the tensors (any device, any strides) in the given order and fsyncs the file. Throws
/// sarissa::Error naming the path when the disk is full or the folder is missing.
void write_safetensors(const std::filesystem::path& path, const NamedTensors& tensors,
                       const std::map<std::string, std::string>& metadata = {});

}  // namespace sarissa::checkpoint
