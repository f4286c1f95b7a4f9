// The activations' derivatives: beside activation.h, for host and device alike.
#pragma once

#include "activation.h"

namespace mnet {

// The gradient of z where dy is that of activate(z). At the knees, and for NaN, what torch's own
// backward functions give (threshold, hardtanh, leaky_relu, hardswish); a gradient that is cut off
// is 0 even if dy is not finite.
template <typename T>
MNET_HOST_DEVICE T activation_backward(Activation activation, T slope, T z, T dy) {
  switch (activation) {
    case Activation::identity: return dy;
    case Activation::relu: return z <= T(0) ? T(0) : dy;
    case Activation::relu6: return z <= T(0) || z >= T(6) ? T(0) : dy;
    case Activation::leaky_relu: return z > T(0) ? dy : dy * slope;
    case Activation::hardswish:
      return z <= T(-3) ? T(0) : (z < T(3) ? dy * (z * T(1.0 / 3) + T(0.5)) : dy);
    case Activation::silu: {
      const T gate = T(1) / (T(1) + std::exp(-z));
      return dy * gate * (T(1) + z * (T(1) - gate));
    }
    case Activation::hardsigmoid: return z > T(-3) && z < T(3) ? dy * T(1.0 / 6) : T(0);
  }
  return dy;
}

}  // namespace mnet
