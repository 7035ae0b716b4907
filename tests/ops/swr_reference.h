// The step semantics of sliding window recurrences written out with ATen operators, one step at a
// time and differentiable: what the swr and phalanx tests compare against.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <map>
#include <string>

#include "sarissa/ops/ops.h"
#include "tests/support/compare.h"

namespace sarissa::test {

using ops::SwrState;
using SwrResult = std::tuple<at::Tensor, SwrState>;

/// swr() in the dtype of its inputs.
inline SwrResult reference_swr(const at::Tensor& a, const at::Tensor& u, int64_t window,
                               const std::optional<SwrState>& state) {
  const int64_t batch = u.size(0), length = u.size(1), heads = u.size(2), width = u.size(3);
  at::Tensor w = state ? state->w : at::zeros({batch, heads, width}, u.options());
  at::Tensor r = state ? state->r : at::ones({batch, heads}, u.options());
  at::Tensor v = state ? state->v : at::zeros({batch, heads, width}, u.options());
  at::Tensor index =
      state ? state->index.to(at::kLong) : at::zeros({batch}, u.options().dtype(at::kLong));
  if (window == ops::kFullRecurrence) {
    v = w + r.unsqueeze(-1) * v;
    w = at::zeros_like(w);
    r = at::ones_like(r);
    index = at::zeros_like(index);
  }
  std::vector<at::Tensor> x;
  for (int64_t t = 0; t < length; ++t) {
    const at::Tensor a_t = a.select(1, t);
    if (window == ops::kFullRecurrence) {
      v = a_t.unsqueeze(-1) * v + u.select(1, t);
      x.push_back(v);
      continue;
    }
    w = a_t.unsqueeze(-1) * w + u.select(1, t);
    r = a_t * r;
    x.push_back(w + r.unsqueeze(-1) * v);
    index = index + 1;
    const at::Tensor ends = (index == window).view({batch, 1});
    v = at::where(ends.unsqueeze(-1), w, v);
    w = at::where(ends.unsqueeze(-1), at::zeros_like(w), w);
    r = at::where(ends, at::ones_like(r), r);
    index = at::where(index == window, at::zeros_like(index), index);
  }
  return {length > 0 ? at::stack(x, 1) : u.clone(), SwrState{w, r, v, index.to(at::kInt)}};
}

/// One call's inputs and upstream gradients; undefined: not given.
struct SwrCase {
  std::vector<at::Tensor> inputs;  // the operator's differentiable inputs except the state
  std::optional<SwrState> state;
  at::Tensor dx, dw, dr, dv;

  /// Inputs and dx in `dtype`, states in its accumulation dtype, all on `device`.
  SwrCase to(at::Device device, at::ScalarType dtype) const {
    const auto state_type = dtype == at::kDouble ? at::kDouble : at::kFloat;
    SwrCase out = *this;
    for (auto& x : out.inputs) x = x.to(device, dtype);
    if (state) {
      out.state = SwrState{state->w.to(device, state_type), state->r.to(device, state_type),
                           state->v.to(device, state_type), state->index.to(device)};
    }
    out.dx = dx.to(device, dtype);
    for (at::Tensor* g : {&out.dw, &out.dr, &out.dv}) {
      if (g->defined()) *g = g->to(device, state_type);
    }
    return out;
  }
};

using SwrFunction =
    std::function<SwrResult(const std::vector<at::Tensor>&, const std::optional<SwrState>&)>;
using Named = std::map<std::string, at::Tensor>;

/// Outputs "x", "w", "r", "v", "index" and the gradients "d_input0", ..., "d_w", "d_r", "d_v" of
/// sum(outputs * upstream gradients).
inline Named run(const SwrFunction& f, const SwrCase& problem) {
  std::vector<at::Tensor> leaves;
  Named named;
  std::vector<std::string> names;
  const auto leaf = [&](const std::string& name, const at::Tensor& x) {
    leaves.push_back(x.detach().requires_grad_(true));
    names.push_back("d_" + name);
    return leaves.back();
  };
  std::vector<at::Tensor> inputs;
  for (size_t i = 0; i < problem.inputs.size(); ++i) {
    inputs.push_back(leaf("input" + std::to_string(i), problem.inputs[i]));
  }
  std::optional<SwrState> state;
  if (problem.state) {
    state = SwrState{leaf("w", problem.state->w), leaf("r", problem.state->r),
                     leaf("v", problem.state->v), problem.state->index};
  }
  const auto [x, out] = f(inputs, state);
  std::vector<at::Tensor> roots{x}, upstream{problem.dx};
  const auto root = [&](const at::Tensor& y, const at::Tensor& gradient) {
    if (gradient.defined() && y.requires_grad()) {
      roots.push_back(y);
      upstream.push_back(gradient);
    }
  };
  root(out.w, problem.dw);
  root(out.r, problem.dr);
  root(out.v, problem.dv);
  const auto gradients = torch::autograd::grad(roots, leaves, upstream, std::nullopt, false,
                                               /*allow_unused=*/true);
  for (size_t i = 0; i < leaves.size(); ++i) {
    named[names[i]] = gradients[i].defined() ? gradients[i] : at::zeros_like(leaves[i]);
  }
  named["x"] = x.detach();
  named["w"] = out.w.detach();
  named["r"] = out.r.detach();
  named["v"] = out.v.detach();
  named["index"] = out.index;
  return named;
}

/// Same names, same indices, and every tensor within `tolerance` (relative RMS).
inline void expect_near(const Named& got, const Named& want, double tolerance,
                        const std::string& what) {
  ASSERT_EQ(got.size(), want.size());
  for (const auto& [name, value] : want) {
    if (name == "index") {
      EXPECT_TRUE(got.at(name).cpu().equal(value.cpu())) << what << ": index";
    } else {
      EXPECT_LE(relative_rms(got.at(name), value), tolerance) << what << ": " << name;
    }
  }
}

inline void expect_bit_equal(const Named& got, const Named& want, const std::string& what) {
  ASSERT_EQ(got.size(), want.size());
  for (const auto& [name, value] : want) {
    EXPECT_TRUE(bit_equal(got.at(name), value)) << what << ": " << name;
  }
}

/// The error rule for half precision: within the larger of `floor` and twice the error that the
/// plain computation (half-precision inputs and outputs, float arithmetic) makes.
inline void expect_as_good_as(const Named& got, const Named& plain, const Named& want, double floor,
                              const std::string& what) {
  for (const auto& [name, value] : want) {
    if (name == "index") continue;
    EXPECT_LE(relative_rms(got.at(name), value),
              std::max(floor, 2.0 * relative_rms(plain.at(name), value)))
        << what << ": " << name;
  }
}

/// Normal u and gradients; coefficients uniform in [0, 1] with exact zeros and ones among them.
inline SwrCase random_swr_case(int64_t batch, int64_t length, int64_t heads, int64_t width,
                               int64_t window, bool with_state, uint64_t seed) {
  SwrCase out;
  at::Tensor a = rand({batch, length, heads}, seed, 0.0, 1.0);
  const at::Tensor pick = rand({batch, length, heads}, seed + 1, 0.0, 1.0);
  a = at::where(pick < 0.05, at::zeros_like(a), at::where(pick > 0.95, at::ones_like(a), a));
  out.inputs = {a, randn({batch, length, heads, width}, seed + 2)};
  out.dx = randn({batch, length, heads, width}, seed + 3);
  if (with_state) {
    const at::Tensor index =
        rand({batch}, seed + 7, 0.0, window == 0 ? 1.0 : static_cast<double>(window)).to(at::kInt);
    out.state =
        SwrState{randn({batch, heads, width}, seed + 4), rand({batch, heads}, seed + 5, 0.0, 1.0),
                 randn({batch, heads, width}, seed + 6), index};
    out.dw = randn({batch, heads, width}, seed + 8);
    out.dr = randn({batch, heads}, seed + 9);
    out.dv = randn({batch, heads, width}, seed + 10);
  }
  return out;
}

/// Steps [begin, begin + length) of a case's inputs, from a given state.
inline std::vector<at::Tensor> steps_of(const std::vector<at::Tensor>& inputs, int64_t begin,
                                        int64_t length) {
  std::vector<at::Tensor> out;
  for (const auto& x : inputs) out.push_back(x.narrow(1, begin, length));
  return out;
}

}  // namespace sarissa::test
