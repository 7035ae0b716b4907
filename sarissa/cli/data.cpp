// sarissa data: prepare and inspect training data. The work is in sarissa/data/prepare.h.
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "sarissa/cli/commands.h"
#include "sarissa/data/prepare.h"

namespace sarissa::cli {
namespace {

void add_prepare(CLI::App& data) {
  struct Options {
    data::PrepareOptions prepare;
    bool json = false;
  };
  auto options = std::make_shared<Options>();
  CLI::App* command = data.add_subcommand(
      "prepare", "Write text, FASTA or JSONL as a Megatron PREFIX.bin and PREFIX.idx");
  command->add_option("input", options->prepare.input, "File to read, plain or gzip")
      ->required()
      ->type_name("INPUT");
  command->add_option("--output", options->prepare.output, "Write PREFIX.bin and PREFIX.idx")
      ->required()
      ->type_name("PREFIX");
  command
      ->add_option("--format", options->prepare.format,
                   "auto | text | bytes | fasta | jsonl; auto goes by the file's name")
      ->type_name("FORMAT")
      ->capture_default_str();
  command->add_option("--dtype", options->prepare.dtype, "uint8 | uint16: type of a token")
      ->type_name("TYPE")
      ->capture_default_str();
  command->add_flag("--keep-case", options->prepare.keep_case,
                    "FASTA: do not upper-case lower-case (soft-masked) bases");
  command->add_flag("--json", options->json, "One object: output, documents, tokens");
  command->footer(
      "Training reads FASTA, JSONL and text as they are; prepare for corpora too large for memory, "
      "or for\nother programs. The pair has no loss mask, so N counts in the loss.\n\n"
      "Example:\n  sarissa data prepare genome.fasta.gz --output genome");
  command->callback([options] {
    const data::Prepared done = data::prepare(options->prepare);
    if (options->json) {
      const nlohmann::ordered_json line = {
          {"output", done.prefix}, {"documents", done.documents}, {"tokens", done.tokens}};
      std::cout << line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
    } else {
      std::cout << "wrote " << done.tokens << " tokens in " << done.documents << " documents to "
                << done.prefix << ".bin and .idx\n";
    }
  });
}

void add_inspect_data(CLI::App& data) {
  struct Options {
    std::string path, format = "auto";
    bool json = false;
  };
  auto options = std::make_shared<Options>();
  CLI::App* command =
      data.add_subcommand("inspect", "Count documents, tokens and letters, and give a checksum");
  command
      ->add_option("file", options->path,
                   "Text, FASTA, JSONL, plain or gzip; Megatron .bin, .idx or prefix; any bytes")
      ->required()
      ->type_name("FILE");
  command
      ->add_option("--format", options->format,
                   "auto | text | bytes | fasta | jsonl | megatron; auto goes by the file's name")
      ->type_name("FORMAT")
      ->capture_default_str();
  command->add_flag("--json", options->json,
                    "One object: path, format, documents, tokens, shortest, longest, ...");
  command->footer("Example:\n  sarissa data inspect genome.fasta.gz --json");
  command->callback([options] {
    const data::Inspection inspection = data::inspect(options->path, options->format);
    std::cout << (options->json ? data::to_json(inspection) + "\n" : data::to_text(inspection));
  });
}

}  // namespace

void add_data(CLI::App& program) {
  CLI::App* data = program.add_subcommand("data", "Prepare or inspect training data");
  data->require_subcommand(1);
  add_prepare(*data);
  add_inspect_data(*data);
}

}  // namespace sarissa::cli
