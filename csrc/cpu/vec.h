// A vector of accumulators, its loads from and stores to every element type. Built on the
// compiler's vector extension, so that one source serves every instruction set; intrinsics only
// where the extension has no word for it. Included once per instruction set, inside its namespace.
//
// The including file defines MNET_VECTOR_BYTES, and MNET_AVX512 or MNET_AVX2 where they hold.

using u16 = std::uint16_t;
using u32 = std::uint32_t;

struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};

template <typename Elem>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename Elem>
using Accumulator = typename AccumulatorOf<Elem>::type;

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(MNET_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(MNET_VECTOR_BYTES)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
typedef u32 VectorU32 __attribute__((vector_size(MNET_VECTOR_BYTES)));
typedef std::int32_t VectorI32 __attribute__((vector_size(MNET_VECTOR_BYTES)));
typedef std::int64_t VectorI64 __attribute__((vector_size(MNET_VECTOR_BYTES)));
typedef u16 VectorU16 __attribute__((vector_size(MNET_VECTOR_BYTES / 2)));

template <typename T>
constexpr int kWidth = MNET_VECTOR_BYTES / sizeof(T);

#define MNET_INLINE static inline __attribute__((always_inline))

template <typename V>
MNET_INLINE V load_bits(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <typename To, typename From>
MNET_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}
template <typename T>
MNET_INLINE Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}

// ---- float16 bits: exact in both directions, round to nearest even -----------------------------
#if defined(MNET_AVX512)  // which __builtin_convertvector does in halves
MNET_INLINE VectorU32 widen(VectorU16 v) {
  return (VectorU32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
}
MNET_INLINE VectorU16 narrow(VectorU32 v) {
  return (VectorU16)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v);
}
#else
MNET_INLINE VectorU32 widen(VectorU16 v) { return __builtin_convertvector(v, VectorU32); }
MNET_INLINE VectorU16 narrow(VectorU32 v) { return __builtin_convertvector(v, VectorU16); }
#endif

MNET_INLINE Vector<float> float_from_f16(VectorU16 half) {
#if defined(MNET_AVX512)
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)half);
#elif defined(MNET_AVX2)
  return (Vector<float>)_mm256_cvtph_ps((__m128i)half);
#else
  const VectorU32 h = widen(half);
  const VectorU32 magnitude = (h & 0x7fffu) << 13;
  // Rebias the exponent by a multiplication, which also normalises subnormal halves.
  VectorU32 bits = bit_cast<VectorU32>(bit_cast<Vector<float>>(magnitude) * 0x1p112f);
  const VectorU32 special = (VectorU32)((h & 0x7c00u) == 0x7c00u);  // Inf and NaN
  bits = (special & (magnitude | 0x7f800000u)) | (~special & bits);
  return bit_cast<Vector<float>>(bits | ((h & 0x8000u) << 16));
#endif
}

MNET_INLINE VectorU16 f16_from_float(Vector<float> value) {
#if defined(MNET_AVX512)
  return (VectorU16)_mm512_maskz_cvtps_ph(0xffff, (__m512)value,
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(MNET_AVX2)
  return (VectorU16)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const VectorU32 bits = bit_cast<VectorU32>(value);
  const VectorU32 magnitude = bits & 0x7fffffffu;
  // Normal results: rebias, round half to even on the 13 bits that go.
  const VectorU32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 aligns the mantissa so that the FPU rounds it.
  const VectorU32 subnormal =
      bit_cast<VectorU32>(bit_cast<Vector<float>>(magnitude) + 0.5f) - 0x3f000000u;
  const VectorU32 is_subnormal = (VectorU32)(magnitude < 0x38800000u);
  const VectorU32 overflows = (VectorU32)(magnitude >= 0x47800000u);  // 65536 and above, Inf
  const VectorU32 is_nan = (VectorU32)(magnitude > 0x7f800000u);
  VectorU32 half = (is_subnormal & subnormal) | (~is_subnormal & normal);
  half = (overflows & 0x7c00u) | (~overflows & half);
  half = (is_nan & 0x7e00u) | (~is_nan & half);
  return narrow(half | ((bits >> 16) & 0x8000u));
#endif
}

MNET_INLINE VectorU16 bf16_from_float(Vector<float> value) {
#if defined(MNET_AVX512_BF16)
  // One instruction instead of nine; it takes subnormal floats (below 1.2e-38) for zero.
  return (VectorU16)_mm512_cvtneps_pbh((__m512)value);
#else
  const VectorU32 bits = bit_cast<VectorU32>(value);
  const VectorU32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VectorU32 is_nan = (VectorU32)((bits & 0x7fffffffu) > 0x7f800000u);
  return narrow((is_nan & 0x7fc0u) | (~is_nan & rounded));
#endif
}

// ---- whole vectors ------------------------------------------------------------------------------
MNET_INLINE Vector<float> load(const float* p) { return load_bits<Vector<float>>(p); }
MNET_INLINE Vector<double> load(const double* p) { return load_bits<Vector<double>>(p); }
MNET_INLINE Vector<float> load(const bf16* p) {
  return bit_cast<Vector<float>>(widen(load_bits<VectorU16>(p)) << 16);
}
MNET_INLINE Vector<float> load(const f16* p) { return float_from_f16(load_bits<VectorU16>(p)); }

MNET_INLINE void store(float* p, Vector<float> v) { __builtin_memcpy(p, &v, sizeof(v)); }
MNET_INLINE void store(double* p, Vector<double> v) { __builtin_memcpy(p, &v, sizeof(v)); }
MNET_INLINE void store(bf16* p, Vector<float> v) {
  const VectorU16 bits = bf16_from_float(v);
  __builtin_memcpy(p, &bits, sizeof(bits));
}
MNET_INLINE void store(f16* p, Vector<float> v) {
  const VectorU16 bits = f16_from_float(v);
  __builtin_memcpy(p, &bits, sizeof(bits));
}

// v in a register, where there are many: gcc would rather load it again for every use.
template <typename V>
MNET_INLINE V kept(V v) {
#if defined(MNET_AVX512)
  asm("" : "+v"(v));
#endif
  return v;
}

// v as it would be read back.
template <typename Elem>
MNET_INLINE Vector<Accumulator<Elem>> rounded(Vector<Accumulator<Elem>> v) {
  if constexpr (sizeof(Elem) >= 4) return v;
  Elem stored[kWidth<Accumulator<Elem>>];
  store(stored, v);
  return load(stored);
}

// A whole cache line to memory, past the caches: it saves reading the line first. Only for 64-byte
// aligned lines that are not read again soon; drain_streams() before other threads may read them.
#if defined(MNET_AVX512)
constexpr bool kStreams = true;
MNET_INLINE void stream(float* p, Vector<float> v) { _mm512_stream_ps(p, (__m512)v); }
MNET_INLINE void drain_streams() { _mm_sfence(); }
#else
constexpr bool kStreams = false;
MNET_INLINE void stream(float* p, Vector<float> v) { store(p, v); }
MNET_INLINE void drain_streams() {}
#endif

// Asks for memory that is needed soon, into the second-level cache. Any address is harmless.
MNET_INLINE void prefetch(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64)
    __builtin_prefetch(static_cast<const char*>(from) + at, 0, 2);
}

// ---- the first n lanes (0 < n < width); nothing behind them is touched --------------------------
#if defined(MNET_AVX512)
constexpr bool kMasks = true;  // it takes no longer than a whole vector
#else
constexpr bool kMasks = false;
#endif
template <typename Elem>
MNET_INLINE Vector<Accumulator<Elem>> load_first(const Elem* p, int n) {
#if defined(MNET_AVX512)
  if constexpr (sizeof(Elem) == 4)
    return (Vector<float>)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
  else if constexpr (sizeof(Elem) == 8)
    return (Vector<double>)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
  else {
    const VectorU16 bits = (VectorU16)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
    return load((const Elem*)&bits);
  }
#else
  Elem lanes[kWidth<Accumulator<Elem>>] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
#endif
}
template <typename Elem>
MNET_INLINE void store_first(Elem* p, Vector<Accumulator<Elem>> v, int n) {
#if defined(MNET_AVX512)
  if constexpr (sizeof(Elem) == 4)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
  else if constexpr (sizeof(Elem) == 8)
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
  else {
    VectorU16 bits;
    store((Elem*)&bits, v);
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)bits);
  }
#else
  Elem lanes[kWidth<Accumulator<Elem>>];
  store(lanes, v);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
#endif
}

// The same where all lanes may be meant.
template <typename Elem>
MNET_INLINE Vector<Accumulator<Elem>> load_lanes(const Elem* p, int n) {
  return n == kWidth<Accumulator<Elem>> ? load(p) : load_first(p, n);
}
template <typename Elem>
MNET_INLINE void store_lanes(Elem* p, Vector<Accumulator<Elem>> v, int n) {
  if (n == kWidth<Accumulator<Elem>>)
    store(p, v);
  else
    store_first(p, v, n);
}

// Lanes 0, 2, 4, ... of two vectors laid end to end.
template <typename T>
MNET_INLINE Vector<T> even_lanes(Vector<T> low, Vector<T> high) {
#if defined(MNET_AVX512)
  if constexpr (sizeof(T) == 4) {
    const __m512i even =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return (Vector<T>)_mm512_permutex2var_ps((__m512)low, even, (__m512)high);
  } else {
    const __m512i even = _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0);
    return (Vector<T>)_mm512_permutex2var_pd((__m512d)low, even, (__m512d)high);
  }
#else
  Vector<T> even;
  constexpr int V = kWidth<T>;
  for (int i = 0; i < V; ++i) even[i] = 2 * i < V ? low[2 * i] : high[2 * i - V];
  return even;
#endif
}

// lane j of row i for lane i of row j.
MNET_INLINE void transpose(Vector<float>* rows) {
  constexpr int V = kWidth<float>;
  typedef std::int32_t Lanes __attribute__((vector_size(MNET_VECTOR_BYTES)));
  Lanes low, high;  // of two vectors, alternately
#pragma GCC unroll 16
  for (int i = 0; i < V; ++i) low[i] = i / 2 + i % 2 * V, high[i] = i / 2 + i % 2 * V + V / 2;
#pragma GCC unroll 4
  for (int step = 1; step < V; step *= 2) {
    Vector<float> mixed[V];
#pragma GCC unroll 8
    for (int i = 0; i < V / 2; ++i) {
      const Vector<float> a = rows[i], b = rows[i + V / 2];
#if defined(MNET_AVX512)
      mixed[2 * i] = (Vector<float>)_mm512_permutex2var_ps((__m512)a, (__m512i)low, (__m512)b);
      mixed[2 * i + 1] = (Vector<float>)_mm512_permutex2var_ps((__m512)a, (__m512i)high, (__m512)b);
#elif defined(__clang__)
      for (int j = 0; j < V / 2; ++j) {
        mixed[2 * i][2 * j] = a[j], mixed[2 * i][2 * j + 1] = b[j];
        mixed[2 * i + 1][2 * j] = a[j + V / 2], mixed[2 * i + 1][2 * j + 1] = b[j + V / 2];
      }
#else
      mixed[2 * i] = __builtin_shuffle(a, b, low);
      mixed[2 * i + 1] = __builtin_shuffle(a, b, high);
#endif
    }
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) rows[i] = mixed[i];
  }
}

// ---- bounds -------------------------------------------------------------------------------------
// NaN passes through: the comparisons keep x where they are false.
template <typename T>
MNET_INLINE Vector<T> at_least(Vector<T> x, T low) {
#if defined(MNET_AVX512)
  // The zero-masking forms only because gcc warns of the undefined source of the plain ones.
  if constexpr (sizeof(T) == 4)
    return (Vector<T>)_mm512_maskz_max_ps(0xffff, _mm512_set1_ps(low), (__m512)x);
  else
    return (Vector<T>)_mm512_maskz_max_pd(0xff, _mm512_set1_pd(low), (__m512d)x);
#elif defined(MNET_AVX2)
  if constexpr (sizeof(T) == 4)
    return (Vector<T>)_mm256_max_ps(_mm256_set1_ps(low), (__m256)x);
  else
    return (Vector<T>)_mm256_max_pd(_mm256_set1_pd(low), (__m256d)x);
#else
  return x < low ? broadcast<T>(low) : x;
#endif
}
template <typename T>
MNET_INLINE Vector<T> at_most(Vector<T> x, T high) {
#if defined(MNET_AVX512)
  if constexpr (sizeof(T) == 4)
    return (Vector<T>)_mm512_maskz_min_ps(0xffff, _mm512_set1_ps(high), (__m512)x);
  else
    return (Vector<T>)_mm512_maskz_min_pd(0xff, _mm512_set1_pd(high), (__m512d)x);
#elif defined(MNET_AVX2)
  if constexpr (sizeof(T) == 4)
    return (Vector<T>)_mm256_min_ps(_mm256_set1_ps(high), (__m256)x);
  else
    return (Vector<T>)_mm256_min_pd(_mm256_set1_pd(high), (__m256d)x);
#else
  return x > high ? broadcast<T>(high) : x;
#endif
}
