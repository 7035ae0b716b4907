#include "sarissa/base/fields.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "sarissa/base/json.h"
#include "sarissa/base/toml.h"
#include "tests/support/files.h"

namespace sarissa {
namespace {

struct Settings {
  bool flag = false;
  int64_t count = 3;
  double rate = 0.1;
  std::string name = "plain";
  std::vector<int64_t> sizes = {1, 2};
  std::vector<std::string> words = {"a", "b"};

  template <class Visitor>
  static void fields(Visitor& visit, auto& self) {
    visit("flag", self.flag, "a switch");
    visit("count", self.count, "how many");
    visit("rate", self.rate, "how fast");
    visit("name", self.name, "what it is called");
    visit("sizes", self.sizes, "some integers");
    visit("words", self.words, "some strings");
  }
  bool operator==(const Settings&) const = default;
};

Settings unusual() {
  return {.flag = true,
          .count = std::numeric_limits<int64_t>::min(),
          .rate = 1.0 / 3,
          .name = "quote \" backslash \\ tab \t line \n bell \a del \x7f é",
          .sizes = {-5, 0, std::numeric_limits<int64_t>::max()},
          .words = {"", "x, y", "[z]"}};
}

Settings through_toml(const Settings& settings) {
  const auto sections = parse_toml(format_toml("s", list_fields(settings)), "test.toml");
  EXPECT_EQ(sections.size(), 1u);
  Settings read;
  set_fields(read, sections.at(0), "test.toml");
  return read;
}

Settings through_json(const Settings& settings) {
  const std::string text = fields_to_json(settings).dump();
  Settings read;
  fields_from_json(read, parse_json_object(text, "test.json"), "test.json");
  return read;
}

TEST(Fields, NamesInOrderOfDescription) {
  EXPECT_EQ(field_names<Settings>(),
            (std::vector<std::string>{"flag", "count", "rate", "name", "sizes", "words"}));
}

TEST(Fields, TomlAndJsonReadBackTheSameValues) {
  for (const Settings& settings : {Settings{}, unusual(), Settings{.sizes = {}, .words = {}}}) {
    EXPECT_EQ(through_toml(settings), settings);
    EXPECT_EQ(through_json(settings), settings);
  }
}

TEST(Fields, DoublesReadBackToTheSameBits) {
  for (const double rate :
       {0.0, -0.0, 1.0, 1e22, 1e-5, 5e-324, 1.7976931348623157e308, 0.1, 3e-4}) {
    const Settings settings{.rate = rate};
    EXPECT_EQ(std::signbit(through_toml(settings).rate), std::signbit(rate));
    EXPECT_EQ(through_toml(settings).rate, rate) << format_value(rate);
    EXPECT_EQ(through_json(settings).rate, rate) << format_value(rate);
  }
  EXPECT_EQ(format_value(1.0), "1.0");
  EXPECT_EQ(format_value(0.1), "0.1");
}

TEST(Fields, TextSetsEveryType) {
  Settings s;
  set_field_text(s, "flag", "true", "--flag");
  set_field_text(s, "count", "-7", "--count");
  set_field_text(s, "rate", "1e-3", "--rate");
  set_field_text(s, "name", "with \"quotes\" and = signs", "--name");
  set_field_text(s, "sizes", "[4, 5,6]", "--sizes");
  set_field_text(s, "words", "x,y z", "--words");
  EXPECT_EQ(s, (Settings{true, -7, 1e-3, "with \"quotes\" and = signs", {4, 5, 6}, {"x", "y z"}}));
  set_field_text(s, "sizes", "", "--sizes");
  set_field_text(s, "words", "[]", "--words");
  EXPECT_TRUE(s.sizes.empty() && s.words.empty());
}

TEST(Fields, TextOfAnotherTypeIsRefusedAndChangesNothing) {
  Settings s;
  const auto refused = [&](const char* key, const char* text, const char* expected) {
    EXPECT_REFUSED(set_field_text(s, key, text, str("--s.", key, "=", text)), expected);
    EXPECT_REFUSED(set_field_text(s, key, text, str("--s.", key, "=", text)),
                   str("--s.", key, "=", text));
  };
  refused("flag", "1", "true or false");
  refused("count", "3.5", "an integer");
  refused("count", "", "an integer");
  refused("count", "12x", "an integer");
  refused("count", "9223372036854775808", "an integer");
  refused("rate", "fast", "a number");
  refused("rate", "nan", "a number");
  refused("rate", "inf", "a number");
  refused("rate", "1e999", "a number");
  refused("sizes", "1,,2", "a list of integers");
  EXPECT_EQ(s, Settings{});
}

TEST(Fields, ValuesOfAnotherTypeAreRefused) {
  Settings s;
  EXPECT_REFUSED(set_field(s, "count", FieldValue(3.0), "f.toml:2:"),
                 "f.toml:2: count: expected an integer, got 3.0");
  EXPECT_REFUSED(set_field(s, "count", FieldValue(true), "x"), "an integer, got true");
  EXPECT_REFUSED(set_field(s, "flag", FieldValue(int64_t{1}), "x"), "true or false, got 1");
  EXPECT_REFUSED(set_field(s, "name", FieldValue(int64_t{1}), "x"), "a string, got 1");
  EXPECT_REFUSED(set_field(s, "rate", FieldValue(std::string("1")), "x"), "a number, got \"1\"");
  EXPECT_REFUSED(set_field(s, "sizes", FieldValue(std::vector<std::string>{"1"}), "x"),
                 "a list of integers, got [\"1\"]");
  EXPECT_REFUSED(set_field(s, "words", FieldValue(std::vector<int64_t>{1}), "x"),
                 "a list of strings, got [1]");
  EXPECT_EQ(s, Settings{});
  set_field(s, "rate", FieldValue(int64_t{2}), "x");
  EXPECT_EQ(s.rate, 2.0);
}

TEST(Fields, UnknownKeysSuggestTheNearest) {
  Settings s;
  EXPECT_REFUSED(set_field_text(s, "cuont", "1", "--s.cuont=1"), "did you mean 'count'?");
  EXPECT_REFUSED(set_field(s, "cuont", FieldValue(int64_t{1}), "x"), "unknown key 'cuont'");
  EXPECT_REFUSED(set_field(s, "zzzzzz", FieldValue(int64_t{1}), "x"),
                 "there are: flag count rate name sizes words");
}

TEST(Fields, HelpNamesEveryFieldWithValueAndMeaning) {
  const std::string help = help_listing("s", list_fields(Settings{}));
  for (const char* part : {"--s.flag=false", "--s.count=3", "--s.rate=0.1", "--s.name=plain",
                           "--s.sizes=[1, 2]", "how fast"}) {
    EXPECT_NE(help.find(part), std::string::npos) << part << " in\n" << help;
  }
}

TEST(Toml, SectionsAndEntriesComeInFileOrderWithLines) {
  const auto sections = parse_toml("top = 1\n[z]\nb = 'x'  # comment\na = [1, 2]\n[y]\n", "t");
  ASSERT_EQ(sections.size(), 3u);
  EXPECT_EQ(sections[0].name, "");
  EXPECT_EQ(sections[0].entries.at(0).key, "top");
  EXPECT_EQ(sections[1].name, "z");
  EXPECT_EQ(sections[1].line, 2);
  EXPECT_EQ(sections[1].entries.at(0).key, "b");
  EXPECT_EQ(sections[1].entries.at(0).line, 3);
  EXPECT_EQ(sections[1].entries.at(1).key, "a");
  EXPECT_EQ(sections[2].name, "y");
  EXPECT_TRUE(sections[2].entries.empty());
}

TEST(Toml, ErrorsNameFileAndLine) {
  EXPECT_REFUSED(parse_toml("[s]\na = \n", "run.toml"), "run.toml:2:");
  EXPECT_REFUSED(parse_toml("[s]\na = 1\na = 2\n", "run.toml"), "run.toml:3:");
  EXPECT_REFUSED(parse_toml("[s]\n[s]\n", "run.toml"), "run.toml:2:");
  EXPECT_REFUSED(parse_toml("[!]\na = 1\n", "run.toml"), "run.toml: not valid TOML");
  EXPECT_REFUSED(parse_toml("[s.t]\na = 1\n", "run.toml"), "nested");
  EXPECT_REFUSED(parse_toml("[s]\na = {b = 1}\n", "run.toml"), "run.toml:2: a: ");
  EXPECT_REFUSED(parse_toml("[[s]]\na = 1\n", "run.toml"), "list");
  EXPECT_REFUSED(parse_toml("[s]\nd = 2020-01-01\n", "run.toml"), "dates");
  EXPECT_REFUSED(parse_toml("[s]\nd = [1, 'a']\n", "run.toml"), "list");
  Settings s;
  const auto sections = parse_toml("[s]\nflag = true\ncount = 'x'\n", "run.toml");
  EXPECT_REFUSED(set_fields(s, sections.at(0), "run.toml"),
                 "run.toml:3: [s] count: expected an integer, got \"x\"");
  EXPECT_REFUSED(read_toml("no/such/file.toml"), "no/such/file.toml");
  EXPECT_REFUSED(read_toml("/"), "/");
}

TEST(Json, RefusesWhatTheParserWouldLetPass) {
  EXPECT_REFUSED(parse_json_object(R"({"a": 1, "a": 2})", "c.json"), "two keys 'a'");
  EXPECT_REFUSED(parse_json_object(R"({"a": {"b": 1, "b": 2}})", "c.json"), "two keys 'b'");
  EXPECT_NO_THROW(parse_json_object(R"({"a": {"x": 1}, "b": {"x": 1}})", "c.json"));
  EXPECT_REFUSED(parse_json_object("[1]", "c.json"), "object");
  EXPECT_REFUSED(parse_json_object("{\"a\": 1", "c.json"), "c.json: not valid JSON");
  EXPECT_REFUSED(parse_json_object(R"({"a": 1e999})", "c.json"), "not valid JSON");
  std::string deep;
  for (int i = 0; i < 100'000; ++i) deep += "{\"a\":";
  EXPECT_REFUSED(parse_json_object(deep, "c.json"), "nested too deeply");
}

TEST(Json, ErrorsNameKeyAndExpectedType) {
  Settings s;
  const auto set = [&](const char* text) {
    fields_from_json(s, parse_json_object(text, "c.json"), "c.json");
  };
  EXPECT_REFUSED(set(R"({"count": "3"})"), "c.json: count: expected an integer, got \"3\"");
  EXPECT_REFUSED(set(R"({"cuont": 3})"), "did you mean 'count'?");
  EXPECT_REFUSED(set(R"({"count": null})"), "count: expected a value, got null");
  EXPECT_REFUSED(set(R"({"count": 18446744073709551615})"), "too large");
  EXPECT_REFUSED(set(R"({"sizes": [1, "a"]})"), "sizes: expected a list");
  EXPECT_REFUSED(set(R"({"sizes": [1.5]})"), "sizes: expected a list");
  EXPECT_EQ(s, Settings{});
}

}  // namespace
}  // namespace sarissa
