#include "sarissa/train/hardware.h"

#include <ATen/DeviceAccelerator.h>
#include <dlfcn.h>
#include <sys/resource.h>

#include <algorithm>
#include <string_view>

namespace sarissa::train {
namespace {

struct Peak {
  std::string_view name;  // part of the device's name
  double flops;
};
// Dense bf16, NVIDIA data sheets. The first match counts: the special forms come first.
constexpr Peak kPeaks[] = {
    {"H100 PCIe", 756e12}, {"H100 NVL", 835e12}, {"H100", 989e12}, {"H200", 989e12},
    {"GH200", 989e12},     {"A100", 312e12},     {"A800", 312e12}, {"H800", 989e12},
};

// Tokens that a token of a sequence of `context` tokens attends to, on average.
double mean_attended(int64_t context, int64_t window) {
  if (window == 0 || window >= context) return double(context + 1) / 2;
  // The first `window` tokens see 1, 2, .., window; the others see the whole window.
  const double ramp = double(window) * double(window + 1) / 2;
  return (ramp + double(context - window) * double(window)) / double(context);
}

}  // namespace

std::string device_name(at::Device device) {
  if (!device.is_cuda()) return "cpu";
  // The driver is loaded when a CUDA device is in use; nothing here links it.
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  if (driver == nullptr) return "unknown GPU";
  const auto get_name =
      reinterpret_cast<int (*)(char*, int, int)>(dlsym(driver, "cuDeviceGetName"));
  char name[256] = "";
  if (get_name == nullptr || get_name(name, sizeof name, std::max<int>(0, device.index())) != 0) {
    return "unknown GPU";
  }
  return name;
}

std::optional<double> peak_bf16_flops(const std::string& device_name) {
  for (const auto& peak : kPeaks) {
    if (device_name.find(peak.name) != std::string::npos) return peak.flops;
  }
  return std::nullopt;
}

double training_flops_per_token(const model::ModelConfig& config, int64_t context) {
  double parameters = double(model::parameter_count(config));
  if (!config.tie_embeddings) parameters -= double(config.vocab_size) * double(config.dim);
  double flops = 6 * parameters;
  for (const auto kind : config.layers()) {
    if (kind == model::MixerKind::kAttention) {
      flops += 12.0 * double(config.dim) * mean_attended(context, 0);
    } else if (kind == model::MixerKind::kWindowedAttention) {
      flops += 12.0 * double(config.dim) * mean_attended(context, config.swa_window);
    }
  }
  return flops;
}

int64_t peak_memory_bytes(at::Device device) {
  if (device.is_cuda()) {
    return at::accelerator::getDeviceStats(std::max<c10::DeviceIndex>(0, device.index()))
        .allocated_bytes[0]  // the aggregate over small and large blocks
        .peak;
  }
  struct rusage usage {};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{1024} * usage.ru_maxrss;  // Linux counts KiB
}

}  // namespace sarissa::train
