// TOML files of settings: sections of keys, no deeper nesting. The parser (toml++) stays in
// toml.cpp.
#pragma once

#include <string>
#include <vector>

#include "sarissa/base/fields.h"

namespace sarissa {

struct TomlEntry {
  std::string key;
  FieldValue value;  // an empty array is an empty list of integers, accepted for either list type
  int64_t line = 0;  // 1-based
};

/// [name] and its entries, in file order. Keys before the first section have the name "".
struct TomlSection {
  std::string name;
  std::vector<TomlEntry> entries;
  int64_t line = 0;
};

/// Parses TOML text. Throws UsageError "SOURCE:LINE: ..." for what is not TOML (duplicate keys are
/// not) and for values that no field can hold: dates, nested tables, mixed arrays.
std::vector<TomlSection> parse_toml(const std::string& text, const std::string& source);

/// Reads and parses a file. Throws sarissa::Error when it cannot be read.
std::vector<TomlSection> read_toml(const std::string& path);

/// "[section]\nkey = value\n..." of the fields; parse_toml reads back the same values.
std::string format_toml(const std::string& section, const std::vector<Field>& fields);

/// Sets every entry of a parsed section on a struct. Throws UsageError with source and line.
template <class Struct>
void set_fields(Struct& self, const TomlSection& section, const std::string& source) {
  for (const auto& entry : section.entries) {
    set_field(self, entry.key, entry.value, str(source, ":", entry.line, ": [", section.name, "]"));
  }
}

}  // namespace sarissa
