// torch.ops.sarissa.swr and phalanx: checks, allocation, dispatch and autograd.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>

#include "sarissa/kernels/swr/swr.h"
#include "sarissa/ops/dispatch.h"
#include "sarissa/ops/ops.h"
#include "sarissa/ops/rows.h"

namespace sarissa::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using SwrOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

using SwrSignature = SwrOutputs(const at::Tensor& a, const at::Tensor& u, int64_t window,
                                const OptionalTensor& w, const OptionalTensor& r,
                                const OptionalTensor& v, const OptionalTensor& index);
using SwrBwdSignature = SwrOutputs(const at::Tensor& a, const at::Tensor& u, int64_t window,
                                   const OptionalTensor& w, const OptionalTensor& r,
                                   const OptionalTensor& v, const OptionalTensor& index,
                                   const at::Tensor& dx, const OptionalTensor& dw,
                                   const OptionalTensor& dr, const OptionalTensor& dv);
using PhalanxOutputs =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using PhalanxSignature = PhalanxOutputs(const at::Tensor& abcv, int64_t heads, int64_t kv_heads,
                                        int64_t window, double decay_max, const OptionalTensor& w,
                                        const OptionalTensor& r, const OptionalTensor& v,
                                        const OptionalTensor& index);
using PhalanxBwdOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using PhalanxBwdSignature = PhalanxBwdOutputs(const at::Tensor& abcv, int64_t heads,
                                              int64_t kv_heads, int64_t window, double decay_max,
                                              const OptionalTensor& w, const OptionalTensor& r,
                                              const OptionalTensor& v, const OptionalTensor& index,
                                              const OptionalTensor& saved, const at::Tensor& dy,
                                              const OptionalTensor& dw, const OptionalTensor& dr,
                                              const OptionalTensor& dv);

// Null for none.
const void* data_or_null(const OptionalTensor& x) {
  return x.has_value() && x->defined() ? x->const_data_ptr() : nullptr;
}

// A given state, checked: [B, H, P], [B, H], [B, H, P] in the accumulation dtype and int32 [B], all
// contiguous and on one device.
struct State {
  OptionalTensor w, r, v, index;

  State(const char* op, const OptionalTensor& w_in, const OptionalTensor& r_in,
        const OptionalTensor& v_in, const OptionalTensor& index_in, const at::Tensor& like,
        int64_t batch, int64_t heads, int64_t width, int64_t window) {
    const bool given = w_in.has_value();
    TORCH_CHECK(
        r_in.has_value() == given && v_in.has_value() == given && index_in.has_value() == given,
        "sarissa::", op, ": expected all of the state's w, r, v, index or none of them");
    if (!given) return;
    const at::ScalarType dtype = accumulation_type(like);
    w = part(op, "w", *w_in, {batch, heads, width}, dtype, like);
    r = part(op, "r", *r_in, {batch, heads}, dtype, like);
    v = part(op, "v", *v_in, {batch, heads, width}, dtype, like);
    index = part(op, "index", *index_in, {batch}, at::kInt, like);
    if (window == kFullRecurrence || !like.is_cpu()) return;
    for (int64_t b = 0; b < batch; ++b) {
      const int32_t i = index->const_data_ptr<int32_t>()[b];
      TORCH_CHECK(0 <= i && i < window, "sarissa::", op, ": index[", b, "] is ", i,
                  "; expected 0 <= index < window = ", window);
    }
  }

  static at::Tensor part(const char* op, const char* name, const at::Tensor& x,
                         at::IntArrayRef sizes, at::ScalarType dtype, const at::Tensor& like) {
    TORCH_CHECK(x.sizes() == sizes, "sarissa::", op, ": ", name, " has shape ", x.sizes(),
                "; expected ", sizes);
    TORCH_CHECK(x.scalar_type() == dtype, "sarissa::", op, ": ", name, " is ", x.scalar_type(),
                "; expected ", dtype);
    TORCH_CHECK(x.device() == like.device(), "sarissa::", op, ": ", name, " is on ", x.device(),
                "; expected ", like.device());
    return x.contiguous();
  }
};

// A gradient of the state after the last step, contiguous in the accumulation dtype.
OptionalTensor state_gradient(const OptionalTensor& gradient, const at::Tensor& like) {
  if (!gradient.has_value() || !gradient->defined()) return std::nullopt;
  return gradient->to(accumulation_type(like)).contiguous();
}

struct StateOutputs {
  at::Tensor w, r, v, index;

  StateOutputs(const at::Tensor& like, int64_t batch, int64_t heads, int64_t width) {
    const at::TensorOptions options = like.options().dtype(accumulation_type(like));
    w = at::empty({batch, heads, width}, options);
    r = at::empty({batch, heads}, options);
    v = at::empty({batch, heads, width}, options);
    index = at::empty({batch}, like.options().dtype(at::kInt));
  }
};

void set_state(kernels::SwrInputs& in, const State& state) {
  in.w = data_or_null(state.w);
  in.r = data_or_null(state.r);
  in.v = data_or_null(state.v);
  in.index = static_cast<const int32_t*>(data_or_null(state.index));
}

void check_window(const char* op, int64_t window) {
  TORCH_CHECK(window >= 0 && window <= std::numeric_limits<int32_t>::max(), "sarissa::", op,
              ": window is ", window, "; expected 1 .. 2^31 - 1, or 0 for the full recurrence");
}

void run_fwd(const char* op, kernels::SwrFwdParams& params, const at::Tensor& like,
             kernels::DType dtype) {
  const kernels::SwrInputs& in = params.in;
  const at::Tensor workspace =
      at::empty({kernels::swr_fwd_workspace(in.batch, in.length, in.heads, in.width, in.window,
                                            in.gated, !like.is_cpu())},
                like.options().dtype(accumulation_type(like)));
  params.workspace = workspace.mutable_data_ptr();
  launch(
      like, op, in.batch * in.heads, (in.length + 1) * in.width,
      [&](int64_t begin, int64_t end) { return kernels::swr_fwd_cpu(params, dtype, begin, end); },
      [&](const kernels::CudaKernels& cuda, void* stream) {
        return cuda.swr_fwd(params, dtype, stream);
      });
}

void run_bwd(const char* op, kernels::SwrBwdParams& params, const at::Tensor& like,
             kernels::DType dtype) {
  const kernels::SwrInputs& in = params.in;
  const auto plan = kernels::swr_bwd_workspace(in.batch, in.length, in.heads, in.kv_heads, in.width,
                                               in.window, in.gated, !like.is_cpu());
  const at::Tensor workspace =
      at::empty({plan.total()}, like.options().dtype(accumulation_type(like)));
  params.workspace = workspace.mutable_data_ptr();
  launch(
      like, op, in.batch * in.kv_heads, 4 * (in.length + 1) * in.width * (in.heads / in.kv_heads),
      [&](int64_t begin, int64_t end) { return kernels::swr_bwd_cpu(params, dtype, begin, end); },
      [&](const kernels::CudaKernels& cuda, void* stream) {
        return cuda.swr_bwd(params, dtype, stream);
      });
}

// ---- swr

// The arguments of swr and swr_bwd, checked and described for the kernels; holds what they point
// at.
struct SwrProblem {
  at::Tensor a, u;
  kernels::DType dtype;
  State state;
  kernels::SwrInputs in;

  SwrProblem(const char* op, const at::Tensor& a_BLH, const at::Tensor& u_BLHP, int64_t window,
             const OptionalTensor& w, const OptionalTensor& r, const OptionalTensor& v,
             const OptionalTensor& index)
      : a(check_a(op, a_BLH, u_BLHP)),
        u(channels_contiguous(u_BLHP)),
        dtype(kernel_dtype(u, op, "u")),
        state(op, w, r, v, index, u, u.size(0), u.size(2), u.size(3), window) {
    check_window(op, window);
    if (u.is_meta()) return;  // a traced tensor has symbolic sizes and no address to ask for
    in = {.batch = u.size(0),
          .length = u.size(1),
          .heads = u.size(2),
          .width = u.size(3),
          .window = window,
          .a = a.const_data_ptr(),
          .a_batch = a.stride(0),
          .a_step = a.stride(1),
          .u = u.const_data_ptr(),
          .u_batch = u.stride(0),
          .u_step = u.stride(1),
          .u_head = u.stride(2),
          .kv_heads = u.size(2)};
    set_state(in, state);
  }

  static at::Tensor check_a(const char* op, const at::Tensor& a, const at::Tensor& u) {
    TORCH_CHECK(u.dim() == 4, "sarissa::", op, ": u has shape ", u.sizes(),
                "; expected [B, L, H, P]");
    TORCH_CHECK(u.size(2) >= 1 && u.size(3) >= 1, "sarissa::", op, ": u has shape ", u.sizes(),
                "; expected at least one head and one channel");
    TORCH_CHECK(a.sizes() == u.sizes().slice(0, 3), "sarissa::", op, ": a has shape ", a.sizes(),
                "; expected u's [B, L, H] = ", u.sizes().slice(0, 3));
    TORCH_CHECK(a.scalar_type() == u.scalar_type(), "sarissa::", op, ": a is ", a.scalar_type(),
                "; expected u's ", u.scalar_type());
    TORCH_CHECK(a.device() == u.device(), "sarissa::", op, ": a is on ", a.device(),
                "; expected u's device ", u.device());
    return channels_contiguous(a);
  }
};

SwrOutputs swr_kernel(const at::Tensor& a, const at::Tensor& u, int64_t window,
                      const OptionalTensor& w, const OptionalTensor& r, const OptionalTensor& v,
                      const OptionalTensor& index) {
  const SwrProblem problem("swr", a, u, window, w, r, v, index);
  const at::Tensor x = at::empty(u.sizes(), u.options());
  const StateOutputs out(u, u.size(0), u.size(2), u.size(3));
  if (u.is_meta()) return {x, out.w, out.r, out.v, out.index};
  kernels::SwrFwdParams params{.in = problem.in,
                               .x = x.mutable_data_ptr(),
                               .w = out.w.mutable_data_ptr(),
                               .r = out.r.mutable_data_ptr(),
                               .v = out.v.mutable_data_ptr(),
                               .index = static_cast<int32_t*>(out.index.mutable_data_ptr())};
  run_fwd("swr", params, u, problem.dtype);
  return {x, out.w, out.r, out.v, out.index};
}

SwrOutputs swr_bwd_kernel(const at::Tensor& a, const at::Tensor& u, int64_t window,
                          const OptionalTensor& w, const OptionalTensor& r, const OptionalTensor& v,
                          const OptionalTensor& index, const at::Tensor& dx,
                          const OptionalTensor& dw, const OptionalTensor& dr,
                          const OptionalTensor& dv) {
  const SwrProblem problem("swr_bwd", a, u, window, w, r, v, index);
  TORCH_CHECK(dx.sizes() == u.sizes() && dx.scalar_type() == u.scalar_type(),
              "sarissa::swr_bwd: dx is ", dx.scalar_type(), dx.sizes(), "; expected u's ",
              u.scalar_type(), u.sizes());
  const at::Tensor grad = channels_contiguous(dx);
  const OptionalTensor dw_out = state_gradient(dw, u), dr_out = state_gradient(dr, u),
                       dv_out = state_gradient(dv, u);
  const at::Tensor da = at::empty(a.sizes(), a.options());
  const at::Tensor du = at::empty(u.sizes(), u.options());
  const StateOutputs out(u, u.size(0), u.size(2), u.size(3));
  if (u.is_meta()) return {da, du, out.w, out.r, out.v};
  kernels::SwrBwdParams params{.in = problem.in,
                               .dx = grad.const_data_ptr(),
                               .dx_batch = grad.stride(0),
                               .dx_step = grad.stride(1),
                               .dx_head = grad.stride(2),
                               .dw_out = data_or_null(dw_out),
                               .dr_out = data_or_null(dr_out),
                               .dv_out = data_or_null(dv_out),
                               .da = da.mutable_data_ptr(),
                               .da_step = a.size(2),
                               .du = du.mutable_data_ptr(),
                               .du_step = u.size(2) * u.size(3),
                               .db = nullptr,
                               .dc = nullptr,
                               .dgate_step = 0,
                               .dw = out.w.mutable_data_ptr(),
                               .dr = out.r.mutable_data_ptr(),
                               .dv = out.v.mutable_data_ptr(),
                               .workspace = nullptr};
  run_bwd("swr_bwd", params, u, problem.dtype);
  return {da, du, out.w, out.r, out.v};
}

// ---- phalanx

struct PhalanxProblem {
  at::Tensor abcv;
  kernels::DType dtype;
  int64_t width;
  State state;
  kernels::SwrInputs in;
  int64_t b_offset, c_offset, v_offset;  // channels of the packed row

  PhalanxProblem(const char* op, const at::Tensor& packed, int64_t heads, int64_t kv_heads,
                 int64_t window, double decay_max, const OptionalTensor& w, const OptionalTensor& r,
                 const OptionalTensor& v, const OptionalTensor& index)
      : abcv(channels_contiguous(packed)),
        dtype(kernel_dtype(packed, op, "abcv")),
        width(head_width(op, packed, heads, kv_heads)),
        state(op, w, r, v, index, packed, packed.size(0), heads, width, window) {
    check_window(op, window);
    TORCH_CHECK(decay_max > 0.0 && decay_max <= 1.0, "sarissa::", op, ": decay_max is ", decay_max,
                "; expected 0 < decay_max <= 1");
    if (abcv.is_meta()) return;
    b_offset = heads;
    c_offset = b_offset + kv_heads * width;
    v_offset = c_offset + kv_heads * width;
    const char* const base = static_cast<const char*>(abcv.const_data_ptr());
    const int64_t size = abcv.element_size();
    const int64_t batch_stride = abcv.stride(0), step_stride = abcv.stride(1);
    in = {.batch = abcv.size(0),
          .length = abcv.size(1),
          .heads = heads,
          .width = width,
          .window = window,
          .a = base,
          .a_batch = batch_stride,
          .a_step = step_stride,
          .u = base + v_offset * size,
          .u_batch = batch_stride,
          .u_step = step_stride,
          .u_head = width,
          .gated = true,
          .b = base + b_offset * size,
          .c = base + c_offset * size,
          .gate_batch = batch_stride,
          .gate_step = step_stride,
          .kv_heads = kv_heads,
          .decay_max = decay_max};
    set_state(in, state);
  }

  // P of C = H + 2 Hkv P + H P.
  static int64_t head_width(const char* op, const at::Tensor& abcv, int64_t heads,
                            int64_t kv_heads) {
    TORCH_CHECK(abcv.dim() == 3, "sarissa::", op, ": abcv has shape ", abcv.sizes(),
                "; expected [B, L, C]");
    TORCH_CHECK(heads >= 1, "sarissa::", op, ": heads is ", heads, "; expected at least 1");
    TORCH_CHECK(kv_heads >= 1 && heads % kv_heads == 0, "sarissa::", op, ": kv_heads is ", kv_heads,
                "; expected a divisor of heads = ", heads);
    const int64_t channels = abcv.size(2) - heads;
    TORCH_CHECK(channels > 0 && channels % (2 * kv_heads + heads) == 0, "sarissa::", op,
                ": abcv has C = ", abcv.size(2), " channels; expected H + (2 Hkv + H) P = ", heads,
                " + ", 2 * kv_heads + heads, " P for a head width P >= 1");
    return channels / (2 * kv_heads + heads);
  }
};

// Where the parts of `saved` lie; nulls for an empty one.
kernels::SwrSaved saved_parts(const at::Tensor& saved, const kernels::SwrSavedSizes& sizes) {
  if (saved.numel() == 0) return {};
  char* const base = static_cast<char*>(saved.mutable_data_ptr());
  return {.states = base,
          .products = base + sizes.states * saved.element_size(),
          .chunks = sizes.chunks};
}

PhalanxOutputs phalanx_kernel(const at::Tensor& abcv, int64_t heads, int64_t kv_heads,
                              int64_t window, double decay_max, const OptionalTensor& w,
                              const OptionalTensor& r, const OptionalTensor& v,
                              const OptionalTensor& index) {
  const PhalanxProblem problem("phalanx", abcv, heads, kv_heads, window, decay_max, w, r, v, index);
  const at::Tensor y =
      at::empty({abcv.size(0), abcv.size(1), heads * problem.width}, abcv.options());
  const StateOutputs out(abcv, abcv.size(0), heads, problem.width);
  // The size depends on the shape alone, so that a traced call sees the size of the real one. Only
  // a GPU fills it.
  const kernels::SwrSavedSizes sizes = kernels::swr_saved_sizes(
      abcv.size(0), abcv.size(1), heads, problem.width, window, problem.dtype);
  const at::TensorOptions saved_options = abcv.options().dtype(accumulation_type(abcv));
  const at::Tensor saved = abcv.is_cpu() ? at::zeros({sizes.total()}, saved_options)
                                         : at::empty({sizes.total()}, saved_options);
  if (abcv.is_meta()) return {y, out.w, out.r, out.v, out.index, saved};
  kernels::SwrFwdParams params{.in = problem.in,
                               .x = y.mutable_data_ptr(),
                               .w = out.w.mutable_data_ptr(),
                               .r = out.r.mutable_data_ptr(),
                               .v = out.v.mutable_data_ptr(),
                               .index = static_cast<int32_t*>(out.index.mutable_data_ptr()),
                               .saved = saved_parts(saved, sizes)};
  run_fwd("phalanx", params, abcv, problem.dtype);
  return {y, out.w, out.r, out.v, out.index, saved};
}

PhalanxBwdOutputs phalanx_bwd_kernel(const at::Tensor& abcv, int64_t heads, int64_t kv_heads,
                                     int64_t window, double decay_max, const OptionalTensor& w,
                                     const OptionalTensor& r, const OptionalTensor& v,
                                     const OptionalTensor& index, const OptionalTensor& saved,
                                     const at::Tensor& dy, const OptionalTensor& dw,
                                     const OptionalTensor& dr, const OptionalTensor& dv) {
  const PhalanxProblem problem("phalanx_bwd", abcv, heads, kv_heads, window, decay_max, w, r, v,
                               index);
  const std::array<int64_t, 3> y_sizes{abcv.size(0), abcv.size(1), heads * problem.width};
  TORCH_CHECK(dy.sizes() == at::IntArrayRef(y_sizes) && dy.scalar_type() == abcv.scalar_type(),
              "sarissa::phalanx_bwd: dy is ", dy.scalar_type(), dy.sizes(), "; expected ",
              abcv.scalar_type(), at::IntArrayRef(y_sizes));
  const at::Tensor grad = channels_contiguous(dy);
  const kernels::SwrSavedSizes sizes = kernels::swr_saved_sizes(
      abcv.size(0), abcv.size(1), heads, problem.width, window, problem.dtype);
  at::Tensor kept;  // what phalanx saved, if it was given
  if (saved.has_value() && saved->defined()) {
    TORCH_CHECK(saved->dim() == 1 && saved->size(0) == sizes.total() &&
                    saved->scalar_type() == accumulation_type(abcv) &&
                    saved->device() == abcv.device(),
                "sarissa::phalanx_bwd: saved is ", saved->scalar_type(), saved->sizes(), " on ",
                saved->device(), "; expected what phalanx returned for these arguments, ",
                accumulation_type(abcv), " [", sizes.total(), "] on ", abcv.device());
    kept = saved->contiguous();
  }
  const OptionalTensor dw_out = state_gradient(dw, abcv), dr_out = state_gradient(dr, abcv),
                       dv_out = state_gradient(dv, abcv);
  const at::Tensor dabcv = at::empty(abcv.sizes(), abcv.options());
  const StateOutputs out(abcv, abcv.size(0), heads, problem.width);
  if (abcv.is_meta()) return {dabcv, out.w, out.r, out.v};
  char* const base = static_cast<char*>(dabcv.mutable_data_ptr());
  const int64_t size = dabcv.element_size();
  kernels::SwrBwdParams params{
      .in = problem.in,
      .dx = grad.const_data_ptr(),
      .dx_batch = grad.stride(0),
      .dx_step = grad.stride(1),
      .dx_head = problem.width,
      .dw_out = data_or_null(dw_out),
      .dr_out = data_or_null(dr_out),
      .dv_out = data_or_null(dv_out),
      .da = base,
      .da_step = abcv.size(2),
      .du = base + problem.v_offset * size,
      .du_step = abcv.size(2),
      .db = base + problem.b_offset * size,
      .dc = base + problem.c_offset * size,
      .dgate_step = abcv.size(2),
      .dw = out.w.mutable_data_ptr(),
      .dr = out.r.mutable_data_ptr(),
      .dv = out.v.mutable_data_ptr(),
      .workspace = nullptr,
      .saved = kept.defined() ? saved_parts(kept, sizes) : kernels::SwrSaved{}};
  run_bwd("phalanx_bwd", params, abcv, problem.dtype);
  return {dabcv, out.w, out.r, out.v};
}

// ---- autograd

template <class Signature>
const c10::TypedOperatorHandle<Signature>& handle();
template <>
const c10::TypedOperatorHandle<SwrSignature>& handle() {
  static const auto op = find_operator<SwrSignature>("sarissa::swr");
  return op;
}
template <>
const c10::TypedOperatorHandle<SwrBwdSignature>& handle() {
  static const auto op = find_operator<SwrBwdSignature>("sarissa::swr_bwd");
  return op;
}
template <>
const c10::TypedOperatorHandle<PhalanxSignature>& handle() {
  static const auto op = find_operator<PhalanxSignature>("sarissa::phalanx");
  return op;
}
template <>
const c10::TypedOperatorHandle<PhalanxBwdSignature>& handle() {
  static const auto op = find_operator<PhalanxBwdSignature>("sarissa::phalanx_bwd");
  return op;
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Saved tensors may be undefined where an optional argument was not given.
OptionalTensor saved(const at::Tensor& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; }
at::Tensor to_save(const OptionalTensor& x) { return x.value_or(at::Tensor()); }

variable_list as_list(AutogradContext* ctx, const SwrOutputs& outputs) {
  const auto& [x, w, r, v, index] = outputs;
  ctx->mark_non_differentiable({index});
  ctx->set_materialize_grads(false);
  return {x, w, r, v, index};
}

struct SwrFunction : torch::autograd::Function<SwrFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& a, const at::Tensor& u,
                               int64_t window, const OptionalTensor& w, const OptionalTensor& r,
                               const OptionalTensor& v, const OptionalTensor& index) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({a, u, to_save(w), to_save(r), to_save(v), to_save(index)});
    ctx->saved_data["window"] = window;
    return as_list(ctx, handle<SwrSignature>().call(a, u, window, w, r, v, index));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list in = ctx->get_saved_variables();
    const at::Tensor& u = in[1];
    const auto [da, du, dw, dr, dv] = handle<SwrBwdSignature>().call(
        in[0], u, ctx->saved_data["window"].toInt(), saved(in[2]), saved(in[3]), saved(in[4]),
        saved(in[5]), grad_or_zeros(grads[0], u.sizes(), u.options()), saved(grads[1]),
        saved(grads[2]), saved(grads[3]));
    const bool state = in[2].defined();
    const at::Tensor none;
    return {da, du, none, state ? dw : none, state ? dr : none, state ? dv : none, none};
  }
};

struct PhalanxFunction : torch::autograd::Function<PhalanxFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& abcv, int64_t heads,
                               int64_t kv_heads, int64_t window, double decay_max,
                               const OptionalTensor& w, const OptionalTensor& r,
                               const OptionalTensor& v, const OptionalTensor& index) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["kv_heads"] = kv_heads;
    ctx->saved_data["window"] = window;
    ctx->saved_data["decay_max"] = decay_max;
    const auto [y, w_out, r_out, v_out, index_out, kept] =
        handle<PhalanxSignature>().call(abcv, heads, kv_heads, window, decay_max, w, r, v, index);
    ctx->save_for_backward({abcv, to_save(w), to_save(r), to_save(v), to_save(index), kept});
    ctx->mark_non_differentiable({index_out, kept});
    ctx->set_materialize_grads(false);
    return {y, w_out, r_out, v_out, index_out, kept};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list in = ctx->get_saved_variables();
    const at::Tensor& abcv = in[0];
    const int64_t heads = ctx->saved_data["heads"].toInt();
    const int64_t kv_heads = ctx->saved_data["kv_heads"].toInt();
    const int64_t width = (abcv.size(2) - heads) / (2 * kv_heads + heads);
    const auto [dabcv, dw, dr, dv] = handle<PhalanxBwdSignature>().call(
        abcv, heads, kv_heads, ctx->saved_data["window"].toInt(),
        ctx->saved_data["decay_max"].toDouble(), saved(in[1]), saved(in[2]), saved(in[3]),
        saved(in[4]), saved(in[5]),
        grad_or_zeros(grads[0], {abcv.size(0), abcv.size(1), heads * width}, abcv.options()),
        saved(grads[1]), saved(grads[2]), saved(grads[3]));
    const bool state = in[1].defined();
    const at::Tensor none;
    return {dabcv, none, none, none, none, state ? dw : none, state ? dr : none, state ? dv : none,
            none};
  }
};

SwrOutputs as_outputs(const variable_list& list) {
  return {list[0], list[1], list[2], list[3], list[4]};
}

SwrOutputs swr_autograd(const at::Tensor& a, const at::Tensor& u, int64_t window,
                        const OptionalTensor& w, const OptionalTensor& r, const OptionalTensor& v,
                        const OptionalTensor& index) {
  return as_outputs(SwrFunction::apply(a, u, window, w, r, v, index));
}

PhalanxOutputs phalanx_autograd(const at::Tensor& abcv, int64_t heads, int64_t kv_heads,
                                int64_t window, double decay_max, const OptionalTensor& w,
                                const OptionalTensor& r, const OptionalTensor& v,
                                const OptionalTensor& index) {
  const variable_list list =
      PhalanxFunction::apply(abcv, heads, kv_heads, window, decay_max, w, r, v, index);
  return {list[0], list[1], list[2], list[3], list[4], list[5]};
}

void register_swr(torch::Library& m) {
  m.impl("swr", swr_kernel);
  m.impl("swr_bwd", swr_bwd_kernel);
  m.impl("phalanx", phalanx_kernel);
  m.impl("phalanx_bwd", phalanx_bwd_kernel);
}

std::tuple<at::Tensor, SwrState> with_state(SwrOutputs outputs) {
  auto& [x, w, r, v, index] = outputs;
  return {x, SwrState{w, r, v, index}};
}

}  // namespace

TORCH_LIBRARY_IMPL(sarissa, CPU, m) { register_swr(m); }
TORCH_LIBRARY_IMPL(sarissa, CUDA, m) { register_swr(m); }
TORCH_LIBRARY_IMPL(sarissa, Meta, m) { register_swr(m); }
TORCH_LIBRARY_IMPL(sarissa, Autograd, m) {
  m.impl("swr", swr_autograd);
  m.impl("phalanx", phalanx_autograd);
}

std::tuple<at::Tensor, SwrState> swr(const at::Tensor& a_BLH, const at::Tensor& u_BLHP,
                                     int64_t window, const std::optional<SwrState>& state) {
  const auto& op = handle<SwrSignature>();
  if (!state) {
    return with_state(
        op.call(a_BLH, u_BLHP, window, std::nullopt, std::nullopt, std::nullopt, std::nullopt));
  }
  return with_state(op.call(a_BLH, u_BLHP, window, state->w, state->r, state->v, state->index));
}

std::tuple<at::Tensor, SwrState> phalanx(const at::Tensor& abcv_BLC, int64_t heads,
                                         int64_t kv_heads, int64_t window, double decay_max,
                                         const std::optional<SwrState>& state) {
  const auto& op = handle<PhalanxSignature>();
  const auto [y, w, r, v, index, saved] =
      state ? op.call(abcv_BLC, heads, kv_heads, window, decay_max, state->w, state->r, state->v,
                      state->index)
            : op.call(abcv_BLC, heads, kv_heads, window, decay_max, std::nullopt, std::nullopt,
                      std::nullopt, std::nullopt);
  return {y, SwrState{w, r, v, index}};
}

}  // namespace sarissa::ops
