// Dense convolution (one group), channels_last, float32 or bfloat16, as a matrix product: pixels x
// taps times taps x output channels, with the epilogue in registers.
//
// A tile of up to kTilePixels x 2 vectors of output channels is accumulated in registers over all
// taps: per step 2 loads of weights and one broadcast a pixel. A 1x1 kernel reads the image in
// place; any other gathers its patches into scratch first. Weights come packed by pack_conv_weight:
// panels of kPanel output channels, [panel][step][channel], zero-filled at the end, a step being
// one tap in float32 and a pair of taps in bfloat16. Included once per instruction set (see
// instruction_set.inc).

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

// n values from the image to a patch, in the patch's type.
template <typename To, typename From>
MNET_INLINE void copy_values(To* to, const From* from, int64_t n) {
  constexpr int V = kWidth<float>;
  if constexpr (sizeof(To) == sizeof(From)) {
    for (; n >= V; n -= V, to += V, from += V) __builtin_memcpy(to, from, V * sizeof(To));
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  } else {
    for (; n >= V; n -= V, to += V, from += V) store(to, load(from));
    if (n > 0) store_first(to, load_first(from, static_cast<int>(n)), static_cast<int>(n));
  }
}

// A short run of values: two copies that overlap, of half the next power of two.
template <typename T>
MNET_INLINE void copy_run(T* to, const T* from, int64_t n) {
  const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
  auto* out = reinterpret_cast<char*>(to);
  const auto* in = reinterpret_cast<const char*>(from);
  auto twice = [&](auto half) __attribute__((always_inline)) {
    constexpr int kHalf = decltype(half)::value;
    char first[kHalf], last[kHalf];
    __builtin_memcpy(first, in, kHalf);
    __builtin_memcpy(last, in + bytes - kHalf, kHalf);
    __builtin_memcpy(out, first, kHalf);
    __builtin_memcpy(out + bytes - kHalf, last, kHalf);
  };
  if (bytes > 64) return copy_values(to, from, n);
  if (bytes > 32) return twice(Constant<32>{});
  if (bytes > 16) return twice(Constant<16>{});
  if (bytes > 8) return twice(Constant<8>{});
  copy_values(to, from, n);
}

// The patches of pixels [begin, begin + count), one row each, `stride` values apart.
template <typename Elem>
static void gather_patches(const ConvCall& call, int64_t begin, int64_t count, Patch<Elem>* to,
                           int64_t stride) {
  // Without dilation a row of the kernel is one run of the image, cut by its borders.
  const int64_t step = call.DW == 1 ? call.KW : 1;
  int64_t ow = begin % call.OW, oh = begin / call.OW % call.OH, n = begin / call.OW / call.OH;
  for (int64_t p = 0; p < count; ++p, to += stride) {
    const Elem* image = static_cast<const Elem*>(call.x) + n * call.H * call.W * call.C;
    const int64_t iw = ow * call.SW - call.left, top = oh * call.SH - call.top;
    Patch<Elem>* out = to;
    const bool whole = sizeof(Elem) == sizeof(Patch<Elem>) && call.DW == 1 && top >= 0 &&
                       top + (call.KH - 1) * call.DH < call.H && iw >= 0 && iw + call.KW <= call.W;
    if constexpr (sizeof(Elem) == sizeof(Patch<Elem>)) {
      const int64_t run = call.KW * call.C;
      for (int64_t kh = 0; whole && kh < call.KH; ++kh, out += run)
        copy_run(out,
                 reinterpret_cast<const Patch<Elem>*>(image) +
                     ((top + kh * call.DH) * call.W + iw) * call.C,
                 run);
    }
    for (int64_t kh = 0; !whole && kh < call.KH; ++kh) {
      const int64_t ih = top + kh * call.DH;
      for (int64_t kw = 0; kw < call.KW; kw += step, out += step * call.C) {
        const int64_t at = iw + kw * call.DW;
        const int64_t skip = at < 0 ? (-at < step ? -at : step) : 0;
        const int64_t fit = call.W - at < step ? call.W - at : step;
        const bool inside = ih >= 0 && ih < call.H && skip < fit;
        if (!inside || skip > 0 || fit < step)
          for (int64_t c = 0; c < step * call.C; ++c) out[c] = Patch<Elem>{};
        if (inside)
          copy_values(out + skip * call.C, image + (ih * call.W + at + skip) * call.C,
                      (fit - skip) * call.C);
      }
    }
    if (call.taps % Step<Elem>::kTaps) *out = Patch<Elem>{};  // fills the last step up
    if (++ow < call.OW) continue;
    ow = 0;
    if (++oh == call.OH) oh = 0, ++n;
  }
}

template <typename Elem>
MNET_INLINE bool rows_collide(int64_t stride) {
  return stride * static_cast<int64_t>(sizeof(Patch<Elem>)) % 4096 == 0;
}
// Whether the image is read in place. Rows of patches that all start in the same few sets of the
// first-level cache would evict one another.
template <typename Elem>
MNET_INLINE bool reads_in_place(const ConvCall& call) {
  return call.pointwise && sizeof(Patch<Elem>) == sizeof(Elem) &&
         call.taps % Step<Elem>::kTaps == 0 && !rows_collide<Elem>(call.taps);
}
// Values from one gathered patch to the next.
template <typename Elem>
MNET_INLINE int64_t gathered_stride(const ConvCall& call) {
  const int64_t taps = steps_of<Elem>(call) * Step<Elem>::kTaps;
  return taps + (rows_collide<Elem>(taps) ? 64 / static_cast<int64_t>(sizeof(Patch<Elem>)) : 0);
}

// Whether a patch is so many runs of the image, one a kernel row, that can be read where they are.
template <typename Elem>
MNET_INLINE bool reads_rows(const ConvCall& call) {
  return !call.pointwise && sizeof(Patch<Elem>) == sizeof(Elem) && Step<Elem>::kTaps == 1 &&
         call.DW == 1 && call.K <= kPanel;
}

// The patches of pixels [begin, begin + count) in the image, if none of them touches its border and
// they lie in one output row; else none.
template <typename Elem>
MNET_INLINE Patches<Elem> patches_in_image(const ConvCall& call, int64_t begin, int64_t count) {
  const int64_t ow = begin % call.OW, oh = begin / call.OW % call.OH;
  const int64_t top = oh * call.SH - call.top, left = ow * call.SW - call.left;
  const int64_t right = left + (count - 1) * call.SW + call.KW;
  if (ow + count > call.OW || top < 0 || top + (call.KH - 1) * call.DH >= call.H || left < 0 ||
      right > call.W)
    return {nullptr, 0, 0, 0};
  const int64_t n = begin / call.OW / call.OH, row = call.KW * call.C;
  const auto* image = static_cast<const Patch<Elem>*>(call.x);
  return {image + ((n * call.H + top) * call.W + left) * call.C, call.SW * call.C, row,
          call.DH * call.W * call.C - row};
}

template <typename Elem>
static void convolve(const ConvCall& call, int64_t begin, int64_t end, void* scratch) {
  constexpr int V = kWidth<float>;
  const Clamp<float> clamp = clamp_of<float>(call.activation);
  const int64_t pixels = call.N * call.OH * call.OW, steps = steps_of<Elem>(call);
  const bool in_place = reads_in_place<Elem>(call), in_rows = reads_rows<Elem>(call);
  const int64_t stride = in_place ? call.C : gathered_stride<Elem>(call);
  const int64_t panel_bytes = steps * kPanel * kStepBytes;
  int64_t gathered = -1;  // the block that scratch holds
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task / call.channel_blocks, channels = task % call.channel_blocks;
    const int64_t first = block * pixels / call.pixel_blocks;
    const int64_t count = (block + 1) * pixels / call.pixel_blocks - first;
    const Elem* image = static_cast<const Elem*>(call.x) + first * call.C;
    const auto* patches = reinterpret_cast<const Patch<Elem>*>(image);
    if (!in_place) {
      patches = static_cast<const Patch<Elem>*>(scratch);
      if (gathered != block && !in_rows)
        gather_patches<Elem>(call, first, count, static_cast<Patch<Elem>*>(scratch), stride);
      gathered = block;
    }
    const int64_t tiles = (count + kTilePixels - 1) / kTilePixels;
    const int64_t panels = (call.K + kPanel - 1) / kPanel;
    const int64_t panel_end = (channels + 1) * panels / call.channel_blocks;
    for (int64_t panel = channels * panels / call.channel_blocks; panel < panel_end; ++panel) {
      const char* weight = static_cast<const char*>(call.weight) + panel * panel_bytes;
      const int64_t columns = call.K - panel * kPanel < kPanel ? call.K - panel * kPanel : kPanel;
      for (int64_t column = 0; column < columns; column += 2 * V) {
        const int lanes = static_cast<int>(columns - column < 2 * V ? columns - column : 2 * V);
        const int vectors = (lanes + V - 1) / V, last = lanes - (vectors - 1) * V;
        const auto& tile_of = kConvTiles<Elem>[vectors - 1 + (kHalves && last <= V / 2 ? 2 : 0)];
        const int64_t channel = panel * kPanel + column;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t from = tile * count / tiles, to = (tile + 1) * count / tiles;
          if (column == 0 && call.pointwise) {  // of the same pixels of the next block, a part
            const int64_t bytes = (to - from) * call.C * static_cast<int64_t>(sizeof(Elem));
            const int64_t at = bytes * panel / panels;
            prefetch(reinterpret_cast<const char*>(image + (count + from) * call.C) + at,
                     bytes * (panel + 1) / panels - at);
          }
          Patches<Elem> taken{patches + from * stride, stride, steps, 0};
          if (in_rows) {
            const Patches<Elem> inside = patches_in_image<Elem>(call, first + from, to - from);
            if (inside.first)
              taken = inside;
            else
              gather_patches<Elem>(call, first + from, to - from,
                                   static_cast<Patch<Elem>*>(scratch) + from * stride, stride);
          }
          tile_of[to - from - 1](
              call, taken, weight + column * kStepBytes, tile < 2 ? panel_bytes + tile * 64 : 0,
              channel, static_cast<Elem*>(call.y) + (first + from) * call.K + channel, last, clamp);
        }
      }
    }
  }
  if (call.stream) drain_streams();
}

// Bytes of scratch that a thread needs.
template <typename Elem>
static int64_t convolve_scratch(const ConvCall& call) {
  const int64_t pixels = call.N * call.OH * call.OW;
  const int64_t block = (pixels + call.pixel_blocks - 1) / call.pixel_blocks + 1;
  return reads_in_place<Elem>(call)
             ? 0
             : block * gathered_stride<Elem>(call) * static_cast<int64_t>(sizeof(Patch<Elem>));
}
