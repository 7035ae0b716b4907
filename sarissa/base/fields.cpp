#include "sarissa/base/fields.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <type_traits>

namespace sarissa {
namespace {

std::string quote(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    switch (c) {
      case '"':
        result += "\\\"";
        break;
      case '\\':
        result += "\\\\";
        break;
      case '\n':
        result += "\\n";
        break;
      case '\r':
        result += "\\r";
        break;
      case '\t':
        result += "\\t";
        break;
      default:
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
          char escaped[8];
          std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
          result += escaped;
        } else {
          result += c;
        }
    }
  }
  return result + "\"";
}

std::string format_double(double value) {
  char digits[64];
  const auto end = std::to_chars(digits, digits + sizeof digits, value);
  std::string text(digits, end.ptr);
  if (text.find_first_of(".en") == std::string::npos) text += ".0";  // n: inf, nan
  return text;
}

template <class Item, class Format>
std::string format_list(const std::vector<Item>& items, Format format) {
  std::string text = "[";
  for (size_t i = 0; i < items.size(); ++i) {
    if (i > 0) text += ", ";
    text += format(items[i]);
  }
  return text + "]";
}

[[noreturn]] void throw_wrong_type(const FieldValue& expected, const std::string& got,
                                   const std::string& where) {
  throw UsageError(str(where, ": expected ", type_name(expected), ", got ", got));
}

template <class T>
void assign_same_type(T& field, const FieldValue& value, const std::string& where) {
  const auto* same = std::get_if<T>(&value);
  if (same == nullptr) throw_wrong_type(T{}, format_value(value), where);
  field = *same;
}

/// The whole text as a number; false when it is not one.
template <class T>
bool parse_number(std::string_view text, T& number) {
  if (text.starts_with('+')) text.remove_prefix(1);
  const auto result = std::from_chars(text.data(), text.data() + text.size(), number);
  return result.ec == std::errc() && result.ptr == text.data() + text.size() && !text.empty();
}

std::string_view trim(std::string_view text) {
  const auto begin = text.find_first_not_of(" \t");
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(" \t") - begin + 1);
}

/// The items of "a, b, c" or "[a, b, c]"; none for "" and "[]".
std::vector<std::string> split_list(std::string_view text) {
  text = trim(text);
  if (text.starts_with('[') && text.ends_with(']')) text = trim(text.substr(1, text.size() - 2));
  std::vector<std::string> items;
  if (text.empty()) return items;
  while (true) {
    const auto comma = text.find(',');
    items.emplace_back(trim(text.substr(0, comma)));
    if (comma == std::string_view::npos) return items;
    text.remove_prefix(comma + 1);
  }
}

}  // namespace

std::string format_value(const FieldValue& value) {
  return std::visit(
      [](const auto& v) -> std::string {
        using T = std::decay_t<decltype(v)>;
        if constexpr (std::is_same_v<T, bool>) {
          return v ? "true" : "false";
        } else if constexpr (std::is_same_v<T, int64_t>) {
          return std::to_string(v);
        } else if constexpr (std::is_same_v<T, double>) {
          return format_double(v);
        } else if constexpr (std::is_same_v<T, std::string>) {
          return quote(v);
        } else if constexpr (std::is_same_v<T, std::vector<int64_t>>) {
          return format_list(v, [](int64_t item) { return std::to_string(item); });
        } else {
          return format_list(v, quote);
        }
      },
      value);
}

const char* type_name(const FieldValue& value) {
  static constexpr const char* kNames[] = {"true or false",      "an integer",
                                           "a number",           "a string",
                                           "a list of integers", "a list of strings"};
  static_assert(std::variant_size_v<FieldValue> == std::size(kNames));
  return kNames[value.index()];
}

void assign_value(bool& field, const FieldValue& value, const std::string& where) {
  assign_same_type(field, value, where);
}

void assign_value(int64_t& field, const FieldValue& value, const std::string& where) {
  assign_same_type(field, value, where);
}

void assign_value(double& field, const FieldValue& value, const std::string& where) {
  double number = 0;
  if (const auto* integer = std::get_if<int64_t>(&value)) {
    number = static_cast<double>(*integer);
  } else {
    assign_same_type(number, value, where);
  }
  if (!std::isfinite(number)) throw_wrong_type(0.0, format_value(value), where);
  field = number;
}

void assign_value(std::string& field, const FieldValue& value, const std::string& where) {
  assign_same_type(field, value, where);
}

void assign_value(std::vector<int64_t>& field, const FieldValue& value, const std::string& where) {
  assign_same_type(field, value, where);
}

void assign_value(std::vector<std::string>& field, const FieldValue& value,
                  const std::string& where) {
  const auto* integers = std::get_if<std::vector<int64_t>>(&value);
  if (integers != nullptr && integers->empty()) {  // an empty list has no type of its own
    field.clear();
  } else {
    assign_same_type(field, value, where);
  }
}

void assign_text(bool& field, const std::string& text, const std::string& where) {
  if (text != "true" && text != "false") throw_wrong_type(false, quote(text), where);
  field = text == "true";
}

void assign_text(int64_t& field, const std::string& text, const std::string& where) {
  int64_t number = 0;
  if (!parse_number(text, number)) throw_wrong_type(int64_t{0}, quote(text), where);
  field = number;
}

void assign_text(double& field, const std::string& text, const std::string& where) {
  double number = 0;
  if (!parse_number(text, number)) throw_wrong_type(0.0, quote(text), where);
  assign_value(field, number, where);
}

void assign_text(std::string& field, const std::string& text, const std::string&) { field = text; }

void assign_text(std::vector<int64_t>& field, const std::string& text, const std::string& where) {
  std::vector<int64_t> numbers;
  for (const auto& item : split_list(text)) {
    if (!parse_number(item, numbers.emplace_back())) {
      throw_wrong_type(std::vector<int64_t>{}, quote(text), where);
    }
  }
  field = std::move(numbers);
}

void assign_text(std::vector<std::string>& field, const std::string& text, const std::string&) {
  field = split_list(text);
}

std::string help_listing(const std::string& section, const std::vector<Field>& fields) {
  std::vector<std::string> options;
  size_t width = 0;
  for (const auto& field : fields) {
    const auto* text = std::get_if<std::string>(&field.value);
    // A command line takes text without quotes; show it so unless that would not be one word.
    const bool one_word = text != nullptr && !text->empty() &&
                          text->find_first_of(" \t\n\"'\\$`") == std::string::npos;
    options.push_back(str("  --", section, section.empty() ? "" : ".", field.name, "=",
                          one_word ? *text : format_value(field.value)));
    width = std::max(width, options.back().size());
  }
  width = std::min<size_t>(width, 40);
  std::string listing;
  for (size_t i = 0; i < fields.size(); ++i) {
    const size_t padding = options[i].size() < width ? width - options[i].size() : 0;
    listing += options[i] + std::string(padding + 2, ' ') + fields[i].help + "\n";
  }
  return listing;
}

void throw_unknown_key(const std::string& key, const std::vector<std::string>& names,
                       const std::string& where) {
  std::string hint = did_you_mean(key, names);
  if (hint.empty()) {
    hint = " (there are:";
    for (const auto& name : names) hint += " " + name;
    hint += ")";
  }
  throw UsageError(str(where, " unknown key '", key, "'", hint));
}

}  // namespace sarissa
