// What a file's name says about its contents.
#pragma once

#include <string>

namespace sarissa::cli {

inline bool has_ending(const std::string& path, const std::string& ending) {
  return path.ends_with(ending) || path.ends_with(ending + ".gz");
}

inline bool is_fasta(const std::string& path) {
  return has_ending(path, ".fasta") || has_ending(path, ".fa") || has_ending(path, ".fna");
}

inline bool is_jsonl(const std::string& path) { return has_ending(path, ".jsonl"); }

}  // namespace sarissa::cli
