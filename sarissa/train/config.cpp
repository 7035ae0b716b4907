#include "sarissa/train/config.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "sarissa/base/error.h"
#include "sarissa/base/fields.h"
#include "sarissa/base/toml.h"

namespace sarissa::train {
namespace {

constexpr const char* kPreset = "preset";

// Calls visit(section name, section struct) for every section, in file order.
void for_each_section(auto& config, auto&& visit) {
  visit("model", config.model);
  visit("data", config.data);
  visit("train", config.train);
  visit("optim", config.optim);
  visit("eval", config.eval);
  visit("log", config.log);
}

std::vector<std::string> section_names() {
  std::vector<std::string> names;
  RunConfig config;
  for_each_section(config, [&](const char* name, auto&) { names.emplace_back(name); });
  return names;
}

[[noreturn]] void throw_unknown_section(const std::string& name, const std::string& where) {
  const auto names = section_names();
  std::string list;
  for (const auto& known : names) list += " [" + known + "]";
  const std::string hint = did_you_mean(name, names);
  throw UsageError(
      str(where, ": unknown section [", name, "]", hint.empty() ? "; there are" + list : hint));
}

// Calls visit(section struct) for the section of that name.
void with_section(RunConfig& config, const std::string& name, const std::string& where,
                  auto&& visit) {
  bool found = false;
  for_each_section(config, [&](const char* known, auto& section) {
    if (name != known) return;
    found = true;
    visit(section);
  });
  if (!found) throw_unknown_section(name, where);
}

struct Override {
  std::string section, key, value, text;
};

Override parse_override(const std::string& text) {
  const size_t equals = text.find('=');
  const size_t dot = text.find('.');
  if (equals == std::string::npos || dot == std::string::npos || dot > equals || dot == 0) {
    throw UsageError(
        str("override '", text, "': expected --section.key=value, e.g. --optim.lr=1e-3"));
  }
  return {text.substr(0, dot), text.substr(dot + 1, equals - dot - 1), text.substr(equals + 1),
          "--" + text};
}

// The preset that the file or, with precedence, an override names.
std::optional<std::string> find_preset(const std::vector<TomlSection>& sections,
                                       const std::vector<Override>& overrides,
                                       const std::string& path) {
  std::optional<std::string> preset;
  for (const auto& section : sections) {
    for (const auto& entry : section.entries) {
      if (section.name != "model" || entry.key != kPreset) continue;
      preset.emplace();
      assign_value(*preset, entry.value, str(path, ":", entry.line, ": [model] preset"));
    }
  }
  for (const auto& override : overrides) {
    if (override.section == "model" && override.key == kPreset) preset = override.value;
  }
  return preset;
}

void require(bool condition, const std::string& key, const auto& value, const std::string& fix) {
  if (!condition) throw UsageError(str(key, " = ", format_value(FieldValue(value)), ": ", fix));
}

void require_one_of(const std::string& key, const std::string& value,
                    const std::vector<std::string>& choices) {
  if (std::find(choices.begin(), choices.end(), value) != choices.end()) return;
  std::string list;
  for (const auto& choice : choices) list += (list.empty() ? "" : ", ") + choice;
  throw UsageError(
      str(key, " = \"", value, "\": expected one of ", list, did_you_mean(value, choices)));
}

void require_at_least(const std::string& key, int64_t value, int64_t least) {
  require(value >= least, key, value, str("must be at least ", least));
}

void require_fraction(const std::string& key, double value) {
  require(value >= 0 && value <= 1, key, value, "must be between 0 and 1");
}

void validate_train(const TrainConfig& train) {
  require(!train.output.empty(), "train.output", train.output, "name a run directory");
  require_at_least("train.seed", train.seed, 0);
  require_at_least("train.steps", train.steps, 1);
  require_at_least("train.batch", train.batch, 1);
  require_at_least("train.micro_batch", train.micro_batch, 0);
  require(train.batch % train.resolved_micro_batch() == 0, "train.micro_batch", train.micro_batch,
          str("must divide train.batch (", train.batch, ")"));
  require_at_least("train.context", train.context, 1);
  require_one_of("train.dtype", train.dtype, {"auto", "float32", "bfloat16"});
  require(train.device == "auto" || train.device == "cpu" || train.device == "cuda" ||
              train.device.starts_with("cuda:"),
          "train.device", train.device, "expected auto, cpu, cuda or cuda:N");
  require(train.threads >= 0 && train.threads <= 1024, "train.threads", train.threads,
          "must be between 0 (one per core) and 1024");
  require_at_least("train.checkpoint_every", train.checkpoint_every, 0);
  require_at_least("train.keep_last", train.keep_last, 0);
}

void validate_optim(const OptimConfig& optim) {
  require(optim.lr > 0, "optim.lr", optim.lr, "must be above 0");
  require_fraction("optim.min_lr_ratio", optim.min_lr_ratio);
  require_one_of("optim.schedule", optim.schedule, {"cosine", "wsd", "constant"});
  require_at_least("optim.warmup", optim.warmup, 0);
  require_fraction("optim.decay_fraction", optim.decay_fraction);
  require(optim.weight_decay >= 0, "optim.weight_decay", optim.weight_decay, "must be at least 0");
  require(optim.beta1 >= 0 && optim.beta1 < 1, "optim.beta1", optim.beta1, "must be in [0, 1)");
  require(optim.beta2 >= 0 && optim.beta2 < 1, "optim.beta2", optim.beta2, "must be in [0, 1)");
  require(optim.eps > 0, "optim.eps", optim.eps, "must be above 0");
  require(optim.clip >= 0, "optim.clip", optim.clip, "must be at least 0 (0: no clipping)");
}

void validate_eval(const EvalConfig& eval) {
  require_at_least("eval.every", eval.every, 0);
  require_at_least("eval.tokens", eval.tokens, 0);
  require_at_least("eval.batch", eval.batch, 1);
  require_at_least("eval.sample_every", eval.sample_every, 0);
  require_at_least("eval.sample_tokens", eval.sample_tokens, 1);
  require(eval.sample_temperature >= 0, "eval.sample_temperature", eval.sample_temperature,
          "must be at least 0");
}

}  // namespace

void RunConfig::validate() const {
  model.validate();
  require(!data.train.empty(), "data.train", data.train, "name the file to train on");
  require_fraction("data.validation_fraction", data.validation_fraction);
  require_fraction("data.test_fraction", data.test_fraction);
  require(data.validation_fraction + data.test_fraction < 1, "data.validation_fraction",
          data.validation_fraction, "with data.test_fraction it leaves nothing to train on");
  validate_train(train);
  validate_optim(optim);
  validate_eval(eval);
  require_at_least("log.every", log.every, 1);
}

RunConfig load_run_config(const std::string& path, const std::vector<std::string>& overrides) {
  const auto sections = read_toml(path);
  std::vector<Override> parsed;
  for (const auto& text : overrides) parsed.push_back(parse_override(text));

  RunConfig config;
  if (const auto preset = find_preset(sections, parsed, path)) {
    config.model = model::preset(*preset);
  }
  for (auto section : sections) {
    const std::string where = str(path, ":", section.line);
    if (section.name.empty()) {
      throw UsageError(str(where, ": '", section.entries.front().key,
                           "' stands before the first section; put it under "
                           "[train] or another"));
    }
    if (section.name == "model") {
      std::erase_if(section.entries, [](const TomlEntry& entry) { return entry.key == kPreset; });
    }
    with_section(config, section.name, where,
                 [&](auto& settings) { set_fields(settings, section, path); });
  }
  for (const auto& override : parsed) {
    if (override.section == "model" && override.key == kPreset) continue;
    with_section(config, override.section, override.text, [&](auto& settings) {
      set_field_text(settings, override.key, override.value, override.text);
    });
  }
  config.validate();
  return config;
}

std::string to_toml(const RunConfig& config) {
  std::string text;
  for_each_section(config, [&](const char* name, const auto& section) {
    if (!text.empty()) text += "\n";
    text += format_toml(name, list_fields(section));
  });
  return text;
}

std::vector<Difference> differences(const RunConfig& a, const RunConfig& b) {
  const auto values = [](const RunConfig& config) {
    std::vector<std::pair<std::string, std::string>> list;
    for_each_section(config, [&](const char* name, const auto& section) {
      for (const auto& field : list_fields(section)) {
        list.emplace_back(str(name, ".", field.name), format_value(field.value));
      }
    });
    return list;
  };
  const auto left = values(a), right = values(b);
  std::vector<Difference> result;
  for (size_t i = 0; i < left.size(); ++i) {
    if (left[i].second != right[i].second) {
      result.push_back({left[i].first, left[i].second, right[i].second});
    }
  }
  return result;
}

std::vector<std::string> parse_overrides(const std::vector<std::string>& words,
                                         const std::vector<std::string>& options) {
  std::vector<std::string> overrides;
  for (size_t i = 0; i < words.size(); ++i) {
    if (!words[i].starts_with("--")) {
      throw UsageError(
          str("unexpected argument '", words[i], "'; settings are --section.key=value"));
    }
    std::string text = words[i].substr(2);
    const std::string name = text.substr(0, text.find('='));
    if (name.find('.') == std::string::npos) {
      throw UsageError(str("unknown option '--", name, "'", did_you_mean("--" + name, options),
                           "; settings are --section.key=value"));
    }
    if (name == text) {
      if (i + 1 == words.size()) throw UsageError(str("--", name, ": the value is missing"));
      text += "=" + words[++i];
    }
    overrides.push_back(text);
  }
  return overrides;
}

std::string config_help() {
  std::string text = "--model.preset=NAME   start from a preset of 'sarissa init'\n";
  const RunConfig defaults;
  for_each_section(defaults, [&](const char* name, const auto& section) {
    text += help_listing(name, list_fields(section));
  });
  return text;
}

}  // namespace sarissa::train
