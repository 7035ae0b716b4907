// AdamW with fp32 arithmetic whatever the dtype of the weights.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "sarissa/checkpoint/safetensors.h"
#include "sarissa/model/decoder.h"
#include "sarissa/train/config.h"

namespace sarissa::train {

/// Decoupled weight decay (arXiv 1711.05101) with bias correction:
///   m <- beta1 m + (1 - beta1) g      v <- beta2 v + (1 - beta2) g^2
///   x <- x - lr decay x - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) +
///   eps)
/// A bf16 weight has a fp32 master x that is updated and then rounded to the weight, and its
/// gradients are summed over the micro-batches of a step in fp32. A fp32 weight is its own master
/// and autograd sums its gradients. The moments are fp32. Weight decay applies to parameters that
/// ask for it (Parameter::decay).
class AdamW {
 public:
  /// Updates the parameters' values in place; they must outlive this.
  AdamW(const std::vector<model::Parameter>& parameters, const OptimConfig& config);

  /// Takes over the gradients that a backward pass left on the parameters. Call it after every
  /// micro-batch.
  void accumulate();

  /// Clips the accumulated gradients to the global norm config.clip and updates all parameters with
  /// learning rate `lr`, unless `loss` (fp32 scalar) or the norm is not finite: then nothing
  /// changes. Returns the norm before clipping, a fp32 scalar on the parameters' device. Nothing
  /// waits for the device here.
  at::Tensor step(double lr, const at::Tensor& loss);

  /// Drops the accumulated gradients: the next step begins.
  void clear_gradients();

  /// Names "gradient of N" or "parameter N" of the first tensor with a non-finite element, in the
  /// order of the parameters; parameters first. "" when all are finite.
  std::string first_non_finite() const;

  /// Updates done; the bias correction depends on it.
  int64_t updates() const { return updates_; }
  /// Counts the last step() as done: call it when its loss and norm were finite.
  void confirm() { ++updates_; }

  /// "moment1.N", "moment2.N" and for bf16 weights "master.N".
  checkpoint::NamedTensors pack() const;
  /// Restores what pack() gave. Throws sarissa::Error naming the tensor that is missing or
  /// misshapen.
  void unpack(const checkpoint::SafetensorsFile& file, int64_t updates);

 private:
  struct Slot {
    std::string name;
    at::Tensor value;     // the parameter's leaf
    at::Tensor master;    // fp32; shares value's memory when that is fp32
    at::Tensor gradient;  // fp32 sum of a bf16 weight's gradients; undefined for
                          // a fp32 weight
    at::Tensor moment1, moment2;
    bool decay;
    bool has_master;
  };

  std::vector<at::Tensor> gradients() const;

  OptimConfig config_;
  std::vector<Slot> slots_;
  int64_t updates_ = 0;
  bool first_micro_batch_ = true;
};

/// sqrt(sum of squares) over all tensors (fp32, one device) as a fp32 scalar on it. The order of
/// the additions does not depend on the number of threads.
at::Tensor global_norm(const std::vector<at::Tensor>& tensors);

}  // namespace sarissa::train
