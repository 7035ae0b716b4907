#include "sarissa/cli/stopwatch.h"

#include <ATen/Parallel.h>
#include <ATen/ops/ones.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <vector>

#include "sarissa/base/error.h"

namespace sarissa::cli {
namespace {

using Clock = std::chrono::steady_clock;

// Long enough that the rate no longer depends on the length.
constexpr int64_t kCopyBytesCuda = 1600'000'000, kCopyBytesCpu = 128'000'000;
constexpr double kCopySeconds = 0.3;
// Kernels that wait in a stream: far below the depth of its queue, where the host would block.
constexpr int64_t kMostCalls = 64;
constexpr int64_t kFewestBatches = 9, kMostBatches = 51;
constexpr int64_t kMostDelayCopies = 20;

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

// sorted values at a fraction of the way, interpolated.
double quantile(const std::vector<double>& sorted, double fraction) {
  const double position = fraction * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(position);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return std::lerp(sorted[below], sorted[above], position - std::floor(position));
}

template <class Function>
Function* function(void* library, const char* name) {
  return library == nullptr ? nullptr : reinterpret_cast<Function*>(dlsym(library, name));
}

// The driver's version as nvidia-smi prints it: the CUDA API only knows the newest CUDA it serves.
std::string driver_version() {
  void* nvml = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  auto* init = function<int()>(nvml, "nvmlInit_v2");
  auto* version = function<int(char*, unsigned)>(nvml, "nvmlSystemGetDriverVersion");
  char text[96] = "unknown";
  if (init != nullptr && version != nullptr && init() == 0) version(text, sizeof text);
  return text;
}

DeviceFacts gpu_facts(int index) {
  constexpr int kL2CacheSize = 38;  // CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  auto* get = function<int(int*, int)>(driver, "cuDeviceGet");
  auto* get_name = function<int(char*, int, int)>(driver, "cuDeviceGetName");
  auto* get_attribute = function<int(int*, int, int)>(driver, "cuDeviceGetAttribute");
  int device = 0, l2_bytes = 0;
  char name[256] = "unknown GPU";
  if (get != nullptr && get(&device, index) == 0) {
    if (get_name != nullptr) get_name(name, sizeof name, device);
    if (get_attribute != nullptr) get_attribute(&l2_bytes, kL2CacheSize, device);
  }
  return {.name = name, .driver = driver_version(), .l2_bytes = l2_bytes};
}

std::string processor() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown processor";
}

}  // namespace

DeviceFacts device_facts(at::Device device) {
  if (device.is_cuda()) return gpu_facts(device.has_index() ? device.index() : 0);
  return {.name = str(processor(), ", ", at::get_num_threads(), " threads")};
}

Stopwatch::Stopwatch(at::Device device) : device_(device) {
  const int64_t bytes = device.is_cuda() ? kCopyBytesCuda : kCopyBytesCpu;
  const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
  from_ = at::ones({bytes / 4}, options);
  to_ = at::ones({bytes / 4}, options);  // written once, so that its pages exist
  copy_ms_ = time([this](int64_t) { to_.copy_(from_); }, kCopySeconds).ms;
  copy_gb_per_s_ = 2.0 * static_cast<double>(bytes) / copy_ms_ * 1e-6;
}

double Stopwatch::batch_ms(const std::function<void(int64_t)>& call, int64_t count) {
  if (!device_.is_cuda()) {
    const auto start = Clock::now();
    for (int64_t i = 0; i < count; ++i) call(calls_++);
    return ms_since(start) / static_cast<double>(count);
  }
  const c10::impl::VirtualGuardImpl backend(device_.type());
  const c10::Stream stream = backend.getStream(device_);
  c10::Event begin(device_.type(), c10::EventFlag::BACKEND_DEFAULT);
  c10::Event end(device_.type(), c10::EventFlag::BACKEND_DEFAULT);
  if (copy_ms_ > 0) {
    const double needed = 1.5 * host_ms_ * static_cast<double>(count + 1) / copy_ms_;
    const int64_t copies = std::min(kMostDelayCopies, 1 + static_cast<int64_t>(needed));
    for (int64_t i = 0; i < copies; ++i) to_.copy_(from_);
  }
  const auto start = Clock::now();
  call(calls_++);  // leaves the caches as every later call finds them
  begin.record(stream);
  for (int64_t i = 0; i < count; ++i) call(calls_++);
  end.record(stream);
  host_ms_ = ms_since(start) / static_cast<double>(count + 1);
  end.synchronize();
  return begin.elapsedTime(end) / static_cast<double>(count);
}

Timing Stopwatch::time(const std::function<void(int64_t)>& call, double seconds) {
  calls_ = 0;
  host_ms_ = 0;
  // Warm-up: libraries, clocks, the allocator's cache; and how long one call takes.
  const auto start = Clock::now();
  double one = batch_ms(call, 1);
  do {
    one = std::min(one, batch_ms(call, 3));
  } while (ms_since(start) < 200.0 * seconds);
  const double calls = std::max(1.0, 1000.0 * seconds / std::max(one, 1e-4));
  const int64_t count = std::clamp<int64_t>(std::llround(calls / 21), 1, kMostCalls);
  const int64_t batches = std::clamp<int64_t>(std::llround(calls / static_cast<double>(count)),
                                              kFewestBatches, kMostBatches);
  std::vector<double> times;
  for (int64_t i = 0; i < batches; ++i) times.push_back(batch_ms(call, count));
  std::sort(times.begin(), times.end());
  const double median = quantile(times, 0.5);
  return {median, (quantile(times, 0.75) - quantile(times, 0.25)) / median};
}

}  // namespace sarissa::cli
