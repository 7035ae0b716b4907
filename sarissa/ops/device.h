// Devices: loading the CUDA library, streams, and turning kernel statuses into errors.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <string>

#include "sarissa/kernels/common/dtype.h"
#include "sarissa/kernels/common/status.h"

namespace sarissa::kernels {
struct CudaKernels;
}

namespace sarissa::ops {

/// Whether CUDA tensors can be made and our kernels run on them. The first call loads
/// libtorch_cuda and libsarissa_cuda (from the folder of libsarissa); it never throws.
bool cuda_available();

/// Why cuda_available() is false, as a phrase ("no NVIDIA driver", ...); "" when it is true.
std::string cuda_unavailable_reason();

/// The CUDA launch functions. Throws when !cuda_available().
const kernels::CudaKernels& cuda_kernels();

/// The current stream of a CUDA tensor's device, as a cudaStream_t. The caller holds a
/// c10::DeviceGuard of that device.
void* cuda_stream(const at::Tensor& tensor);

/// "cpu", "cuda", "cuda:N" or "auto" (cuda when available). Throws UsageError that names `text`.
at::Device parse_device(const std::string& text);

/// The element type for kernels. Throws for anything but double, float and bfloat16, naming the
/// operator and the argument.
kernels::DType kernel_dtype(const at::Tensor& tensor, const char* op, const char* argument);

/// Throws "sarissa::op: ..." when the status is not ok; remembers the kernel that it names.
void check(kernels::Status status, const char* op);

/// The variant of the last kernel of the process that named one, e.g. "march_v4"; empty before
/// that. For sarissa bench, which runs one operator at a time.
std::string last_kernel();

}  // namespace sarissa::ops
