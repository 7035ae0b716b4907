#include "sarissa/base/json.h"

#include <set>
#include <vector>

namespace sarissa {
namespace {

/// Refuses what the parser would let pass. (The parser's own callback could do this, but it then
/// walks all members of an object again at the end of each of them.)
class StrictChecker final : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit StrictChecker(int max_depth) : max_depth_(max_depth) {}

  bool start_object(size_t) override {
    keys_.emplace_back();
    return check_depth();
  }
  bool start_array(size_t) override {
    keys_.emplace_back();
    return check_depth();
  }
  bool end_object() override { return leave(); }
  bool end_array() override { return leave(); }
  bool key(std::string& name) override {
    if (!keys_.back().insert(name).second) throw Error(str("two keys '", name, "'"));
    return true;
  }
  bool parse_error(size_t, const std::string&, const nlohmann::json::exception& error) override {
    throw Error(error.what());
  }
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(int64_t) override { return true; }
  bool number_unsigned(uint64_t) override { return true; }
  bool number_float(double, const std::string&) override { return true; }
  bool string(std::string&) override { return true; }
  bool binary(nlohmann::json::binary_t&) override { return true; }

 private:
  bool check_depth() const {
    if (static_cast<int>(keys_.size()) > max_depth_) throw Error("nested too deeply");
    return true;
  }
  bool leave() {
    keys_.pop_back();
    return true;
  }

  int max_depth_;
  std::vector<std::set<std::string>> keys_;  // of each object that is open; none for an array
};

}  // namespace

nlohmann::ordered_json to_json(const FieldValue& value) {
  return std::visit([](const auto& v) { return nlohmann::ordered_json(v); }, value);
}

FieldValue field_value(const nlohmann::ordered_json& json, const std::string& where) {
  using Kind = nlohmann::ordered_json::value_t;
  switch (json.type()) {
    case Kind::boolean:
      return json.get<bool>();
    case Kind::number_integer:
      return json.get<int64_t>();
    case Kind::number_unsigned: {
      const auto number = json.get<uint64_t>();
      if (number > INT64_MAX) throw UsageError(str(where, ": ", number, " is too large"));
      return static_cast<int64_t>(number);
    }
    case Kind::number_float:
      return json.get<double>();
    case Kind::string:
      return json.get<std::string>();
    case Kind::array: {
      std::vector<int64_t> integers;
      std::vector<std::string> strings;
      for (const auto& item : json) {
        if (item.is_number_integer()) {
          integers.push_back(std::get<int64_t>(field_value(item, where)));
        } else if (item.is_string()) {
          strings.push_back(item.get<std::string>());
        }
      }
      if (integers.size() == json.size()) return integers;
      if (strings.size() == json.size()) return strings;
      throw UsageError(str(where, ": expected a list of integers or a list of strings"));
    }
    default:
      throw UsageError(
          str(where, ": expected a value, got ", json.is_null() ? "null" : "an object"));
  }
}

template <class Json>
Json parse_json_object(std::string_view text, const std::string& source, int max_depth) {
  Json object;
  try {
    StrictChecker checker(max_depth);
    nlohmann::json::sax_parse(text.begin(), text.end(), &checker);
    object = Json::parse(text.begin(), text.end());
  } catch (const std::exception& e) {
    throw Error(str(source, ": not valid JSON (", e.what(), ")"));
  }
  SARISSA_CHECK(object.is_object(), source, ": expected a JSON object");
  return object;
}

template nlohmann::ordered_json parse_json_object(std::string_view, const std::string&, int);
template nlohmann::json parse_json_object(std::string_view, const std::string&, int);

}  // namespace sarissa
