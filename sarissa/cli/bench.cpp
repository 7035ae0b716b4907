// sarissa bench ops: every operator as a layer calls it, first against the CPU loops in double
// precision, then timed, beside the time that its bytes alone would take.
#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/GradMode.h>
#include <torch/version.h>

#include <algorithm>
#include <cmath>
#include <ctime>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <limits>
#include <memory>
#include <new>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "sarissa/base/error.h"
#include "sarissa/base/log.h"
#include "sarissa/cli/model_options.h"
#include "sarissa/cli/op_cases.h"
#include "sarissa/cli/op_check.h"
#include "sarissa/cli/stopwatch.h"
#include "sarissa/commit.h"
#include "sarissa/ops/device.h"

namespace sarissa::cli {
namespace {

constexpr int64_t kLeastRotatedBytes = 256'000'000;  // where the cache is small or unknown
constexpr int64_t kMostCopies = 1024;
constexpr int64_t kPrefix = 160;  // least steps before a decode step: more than any window
constexpr int64_t kSteps = 3;     // steps that are checked

struct BenchOptions {
  std::vector<std::string> ops;
  std::vector<int64_t> lengths = {2048, 8192, 32768, 131072};
  std::vector<int64_t> widths = {4096};
  std::vector<int64_t> batches = {1};
  std::vector<int64_t> step_batches = {1, 16, 256};
  std::string dtype = "bfloat16";
  std::string direction = "all";
  std::string device = "auto";
  double seconds = 0.5;
  std::string json;
};

struct Shape {
  int64_t batch, length, width;
};

// What is timed: call(i) works on the i-th of several copies of its tensors.
struct Work {
  std::function<void(int64_t)> call;
  int64_t bytes = 0;  // that a call must move: each input and output once
};

struct Row {
  std::string op, direction;
  Shape shape{};
  std::string dtype;
  Timing timing;
  int64_t bytes = 0;
  double error = std::numeric_limits<double>::quiet_NaN(), bound = 0;
  std::string kernel;
  std::string failure{};  // why there is no time: "FAILED", "out of memory" or an error's message
};

class Bench {
 public:
  explicit Bench(const BenchOptions& options)
      : options_(options),
        device_(ops::parse_device(options.device)),
        dtype_(parse_dtype(options.dtype, device_)),
        guard_(device_),
        facts_(device_facts(device_)) {
    if (options.json.empty()) return;
    json_.open(options.json);
    SARISSA_CHECK(json_, options.json, ": cannot be written");
  }

  void run() {
    const std::vector<LayerCase> chosen = chosen_cases();
    Stopwatch watch(device_);
    watch_ = &watch;
    log_info(facts_.name, facts_.driver.empty() ? "" : ", driver ", facts_.driver,
             ": copies run at ", std::lround(watch.copy_gb_per_s()), " GB/s (read + written)");
    print_header();
    for (const LayerCase& layer : chosen) {
      for (const int64_t width : options_.widths) {
        for (const char* direction : {"fwd", "bwd"}) {
          if (!wanted(direction)) continue;
          for (const int64_t batch : options_.batches) {
            for (const int64_t length : options_.lengths) {
              measure(layer, direction, {batch, length, width});
            }
          }
        }
        if (!layer.has_step || !wanted("step")) continue;
        for (const int64_t batch : options_.step_batches) measure(layer, "step", {batch, 1, width});
      }
    }
    SARISSA_CHECK(options_.json.empty() || json_.flush(), options_.json, ": cannot be written");
    SARISSA_CHECK(failed_ == 0, failed_, " of ", count_, " cases have no time, see above");
  }

 private:
  bool wanted(const std::string& direction) const {
    return options_.direction == "all" || options_.direction == direction;
  }

  std::vector<LayerCase> chosen_cases() const {
    std::vector<std::string> names;
    for (const LayerCase& layer : layer_cases()) names.push_back(layer.name);
    for (const std::string& op : options_.ops) {
      if (std::find(names.begin(), names.end(), op) == names.end()) {
        throw UsageError(str("--op '", op, "': no such operator", did_you_mean(op, names),
                             "; 'sarissa bench ops --help' lists them"));
      }
    }
    const std::set<std::string> asked(options_.ops.begin(), options_.ops.end());
    std::vector<LayerCase> chosen;
    for (const LayerCase& layer : layer_cases()) {
      if (asked.empty() ? layer.only_by_name : !asked.contains(layer.name)) continue;
      if (options_.direction == "step" && !layer.has_step) {
        if (asked.empty()) continue;
        throw UsageError(str("--op '", layer.name, "': has no state and no step; use --direction ",
                             "fwd or bwd"));
      }
      chosen.push_back(layer);
    }
    return chosen;
  }

  void measure(const LayerCase& layer, const std::string& direction, const Shape& shape) {
    Row row{.op = layer.name,
            .direction = direction,
            .shape = shape,
            .dtype = dtype_name(dtype_),
            .bound = error_bound(dtype_)};
    log_debug(layer.name, " ", direction, " B", shape.batch, " L", shape.length);
    try {
      measure(layer, row);
    } catch (const c10::OutOfMemoryError&) {
      row.failure = "out of memory";
    } catch (const std::bad_alloc&) {
      row.failure = "out of memory";
    } catch (const c10::Error& error) {
      const std::string what = error.what_without_backtrace();
      row.failure = what.find("DefaultCPUAllocator") != std::string::npos ? "out of memory" : what;
    } catch (const std::exception& error) {
      row.failure = error.what();
    }
    // The next case has other sizes: what is cached for this one would be in its way.
    if (device_.is_cuda()) c10::getDeviceAllocator(device_.type())->emptyCache();
    ++count_;
    if (!row.failure.empty()) ++failed_;
    print_row(row);
    write_json(row);
  }

  void measure(const LayerCase& layer, Row& row) {
    // The operators alone: no autograd bookkeeping around them.
    const c10::NoGradGuard no_grad;
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Work work = row.direction == "fwd"   ? forward(layer, row)
                      : row.direction == "bwd" ? backward(layer, row)
                                               : step(layer, row);
    row.bytes = work.bytes;
    if (!(row.error <= row.bound)) {
      row.failure = "FAILED";
      return;
    }
    ops::check({.error = nullptr, .kernel = ""}, "bench");  // forgets earlier kernels
    row.timing = watch_->time(work.call, options_.seconds);
    row.kernel = ops::last_kernel();
  }

  Work forward(const LayerCase& layer, Row& row) {
    const Case test = layer.make(row.shape.batch, row.shape.length, row.shape.width);
    const Tensors inputs = draw_inputs(test);
    const Operator op = test.call;
    const auto run = [op](const Tensors& in) { return op.run(in, nullptr); };
    Tensors outputs = run_on_poison(run, inputs);
    row.error = forward_error(test, inputs, outputs);
    return rotated(run, inputs, outputs);
  }

  Work backward(const LayerCase& layer, Row& row) {
    const Case test = layer.make(row.shape.batch, row.shape.length, row.shape.width);
    Tensors inputs = draw_inputs(test);
    Tensors outputs = test.call.run(inputs, nullptr);
    const Tensors saved = test.call.save(inputs, outputs);
    Tensors cotangents;
    for (const at::Tensor& output : outputs) {
      cotangents.push_back(draw({.shape = output.sizes().vec()}, dtype_, generator()));
    }
    outputs.clear();
    // One list of tensors to copy: what was saved, then the cotangents.
    const Operator op = test.call;
    const auto run = [op, count = static_cast<int64_t>(saved.size())](const Tensors& all) {
      return op.bwd(Tensors(all.begin(), all.begin() + count),
                    Tensors(all.begin() + count, all.end()));
    };
    Tensors all = saved;
    all.insert(all.end(), cotangents.begin(), cotangents.end());
    const Tensors gradients = run_on_poison(run, all);
    row.error = backward_error(test, inputs, cotangents, gradients);
    inputs.clear();
    Work work = rotated(run, all, gradients);
    if (test.call.saves_detail) work.bytes -= static_cast<int64_t>(saved.back().nbytes());
    return work;
  }

  Work step(const LayerCase& layer, Row& row) {
    const auto make = [&](int64_t length) {
      return layer.make(row.shape.batch, length, row.shape.width);
    };
    const int64_t prefix = std::max(kPrefix, make(1).memory);  // fills the state
    const Case test = make(prefix + kSteps);
    const Tensors inputs = draw_inputs(test);
    const auto cut = [&](int64_t begin, int64_t length) {
      Tensors part;
      for (size_t i = 0; i < inputs.size(); ++i) {
        part.push_back(test.inputs[i].sequence ? inputs[i].narrow(1, begin, length).contiguous()
                                               : inputs[i]);
      }
      return part;
    };
    Tensors state, outputs;
    test.call.run(cut(0, prefix), &state);
    const Tensors before = state;
    for (int64_t i = 0; i < kSteps; ++i) {
      outputs.push_back(test.call.run(cut(prefix + i, 1), &state)[0]);
    }
    row.error = forward_error(test, inputs, {at::cat(outputs, 1)});
    // One list of tensors to copy: the step's inputs, then the state.
    const Operator op = test.call;
    const auto run = [op, count = static_cast<int64_t>(inputs.size())](const Tensors& all) {
      Tensors next(all.begin() + count, all.end());
      Tensors results = op.run(Tensors(all.begin(), all.begin() + count), &next);
      results.insert(results.end(), next.begin(), next.end());
      return results;
    };
    Tensors all = cut(prefix, 1);
    all.insert(all.end(), before.begin(), before.end());
    const Tensors results = run(all);
    return rotated(run, all, results);
  }

  at::Generator generator() const { return at::globalContext().defaultGenerator(device_); }

  Tensors draw_inputs(const Case& test) const {
    at::Generator seeded = generator();
    seeded.set_current_seed(1);
    Tensors inputs;
    for (const Input& input : test.inputs) inputs.push_back(draw(input, dtype_, seeded));
    return inputs;
  }

  using Call = std::function<Tensors(const Tensors&)>;

  // The second of two runs: where memory is reused it finds NaN instead of the right results.
  static Tensors run_on_poison(const Call& run, const Tensors& inputs) {
    for (const at::Tensor& result : run(inputs)) {
      result.fill_(std::numeric_limits<double>::quiet_NaN());
    }
    return run(inputs);
  }

  // Bytes of the tensors, each counted once.
  static int64_t bytes_of(const Tensors& a, const Tensors& b) {
    int64_t bytes = 0;
    std::set<const void*> seen;
    for (const Tensors* list : {&a, &b}) {
      for (const at::Tensor& t : *list) {
        if (seen.insert(t.const_data_ptr()).second) bytes += static_cast<int64_t>(t.nbytes());
      }
    }
    return bytes;
  }

  // Calls on copies of the inputs, one after the other, and keeps as many results, so that by the
  // time a copy is used again nothing of it is left in the cache.
  Work rotated(const Call& run, const Tensors& inputs, const Tensors& results) const {
    const int64_t bytes = bytes_of(inputs, results);
    const int64_t wanted = std::max(kLeastRotatedBytes, 4 * facts_.l2_bytes + 1);
    const int64_t copies =
        bytes >= 2 * wanted ? 1 : std::min(kMostCopies, 1 + (wanted + bytes - 1) / bytes);
    struct Slot {
      Tensors inputs, results;
    };
    auto slots = std::make_shared<std::vector<Slot>>(copies);
    (*slots)[0].inputs = inputs;
    for (int64_t i = 1; i < copies; ++i) {
      for (const at::Tensor& input : inputs) (*slots)[i].inputs.push_back(input.clone());
    }
    return {.call =
                [run, slots](int64_t i) {
                  Slot& slot = (*slots)[i % slots->size()];
                  slot.results.clear();
                  slot.results = run(slot.inputs);
                },
            .bytes = bytes};
  }

  double gb_per_s(const Row& row) const {
    return static_cast<double>(row.bytes) / row.timing.ms * 1e-6;
  }
  double floor_ms(const Row& row) const {
    return static_cast<double>(row.bytes) / watch_->copy_gb_per_s() * 1e-6;
  }

  static void print_header() {
    std::cout << std::left << std::setw(14) << "operator" << std::setw(5) << "dir" << std::right
              << std::setw(6) << "batch" << std::setw(8) << "length" << std::setw(7) << "width"
              << std::setw(10) << "dtype" << std::setw(11) << "ms" << std::setw(9) << "spread"
              << std::setw(9) << "GB/s" << std::setw(11) << "floor ms" << std::setw(10) << "ratio"
              << std::setw(10) << "error"
              << "  kernel" << std::endl;
  }

  void print_row(const Row& row) const {
    const auto number = [](double value, int digits) {
      std::ostringstream text;
      text << std::fixed << std::setprecision(digits) << value;
      return text.str();
    };
    std::ostringstream error;
    error << std::setprecision(2) << row.error;
    std::cout << std::left << std::setw(14) << row.op << std::setw(5) << row.direction << std::right
              << std::setw(6) << row.shape.batch << std::setw(8) << row.shape.length << std::setw(7)
              << row.shape.width << std::setw(10) << row.dtype;
    if (row.failure.empty()) {
      std::cout << std::setw(11) << number(row.timing.ms, 4) << std::setw(8)
                << number(100 * row.timing.spread, 1) << "%" << std::setw(9)
                << number(gb_per_s(row), 1) << std::setw(11) << number(floor_ms(row), 4)
                << std::setw(10) << number(row.timing.ms / floor_ms(row), 3) << std::setw(10)
                << error.str() << "  " << (row.kernel.empty() ? "-" : row.kernel);
    } else if (row.failure == "FAILED") {
      std::cout << "     FAILED: relative error " << error.str() << ", allowed " << row.bound;
    } else {
      std::cout << "     " << row.failure;
    }
    std::cout << std::endl;
  }

  static std::string now() {
    const std::time_t time = std::time(nullptr);
    std::tm utc{};
    gmtime_r(&time, &utc);
    char text[32];
    std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &utc);
    return text;
  }

  void write_json(const Row& row) {
    if (!json_.is_open()) return;
    const bool timed = row.failure.empty();
    const auto finite = [](double value) {
      return std::isfinite(value) ? nlohmann::ordered_json(value) : nlohmann::ordered_json();
    };
    const auto when_timed = [&](double value) {
      return timed ? finite(value) : nlohmann::ordered_json();
    };
    const nlohmann::ordered_json line = {
        {"op", row.op},
        {"direction", row.direction},
        {"batch", row.shape.batch},
        {"length", row.shape.length},
        {"width", row.shape.width},
        {"dtype", row.dtype},
        {"ms", when_timed(row.timing.ms)},
        {"spread", when_timed(row.timing.spread)},
        {"bytes", row.bytes},
        {"gb_per_s", when_timed(gb_per_s(row))},
        {"floor_ms", floor_ms(row)},
        {"ratio", when_timed(row.timing.ms / floor_ms(row))},
        {"copy_gb_per_s", watch_->copy_gb_per_s()},
        {"kernel", row.kernel},
        {"error", finite(row.error)},
        {"bound", row.bound},
        {"failure", row.failure},
        {"device", facts_.name},
        {"driver", facts_.driver},
        {"torch", TORCH_VERSION},
        {"commit", SARISSA_COMMIT},
        {"date", now()},
    };
    json_ << line.dump() << std::endl;
  }

  const BenchOptions options_;
  const at::Device device_;
  const at::ScalarType dtype_;
  const c10::DeviceGuard guard_;
  const DeviceFacts facts_;
  Stopwatch* watch_ = nullptr;
  std::ofstream json_;
  int64_t count_ = 0, failed_ = 0;
};

void require_positive(const char* option, const std::vector<int64_t>& values) {
  for (const int64_t value : values) {
    if (value < 1) throw UsageError(str(option, " ", value, ": expected at least 1"));
  }
}

void bench_ops(const BenchOptions& options) {
  static const std::vector<std::string> kDirections = {"fwd", "bwd", "step", "all"};
  if (std::find(kDirections.begin(), kDirections.end(), options.direction) == kDirections.end()) {
    throw UsageError(str("--direction '", options.direction, "': expected fwd, bwd, step or all",
                         did_you_mean(options.direction, kDirections)));
  }
  require_positive("--lengths", options.lengths);
  require_positive("--batch", options.batches);
  require_positive("--step-batch", options.step_batches);
  for (const int64_t width : options.widths) {
    if (width < 1 || width % kLayerWidthMultiple != 0) {
      throw UsageError(str("--width ", width, ": expected a multiple of ", kLayerWidthMultiple));
    }
  }
  if (!(options.seconds > 0)) {
    throw UsageError(str("--seconds ", options.seconds, ": expected more than 0"));
  }
  Bench(options).run();
}

std::string case_names(bool only_by_name) {
  std::string names;
  for (const LayerCase& layer : layer_cases()) {
    if (layer.only_by_name == only_by_name) names += str(names.empty() ? "" : " ", layer.name);
  }
  return names;
}

void add_ops(CLI::App& bench) {
  auto options = std::make_shared<BenchOptions>();
  CLI::App* command = bench.add_subcommand(
      "ops", "Check the operators at a layer's shapes, then time them against the memory floor");
  command
      ->add_option("--op", options->ops,
                   "Operators. All of them without it: " + case_names(false) +
                       ". Only where named: " + case_names(true))
      ->delimiter(',')
      ->type_name("NAME,...");
  command->add_option("--lengths", options->lengths, "Steps per sequence")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--width", options->widths, "Channels; heads and groups have 16")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--batch", options->batches, "Sequences")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--step-batch", options->step_batches, "Sequences of a step of decoding")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--dtype", options->dtype, "bfloat16, float32, or auto")
      ->capture_default_str();
  command
      ->add_option("--direction", options->direction,
                   "fwd, bwd, step (one step of decoding with a state), or all")
      ->capture_default_str();
  add_device_option(*command, options->device);
  command->add_option("--seconds", options->seconds, "Time spent on timing each case")
      ->capture_default_str();
  command
      ->add_option("--json", options->json, "Also write each case as one object on a line of FILE")
      ->type_name("FILE");
  command->footer(
      "A case with too large an error has no time, and the exit code is 1.\n"
      "Example:\n"
      "  sarissa bench ops --op phalanx,hyena_se --lengths 512,2048 --width 256 --device cpu");
  command->callback([options] { bench_ops(*options); });
}

}  // namespace

void add_bench(CLI::App& program) {
  CLI::App* bench = program.add_subcommand("bench", "Measure speed on this machine");
  bench->require_subcommand(1);
  bench->footer("Example:\n  sarissa bench ops --help");
  add_ops(*bench);
}

}  // namespace sarissa::cli
