#include "sarissa/train/trainer.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/stack.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <utility>

#include "sarissa/base/error.h"
#include "sarissa/base/file.h"
#include "sarissa/base/json.h"
#include "sarissa/base/log.h"
#include "sarissa/checkpoint/safetensors.h"
#include "sarissa/data/batches.h"
#include "sarissa/infer/generate.h"
#include "sarissa/model/decoder.h"
#include "sarissa/ops/device.h"
#include "sarissa/train/console.h"
#include "sarissa/train/diagnose.h"
#include "sarissa/train/hardware.h"
#include "sarissa/train/interrupt.h"
#include "sarissa/train/loss.h"
#include "sarissa/train/optimizer.h"
#include "sarissa/train/run_directory.h"
#include "sarissa/train/schedule.h"
#include "sarissa/train/tensorboard.h"

namespace sarissa::train {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr const char* kOptimizerFile = "optimizer.safetensors";
constexpr const char* kTrainerFile = "trainer.json";

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

at::ScalarType scalar_type(const std::string& dtype) {
  return dtype == "bfloat16" ? at::kBFloat16 : at::kFloat;
}

// Sets the number of CPU threads, and restores it at the end.
class ThreadScope {
 public:
  explicit ThreadScope(int64_t threads) : previous_(at::get_num_threads()) {
    if (threads > 0) at::set_num_threads(static_cast<int>(threads));
  }
  ~ThreadScope() { at::set_num_threads(previous_); }

 private:
  const int previous_;
};

// Makes torch's own operators repeatable (the backward of flash attention adds in any order
// otherwise): without it a resumed run on a GPU would drift from an unbroken one. The extra filling
// of fresh memory that comes with this mode is switched off.
class DeterministicScope {
 public:
  DeterministicScope()
      : on_(at::globalContext().deterministicAlgorithms()),
        warn_only_(at::globalContext().deterministicAlgorithmsWarnOnly()),
        fill_(at::globalContext().deterministicFillUninitializedMemory()) {
    // cuBLAS reads it when its first handle is made.
    ::setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);
    at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true);
    at::globalContext().setDeterministicFillUninitializedMemory(false);
  }
  ~DeterministicScope() {
    at::globalContext().setDeterministicAlgorithms(on_, warn_only_);
    at::globalContext().setDeterministicFillUninitializedMemory(fill_);
  }

 private:
  const bool on_, warn_only_, fill_;
};

// The configuration with "auto" replaced by what this machine has.
RunConfig resolve(RunConfig config) {
  const at::Device device = ops::parse_device(config.train.device);
  config.train.device = device.str();
  if (config.train.dtype == "auto") config.train.dtype = device.is_cuda() ? "bfloat16" : "float32";
  return config;
}

// The configuration of a run that goes on: models must be the same, other changes are announced.
RunConfig resolve_resumed(RunConfig config, const fs::path& stored_path) {
  const RunConfig stored = load_run_config(stored_path.string(), {});
  if (config.train.dtype == "auto") config.train.dtype = stored.train.dtype;
  config = resolve(std::move(config));
  for (const auto& [key, before, now] : differences(stored, config)) {
    if (key.starts_with("model.") || key == "train.dtype") {
      throw UsageError(str("--resume: ", key, " = ", now, ", but the run in ",
                           stored_path.parent_path().string(), " has ", before,
                           "; set it back, or start a new run in another --train.output"));
    }
    if (key != "train.output") log_info("resume: ", key, " was ", before, ", is now ", now);
  }
  return config;
}

nlohmann::ordered_json number(double value) {
  return std::isfinite(value) ? nlohmann::ordered_json(value) : nlohmann::ordered_json();
}

// `text` as a terminal can show it: what is not UTF-8 and control characters are replaced.
std::string printable(const std::string& text) {
  using Json = nlohmann::json;
  const std::string valid = Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
  std::string result = Json::parse(valid).get<std::string>();
  for (char& byte : result) {
    const auto value = static_cast<unsigned char>(byte);
    if ((value < ' ' && byte != '\n' && byte != '\t') || value == 0x7f) byte = '?';
  }
  return result;
}

class Trainer {
 public:
  Trainer(RunConfig config, RunDirectory& run, const TrainOptions& options);
  TrainResult run();

 private:
  struct StepResult {
    double loss, grad_norm, lr;
  };

  model::Decoder make_decoder() const;
  void restore();
  StepResult update();
  void log_step(const StepResult& result);
  void evaluate_now();
  void print_sample() const;
  void save_checkpoint();
  void export_model();
  [[noreturn]] void stop_on_non_finite(const StepResult& result, const data::Batch& batch);
  bool due(int64_t every) const { return every > 0 && step_ % every == 0; }
  bool finished() const { return step_ == config_.train.steps; }

  const RunConfig config_;
  RunDirectory& run_;
  const TrainOptions options_;
  const at::Device device_;
  const data::Splits splits_;
  const data::Batches batches_;
  const std::optional<checkpoint::CheckpointFolder::Entry> start_;  // resumed from
  model::Decoder decoder_;
  AdamW optimizer_;
  int64_t step_ = 0;         // updates done
  int64_t tokens_ = 0;       // tokens read
  int64_t saved_step_ = -1;  // of the latest checkpoint
  int64_t evaluated_step_ = -1;
  double window_seconds_ = 0;  // since the last metrics line, steps alone
  int64_t window_steps_ = 0;
  double tokens_per_second_ = 0;  // in that window
  const std::optional<double> peak_flops_;
  const double flops_per_token_;
  std::unique_ptr<MetricsFile> metrics_;
  std::unique_ptr<EventWriter> events_;
  std::optional<EvalResult> evaluation_;
};

Trainer::Trainer(RunConfig config, RunDirectory& run, const TrainOptions& options)
    : config_(std::move(config)),
      run_(run),
      options_(options),
      device_(ops::parse_device(config_.train.device)),
      splits_(data::open_splits(config_.data)),
      batches_(splits_.train, config_.train.context, static_cast<uint64_t>(config_.train.seed),
               config_.data.reverse_complement),
      start_(options.resume ? run.checkpoints().latest() : std::nullopt),
      decoder_(make_decoder()),
      optimizer_(decoder_.parameters(), config_.optim),
      peak_flops_(device_.is_cuda() && decoder_.dtype() == at::kBFloat16
                      ? peak_bf16_flops(device_name(device_))
                      : std::nullopt),
      flops_per_token_(training_flops_per_token(config_.model, config_.train.context)) {
  if (start_) restore();
  replace_file(run_.config(), to_toml(config_));
  metrics_ = std::make_unique<MetricsFile>(run_.metrics(), step_);
  if (config_.log.tensorboard) events_ = std::make_unique<EventWriter>(run_.path(), step_ + 1);
}

model::Decoder Trainer::make_decoder() const {
  const at::ScalarType dtype = scalar_type(config_.train.dtype);
  model::Decoder decoder =
      start_ ? model::load_model((start_->path / "model").string(), device_, dtype)
             : model::Decoder(config_.model, static_cast<uint64_t>(config_.train.seed), device_,
                              dtype);
  decoder.requires_grad(true);
  return decoder;
}

void Trainer::restore() {
  const fs::path file = start_->path / kTrainerFile;
  const auto state = parse_json_object(read_file(file), file.string());
  SARISSA_CHECK(state.value("step", int64_t{-1}) == start_->step && state.contains("tokens"),
                file.string(), ": the step is not ", start_->step, " or 'tokens' is missing");
  step_ = saved_step_ = start_->step;
  tokens_ = state["tokens"].get<int64_t>();
  optimizer_.unpack(checkpoint::SafetensorsFile(start_->path / kOptimizerFile), step_);
}

Trainer::StepResult Trainer::update() {
  const auto& train = config_.train;
  const int64_t micro_batch = train.resolved_micro_batch();
  const data::Batch batch = batches_.draw(step_, train.batch, 0, train.batch);
  const double total = std::max(1.0, total_weight(batch));  // a batch may be masked as a whole
  at::Tensor loss;
  for (int64_t row = 0; row < train.batch; row += micro_batch) {
    const at::Tensor part =
        loss_sum(decoder_, to_device(batch, row, micro_batch, device_)).div(total);
    part.backward();
    optimizer_.accumulate();
    loss = loss.defined() ? loss.add(part.detach()) : part.detach();
  }
  const double lr = learning_rate(config_.optim, train.steps, step_);
  const at::Tensor norm = optimizer_.step(lr, loss);
  const at::Tensor scalars = at::stack({loss, norm}).cpu();  // waits for the device
  const StepResult result{scalars[0].item<double>(), scalars[1].item<double>(), lr};
  if (!std::isfinite(result.loss) || !std::isfinite(result.grad_norm)) {
    stop_on_non_finite(result, batch);
  }
  optimizer_.confirm();
  optimizer_.clear_gradients();
  ++step_;
  tokens_ += train.batch * train.context;
  return result;
}

void Trainer::stop_on_non_finite(const StepResult& result, const data::Batch& batch) {
  const auto& train = config_.train;
  const bool bad_loss = !std::isfinite(result.loss);
  std::string cause = optimizer_.first_non_finite();
  for (int64_t row = 0; row < train.batch; row += train.resolved_micro_batch()) {
    const std::string part = first_non_finite_output(
        decoder_, to_device(batch, row, train.resolved_micro_batch(), device_));
    if (part.empty()) continue;
    cause += (cause.empty() ? "" : "; ") + str("output of ", part, " from row ", row, " on");
    break;
  }
  if (cause.empty()) cause = "none: every element is finite, only their squares sum to infinity";
  const int64_t failed = step_ + 1;
  metrics_->append({{"step", failed},
                    {"tokens", tokens_ + train.batch * train.context},
                    {"loss", number(result.loss)},
                    {"lr", result.lr},
                    {"grad_norm", number(result.grad_norm)}});
  // The absolute value: the sign of a NaN says nothing.
  throw Error(str("step ", failed, ": the ", bad_loss ? "loss" : "gradient norm", " is ",
                  std::abs(bad_loss ? result.loss : result.grad_norm),
                  "; first not finite: ", cause, "; the run stops, ",
                  saved_step_ < 0 ? "there is no checkpoint yet"
                                  : str("the last good checkpoint is of step ", saved_step_),
                  "; a lower optim.lr (now ", config_.optim.lr, ") may help"));
}

void Trainer::log_step(const StepResult& result) {
  const double memory = double(peak_memory_bytes(device_)) / double(int64_t{1} << 30);
  nlohmann::ordered_json record = {{"step", step_},
                                   {"tokens", tokens_},
                                   {"loss", result.loss},
                                   {"lr", result.lr},
                                   {"grad_norm", result.grad_norm},
                                   {"tok_per_s", tokens_per_second_},
                                   {"mfu", nullptr},
                                   {"mem_gib", memory},
                                   {"ms", 1e3 * window_seconds_ / double(window_steps_)}};
  if (peak_flops_) record["mfu"] = tokens_per_second_ * flops_per_token_ / *peak_flops_;
  metrics_->append(record);
  if (events_) {
    std::vector<std::pair<std::string, double>> values;
    for (const auto& [name, value] : record.items()) {
      if (name != "step" && value.is_number()) values.emplace_back("train/" + name, value);
    }
    events_->scalars(step_, values);
  }
  window_seconds_ = 0;
  window_steps_ = 0;
}

void Trainer::evaluate_now() {
  const auto start = Clock::now();
  evaluation_ = evaluate(decoder_, splits_.validation, config_.train.context, config_.eval.batch,
                         config_.eval.tokens);
  evaluated_step_ = step_;
  metrics_->append({{"step", step_},
                    {"eval_loss", evaluation_->loss},
                    {"bits_per_byte", evaluation_->bits_per_byte},
                    {"perplexity", evaluation_->perplexity},
                    {"eval_tokens", evaluation_->tokens},
                    {"ms", 1e3 * seconds_since(start)}});
  if (events_) {
    events_->scalars(step_, {{"eval/loss", evaluation_->loss},
                             {"eval/bits_per_byte", evaluation_->bits_per_byte},
                             {"eval/perplexity", evaluation_->perplexity}});
  }
  log_info("step ", step_, "  eval loss ", evaluation_->loss, "  bits per byte ",
           evaluation_->bits_per_byte, "  (", evaluation_->tokens, " tokens)");
}

void Trainer::print_sample() const {
  infer::GenerateOptions options;
  options.tokens = config_.eval.sample_tokens;
  options.sampling.temperature = config_.eval.sample_temperature;
  options.sampling.seed = static_cast<uint64_t>(config_.train.seed);
  options.sampling.vocabulary = std::min<int64_t>(256, config_.model.vocab_size);
  std::vector<int64_t> prompt;
  for (const char byte : config_.eval.sample_prompt) {
    prompt.push_back(static_cast<unsigned char>(byte));
  }
  std::string text = config_.eval.sample_prompt;
  for (const int64_t token : infer::generate(decoder_, prompt, options).tokens) {
    text += static_cast<char>(token);
  }
  log_info("step ", step_, "  sample: ", printable(text));
}

void Trainer::save_checkpoint() {
  if (saved_step_ == step_) return;
  run_.checkpoints().save(step_, [&](const fs::path& folder) {
    fs::create_directory(folder / "model");
    model::save_model((folder / "model").string(), decoder_);
    checkpoint::write_safetensors(folder / kOptimizerFile, optimizer_.pack());
    // The data's position and every random number are functions of seed and step.
    const nlohmann::ordered_json state = {
        {"step", step_}, {"tokens", tokens_}, {"seed", config_.train.seed}};
    replace_file(folder / kTrainerFile, state.dump(1) + "\n");
    replace_file(folder / "config.toml", to_toml(config_));
  });
  saved_step_ = step_;
  run_.checkpoints().prune(config_.train.keep_last);
}

void Trainer::export_model() {
  checkpoint::replace_folder(
      run_.model(), [&](const fs::path& folder) { model::save_model(folder.string(), decoder_); });
}

TrainResult Trainer::run() {
  const auto& train = config_.train;
  log_info("training ", model::parameter_count(config_.model), " parameters in ", train.dtype,
           " on ", train.device, ": steps ", step_, " to ", train.steps, " of ",
           train.batch * train.context, " tokens, into ", run_.path().string());
  const InterruptGuard interrupt;
  const bool can_evaluate = splits_.validation != nullptr && splits_.validation->size() >= 2;
  if (!can_evaluate) log_info("no validation data: the model is not evaluated");
  {
    Console console(step_, train.steps);
    const auto stopping = [&] {
      return interrupt.signal() != 0 || (options_.stop_after > 0 && step_ >= options_.stop_after);
    };
    while (!finished() && !stopping()) {
      const auto start = Clock::now();
      const StepResult result = update();
      window_seconds_ += seconds_since(start);
      ++window_steps_;
      tokens_per_second_ = double(window_steps_ * train.batch * train.context) / window_seconds_;
      if (due(config_.log.every) || step_ == 1 || finished()) log_step(result);
      console.update(step_, result.loss, tokens_per_second_);
      if (can_evaluate && (due(config_.eval.every) || finished())) evaluate_now();
      if (due(config_.eval.sample_every)) print_sample();
      if (due(train.checkpoint_every) || finished()) save_checkpoint();
    }
  }
  save_checkpoint();
  if (finished()) {
    export_model();
    log_info("done: ", run_.model().string());
  } else {
    log_info("stopped after step ", step_, " of ", train.steps,
             "; a checkpoint is written, --resume goes on from it");
  }
  return {step_, finished() ? 0 : interrupt.signal(), evaluation_};
}

}  // namespace

TrainResult train(const RunConfig& config, const TrainOptions& options) {
  config.validate();
  RunDirectory run(config.train.output);
  const std::string place = str("train.output = \"", config.train.output, "\"");
  if (run.has_run() && !options.resume) {
    throw UsageError(str(place,
                         ": there is a run in it already; add --resume to go on with it, or "
                         "choose another --train.output"));
  }
  if (!fs::exists(run.config()) && options.resume) {
    throw UsageError(
        str(place, ": there is no run to resume in it; leave --resume out to start one"));
  }
  const RunConfig resolved =
      options.resume ? resolve_resumed(config, run.config()) : resolve(config);
  const ThreadScope threads(resolved.train.threads);
  const DeterministicScope deterministic;
  run.open();
  return Trainer(resolved, run, options).run();
}

int exit_code(const TrainResult& result) { return result.signal == 0 ? 0 : 128 + result.signal; }

}  // namespace sarissa::train
