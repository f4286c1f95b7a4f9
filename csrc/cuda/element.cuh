// What tensors hold and how it becomes float32 and back: one rounding, to nearest even; NaN stays
// NaN.
#pragma once

#include <cstring>
#include <type_traits>

#include "machine.cuh"

namespace mnet::cuda {

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

namespace host {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen(float16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // As the mantissa of a subnormal float32, scaled by the difference of the exponents' biases.
  const float magnitude = float_of(rest << 13) * float_of((127u + 112u) << 23);
  return float_of(sign | bits_of(magnitude));
}

inline float16 narrow_to_float16(float value) {
  const uint32_t sign = bits_of(value) >> 16 & 0x8000u, rest = bits_of(value) & 0x7fffffffu;
  uint32_t result;
  if (rest > 0x7f800000u)
    result = 0x7e00u;
  else if (rest >= 0x477ff000u)  // 65520 and above round to infinity
    result = 0x7c00u;
  else if (rest < 0x38800000u)  // subnormal: the last place of 0.5 is float16's smallest number
    result = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);
  else
    result = (rest - (112u << 23) + 0xfffu + (rest >> 13 & 1u)) >> 13;
  return {static_cast<uint16_t>(sign | result)};
}

inline bfloat16 narrow_to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

}  // namespace host

__device__ __forceinline__ float widen(float value) { return value; }

__device__ __forceinline__ float widen(bfloat16 value) {
#ifdef __CUDACC__
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
#else
  return host::float_of(static_cast<uint32_t>(value.bits) << 16);
#endif
}

__device__ __forceinline__ float widen(float16 value) {
#ifdef __CUDACC__
  return __half2float(__ushort_as_half(value.bits));
#else
  return host::widen(value);
#endif
}

template <typename Element>
__device__ __forceinline__ Element narrow(float value);

template <>
__device__ __forceinline__ float narrow<float>(float value) {
  return value;
}

template <>
__device__ __forceinline__ bfloat16 narrow<bfloat16>(float value) {
#ifdef __CUDACC__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  return host::narrow_to_bfloat16(value);
#endif
}

template <>
__device__ __forceinline__ float16 narrow<float16>(float value) {
#ifdef __CUDACC__
  return {__half_as_ushort(__float2half_rn(value))};
#else
  return host::narrow_to_float16(value);
#endif
}

// Two 16-bit elements in a word, the first in its low half.
template <typename Element>
__device__ __forceinline__ float widen_low(uint32_t two) {
  return widen(Element{static_cast<uint16_t>(two)});
}

template <typename Element>
__device__ __forceinline__ float widen_high(uint32_t two) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<Element, bfloat16>) return __uint_as_float(two & 0xffff0000u);
#endif
  return widen(Element{static_cast<uint16_t>(two >> 16)});
}

template <typename Element>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
#ifdef __CUDACC__
  uint32_t two;
  if constexpr (std::is_same_v<Element, bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&two, &pair, sizeof two);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&two, &pair, sizeof two);
  }
  return two;
#else
  return narrow<Element>(low).bits | static_cast<uint32_t>(narrow<Element>(high).bits) << 16;
#endif
}

}  // namespace mnet::cuda
