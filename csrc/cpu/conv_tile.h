// A tile of a dense convolution, pixels x taps times taps x output channels, accumulated in
// registers over all taps, with the epilogue in registers: up to kTilePixels x 2 vectors of output
// channels, per step 2 loads of weights and one broadcast a pixel. Float32 or bfloat16; included
// once per instruction set.

// 2 vectors wide, as many pixels as leave registers for two vectors of weights and a broadcast.
constexpr int kTilePixels = kRegisters >= 32 ? 14 : 6;
constexpr int64_t kPiece = 128;

// Half a vector, for the last channels: processors do two of them while they do a vector of 64
// bytes, or have room for two more.
constexpr bool kHalves = MNET_VECTOR_BYTES == 64;
typedef float HalfVector __attribute__((vector_size(MNET_VECTOR_BYTES / 2)));
// The upper half may hold anything.
MNET_INLINE Vector<float> widened(HalfVector half) {
#if MNET_VECTOR_BYTES == 64
  return (Vector<float>)_mm512_castps256_ps512((__m256)half);
#else
  return load_first(reinterpret_cast<const float*>(&half), kWidth<float> / 2);
#endif
}

// A vector of weights, or half of one, and how a pixel's patch is multiplied by it. Products of
// bfloat16 are exact in float32, where all sums are taken.
template <typename Elem, typename Sum = Vector<float> >
struct Step;
struct TwoTaps {
  float first, second;
};
template <typename Sum>
struct Step<float, Sum> {
  using Patch = float;
  static constexpr int kTaps = 1;
  using In = float;
  Sum weight;
  inline __attribute__((always_inline)) explicit Step(const void* from)
      : weight(load_bits<Sum>(from)) {}
  inline __attribute__((always_inline)) static In take(const Patch* patch) { return *patch; }
  inline __attribute__((always_inline)) void add(Sum& sum, In in) const { sum += weight * in; }
};
template <typename Sum>
struct Step<bf16, Sum> {
  static constexpr int kTaps = 2;
#if defined(MNET_AVX512_BF16)
  using Patch = bf16;
  using In = __m512i;
  Sum weight;
  inline __attribute__((always_inline)) explicit Step(const void* from)
      : weight(load_bits<Sum>(from)) {}
  inline __attribute__((always_inline)) static In take(const Patch* patch) {
    return _mm512_set1_epi32(load_bits<int>(patch));
  }
  inline __attribute__((always_inline)) void add(Sum& sum, In in) const {
    if constexpr (sizeof(Sum) == sizeof(__m512))
      sum = (Sum)_mm512_dpbf16_ps((__m512)sum, (__m512bh)in, (__m512bh)weight);
    else
      sum = (Sum)_mm256_dpbf16_ps((__m256)sum, (__m256bh)_mm512_castsi512_si256(in),
                                  (__m256bh)weight);
  }
#else
  using Patch = float;  // converted as it is gathered
  using In = TwoTaps;
  using Pairs = decltype(Sum{} == Sum{});  // integers, as many
  Sum first, second;
  inline __attribute__((always_inline)) explicit Step(const void* from) {
    const auto pairs = load_bits<Pairs>(from);
    first = bit_cast<Sum>(pairs << 16);
    second = bit_cast<Sum>(pairs & static_cast<int>(0xffff0000u));
  }
  inline __attribute__((always_inline)) static In take(const Patch* patch) {
    return {patch[0], patch[1]};
  }
  inline __attribute__((always_inline)) void add(Sum& sum, In in) const {
    sum += first * in.first;
    sum += second * in.second;
  }
#endif
};
constexpr int64_t kStepBytes = 4;
template <typename Elem>
using Patch = typename Step<Elem>::Patch;
// Taps filled up to whole steps.
template <typename Elem>
MNET_INLINE int64_t steps_of(const ConvCall& call) {
  return (call.taps + Step<Elem>::kTaps - 1) / Step<Elem>::kTaps;
}

// The patches of neighbouring pixels: `stride` values apart, in rows of `row` steps; after a row,
// `jump` values are left out. Gathered patches, and 1x1 ones, are one row.
template <typename Elem>
struct Patches {
  const Patch<Elem>* first;
  int64_t stride, row, jump;
};

// A tile's sums to y, where more is to be done than to clamp them.
template <typename Elem>
static __attribute__((noinline)) void finish_tile(const ConvCall& call, const Vector<float>* sum,
                                                  int pixels, int vectors, int lanes_in_last,
                                                  Elem* y) {
  constexpr int V = kWidth<float>;
  for (int p = 0; p < pixels; ++p)
    for (int v = 0; v < vectors; ++v) {
      Vector<float> out = activate<float>(call.activation, static_cast<float>(call.slope), *sum++);
      Elem* to = y + p * call.K + v * V;
      const bool partial = v == vectors - 1 && lanes_in_last < V;
      if (call.residual) {
        const Elem* add =
            static_cast<const Elem*>(call.residual) + (to - static_cast<Elem*>(call.y));
        // Both parts of the sum have x's type, as they have one after the other.
        out = rounded<Elem>(out) + (partial ? load_first(add, lanes_in_last) : load(add));
      }
      if (partial)
        store_first(to, out, lanes_in_last);
      else if (kStreams && sizeof(Elem) == 4 && call.stream)
        stream(reinterpret_cast<float*>(to), out);
      else
        store(to, out);
    }
}

// P pixels, `Vectors` vectors of a panel from `weight`'s column on, the last one half a vector
// where `Half` says so. What lies `ahead` bytes beyond each step's weights is wanted soon.
template <typename Elem, int P, int Vectors, bool Half>
static void conv_tile(const ConvCall& call, Patches<Elem> patches, const char* weight,
                      int64_t ahead, int64_t channel, Elem* y, int lanes_in_last,
                      Clamp<float> clamp) {
  constexpr int V = kWidth<float>, kTaps = Step<Elem>::kTaps, kFull = Vectors - Half;
  Vector<float> sum[P][Vectors] = {};
  [[maybe_unused]] HalfVector half[P] = {}, half_total[P];
  // Long sums are taken in pieces, which are then added up: rounding errors grow with the square
  // root of a piece instead of the whole.
  Vector<float> total[P][Vectors];
  const int64_t steps = steps_of<Elem>(call);
  // Where the sums will go, which is to be there by then.
  if (!call.stream)
    for (int p = 0; p < P; ++p)
      for (int v = 0; v < Vectors; ++v) __builtin_prefetch(y + p * call.K + v * V, 1, 3);
  int64_t k = 0, row_end = patches.row;
  for (;;) {
    const int64_t k_end = steps - k > kPiece / kTaps ? k + kPiece / kTaps : steps;
    const bool first = k == 0, last = k_end == steps;
    for (; k < k_end; ++k) {
      if (k == row_end) patches.first += patches.jump, row_end += patches.row;
      auto weights = [&](int v) __attribute__((always_inline)) {
        return Step<Elem>(weight + (k * kPanel + v * V) * kStepBytes);
      };
      [[maybe_unused]] const Step<Elem, HalfVector> last_half(weight + (k * kPanel + kFull * V) *
                                                                           kStepBytes);
      const Step<Elem> w[2] = {weights(0), weights(Vectors - 1)};
      __builtin_prefetch(weight + k * kPanel * kStepBytes + ahead, 0, 2);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        const auto in = Step<Elem>::take(patches.first + p * patches.stride + k * kTaps);
#pragma GCC unroll 16
        for (int v = 0; v < kFull; ++v) w[v].add(sum[p][v], in);
        if constexpr (Half) last_half.add(half[p], in);
      }
    }
    if (first && last) break;
    // A piece but the last leaves its sum in memory and starts again from zero.
    auto put_by = [&](auto& now, auto& before) __attribute__((always_inline)) {
      if (!first) now += before;
      if (last) return;
      before = now;
      now = decltype(now + now){};
    };
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 16
      for (int v = 0; v < kFull; ++v) put_by(sum[p][v], total[p][v]);
      if constexpr (Half) put_by(half[p], half_total[p]);
    }
    if (last) break;
  }
#pragma GCC unroll 16
  for (int p = 0; Half && p < P; ++p) sum[p][Vectors - 1] = widened(half[p]);
#pragma GCC unroll 16
  for (int v = 0; v < Vectors; ++v) {
    const Vector<float> scale = load(static_cast<const float*>(call.scale) + channel + v * V);
    const Vector<float> shift = load(static_cast<const float*>(call.shift) + channel + v * V);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) sum[p][v] = sum[p][v] * scale + shift;
  }
  const bool partial = lanes_in_last < V;
  if (!clamp.exact || call.residual || call.stream || (partial && !kMasks)) {
    Vector<float> tile[P * Vectors];
#pragma GCC unroll 32
    for (int i = 0; i < P * Vectors; ++i) tile[i] = sum[i / Vectors][i % Vectors];
    return finish_tile<Elem>(call, tile, P, Vectors, lanes_in_last, y);
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) {
      const Vector<float> out = at_most<float>(at_least<float>(sum[p][v], clamp.low), clamp.high);
      if (kMasks && partial && v == Vectors - 1)
        store_first(y + p * call.K + v * V, out, lanes_in_last);
      else
        store(y + p * call.K + v * V, out);
    }
}

template <typename Elem>
using ConvTile = void (*)(const ConvCall&, Patches<Elem>, const char*, int64_t, int64_t, Elem*, int,
                          Clamp<float>);
// By pixels - 1; a narrow register file has the first six only.
#if MNET_REGISTERS >= 32
#define MNET_TILES(...)                                                   \
  conv_tile<Elem, 1, __VA_ARGS__>, conv_tile<Elem, 2, __VA_ARGS__>,       \
      conv_tile<Elem, 3, __VA_ARGS__>, conv_tile<Elem, 4, __VA_ARGS__>,   \
      conv_tile<Elem, 5, __VA_ARGS__>, conv_tile<Elem, 6, __VA_ARGS__>,   \
      conv_tile<Elem, 7, __VA_ARGS__>, conv_tile<Elem, 8, __VA_ARGS__>,   \
      conv_tile<Elem, 9, __VA_ARGS__>, conv_tile<Elem, 10, __VA_ARGS__>,  \
      conv_tile<Elem, 11, __VA_ARGS__>, conv_tile<Elem, 12, __VA_ARGS__>, \
      conv_tile<Elem, 13, __VA_ARGS__>, conv_tile<Elem, 14, __VA_ARGS__>
#else
#define MNET_TILES(...)                                                 \
  conv_tile<Elem, 1, __VA_ARGS__>, conv_tile<Elem, 2, __VA_ARGS__>,     \
      conv_tile<Elem, 3, __VA_ARGS__>, conv_tile<Elem, 4, __VA_ARGS__>, \
      conv_tile<Elem, 5, __VA_ARGS__>, conv_tile<Elem, 6, __VA_ARGS__>
#endif
// One vector, two, and, where that saves anything, half of one and one and a half.
template <typename Elem>
static constexpr ConvTile<Elem> kConvTiles[kHalves ? 4 : 2][kTilePixels] = {
    {MNET_TILES(1, false)},
    {MNET_TILES(2, false)},
#if MNET_VECTOR_BYTES == 64
    {MNET_TILES(1, true)},
    {MNET_TILES(2, true)},
#endif
};
#undef MNET_TILES
