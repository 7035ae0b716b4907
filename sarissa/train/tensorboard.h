// TensorBoard event files: TFRecord frames around hand-encoded Event messages. Formats:
// tensorflow/core/lib/io/record_writer.h (framing), tensorflow/core/util/event.proto and
// framework/summary.proto (messages). Both have been stable for years.
#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace sarissa::train {

/// CRC-32C (Castagnoli) of the bytes.
uint32_t crc32c(std::string_view bytes);

/// The TFRecord frame of a message: length, masked CRC of the length, message, masked CRC of it.
std::string tfrecord(std::string_view message);

/// One file events.out.tfevents.* of scalar summaries.
class EventWriter {
 public:
  /// Creates a new file in `folder`. After a resume, `first_step` tells TensorBoard to forget
  /// points of earlier files from that step on. Throws sarissa::Error naming the path.
  EventWriter(const std::filesystem::path& folder, int64_t first_step);
  ~EventWriter();
  EventWriter(const EventWriter&) = delete;
  EventWriter& operator=(const EventWriter&) = delete;

  /// Writes and flushes one event with these scalars.
  void scalars(int64_t step, const std::vector<std::pair<std::string, double>>& values);

 private:
  void write(const std::string& event);

  std::filesystem::path path_;
  std::FILE* file_ = nullptr;
};

}  // namespace sarissa::train
