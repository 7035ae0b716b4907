#include "sarissa/kernels/loss/loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
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

void check_targets(const char* op, const Tensor& targets, int64_t rows, const at::Device& device) {
  TORCH_CHECK(targets.dim() == 1 && targets.size(0) == rows && targets.scalar_type() == at::kLong &&
                  targets.device() == device,
              "sarissa::", op, ": targets is ", targets.scalar_type(), " ", targets.sizes(), " on ",
              targets.device(), "; expected int64 [", rows, "] on ", device);
}

void check_logits(const char* op, const Tensor& logits, const Tensor& targets) {
  kernel_dtype(logits, op, "logits");
  TORCH_CHECK(logits.dim() == 2 && logits.size(1) >= 1, "sarissa::", op, ": logits has shape ",
              logits.sizes(), "; expected [N, V] with V >= 1");
  check_targets(op, targets, logits.size(0), logits.device());
}

/// On a GPU reading the targets back would stall the stream: there a bad target gives NaN.
void check_target_range(const char* op, const Tensor& targets, int64_t classes) {
  if (!targets.is_cpu()) return;
  const int64_t* p = targets.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < targets.size(0); ++n) {
    TORCH_CHECK((p[n] >= 0 && p[n] < classes) || p[n] == kernels::kIgnoreTarget, "sarissa::", op,
                ": targets[", n, "] is ", p[n], "; expected 0 .. ", classes - 1, ", or ",
                kernels::kIgnoreTarget, " for a token without a loss");
  }
}

kernels::CrossEntropyParams params_of(const Tensor& rows, const Tensor& targets) {
  return {.rows = rows.size(0),
          .classes = rows.size(1),
          .logits = rows.const_data_ptr(),
          .logits_row = row_stride(rows),
          .targets = targets.const_data_ptr<int64_t>(),
          .loss = nullptr,
          .dloss = nullptr,
          .dlogits = nullptr};
}

Tensor cross_entropy_fwd(const Tensor& logits, const Tensor& targets) {
  constexpr const char* kOp = "cross_entropy";
  check_logits(kOp, logits, targets);
  Tensor loss = at::empty({logits.size(0)}, logits.options().dtype(accumulation_type(logits)));
  if (logits.is_meta() || loss.numel() == 0) return loss;
  const Tensor rows = as_rows(logits), targets_N = targets.contiguous();
  check_target_range(kOp, targets_N, logits.size(1));
  kernels::CrossEntropyParams params = params_of(rows, targets_N);
  params.loss = loss.mutable_data_ptr();
  const kernels::DType dtype = kernel_dtype(logits, kOp, "logits");
  launch(
      logits, kOp, params.rows, params.classes,
      [&](int64_t begin, int64_t end) {
        return kernels::cross_entropy_fwd_cpu(params, dtype, begin, end);
      },
      [&](const kernels::CudaKernels& cuda, void* stream) {
        return cuda.cross_entropy_fwd(params, dtype, stream);
      });
  return loss;
}

Tensor cross_entropy_bwd(const Tensor& dloss, const Tensor& logits, const Tensor& targets,
                         const Tensor& loss) {
  constexpr const char* kOp = "cross_entropy_bwd";
  check_logits(kOp, logits, targets);
  const at::ScalarType compute = accumulation_type(logits);
  for (const auto& [name, t] : {std::pair("dloss", dloss), std::pair("loss", loss)}) {
    TORCH_CHECK(
        t.sizes() == targets.sizes() && t.scalar_type() == compute && t.device() == logits.device(),
        "sarissa::", kOp, ": ", name, " is ", t.scalar_type(), " ", t.sizes(), " on ", t.device(),
        "; expected ", compute, " ", targets.sizes(), " on ", logits.device());
  }
  Tensor dlogits = at::empty(logits.sizes(), logits.options());
  if (logits.is_meta() || dlogits.numel() == 0) return dlogits;
  const Tensor rows = as_rows(logits), targets_N = targets.contiguous();
  const Tensor loss_N = loss.contiguous(), dloss_N = dloss.contiguous();
  kernels::CrossEntropyParams params = params_of(rows, targets_N);
  params.loss = const_cast<void*>(loss_N.const_data_ptr());  // only read by the backward
  params.dloss = dloss_N.const_data_ptr();
  params.dlogits = dlogits.mutable_data_ptr();
  const kernels::DType dtype = kernel_dtype(logits, kOp, "logits");
  launch(
      logits, kOp, params.rows, params.classes,
      [&](int64_t begin, int64_t end) {
        return kernels::cross_entropy_bwd_cpu(params, dtype, begin, end);
      },
      [&](const kernels::CudaKernels& cuda, void* stream) {
        return cuda.cross_entropy_bwd(params, dtype, stream);
      });
  return dlogits;
}

Tensor call_fwd(const Tensor& logits, const Tensor& targets) {
  static const auto op = find_operator<decltype(cross_entropy_fwd)>("sarissa::cross_entropy");
  return op.call(logits, targets);
}

Tensor call_bwd(const Tensor& dloss, const Tensor& logits, const Tensor& targets,
                const Tensor& loss) {
  static const auto op = find_operator<decltype(cross_entropy_bwd)>("sarissa::cross_entropy_bwd");
  return op.call(dloss, logits, targets, loss);
}

class CrossEntropy : public torch::autograd::Function<CrossEntropy> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& logits, const Tensor& targets) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor loss = call_fwd(logits, targets);
    ctx->save_for_backward({logits, targets, loss});
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto saved = ctx->get_saved_variables();
    return {call_bwd(gradients[0], saved[0], saved[1], saved[2]), Tensor()};
  }
};

Tensor cross_entropy_autograd(const Tensor& logits, const Tensor& targets) {
  return CrossEntropy::apply(logits, targets);
}

/// Tokens per chunk: the chunk's logits stay under about 64 MB, and the head's gradient is worth
/// adding to.
int64_t chunk_tokens(const Tensor& head) {
  constexpr int64_t kLogitsBytes = 64 << 20;
  constexpr int64_t kLeast = 128, kMost = 16384;
  return std::clamp<int64_t>(kLogitsBytes / (head.size(0) * head.element_size()), kLeast, kMost);
}

/// accumulated [V, D] += dlogits^T hidden, in accumulated's precision.
void add_head_gradient(Tensor& accumulated, const Tensor& dlogits, const Tensor& hidden) {
  if (dlogits.scalar_type() == accumulated.scalar_type()) {
    accumulated.addmm_(dlogits.t(), hidden);
  } else if (dlogits.is_cuda()) {
    // A bfloat16 product that is never rounded to bfloat16; torch has it for CUDA alone.
    accumulated += at::mm(dlogits.t(), hidden, accumulated.scalar_type());
  } else {
    accumulated.addmm_(dlogits.to(accumulated.scalar_type()).t(),
                       hidden.to(accumulated.scalar_type()));
  }
}

struct LinearCrossEntropyResult {
  Tensor loss;            // scalar
  Tensor dhidden, dhead;  // for dloss = 1, where asked for; dhead in fp32 (fp64)
  Tensor nll;             // [N], where asked for
};

/// One pass over the chunks. The loss is linear in its upstream gradient, so the gradients can be
/// formed while the chunk's logits are there and scaled in the backward (Liger Kernel, arXiv
/// 2410.10989): the logits are never held nor computed twice.
LinearCrossEntropyResult chunked(const Tensor& hidden, const Tensor& head, const Tensor& targets,
                                 const Tensor& weights, bool want_dhidden, bool want_dhead,
                                 bool want_nll) {
  const at::TensorOptions compute = hidden.options().dtype(accumulation_type(hidden));
  const int64_t tokens = hidden.size(0), chunk = chunk_tokens(head);
  LinearCrossEntropyResult result{.loss = at::zeros({}, compute),
                                  .dhidden = want_dhidden ? at::empty_like(hidden) : Tensor(),
                                  .dhead = want_dhead ? at::zeros(head.sizes(), compute) : Tensor(),
                                  .nll = want_nll ? at::empty({tokens}, compute) : Tensor()};
  for (int64_t n = 0; n < tokens; n += chunk) {
    const int64_t count = std::min(chunk, tokens - n);
    const Tensor h = hidden.narrow(0, n, count), t = targets.narrow(0, n, count);
    const Tensor w = weights.narrow(0, n, count);
    const Tensor logits = h.matmul(head.t());
    const Tensor nll = call_fwd(logits, t);
    result.loss += (nll * w).sum();
    if (want_nll) result.nll.narrow(0, n, count).copy_(nll);
    if (!want_dhidden && !want_dhead) continue;
    const Tensor dlogits = call_bwd(w, logits, t, nll);
    if (want_dhidden) result.dhidden.narrow(0, n, count).copy_(dlogits.matmul(head));
    if (want_dhead) add_head_gradient(result.dhead, dlogits, h);
  }
  return result;
}

class LinearCrossEntropy : public torch::autograd::Function<LinearCrossEntropy> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& hidden, const Tensor& head,
                        const Tensor& targets, const Tensor& weights) {
    const auto result = chunked(hidden, head, targets, weights, hidden.requires_grad(),
                                head.requires_grad(), weights.requires_grad());
    ctx->save_for_backward({result.dhidden, result.dhead, result.nll});
    ctx->saved_data["head_type"] = head.scalar_type();
    return result.loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &dloss = gradients[0], &dhidden = saved[0], &dhead = saved[1], &nll = saved[2];
    return {dhidden.defined() ? dhidden * dloss : Tensor(),
            dhead.defined() ? (dhead * dloss).to(ctx->saved_data["head_type"].toScalarType())
                            : Tensor(),
            Tensor(), nll.defined() ? nll * dloss : Tensor()};
  }
};

void register_loss(torch::Library& m) {
  m.impl("cross_entropy", cross_entropy_fwd);
  m.impl("cross_entropy_bwd", cross_entropy_bwd);
}

TORCH_LIBRARY_IMPL(sarissa, CPU, m) { register_loss(m); }
TORCH_LIBRARY_IMPL(sarissa, CUDA, m) { register_loss(m); }
TORCH_LIBRARY_IMPL(sarissa, Meta, m) { register_loss(m); }
TORCH_LIBRARY_IMPL(sarissa, Autograd, m) { m.impl("cross_entropy", cross_entropy_autograd); }
TORCH_LIBRARY_IMPL(sarissa, CompositeImplicitAutograd, m) {
  m.impl("linear_cross_entropy", linear_cross_entropy);
}

}  // namespace

Tensor cross_entropy(const Tensor& logits_NV, const Tensor& targets_N) {
  return call_fwd(logits_NV, targets_N);
}

Tensor linear_cross_entropy(const Tensor& hidden_ND, const Tensor& head_VD, const Tensor& targets_N,
                            const Tensor& weights_N) {
  constexpr const char* kOp = "linear_cross_entropy";
  kernel_dtype(hidden_ND, kOp, "hidden");
  TORCH_CHECK(hidden_ND.dim() == 2, "sarissa::", kOp, ": hidden has shape ", hidden_ND.sizes(),
              "; expected [N, D]");
  TORCH_CHECK(head_VD.dim() == 2 && head_VD.size(0) >= 1 && head_VD.size(1) == hidden_ND.size(1) &&
                  head_VD.scalar_type() == hidden_ND.scalar_type() &&
                  head_VD.device() == hidden_ND.device(),
              "sarissa::", kOp, ": head is ", head_VD.scalar_type(), " ", head_VD.sizes(), " on ",
              head_VD.device(), "; expected ", hidden_ND.scalar_type(), " [V, ", hidden_ND.size(1),
              "] on ", hidden_ND.device(), " as hidden");
  check_targets(kOp, targets_N, hidden_ND.size(0), hidden_ND.device());
  const at::ScalarType compute = accumulation_type(hidden_ND);
  TORCH_CHECK(weights_N.sizes() == targets_N.sizes() && weights_N.scalar_type() == compute &&
                  weights_N.device() == hidden_ND.device(),
              "sarissa::", kOp, ": weights is ", weights_N.scalar_type(), " ", weights_N.sizes(),
              " on ", weights_N.device(), "; expected ", compute, " [", hidden_ND.size(0), "] on ",
              hidden_ND.device());
  const bool needs_gradient =
      at::GradMode::is_enabled() &&
      (hidden_ND.requires_grad() || head_VD.requires_grad() || weights_N.requires_grad());
  if (!needs_gradient) {
    return chunked(hidden_ND, head_VD, targets_N, weights_N, false, false, false).loss;
  }
  return LinearCrossEntropy::apply(hidden_ND, head_VD, targets_N, weights_N);
}

}  // namespace sarissa::ops
