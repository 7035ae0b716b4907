#include "sarissa/kernels/rope/rope.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>

#include "sarissa/ops/dispatch.h"
#include "sarissa/ops/ops.h"

namespace sarissa::ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// direction +1: forward; -1: backward, the rotation by the negative angle.
Tensor rotate(const char* op, const Tensor& x, const Tensor& inv_freq, int64_t position,
              double scale, int direction) {
  const kernels::DType dtype = kernel_dtype(x, op, "x");
  TORCH_CHECK(x.dim() == 4 && x.size(3) % 2 == 0, "sarissa::", op, ": x has shape ", x.sizes(),
              "; expected [B, L, H, P] with even P");
  TORCH_CHECK(inv_freq.dim() == 1 && inv_freq.size(0) == x.size(3) / 2 &&
                  inv_freq.scalar_type() == at::kFloat && inv_freq.device() == x.device(),
              "sarissa::", op, ": inv_freq is ", inv_freq.scalar_type(), " ", inv_freq.sizes(),
              " on ", inv_freq.device(), "; expected float32 [", x.size(3) / 2, "] on ",
              x.device());
  TORCH_CHECK(scale > 0, "sarissa::", op, ": scale is ", scale, "; expected a number > 0");
  Tensor y = at::empty(x.sizes(), x.options());
  if (x.is_meta() || x.numel() == 0) return y;
  const Tensor view = x.stride(3) == 1 ? x : x.contiguous();
  const Tensor frequencies = inv_freq.contiguous();
  const kernels::RopeParams params{.batch = x.size(0),
                                   .length = x.size(1),
                                   .heads = x.size(2),
                                   .pairs = x.size(3) / 2,
                                   .x = view.const_data_ptr(),
                                   .x_batch = view.stride(0),
                                   .x_step = view.stride(1),
                                   .x_head = view.stride(2),
                                   .inv_freq = frequencies.const_data_ptr<float>(),
                                   .position = static_cast<double>(position),
                                   .scale = scale,
                                   .direction = direction,
                                   .y = y.mutable_data_ptr()};
  launch(
      x, op, params.batch * params.length, params.heads * x.size(3),
      [&](int64_t begin, int64_t end) { return kernels::rope_cpu(params, dtype, begin, end); },
      [&](const kernels::CudaKernels& cuda, void* stream) {
        return cuda.rope(params, dtype, stream);
      });
  return y;
}

Tensor rope_fwd(const Tensor& x, const Tensor& inv_freq, int64_t position, double scale) {
  return rotate("rope", x, inv_freq, position, scale, 1);
}

Tensor rope_bwd(const Tensor& dy, const Tensor& inv_freq, int64_t position, double scale) {
  return rotate("rope_bwd", dy, inv_freq, position, scale, -1);
}

Tensor call_fwd(const Tensor& x, const Tensor& inv_freq, int64_t position, double scale) {
  static const auto op = find_operator<decltype(rope_fwd)>("sarissa::rope");
  return op.call(x, inv_freq, position, scale);
}

Tensor call_bwd(const Tensor& dy, const Tensor& inv_freq, int64_t position, double scale) {
  static const auto op = find_operator<decltype(rope_bwd)>("sarissa::rope_bwd");
  return op.call(dy, inv_freq, position, scale);
}

class Rope : public torch::autograd::Function<Rope> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& inv_freq,
                        int64_t position, double scale) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({inv_freq});
    ctx->saved_data["position"] = position;
    ctx->saved_data["scale"] = scale;
    return call_fwd(x, inv_freq, position, scale);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const Tensor dx =
        call_bwd(gradients[0], ctx->get_saved_variables()[0], ctx->saved_data["position"].toInt(),
                 ctx->saved_data["scale"].toDouble());
    return {dx, Tensor(), Tensor(), Tensor()};
  }
};

Tensor rope_autograd(const Tensor& x, const Tensor& inv_freq, int64_t position, double scale) {
  return Rope::apply(x, inv_freq, position, scale);
}

void register_rope(torch::Library& m) {
  m.impl("rope", rope_fwd);
  m.impl("rope_bwd", rope_bwd);
}

TORCH_LIBRARY_IMPL(sarissa, CPU, m) { register_rope(m); }
TORCH_LIBRARY_IMPL(sarissa, CUDA, m) { register_rope(m); }
TORCH_LIBRARY_IMPL(sarissa, Meta, m) { register_rope(m); }
TORCH_LIBRARY_IMPL(sarissa, Autograd, m) { m.impl("rope", rope_autograd); }

}  // namespace

Tensor rope(const Tensor& x_BLHP, const Tensor& inv_freq, int64_t position, double scale) {
  return call_fwd(x_BLHP, inv_freq, position, scale);
}

Tensor rope_inverse_frequencies(int64_t head_width, double base, at::Device device) {
  TORCH_CHECK(head_width > 0 && head_width % 2 == 0,
              "sarissa::rope_inverse_frequencies: head_width is ", head_width,
              "; expected an even number > 0");
  TORCH_CHECK(base > 0, "sarissa::rope_inverse_frequencies: base is ", base,
              "; expected a number > 0");
  Tensor inv_freq = at::empty({head_width / 2}, at::TensorOptions().dtype(at::kFloat));
  float* p = inv_freq.mutable_data_ptr<float>();
  for (int64_t d = 0; d < head_width / 2; ++d) {
    p[d] = static_cast<float>(
        std::pow(base, -2.0 * static_cast<double>(d) / static_cast<double>(head_width)));
  }
  return inv_freq.to(device);
}

}  // namespace sarissa::ops
