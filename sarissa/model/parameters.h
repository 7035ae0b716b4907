// Parameters and how they are drawn.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "sarissa/base/rng.h"

namespace sarissa::model {

/// A trainable tensor. Mixed precision: value has the model's dtype, except that `keep_fp32`
/// parameters (poles, residues) stay in fp32 in a bf16 model.
struct Parameter {
  std::string name;  // e.g. "blocks.3.mixer.in_proj.weight"
  at::Tensor value;  // leaf; requires grad when the decoder trains
  bool decay;        // whether weight decay applies (matrices yes; norms, biases, filters no)
  bool keep_fp32;
};

/// Initial value of element `index` (row-major) of a parameter, from the parameter's own stream.
using Init = std::function<double(const Rng& rng, int64_t index)>;

Init constant(double value);
Init normal(double deviation);
Init uniform(double low, double high);
/// N(0, 2 / (5 D)): small_init of Nguyen and Salazar (arXiv 1910.05895) for what reads the residual
/// stream of width D, and for the embedding.
Init small_init(int64_t dim);
/// N(0, (2 / (N sqrt(D)))^2): wang_init (mesh-transformer-jax) for what writes to it, N blocks.
Init wang_init(int64_t dim, int64_t blocks);

/// Makes a model's parameters one after the other. Each draws from a stream of its own, hash of its
/// name, so a parameter's values depend on (seed, name, shape) alone: not on the device, the dtype,
/// the number of threads or the other parameters.
class ParameterMaker {
 public:
  /// Appends to `parameters`. No seed: memory is left uninitialised, for a model that is loaded.
  ParameterMaker(std::vector<Parameter>& parameters, std::optional<uint64_t> seed,
                 at::Device device, at::ScalarType dtype);

  /// Matrices decay.
  at::Tensor matrix(const std::string& name, at::IntArrayRef shape, const Init& init);
  /// Norm weights, biases, filters do not.
  at::Tensor vector(const std::string& name, at::IntArrayRef shape, const Init& init);
  /// Poles and residues do not, and are never held in less than fp32.
  at::Tensor precise(const std::string& name, at::IntArrayRef shape, const Init& init);

  at::Device device() const { return device_; }
  at::ScalarType dtype() const { return dtype_; }

  /// Names made while it lives start with `prefix`.
  class Scope {
   public:
    Scope(ParameterMaker& maker, const std::string& prefix);
    ~Scope();

   private:
    ParameterMaker& maker_;
    size_t outer_length_;
  };

 private:
  at::Tensor make(const std::string& name, at::IntArrayRef shape, const Init& init, bool decay,
                  bool keep_fp32);

  std::vector<Parameter>& parameters_;
  std::optional<uint64_t> seed_;
  at::Device device_;
  at::ScalarType dtype_;
  std::string prefix_;
};

}  // namespace sarissa::model
