// The random numbers that every kernel and every Python implementation draw alike: functions of a step's key and of
// their place in a stream, as in rwfx/ops/walk.py.

#pragma once

#include <cstdint>

namespace rwfx {

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15;

inline uint64_t split_mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

// Number `index` of stream `stream` of a step's random numbers: uniform, from 0 to below 1.
struct Uniform {
  uint64_t key;

  // Those of a step of a seed's stream: `mix` in Python, 63 bits.
  static Uniform of_step(int64_t seed, int64_t step) {
    return {split_mix(static_cast<uint64_t>(seed) + (static_cast<uint64_t>(step) + 1) * GOLDEN) >> 1};
  }

  uint64_t bits(uint64_t stream, uint64_t index) const {
    return split_mix(key + ((stream << 32) + index + 1) * GOLDEN);
  }
  double operator()(uint64_t stream, uint64_t index) const {
    return static_cast<double>(bits(stream, index) >> 11) * 0x1.0p-53;
  }
};

}  // namespace rwfx
