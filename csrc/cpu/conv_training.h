// Training of a 1x1 convolution with its norm and activation, channels_last float32: statistics in
// the blocks that the convolution has just left in the caches, the norm's gradient in blocks that
// go straight into the two matrix products of backward. Included once per instruction set.

// Rows (output channels) by two vectors (input channels) of the weight's gradient in registers.
constexpr int kGradientRows = kRegisters >= 32 ? 8 : 4;
// Vectors of channels that elementwise passes hold constants of.
constexpr int kGroup = kRegisters >= 32 ? 4 : 1;

MNET_INLINE Vector<float> load_lanes(const float* p, int lanes) {
  return lanes == kWidth<float> ? load(p) : load_first(p, lanes);
}
MNET_INLINE void store_lanes(float* p, Vector<float> v, int lanes) {
  if (lanes == kWidth<float>)
    store(p, v);
  else
    store_first(p, v, lanes);
}

// body(group size, first channel, lanes of the last vector) for all channels.
template <typename Body>
MNET_INLINE void each_group(int64_t channels, const Body& body) {
  constexpr int V = kWidth<float>;
  int64_t k = 0;
  for (; k + kGroup * V <= channels; k += kGroup * V) body(Constant<kGroup>{}, k, V);
  for (; k < channels; k += V)
    body(Constant<1>{}, k, static_cast<int>(channels - k < V ? channels - k : V));
}

// ---- packed operands
// Panels of the right-hand side of a product, [panel][step][kPanel columns], as conv_channels_last
// reads them: of the weight (K, C), columns its rows, or, `transposed`, columns its columns.
static void pack_conv_panels(const float* weight, int64_t K, int64_t C, bool transposed,
                             int64_t begin, int64_t end, float* to) {
  constexpr int V = kWidth<float>;
  const int64_t columns = transposed ? C : K, steps = transposed ? K : C;
  for (int64_t panel = begin; panel < end; ++panel)
    for (int64_t i = 0; i < kPanel; i += V) {
      const int64_t column = panel * kPanel + i, left = columns - column;
      const int count = static_cast<int>(left < 0 ? 0 : left < V ? left : V);
      float* out = to + panel * steps * kPanel + i;
      if (transposed) {
        for (int64_t t = 0; t < steps; ++t)
          store(out + t * kPanel,
                count == 0 ? Vector<float>{} : load_lanes(weight + t * C + column, count));
        continue;
      }
      for (int64_t t = 0; t < steps; t += V) {
        const int part = static_cast<int>(steps - t < V ? steps - t : V);
        Vector<float> block[V];
        for (int r = 0; r < V; ++r)
          block[r] = r < count ? load_lanes(weight + (column + r) * C + t, part) : Vector<float>{};
        transpose(block);
        for (int r = 0; r < part; ++r) store(out + (t + r) * kPanel, block[r]);
      }
    }
}

// The product of `count` rows of `x`, C values each, with packed columns: K values each.
static void multiply(const float* x, const float* packed, const float* ones, const float* zeros,
                     int64_t count, int64_t C, int64_t K, float* y, void* scratch) {
  ConvCall call{};
  call.N = call.H = call.OH = 1, call.W = call.OW = count;
  call.C = call.taps = C, call.K = K;
  call.KH = call.KW = call.SH = call.SW = call.DH = call.DW = 1;
  call.pointwise = true;
  call.x = x, call.weight = packed, call.scale = ones, call.shift = zeros, call.y = y;
  call.element = Element::f32;
  call.activation = Activation::identity;
  call.pixel_blocks = (count + 4 * kTilePixels - 1) / (4 * kTilePixels);
  call.channel_blocks = 1;
  conv_channels_last(call, 0, call.pixel_blocks, scratch);
}
// Floats of scratch that it needs.
static int64_t multiply_scratch(int64_t C) { return (4 * kTilePixels + 1) * (C + 16); }

// ---- forward
// Blocks [begin, end): z, and the partials of its statistics, as dwconv_statistics has them.
static void conv_statistics(const ConvTrainingCall& call, int64_t begin, int64_t end,
                            void* scratch) {
  using Vec = Vector<float>;
  constexpr int V = kWidth<float>;
  constexpr int64_t kRun = 32;  // sums of more are added up from sums of so many
  for (int64_t block = begin; block < end; ++block) {
    const int64_t K = call.K, first_pixel = block * call.block;
    const int64_t count = call.P - first_pixel < call.block ? call.P - first_pixel : call.block;
    float* z = call.z + first_pixel * K;
    multiply(call.x + first_pixel * call.C, call.packed, call.ones, call.zeros, count, call.C, K, z,
             scratch);
    float* out = call.partials + block * 3 * K;
    each_group(K, [&](auto vectors, int64_t k, int lanes) __attribute__((always_inline)) {
      constexpr int G = decltype(vectors)::value;
      Vec pivot[G] = {}, first[G] = {}, second[G] = {};
      const int64_t few = count < 8 ? count : 8;
      for (int64_t p = 0; p < few; ++p)
        for (int g = 0; g < G; ++g) pivot[g] += load_lanes(z + p * K + k + g * V, lanes);
      for (int g = 0; g < G; ++g) pivot[g] /= static_cast<float>(few);
      for (int64_t p = 0; p < count;) {
        const int64_t stop = p + kRun < count ? p + kRun : count;
        Vec sum[G] = {}, squares[G] = {};
        for (; p < stop; ++p)
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) {
            const Vec away = load_lanes(z + p * K + k + g * V, lanes) - pivot[g];
            sum[g] += away;
            squares[g] += away * away;
          }
        for (int g = 0; g < G; ++g) first[g] += sum[g], second[g] += squares[g];
      }
      for (int g = 0; g < G; ++g) {
        store_lanes(out + k + g * V, pivot[g], lanes);
        store_lanes(out + K + k + g * V, first[g], lanes);
        store_lanes(out + 2 * K + k + g * V, second[g], lanes);
      }
    });
  }
}

// Blocks [begin, end) of y = activate(scale * (z - mean) + shift).
static void conv_normalise(const ConvTrainingCall& call, int64_t begin, int64_t end, void*) {
  using Vec = Vector<float>;
  constexpr int V = kWidth<float>;
  const Clamp<float> clamp = clamp_of<float>(call.activation);
  const int64_t K = call.K, last = end * call.block < call.P ? end * call.block : call.P;
  each_group(K, [&](auto vectors, int64_t k, int lanes) __attribute__((always_inline)) {
    constexpr int G = decltype(vectors)::value;
    Vec mean[G], scale[G], shift[G];
    for (int g = 0; g < G; ++g) {
      mean[g] = load_lanes(call.mean + k + g * V, lanes);
      scale[g] = load_lanes(call.scale + k + g * V, lanes);
      shift[g] = load_lanes(call.shift + k + g * V, lanes);
    }
    for (int64_t p = begin * call.block; p < last; ++p) {
      Vec out[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g)
        out[g] = (load_lanes(call.z + p * K + k + g * V, lanes) - mean[g]) * scale[g] + shift[g];
      if (!clamp.exact) activate_registers<float, G>(call, out);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        out[g] = at_most<float>(at_least<float>(out[g], clamp.low), clamp.high);
        if (kStreams && call.stream)
          stream(call.y + p * K + k + g * V, out[g]);
        else
          store_lanes(call.y + p * K + k + g * V, out[g], lanes);
      }
    }
  });
  if (call.stream) drain_streams();
}

// ---- backward
// Of a group of channels: what turns z and dy into dz.
template <int G>
struct NormGradient {
  static constexpr int V = kWidth<float>;
  Vector<float> mean[G], scale[G], shift[G];
  Bounds bounds;
  int lanes;

  inline __attribute__((always_inline)) NormGradient(const ConvTrainingCall& call, int64_t k, int l)
      : bounds(bounds_of(call.activation)), lanes(l) {
    for (int g = 0; g < G; ++g) {
      mean[g] = load_lanes(call.mean + k + g * V, lanes);
      scale[g] = load_lanes(call.scale + k + g * V, lanes);
      shift[g] = load_lanes(call.shift + k + g * V, lanes);
    }
  }
  // The gradient of the norm's result at z, and z less the mean.
  inline __attribute__((always_inline)) void at(const ConvTrainingCall& call, int64_t offset,
                                                Vector<float>* centred, Vector<float>* dz) const {
    Vector<float> u[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      centred[g] = load_lanes(call.z + offset + g * V, lanes) - mean[g];
      u[g] = centred[g] * scale[g] + shift[g];
      dz[g] = load_lanes(call.dy + offset + g * V, lanes);
    }
    if (bounds.exact) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) dz[g] = activate_backward<float>(bounds, u[g], dz[g]);
      return;
    }
    Vector<float> u_copy[G], dz_copy[G];
    for (int g = 0; g < G; ++g) u_copy[g] = u[g], dz_copy[g] = dz[g];
    activate_backward_tile<float>(call, u_copy, dz_copy, G);
    for (int g = 0; g < G; ++g) dz[g] = dz_copy[g];
  }
};

// Blocks [begin, end): partials of the sums of dz * centred and of dz.
static void conv_gradient_sums(const ConvTrainingCall& call, int64_t begin, int64_t end, void*) {
  using Vec = Vector<float>;
  constexpr int V = kWidth<float>;
  constexpr int64_t kRun = 32;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t K = call.K, first_pixel = block * call.block;
    const int64_t last =
        first_pixel + call.block < call.P ? first_pixel + call.block : call.P;
    float* out = call.partials + block * 2 * K;
    each_group(K, [&](auto vectors, int64_t k, int lanes) __attribute__((always_inline)) {
      constexpr int G = decltype(vectors)::value;
      const NormGradient<G> norm(call, k, lanes);
      Vec along[G] = {}, all[G] = {};
      for (int64_t p = first_pixel; p < last;) {
        const int64_t stop = p + kRun < last ? p + kRun : last;
        Vec a[G] = {}, b[G] = {};
        for (; p < stop; ++p) {
          Vec centred[G], dz[G];
          norm.at(call, p * K + k, centred, dz);
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) {
            a[g] += dz[g] * centred[g];
            b[g] += dz[g];
          }
        }
        for (int g = 0; g < G; ++g) along[g] += a[g], all[g] += b[g];
      }
      for (int g = 0; g < G; ++g) {
        store_lanes(out + k + g * V, along[g], lanes);
        store_lanes(out + K + k + g * V, all[g], lanes);
      }
    });
  }
}

// Blocks [begin, end) of a chunk of pixels: the gradient of the convolution, from there dx, and
// both operands of the weight's gradient in panels: [kGradientRows output channels] and [a vector
// of input channels], pixel after pixel.
static void conv_data_gradient(const ConvTrainingCall& call, int64_t begin, int64_t end,
                               void* scratch) {
  using Vec = Vector<float>;
  constexpr int V = kWidth<float>, kPart = V < kGradientRows ? V : kGradientRows;
  const int64_t K = call.K, C = call.C;
  auto* rows = static_cast<float*>(scratch);
  void* inner = rows + (call.block * K + 15) / 16 * 16;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t in_chunk = block * call.block, first_pixel = call.chunk_first + in_chunk;
    const int64_t left = call.chunk_pixels - in_chunk;
    const int64_t count = left < call.block ? left : call.block;
    each_group(K, [&](auto vectors, int64_t k, int lanes) __attribute__((always_inline)) {
      constexpr int G = decltype(vectors)::value;
      const NormGradient<G> norm(call, k, lanes);
      Vec linear[G], constant[G];
      for (int g = 0; g < G; ++g) {
        linear[g] = load_lanes(call.linear + k + g * V, lanes);
        constant[g] = load_lanes(call.constant + k + g * V, lanes);
      }
      for (int64_t p = 0; p < count; ++p) {
        Vec centred[G], dz[G];
        norm.at(call, (first_pixel + p) * K + k, centred, dz);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
          const Vec d = dz[g] * norm.scale[g] + (centred[g] * linear[g] + constant[g]);
          store_lanes(rows + p * K + k + g * V, d, lanes);
          const int64_t channel = k + g * V;
#pragma GCC unroll 4
          for (int part = 0; part < V; part += kPart) {
            const int64_t row = channel + part;
            __builtin_memcpy(call.d_panels + row / kGradientRows * call.d_stride +
                                 (in_chunk + p) * kGradientRows + row % kGradientRows,
                             reinterpret_cast<const float*>(&d) + part, kPart * sizeof(float));
          }
        }
      }
    });
    const float* x = call.x + first_pixel * C;
    for (int64_t c = 0; c < C; c += V) {
      const int lanes = static_cast<int>(C - c < V ? C - c : V);
      float* to = call.x_panels + c / V * call.x_stride + in_chunk * V;
      for (int64_t p = 0; p < count; ++p) store(to + p * V, load_lanes(x + p * C + c, lanes));
    }
    if (call.dx != nullptr)
      multiply(rows, call.packed, call.ones, call.zeros, count, K, C, call.dx + first_pixel * C,
               inner);
  }
}

// One tile of the weight's gradient, of pixels [begin, end) of the chunk.
template <int Vectors>
MNET_INLINE void weight_gradient_tile(const float* d, const float* x, int64_t x_stride,
                                      int64_t begin, int64_t end, bool adds, float* to,
                                      int64_t pitch, int64_t rows, int lanes) {
  using Vec = Vector<float>;
  constexpr int V = kWidth<float>, R = kGradientRows;
  Vec sum[R][Vectors] = {};
  for (int64_t p = begin; p < end; ++p) {
    Vec in[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) in[v] = load(x + v * x_stride + p * V);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sum[r][v] += in[v] * d[p * R + r];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      if (r >= rows) continue;
      float* out = to + r * pitch + v * V;
      const int n = v == Vectors - 1 ? lanes : V;
      store_lanes(out, adds ? load_lanes(out, n) + sum[r][v] : sum[r][v], n);
    }
}

// Tasks [begin, end) of a chunk: two vectors of input channels by call.row_tiles tiles of output
// channels each. Longer sums are added up from sums of kPixels.
static void conv_weight_gradient(const ConvTrainingCall& call, int64_t begin, int64_t end, void*) {
  constexpr int V = kWidth<float>, R = kGradientRows;
  constexpr int64_t kPixels = 256;
  const int64_t tiles = (call.K + R - 1) / R, groups = (tiles + call.row_tiles - 1) / call.row_tiles;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t c = task / groups * 2 * V, first = task % groups * call.row_tiles;
    const int64_t last = first + call.row_tiles < tiles ? first + call.row_tiles : tiles;
    const int64_t width = call.C - c < 2 * V ? call.C - c : 2 * V;
    const float* x = call.x_panels + c / V * call.x_stride;
    for (int64_t p = 0; p < call.chunk_pixels; p += kPixels) {
      const int64_t p_end = p + kPixels < call.chunk_pixels ? p + kPixels : call.chunk_pixels;
      const bool adds = p > 0 || call.chunk_first > 0;
      for (int64_t tile = first; tile < last; ++tile) {
        const float* d = call.d_panels + tile * call.d_stride;
        float* to = call.dweight + tile * R * call.C + c;
        const int64_t rows = call.K - tile * R;
        if (width > V)
          weight_gradient_tile<2>(d, x, call.x_stride, p, p_end, adds, to, call.C, rows,
                                  static_cast<int>(width - V));
        else
          weight_gradient_tile<1>(d, x, call.x_stride, p, p_end, adds, to, call.C, rows,
                                  static_cast<int>(width));
      }
    }
  }
}

// Bytes of scratch that a thread of conv_statistics and conv_data_gradient needs.
static int64_t conv_training_scratch(const ConvTrainingCall& call) {
  const int64_t wider = call.C > call.K ? call.C : call.K;
  return ((call.block * call.K + 15) / 16 * 16 + multiply_scratch(wider)) *
         static_cast<int64_t>(sizeof(float));
}
