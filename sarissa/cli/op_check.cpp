#include "sarissa/cli/op_check.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/isfinite.h>

#include <algorithm>
#include <limits>

namespace sarissa::cli {
namespace {

at::Tensor as_double(const at::Tensor& tensor) {
  return tensor.detach().to(at::kCPU, at::kDouble).contiguous();
}

Tensors part_of(const Tensors& tensors, const std::vector<Selection>& selections) {
  Tensors result;
  for (size_t i = 0; i < tensors.size(); ++i) {
    result.push_back(as_double(selections[i].of(tensors[i])));
  }
  return result;
}

Tensors part_of(const Tensors& tensors, const Selection& selection) {
  return part_of(tensors, std::vector<Selection>(tensors.size(), selection));
}

}  // namespace

double relative_error(const at::Tensor& got, const at::Tensor& want) {
  const at::Tensor g = as_double(got), w = as_double(want);
  if (!g.sizes().equals(w.sizes()) || !at::isfinite(g).all().item<bool>()) {
    return std::numeric_limits<double>::infinity();
  }
  const double size = w.norm().item<double>();
  const double difference = (g - w).norm().item<double>();
  return size > 0 ? difference / size : difference;
}

double relative_error(const at::Tensor& got, const at::Tensor& want,
                      const std::vector<int64_t>& fields) {
  if (fields.empty() || !got.sizes().equals(want.sizes())) return relative_error(got, want);
  const Tensors got_fields = got.split_with_sizes(fields, -1);
  const Tensors want_fields = want.split_with_sizes(fields, -1);
  double largest = 0;
  for (size_t i = 0; i < fields.size(); ++i) {
    largest = std::max(largest, relative_error(got_fields[i], want_fields[i]));
  }
  return largest;
}

double error_bound(at::ScalarType dtype) { return dtype == at::kBFloat16 ? 1e-2 : 1e-5; }

const char* dtype_name(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? "bfloat16" : "float32";
}

double forward_error(const Case& test, const Tensors& inputs, const Tensors& outputs) {
  double largest = 0;
  for (const Part& part : test.parts) {
    const Tensors want = part.op.run(part_of(inputs, part.inputs), nullptr);
    for (size_t i = 0; i < want.size(); ++i) {
      const int64_t steps = outputs[i].size(1);
      const at::Tensor last =
          test.has_state ? want[i].narrow(1, want[i].size(1) - steps, steps) : want[i];
      largest =
          std::max(largest, relative_error(part.output.of(outputs[i]), last, part.output.fields));
    }
  }
  return largest;
}

double backward_error(const Case& test, const Tensors& inputs, const Tensors& cotangents,
                      const Tensors& gradients) {
  double largest = 0;
  Tensors shared(inputs.size());  // sums over the parts
  for (const Part& part : test.parts) {
    const Tensors part_inputs = part_of(inputs, part.inputs);
    const Tensors saved = part.op.save(part_inputs, part.op.run(part_inputs, nullptr));
    const Tensors want = part.op.bwd(saved, part_of(cotangents, part.output));
    for (size_t i = 0; i < want.size(); ++i) {
      const Selection& selection = part.inputs[i];
      if (selection.everything()) {
        shared[i] = shared[i].defined() ? shared[i] + want[i] : want[i];
      } else if (i == 0 || !gradients[i].is_same(gradients[i - 1])) {
        largest = std::max(largest,
                           relative_error(selection.of(gradients[i]), want[i], selection.fields));
      }
    }
  }
  for (size_t i = 0; i < shared.size(); ++i) {
    if (shared[i].defined()) largest = std::max(largest, relative_error(gradients[i], shared[i]));
  }
  return largest;
}

}  // namespace sarissa::cli
