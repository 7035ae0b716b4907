// Random numbers as a pure function of (seed, stream, counter): Philox-4x32-10, from Salmon et al.,
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011. There is no state, so a number can be
// drawn anywhere, in any order, on any rank, and a resumed run draws the same ones.
#pragma once

#include <array>
#include <cstdint>

namespace sarissa {

/// The bijection itself: 128 bits of counter and 64 bits of key to 128 random bits.
constexpr std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter,
                                             std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0],
               static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1],
               static_cast<uint32_t>(product0)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

/// A family of independent random numbers, one per counter. Different seeds or streams give
/// unrelated families.
class Rng {
 public:
  constexpr explicit Rng(uint64_t seed, uint64_t stream = 0) : seed_(seed), stream_(stream) {}

  /// 64 random bits.
  constexpr uint64_t bits(uint64_t counter) const {
    const auto words = philox4x32({low(counter), high(counter), low(stream_), high(stream_)},
                                  {low(seed_), high(seed_)});
    return uint64_t{words[1]} << 32 | words[0];
  }

  /// Uniform in [0, bound), for bound >= 1. The bias of the multiply-high method is below bound /
  /// 2^64.
  constexpr uint64_t below(uint64_t counter, uint64_t bound) const {
    return static_cast<uint64_t>(static_cast<unsigned __int128>(bits(counter)) * bound >> 64);
  }

  /// Uniform in [0, 1), a multiple of 2^-53.
  constexpr double uniform(uint64_t counter) const {
    return static_cast<double>(bits(counter) >> 11) * 0x1p-53;
  }

 private:
  static constexpr uint32_t low(uint64_t x) { return static_cast<uint32_t>(x); }
  static constexpr uint32_t high(uint64_t x) { return static_cast<uint32_t>(x >> 32); }

  uint64_t seed_, stream_;
};

}  // namespace sarissa
