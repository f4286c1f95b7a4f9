// Division by a number that the host knows: a multiplication and a shift.
#pragma once

#include "machine.cuh"

namespace mnet::cuda {

// For dividends below 2^31 (Granlund and Montgomery, PLDI 1994).
struct Divisor {
  uint32_t value, multiplier, shift;

  Divisor() = default;
  explicit Divisor(uint32_t divisor) : value(divisor), shift(0) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - divisor) << 32) / divisor + 1);
  }

  // n becomes the quotient; returns the remainder.
  __device__ __forceinline__ uint32_t divide(uint32_t& n) const {
    const uint32_t dividend = n;
    n = (static_cast<uint32_t>(static_cast<uint64_t>(n) * multiplier >> 32) + n) >> shift;
    return dividend - n * value;
  }
};

}  // namespace mnet::cuda
