// The activations' derivatives on vectors; for one number: csrc/activation_backward.h. Included
// once per instruction set (see instruction_set.inc).

// z <= low or z >= high cuts the gradient off; NaN where there is no such bound.
struct Bounds {
  float low, high;
  bool exact;  // there is nothing else to the derivative
};
MNET_INLINE Bounds bounds_of(Activation activation) {
  constexpr float nan = __builtin_nanf("");
  switch (activation) {
    case Activation::identity: return {nan, nan, true};
    case Activation::relu: return {0, nan, true};
    case Activation::relu6: return {0, 6, true};
    default: return {nan, nan, false};
  }
}
template <typename T>
MNET_INLINE Vector<T> activate_backward(Bounds bounds, Vector<T> z, Vector<T> dy) {
#if defined(MNET_AVX512)
  if constexpr (sizeof(T) == 4) {
    const __mmask16 above = _mm512_cmp_ps_mask((__m512)z, _mm512_set1_ps(bounds.low), _CMP_NLE_UQ);
    const __mmask16 inside =
        _mm512_mask_cmp_ps_mask(above, (__m512)z, _mm512_set1_ps(bounds.high), _CMP_NGE_UQ);
    return (Vector<T>)_mm512_maskz_mov_ps(inside, (__m512)dy);
  }
#endif
  const Vector<T> kept = z <= T(bounds.low) ? Vector<T>{} : dy;
  return z >= T(bounds.high) ? Vector<T>{} : kept;
}
// The other activations, dy in place; csrc/activation_backward.h says the same for one number.
template <typename T, typename Call>
static __attribute__((noinline)) void activate_backward_tile(const Call& call, const Vector<T>* z,
                                                             Vector<T>* dy, int count) {
  const T slope = static_cast<T>(call.slope);
  for (int i = 0; i < count; ++i) {
    const Vector<T> x = z[i], g = dy[i];
    switch (call.activation) {
      case Activation::leaky_relu: dy[i] = x > T(0) ? g : g * slope; break;
      case Activation::hardswish: {
        const Vector<T> inner = x < T(3) ? g * (x * T(1.0 / 3) + T(0.5)) : g;
        dy[i] = x <= T(-3) ? Vector<T>{} : inner;
        break;
      }
      case Activation::silu: {
        const Vector<T> gate = T(1) / (T(1) + exponential(-x));
        dy[i] = g * gate * (T(1) + x * (T(1) - gate));
        break;
      }
      case Activation::hardsigmoid: {
        const Vector<T> upper = x < T(3) ? g / T(6) : Vector<T>{};
        dy[i] = x > T(-3) ? upper : Vector<T>{};
        break;
      }
      default: break;
    }
  }
}
