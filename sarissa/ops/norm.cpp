#include "sarissa/kernels/norm/norm.h"

#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "sarissa/ops/dispatch.h"
#include "sarissa/ops/ops.h"
#include "sarissa/ops/rows.h"

namespace sarissa::ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Runs of rows whose weight gradients are summed apart: enough to fill the machine, few enough that
// the workspace stays small beside the rows.
constexpr int64_t kPartsCpu = 64;
constexpr int64_t kPartsCuda = 512;

void check_like(const char* op, const char* argument, const Tensor& t, const Tensor& x) {
  TORCH_CHECK(t.sizes() == x.sizes(), "sarissa::", op, ": ", argument, " has shape ", t.sizes(),
              "; expected the shape of x, ", x.sizes());
  TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.device() == x.device(), "sarissa::", op, ": ",
              argument, " is ", t.scalar_type(), " on ", t.device(), "; expected ", x.scalar_type(),
              " on ", x.device(), " as x");
}

void check_inputs(const char* op, const Tensor& x, const Tensor& weight, double eps) {
  kernel_dtype(x, op, "x");
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) >= 1, "sarissa::", op, ": x has shape ", x.sizes(),
              "; expected [..., D] with D >= 1");
  TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(-1), "sarissa::", op,
              ": weight has shape ", weight.sizes(), "; expected [", x.size(-1),
              "], the last dimension of x");
  TORCH_CHECK(weight.scalar_type() == x.scalar_type() && weight.device() == x.device(),
              "sarissa::", op, ": weight is ", weight.scalar_type(), " on ", weight.device(),
              "; expected ", x.scalar_type(), " on ", x.device(), " as x");
  TORCH_CHECK(eps >= 0, "sarissa::", op, ": eps is ", eps, "; expected a number >= 0");
}

/// y, and the sum where there is a residual.
std::tuple<Tensor, Tensor> forward(const char* op, const Tensor& x, const Tensor* residual,
                                   const Tensor& weight, double eps) {
  check_inputs(op, x, weight, eps);
  if (residual != nullptr) check_like(op, "residual", *residual, x);
  Tensor y = at::empty_like(x, at::MemoryFormat::Contiguous);
  Tensor sum = residual == nullptr ? Tensor() : at::empty_like(y);
  if (x.is_meta() || x.numel() == 0) return {y, sum};
  const Tensor x_ND = as_rows(x), residual_ND = residual == nullptr ? Tensor() : as_rows(*residual);
  const Tensor weight_D = weight.contiguous();
  const kernels::RmsNormFwdParams params{
      .rows = x_ND.size(0),
      .width = x_ND.size(1),
      .x = x_ND.const_data_ptr(),
      .x_row = row_stride(x_ND),
      .residual = residual == nullptr ? nullptr : residual_ND.const_data_ptr(),
      .residual_row = residual == nullptr ? 0 : row_stride(residual_ND),
      .weight = weight_D.const_data_ptr(),
      .eps = eps,
      .sum = residual == nullptr ? nullptr : sum.mutable_data_ptr(),
      .y = y.mutable_data_ptr()};
  const kernels::DType dtype = kernel_dtype(x, op, "x");
  launch(
      x, op, params.rows, params.width,
      [&](int64_t begin, int64_t end) {
        return kernels::rms_norm_fwd_cpu(params, dtype, begin, end);
      },
      [&](const kernels::CudaKernels& cuda, void* stream) {
        return cuda.rms_norm_fwd(params, dtype, stream);
      });
  return {y, sum};
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  return std::get<0>(forward("rms_norm", x, nullptr, weight, eps));
}

std::tuple<Tensor, Tensor> residual_rms_norm_fwd(const Tensor& x, const Tensor& residual,
                                                 const Tensor& weight, double eps) {
  return forward("residual_rms_norm", x, &residual, weight, eps);
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const std::optional<Tensor>& dsum,
                                        const Tensor& sum, const Tensor& weight, double eps) {
  constexpr const char* kOp = "rms_norm_bwd";
  check_inputs(kOp, sum, weight, eps);
  check_like(kOp, "dy", dy, sum);
  const bool has_dsum = dsum.has_value() && dsum->defined();
  if (has_dsum) check_like(kOp, "dsum", *dsum, sum);
  Tensor dx = at::empty_like(sum, at::MemoryFormat::Contiguous);
  Tensor dweight = at::empty_like(weight, at::MemoryFormat::Contiguous);
  if (sum.is_meta()) return {dx, dweight};
  const Tensor dy_ND = as_rows(dy), sum_ND = as_rows(sum);
  const Tensor dsum_ND = has_dsum ? as_rows(*dsum) : Tensor();
  const Tensor weight_D = weight.contiguous();
  const int64_t rows = sum_ND.size(0), width = sum_ND.size(1);
  const int64_t most_parts = sum.is_cuda() ? kPartsCuda : kPartsCpu;
  const int64_t rows_per_part = std::max<int64_t>(1, (rows + most_parts - 1) / most_parts);
  const int64_t parts = (rows + rows_per_part - 1) / rows_per_part;
  Tensor partial = at::empty({parts, width}, sum.options().dtype(accumulation_type(sum)));
  const kernels::RmsNormBwdParams params{.rows = rows,
                                         .width = width,
                                         .parts = parts,
                                         .rows_per_part = rows_per_part,
                                         .dy = dy_ND.const_data_ptr(),
                                         .dy_row = row_stride(dy_ND),
                                         .dsum = has_dsum ? dsum_ND.const_data_ptr() : nullptr,
                                         .dsum_row = has_dsum ? row_stride(dsum_ND) : 0,
                                         .sum = sum_ND.const_data_ptr(),
                                         .sum_row = row_stride(sum_ND),
                                         .weight = weight_D.const_data_ptr(),
                                         .eps = eps,
                                         .dx = dx.mutable_data_ptr(),
                                         .partial = partial.mutable_data_ptr(),
                                         .dweight = dweight.mutable_data_ptr()};
  const kernels::DType dtype = kernel_dtype(sum, kOp, "sum");
  launch(
      sum, kOp, parts, rows_per_part * width,
      [&](int64_t begin, int64_t end) {
        return kernels::rms_norm_bwd_cpu(params, dtype, begin, end);
      },
      [&](const kernels::CudaKernels& cuda, void* stream) {
        return cuda.rms_norm_bwd(params, dtype, stream);
      });
  launch(
      sum, kOp, width, parts,
      [&](int64_t begin, int64_t end) {
        return kernels::rms_norm_bwd_weight_cpu(params, dtype, begin, end);
      },
      [&](const kernels::CudaKernels& cuda, void* stream) {
        return cuda.rms_norm_bwd_weight(params, dtype, stream);
      });
  return {dx, dweight};
}

Tensor call_rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  static const auto op = find_operator<decltype(rms_norm)>("sarissa::rms_norm");
  return op.call(x, weight, eps);
}

std::tuple<Tensor, Tensor> call_residual_rms_norm(const Tensor& x, const Tensor& residual,
                                                  const Tensor& weight, double eps) {
  static const auto op =
      find_operator<decltype(residual_rms_norm_fwd)>("sarissa::residual_rms_norm");
  return op.call(x, residual, weight, eps);
}

std::tuple<Tensor, Tensor> call_bwd(const Tensor& dy, const std::optional<Tensor>& dsum,
                                    const Tensor& sum, const Tensor& weight, double eps) {
  static const auto op = find_operator<decltype(rms_norm_bwd)>("sarissa::rms_norm_bwd");
  return op.call(dy, dsum, sum, weight, eps);
}

class RmsNorm : public torch::autograd::Function<RmsNorm> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, double eps) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, weight});
    ctx->saved_data["eps"] = eps;
    return call_rms_norm(x, weight, eps);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto saved = ctx->get_saved_variables();
    const auto [dx, dweight] =
        call_bwd(gradients[0], std::nullopt, saved[0], saved[1], ctx->saved_data["eps"].toDouble());
    return {dx, dweight, Tensor()};
  }
};

class ResidualRmsNorm : public torch::autograd::Function<ResidualRmsNorm> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& residual,
                               const Tensor& weight, double eps) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [y, sum] = call_residual_rms_norm(x, residual, weight, eps);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({sum, weight});
    ctx->saved_data["eps"] = eps;
    return {y, sum};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const Tensor &dy = gradients[0], &dsum = gradients[1];
    if (!dy.defined()) return {dsum, dsum, Tensor(), Tensor()};
    const auto saved = ctx->get_saved_variables();
    const auto [dx, dweight] = call_bwd(dy, dsum.defined() ? std::optional(dsum) : std::nullopt,
                                        saved[0], saved[1], ctx->saved_data["eps"].toDouble());
    return {dx, dx, dweight, Tensor()};
  }
};

Tensor rms_norm_autograd(const Tensor& x, const Tensor& weight, double eps) {
  return RmsNorm::apply(x, weight, eps);
}

std::tuple<Tensor, Tensor> residual_rms_norm_autograd(const Tensor& x, const Tensor& residual,
                                                      const Tensor& weight, double eps) {
  const variable_list out = ResidualRmsNorm::apply(x, residual, weight, eps);
  return {out[0], out[1]};
}

void register_norm(torch::Library& m) {
  m.impl("rms_norm", rms_norm);
  m.impl("residual_rms_norm", residual_rms_norm_fwd);
  m.impl("rms_norm_bwd", rms_norm_bwd);
}

TORCH_LIBRARY_IMPL(sarissa, CPU, m) { register_norm(m); }
TORCH_LIBRARY_IMPL(sarissa, CUDA, m) { register_norm(m); }
TORCH_LIBRARY_IMPL(sarissa, Meta, m) { register_norm(m); }
TORCH_LIBRARY_IMPL(sarissa, Autograd, m) {
  m.impl("rms_norm", rms_norm_autograd);
  m.impl("residual_rms_norm", residual_rms_norm_autograd);
}

}  // namespace

std::tuple<Tensor, Tensor> residual_rms_norm(const Tensor& x, const std::optional<Tensor>& residual,
                                             const Tensor& weight, double eps) {
  if (!residual.has_value()) return {call_rms_norm(x, weight, eps), x};
  return call_residual_rms_norm(x, *residual, weight, eps);
}

}  // namespace sarissa::ops
