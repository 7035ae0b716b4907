// torch.ops.sarissa.fir and hyena_fir: checks, allocation, dispatch and autograd. The maths is in
// sarissa/kernels/fir/README.md.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "sarissa/kernels/fir/fir.h"
#include "sarissa/kernels/fir/fir_plan.h"
#include "sarissa/kernels/fir/fir_tensor_plan.h"
#include "sarissa/ops/dispatch.h"
#include "sarissa/ops/ops.h"
#include "sarissa/ops/rows.h"

namespace sarissa::ops {
namespace {

using at::Tensor;
using kernels::DType;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kHistory = 2;  // rows of the featurizer's state

bool given(const OptionalTensor& t) { return t.has_value() && t->defined(); }

/// The tensor arguments of either operator; `featurizer` is undefined for fir, where x is u.
struct Arguments {
  const char* op;
  const char* x_name;
  Tensor x;
  Tensor featurizer;
  Tensor taps;
  OptionalTensor skip;
  OptionalTensor featurizer_state;
  OptionalTensor state;

  bool gated() const { return featurizer.defined(); }
  int64_t batch() const { return x.size(0); }
  int64_t length() const { return x.size(1); }
  int64_t width() const { return x.size(2) / (gated() ? 3 : 1); }
  int64_t num_taps() const { return taps.size(1); }
  at::ScalarType state_type() const { return gated() ? accumulation_type(x) : x.scalar_type(); }
  std::array<int64_t, 3> state_sizes() const { return {batch(), num_taps() - 1, width()}; }
};

Arguments fir_arguments(const Tensor& u, const Tensor& taps, const OptionalTensor& state) {
  return {.op = "fir", .x_name = "u", .x = u, .taps = taps, .state = state};
}

Arguments hyena_fir_arguments(const Tensor& z, const Tensor& featurizer, const Tensor& taps,
                              const OptionalTensor& skip, const OptionalTensor& featurizer_state,
                              const OptionalTensor& inner_state) {
  return {.op = "hyena_fir",
          .x_name = "z",
          .x = z,
          .featurizer = featurizer,
          .taps = taps,
          .skip = skip,
          .featurizer_state = featurizer_state,
          .state = inner_state};
}

void check_parameter(const Arguments& a, const Tensor& t, const char* name, at::IntArrayRef sizes) {
  TORCH_CHECK(t.sizes() == sizes, "sarissa::", a.op, ": ", name, " has shape ", t.sizes(),
              "; expected ", sizes);
  TORCH_CHECK(t.scalar_type() == a.x.scalar_type() || t.scalar_type() == at::kFloat,
              "sarissa::", a.op, ": ", name, " is ", t.scalar_type(), "; expected ",
              a.x.scalar_type(), " like ", a.x_name, ", or Float");
  TORCH_CHECK(t.device() == a.x.device(), "sarissa::", a.op, ": ", name, " is on ", t.device(),
              "; expected ", a.x.device(), " like ", a.x_name);
}

void check_state(const Arguments& a, const OptionalTensor& t, const char* name, at::ScalarType type,
                 at::IntArrayRef sizes) {
  if (!given(t)) return;
  TORCH_CHECK(t->sizes() == sizes, "sarissa::", a.op, ": ", name, " has shape ", t->sizes(),
              "; expected ", sizes);
  TORCH_CHECK(t->scalar_type() == type, "sarissa::", a.op, ": ", name, " is ", t->scalar_type(),
              "; expected ", type);
  TORCH_CHECK(t->device() == a.x.device(), "sarissa::", a.op, ": ", name, " is on ", t->device(),
              "; expected ", a.x.device(), " like ", a.x_name);
}

DType check_arguments(const Arguments& a) {
  const DType dtype = kernel_dtype(a.x, a.op, a.x_name);
  const int64_t thirds = a.gated() ? 3 : 1;
  TORCH_CHECK(a.x.dim() == 3 && a.x.size(2) > 0 && a.x.size(2) % thirds == 0, "sarissa::", a.op,
              ": ", a.x_name, " has shape ", a.x.sizes(), "; expected ",
              a.gated() ? "[B, L, 3D]" : "[B, L, D]", " with D > 0");
  TORCH_CHECK(a.taps.dim() == 2 && a.taps.size(0) > 0 && a.taps.size(1) > 0 &&
                  a.width() % a.taps.size(0) == 0,
              "sarissa::", a.op, ": taps has shape ", a.taps.sizes(),
              "; expected [G, W] with W > 0 and G a divisor of D = ", a.width());
  check_parameter(a, a.taps, "taps", a.taps.sizes());
  if (a.gated()) check_parameter(a, a.featurizer, "featurizer", {3 * a.width(), 3});
  if (given(a.skip)) check_parameter(a, *a.skip, "skip", {a.width()});
  check_state(a, a.featurizer_state, "featurizer_state", a.x.scalar_type(),
              {a.batch(), kHistory, 3 * a.width()});
  check_state(a, a.state, a.gated() ? "inner_state" : "state", a.state_type(), a.state_sizes());
  return dtype;
}

/// Fills rows [B, n, N] with the last n rows of [state; x] along time; x [B, L, N], state like rows
/// or zeros.
void copy_last_rows(const OptionalTensor& state, const Tensor& x, const Tensor& rows) {
  const int64_t n = rows.size(1), new_rows = std::min(n, x.size(1));
  rows.narrow(1, n - new_rows, new_rows).copy_(x.narrow(1, x.size(1) - new_rows, new_rows));
  const Tensor old_rows = rows.narrow(1, 0, n - new_rows);
  if (given(state)) {
    old_rows.copy_(state->narrow(1, new_rows, n - new_rows));
  } else {
    old_rows.zero_();
  }
}

const void* data(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
void* mutable_data(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

Tensor contiguous_as(const Tensor& t, at::ScalarType type) { return t.to(type).contiguous(); }

/// The arguments in the kernels' form. Points the parameters at tensors that it owns.
struct Inputs {
  at::TensorOptions options;  // of the arithmetic type
  bool native;                // the kernel takes parameters as the operator has them
  Tensor x, featurizer, featurizer_state, taps, skip, state;
  std::vector<Tensor> workspaces;

  template <class Params, class TakesNatively>
  Inputs(const Arguments& a, DType dtype, Params& p, const TakesNatively& takes_natively)
      : options(a.x.options().dtype(accumulation_type(a.x))), x(channels_contiguous(a.x)) {
    p.batch = a.batch();
    p.length = a.length();
    p.width = a.width();
    p.groups = a.taps.size(0);
    p.num_taps = a.num_taps();
    p.x = data(x);
    p.x_stride_b = x.stride(0);
    p.x_stride_l = x.stride(1);
    p.featurizer = data(a.featurizer);
    if (given(a.featurizer_state)) p.featurizer_state = data(*a.featurizer_state);
    if (given(a.state)) p.state = data(*a.state);
    native = !x.is_cpu() && takes_natively(p, dtype);

    const at::ScalarType type = accumulation_type(a.x);
    const auto parameter = [&](const Tensor& t, bool& is_T) {
      is_T = t.scalar_type() == a.x.scalar_type();
      return native ? t.contiguous() : contiguous_as(t, type);
    };
    taps = parameter(a.taps, p.taps_is_T);
    if (given(a.skip)) skip = parameter(*a.skip, p.skip_is_T);
    if (a.gated()) {
      featurizer = parameter(native ? a.featurizer : a.featurizer.t(), p.featurizer_is_T);
    }
    if (given(a.state)) state = contiguous_as(*a.state, type);
    if (given(a.featurizer_state)) {
      featurizer_state = a.featurizer_state->contiguous();
    } else if (a.gated() && !native) {
      featurizer_state = at::zeros({a.batch(), kHistory, 3 * a.width()}, x.options());
    }
    p.featurizer = data(featurizer);
    p.featurizer_state = data(featurizer_state);
    p.taps = data(taps);
    p.skip = data(skip);
    p.state = data(state);
  }

  /// New memory of the arithmetic type; null for no elements.
  void* workspace(int64_t elements) {
    if (elements == 0) return nullptr;
    workspaces.push_back(at::empty({elements}, options));
    return mutable_data(workspaces.back());
  }
};

/// Runs the CPU stages in turn, each split among the threads.
template <class Params>
struct CpuStages {
  const char* op;
  const Params& p;
  DType dtype;

  template <class Stage>
  void operator()(Stage* stage, int64_t items, int64_t elements_per_item) const {
    parallel_range(items, elements_per_item, op,
                   [&](int64_t begin, int64_t end) { return stage(p, dtype, begin, end); });
  }
};

constexpr int64_t kItemElements = kernels::kFirTimeChunk * kernels::kFirBlock;

kernels::FirItems cpu_items(const kernels::FirParams& p, DType dtype) {
  return kernels::FirItems(p, dtype == DType::kFloat64 ? sizeof(double) : sizeof(float));
}

/// Fills y and, when gated, the states after it.
void forward(const Arguments& a, DType dtype, const Tensor& y,
             const Tensor& featurizer_state_out = {}, const Tensor& state_out = {}) {
  kernels::FirParams p{};
  Inputs inputs(a, dtype, p, kernels::fir_fwd_is_native);
  p.y = mutable_data(y);
  p.state_out = mutable_data(state_out);
  if (inputs.native) {
    p.featurizer_state_out = mutable_data(featurizer_state_out);
  } else if (a.gated()) {
    copy_last_rows(a.featurizer_state, a.x, featurizer_state_out);
  }
  kernels::FirWorkspace sizes{};
  if (a.x.is_cpu()) {
    sizes = kernels::fir_workspace_cpu(p, inputs.options.dtype().itemsize());
  } else if (!inputs.native) {
    sizes = kernels::fir_workspace_cuda(p);
  }
  p.u = inputs.workspace(sizes.u);
  p.packed_taps = inputs.workspace(sizes.packed_taps);
  if (!a.x.is_cpu()) {
    const c10::DeviceGuard guard(a.x.device());
    check(cuda_kernels().fir_fwd(p, dtype, cuda_stream(a.x)), a.op);
    return;
  }
  const CpuStages<kernels::FirParams> run{a.op, p, dtype};
  const kernels::FirItems items = cpu_items(p, dtype);
  run(kernels::fir_pack_taps_cpu, items.pack_taps, p.num_taps * 16);
  run(kernels::fir_gate_cpu, items.gate, kItemElements);
  run(kernels::fir_fwd_cpu, items.fwd, kItemElements);
}

/// Gradients of the inputs, each in its input's shape; those of absent inputs have no elements.
struct Gradients {
  Tensor x, featurizer, taps, skip, featurizer_state, state;
};

Gradients backward(const Arguments& a, const Tensor& dy, const OptionalTensor& d_featurizer_state,
                   const OptionalTensor& d_state) {
  const DType dtype = check_arguments(a);
  TORCH_CHECK(dy.sizes() == at::IntArrayRef({a.batch(), a.length(), a.width()}) &&
                  dy.scalar_type() == a.x.scalar_type() && dy.device() == a.x.device(),
              "sarissa::", a.op, "_bwd: dy is ", dy.scalar_type(), " ", dy.sizes(), " on ",
              dy.device(), "; expected ", a.x.scalar_type(), " [", a.batch(), ", ", a.length(),
              ", ", a.width(), "] on ", a.x.device());
  check_state(a, d_featurizer_state, "the gradient of the featurizer_state output",
              a.x.scalar_type(), {a.batch(), kHistory, 3 * a.width()});
  check_state(a, d_state, "the gradient of the state output", a.state_type(), a.state_sizes());

  const auto options = a.x.options().dtype(accumulation_type(a.x));
  const int64_t D = a.width();
  Gradients g;
  g.x = at::empty(a.x.sizes(), a.x.options());
  g.taps = at::empty(a.taps.sizes(), a.taps.options());
  g.skip = given(a.skip) ? at::empty({D}, a.skip->options()) : at::empty({0}, options);
  g.state = at::empty(given(a.state) ? a.state->sizes() : at::IntArrayRef{0}, options);
  if (a.gated()) g.featurizer = at::empty({3 * D, 3}, a.featurizer.options());
  const auto z_state = [&] { return at::empty({a.batch(), kHistory, 3 * D}, a.x.options()); };
  g.featurizer_state = given(a.featurizer_state) ? z_state() : at::empty({0}, a.x.options());
  if (a.batch() == 0) {
    g.taps.zero_();
    g.skip.zero_();
    if (a.gated()) g.featurizer.zero_();
  } else if (!a.x.is_meta()) {
    kernels::FirBwdParams p{};
    const Tensor dy_rows = channels_contiguous(dy);
    p.dy = data(dy_rows);
    p.dy_stride_b = dy_rows.stride(0);
    p.dy_stride_l = dy_rows.stride(1);
    Tensor d_featurizer_state_out, d_state_out;
    if (given(d_featurizer_state)) d_featurizer_state_out = d_featurizer_state->contiguous();
    if (given(d_state)) d_state_out = contiguous_as(*d_state, accumulation_type(a.x));
    p.d_featurizer_state_out = data(d_featurizer_state_out);
    p.d_state_out = data(d_state_out);
    const c10::DeviceGuard guard(a.x.device());
    Inputs inputs(a, dtype, p, [](const kernels::FirBwdParams& params, DType dtype) {
      return cuda_kernels().fir_bwd_is_native(params, dtype);
    });
    p.dx = mutable_data(g.x);
    // Native kernels make the parameters' gradients as the operator has them and need not make
    // that of the featurizer's state. The others use the arithmetic type, take the featurizer
    // tap by tap, and always write the gradient of its state.
    Tensor d_z_state = g.featurizer_state;
    if (!inputs.native) {
      g.taps = at::empty(a.taps.sizes(), options);
      if (given(a.skip)) g.skip = at::empty({D}, options);
      if (a.gated()) {
        g.featurizer = at::empty({3, 3 * D}, options);
        if (!given(a.featurizer_state)) d_z_state = z_state();
      }
    }
    p.d_featurizer = mutable_data(g.featurizer);
    if (d_z_state.numel() > 0) p.d_featurizer_state = mutable_data(d_z_state);
    p.d_state = given(a.state) ? mutable_data(g.state) : nullptr;
    p.d_taps = mutable_data(g.taps);
    p.d_skip = given(a.skip) ? mutable_data(g.skip) : nullptr;
    const kernels::FirWorkspace sizes =
        a.x.is_cpu() ? kernels::fir_workspace_cpu(p, options.dtype().itemsize())
                     : cuda_kernels().fir_bwd_workspace(p, dtype);
    p.u = inputs.workspace(sizes.u);
    p.packed_taps = inputs.workspace(sizes.packed_taps);
    p.dq = inputs.workspace(sizes.dq);
    p.dc = inputs.workspace(sizes.dc);
    p.taps_partial = inputs.workspace(sizes.taps_partial);
    p.featurizer_partial = inputs.workspace(sizes.featurizer_partial);
    if (a.x.is_cpu()) {
      const CpuStages<kernels::FirBwdParams> run{a.op, p, dtype};
      const kernels::FirItems items = cpu_items(p, dtype);
      run(kernels::fir_pack_taps_cpu, items.pack_taps, p.num_taps * 16);
      run(kernels::fir_gate_cpu, items.gate, kItemElements);
      run(kernels::fir_bwd_output_cpu, items.bwd_output, kItemElements);
      run(kernels::fir_bwd_taps_cpu, items.bwd_taps, kItemElements);
      run(kernels::fir_sum_taps_cpu, items.sum_taps, p.num_taps * 16);
      run(kernels::fir_sum_groups_cpu, items.sum_groups, p.num_taps * D / p.groups);
      run(kernels::fir_bwd_input_cpu, items.bwd_input, kItemElements);
      if (a.gated()) {
        run(kernels::fir_bwd_featurizer_cpu, items.bwd_featurizer, kItemElements);
        run(kernels::fir_sum_featurizer_cpu, items.sum_featurizer, kItemElements);
      }
    } else {
      check(cuda_kernels().fir_bwd(p, dtype, cuda_stream(a.x)), a.op);
    }
    if (a.gated() && !inputs.native) g.featurizer = g.featurizer.t().contiguous();
  }
  g.taps = g.taps.to(a.taps.scalar_type());
  if (given(a.skip)) g.skip = g.skip.to(a.skip->scalar_type());
  if (given(a.state)) g.state = g.state.to(a.state->scalar_type());
  if (a.gated()) g.featurizer = g.featurizer.to(a.featurizer.scalar_type());
  return g;
}

std::tuple<Tensor, Tensor> fir_kernel(const Tensor& u, const Tensor& taps,
                                      const OptionalTensor& state) {
  const Arguments a = fir_arguments(u, taps, state);
  const DType dtype = check_arguments(a);
  const Tensor y = at::empty(u.sizes(), u.options());
  const Tensor state_out = at::empty(a.state_sizes(), u.options());
  if (!u.is_meta()) {
    copy_last_rows(state, u, state_out);
    if (u.numel() > 0) forward(a, dtype, y);
  }
  return {y, state_out};
}

std::tuple<Tensor, Tensor, Tensor> fir_bwd_kernel(const Tensor& dy, const OptionalTensor& d_state,
                                                  const Tensor& u, const Tensor& taps,
                                                  const OptionalTensor& state) {
  Gradients g = backward(fir_arguments(u, taps, state), dy, std::nullopt, d_state);
  return {g.x, g.taps, g.state};
}

std::tuple<Tensor, Tensor, Tensor> hyena_fir_kernel(const Tensor& z, const Tensor& featurizer,
                                                    const Tensor& taps, const OptionalTensor& skip,
                                                    const OptionalTensor& featurizer_state,
                                                    const OptionalTensor& inner_state) {
  const Arguments a = hyena_fir_arguments(z, featurizer, taps, skip, featurizer_state, inner_state);
  const DType dtype = check_arguments(a);
  const Tensor y = at::empty({a.batch(), a.length(), a.width()}, z.options());
  const Tensor featurizer_state_out = at::empty({a.batch(), kHistory, 3 * a.width()}, z.options());
  const Tensor state_out = at::empty(a.state_sizes(), z.options().dtype(accumulation_type(z)));
  if (!z.is_meta() && a.batch() > 0) forward(a, dtype, y, featurizer_state_out, state_out);
  return {y, featurizer_state_out, state_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> hyena_fir_bwd_kernel(
    const Tensor& dy, const OptionalTensor& d_featurizer_state, const OptionalTensor& d_inner_state,
    const Tensor& z, const Tensor& featurizer, const Tensor& taps, const OptionalTensor& skip,
    const OptionalTensor& featurizer_state, const OptionalTensor& inner_state) {
  Gradients g =
      backward(hyena_fir_arguments(z, featurizer, taps, skip, featurizer_state, inner_state), dy,
               d_featurizer_state, d_inner_state);
  return {g.x, g.featurizer, g.taps, g.skip, g.featurizer_state, g.state};
}

std::tuple<Tensor, Tensor> call_fir(const Tensor& u, const Tensor& taps,
                                    const OptionalTensor& state) {
  static const auto op = find_operator<decltype(fir_kernel)>("sarissa::fir");
  return op.call(u, taps, state);
}

std::tuple<Tensor, Tensor, Tensor> call_hyena_fir(const Tensor& z, const Tensor& featurizer,
                                                  const Tensor& taps, const OptionalTensor& skip,
                                                  const OptionalTensor& featurizer_state,
                                                  const OptionalTensor& inner_state) {
  static const auto op = find_operator<decltype(hyena_fir_kernel)>("sarissa::hyena_fir");
  return op.call(z, featurizer, taps, skip, featurizer_state, inner_state);
}

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
Tensor value_or_undefined(const OptionalTensor& t) { return given(t) ? *t : Tensor(); }

namespace autograd = torch::autograd;

class FirFunction : public autograd::Function<FirFunction> {
 public:
  static autograd::variable_list forward(autograd::AutogradContext* ctx, const Tensor& u,
                                         const Tensor& taps, const OptionalTensor& state) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({u, taps, value_or_undefined(state)});
    ctx->set_materialize_grads(false);
    const auto [y, state_out] = call_fir(u, taps, state);
    return {y, state_out};
  }

  static autograd::variable_list backward(autograd::AutogradContext* ctx,
                                          const autograd::variable_list& grads) {
    static const auto op = find_operator<decltype(fir_bwd_kernel)>("sarissa::fir_bwd");
    const auto saved = ctx->get_saved_variables();
    const Tensor& u = saved[0];
    auto [du, d_taps, d_state] = op.call(grad_or_zeros(grads[0], u.sizes(), u.options()),
                                         optional(grads[1]), u, saved[1], optional(saved[2]));
    return {du, d_taps, saved[2].defined() ? d_state : Tensor()};
  }
};

class HyenaFirFunction : public autograd::Function<HyenaFirFunction> {
 public:
  static autograd::variable_list forward(autograd::AutogradContext* ctx, const Tensor& z,
                                         const Tensor& featurizer, const Tensor& taps,
                                         const OptionalTensor& skip,
                                         const OptionalTensor& featurizer_state,
                                         const OptionalTensor& inner_state) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({z, featurizer, taps, value_or_undefined(skip),
                            value_or_undefined(featurizer_state), value_or_undefined(inner_state)});
    ctx->set_materialize_grads(false);
    const auto [y, featurizer_state_out, inner_state_out] =
        call_hyena_fir(z, featurizer, taps, skip, featurizer_state, inner_state);
    return {y, featurizer_state_out, inner_state_out};
  }

  static autograd::variable_list backward(autograd::AutogradContext* ctx,
                                          const autograd::variable_list& grads) {
    static const auto op = find_operator<decltype(hyena_fir_bwd_kernel)>("sarissa::hyena_fir_bwd");
    const auto saved = ctx->get_saved_variables();
    const Tensor& z = saved[0];
    const Tensor dy = grad_or_zeros(grads[0], {z.size(0), z.size(1), z.size(2) / 3}, z.options());
    auto [dz, d_featurizer, d_taps, d_skip, d_featurizer_state, d_inner_state] =
        op.call(dy, optional(grads[1]), optional(grads[2]), z, saved[1], saved[2],
                optional(saved[3]), optional(saved[4]), optional(saved[5]));
    return {dz,
            d_featurizer,
            d_taps,
            saved[3].defined() ? d_skip : Tensor(),
            saved[4].defined() ? d_featurizer_state : Tensor(),
            saved[5].defined() ? d_inner_state : Tensor()};
  }
};

std::tuple<Tensor, Tensor> fir_autograd(const Tensor& u, const Tensor& taps,
                                        const OptionalTensor& state) {
  const auto out = FirFunction::apply(u, taps, state);
  return {out[0], out[1]};
}

std::tuple<Tensor, Tensor, Tensor> hyena_fir_autograd(const Tensor& z, const Tensor& featurizer,
                                                      const Tensor& taps,
                                                      const OptionalTensor& skip,
                                                      const OptionalTensor& featurizer_state,
                                                      const OptionalTensor& inner_state) {
  const auto out =
      HyenaFirFunction::apply(z, featurizer, taps, skip, featurizer_state, inner_state);
  return {out[0], out[1], out[2]};
}

void register_fir(torch::Library& m) {
  m.impl("fir", fir_kernel);
  m.impl("fir_bwd", fir_bwd_kernel);
  m.impl("hyena_fir", hyena_fir_kernel);
  m.impl("hyena_fir_bwd", hyena_fir_bwd_kernel);
}

TORCH_LIBRARY_IMPL(sarissa, CPU, m) { register_fir(m); }
TORCH_LIBRARY_IMPL(sarissa, CUDA, m) { register_fir(m); }
TORCH_LIBRARY_IMPL(sarissa, Meta, m) { register_fir(m); }
TORCH_LIBRARY_IMPL(sarissa, Autograd, m) {
  m.impl("fir", fir_autograd);
  m.impl("hyena_fir", hyena_fir_autograd);
}

}  // namespace

std::tuple<Tensor, Tensor> fir(const Tensor& u_BLD, const Tensor& taps_GW,
                               const OptionalTensor& state) {
  return call_fir(u_BLD, taps_GW, state);
}

std::tuple<Tensor, HyenaState> hyena_fir(const Tensor& z_BLC, const Tensor& featurizer,
                                         const Tensor& taps_GW, const OptionalTensor& skip_D,
                                         const std::optional<HyenaState>& state) {
  auto [y, featurizer_state, inner_state] = call_hyena_fir(
      z_BLC, featurizer, taps_GW, skip_D, state ? optional(state->featurizer) : std::nullopt,
      state ? optional(state->inner) : std::nullopt);
  return {y, {featurizer_state, inner_state}};
}

}  // namespace sarissa::ops
