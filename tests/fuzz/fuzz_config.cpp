// Model settings as TOML and as JSON: what is accepted is a model whose parameters can be counted,
// and reads back from what is written.
#include <string>

#include "sarissa/base/error.h"
#include "sarissa/base/json.h"
#include "sarissa/base/toml.h"
#include "sarissa/model/config.h"
#include "tests/fuzz/fuzz.h"

namespace sarissa {
namespace {

void check_accepted(const model::ModelConfig& config) {
  config.validate();
  REQUIRE(model::parameter_count(config) > 0);
  const std::string text = format_toml("model", list_fields(config));
  model::ModelConfig read;
  set_fields(read, parse_toml(text, "written").at(0), "written");
  REQUIRE(format_toml("model", list_fields(read)) == text);
}

}  // namespace
}  // namespace sarissa

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  try {
    for (const auto& section : sarissa::parse_toml(text, "fuzz")) {
      sarissa::model::ModelConfig config;
      sarissa::set_fields(config, section, "fuzz");
      sarissa::check_accepted(config);
    }
  } catch (const sarissa::Error&) {
  }
  try {
    sarissa::model::ModelConfig config;
    sarissa::fields_from_json(config, sarissa::parse_json_object(text, "fuzz"), "fuzz");
    sarissa::check_accepted(config);
  } catch (const sarissa::Error&) {
  }
  return 0;
}
