// The program: parses the command line, runs one subcommand, and turns exceptions into one line on
// stderr and an exit code (0 done, 1 failed, 2 bad usage).
#include <c10/util/Exception.h>
#include <torch/version.h>

#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "sarissa/base/error.h"
#include "sarissa/cli/commands.h"
#include "sarissa/commit.h"
#include "sarissa/ops/device.h"

namespace sarissa::cli {
namespace {

constexpr int kFailed = 1;
constexpr int kBadUsage = 2;

std::string version_line() {
  const std::string cuda =
      ops::cuda_available() ? "CUDA available" : "no CUDA: " + ops::cuda_unavailable_reason();
  return str("sarissa ", SARISSA_VERSION, " (commit ", SARISSA_COMMIT, "), torch ", TORCH_VERSION,
             ", ", cuda);
}

void add_commands(CLI::App& program) {
  program.set_help_flag("-h,--help", "Print this help and exit");
  program.set_version_flag("--version", version_line, "Print version, commit, torch and CUDA");
  program.footer("'sarissa COMMAND --help' explains a command.");
  add_train(program);
  add_eval(program);
  add_generate(program);
  add_score(program);
  add_inspect(program);
  add_init(program);
  add_data(program);
  add_bench(program);
  add_selftest(program);
}

// "sarissa data prepare" for a parsed nested subcommand.
std::string full_name(const CLI::App& command) {
  return command.get_parent() == nullptr
             ? command.get_name()
             : full_name(*command.get_parent()) + " " + command.get_name();
}

const CLI::App& deepest_parsed(const CLI::App& app) {
  const auto parsed = app.get_subcommands();
  return parsed.empty() ? app : deepest_parsed(*parsed.back());
}

std::vector<std::string> option_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options()) {
    for (const auto& name : option->get_lnames()) names.push_back("--" + name);
    for (const auto& name : option->get_snames()) names.push_back("-" + name);
  }
  return names;
}

std::vector<std::string> command_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    names.push_back(command->get_name());
  }
  return names;
}

// What was wrong with the command line, naming the nearest option or command.
std::string usage_message(const CLI::App& program, const CLI::ParseError& error) {
  const CLI::App& command = deepest_parsed(program);
  const std::vector<std::string> extras = command.remaining();
  const bool needs_command = !command_names(command).empty();
  const bool is_extra = dynamic_cast<const CLI::ExtrasError*>(&error) != nullptr;
  if (!extras.empty() && (is_extra || needs_command)) {
    const std::string word = extras[0].substr(0, extras[0].find('='));
    if (word.starts_with("-")) {
      return str("unknown option '", word, "'", did_you_mean(word, option_names(command)));
    }
    if (needs_command) {
      return str("unknown command '", word, "'", did_you_mean(word, command_names(command)));
    }
    return str("unexpected argument '", word, "'");
  }
  if (dynamic_cast<const CLI::ConversionError*>(&error) != nullptr) {
    // CLI11 says "Could not convert: --tokens = many".
    const std::string what = error.what();
    const size_t name = what.find("--"), equals = what.find(" = ");
    if (name < equals && equals != std::string::npos) {
      return str(what.substr(name, equals - name), " '", what.substr(equals + 3),
                 "': expected a number");
    }
  }
  return error.what();
}

// One line: what a person needs of a message, without torch's backtrace.
std::string one_line(std::string text) {
  std::string line;
  std::istringstream lines(text);
  for (std::string part; std::getline(lines, part);) {
    if (part.starts_with("Exception raised from") || part.starts_with("frame #")) break;
    if (part.empty()) continue;
    if (!line.empty()) line += " ";
    line += part;
  }
  return line;
}

int fail(const std::string& message, int code) {
  std::cout.flush();
  std::cerr << "sarissa: " << one_line(message) << std::endl;
  return code;
}

int run(int argc, char** argv) {
  CLI::App program("Train and run multi-hybrid sequence models (Phalanx, Hyena, attention).",
                   "sarissa");
  try {
    add_commands(program);
    program.parse(argc, argv);
    if (program.get_subcommands().empty()) {
      return fail("no command given; 'sarissa --help' lists them", kBadUsage);
    }
  } catch (const CLI::Success& success) {  // --help, --version
    return program.exit(success, std::cout, std::cerr);
  } catch (const CLI::ParseError& error) {
    const std::string name = full_name(deepest_parsed(program));
    return fail(str(usage_message(program, error), "; see '", name, " --help'"), kBadUsage);
  } catch (const UsageError& error) {
    return fail(error.what(), kBadUsage);
  } catch (const c10::Error& error) {
    return fail(error.what_without_backtrace(), kFailed);
  } catch (const std::bad_alloc&) {
    return fail("out of memory", kFailed);
  } catch (const std::exception& error) {
    return fail(error.what(), kFailed);
  }
  std::cout.flush();
  if (!std::cout) return fail("cannot write the results to stdout (disk full?)", kFailed);
  return 0;
}

}  // namespace
}  // namespace sarissa::cli

int main(int argc, char** argv) { return sarissa::cli::run(argc, argv); }
