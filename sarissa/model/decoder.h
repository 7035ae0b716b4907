// The model: embedding, blocks of (norm, mixer, norm, gated MLP), final norm, head.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "sarissa/model/config.h"
#include "sarissa/model/parameters.h"
#include "sarissa/model/sequence_context.h"
#include "sarissa/model/state.h"

namespace sarissa::model {

/// A decoder-only multi-hybrid language model.
class Decoder {
 public:
  /// Parameters drawn from `seed` alone: the same values on every device and in every dtype (drawn
  /// in fp32 on the CPU, then converted). dtype: float32, bfloat16 or float64.
  Decoder(const ModelConfig& config, uint64_t seed, at::Device device, at::ScalarType dtype);
  ~Decoder();
  Decoder(Decoder&&) noexcept;

  const ModelConfig& config() const;
  at::Device device() const;
  at::ScalarType dtype() const;

  /// In a fixed order: embedding, blocks in order, final norm, head when untied. Change a value in
  /// place (copy_, optimizer updates): the decoder holds the same tensors.
  std::vector<Parameter>& parameters();
  const std::vector<Parameter>& parameters() const;
  void requires_grad(bool on);

  /// Final normed hidden states [B, L, D] of tokens [B, L] (int64, on the model's device). No
  /// state: the sequences start here (training). With a state: they continue it, and it is advanced
  /// by L (prefill in chunks of any size; L = 1 is a decode step). `context` links ranks that hold
  /// other parts of the same sequences. Throws sarissa::Error for tokens or a state that do not
  /// fit.
  at::Tensor hidden(const at::Tensor& tokens_BL, State* state = nullptr,
                    SequenceContext& context = SequenceContext::alone()) const;

  /// hidden @ head^T: [B, L, V] in the model's dtype.
  at::Tensor forward(const at::Tensor& tokens_BL, State* state = nullptr,
                     SequenceContext& context = SequenceContext::alone()) const;

  /// The output matrix [V, D] (the embedding when tied).
  const at::Tensor& head() const;

  /// The state before the first token, for a batch of `batch` sequences.
  State initial_state(int64_t batch) const;

 private:
  struct Impl;
  explicit Decoder(std::unique_ptr<Impl> impl);
  friend Decoder load_model(const std::string&, at::Device, at::ScalarType);
  std::unique_ptr<Impl> impl_;
};

/// Above this many bytes a model is saved in several files.
constexpr int64_t kMaxShardBytes = 5'000'000'000;

/// Writes DIR/config.json and DIR/model.safetensors; above `max_shard_bytes` instead
/// DIR/model-00001-of-0000N.safetensors ... and DIR/model.safetensors.index.json. Makes the folder
/// when there is none. Throws sarissa::Error naming the file that could not be written.
void save_model(const std::string& directory, const Decoder& decoder,
                int64_t max_shard_bytes = kMaxShardBytes);

/// Reads a model directory; the stored dtype may differ from `dtype`. Throws sarissa::Error naming
/// the file, tensor or key that is wrong.
Decoder load_model(const std::string& directory, at::Device device, at::ScalarType dtype);

/// DIR/config.json alone.
ModelConfig load_model_config(const std::string& directory);

}  // namespace sarissa::model
