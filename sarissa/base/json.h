// Settings structs (fields.h) as JSON objects, in the order of their description.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "sarissa/base/fields.h"

namespace sarissa {

nlohmann::ordered_json to_json(const FieldValue& value);

/// Throws UsageError naming `where` for null, objects and mixed or nested arrays.
FieldValue field_value(const nlohmann::ordered_json& json, const std::string& where);

/// Parses one JSON object, refusing duplicate keys (which the parser would silently merge), nesting
/// deeper than `max_depth` and anything but an object. Throws sarissa::Error naming `source`.
/// Json: nlohmann::ordered_json keeps the order of keys but looks them up one by one;
/// nlohmann::json sorts them, for objects of very many keys.
template <class Json = nlohmann::ordered_json>
Json parse_json_object(std::string_view text, const std::string& source, int max_depth = 16);

template <class Struct>
nlohmann::ordered_json fields_to_json(const Struct& self) {
  nlohmann::ordered_json object = nlohmann::ordered_json::object();
  for (const auto& field : list_fields(self)) object[field.name] = to_json(field.value);
  return object;
}

/// Sets the fields named in `object` and leaves the others. Throws UsageError for an unknown key
/// with the nearest name, and for a wrong type with key, value and expected type.
template <class Struct>
void fields_from_json(Struct& self, const nlohmann::ordered_json& object,
                      const std::string& where) {
  if (!object.is_object()) throw UsageError(str(where, ": expected a JSON object"));
  for (const auto& [key, value] : object.items()) {
    set_field(self, key, field_value(value, str(where, ": ", key)), str(where, ":"));
  }
}

}  // namespace sarissa
