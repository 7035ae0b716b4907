#include "sarissa/kernels/modal/modal.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "sarissa/kernels/modal/modal_plan.h"
#include "sarissa/kernels/modal/modal_tensor_bwd.h"
#include "sarissa/ops/dispatch.h"
#include "sarissa/ops/ops.h"
#include "sarissa/ops/rows.h"

namespace sarissa::ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

bool given(const OptionalTensor& t) { return t.has_value() && t->defined(); }
OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

/// Contiguous, and begins at a multiple of 16 bytes.
Tensor aligned(const Tensor& t) {
  const Tensor c = t.contiguous();
  const bool good = c.is_meta() || reinterpret_cast<uintptr_t>(c.const_data_ptr()) % 16 == 0;
  return good ? c : c.clone();
}

bool fwd_is_native(const kernels::ModalInputs& in, kernels::DType dtype) {
  return cuda_kernels().modal_fwd_is_native(in, dtype);
}
bool bwd_is_native(const kernels::ModalInputs& in, kernels::DType dtype) {
  return cuda_kernels().modal_bwd_is_native(in, dtype);
}
/// Without what the forward saved.
bool never_native(const kernels::ModalInputs&, kernels::DType) { return false; }

/// The arguments of modal (featurizer undefined) and hyena_modal, checked and in the forms that the
/// kernels take. Keeps the tensors that `in` points into.
struct Arguments {
  const char* op;
  Tensor u;  // z of hyena_modal
  Tensor featurizer, log_poles_GN, residues_GN, skip_D, featurizer_state, state_BDN;
  at::ScalarType compute;  // of parameters, states and parameter gradients
  kernels::DType dtype;
  bool native = false;  // the kernel takes featurizer and skip as the operator has them
  kernels::ModalInputs in;

  Arguments(const char* op, bool (*takes_natively)(const kernels::ModalInputs&, kernels::DType),
            const Tensor& u, const Tensor& featurizer, const Tensor& log_poles,
            const Tensor& residues, const OptionalTensor& skip,
            const OptionalTensor& featurizer_state, const OptionalTensor& state)
      : op(op), u(channels_contiguous(u)) {
    const bool gated = featurizer.defined();
    const char* name = gated ? "z" : "u";
    dtype = kernel_dtype(u, op, name);
    compute = accumulation_type(u);
    TORCH_CHECK(u.dim() == 3, "sarissa::", op, ": ", name, " has shape ", u.sizes(),
                gated ? "; expected [B, L, 3D]" : "; expected [B, L, D]");
    TORCH_CHECK(!gated || u.size(2) % 3 == 0, "sarissa::", op, ": z has ", u.size(2),
                " channels; expected a multiple of 3: [post-gate | pre-gate | value]");
    const int64_t batch = u.size(0), width = gated ? u.size(2) / 3 : u.size(2);
    TORCH_CHECK(width >= 1, "sarissa::", op, ": ", name, " has shape ", u.sizes(),
                "; expected at least one channel");
    TORCH_CHECK(log_poles.dim() == 2 && log_poles.size(0) >= 1 && width % log_poles.size(0) == 0,
                "sarissa::", op, ": log_poles has shape ", log_poles.sizes(),
                "; expected [G, N] with a number of groups G that divides the width ", width);
    TORCH_CHECK(residues.sizes() == log_poles.sizes(), "sarissa::", op, ": residues has shape ",
                residues.sizes(), "; expected that of log_poles, ", log_poles.sizes());
    const int64_t groups = log_poles.size(0), modes = log_poles.size(1);
    log_poles_GN = parameter(log_poles, "log_poles").contiguous();
    residues_GN = parameter(residues, "residues").contiguous();
    in.batch = batch;
    in.length = u.size(1);
    in.width = width;
    in.groups = groups;
    in.modes = modes;
    if (given(state)) {
      check_state(*state, gated ? "inner_state" : "state", {batch, width, modes}, compute);
      state_BDN = state->contiguous();
    }
    const auto data = [](const Tensor& t) {
      return t.defined() && !t.is_meta() ? t.const_data_ptr() : nullptr;
    };
    in.u = data(this->u);
    in.u_batch_stride = this->u.stride(0);
    in.u_time_stride = this->u.stride(1);
    in.log_poles = data(log_poles_GN);
    in.residues = data(residues_GN);
    in.state = data(state_BDN);
    in.featurizer = data(featurizer);
    if (u.is_cuda()) {
      const c10::DeviceGuard guard(u.device());
      native = takes_natively(in, dtype);
    }
    if (given(skip)) {
      TORCH_CHECK(skip->dim() == 1 && skip->size(0) == width, "sarissa::", op, ": skip has shape ",
                  skip->sizes(), "; expected [", width, "]");
      skip_D = parameter(*skip, "skip", in.skip_is_T).contiguous();
      in.skip = data(skip_D);
    }
    if (gated) {
      TORCH_CHECK(
          featurizer.dim() == 2 && featurizer.size(0) == 3 * width && featurizer.size(1) == 3,
          "sarissa::", op, ": featurizer has shape ", featurizer.sizes(), "; expected [", 3 * width,
          ", 3]");
      const Tensor f = parameter(featurizer, "featurizer", in.featurizer_is_T);
      this->featurizer = native ? f.contiguous() : f.t().contiguous();
      in.featurizer = data(this->featurizer);
      const std::vector<int64_t> shape{batch, 2, 3 * width};
      if (given(featurizer_state)) {
        check_state(*featurizer_state, "featurizer_state", shape, u.scalar_type());
      }
      if (given(featurizer_state)) {
        this->featurizer_state = aligned(*featurizer_state);
      } else if (!native) {
        this->featurizer_state = at::zeros(shape, u.options());
      }
      in.featurizer_state = data(this->featurizer_state);
    }
  }

  bool gated() const { return featurizer.defined(); }
  int64_t channels() const { return u.size(2); }
  at::TensorOptions options() const { return u.options(); }
  at::TensorOptions compute_options() const { return u.options().dtype(compute); }

  /// A parameter in the compute dtype.
  Tensor parameter(const Tensor& t, const char* argument) const {
    check_parameter(t, argument);
    return t.to(compute);
  }
  /// A parameter that native kernels take in the element type too.
  Tensor parameter(const Tensor& t, const char* argument, bool& is_T) const {
    check_parameter(t, argument);
    is_T = native && t.scalar_type() == u.scalar_type();
    return is_T ? t : t.to(compute);
  }
  void check_parameter(const Tensor& t, const char* argument) const {
    TORCH_CHECK(t.device() == u.device(), "sarissa::", op, ": ", argument, " is on ", t.device(),
                "; expected ", u.device());
    TORCH_CHECK(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble ||
                    t.scalar_type() == u.scalar_type(),
                "sarissa::", op, ": ", argument, " is ", t.scalar_type(),
                "; expected float32, float64 or ", u.scalar_type());
  }

  void check_state(const Tensor& t, const char* argument, at::IntArrayRef shape,
                   at::ScalarType type) const {
    TORCH_CHECK(t.sizes() == shape && t.scalar_type() == type && t.device() == u.device(),
                "sarissa::", op, ": ", argument, " is ", t.scalar_type(), " ", t.sizes(), " on ",
                t.device(), "; expected ", type, " ", shape, " on ", u.device());
  }

  /// Elements of work of one item, for the split between threads.
  int64_t work() const { return (in.length + 1) * (in.modes + 1) * 16; }

  Tensor workspace(int64_t bytes) const { return at::empty({bytes}, options().dtype(at::kByte)); }
};

struct Outputs {
  Tensor y, state;
  Tensor featurizer_state;  // of hyena_modal
  Tensor saved;             // of hyena_modal; see modal_saved_entries(), empty where that is 0
};

/// How `saved` is laid out; without `save` it is empty.
std::vector<int64_t> saved_shape(const Arguments& args, bool save) {
  const kernels::ModalInputs& in = args.in;
  const int64_t entries =
      save ? kernels::modal_saved_entries(in.length, in.width, in.modes, args.dtype) : 0;
  return {in.batch, entries, in.width, kernels::kModalTensorModes};
}

Outputs forward(const Arguments& args, bool save = false) {
  const kernels::ModalInputs& in = args.in;
  Tensor y = at::empty({in.batch, in.length, in.width}, args.options());
  Tensor state = at::empty({in.batch, in.width, in.modes}, args.compute_options());
  Tensor featurizer_state, saved;
  if (args.gated()) {
    featurizer_state = at::empty({in.batch, 2, 3 * in.width}, args.options());
    const std::vector<int64_t> shape = saved_shape(args, save);
    // Only a GPU fills it.
    saved = args.u.is_cpu() ? at::zeros(shape, args.compute_options())
                            : at::empty(shape, args.compute_options());
  }
  if (args.u.is_meta()) return {y, state, featurizer_state, saved};
  kernels::ModalFwdParams params;
  params.in = in;
  params.y = y.mutable_data_ptr();
  params.state_out = state.mutable_data_ptr();
  if (args.gated()) {
    params.featurizer_state_out = featurizer_state.mutable_data_ptr();
    if (saved.numel() > 0) params.saved = saved.mutable_data_ptr();
  }
  launch(
      args.u, args.op, kernels::modal_items_cpu(in, args.dtype), args.work(),
      [&](int64_t begin, int64_t end) {
        const Tensor workspace = args.workspace(kernels::modal_fwd_workspace_cpu(in, args.dtype));
        kernels::ModalFwdParams mine = params;
        mine.workspace = workspace.mutable_data_ptr();
        return kernels::modal_fwd_cpu(mine, args.dtype, begin, end);
      },
      [&](const kernels::CudaKernels& cuda, void* stream) {
        const Tensor workspace = args.workspace(cuda.modal_fwd_workspace(in, args.dtype));
        params.workspace = workspace.mutable_data_ptr();
        return cuda.modal_fwd(params, args.dtype, stream);
      });
  return {y, state, featurizer_state, saved};
}

struct Gradients {
  Tensor u, featurizer, log_poles, residues, skip, featurizer_state, state;
};

/// Gradients of every argument, in compute dtype for the parameters.
/// `saved`: what hyena_modal returned, or none.
Gradients backward(const Arguments& args, const Tensor& dy, const OptionalTensor& dfeaturizer_state,
                   const OptionalTensor& dstate, const OptionalTensor& saved = std::nullopt) {
  const kernels::ModalInputs& in = args.in;
  const std::vector<int64_t> y_shape{in.batch, in.length, in.width};
  const std::vector<int64_t> state_shape{in.batch, in.width, in.modes};
  const std::vector<int64_t> featurizer_state_shape{in.batch, 2, 3 * in.width};
  args.check_state(dy, "dy", y_shape, args.u.scalar_type());
  if (given(dstate)) args.check_state(*dstate, "d_state", state_shape, args.compute);
  if (given(dfeaturizer_state)) {
    args.check_state(*dfeaturizer_state, "d_featurizer_state", featurizer_state_shape,
                     args.u.scalar_type());
  }
  if (given(saved) && saved->numel() > 0) {
    args.check_state(*saved, "saved", saved_shape(args, true), at::kFloat);
  }

  Gradients out;
  out.u = at::empty({in.batch, in.length, args.channels()}, args.options());
  out.state = at::empty(state_shape, args.compute_options());
  // Native kernels give the gradients of skip and featurizer in the element type where that is
  // theirs.
  const auto parameter_gradient = [&](at::IntArrayRef shape, bool is_T = false) {
    const at::TensorOptions options = is_T ? args.options() : args.compute_options();
    // With an empty batch no kernel runs.
    return in.batch == 0 ? at::zeros(shape, options) : at::empty(shape, options);
  };
  out.log_poles = parameter_gradient({in.groups, in.modes});
  out.residues = parameter_gradient({in.groups, in.modes});
  out.skip = parameter_gradient({in.width}, in.skip_is_T);
  Tensor dfeaturizer;  // as the kernel gives it
  if (args.gated()) {
    out.featurizer_state = at::empty(featurizer_state_shape, args.options());
    const std::vector<int64_t> shape{3 * in.width, 3}, tap_major{3, 3 * in.width};
    dfeaturizer = parameter_gradient(args.native ? shape : tap_major, in.featurizer_is_T);
    out.featurizer = args.native ? dfeaturizer : dfeaturizer.t();
  }
  if (args.u.is_meta() || in.batch == 0) return out;

  Tensor dy_BLD = channels_contiguous(dy);
  if (args.native && !kernels::modal_tensor_rows_fit(dy_BLD.const_data_ptr(), in.batch,
                                                     dy_BLD.stride(0), dy_BLD.stride(1))) {
    dy_BLD = aligned(dy_BLD.clone(at::MemoryFormat::Contiguous));
  }
  const Tensor dstate_BDN = given(dstate) ? dstate->contiguous() : Tensor();
  const Tensor saved_BKDN = given(saved) && saved->numel() > 0 ? aligned(*saved) : Tensor();
  const Tensor dfeaturizer_state_out =
      given(dfeaturizer_state) ? aligned(*dfeaturizer_state) : Tensor();
  Tensor dlog_poles_BND, dresidues_BND, dskip_BD, dfeaturizer_BKC;
  if (!args.native) {
    dlog_poles_BND = at::empty({in.batch, in.modes, in.width}, args.compute_options());
    dresidues_BND = at::empty_like(dlog_poles_BND);
    dskip_BD = at::empty({in.batch, in.width}, args.compute_options());
    if (args.gated()) {
      dfeaturizer_BKC = at::empty({in.batch, 3, 3 * in.width}, args.compute_options());
    }
  }
  kernels::ModalBwdParams params;
  params.in = in;
  params.dy = dy_BLD.const_data_ptr();
  params.dy_batch_stride = dy_BLD.stride(0);
  params.dy_time_stride = dy_BLD.stride(1);
  if (dstate_BDN.defined()) params.dstate_out = dstate_BDN.const_data_ptr();
  if (saved_BKDN.defined()) params.saved = saved_BKDN.const_data_ptr();
  params.du = out.u.mutable_data_ptr();
  params.dstate = out.state.mutable_data_ptr();
  if (!args.native) {
    params.dlog_poles_BND = dlog_poles_BND.mutable_data_ptr();
    params.dresidues_BND = dresidues_BND.mutable_data_ptr();
    params.dskip_BD = dskip_BD.mutable_data_ptr();
    if (args.gated()) params.dfeaturizer_BKC = dfeaturizer_BKC.mutable_data_ptr();
  }
  params.dlog_poles = out.log_poles.mutable_data_ptr();
  params.dresidues = out.residues.mutable_data_ptr();
  params.dskip = out.skip.mutable_data_ptr();
  if (args.gated()) {
    if (dfeaturizer_state_out.defined()) {
      params.dfeaturizer_state_out = dfeaturizer_state_out.const_data_ptr();
    }
    params.dfeaturizer_state = out.featurizer_state.mutable_data_ptr();
    params.dfeaturizer = dfeaturizer.mutable_data_ptr();
  }
  launch(
      args.u, args.op, kernels::modal_items_cpu(in, args.dtype), args.work(),
      [&](int64_t begin, int64_t end) {
        const Tensor workspace = args.workspace(kernels::modal_bwd_workspace_cpu(in, args.dtype));
        kernels::ModalBwdParams mine = params;
        mine.workspace = workspace.mutable_data_ptr();
        return kernels::modal_bwd_cpu(mine, args.dtype, begin, end);
      },
      [&](const kernels::CudaKernels& cuda, void* stream) {
        const Tensor workspace = args.workspace(cuda.modal_bwd_workspace(params, args.dtype));
        params.workspace = workspace.mutable_data_ptr();
        return cuda.modal_bwd(params, args.dtype, stream);
      });
  if (args.u.is_cpu()) check(kernels::modal_sum_cpu(params, args.dtype), args.op);
  return out;
}

std::tuple<Tensor, Tensor> modal_impl(const Tensor& u, const Tensor& log_poles,
                                      const Tensor& residues, const OptionalTensor& skip,
                                      const OptionalTensor& state) {
  const Arguments args("modal", fwd_is_native, u, Tensor(), log_poles, residues, skip, std::nullopt,
                       state);
  const Outputs out = forward(args);
  return {out.y, out.state};
}

/// y, the states of the featurizer and of the convolution, and what the backward wants.
using HyenaOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

HyenaOutputs hyena_modal_impl(const Tensor& z, const Tensor& featurizer, const Tensor& log_poles,
                              const Tensor& residues, const OptionalTensor& skip,
                              const OptionalTensor& featurizer_state,
                              const OptionalTensor& inner_state, bool save) {
  const Arguments args("hyena_modal", fwd_is_native, z, featurizer, log_poles, residues, skip,
                       featurizer_state, inner_state);
  const Outputs out = forward(args, save);
  return {out.y, out.featurizer_state, out.state, out.saved};
}

/// The gradient in the dtype of the parameter.
Tensor like(const Tensor& gradient, const Tensor& parameter) {
  return gradient.to(parameter.scalar_type());
}
Tensor like(const Tensor& gradient, const OptionalTensor& parameter) {
  return given(parameter) ? gradient.to(parameter->scalar_type()) : gradient;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> modal_bwd_impl(
    const Tensor& dy, const OptionalTensor& dstate, const Tensor& u, const Tensor& log_poles,
    const Tensor& residues, const OptionalTensor& skip, const OptionalTensor& state) {
  const Arguments args("modal_bwd", never_native, u, Tensor(), log_poles, residues, skip,
                       std::nullopt, state);
  const Gradients g = backward(args, dy, std::nullopt, dstate);
  return {g.u, like(g.log_poles, log_poles), like(g.residues, residues), like(g.skip, skip),
          g.state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> hyena_modal_bwd_impl(
    const Tensor& dy, const OptionalTensor& dfeaturizer_state, const OptionalTensor& dinner_state,
    const Tensor& z, const Tensor& featurizer, const Tensor& log_poles, const Tensor& residues,
    const OptionalTensor& skip, const OptionalTensor& featurizer_state,
    const OptionalTensor& inner_state, const OptionalTensor& saved) {
  const bool is_saved = given(saved) && saved->numel() > 0;
  const Arguments args("hyena_modal_bwd", is_saved ? bwd_is_native : never_native, z, featurizer,
                       log_poles, residues, skip, featurizer_state, inner_state);
  const Gradients g = backward(args, dy, dfeaturizer_state, dinner_state, saved);
  return {g.u,
          like(g.featurizer, featurizer).contiguous(),
          like(g.log_poles, log_poles),
          like(g.residues, residues),
          like(g.skip, skip),
          g.featurizer_state,
          g.state};
}

std::tuple<Tensor, Tensor> call_modal(const Tensor& u, const Tensor& log_poles,
                                      const Tensor& residues, const OptionalTensor& skip,
                                      const OptionalTensor& state) {
  static const auto op = find_operator<decltype(modal_impl)>("sarissa::modal");
  return op.call(u, log_poles, residues, skip, state);
}

HyenaOutputs call_hyena_modal(const Tensor& z, const Tensor& featurizer, const Tensor& log_poles,
                              const Tensor& residues, const OptionalTensor& skip,
                              const OptionalTensor& featurizer_state,
                              const OptionalTensor& inner_state, bool save) {
  static const auto op = find_operator<decltype(hyena_modal_impl)>("sarissa::hyena_modal");
  return op.call(z, featurizer, log_poles, residues, skip, featurizer_state, inner_state, save);
}

/// An optional input's gradient, undefined where there was no input.
Tensor gradient_of(const Tensor& saved, const Tensor& gradient) {
  return saved.defined() ? gradient : Tensor();
}
Tensor saved_optional(const OptionalTensor& t) { return given(t) ? *t : Tensor(); }

class Modal : public torch::autograd::Function<Modal> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& u, const Tensor& log_poles,
                               const Tensor& residues, const OptionalTensor& skip,
                               const OptionalTensor& state) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({u, log_poles, residues, saved_optional(skip), saved_optional(state)});
    const auto [y, state_out] = call_modal(u, log_poles, residues, skip, state);
    return {y, state_out};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    static const auto op = find_operator<decltype(modal_bwd_impl)>("sarissa::modal_bwd");
    const auto saved = ctx->get_saved_variables();
    const Tensor &u = saved[0], &skip = saved[3], &state = saved[4];
    const auto [du, dlog_poles, dresidues, dskip, dstate] =
        op.call(grad_or_zeros(gradients[0], u.sizes(), u.options()), optional(gradients[1]), u,
                saved[1], saved[2], optional(skip), optional(state));
    return {du, dlog_poles, dresidues, gradient_of(skip, dskip), gradient_of(state, dstate)};
  }
};

class HyenaModal : public torch::autograd::Function<HyenaModal> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& z, const Tensor& featurizer,
                               const Tensor& log_poles, const Tensor& residues,
                               const OptionalTensor& skip, const OptionalTensor& featurizer_state,
                               const OptionalTensor& inner_state, bool save) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->set_materialize_grads(false);
    const auto [y, featurizer_state_out, inner_state_out, saved] = call_hyena_modal(
        z, featurizer, log_poles, residues, skip, featurizer_state, inner_state, save);
    ctx->save_for_backward({z, featurizer, log_poles, residues, saved_optional(skip),
                            saved_optional(featurizer_state), saved_optional(inner_state), saved});
    ctx->mark_non_differentiable({saved});
    return {y, featurizer_state_out, inner_state_out, saved};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    static const auto op =
        find_operator<decltype(hyena_modal_bwd_impl)>("sarissa::hyena_modal_bwd");
    const auto saved = ctx->get_saved_variables();
    const Tensor &z = saved[0], &skip = saved[4], &featurizer_state = saved[5],
                 &inner_state = saved[6];
    const Tensor dy =
        grad_or_zeros(gradients[0], {z.size(0), z.size(1), z.size(2) / 3}, z.options());
    const auto [dz, dfeaturizer, dlog_poles, dresidues, dskip, dfeaturizer_state, dinner_state] =
        op.call(dy, optional(gradients[1]), optional(gradients[2]), z, saved[1], saved[2], saved[3],
                optional(skip), optional(featurizer_state), optional(inner_state), saved[7]);
    return {dz,
            dfeaturizer,
            dlog_poles,
            dresidues,
            gradient_of(skip, dskip),
            gradient_of(featurizer_state, dfeaturizer_state),
            gradient_of(inner_state, dinner_state),
            Tensor()};
  }
};

std::tuple<Tensor, Tensor> modal_autograd(const Tensor& u, const Tensor& log_poles,
                                          const Tensor& residues, const OptionalTensor& skip,
                                          const OptionalTensor& state) {
  const variable_list out = Modal::apply(u, log_poles, residues, skip, state);
  return {out[0], out[1]};
}

HyenaOutputs hyena_modal_autograd(const Tensor& z, const Tensor& featurizer,
                                  const Tensor& log_poles, const Tensor& residues,
                                  const OptionalTensor& skip,
                                  const OptionalTensor& featurizer_state,
                                  const OptionalTensor& inner_state, bool save) {
  const auto differentiated = [](const OptionalTensor& t) {
    return given(t) && t->requires_grad();
  };
  // Inference does not save: the writes cost time.
  save = save || (at::GradMode::is_enabled() &&
                  (z.requires_grad() || featurizer.requires_grad() || log_poles.requires_grad() ||
                   residues.requires_grad() || differentiated(skip) ||
                   differentiated(featurizer_state) || differentiated(inner_state)));
  const variable_list out = HyenaModal::apply(z, featurizer, log_poles, residues, skip,
                                              featurizer_state, inner_state, save);
  return {out[0], out[1], out[2], out[3]};
}

void register_modal(torch::Library& m) {
  m.impl("modal", modal_impl);
  m.impl("modal_bwd", modal_bwd_impl);
  m.impl("hyena_modal", hyena_modal_impl);
  m.impl("hyena_modal_bwd", hyena_modal_bwd_impl);
}

TORCH_LIBRARY_IMPL(sarissa, CPU, m) { register_modal(m); }
TORCH_LIBRARY_IMPL(sarissa, CUDA, m) { register_modal(m); }
TORCH_LIBRARY_IMPL(sarissa, Meta, m) { register_modal(m); }
TORCH_LIBRARY_IMPL(sarissa, Autograd, m) {
  m.impl("modal", modal_autograd);
  m.impl("hyena_modal", hyena_modal_autograd);
}

}  // namespace

std::tuple<Tensor, Tensor> modal(const Tensor& u_BLD, const Tensor& log_poles_GN,
                                 const Tensor& residues_GN, const OptionalTensor& skip_D,
                                 const OptionalTensor& state) {
  return call_modal(u_BLD, log_poles_GN, residues_GN, skip_D, state);
}

std::tuple<Tensor, HyenaState> hyena_modal(const Tensor& z_BLC, const Tensor& featurizer,
                                           const Tensor& log_poles_GN, const Tensor& residues_GN,
                                           const OptionalTensor& skip_D,
                                           const std::optional<HyenaState>& state) {
  const auto part = [&](Tensor HyenaState::*member) {
    return state.has_value() ? optional((*state).*member) : std::nullopt;
  };
  const auto [y, featurizer_state, inner_state, saved] =
      call_hyena_modal(z_BLC, featurizer, log_poles_GN, residues_GN, skip_D,
                       part(&HyenaState::featurizer), part(&HyenaState::inner), false);
  return {y, {featurizer_state, inner_state}};
}

}  // namespace sarissa::ops
