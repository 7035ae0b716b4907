// What the fuzz targets share. A target is one file fuzz_NAME.cpp with the entry point below and a
// folder corpus/NAME of small inputs; CMake finds both. Built with driver.cpp it is a short test;
// with clang and -DSARISSA_FUZZ=ON it is a libFuzzer program.
//
// A target hands the bytes to a reader. Malformed input must be refused by sarissa::Error, which
// the target catches; any other exception, a crash or a broken promise (REQUIRE) is a finding.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace sarissa::fuzz {

/// The input as a file in memory, for readers that take a path.
class MemoryFile {
 public:
  MemoryFile(const uint8_t* data, size_t size) : descriptor_(::memfd_create("fuzz", 0)) {
    if (descriptor_ < 0) throw std::runtime_error("memfd_create failed");
    while (size > 0) {
      const ssize_t written = ::write(descriptor_, data, size);
      if (written <= 0) throw std::runtime_error("write to a memfd failed");
      data += written;
      size -= static_cast<size_t>(written);
    }
  }
  ~MemoryFile() { ::close(descriptor_); }
  MemoryFile(const MemoryFile&) = delete;

  std::string path() const { return "/proc/self/fd/" + std::to_string(descriptor_); }

 private:
  int descriptor_;
};

}  // namespace sarissa::fuzz

/// A promise that must hold for accepted input.
#define REQUIRE(condition)                                                   \
  do {                                                                       \
    if (!(condition)) throw std::logic_error("broken promise: " #condition); \
  } while (false)
