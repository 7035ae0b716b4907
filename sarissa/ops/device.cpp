#include "sarissa/ops/device.h"

#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <atomic>
#include <filesystem>

#include "sarissa/base/error.h"
#include "sarissa/base/log.h"
#include "sarissa/kernels/cuda_kernels.h"

namespace sarissa::ops {
namespace {

// libtorch_cuda's C function (torch/csrc/inductor/aoti_torch/c/shim.h), resolved at run time so
// that nothing here links libtorch_cuda.
using GetCurrentStream = int32_t (*)(int32_t device_index, void** stream);

// Says so when the driver must compile the kernels from PTX, so that a first run that seems to hang
// has its reason on the screen. Native code: cmake/nvcc.cmake, 8.0 (runs on all of 8.x) and 9.0.
void note_missing_native_code(void* driver) {
  auto attribute = reinterpret_cast<int (*)(int*, int, int)>(dlsym(driver, "cuDeviceGetAttribute"));
  constexpr int kMajor = 75, kMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
  int major = 0, minor = 0;
  if (attribute == nullptr || attribute(&major, kMajor, 0) != 0 ||
      attribute(&minor, kMinor, 0) != 0) {
    return;
  }
  if (major == 8 || (major == 9 && minor == 0)) return;
  log_info("no native kernels for compute capability ", major, ".", minor,
           ": the driver compiles them at their first use and keeps them");
}

struct Cuda {
  std::string reason;
  const kernels::CudaKernels* kernels = nullptr;
  GetCurrentStream get_current_stream = nullptr;
};

Cuda load_cuda() {
  Cuda cuda;
  // Ask the driver first: loading libtorch_cuda takes a second that a CPU machine should not pay.
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  if (driver == nullptr) return {.reason = "no NVIDIA driver (libcuda.so.1) on this machine"};
  auto init = reinterpret_cast<int (*)(unsigned)>(dlsym(driver, "cuInit"));
  auto count_devices = reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDeviceGetCount"));
  int count = 0;
  if (init == nullptr || count_devices == nullptr || init(0) != 0 || count_devices(&count) != 0 ||
      count == 0) {
    return {.reason = "the NVIDIA driver reports no usable GPU"};
  }
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL);
  if (torch_cuda == nullptr) {
    return {.reason = str("libtorch_cuda.so does not load (", dlerror(),
                          "); run ./run build --cuda to install the CUDA parts of torch")};
  }
  Dl_info self{};
  dladdr(reinterpret_cast<void*>(&cuda_available), &self);
  const auto path = std::filesystem::path(self.dli_fname).parent_path() / "libsarissa_cuda.so";
  void* ours = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (ours == nullptr) {
    return {.reason = str("the CUDA kernels do not load (", dlerror(),
                          "); run ./run build --cuda to build them")};
  }
  auto table =
      reinterpret_cast<decltype(&sarissa_cuda_kernels)>(dlsym(ours, "sarissa_cuda_kernels"));
  cuda.get_current_stream =
      reinterpret_cast<GetCurrentStream>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
  if (table == nullptr || cuda.get_current_stream == nullptr) {
    return {.reason = str(path.string(), " or libtorch_cuda.so is of another version; rebuild")};
  }
  cuda.kernels = table();
  note_missing_native_code(driver);
  return cuda;
}

const Cuda& cuda() {
  static const Cuda loaded = load_cuda();
  return loaded;
}

}  // namespace

bool cuda_available() { return cuda().kernels != nullptr; }

std::string cuda_unavailable_reason() { return cuda().reason; }

const kernels::CudaKernels& cuda_kernels() {
  SARISSA_CHECK(cuda_available(), "CUDA is not available: ", cuda().reason);
  return *cuda().kernels;
}

void* cuda_stream(const at::Tensor& tensor) {
  cuda_kernels();
  void* stream = nullptr;
  SARISSA_CHECK(cuda().get_current_stream(tensor.get_device(), &stream) == 0,
                "no current CUDA stream for device ", tensor.device());
  return stream;
}

at::Device parse_device(const std::string& text) {
  if (text == "auto") return at::Device(cuda_available() ? at::kCUDA : at::kCPU);
  at::Device device(at::kCPU);
  try {
    device = at::Device(text);
  } catch (const c10::Error&) {
    throw UsageError(str("device '", text, "': expected cpu, cuda, cuda:N or auto"));
  }
  if (!device.is_cpu() && !device.is_cuda()) {
    throw UsageError(str("device '", text, "': expected cpu, cuda, cuda:N or auto"));
  }
  if (device.is_cuda() && !cuda_available()) {
    throw UsageError(str("device '", text, "': ", cuda_unavailable_reason(), "; use cpu"));
  }
  return device;
}

kernels::DType kernel_dtype(const at::Tensor& tensor, const char* op, const char* argument) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return kernels::DType::kFloat64;
    case at::kFloat:
      return kernels::DType::kFloat32;
    case at::kBFloat16:
      return kernels::DType::kBFloat16;
    default:
      TORCH_CHECK(false, "sarissa::", op, ": ", argument, " is ", tensor.scalar_type(),
                  "; expected float64, float32 or bfloat16");
  }
}

namespace {
// Static strings, so a plain pointer will do; atomic since autograd runs on threads of its own.
std::atomic<const char*> last_kernel_name{""};
}  // namespace

void check(kernels::Status status, const char* op) {
  TORCH_CHECK(status.ok(), "sarissa::", op, ": ", status.error);
  if (status.kernel != nullptr) last_kernel_name = status.kernel;
}

std::string last_kernel() { return last_kernel_name.load(); }

}  // namespace sarissa::ops
