#include "sarissa/model/parameters.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <numbers>

namespace sarissa::model {
namespace {

/// FNV-1a. Part of what a seed means: changing it changes every initialised model.
uint64_t hash(const std::string& name) {
  uint64_t result = 0xcbf29ce484222325;
  for (const unsigned char c : name) result = (result ^ c) * 0x100000001b3;
  return result;
}

at::Tensor draw(at::IntArrayRef shape, const Init& init, const Rng& rng) {
  at::Tensor values = at::empty(shape, at::TensorOptions().dtype(at::kFloat));
  auto* out = values.mutable_data_ptr<float>();
  at::parallel_for(0, values.numel(), 16384, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = static_cast<float>(init(rng, i));
  });
  return values;
}

}  // namespace

Init constant(double value) {
  return [value](const Rng&, int64_t) { return value; };
}

Init normal(double deviation) {
  return [deviation](const Rng& rng, int64_t index) {
    // Box-Muller on the two halves of 64 bits; 0 < u1 <= 1 keeps the logarithm finite.
    const uint64_t bits = rng.bits(static_cast<uint64_t>(index));
    const double u1 = (static_cast<double>(bits >> 32) + 1) * 0x1p-32;
    const double u2 = static_cast<double>(bits & 0xffffffff) * 0x1p-32;
    return deviation * std::sqrt(-2 * std::log(u1)) * std::cos(2 * std::numbers::pi * u2);
  };
}

Init uniform(double low, double high) {
  return [low, high](const Rng& rng, int64_t index) {
    return low + (high - low) * rng.uniform(static_cast<uint64_t>(index));
  };
}

Init small_init(int64_t dim) { return normal(std::sqrt(2.0 / (5.0 * static_cast<double>(dim)))); }

Init wang_init(int64_t dim, int64_t blocks) {
  return normal(2.0 / (static_cast<double>(blocks) * std::sqrt(static_cast<double>(dim))));
}

ParameterMaker::ParameterMaker(std::vector<Parameter>& parameters, std::optional<uint64_t> seed,
                               at::Device device, at::ScalarType dtype)
    : parameters_(parameters), seed_(seed), device_(device), dtype_(dtype) {}

at::Tensor ParameterMaker::matrix(const std::string& name, at::IntArrayRef shape,
                                  const Init& init) {
  return make(name, shape, init, /*decay=*/true, /*keep_fp32=*/false);
}

at::Tensor ParameterMaker::vector(const std::string& name, at::IntArrayRef shape,
                                  const Init& init) {
  return make(name, shape, init, /*decay=*/false, /*keep_fp32=*/false);
}

at::Tensor ParameterMaker::precise(const std::string& name, at::IntArrayRef shape,
                                   const Init& init) {
  return make(name, shape, init, /*decay=*/false, /*keep_fp32=*/true);
}

at::Tensor ParameterMaker::make(const std::string& name, at::IntArrayRef shape, const Init& init,
                                bool decay, bool keep_fp32) {
  const std::string full_name = prefix_ + name;
  const at::ScalarType dtype = keep_fp32 && dtype_ == at::kBFloat16 ? at::kFloat : dtype_;
  const auto options = at::TensorOptions().device(device_).dtype(dtype);
  const at::Tensor value = seed_.has_value()
                               ? draw(shape, init, Rng(*seed_, hash(full_name))).to(options)
                               : at::empty(shape, options);
  parameters_.push_back({full_name, value, decay, keep_fp32});
  return value;
}

ParameterMaker::Scope::Scope(ParameterMaker& maker, const std::string& prefix)
    : maker_(maker), outer_length_(maker.prefix_.size()) {
  maker_.prefix_ += prefix;
}

ParameterMaker::Scope::~Scope() { maker_.prefix_.resize(outer_length_); }

}  // namespace sarissa::model
