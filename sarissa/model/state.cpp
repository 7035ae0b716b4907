#include "sarissa/model/state.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>

#include <map>
#include <set>

#include "sarissa/base/error.h"

namespace sarissa::model {
namespace {

std::string packed_name(size_t layer, const std::string& name) {
  return str("layers.", layer, ".", name);
}

/// Caches grow along dimension 1; every other extent is the model's.
bool grows(const std::string& name) { return name == "keys" || name == "values"; }

bool fits(const std::string& name, const at::Tensor& got, const at::Tensor& like) {
  if (got.scalar_type() != like.scalar_type() || got.dim() != like.dim()) return false;
  for (int64_t d = 0; d < got.dim(); ++d) {
    if (got.size(d) != like.size(d) && !(d == 1 && grows(name))) return false;
  }
  return true;
}

}  // namespace

State State::clone() const {
  State copy = *this;
  for (auto& layer : copy.layers) {
    for (auto& [name, tensor] : layer.tensors) tensor = tensor.clone(at::MemoryFormat::Contiguous);
  }
  return copy;
}

int64_t State::bytes() const {
  int64_t bytes = 0;
  for (const auto& layer : layers) {
    for (const auto& [name, tensor] : layer.tensors) bytes += static_cast<int64_t>(tensor.nbytes());
  }
  return bytes;
}

std::vector<std::pair<std::string, at::Tensor>> State::pack() const {
  std::vector<std::pair<std::string, at::Tensor>> packed;
  packed.emplace_back("position",
                      at::scalar_tensor(position, at::TensorOptions().dtype(at::kLong)));
  for (size_t i = 0; i < layers.size(); ++i) {
    for (const auto& [name, tensor] : layers[i].tensors) {
      packed.emplace_back(packed_name(i, name), tensor);
    }
  }
  return packed;
}

void State::unpack(const std::vector<std::pair<std::string, at::Tensor>>& packed) {
  const std::map<std::string, at::Tensor> by_name(packed.begin(), packed.end());
  SARISSA_CHECK(by_name.size() == packed.size(), "state: two tensors have the same name");
  const auto find = [&by_name](const std::string& name) {
    const auto found = by_name.find(name);
    SARISSA_CHECK(found != by_name.end(), "state: tensor '", name, "' is missing");
    return found->second;
  };
  const at::Tensor packed_position = find("position");
  SARISSA_CHECK(packed_position.numel() == 1 && packed_position.scalar_type() == at::kLong,
                "state: 'position' is not one int64");
  State result = *this;  // changed only when everything fits
  result.position = packed_position.item<int64_t>();
  SARISSA_CHECK(result.position >= 0, "state: position ", result.position, " is negative");
  std::set<std::string> known = {"position"};
  for (size_t i = 0; i < layers.size(); ++i) {
    for (auto& [name, tensor] : result.layers[i].tensors) {
      const at::Tensor got = find(packed_name(i, name));
      SARISSA_CHECK(fits(name, got, tensor), "state: tensor '", packed_name(i, name), "' is ",
                    got.scalar_type(), " ", got.sizes(), ", expected ", tensor.scalar_type(), " ",
                    tensor.sizes(), grows(name) ? " of any length in dimension 1" : "");
      tensor = got.to(tensor.device(), tensor.scalar_type(), /*non_blocking=*/false, /*copy=*/true,
                      at::MemoryFormat::Contiguous);
      known.insert(packed_name(i, name));
    }
  }
  for (const auto& [name, tensor] : packed) {
    SARISSA_CHECK(known.contains(name), "state: tensor '", name,
                  "' belongs to no layer of this model");
  }
  *this = std::move(result);
}

}  // namespace sarissa::model
