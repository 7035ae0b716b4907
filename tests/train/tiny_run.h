// A small corpus and a configuration that trains on it in a second.
#pragma once

#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "sarissa/base/rng.h"
#include "sarissa/train/config.h"
#include "tests/support/files.h"

namespace sarissa::test {

class TinyRun {
 public:
  TinyRun() {
    const std::vector<std::string> words = {"mixer ", "block ", "featurizer ", "window ",
                                            "carry ", "taps ",  "poles ",      "residues "};
    const Rng rng(1);
    for (uint64_t i = 0; i < 4000; ++i) text_ += words[rng.below(i, words.size())];
    corpus_ = folder_.write("corpus.txt", text_);
  }

  /// A run into a new directory of this name.
  train::RunConfig config(const std::string& name) const {
    train::RunConfig config;
    config.model.pattern = "LI ATT";
    config.model.dim = 32;
    config.model.heads = 2;
    config.model.mlp_dim = 64;
    config.model.li_modes = 4;
    config.data.train = corpus_;
    config.train.output = folder_ / name;
    config.train.device = "cpu";
    config.train.dtype = "float32";
    config.train.threads = 1;  // too little work to share
    config.train.steps = 10;
    config.train.batch = 4;
    config.train.context = 48;
    config.train.checkpoint_every = 0;
    config.optim.warmup = 2;
    config.eval.every = 0;
    config.eval.tokens = 480;
    config.eval.batch = 4;
    config.log.every = 5;
    return config;
  }

  /// Entropy of the corpus' byte frequencies, nats per byte.
  double unigram_entropy() const {
    std::map<char, double> counts;
    for (const char byte : text_) ++counts[byte];
    double entropy = 0;
    for (const auto& [byte, count] : counts) {
      const double p = count / double(text_.size());
      entropy -= p * std::log(p);
    }
    return entropy;
  }

  /// A FASTA file with stretches of N, which are not scored.
  std::string masked_dna() const {
    std::string text = ">chr1\n";
    const Rng rng(2);
    for (uint64_t line = 0; line < 200; ++line) {
      std::string bases(60, 'N');
      if (rng.below(line, 4) > 0) {
        for (uint64_t i = 0; i < bases.size(); ++i) {
          bases[i] = "ACGT"[rng.below(1000 + 60 * line + i, 4)];
        }
      }
      text += bases + "\n";
    }
    return folder_.write("masked.fasta", text);
  }

  const std::string& corpus() const { return corpus_; }

 private:
  TemporaryFolder folder_;
  std::string text_, corpus_;
};

}  // namespace sarissa::test
