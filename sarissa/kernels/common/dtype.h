// Element types of the kernels, free of torch.
#pragma once

#include <bit>
#include <cstdint>

namespace sarissa::kernels {

enum class DType { kFloat64, kFloat32, kBFloat16 };

/// bfloat16 in memory; all arithmetic on it is done in float.
struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  /// Rounds to nearest even; NaN stays NaN.
  explicit BFloat16(float x) {
    const uint32_t b = std::bit_cast<uint32_t>(x);
    bits = x != x ? uint16_t{0x7fc0} : static_cast<uint16_t>((b + 0x7fff + ((b >> 16) & 1)) >> 16);
  }
  explicit operator float() const {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
};

/// The arithmetic type of an element type: double for double, float for float and bfloat16.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

}  // namespace sarissa::kernels
