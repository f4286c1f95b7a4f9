// The activations of every operator: one list of names, one scalar definition for host and device.
#pragma once

#include <cmath>
#include <cstddef>

#ifdef __CUDACC__
#define MNET_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MNET_HOST_DEVICE inline
#endif

namespace mnet {

enum class Activation { identity, relu, relu6, leaky_relu, hardswish, silu, hardsigmoid };

// In the order of the enum; mnet_kernels/reference.py lists the same names.
inline constexpr const char* kActivationNames[] = {"identity",  "relu", "relu6",      "leaky_relu",
                                                   "hardswish", "silu", "hardsigmoid"};
inline constexpr std::size_t kActivationCount = sizeof(kActivationNames) / sizeof(char*);

// On a device without the branches and the call of an exact division: two units in the last place.
template <typename T>
MNET_HOST_DEVICE T divide(T a, T b) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == sizeof(float)) return __fdividef(a, b);
#endif
  return a / b;
}

// Comparisons are written so that NaN passes through, as torch's own activations let it.
template <typename T>
MNET_HOST_DEVICE T activate(Activation activation, T slope, T z) {
  switch (activation) {
    case Activation::identity: return z;
    case Activation::relu: return z < T(0) ? T(0) : z;
    case Activation::relu6: return z < T(0) ? T(0) : (z > T(6) ? T(6) : z);
    case Activation::leaky_relu: return z < T(0) ? z * slope : z;
    case Activation::hardswish: {
      const T gate = z + T(3);
      return z * ((gate < T(0) ? T(0) : (gate > T(6) ? T(6) : gate)) * T(1.0 / 6));
    }
    case Activation::silu: return divide(z, T(1) + std::exp(-z));
    case Activation::hardsigmoid: {
      const T gate = z + T(3);
      return (gate < T(0) ? T(0) : (gate > T(6) ? T(6) : gate)) * T(1.0 / 6);
    }
  }
  return z;
}

}  // namespace mnet
