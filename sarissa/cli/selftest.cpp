// sarissa selftest: every operator on this machine against the CPU loops in double precision.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <functional>
#include <iomanip>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>

#include "sarissa/base/error.h"
#include "sarissa/base/log.h"
#include "sarissa/cli/model_options.h"
#include "sarissa/cli/op_cases.h"
#include "sarissa/cli/op_check.h"
#include "sarissa/ops/device.h"

namespace sarissa::cli {
namespace {

struct Result {
  std::string op, check, shape, dtype;
  double error = 0, bound = 0;
  std::string failure;  // an exception's message
  bool pass() const { return failure.empty() && error <= bound; }
};

// The inputs: exact in bfloat16 whatever the dtype, so that every run sees the same values.
Tensors leaves(const Case& test, at::Device device, at::ScalarType dtype) {
  const at::Generator generator = at::detail::createCPUGenerator(1);
  Tensors result;
  for (const Input& input : test.inputs) {
    const at::ScalarType kept = input.fp32 && dtype == at::kBFloat16 ? at::kFloat : dtype;
    const at::Tensor values = draw(input, at::kDouble, generator);
    result.push_back(values.to(device, kept, false, true).requires_grad_(true));
  }
  return result;
}

struct OutputsAndGradients {
  Tensors outputs, gradients;
};

// The outputs, and the gradients of the sum of outputs * weights.
OutputsAndGradients forward_backward(const Case& test, at::Device device, at::ScalarType dtype,
                                     const Tensors& weights) {
  const Tensors inputs = leaves(test, device, dtype);
  OutputsAndGradients result{test.call.run(inputs, nullptr), {}};
  at::Tensor total;
  for (size_t i = 0; i < result.outputs.size(); ++i) {
    const at::Tensor& output = result.outputs[i];
    const at::Tensor term = output.mul(weights[i].to(device, output.scalar_type())).sum();
    total = total.defined() ? total.add(term) : term;
  }
  total.backward();
  for (const at::Tensor& input : inputs) result.gradients.push_back(input.grad());
  return result;
}

double largest_error(const Tensors& got, const Tensors& want) {
  double largest = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    largest = std::max(largest, relative_error(got[i], want[i]));
  }
  return largest;
}

// The whole sequence in pieces of the given lengths (the last one repeats), carrying the state.
at::Tensor in_pieces(const Case& test, at::Device device, at::ScalarType dtype,
                     const std::vector<int64_t>& lengths) {
  c10::NoGradGuard no_grad;
  const Tensors inputs = leaves(test, device, dtype);
  int64_t total = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (test.inputs[i].sequence) total = inputs[i].size(1);
  }
  Tensors outputs, state;
  for (int64_t begin = 0, piece = 0; begin < total; ++piece) {
    const int64_t wanted = lengths[std::min<size_t>(piece, lengths.size() - 1)];
    const int64_t count = std::min(wanted, total - begin);
    Tensors part;
    for (size_t i = 0; i < inputs.size(); ++i) {
      part.push_back(test.inputs[i].sequence ? inputs[i].narrow(1, begin, count) : inputs[i]);
    }
    outputs.push_back(test.call.run(part, &state)[0]);
    begin += count;
  }
  return at::cat(outputs, 1);
}

std::vector<Result> check(const Case& test, at::Device device, at::ScalarType dtype) {
  std::vector<Result> results;
  const auto add = [&](const std::string& name, const std::function<double()>& error) {
    Result result{test.op, name, test.shape, dtype_name(dtype), 0, error_bound(dtype), ""};
    try {
      result.error = error();
    } catch (const c10::Error& failure) {
      result.failure = failure.what_without_backtrace();
    } catch (const std::exception& failure) {
      result.failure = failure.what();
    }
    results.push_back(result);
  };
  OutputsAndGradients want, got;
  add("forward", [&] {
    const at::Generator generator = at::detail::createCPUGenerator(99);
    Tensors weights;
    for (const at::Tensor& output : test.call.run(leaves(test, at::kCPU, at::kDouble), nullptr)) {
      weights.push_back(draw({.shape = output.sizes().vec()}, at::kDouble, generator));
    }
    want = forward_backward(test, at::kCPU, at::kDouble, weights);
    got = forward_backward(test, device, dtype, weights);
    return largest_error(got.outputs, want.outputs);
  });
  add("backward", [&] {
    SARISSA_CHECK(!got.gradients.empty(), "the forward check failed");
    return largest_error(got.gradients, want.gradients);
  });
  if (!test.has_state) return results;
  add("step", [&] { return relative_error(in_pieces(test, device, dtype, {1}), want.outputs[0]); });
  add("state", [&] {
    return relative_error(in_pieces(test, device, dtype, {7, 1, 16, 3}), want.outputs[0]);
  });
  return results;
}

void print_header() {
  std::cout << std::left << std::setw(22) << "operator" << std::setw(10) << "check" << std::setw(32)
            << "shape" << std::setw(10) << "dtype" << std::setw(10) << "error" << std::setw(10)
            << "bound"
            << "pass\n";
}

void print_row(const Result& result) {
  std::ostringstream error;
  error << std::setprecision(2) << result.error;
  std::cout << std::left << std::setw(22) << result.op << std::setw(10) << result.check
            << std::setw(32) << result.shape << std::setw(10) << result.dtype << std::setw(10)
            << (result.failure.empty() ? error.str() : "-") << std::setw(10) << result.bound
            << (result.pass() ? "yes" : "NO") << "\n";
  if (!result.failure.empty()) std::cout << "  " << result.failure << "\n";
}

void print_json(const Result& result) {
  nlohmann::ordered_json line = {{"operator", result.op}, {"check", result.check},
                                 {"shape", result.shape}, {"dtype", result.dtype},
                                 {"error", result.error}, {"bound", result.bound},
                                 {"pass", result.pass()}};
  if (!result.failure.empty()) line["failure"] = result.failure;
  std::cout << line.dump() << "\n";
}

struct SelftestOptions {
  std::string device = "auto";
  bool json = false;
};

void selftest(const SelftestOptions& options) {
  const at::Device device = ops::parse_device(options.device);
  log_info("operators on ", device.str(), " against the CPU loops in double precision");
  if (!options.json) print_header();
  int64_t count = 0, failed = 0;
  for (const Case& test : selftest_cases()) {
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      for (const Result& result : check(test, device, dtype)) {
        options.json ? print_json(result) : print_row(result);
        ++count;
        if (!result.pass()) ++failed;
      }
    }
  }
  SARISSA_CHECK(failed == 0, failed, " of ", count, " checks failed on ", device);
  log_info(count, " checks passed on ", device.str());
}

}  // namespace

void add_selftest(CLI::App& program) {
  auto options = std::make_shared<SelftestOptions>();
  CLI::App* command = program.add_subcommand("selftest", "Check every operator on this machine");
  add_device_option(*command, options->device);
  command->add_flag("--json", options->json,
                    "One object per check: operator, check, shape, dtype, error, bound, pass");
  command->footer("Example:\n  sarissa selftest --device cpu");
  command->callback([options] { selftest(*options); });
}

}  // namespace sarissa::cli
