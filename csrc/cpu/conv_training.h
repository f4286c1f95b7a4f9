// Training of a 1x1 convolution with its norm and activation, channels_last float32, forward:
// statistics in the blocks that the convolution has just left in the caches. Included once per
// instruction set.

// Rows (output channels) by two vectors (input channels) of the weight's gradient in registers.
constexpr int kGradientRows = kRegisters >= 32 ? 8 : 4;
// Pixels that elementwise passes go through group by group of channels; sums of more are added up
// from sums of so many.
constexpr int64_t kRun = 32;
// Vectors of channels that elementwise passes hold constants of.
constexpr int kGroup = kRegisters >= 32 ? 4 : 1;

// Sums in two numbers, K apart.
MNET_INLINE void store_sum(float* to, int64_t K, const Sum<Vector<float>>& sum, int lanes) {
  store_lanes(to, sum.value, lanes);
  store_lanes(to + K, sum.lost, lanes);
}
MNET_INLINE void add_to_sum(float* to, int64_t K, Vector<float> x, int lanes) {
  Sum<Vector<float>> sum{load_lanes(to, lanes), load_lanes(to + K, lanes)};
  sum.add(x);
  store_sum(to, K, sum, lanes);
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
  call.pointwise = call.prefetch = true;
  call.x = x, call.weight = packed, call.scale = ones, call.shift = zeros, call.y = y;
  call.element = Element::f32;
  call.activation = Activation::identity;
  call.pixel_blocks = (count + 4 * kTilePixels - 1) / (4 * kTilePixels);
  call.channel_blocks = 1;
  convolve<float>(call, 0, call.pixel_blocks, scratch);
}
// Floats of scratch that it needs.
static int64_t multiply_scratch(int64_t C) { return (4 * kTilePixels + 1) * (C + 16); }

// ---- forward
// Blocks [begin, end): z, and the partials of its statistics, as dwconv_statistics has them.
static void conv_statistics(const ConvTrainingCall& call, int64_t begin, int64_t end,
                            void* scratch) {
  using Vec = Vector<float>;
  constexpr int V = kWidth<float>;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t K = call.K, first_pixel = block * call.block;
    const int64_t count = call.P - first_pixel < call.block ? call.P - first_pixel : call.block;
    float* z = call.z + first_pixel * K;
    multiply(call.x + first_pixel * call.C, call.packed, call.ones, call.zeros, count, call.C, K, z,
             scratch);
    float* out = call.partials + block * 5 * K;
    each_group(K, [&](auto vectors, int64_t k, int lanes) __attribute__((always_inline)) {
      constexpr int G = decltype(vectors)::value;
      Vec pivot[G] = {};
      Sum<Vec> first[G], second[G];
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
        for (int g = 0; g < G; ++g) first[g].add(sum[g]), second[g].add(squares[g]);
      }
      for (int g = 0; g < G; ++g) {
        store_lanes(out + k + g * V, pivot[g], lanes);
        store_sum(out + K + k + g * V, K, first[g], lanes);
        store_sum(out + 3 * K + k + g * V, K, second[g], lanes);
      }
    });
  }
}

// body(begin, end) for the runs of pixels [begin, end).
template <typename Body>
MNET_INLINE void each_run(int64_t begin, int64_t end, const Body& body) {
  for (int64_t p = begin; p < end; p += kRun) body(p, end - p < kRun ? end : p + kRun);
}

// Blocks [begin, end) of y = activate(scale * (z - mean) + shift).
static void conv_normalise(const ConvTrainingCall& call, int64_t begin, int64_t end, void*) {
  using Vec = Vector<float>;
  constexpr int V = kWidth<float>;
  const Clamp<float> clamp = clamp_of<float>(call.activation);
  const int64_t K = call.K, last = end * call.block < call.P ? end * call.block : call.P;
  each_run(begin * call.block, last, [&](int64_t first, int64_t stop) {
    each_group(K, [&](auto vectors, int64_t k, int lanes) __attribute__((always_inline)) {
      constexpr int G = decltype(vectors)::value;
      Vec mean[G], scale[G], shift[G];
      for (int g = 0; g < G; ++g) {
        mean[g] = load_lanes(call.mean + k + g * V, lanes);
        scale[g] = load_lanes(call.scale + k + g * V, lanes);
        shift[g] = load_lanes(call.shift + k + g * V, lanes);
      }
      for (int64_t p = first; p < stop; ++p) {
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
  });
  if (call.stream) drain_streams();
}
