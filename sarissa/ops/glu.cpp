#include "sarissa/kernels/glu/glu.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "sarissa/base/error.h"
#include "sarissa/ops/dispatch.h"
#include "sarissa/ops/ops.h"
#include "sarissa/ops/rows.h"

namespace sarissa::ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr std::pair<const char*, Gate> kGateNames[] = {
    {"swiglu", Gate::kSilu}, {"gelu", Gate::kGelu}, {"bilinear", Gate::kIdentity}};

kernels::Activation activation_of(const char* op, c10::string_view gate) {
  for (const auto& [name, value] : kGateNames) {
    if (gate != name) continue;
    switch (value) {
      case Gate::kSilu:
        return kernels::Activation::kSilu;
      case Gate::kGelu:
        return kernels::Activation::kGelu;
      case Gate::kIdentity:
        return kernels::Activation::kIdentity;
    }
  }
  TORCH_CHECK(false, "sarissa::", op, ": gate is '", gate, "'; expected swiglu, gelu or bilinear");
}

/// [..., F] for [..., 2F].
std::vector<int64_t> half_shape(const char* op, const Tensor& gate_up) {
  TORCH_CHECK(gate_up.dim() >= 1 && gate_up.size(-1) % 2 == 0, "sarissa::", op,
              ": gate_up has shape ", gate_up.sizes(),
              "; expected [..., 2F]: the halves [gate | up]");
  std::vector<int64_t> shape = gate_up.sizes().vec();
  shape.back() /= 2;
  return shape;
}

Tensor glu_fwd(const Tensor& gate_up, c10::string_view gate) {
  constexpr const char* kOp = "glu";
  const kernels::DType dtype = kernel_dtype(gate_up, kOp, "gate_up");
  const kernels::Activation activation = activation_of(kOp, gate);
  Tensor y = at::empty(half_shape(kOp, gate_up), gate_up.options());
  if (gate_up.is_meta() || y.numel() == 0) return y;
  const Tensor rows = as_rows(gate_up);
  const kernels::GluParams params{.rows = rows.size(0),
                                  .width = y.size(-1),
                                  .activation = activation,
                                  .gate_up = rows.const_data_ptr(),
                                  .gate_up_row = row_stride(rows),
                                  .y = y.mutable_data_ptr()};
  launch(
      gate_up, kOp, params.rows, params.width,
      [&](int64_t begin, int64_t end) { return kernels::glu_fwd_cpu(params, dtype, begin, end); },
      [&](const kernels::CudaKernels& cuda, void* stream) {
        return cuda.glu_fwd(params, dtype, stream);
      });
  return y;
}

Tensor glu_bwd(const Tensor& dy, const Tensor& gate_up, c10::string_view gate) {
  constexpr const char* kOp = "glu_bwd";
  const kernels::DType dtype = kernel_dtype(gate_up, kOp, "gate_up");
  const kernels::Activation activation = activation_of(kOp, gate);
  const std::vector<int64_t> shape = half_shape(kOp, gate_up);
  TORCH_CHECK(dy.sizes() == at::IntArrayRef(shape), "sarissa::glu_bwd: dy has shape ", dy.sizes(),
              "; expected ", at::IntArrayRef(shape), " for gate_up ", gate_up.sizes());
  TORCH_CHECK(dy.scalar_type() == gate_up.scalar_type() && dy.device() == gate_up.device(),
              "sarissa::glu_bwd: dy is ", dy.scalar_type(), " on ", dy.device(), "; expected ",
              gate_up.scalar_type(), " on ", gate_up.device(), " as gate_up");
  Tensor dgate_up = at::empty(gate_up.sizes(), gate_up.options());
  if (gate_up.is_meta() || dy.numel() == 0) return dgate_up;
  const Tensor rows = as_rows(gate_up), dy_rows = as_rows(dy);
  const kernels::GluParams params{.rows = rows.size(0),
                                  .width = dy.size(-1),
                                  .activation = activation,
                                  .gate_up = rows.const_data_ptr(),
                                  .gate_up_row = row_stride(rows),
                                  .y = nullptr,
                                  .dy = dy_rows.const_data_ptr(),
                                  .dy_row = row_stride(dy_rows),
                                  .dgate_up = dgate_up.mutable_data_ptr()};
  launch(
      gate_up, kOp, params.rows, params.width,
      [&](int64_t begin, int64_t end) { return kernels::glu_bwd_cpu(params, dtype, begin, end); },
      [&](const kernels::CudaKernels& cuda, void* stream) {
        return cuda.glu_bwd(params, dtype, stream);
      });
  return dgate_up;
}

Tensor call_fwd(const Tensor& gate_up, c10::string_view gate) {
  static const auto op = find_operator<decltype(glu_fwd)>("sarissa::glu");
  return op.call(gate_up, gate);
}

class Glu : public torch::autograd::Function<Glu> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& gate_up, const std::string& gate) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({gate_up});
    ctx->saved_data["gate"] = gate;
    return call_fwd(gate_up, gate);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    static const auto op = find_operator<decltype(glu_bwd)>("sarissa::glu_bwd");
    return {
        op.call(gradients[0], ctx->get_saved_variables()[0], ctx->saved_data["gate"].toStringRef()),
        Tensor()};
  }
};

Tensor glu_autograd(const Tensor& gate_up, c10::string_view gate) {
  return Glu::apply(gate_up, std::string(gate));
}

void register_glu(torch::Library& m) {
  m.impl("glu", glu_fwd);
  m.impl("glu_bwd", glu_bwd);
}

TORCH_LIBRARY_IMPL(sarissa, CPU, m) { register_glu(m); }
TORCH_LIBRARY_IMPL(sarissa, CUDA, m) { register_glu(m); }
TORCH_LIBRARY_IMPL(sarissa, Meta, m) { register_glu(m); }
TORCH_LIBRARY_IMPL(sarissa, Autograd, m) { m.impl("glu", glu_autograd); }

}  // namespace

Gate parse_gate(const std::string& name) {
  std::vector<std::string> names;
  for (const auto& [known, gate] : kGateNames) {
    if (name == known) return gate;
    names.push_back(known);
  }
  throw UsageError(
      str("gate '", name, "': expected swiglu, gelu or bilinear", did_you_mean(name, names)));
}

Tensor glu(const Tensor& gate_up, Gate gate) {
  for (const auto& [name, value] : kGateNames) {
    if (value == gate) return call_fwd(gate_up, name);
  }
  TORCH_CHECK(false, "sarissa::glu: unknown gate ", static_cast<int>(gate));
}

}  // namespace sarissa::ops
