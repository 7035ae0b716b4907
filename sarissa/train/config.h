// A training run: the sections of one TOML file.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sarissa/data/corpus.h"
#include "sarissa/model/config.h"

namespace sarissa::train {

struct TrainConfig {
  std::string output = "runs/default";  // run directory
  int64_t seed = 0;
  int64_t steps = 1000;
  int64_t batch = 16;              // sequences per optimizer step, over all ranks
  int64_t micro_batch = 0;         // sequences per forward pass; 0: as batch (no accumulation)
  int64_t context = 512;           // tokens per sequence
  std::string device = "auto";     // auto | cpu | cuda | cuda:N
  std::string dtype = "auto";      // auto (bf16 on CUDA, float32 on CPU) | float32 | bfloat16
  int64_t threads = 0;             // CPU threads; 0: one per core
  int64_t checkpoint_every = 500;  // steps; 0: only at the end
  int64_t keep_last = 3;           // checkpoints kept; 0: all

  template <class Visitor>
  static void fields(Visitor& visit, auto& self) {
    visit("output", self.output, "run directory");
    visit("seed", self.seed, "of the initial weights and the order of the data");
    visit("steps", self.steps, "optimizer steps of the whole run");
    visit("batch", self.batch, "sequences per optimizer step");
    visit("micro_batch", self.micro_batch, "sequences per forward pass; 0: as batch");
    visit("context", self.context, "tokens per sequence");
    visit("device", self.device, "auto, cpu, cuda or cuda:N");
    visit("dtype", self.dtype, "of the weights: auto, float32 or bfloat16");
    visit("threads", self.threads, "CPU threads; 0: one per core");
    visit("checkpoint_every", self.checkpoint_every, "steps; 0: only at the end");
    visit("keep_last", self.keep_last, "checkpoints kept; 0: all");
  }

  /// micro_batch with 0 resolved.
  int64_t resolved_micro_batch() const { return micro_batch == 0 ? batch : micro_batch; }
};

struct OptimConfig {
  double lr = 1e-3;
  double min_lr_ratio = 0.1;
  std::string schedule = "cosine";  // cosine | wsd (warm-up, stable, decay) | constant
  int64_t warmup = 100;             // steps
  double decay_fraction = 0.2;      // wsd: the last fraction of the steps
  double weight_decay = 0.1;
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
  double clip = 1.0;  // global gradient norm; 0: off

  template <class Visitor>
  static void fields(Visitor& visit, auto& self) {
    visit("lr", self.lr, "peak learning rate");
    visit("min_lr_ratio", self.min_lr_ratio, "last learning rate / lr (cosine, wsd)");
    visit("schedule", self.schedule, "cosine, wsd (warm-up, stable, decay) or constant");
    visit("warmup", self.warmup, "steps of linear warm-up");
    visit("decay_fraction", self.decay_fraction, "wsd: fraction of the steps that decay");
    visit("weight_decay", self.weight_decay, "on matrices; norms, biases and filters have none");
    visit("beta1", self.beta1, "AdamW: decay of the first moment");
    visit("beta2", self.beta2, "AdamW: decay of the second moment");
    visit("eps", self.eps, "AdamW: added to the root of the second moment");
    visit("clip", self.clip, "largest global gradient norm; 0: no clipping");
  }
};

struct EvalConfig {
  int64_t every = 250;     // steps; 0: only at the end
  int64_t tokens = 65536;  // validation tokens per evaluation; 0: all
  int64_t batch = 16;
  int64_t sample_every = 0;  // steps between printed samples; 0: none
  int64_t sample_tokens = 200;
  std::string sample_prompt = "\n";
  double sample_temperature = 0.8;

  template <class Visitor>
  static void fields(Visitor& visit, auto& self) {
    visit("every", self.every, "steps between evaluations; 0: only at the end");
    visit("tokens", self.tokens, "validation tokens per evaluation; 0: all");
    visit("batch", self.batch, "sequences per forward pass of an evaluation");
    visit("sample_every", self.sample_every, "steps between printed samples; 0: none");
    visit("sample_tokens", self.sample_tokens, "tokens of a printed sample");
    visit("sample_prompt", self.sample_prompt, "what a printed sample continues");
    visit("sample_temperature", self.sample_temperature, "of a printed sample; 0: greedy");
  }
};

struct LogConfig {
  int64_t every = 10;  // steps between metrics lines
  bool tensorboard = true;

  template <class Visitor>
  static void fields(Visitor& visit, auto& self) {
    visit("every", self.every, "steps between lines of metrics.jsonl");
    visit("tensorboard", self.tensorboard, "also write TensorBoard events");
  }
};

struct RunConfig {
  model::ModelConfig model;
  data::DataConfig data;
  TrainConfig train;
  OptimConfig optim;
  EvalConfig eval;
  LogConfig log;

  /// Throws UsageError that names the key, the value and the fix.
  void validate() const;
};

/// Reads a TOML file (sections [model] [data] [train] [optim] [eval] [log]; `preset = "NAME"` in
/// [model] starts from a preset), then applies overrides of the form "section.key=value" (also of
/// model.preset, which then replaces the file's), and validates the result. Throws UsageError for
/// an unknown section or key with the nearest name, and for a value of the wrong type.
RunConfig load_run_config(const std::string& path, const std::vector<std::string>& overrides);

/// The resolved configuration as TOML; load_run_config reads it back to the same values.
std::string to_toml(const RunConfig& config);

/// A setting that two configurations disagree on, with both values as TOML.
struct Difference {
  std::string key;  // "section.key"
  std::string a, b;
};
std::vector<Difference> differences(const RunConfig& a, const RunConfig& b);

/// The words of a command line after the file name as overrides: "--section.key=value" or
/// "--section.key value". Throws UsageError for anything else; `options` are the names that it may
/// suggest.
std::vector<std::string> parse_overrides(const std::vector<std::string>& words,
                                         const std::vector<std::string>& options);

/// Every key with its default and one line of help.
std::string config_help();

}  // namespace sarissa::train
