#include "sarissa/base/toml.h"

#include <algorithm>
#include <stdexcept>

#include "sarissa/base/file.h"

// toml++ 3.3 asserts what some malformed text breaks ("[!]"), and takes it for granted under
// NDEBUG. Such text must be an error instead.
#undef NDEBUG
static constexpr void check_toml(bool condition) {
  if (!condition) throw std::logic_error("near a bare key or value");
}
#define TOML_ASSERT(condition) check_toml(static_cast<bool>(condition))
#include <toml++/toml.h>

namespace sarissa {
namespace {

FieldValue list_value(const toml::array& array, const std::string& where) {
  if (array.empty() || array.is_homogeneous<int64_t>()) {
    std::vector<int64_t> items;
    for (const auto& item : array) items.push_back(item.as_integer()->get());
    return items;
  }
  if (array.is_homogeneous<std::string>()) {
    std::vector<std::string> items;
    for (const auto& item : array) items.push_back(item.as_string()->get());
    return items;
  }
  throw UsageError(str(where, ": expected a list of integers or a list of strings"));
}

FieldValue node_value(const toml::node& node, const std::string& where) {
  switch (node.type()) {
    case toml::node_type::boolean:
      return node.as_boolean()->get();
    case toml::node_type::integer:
      return node.as_integer()->get();
    case toml::node_type::floating_point:
      return node.as_floating_point()->get();
    case toml::node_type::string:
      return node.as_string()->get();
    case toml::node_type::array:
      return list_value(*node.as_array(), where);
    case toml::node_type::table:
      throw UsageError(str(where, ": sections cannot be nested; write [section] and key = value"));
    default:
      throw UsageError(str(where, ": dates and times are not used; write a string"));
  }
}

std::vector<TomlEntry> entries_of(const toml::table& table, const std::string& source,
                                  bool skip_tables) {
  std::vector<TomlEntry> entries;
  for (const auto& [key, node] : table) {
    if (skip_tables && node.is_table()) continue;
    const int64_t line = node.source().begin.line;
    const std::string name(key.str());
    entries.push_back({name, node_value(node, str(source, ":", line, ": ", name)), line});
  }
  // toml++ sorts keys by name; files are read in the order they are written.
  std::sort(entries.begin(), entries.end(),
            [](const TomlEntry& a, const TomlEntry& b) { return a.line < b.line; });
  return entries;
}

}  // namespace

std::vector<TomlSection> parse_toml(const std::string& text, const std::string& source) {
  toml::table root;
  try {
    root = toml::parse(text, source);
  } catch (const toml::parse_error& e) {
    throw UsageError(str(source, ":", e.source().begin.line, ": ", e.description()));
  } catch (const std::logic_error& e) {
    throw UsageError(str(source, ": not valid TOML (", e.what(), ")"));
  }
  std::vector<TomlSection> sections;
  for (const auto& [key, node] : root) {
    if (const toml::table* table = node.as_table()) {
      sections.push_back({std::string(key.str()), entries_of(*table, source, false),
                          static_cast<int64_t>(node.source().begin.line)});
    }
  }
  std::sort(sections.begin(), sections.end(),
            [](const TomlSection& a, const TomlSection& b) { return a.line < b.line; });
  auto top = entries_of(root, source, true);
  if (!top.empty()) {
    const int64_t line = top.front().line;
    sections.insert(sections.begin(), {"", std::move(top), line});
  }
  return sections;
}

std::vector<TomlSection> read_toml(const std::string& path) {
  return parse_toml(read_file(path), path);
}

std::string format_toml(const std::string& section, const std::vector<Field>& fields) {
  std::string text = section.empty() ? "" : "[" + section + "]\n";
  for (const auto& field : fields) text += field.name + " = " + format_value(field.value) + "\n";
  return text;
}

}  // namespace sarissa
