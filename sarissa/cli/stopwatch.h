// Timing of calls on a device, and the device's own speed.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>

namespace sarissa::cli {

/// The hardware and its driver, for the records.
struct DeviceFacts {
  std::string name;      // "NVIDIA H100 80GB HBM3", or the processor with the threads in use
  std::string driver{};  // of the GPU; empty on a CPU
  int64_t l2_bytes = 0;  // of the GPU; 0 on a CPU
};
DeviceFacts device_facts(at::Device device);

/// Time of one call: the median over batches of calls, and the batches' (p75 - p25) / median.
struct Timing {
  double ms = 0, spread = 0;
};

class Stopwatch {
 public:
  /// Measures the bandwidth of copies, with buffers that it keeps. Takes the current CUDA stream.
  explicit Stopwatch(at::Device device);

  /// Bytes read and written by a long copy per second, in 1e9.
  double copy_gb_per_s() const { return copy_gb_per_s_; }

  /// Calls call(0), call(1), ... for about `seconds`, at least 9 batches. On a GPU a batch is timed
  /// by events on the stream, behind a copy that lasts until the host has issued the whole batch:
  /// the host's own time is never part of it.
  Timing time(const std::function<void(int64_t)>& call, double seconds);

 private:
  double batch_ms(const std::function<void(int64_t)>& call, int64_t count);

  at::Device device_;
  at::Tensor from_, to_;
  double copy_gb_per_s_ = 0, copy_ms_ = 0;
  double host_ms_ = 0;  // of one call, as last seen
  int64_t calls_ = 0;
};

}  // namespace sarissa::cli
