// Helpers shared by the operators' torch faces: running a kernel where a tensor lives, and small
// conventions that every family follows.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "sarissa/kernels/cuda_kernels.h"
#include "sarissa/ops/device.h"

namespace sarissa::ops {

/// The dtype of states and of accumulated gradients: float64 for float64, float32 otherwise.
inline at::ScalarType accumulation_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

/// The typed handle of torch.ops.<name>, e.g. name = "sarissa::swr". Keep it in a static.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

/// The gradient, or zeros where autograd gives none. It may be expanded or strided.
inline at::Tensor grad_or_zeros(const at::Tensor& grad, at::IntArrayRef sizes,
                                const at::TensorOptions& options) {
  return grad.defined() ? grad : at::zeros(sizes, options);
}

/// Runs kernel(begin, end) -> Status on parts of [0, items), split between the intra-op threads so
/// that a part has at least ~32k elements of work. An item's result must not depend on the split.
template <class Kernel>
void parallel_range(int64_t items, int64_t elements_per_item, const char* op,
                    const Kernel& kernel) {
  const int64_t grain = 32768 / std::max<int64_t>(1, elements_per_item) + 1;
  at::parallel_for(0, items, grain,
                   [&](int64_t begin, int64_t end) { check(kernel(begin, end), op); });
}

/// Runs an operator's kernel where `tensor` lives: on the CPU cpu(begin, end) -> Status over
/// parallel_range; on a GPU cuda(kernels, stream) -> Status; nothing for Meta tensors, so one
/// function body serves the CPU, CUDA and Meta keys. Without items nothing runs.
template <class Cpu, class Cuda>
void launch(const at::Tensor& tensor, const char* op, int64_t items, int64_t elements_per_item,
            const Cpu& cpu, const Cuda& cuda) {
  if (items == 0 || tensor.is_meta()) return;
  if (tensor.is_cpu()) {
    parallel_range(items, elements_per_item, op, cpu);
    return;
  }
  const c10::DeviceGuard guard(tensor.device());
  check(cuda(cuda_kernels(), cuda_stream(tensor)), op);
}

}  // namespace sarissa::ops
