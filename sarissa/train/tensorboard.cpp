#include "sarissa/train/tensorboard.h"

#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>

#include "sarissa/base/error.h"

namespace sarissa::train {
namespace {

constexpr std::array<uint32_t, 256> crc_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0x82F63B78u : 0u);
    table[i] = crc;
  }
  return table;
}
constexpr auto kCrcTable = crc_table();

// Little-endian bytes of a fixed-size value (the format's byte order, and this machine's).
template <class T>
std::string bytes_of(T value) {
  std::string bytes(sizeof value, '\0');
  std::memcpy(bytes.data(), &value, sizeof value);
  return bytes;
}

// The mask keeps CRCs of data that itself contains CRCs from being weak.
uint32_t masked_crc(std::string_view bytes) {
  const uint32_t crc = crc32c(bytes);
  return (crc >> 15 | crc << 17) + 0xA282EAD8u;
}

// Protocol buffer wire format: a field is a varint (number << 3 | wire type) and a value.
enum WireType : uint64_t { kVarint = 0, kFixed64 = 1, kLengthDelimited = 2, kFixed32 = 5 };

std::string varint(uint64_t value) {
  std::string bytes;
  for (; value >= 0x80; value >>= 7) bytes += static_cast<char>(value | 0x80);
  return bytes += static_cast<char>(value);
}

std::string tag(uint64_t number, WireType type) { return varint(number << 3 | type); }
std::string int_field(uint64_t number, uint64_t value) {
  return tag(number, kVarint) + varint(value);
}
std::string double_field(uint64_t number, double value) {
  return tag(number, kFixed64) + bytes_of(value);
}
std::string float_field(uint64_t number, float value) {
  return tag(number, kFixed32) + bytes_of(value);
}
std::string bytes_field(uint64_t number, std::string_view value) {
  return tag(number, kLengthDelimited) + varint(value.size()) + std::string(value);
}

// Field numbers of event.proto and summary.proto.
namespace event {
constexpr int kWallTime = 1, kStep = 2, kFileVersion = 3, kSummary = 5, kSessionLog = 7;
}
namespace summary {
constexpr int kValue = 1, kTag = 1, kSimpleValue = 2;
}
namespace session_log {
constexpr int kStatus = 1, kStart = 1;
}

double wall_time() {
  using std::chrono::system_clock;
  return std::chrono::duration<double>(system_clock::now().time_since_epoch()).count();
}

std::string event_at(int64_t step) {
  return double_field(event::kWallTime, wall_time()) +
         int_field(event::kStep, static_cast<uint64_t>(step));
}

}  // namespace

uint32_t crc32c(std::string_view bytes) {
  uint32_t crc = ~0u;
  for (const char byte : bytes)
    crc = crc >> 8 ^ kCrcTable[(crc ^ static_cast<uint8_t>(byte)) & 255];
  return ~crc;
}

std::string tfrecord(std::string_view message) {
  const std::string length = bytes_of(static_cast<uint64_t>(message.size()));
  return length + bytes_of(masked_crc(length)) + std::string(message) +
         bytes_of(masked_crc(message));
}

EventWriter::EventWriter(const std::filesystem::path& folder, int64_t first_step) {
  char host[256] = "localhost";
  ::gethostname(host, sizeof host - 1);
  // Names sort by time; the process id and the step keep two files of one second apart.
  path_ = folder / str("events.out.tfevents.", static_cast<int64_t>(wall_time()), ".", host, ".",
                       ::getpid(), ".", first_step);
  file_ = std::fopen(path_.c_str(), "wbe");
  SARISSA_CHECK(file_ != nullptr, "cannot write ", path_.string(), ": ", std::strerror(errno));
  write(double_field(event::kWallTime, wall_time()) +
        bytes_field(event::kFileVersion, "brain.Event:2"));
  if (first_step > 0) {
    write(event_at(first_step) +
          bytes_field(event::kSessionLog, int_field(session_log::kStatus, session_log::kStart)));
  }
}

EventWriter::~EventWriter() {
  if (file_ != nullptr) std::fclose(file_);
}

void EventWriter::scalars(int64_t step, const std::vector<std::pair<std::string, double>>& values) {
  std::string summary;
  for (const auto& [name, value] : values) {
    summary += bytes_field(summary::kValue,
                           bytes_field(summary::kTag, name) +
                               float_field(summary::kSimpleValue, static_cast<float>(value)));
  }
  write(event_at(step) + bytes_field(event::kSummary, summary));
}

void EventWriter::write(const std::string& event) {
  const std::string record = tfrecord(event);
  const bool written = std::fwrite(record.data(), 1, record.size(), file_) == record.size() &&
                       std::fflush(file_) == 0;
  SARISSA_CHECK(written, "cannot write ", path_.string(), ": ", std::strerror(errno));
}

}  // namespace sarissa::train
