// sarissa eval: the loss of a model on a file.
#include <chrono>
#include <iomanip>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "sarissa/base/error.h"
#include "sarissa/base/log.h"
#include "sarissa/cli/model_options.h"
#include "sarissa/data/corpus.h"
#include "sarissa/train/evaluate.h"

namespace sarissa::cli {
namespace {

struct EvalOptions {
  ModelOptions model;
  data::DataConfig data;
  std::string split = "all";
  int64_t context = 512;
  int64_t batch = 16;
  int64_t tokens = 0;
  bool json = false;
};

std::shared_ptr<const data::Corpus> open_split(const EvalOptions& options) {
  if (options.split == "all") return data::open_corpus(options.data.train, options.data);
  const data::Splits splits = data::open_splits(options.data);
  if (options.split == "train") return splits.train;
  if (options.split == "validation") return splits.validation;
  if (options.split == "test") return splits.test;
  throw UsageError(str("--split '", options.split, "': expected all, train, validation or test",
                       did_you_mean(options.split, {"all", "train", "validation", "test"})));
}

void eval(const EvalOptions& options) {
  if (options.context < 1) {
    throw UsageError(str("--context ", options.context, ": must be at least 1"));
  }
  if (options.batch < 1) throw UsageError(str("--batch ", options.batch, ": must be at least 1"));
  if (options.tokens < 0) {
    throw UsageError(str("--tokens ", options.tokens, ": must be 1 or more, or 0 for all"));
  }
  const auto corpus = open_split(options);
  SARISSA_CHECK(corpus != nullptr && corpus->size() > 0, options.data.train, ": the split '",
                options.split, "' is empty");
  const model::Decoder decoder = load_model(options.model);
  const auto start = std::chrono::steady_clock::now();
  const train::EvalResult result =
      train::evaluate(decoder, corpus, options.context, options.batch, options.tokens);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  log_info(result.tokens, " tokens in ", seconds.count(), " s");
  if (options.json) {
    const nlohmann::ordered_json line = {{"loss", result.loss},
                                         {"bits_per_byte", result.bits_per_byte},
                                         {"perplexity", result.perplexity},
                                         {"tokens", result.tokens}};
    std::cout << line.dump() << "\n";
    return;
  }
  std::cout << std::fixed << std::setprecision(4) << "loss           " << result.loss
            << " nats per token\n"
            << "bits per byte  " << result.bits_per_byte << "\n"
            << "perplexity     " << result.perplexity << "\n";
}

}  // namespace

void add_eval(CLI::App& program) {
  auto options = std::make_shared<EvalOptions>();
  CLI::App* command = program.add_subcommand("eval", "Loss of a model on a file");
  add_model_options(*command, options->model);
  command
      ->add_option("--data", options->data.train,
                   "Text, FASTA, JSONL, also .gz; Megatron .bin; any bytes")
      ->required()
      ->type_name("FILE");
  command
      ->add_option("--format", options->data.format,
                   "auto, text, bytes, fasta, jsonl or megatron; auto goes by the file's name")
      ->capture_default_str();
  command
      ->add_option("--split", options->split,
                   "all, or the part of the file that training takes as train, validation or test")
      ->capture_default_str();
  command
      ->add_option("--validation-fraction", options->data.validation_fraction,
                   "Where the splits are cut: as data.validation_fraction of the run")
      ->capture_default_str();
  command
      ->add_option("--test-fraction", options->data.test_fraction,
                   "Where the splits are cut: as data.test_fraction of the run")
      ->capture_default_str();
  command->add_option("--context", options->context, "Tokens per window")->capture_default_str();
  command->add_option("--batch", options->batch, "Windows per forward pass")->capture_default_str();
  command->add_option("--tokens", options->tokens, "Tokens to use; 0: all")->capture_default_str();
  command->add_flag("--json", options->json, "One object: loss, bits_per_byte, perplexity, tokens");
  command->footer(
      "Windows do not overlap, and each starts without memory: a longer context gives a lower "
      "loss.\nExample:\n"
      "  sarissa eval --model runs/demo/model --data examples/data/shakespeare.txt --split test");
  command->callback([options] { eval(*options); });
}

}  // namespace sarissa::cli
