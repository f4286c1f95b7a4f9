// The activations on vectors; for one number: csrc/activation.h. Included once per instruction set
// (see instruction_set.inc).

// e^x: x = n ln2 + r, a Taylor polynomial of degree 6 on |r| <= ln2/2, 2^n by exponent
// bits. Relative error below 2e-7 on [-87, 88]; below, 0; above, Inf; NaN stays NaN.
MNET_INLINE Vector<float> exponential(Vector<float> x) {
  typedef std::int32_t VectorI32 __attribute__((vector_size(MNET_VECTOR_BYTES)));
  const Vector<float> clamped = at_most<float>(at_least<float>(x, -87.3f), 88.7f);
  const Vector<float> magic = broadcast<float>(0x1.8p23f);  // rounds to an integer when added
  const Vector<float> n = (clamped * 1.44269504f + magic) - magic;
  Vector<float> r = clamped - n * 0.693359375f;  // ln2 in two parts, the first exact in n * part
  r = r + n * 2.12194440e-4f;
  Vector<float> p = broadcast<float>(1.0f / 720);
  constexpr float kTerms[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (float term : kTerms) p = p * r + term;
  const VectorI32 exponent = __builtin_convertvector(n, VectorI32);
  // In two halves: 2^128 is no float, but e^88.7 is.
  const VectorI32 half = exponent >> 1;
  const Vector<float> power = bit_cast<Vector<float>>((half + 127) << 23) *
                              bit_cast<Vector<float>>((exponent - half + 127) << 23);
  Vector<float> result = p * power;
  result = x < -87.3f ? Vector<float>{} : result;
  result = x > 88.7f ? broadcast<float>(__builtin_inff()) : result;
  return x != x ? x : result;
}
MNET_INLINE Vector<double> exponential(Vector<double> x) {
  for (int i = 0; i < kWidth<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// x / 6 for 0 <= x <= 6: the product with 1/6 and what is missing of it, exactly, where products
// are added in one rounding, which leaves the same result as the division and takes a third of its
// time.
template <typename T>
MNET_INLINE Vector<T> sixth(Vector<T> x) {
#if defined(MNET_AVX512) || defined(MNET_AVX2) || defined(__aarch64__)
  constexpr T kSixth = T(1) / 6;
  const Vector<T> near = x * kSixth;
  return (x - near * T(6)) * kSixth + near;
#else
  return x / T(6);
#endif
}

template <typename T>
MNET_INLINE Vector<T> activate(Activation activation, T slope, Vector<T> z) {
  switch (activation) {
    case Activation::identity: return z;
    case Activation::relu: return at_least<T>(z, 0);
    case Activation::relu6: return at_most<T>(at_least<T>(z, 0), 6);
    case Activation::leaky_relu: return z < T(0) ? z * slope : z;
    case Activation::hardswish: return z * sixth<T>(at_most<T>(at_least<T>(z + T(3), 0), 6));
    case Activation::silu: return z / (T(1) + exponential(-z));
    case Activation::hardsigmoid: return sixth<T>(at_most<T>(at_least<T>(z + T(3), 0), 6));
  }
  return z;
}

// body(the activation as a constant): what loops over many vectors looks once which it is.
template <Activation Value>
struct ConstantActivation {
  static constexpr Activation value = Value;
};
template <typename Body>
MNET_INLINE void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::identity: return body(ConstantActivation<Activation::identity>{});
    case Activation::relu: return body(ConstantActivation<Activation::relu>{});
    case Activation::relu6: return body(ConstantActivation<Activation::relu6>{});
    case Activation::leaky_relu: return body(ConstantActivation<Activation::leaky_relu>{});
    case Activation::hardswish: return body(ConstantActivation<Activation::hardswish>{});
    case Activation::silu: return body(ConstantActivation<Activation::silu>{});
    case Activation::hardsigmoid: return body(ConstantActivation<Activation::hardsigmoid>{});
  }
}

// The activation of a whole register tile: a kernel inlines the clamps (identity, relu, relu6) and
// calls out for the others, which keeps a hundred unrolled kernels small.
template <typename T, typename Call>
static __attribute__((noinline)) void activate_tile(const Call& call, Vector<T>* tile, int count) {
  const T slope = static_cast<T>(call.slope);
  with_activation(call.activation, [&](auto activation) __attribute__((always_inline)) {
    for (int i = 0; i < count; ++i) tile[i] = activate<T>(activation.value, slope, tile[i]);
  });
}

// The same for vectors in registers: through a copy, since what has its address taken lives in
// memory.
template <typename T, int Count, typename Call>
MNET_INLINE void activate_registers(const Call& call, Vector<T>* tile) {
  Vector<T> copy[Count];
#pragma GCC unroll 32
  for (int i = 0; i < Count; ++i) copy[i] = tile[i];
  activate_tile<T>(call, copy, Count);
#pragma GCC unroll 32
  for (int i = 0; i < Count; ++i) tile[i] = copy[i];
}

template <typename T>
struct Clamp {
  T low, high;
  bool exact;  // the clamp is the whole activation
};
template <typename T>
MNET_INLINE Clamp<T> clamp_of(Activation activation) {
  const T infinity = static_cast<T>(__builtin_inf());
  switch (activation) {
    case Activation::identity: return {-infinity, infinity, true};
    case Activation::relu: return {0, infinity, true};
    case Activation::relu6: return {0, 6, true};
    default: return {-infinity, infinity, false};
  }
}
