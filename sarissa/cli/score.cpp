// sarissa score: log-likelihoods of records.
#include "sarissa/infer/score.h"

#include <charconv>
#include <chrono>
#include <cmath>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "sarissa/base/error.h"
#include "sarissa/base/log.h"
#include "sarissa/base/progress.h"
#include "sarissa/cli/files.h"
#include "sarissa/cli/model_options.h"
#include "sarissa/data/documents.h"
#include "sarissa/data/records.h"

namespace sarissa::cli {
namespace {

struct ScoreOptions {
  ModelOptions model;
  std::string input;
  infer::ScoreOptions score;
  bool per_token = false;
  bool reverse_complement = false;
  bool keep_case = false;
  bool json = false;
};

// The shortest text that reads back as the same number; null is JSON's only way to say NaN.
template <class Number>
std::string number(Number value) {
  if (!std::isfinite(value)) return "null";
  char text[64];
  return {text, std::to_chars(text, text + sizeof text, value).ptr};
}

// The forward strand's score with the mean of both strands' sums; they have equal terms.
infer::Score score_both_strands(const model::Decoder& decoder, const infer::ReadPiece& read,
                                const infer::ScoreOptions& options) {
  std::string sequence;  // the other strand starts at the end: one byte per base has to be held
  for (std::string piece; !(piece = read(1 << 20)).empty();) sequence += piece;
  const infer::Score other =
      infer::score_record(decoder, infer::read_string(data::reverse_complement(sequence)), options);
  infer::Score score =
      infer::score_record(decoder, infer::read_string(std::move(sequence)), options);
  score.sum = 0.5 * (score.sum + other.sum);
  return score;
}

// Writes one record's line (or lines), piece by piece: a record may have any length.
void write_score(const ScoreOptions& options, const std::string& id, const model::Decoder& decoder,
                 const infer::ReadPiece& read) {
  const std::string quoted =
      nlohmann::json(id).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  if (options.json) {
    std::cout << "{\"id\": " << quoted;
    if (options.per_token) std::cout << ", \"logprobs\": [";
  }
  int64_t written = 0;
  const auto write_logprobs = [&](const float* logprobs, int64_t count) {
    for (int64_t t = 0; t < count; ++t, ++written) {
      if (options.json) {
        std::cout << (written > 0 ? ", " : "") << number(logprobs[t]);
      } else {
        std::cout << id << '\t' << written + (options.score.bos ? 0 : 1) << '\t'
                  << number(logprobs[t]) << '\n';
      }
    }
  };
  const infer::Score score =
      options.reverse_complement
          ? score_both_strands(decoder, read, options.score)
          : infer::score_record(decoder, read, options.score,
                                options.per_token ? infer::TakeLogProbs(write_logprobs) : nullptr);
  if (options.json) {
    if (options.per_token) std::cout << "]";
    std::cout << ", \"terms\": " << score.terms << ", \"sum\": " << number(score.sum)
              << ", \"mean\": " << number(score.mean()) << "}\n";
  } else if (!options.per_token) {
    std::cout << id << '\t' << score.terms << '\t' << number(score.sum) << '\t'
              << number(score.mean()) << '\n';
  }
  std::cout.flush();
}

void score(const ScoreOptions& options) {
  if (options.per_token && options.reverse_complement) {
    throw UsageError(
        "--per-token with --reverse-complement: the strands see different contexts, so there is no "
        "average per token; score FASTA files of both strands instead");
  }
  if (options.score.chunk < 1) {
    throw UsageError(str("--chunk ", options.score.chunk, ": must be at least 1"));
  }
  const auto records = data::open_records(options.input);
  const model::Decoder decoder = load_model(options.model);
  const bool upper = is_fasta(options.input) && !options.keep_case;
  Progress progress(options.input, 0, "tokens");
  int64_t count = 0, tokens = 0;
  const infer::ReadPiece read = [&](size_t limit) {
    std::string piece = records->read(limit);
    tokens += static_cast<int64_t>(piece.size());
    progress.update(tokens);
    if (upper) data::to_upper(piece);
    return piece;
  };
  if (!options.json) {
    std::cout << (options.per_token ? "id\tposition\tlogprob\n" : "id\tterms\tsum\tmean\n");
  }
  const auto start = std::chrono::steady_clock::now();
  for (std::string id; records->next(id); ++count) {
    write_score(options, id, decoder, read);
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  log_info(count, count == 1 ? " record, " : " records, ", tokens, " tokens in ", seconds.count(),
           " s");
}

}  // namespace

void add_score(CLI::App& program) {
  auto options = std::make_shared<ScoreOptions>();
  CLI::App* command = program.add_subcommand("score", "Log-likelihoods of records");
  add_model_options(*command, options->model);
  command
      ->add_option("--input", options->input,
                   "Records: .fasta .fa .fna, .jsonl ({\"id\", \"text\"} per line), else text with "
                   "one record per line; also .gz")
      ->required()
      ->type_name("FILE");
  command->add_flag("--per-token", options->per_token, "Every token's log-probability");
  command->add_flag("--bos", options->score.bos,
                    "Put id 0 in front: n tokens give n terms instead of n - 1");
  command->add_flag("--reverse-complement", options->reverse_complement,
                    "Average the sums and means of both DNA strands");
  command->add_flag("--keep-case", options->keep_case,
                    "FASTA: do not upper-case soft-masked bases");
  command->add_option("--chunk", options->score.chunk, "Tokens per forward pass")
      ->capture_default_str();
  command->add_flag("--json", options->json,
                    "One object per record: id, terms, sum, mean, and logprobs with --per-token");
  command->footer(
      "Sums and means are natural logarithms over terms, the scored tokens.\nExample:\n"
      "  sarissa score --model models/dna --input genome.fasta.gz --reverse-complement --json");
  command->callback([options] { score(*options); });
}

}  // namespace sarissa::cli
