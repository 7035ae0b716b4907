#include "sarissa/train/optimizer.h"

#include <ATen/Parallel.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

#include <cmath>

#include "sarissa/base/error.h"

namespace sarissa::train {
namespace {

// Sum of squares in double, with eight partial sums so that the loop vectorises.
double sum_of_squares(const float* x, int64_t count) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int64_t j = 0; j < 8; ++j) sums[j] += double(x[i + j]) * double(x[i + j]);
  }
  for (; i < count; ++i) sums[0] += double(x[i]) * double(x[i]);
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

double sum_of_squares_cpu(const at::Tensor& tensor) {
  constexpr int64_t kBlock = 1 << 16;  // fixed, so that the result does not depend on the threads
  const at::Tensor x = tensor.contiguous();
  const float* data = x.const_data_ptr<float>();
  const int64_t count = x.numel();
  std::vector<double> blocks((count + kBlock - 1) / kBlock);
  at::parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      blocks[b] = sum_of_squares(data + b * kBlock, std::min(kBlock, count - b * kBlock));
    }
  });
  double total = 0;
  for (const double block : blocks) total += block;
  return total;
}

bool all_finite(const at::Tensor& tensor) {
  return !tensor.defined() || at::isfinite(tensor).all().item<bool>();
}

}  // namespace

at::Tensor global_norm(const std::vector<at::Tensor>& tensors) {
  SARISSA_CHECK(!tensors.empty(), "global_norm: no tensors");
  if (tensors[0].is_cpu()) {
    double total = 0;
    for (const auto& tensor : tensors) total += sum_of_squares_cpu(tensor);
    return at::full({}, std::sqrt(total), tensors[0].options().dtype(at::kFloat));
  }
  return at::linalg_vector_norm(at::stack(at::_foreach_norm(tensors)));
}

AdamW::AdamW(const std::vector<model::Parameter>& parameters, const OptimConfig& config)
    : config_(config) {
  const c10::NoGradGuard no_grad;
  for (const auto& parameter : parameters) {
    const at::ScalarType dtype = parameter.value.scalar_type();
    SARISSA_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, "parameter ", parameter.name,
                  " is ", dtype, ", expected float32 or bfloat16");
    const bool has_master = dtype != at::kFloat;
    const at::Tensor master = parameter.value.detach().to(at::kFloat);
    slots_.push_back({.name = parameter.name,
                      .value = parameter.value,
                      .master = master,
                      .gradient = has_master ? at::zeros_like(master) : at::Tensor(),
                      .moment1 = at::zeros_like(master),
                      .moment2 = at::zeros_like(master),
                      .decay = parameter.decay,
                      .has_master = has_master});
  }
}

void AdamW::accumulate() {
  const c10::NoGradGuard no_grad;
  std::vector<at::Tensor> sums, fresh;
  for (auto& slot : slots_) {
    if (!slot.has_master || !slot.value.grad().defined()) continue;
    sums.push_back(slot.gradient);
    fresh.push_back(slot.value.grad());
  }
  if (first_micro_batch_ && !sums.empty()) {
    at::_foreach_copy_(sums, fresh);
  } else {
    for (size_t i = 0; i < sums.size(); ++i) sums[i].add_(fresh[i]);
  }
  for (auto& slot : slots_) {
    if (slot.has_master) slot.value.mutable_grad().reset();
  }
  first_micro_batch_ = false;
}

std::vector<at::Tensor> AdamW::gradients() const {
  std::vector<at::Tensor> result;
  for (const auto& slot : slots_) {
    if (slot.has_master) {
      result.push_back(slot.gradient);
    } else if (slot.value.grad().defined()) {
      result.push_back(slot.value.grad().detach());
    } else {
      result.push_back(at::zeros_like(slot.master));  // the loss does not depend on it
    }
  }
  return result;
}

at::Tensor AdamW::step(double lr, const at::Tensor& loss) {
  const c10::NoGradGuard no_grad;
  const std::vector<at::Tensor> all = gradients();
  const at::Tensor norm = global_norm(all);
  // The kernel divides gradients by `scale` and does nothing where `skip` is 1.
  const at::Tensor scale =
      config_.clip > 0 ? norm.div(config_.clip).clamp_min(1.0) : at::full({}, 1.0, norm.options());
  const at::Tensor skip =
      at::isfinite(norm).logical_and(at::isfinite(loss)).logical_not().to(at::kFloat);
  const at::Tensor update = at::full({}, double(updates_ + 1), norm.options());

  for (const bool decay : {true, false}) {
    std::vector<at::Tensor> masters, gradients, moments1, moments2, updates;
    for (size_t i = 0; i < slots_.size(); ++i) {
      if (slots_[i].decay != decay) continue;
      masters.push_back(slots_[i].master);
      gradients.push_back(all[i]);
      moments1.push_back(slots_[i].moment1);
      moments2.push_back(slots_[i].moment2);
      updates.push_back(update);
    }
    if (masters.empty()) continue;
    at::_fused_adamw_(masters, gradients, moments1, moments2, {}, updates, lr, config_.beta1,
                      config_.beta2, decay ? config_.weight_decay : 0.0, config_.eps,
                      /*amsgrad=*/false, /*maximize=*/false, scale, skip);
  }

  std::vector<at::Tensor> weights, masters;
  for (const auto& slot : slots_) {
    if (!slot.has_master) continue;
    weights.push_back(slot.value.detach());
    masters.push_back(slot.master);
  }
  if (!weights.empty()) at::_foreach_copy_(weights, masters);
  return norm;
}

void AdamW::clear_gradients() {
  for (auto& slot : slots_) {
    slot.value.mutable_grad().reset();
    if (slot.has_master) slot.gradient.zero_();
  }
  first_micro_batch_ = true;
}

std::string AdamW::first_non_finite() const {
  const c10::NoGradGuard no_grad;
  for (const auto& slot : slots_) {
    if (!all_finite(slot.value)) return "parameter " + slot.name;
  }
  for (const auto& slot : slots_) {
    if (!all_finite(slot.has_master ? slot.gradient : slot.value.grad())) {
      return "gradient of " + slot.name;
    }
  }
  return "";
}

checkpoint::NamedTensors AdamW::pack() const {
  checkpoint::NamedTensors tensors;
  for (const auto& slot : slots_) {
    if (slot.has_master) tensors.emplace_back("master." + slot.name, slot.master);
    tensors.emplace_back("moment1." + slot.name, slot.moment1);
    tensors.emplace_back("moment2." + slot.name, slot.moment2);
  }
  return tensors;
}

void AdamW::unpack(const checkpoint::SafetensorsFile& file, int64_t updates) {
  const c10::NoGradGuard no_grad;
  for (const auto& [name, target] : pack()) {
    SARISSA_CHECK(file.contains(name), "the optimizer state has no tensor '", name, "'");
    const at::Tensor stored = file.tensor(name);
    SARISSA_CHECK(stored.sizes() == target.sizes() && stored.scalar_type() == at::kFloat,
                  "the optimizer state's '", name, "' is ", stored.scalar_type(), " ",
                  stored.sizes(), ", expected Float ", target.sizes());
    target.copy_(stored);
  }
  updates_ = updates;
}

}  // namespace sarissa::train
