// Backward of a 1x1 convolution in training (conv_training.h): the norm's gradient in blocks that
// go straight into the two matrix products. Included once per instruction set.

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
    const int64_t ahead = kRun * call.K;  // the next run
    Vector<float> u[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      centred[g] = load_lanes(call.z + offset + g * V, lanes) - mean[g];
      u[g] = centred[g] * scale[g] + shift[g];
      dz[g] = load_lanes(call.dy + offset + g * V, lanes);
      __builtin_prefetch(call.z + offset + ahead + g * V, 0, 2);
      __builtin_prefetch(call.dy + offset + ahead + g * V, 0, 2);
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
  for (int64_t block = begin; block < end; ++block) {
    const int64_t K = call.K, first = block * call.block;
    const int64_t last = first + call.block < call.P ? first + call.block : call.P;
    float* out = call.partials + block * 4 * K;
    for (int64_t i = 0; i < 4 * K; ++i) out[i] = 0;
    each_run(first, last, [&](int64_t from, int64_t stop) {
      each_group(K, [&](auto vectors, int64_t k, int lanes) __attribute__((always_inline)) {
        constexpr int G = decltype(vectors)::value;
        const NormGradient<G> norm(call, k, lanes);
        Vec along[G] = {}, all[G] = {};
        for (int64_t p = from; p < stop; ++p) {
          Vec centred[G], dz[G];
          norm.at(call, p * K + k, centred, dz);
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) {
            along[g] += dz[g] * centred[g];
            all[g] += dz[g];
          }
        }
        for (int g = 0; g < G; ++g) {
          add_to_sum(out + k + g * V, K, along[g], lanes);
          add_to_sum(out + 2 * K + k + g * V, K, all[g], lanes);
        }
      });
    });
  }
}

// A block of a chunk, from its pixel `at` on: the gradient of the convolution, from there dx, and
// both operands of the weight's gradient in panels: [kGradientRows output channels] and [a vector
// of input channels], pixel after pixel.
static void data_gradient(const ConvTrainingCall& call, int64_t at, void* scratch) {
  using Vec = Vector<float>;
  constexpr int V = kWidth<float>, R = kGradientRows, kPart = V < R ? V : R;
  const int64_t K = call.K, C = call.C, first_pixel = call.chunk_first + at;
  const int64_t left = call.chunk_pixels - at, count = left < call.block ? left : call.block;
  auto* rows = static_cast<float*>(scratch);
  void* inner = rows + (call.block * K + 15) / 16 * 16;
  each_run(0, count, [&](int64_t from, int64_t stop) {
    each_group(K, [&](auto vectors, int64_t k, int lanes) __attribute__((always_inline)) {
      constexpr int G = decltype(vectors)::value;
      const NormGradient<G> norm(call, k, lanes);
      Vec linear[G], constant[G];
      for (int g = 0; g < G; ++g) {
        linear[g] = load_lanes(call.linear + k + g * V, lanes);
        constant[g] = load_lanes(call.constant + k + g * V, lanes);
      }
      for (int64_t p = from; p < stop; ++p) {
        Vec centred[G], dz[G];
        norm.at(call, (first_pixel + p) * K + k, centred, dz);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
          const Vec d = dz[g] * norm.scale[g] + (centred[g] * linear[g] + constant[g]);
          store_lanes(rows + p * K + k + g * V, d, lanes);
          float parts[V];
          store(parts, d);
#pragma GCC unroll 4
          for (int part = 0; part < V; part += kPart) {
            const int64_t row = k + g * V + part;
            __builtin_memcpy(call.d_panels + row / R * call.d_stride + (at + p) * R + row % R,
                             parts + part, kPart * sizeof(float));
          }
        }
      }
    });
  });
  const float* x = call.x + first_pixel * C;
  each_run(0, count, [&](int64_t from, int64_t stop) {
    for (int64_t c = 0; c < C; c += V) {
      const int lanes = static_cast<int>(C - c < V ? C - c : V);
      float* to = call.x_panels + c / V * call.x_stride + at * V;
      for (int64_t p = from; p < stop; ++p) store(to + p * V, load_lanes(x + p * C + c, lanes));
    }
  });
  if (call.dx != nullptr)
    multiply(rows, call.packed, call.ones, call.zeros, count, K, C, call.dx + first_pixel * C,
             inner);
}

// Blocks [begin, end) of a chunk.
static void conv_data_gradient(const ConvTrainingCall& call, int64_t begin, int64_t end,
                               void* scratch) {
  for (int64_t block = begin; block < end; ++block)
    data_gradient(call, block * call.block, scratch);
}

// Of slabs: what is to come while a tile of the weight's gradient is computed, a cache line a
// pixel: slices of the next block, of z, of dy and of x.
constexpr int64_t kLine = 16;
MNET_INLINE const float* foreseen(const ConvTrainingCall& call, int64_t tile) {
  const int64_t first = call.chunk_first + call.chunk_pixels, slices = call.K / kLine;
  const int64_t slice = call.chunk_pixels * kLine;
  if (tile < slices) return call.z + first * call.K + tile * slice;
  if (tile < 2 * slices) return call.dy + first * call.K + (tile - slices) * slice;
  return call.x + first * call.C + (tile - 2 * slices) * slice;
}

// One tile of the weight's gradient, of pixels [begin, end) of the chunk.
template <int Vectors>
MNET_INLINE void weight_gradient_tile(const float* d, const float* x, int64_t x_stride,
                                      int64_t begin, int64_t end, bool adds, float* to,
                                      int64_t pitch, int64_t rows, int lanes, const float* next) {
  using Vec = Vector<float>;
  constexpr int V = kWidth<float>, R = kGradientRows;
  Vec sum[R][Vectors] = {};
  for (int64_t p = begin; p < end; ++p) {
    __builtin_prefetch(next + p * kLine, 0, 2);
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

// Tasks [begin, end) of a chunk, added to what is there or not: a column of tiles, call.row_tiles
// of them. Longer sums are added up from sums of kPixels.
static void weight_gradient(const ConvTrainingCall& call, int64_t begin, int64_t end, bool to_add) {
  constexpr int V = kWidth<float>, R = kGradientRows;
  constexpr int64_t kPixels = 256;
  const int64_t tiles = (call.K + R - 1) / R;
  const int64_t groups = (tiles + call.row_tiles - 1) / call.row_tiles;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t c = task / groups * 2 * V, first = task % groups * call.row_tiles;
    const int64_t last = first + call.row_tiles < tiles ? first + call.row_tiles : tiles;
    const int64_t width = call.C - c < 2 * V ? call.C - c : 2 * V;
    const float* x = call.x_panels + c / V * call.x_stride;
    for (int64_t p = 0; p < call.chunk_pixels; p += kPixels) {
      const int64_t p_end = p + kPixels < call.chunk_pixels ? p + kPixels : call.chunk_pixels;
      for (int64_t tile = first; tile < last; ++tile) {
        const float* d = call.d_panels + tile * call.d_stride;
        const float* next = call.slabs > 1 ? foreseen(call, task * tiles + tile) : d;
        float* to = call.dweight + tile * R * call.C + c;
        const int64_t rows = call.K - tile * R;
        const int lanes = static_cast<int>(width > V ? width - V : width);
        if (width > V)
          weight_gradient_tile<2>(d, x, call.x_stride, p, p_end, p > 0 || to_add, to, call.C, rows,
                                  lanes, next);
        else
          weight_gradient_tile<1>(d, x, call.x_stride, p, p_end, p > 0 || to_add, to, call.C, rows,
                                  lanes, next);
      }
    }
  }
}

static void conv_weight_gradient(const ConvTrainingCall& call, int64_t begin, int64_t end, void*) {
  weight_gradient(call, begin, end, call.chunk_first > 0);
}

// Slabs [begin, end): both gradients of their blocks, one after the other, in the thread's caches.
static void conv_slab_gradients(const ConvTrainingCall& call, int64_t begin, int64_t end,
                                void* scratch) {
  const int64_t blocks = (call.P + call.block - 1) / call.block;
  ConvTrainingCall mine = call;
  mine.d_panels = static_cast<float*>(scratch);
  mine.x_panels = mine.d_panels + call.d_floats;
  void* inner = mine.x_panels + call.x_floats;
  for (int64_t slab = begin; slab < end; ++slab) {
    mine.dweight = call.dweight + slab * call.K * call.C;
    const int64_t first = slab * blocks / call.slabs, last = (slab + 1) * blocks / call.slabs;
    for (int64_t block = first; block < last; ++block) {
      mine.chunk_first = block * call.block;
      const int64_t left = call.P - mine.chunk_first;
      mine.chunk_pixels = left < call.block ? left : call.block;
      data_gradient(mine, 0, inner);
      weight_gradient(mine, 0, call.columns, block > first);
    }
  }
}

// Bytes of scratch that a thread of these needs.
static int64_t conv_training_scratch(const ConvTrainingCall& call) {
  const int64_t wider = call.C > call.K ? call.C : call.K;
  const int64_t floats = (call.block * call.K + 15) / 16 * 16 + multiply_scratch(wider);
  return (floats + (call.slabs > 1 ? call.d_floats + call.x_floats : 0)) *
         static_cast<int64_t>(sizeof(float));
}
