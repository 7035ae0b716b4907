// One description of a settings struct serves TOML, JSON, command-line overrides, help texts and
// error messages. A struct lists its fields once:
//
//   struct OptimConfig {
//     double lr = 3e-4;
//     template <class Visitor>
//     static void fields(Visitor& visit, auto& self) {  // self: OptimConfig& or const OptimConfig&
//       visit("lr", self.lr, "peak learning rate");
//     }
//   };
//
// Field types: bool, int64_t, double, std::string, std::vector<int64_t>, std::vector<std::string>.
// The functions below (fields.cpp, plus templates here) are the only readers and writers; toml.h
// and json.h turn files into the FieldValues that they take and back.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "sarissa/base/error.h"

namespace sarissa {

/// A value of any field type, as a file or a struct holds it.
using FieldValue = std::variant<bool, int64_t, double, std::string, std::vector<int64_t>,
                                std::vector<std::string>>;

/// One field of a struct: its name, its value now and one line of help.
struct Field {
  std::string name;
  FieldValue value;
  std::string help;
};

/// The value as TOML and JSON both write it: true, 3, 0.5, "text", [1, 2]. Doubles take the fewest
/// digits that read back to the same bits, and always look like floats (1.0, 1e-05).
std::string format_value(const FieldValue& value);

/// "true or false", "an integer", "a number", "a string", "a list of integers", "a list of
/// strings".
const char* type_name(const FieldValue& value);

/// Puts `value` into `field`. An integer is accepted where a number is expected, nothing else is
/// converted. Throws UsageError "WHERE: expected an integer, got "abc"" for another type, and for a
/// double that is not finite.
void assign_value(bool& field, const FieldValue& value, const std::string& where);
void assign_value(int64_t& field, const FieldValue& value, const std::string& where);
void assign_value(double& field, const FieldValue& value, const std::string& where);
void assign_value(std::string& field, const FieldValue& value, const std::string& where);
void assign_value(std::vector<int64_t>& field, const FieldValue& value, const std::string& where);
void assign_value(std::vector<std::string>& field, const FieldValue& value,
                  const std::string& where);

/// Reads `text` of a command line as a value of the field's type: true/false, 3, 1e-3, any text
/// (taken as it is, without quotes), a,b,c or [a, b, c]. Throws UsageError as assign_value does.
void assign_text(bool& field, const std::string& text, const std::string& where);
void assign_text(int64_t& field, const std::string& text, const std::string& where);
void assign_text(double& field, const std::string& text, const std::string& where);
void assign_text(std::string& field, const std::string& text, const std::string& where);
void assign_text(std::vector<int64_t>& field, const std::string& text, const std::string& where);
void assign_text(std::vector<std::string>& field, const std::string& text,
                 const std::string& where);

/// Help for a section, one line per field: "--optim.lr=0.001   peak learning rate". The values are
/// those of `fields`. section "": "--lr=...".
std::string help_listing(const std::string& section, const std::vector<Field>& fields);

/// Throws the UsageError for a name that no field has: "WHERE: unknown key 'lrr' (did you mean
/// 'lr'?)"; with no near name it lists those there are.
[[noreturn]] void throw_unknown_key(const std::string& key, const std::vector<std::string>& names,
                                    const std::string& where);

/// All fields of a struct, in the order of its description.
template <class Struct>
std::vector<Field> list_fields(const Struct& self) {
  std::vector<Field> result;
  auto visit = [&](const char* name, const auto& field, const char* help) {
    result.push_back({name, FieldValue(field), help});
  };
  Struct::fields(visit, self);
  return result;
}

/// Names of all fields of a struct.
template <class Struct>
std::vector<std::string> field_names() {
  std::vector<std::string> names;
  for (auto& field : list_fields(Struct{})) names.push_back(std::move(field.name));
  return names;
}

/// Sets the field `key` from a file's value. `where` starts every message (e.g. "run.toml:12:
/// [optim]"). Throws UsageError for an unknown key, with the nearest name, and for a wrong type.
template <class Struct>
void set_field(Struct& self, const std::string& key, const FieldValue& value,
               const std::string& where) {
  bool found = false;
  auto visit = [&](const char* name, auto& field, const char*) {
    if (key != name) return;
    assign_value(field, value, str(where, " ", key));
    found = true;
  };
  Struct::fields(visit, self);
  if (!found) throw_unknown_key(key, field_names<Struct>(), where);
}

/// Sets the field `key` from text of the command line; otherwise as above. `where` is e.g.
/// "--optim.lr=abc".
template <class Struct>
void set_field_text(Struct& self, const std::string& key, const std::string& text,
                    const std::string& where) {
  bool found = false;
  auto visit = [&](const char* name, auto& field, const char*) {
    if (key != name) return;
    assign_text(field, text, where);
    found = true;
  };
  Struct::fields(visit, self);
  if (!found) throw_unknown_key(key, field_names<Struct>(), where);
}

}  // namespace sarissa
