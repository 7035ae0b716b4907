// sarissa generate: continues prompts.
#include "sarissa/infer/generate.h"

#include <chrono>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "sarissa/base/error.h"
#include "sarissa/base/file.h"
#include "sarissa/base/log.h"
#include "sarissa/cli/files.h"
#include "sarissa/cli/model_options.h"
#include "sarissa/data/records.h"

namespace sarissa::cli {
namespace {

struct GenerateOptions {
  ModelOptions model;
  std::vector<std::string> prompts;
  std::string prompt_file;
  infer::GenerateOptions generate;
  bool json = false;
};

// A byte is its own id. Ids above 255 pad the vocabulary and stand for no text.
constexpr int64_t kByteIds = 256;

std::vector<int64_t> byte_ids(const std::string& text) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(text.data());
  return {bytes, bytes + text.size()};
}

std::vector<std::string> read_prompts(const std::string& path) {
  std::vector<std::string> prompts;
  if (is_fasta(path) || is_jsonl(path)) {
    const auto records = data::open_records(path);
    for (std::string id; records->next(id);) {
      std::string prompt;
      for (std::string piece; !(piece = records->read(1 << 20)).empty();) prompt += piece;
      prompts.push_back(prompt);
    }
    return prompts;
  }
  std::string text;
  InputStream file(path);
  for (std::string_view piece; !(piece = file.peek()).empty(); file.consume(piece.size())) {
    text += piece;
  }
  if (text.ends_with('\n')) text.pop_back();  // editors end a file with one
  return {text};
}

void generate(const GenerateOptions& options) {
  if (options.prompts.empty() == options.prompt_file.empty()) {
    throw UsageError("give either --prompt TEXT or --prompt-file FILE");
  }
  options.generate.validate();
  const std::vector<std::string> prompts =
      options.prompt_file.empty() ? options.prompts : read_prompts(options.prompt_file);
  const model::Decoder decoder = load_model(options.model);

  const auto start = std::chrono::steady_clock::now();
  int64_t drawn = 0;
  for (const std::string& prompt : prompts) {
    const std::vector<int64_t> ids = byte_ids(prompt);
    if (!options.json) std::cout << prompt << std::flush;
    std::string text;
    const infer::Generation result =
        infer::generate(decoder, ids, options.generate, [&](int64_t token) {
          text.push_back(static_cast<char>(token));
          if (!options.json) std::cout << text.back() << std::flush;
        });
    drawn += static_cast<int64_t>(result.tokens.size());
    if (options.json) {
      nlohmann::ordered_json line;
      line["prompt"] = prompt;
      line["text"] = text;
      line["tokens"] = result.tokens;
      line["logprobs"] = result.logprobs;
      // Bytes that are not UTF-8 are replaced in the texts; "tokens" is exact.
      std::cout << line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    }
    std::cout << std::endl;
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  log_info(drawn, " tokens in ", seconds.count(), " s");
}

}  // namespace

void add_generate(CLI::App& program) {
  auto options = std::make_shared<GenerateOptions>();
  auto& sampling = options->generate.sampling;
  sampling.vocabulary = kByteIds;
  CLI::App* command = program.add_subcommand("generate", "Continue a prompt");
  add_model_options(*command, options->model);
  command->add_option("--prompt", options->prompts, "Text to continue; may be given several times")
      ->allow_extra_args(false)
      ->type_name("TEXT");
  command
      ->add_option("--prompt-file", options->prompt_file,
                   "One prompt as a text file, or several as .jsonl or .fasta (also .gz)")
      ->type_name("FILE");
  command->add_option("-n,--tokens", options->generate.tokens, "Tokens to draw per prompt")
      ->capture_default_str();
  command->add_option("--temperature", sampling.temperature, "0 takes the most likely token")
      ->capture_default_str();
  command->add_option("--top-k", sampling.top_k, "Draw from the K most likely tokens; 0: all")
      ->capture_default_str();
  command
      ->add_option("--top-p", sampling.top_p,
                   "Draw from the most likely tokens that together reach this probability")
      ->capture_default_str();
  command->add_option("--seed", sampling.seed, "Same seed, same text")->capture_default_str();
  command
      ->add_option("--prefill-chunk", options->generate.prefill_chunk,
                   "Prompt tokens per forward pass; less needs less memory")
      ->capture_default_str();
  command->add_flag("--stop-at-end", options->generate.stop_at_end,
                    "Stop when the model ends the document (id 0)");
  command->add_flag("--json", options->json,
                    "One object per prompt: prompt, text, tokens, logprobs");
  command->footer(
      "Example:\n"
      "  sarissa generate --model runs/quickstart/model --prompt \"ROMEO:\" -n 200 --seed 1");
  command->callback([options] { generate(*options); });
}

}  // namespace sarissa::cli
