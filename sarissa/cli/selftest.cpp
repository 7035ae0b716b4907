// sarissa selftest: every operator on this machine against the CPU loops in double precision.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <functional>
#include <iomanip>
#include <iostream>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>

#include "sarissa/base/error.h"
#include "sarissa/base/log.h"
#include "sarissa/cli/model_options.h"
#include "sarissa/ops/device.h"
#include "sarissa/ops/ops.h"

namespace sarissa::cli {
namespace {

using Tensors = std::vector<at::Tensor>;

// An operator with everything but its tensors fixed. `state` is empty before the first step, and
// null where a sequence is run in one go.
using Run = std::function<at::Tensor(const Tensors& inputs, Tensors* state)>;

struct Input {
  at::Tensor values;      // double, on the CPU
  bool sequence = false;  // [B, L, ...]: cut along time by the step and split checks
  bool fp32 = false;      // kept in fp32 when the rest is bfloat16
};

struct Case {
  std::string op;
  std::string shape;
  std::vector<Input> inputs;
  Run run;
  bool has_state = false;
};

struct Result {
  std::string op, check, shape, dtype;
  double error = 0, bound = 0;
  std::string failure;  // an exception's message
  bool pass() const { return failure.empty() && error <= bound; }
};

// Draws inputs that are exact in bfloat16, so that every dtype sees the same values.
class Draw {
 public:
  explicit Draw(uint64_t seed) : generator_(at::detail::createCPUGenerator(seed)) {}
  Input normal(at::IntArrayRef shape) { return {rounded(at::randn(shape, generator_, options()))}; }
  Input sequence(at::IntArrayRef shape) {
    return {rounded(at::randn(shape, generator_, options())), true};
  }
  Input uniform(at::IntArrayRef shape, double low, double high) {
    return {rounded(low + (high - low) * at::rand(shape, generator_, options()))};
  }

 private:
  static at::TensorOptions options() { return at::TensorOptions().dtype(at::kDouble); }
  static at::Tensor rounded(const at::Tensor& x) { return x.to(at::kBFloat16).to(at::kDouble); }
  at::Generator generator_;
};

Input as_sequence(Input input) {
  input.sequence = true;
  return input;
}

Input as_fp32(Input input) {
  input.fp32 = true;
  return input;
}

template <class State>
std::optional<State> given(const Tensors* state, const std::function<State(const Tensors&)>& make) {
  if (state == nullptr || state->empty()) return std::nullopt;
  return make(*state);
}

void put(Tensors* state, Tensors next) {
  if (state != nullptr) *state = std::move(next);
}

std::optional<ops::SwrState> swr_state(const Tensors* state) {
  return given<ops::SwrState>(state, [](const Tensors& s) {
    return ops::SwrState{s[0], s[1], s[2], s[3]};
  });
}

std::optional<ops::HyenaState> hyena_state(const Tensors* state) {
  return given<ops::HyenaState>(state, [](const Tensors& s) {
    return ops::HyenaState{s[0], s[1]};
  });
}

std::optional<at::Tensor> tensor_state(const Tensors* state) {
  return given<at::Tensor>(state, [](const Tensors& s) { return s[0]; });
}

Case swr_case(int64_t batch, int64_t length, int64_t heads, int64_t width, int64_t window) {
  Draw draw(1);
  return {"swr",
          str("B", batch, " L", length, " H", heads, " P", width, " window ", window),
          {as_sequence(draw.uniform({batch, length, heads}, 0.0, 1.0)),
           draw.sequence({batch, length, heads, width})},
          [window](const Tensors& in, Tensors* state) {
            auto [x, next] = ops::swr(in[0], in[1], window, swr_state(state));
            put(state, {next.w, next.r, next.v, next.index});
            return x;
          },
          true};
}

Case phalanx_case(int64_t batch, int64_t length, int64_t heads, int64_t kv_heads, int64_t width,
                  int64_t window) {
  Draw draw(2);
  const int64_t packed = heads + 2 * kv_heads * width + heads * width;
  return {
      "phalanx",
      str("B", batch, " L", length, " H", heads, "/", kv_heads, " P", width, " window ", window),
      {draw.sequence({batch, length, packed})},
      [=](const Tensors& in, Tensors* state) {
        auto [y, next] = ops::phalanx(in[0], heads, kv_heads, window, 0.95, swr_state(state));
        put(state, {next.w, next.r, next.v, next.index});
        return y;
      },
      true};
}

Case fir_case(int64_t batch, int64_t length, int64_t dim, int64_t groups, int64_t taps) {
  Draw draw(3);
  return {"fir",
          str("B", batch, " L", length, " D", dim, " G", groups, " W", taps),
          {draw.sequence({batch, length, dim}), draw.normal({groups, taps})},
          [](const Tensors& in, Tensors* state) {
            auto [y, next] = ops::fir(in[0], in[1], tensor_state(state));
            put(state, {next});
            return y;
          },
          true};
}

Case hyena_fir_case(int64_t batch, int64_t length, int64_t dim, int64_t groups, int64_t taps) {
  Draw draw(4);
  return {"hyena_fir",
          str("B", batch, " L", length, " D", dim, " G", groups, " W", taps),
          {draw.sequence({batch, length, 3 * dim}), draw.normal({3 * dim, 3}),
           draw.normal({groups, taps}), draw.normal({dim})},
          [](const Tensors& in, Tensors* state) {
            auto [y, next] = ops::hyena_fir(in[0], in[1], in[2], in[3], hyena_state(state));
            put(state, {next.featurizer, next.inner});
            return y;
          },
          true};
}

Case modal_case(int64_t batch, int64_t length, int64_t dim, int64_t groups, int64_t modes) {
  Draw draw(5);
  return {"modal",
          str("B", batch, " L", length, " D", dim, " G", groups, " N", modes),
          {draw.sequence({batch, length, dim}), as_fp32(draw.uniform({groups, modes}, -2.0, -0.01)),
           as_fp32(draw.normal({groups, modes})), draw.normal({dim})},
          [](const Tensors& in, Tensors* state) {
            auto [y, next] = ops::modal(in[0], in[1], in[2], in[3], tensor_state(state));
            put(state, {next});
            return y;
          },
          true};
}

Case hyena_modal_case(int64_t batch, int64_t length, int64_t dim, int64_t groups, int64_t modes) {
  Draw draw(6);
  return {"hyena_modal",
          str("B", batch, " L", length, " D", dim, " G", groups, " N", modes),
          {draw.sequence({batch, length, 3 * dim}), draw.normal({3 * dim, 3}),
           as_fp32(draw.uniform({groups, modes}, -2.0, -0.01)),
           as_fp32(draw.normal({groups, modes})), draw.normal({dim})},
          [](const Tensors& in, Tensors* state) {
            auto [y, next] =
                ops::hyena_modal(in[0], in[1], in[2], in[3], in[4], hyena_state(state));
            put(state, {next.featurizer, next.inner});
            return y;
          },
          true};
}

Case norm_case(int64_t rows, int64_t dim) {
  Draw draw(7);
  return {"residual_rms_norm",
          str("rows ", rows, " D", dim),
          {draw.normal({rows, dim}), draw.normal({rows, dim}), draw.normal({dim})},
          [](const Tensors& in, Tensors*) {
            auto [y, sum] = ops::residual_rms_norm(in[0], in[1], in[2], 1e-6);
            return y + sum;
          }};
}

Case glu_case(int64_t rows, int64_t dim, const std::string& gate) {
  Draw draw(8);
  return {"glu",
          str("rows ", rows, " F", dim, " ", gate),
          {draw.normal({rows, 2 * dim})},
          [gate](const Tensors& in, Tensors*) { return ops::glu(in[0], ops::parse_gate(gate)); }};
}

Case rope_case(int64_t batch, int64_t length, int64_t heads, int64_t width) {
  Draw draw(9);
  return {"rope",
          str("B", batch, " L", length, " H", heads, " P", width),
          {draw.sequence({batch, length, heads, width})},
          [width](const Tensors& in, Tensors* state) {
            const int64_t position =
                state == nullptr || state->empty() ? 0 : (*state)[0].item<int64_t>();
            put(state, {at::tensor({position + in[0].size(1)}, at::kLong)});
            return ops::rope(in[0], ops::rope_inverse_frequencies(width, 10000.0, in[0].device()),
                             position, 1.0);
          },
          true};
}

Case attention_case(int64_t batch, int64_t length, int64_t heads, int64_t kv_heads, int64_t width,
                    int64_t window) {
  Draw draw(10);
  return {
      "attention",
      str("B", batch, " L", length, " H", heads, "/", kv_heads, " P", width, " window ", window),
      {draw.sequence({batch, length, heads, width}),
       draw.sequence({batch, length, kv_heads, width}),
       draw.sequence({batch, length, kv_heads, width})},
      [window](const Tensors& in, Tensors* state) {
        at::Tensor k = in[1], v = in[2];
        if (state != nullptr && !state->empty()) {
          k = at::cat({(*state)[0], k}, 1);
          v = at::cat({(*state)[1], v}, 1);
        }
        put(state, {k, v});
        return ops::attention(in[0], k, v, window);
      },
      true};
}

at::Tensor some_targets(int64_t rows, int64_t vocabulary, at::Device device) {
  return (at::arange(rows, at::kLong) * 7919 % vocabulary).to(device);
}

Case cross_entropy_case(int64_t rows, int64_t vocabulary) {
  Draw draw(11);
  return {"cross_entropy",
          str("N", rows, " V", vocabulary),
          {draw.normal({rows, vocabulary})},
          [=](const Tensors& in, Tensors*) {
            return ops::cross_entropy(in[0], some_targets(rows, vocabulary, in[0].device()));
          }};
}

Case linear_cross_entropy_case(int64_t rows, int64_t dim, int64_t vocabulary) {
  Draw draw(12);
  return {"linear_cross_entropy",
          str("N", rows, " D", dim, " V", vocabulary),
          {draw.normal({rows, dim}), draw.normal({vocabulary, dim})},
          [=](const Tensors& in, Tensors*) {
            const at::Tensor weights = at::ones(
                {rows},
                in[0].options().dtype(in[0].dtype() == at::kDouble ? at::kDouble : at::kFloat));
            return ops::linear_cross_entropy(
                in[0], in[1], some_targets(rows, vocabulary, in[0].device()), weights);
          }};
}

std::vector<Case> all_cases() {
  return {
      swr_case(2, 67, 3, 5, 16),
      swr_case(1, 257, 2, 16, 128),
      swr_case(2, 50, 3, 4, ops::kFullRecurrence),
      phalanx_case(2, 61, 6, 2, 5, 16),
      phalanx_case(1, 131, 4, 4, 16, ops::kFullRecurrence),
      fir_case(2, 37, 6, 6, 3),
      fir_case(1, 301, 24, 3, 128),
      hyena_fir_case(2, 45, 12, 3, 7),
      hyena_fir_case(1, 301, 32, 2, 128),
      modal_case(2, 53, 6, 6, 3),
      modal_case(1, 257, 24, 3, 16),
      hyena_modal_case(2, 53, 10, 10, 5),
      hyena_modal_case(1, 257, 32, 32, 16),
      norm_case(7, 129),
      glu_case(5, 77, "swiglu"),
      glu_case(5, 77, "gelu"),
      glu_case(5, 77, "bilinear"),
      rope_case(2, 19, 3, 10),
      attention_case(2, 33, 4, 2, 16, 0),
      attention_case(1, 70, 4, 4, 32, 16),
      cross_entropy_case(13, 101),
      linear_cross_entropy_case(37, 24, 101),
  };
}

// ||got - want|| / ||want||; infinite when something is not finite.
double relative_error(const at::Tensor& got, const at::Tensor& want) {
  const at::Tensor g = got.detach().to(at::kCPU, at::kDouble);
  const at::Tensor w = want.detach().to(at::kCPU, at::kDouble);
  if (!g.sizes().equals(w.sizes()) || !at::isfinite(g).all().item<bool>()) {
    return std::numeric_limits<double>::infinity();
  }
  const double size = w.norm().item<double>();
  const double difference = (g - w).norm().item<double>();
  return size > 0 ? difference / size : difference;
}

Tensors leaves(const Case& test, at::Device device, at::ScalarType dtype) {
  Tensors result;
  for (const Input& input : test.inputs) {
    const at::ScalarType kept = input.fp32 && dtype == at::kBFloat16 ? at::kFloat : dtype;
    result.push_back(input.values.to(device, kept, false, true).requires_grad_(true));
  }
  return result;
}

// The output and the gradients of sum(output * weight).
Tensors forward_backward(const Case& test, at::Device device, at::ScalarType dtype,
                         const at::Tensor& weight) {
  const Tensors inputs = leaves(test, device, dtype);
  Tensors results = {test.run(inputs, nullptr)};
  const at::Tensor cotangent = weight.to(device, results[0].scalar_type());
  const Tensors gradients = torch::autograd::grad({results[0]}, inputs, {cotangent});
  results.insert(results.end(), gradients.begin(), gradients.end());
  return results;
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
    outputs.push_back(test.run(part, &state));
    begin += count;
  }
  return at::cat(outputs, 1);
}

// Relative error allowed. bfloat16 rounds each value to 2^-9 relative, and a gradient passes a few
// roundings; float32 sums a few hundred terms.
double bound(at::ScalarType dtype) { return dtype == at::kBFloat16 ? 1e-2 : 1e-5; }

const char* dtype_name(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? "bfloat16" : "float32";
}

std::vector<Result> check(const Case& test, at::Device device, at::ScalarType dtype) {
  std::vector<Result> results;
  const auto add = [&](const std::string& name, const std::function<double()>& error) {
    Result result{test.op, name, test.shape, dtype_name(dtype), 0, bound(dtype), ""};
    try {
      result.error = error();
    } catch (const c10::Error& failure) {
      result.failure = failure.what_without_backtrace();
    } catch (const std::exception& failure) {
      result.failure = failure.what();
    }
    results.push_back(result);
  };
  at::Tensor weight;
  Tensors want, got;
  add("forward", [&] {
    const at::Tensor output = test.run(leaves(test, at::kCPU, at::kDouble), nullptr);
    weight = Draw(99).normal(output.sizes()).values;
    want = forward_backward(test, at::kCPU, at::kDouble, weight);
    got = forward_backward(test, device, dtype, weight);
    return relative_error(got[0], want[0]);
  });
  add("backward", [&] {
    SARISSA_CHECK(!got.empty(), "the forward check failed");
    double largest = 0;
    for (size_t i = 1; i < want.size(); ++i) {
      largest = std::max(largest, relative_error(got[i], want[i]));
    }
    return largest;
  });
  if (!test.has_state) return results;
  add("step", [&] { return relative_error(in_pieces(test, device, dtype, {1}), want[0]); });
  add("state", [&] {
    return relative_error(in_pieces(test, device, dtype, {7, 1, 16, 3}), want[0]);
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

struct Options {
  std::string device = "auto";
  bool json = false;
};

void selftest(const Options& options) {
  const at::Device device = ops::parse_device(options.device);
  log_info("operators on ", device.str(), " against the CPU loops in double precision");
  if (!options.json) print_header();
  int64_t count = 0, failed = 0;
  for (const Case& test : all_cases()) {
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
  auto options = std::make_shared<Options>();
  CLI::App* command = program.add_subcommand("selftest", "Check every operator on this machine");
  add_device_option(*command, options->device);
  command->add_flag("--json", options->json,
                    "One object per check: operator, check, shape, dtype, error, bound, pass");
  command->footer("Example:\n  sarissa selftest --device cpu");
  command->callback([options] { selftest(*options); });
}

}  // namespace sarissa::cli
