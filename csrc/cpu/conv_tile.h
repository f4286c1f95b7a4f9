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

// What is wanted later is asked for evenly, so many bytes a step: a burst would have to wait for
// itself.
constexpr int64_t kMostWanted = 64;
struct Wanted {
  const char* at;
  int64_t step;
};

// Tiles one behind the other that have the same weights: a block's pixels in a panel, or some.
template <typename Elem>
struct TileRun {
  Patches<Elem> patches;  // of the first tile
  const char* weight;
  int64_t channel;  // the first one
  Elem* y;
  int lanes_in_last;  // channels of the last vector
  Clamp<float> clamp;
  int64_t begin, end;  // tiles, counted within the block
  Wanted wanted[2];
};

// A tile's sums, scaled and shifted, to y, where more is to be done than to clamp them.
template <typename Elem>
static __attribute__((noinline)) void finish_tile(const ConvCall& call, const Vector<float>* sum,
                                                  int pixels, int vectors, int lanes_in_last,
                                                  Elem* y) {
  constexpr int V = kWidth<float>;
  const auto* residual = static_cast<const Elem*>(call.residual);
  if (residual) residual += y - static_cast<Elem*>(call.y);
  const bool streams = kStreams && sizeof(Elem) == 4 && call.stream;
  const int64_t K = call.K;
  const auto slope = static_cast<float>(call.slope);
  const int whole = vectors - (lanes_in_last < V);
  with_activation(call.activation, [&](auto activation) __attribute__((always_inline)) {
    auto next = [&](const Elem* add, int lanes) __attribute__((always_inline)) {
      const Vector<float> out = activate<float>(activation.value, slope, *sum++);
      if (!residual) return out;
      // Both parts of the sum have x's type, as they have one after the other.
      return rounded<Elem>(out) + (lanes < V ? load_first(add, lanes) : load(add));
    };
    for (int p = 0; p < pixels; ++p, y += K, residual += residual ? K : 0) {
      for (int v = 0; v < whole; ++v) {
        const Vector<float> out = next(residual + v * V, V);
        if (streams)
          stream(reinterpret_cast<float*>(y + v * V), out);
        else
          store(y + v * V, out);
      }
      if (whole < vectors)
        store_first(y + whole * V, next(residual + whole * V, lanes_in_last), lanes_in_last);
    }
  });
}

// Tiles of P pixels, `Vectors` vectors of a panel from `weight`'s column on, the last one half a
// vector where `Half` says so.
template <typename Elem, int P, int Vectors, bool Half>
static void conv_tiles(const ConvCall& call, TileRun<Elem>& state) {
  TileRun<Elem> run = state;
  constexpr int V = kWidth<float>, kTaps = Step<Elem>::kTaps, kFull = Vectors - Half;
  const int64_t steps = steps_of<Elem>(call), K = call.K;
  const bool streams = call.stream, partial = run.lanes_in_last < V;
  const bool rare = !run.clamp.exact || call.residual || streams || (partial && !kMasks);
  for (; run.begin < run.end; ++run.begin) {
    Vector<float> sum[P][Vectors] = {};
    [[maybe_unused]] HalfVector half[P] = {}, half_total[P];
    // Long sums are taken in pieces, which are then added up: rounding errors grow with the square
    // root of a piece instead of the whole.
    Vector<float> total[P][Vectors];
    // Where the sums will go, which is to be there by then.
    if (!streams)
      for (int p = 0; p < P; ++p)
        for (int v = 0; v < Vectors; ++v) __builtin_prefetch(run.y + p * K + v * V, 1, 3);
    const Patch<Elem>* first_tap = run.patches.first;
    int64_t k = 0, row_end = run.patches.row;
    for (;;) {
      const int64_t k_end = steps - k > kPiece / kTaps ? k + kPiece / kTaps : steps;
      const bool first = k == 0, last = k_end == steps;
      for (; k < k_end; ++k) {
        if (k == row_end) first_tap += run.patches.jump, row_end += run.patches.row;
        auto weights = [&](int v) __attribute__((always_inline)) {
          return Step<Elem>(run.weight + (k * kPanel + v * V) * kStepBytes);
        };
        [[maybe_unused]] const Step<Elem, HalfVector> last_half(
            run.weight + (k * kPanel + kFull * V) * kStepBytes);
        const Step<Elem> w[2] = {weights(0), weights(Vectors - 1)};
        __builtin_prefetch(run.wanted[0].at, 0, 2);
        __builtin_prefetch(run.wanted[1].at, 0, 2);
        run.wanted[0].at += run.wanted[0].step, run.wanted[1].at += run.wanted[1].step;
#pragma GCC unroll 16
        for (int p = 0; p < P; ++p) {
          const auto in = Step<Elem>::take(first_tap + p * run.patches.stride + k * kTaps);
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
      const float* scales = static_cast<const float*>(call.scale) + run.channel + v * V;
      const float* shifts = static_cast<const float*>(call.shift) + run.channel + v * V;
      const Vector<float> scale = load(scales), shift = load(shifts);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) sum[p][v] = sum[p][v] * scale + shift;
    }
    if (rare) {
      Vector<float> tile[P * Vectors];
#pragma GCC unroll 32
      for (int i = 0; i < P * Vectors; ++i) tile[i] = sum[i / Vectors][i % Vectors];
      finish_tile<Elem>(call, tile, P, Vectors, run.lanes_in_last, run.y);
    } else {
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; ++v) {
          const Vector<float> out =
              at_most<float>(at_least<float>(sum[p][v], run.clamp.low), run.clamp.high);
          if (kMasks && partial && v == Vectors - 1)
            store_first(run.y + p * K + v * V, out, run.lanes_in_last);
          else
            store(run.y + p * K + v * V, out);
        }
    }
    run.patches.first += P * run.patches.stride;
    run.y += P * K;
  }
  state = run;
}

template <typename Elem>
using ConvTiles = void (*)(const ConvCall&, TileRun<Elem>&);
// By pixels - 1; a narrow register file has the first six only.
#if MNET_REGISTERS >= 32
#define MNET_TILES(...)                                                     \
  conv_tiles<Elem, 1, __VA_ARGS__>, conv_tiles<Elem, 2, __VA_ARGS__>,       \
      conv_tiles<Elem, 3, __VA_ARGS__>, conv_tiles<Elem, 4, __VA_ARGS__>,   \
      conv_tiles<Elem, 5, __VA_ARGS__>, conv_tiles<Elem, 6, __VA_ARGS__>,   \
      conv_tiles<Elem, 7, __VA_ARGS__>, conv_tiles<Elem, 8, __VA_ARGS__>,   \
      conv_tiles<Elem, 9, __VA_ARGS__>, conv_tiles<Elem, 10, __VA_ARGS__>,  \
      conv_tiles<Elem, 11, __VA_ARGS__>, conv_tiles<Elem, 12, __VA_ARGS__>, \
      conv_tiles<Elem, 13, __VA_ARGS__>, conv_tiles<Elem, 14, __VA_ARGS__>
#else
#define MNET_TILES(...)                                                   \
  conv_tiles<Elem, 1, __VA_ARGS__>, conv_tiles<Elem, 2, __VA_ARGS__>,     \
      conv_tiles<Elem, 3, __VA_ARGS__>, conv_tiles<Elem, 4, __VA_ARGS__>, \
      conv_tiles<Elem, 5, __VA_ARGS__>, conv_tiles<Elem, 6, __VA_ARGS__>
#endif
// One vector, two, and, where that saves anything, half of one and one and a half.
template <typename Elem>
static constexpr ConvTiles<Elem> kConvTiles[kHalves ? 4 : 2][kTilePixels] = {
    {MNET_TILES(1, false)},
    {MNET_TILES(2, false)},
#if MNET_VECTOR_BYTES == 64
    {MNET_TILES(1, true)},
    {MNET_TILES(2, true)},
#endif
};
#undef MNET_TILES
