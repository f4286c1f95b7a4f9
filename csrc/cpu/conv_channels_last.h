// Dense convolution (one group), channels_last float32, as a matrix product: pixels x taps times
// taps x output channels, with the epilogue in registers.
//
// A tile of up to kTilePixels x 2 vectors of output channels is accumulated in registers over all
// taps: per tap 2 loads of weights and one broadcast a pixel. A 1x1 kernel reads the image in
// place; any other gathers its patches into scratch first. Weights come packed by pack_conv_weight:
// panels of kPanel output channels, [panel][tap][channel], zero-filled at the end.
// Included once per instruction set (see instruction_set.inc).

// 2 vectors wide, as many pixels as leave registers for two vectors of weights and a broadcast.
constexpr int kTilePixels = kRegisters >= 32 ? 14 : 6;
constexpr int64_t kPiece = 128;

// P pixels, `Vectors` vectors of a panel from column `column` on.
template <int P, int Vectors>
MNET_INLINE void conv_tile(const ConvCall& call, const float* patches, int64_t patch_stride,
                           const float* panel, int64_t channel, float* y, int lanes_in_last,
                           Clamp<float> clamp) {
  constexpr int V = kWidth<float>;
  Vector<float> sum[P][Vectors] = {};
  // Long sums are taken in pieces, which are then added up: rounding errors grow with the square
  // root of a piece instead of the whole.
  Vector<float> total[P][Vectors];
  int64_t k = 0;
  for (;;) {
    const int64_t k_end = call.taps - k > kPiece ? k + kPiece : call.taps;
    const bool first = k == 0, last = k_end == call.taps;
    for (; k < k_end; ++k) {
      Vector<float> w[Vectors];
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) w[v] = load(panel + k * kPanel + v * V);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        const float in = patches[p * patch_stride + k];
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; ++v) sum[p][v] += w[v] * in;
      }
    }
    if (first && last) break;
    // A piece but the last leaves its sum in memory and starts again from zero.
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) {
        if (!first) sum[p][v] += total[p][v];
        if (last) continue;
        total[p][v] = sum[p][v];
        sum[p][v] = Vector<float>{};
      }
    if (last) break;
  }
#pragma GCC unroll 16
  for (int v = 0; v < Vectors; ++v) {
    const Vector<float> scale = load(static_cast<const float*>(call.scale) + channel + v * V);
    const Vector<float> shift = load(static_cast<const float*>(call.shift) + channel + v * V);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) sum[p][v] = sum[p][v] * scale + shift;
  }
  if (!clamp.exact) activate_registers<float, P * Vectors>(call, &sum[0][0]);
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) {
      Vector<float> out = at_most<float>(at_least<float>(sum[p][v], clamp.low), clamp.high);
      const bool partial = v == Vectors - 1 && lanes_in_last < V;
      if (call.residual) {
        const float* add = static_cast<const float*>(call.residual) +
                           (y - static_cast<float*>(call.y)) + p * call.K + v * V;
        out += partial ? load_first(add, lanes_in_last) : load(add);
      }
      if (partial)
        store_first(y + p * call.K + v * V, out, lanes_in_last);
      else if (kStreams && call.stream)
        stream(y + p * call.K + v * V, out);
      else
        store(y + p * call.K + v * V, out);
    }
}

using ConvTile = void (*)(const ConvCall&, const float*, int64_t, const float*, int64_t, float*,
                          int, Clamp<float>);
template <int P, int Vectors>
static void conv_tile_of(const ConvCall& call, const float* patches, int64_t patch_stride,
                         const float* panel, int64_t channel, float* y, int lanes_in_last,
                         Clamp<float> clamp) {
  conv_tile<P, Vectors>(call, patches, patch_stride, panel, channel, y, lanes_in_last, clamp);
}
// By pixels - 1 and vectors - 1; a narrow register file has the first six rows only.
#if MNET_REGISTERS >= 32
#define MNET_ROWS(V)                                                                     \
  conv_tile_of<1, V>, conv_tile_of<2, V>, conv_tile_of<3, V>, conv_tile_of<4, V>,        \
      conv_tile_of<5, V>, conv_tile_of<6, V>, conv_tile_of<7, V>, conv_tile_of<8, V>,    \
      conv_tile_of<9, V>, conv_tile_of<10, V>, conv_tile_of<11, V>, conv_tile_of<12, V>, \
      conv_tile_of<13, V>, conv_tile_of<14, V>
#else
#define MNET_ROWS(V)                                                              \
  conv_tile_of<1, V>, conv_tile_of<2, V>, conv_tile_of<3, V>, conv_tile_of<4, V>, \
      conv_tile_of<5, V>, conv_tile_of<6, V>
#endif
static constexpr ConvTile kConvTiles[2][kTilePixels] = {{MNET_ROWS(1)}, {MNET_ROWS(2)}};
#undef MNET_ROWS

MNET_INLINE void copy_floats(float* to, const float* from, int64_t n) {
  constexpr int V = kWidth<float>;
  int64_t i = 0;
  for (; i + V <= n; i += V) store(to + i, load(from + i));
  if (i < n)
    store_first(to + i, load_first(from + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

// The patches of pixels [begin, begin + count), one row each, `stride` floats apart.
static void gather_patches(const ConvCall& call, int64_t begin, int64_t count, float* to,
                           int64_t stride) {
  // Without dilation a row of the kernel is one run of the image, cut by its borders.
  const int64_t step = call.DW == 1 ? call.KW : 1;
  int64_t ow = begin % call.OW, oh = begin / call.OW % call.OH, n = begin / call.OW / call.OH;
  for (int64_t p = 0; p < count; ++p, to += stride) {
    const float* image = static_cast<const float*>(call.x) + n * call.H * call.W * call.C;
    const int64_t iw = ow * call.SW - call.left;
    float* out = to;
    for (int64_t kh = 0; kh < call.KH; ++kh) {
      const int64_t ih = oh * call.SH - call.top + kh * call.DH;
      for (int64_t kw = 0; kw < call.KW; kw += step, out += step * call.C) {
        const int64_t at = iw + kw * call.DW;
        const int64_t skip = at < 0 ? (-at < step ? -at : step) : 0;
        const int64_t fit = call.W - at < step ? call.W - at : step;
        const bool inside = ih >= 0 && ih < call.H && skip < fit;
        if (!inside || skip > 0 || fit < step)
          for (int64_t c = 0; c < step * call.C; ++c) out[c] = 0;
        if (inside)
          copy_floats(out + skip * call.C, image + (ih * call.W + at + skip) * call.C,
                      (fit - skip) * call.C);
      }
    }
    if (++ow < call.OW) continue;
    ow = 0;
    if (++oh == call.OH) oh = 0, ++n;
  }
}

// Rows of patches that all start in the same few sets of the first-level cache evict one another.
MNET_INLINE bool rows_collide(int64_t stride) { return stride % 1024 == 0; }

static void conv_channels_last(const ConvCall& call, int64_t begin, int64_t end, void* scratch) {
  constexpr int V = kWidth<float>;
  const Clamp<float> clamp = clamp_of<float>(call.activation);
  const int64_t pixels = call.N * call.OH * call.OW;
  int64_t gathered = -1;  // the block that scratch holds
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task / call.channel_blocks, channels = task % call.channel_blocks;
    const int64_t first = block * pixels / call.pixel_blocks;
    const int64_t count = (block + 1) * pixels / call.pixel_blocks - first;
    const float* patches = static_cast<const float*>(call.x) + first * call.C;
    int64_t stride = call.C;
    if (!call.pointwise || rows_collide(stride)) {
      stride = call.taps + (rows_collide(call.taps) ? 16 : 0);
      patches = static_cast<const float*>(scratch);
      if (gathered != block)
        gather_patches(call, first, count, static_cast<float*>(scratch), stride);
      gathered = block;
    }
    const int64_t tiles = (count + kTilePixels - 1) / kTilePixels;
    const int64_t panels = (call.K + kPanel - 1) / kPanel;
    const int64_t panel_end = (channels + 1) * panels / call.channel_blocks;
    for (int64_t panel = channels * panels / call.channel_blocks; panel < panel_end; ++panel) {
      const auto* weight = static_cast<const float*>(call.weight) + panel * call.taps * kPanel;
      const int64_t columns = call.K - panel * kPanel < kPanel ? call.K - panel * kPanel : kPanel;
      for (int64_t column = 0; column < columns; column += 2 * V) {
        const int lanes = static_cast<int>(columns - column < 2 * V ? columns - column : 2 * V);
        const int vectors = (lanes + V - 1) / V, last = lanes - (vectors - 1) * V;
        const int64_t channel = panel * kPanel + column;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t from = tile * count / tiles, to = (tile + 1) * count / tiles;
          if (panel == 0 && column == 0 && call.pointwise)  // the same pixels of the next block
            prefetch(static_cast<const float*>(call.x) + (first + count + from) * call.C,
                     (to - from) * call.C * static_cast<int64_t>(sizeof(float)));
          kConvTiles[vectors - 1][to - from - 1](
              call, patches + from * stride, stride, weight + column, channel,
              static_cast<float*>(call.y) + (first + from) * call.K + channel, last, clamp);
        }
      }
    }
  }
  if (call.stream) drain_streams();
}

static int64_t conv_channels_last_scratch(const ConvCall& call) {
  const int64_t pixels = call.N * call.OH * call.OW;
  const int64_t block = (pixels + call.pixel_blocks - 1) / call.pixel_blocks + 1;
  return call.pointwise && !rows_collide(call.C) ? 0 : block * (call.taps + 16);
}
