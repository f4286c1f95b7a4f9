// Training of depthwise K x K, stride 1 or 2, channels_last: statistics of the convolution, and its
// gradients, by computing it again.
//
// A thread works down a block of rows with all of a chunk's channels. Input rows, and rows of the
// convolution's gradient, are staged in scratch as floats with zeros around them, a ring of K rows
// each: no tile of columns has a border, and dx and dweight take their operands from the second-level
// cache. Included once per instruction set (see instruction_set.inc).

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
    const __mmask16 above =
        _mm512_cmp_ps_mask((__m512)z, _mm512_set1_ps(bounds.low), _CMP_NLE_UQ);
    const __mmask16 inside =
        _mm512_mask_cmp_ps_mask(above, (__m512)z, _mm512_set1_ps(bounds.high), _CMP_NGE_UQ);
    return (Vector<T>)_mm512_maskz_mov_ps(inside, (__m512)dy);
  }
#endif
  const Vector<T> kept = z <= T(bounds.low) ? Vector<T>{} : dy;
  return z >= T(bounds.high) ? Vector<T>{} : kept;
}
// The other activations, dy in place; csrc/activation_backward.h says the same for one number.
template <typename T>
static __attribute__((noinline)) void activate_backward_tile(const DwconvCall& call,
                                                             const Vector<T>* z, Vector<T>* dy,
                                                             int count) {
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

// Scratch of a thread, in floats. A pixel takes an odd number of cache lines, so that pixels one
// below the other do not share a cache set.
struct TrainingScratch {
  static constexpr int kOverhang = 7;  // columns that the last tile of a row may reach past it
  int64_t pitch;                        // a pixel
  int64_t x_columns, d_columns;         // a row of x, of the gradient of the convolution
  int64_t vectors;                      // per-channel vectors
  int64_t floats;

  TrainingScratch(const DwconvTrainingCall& call, int64_t channels)
      : pitch(((channels + 15) / 16 | 1) * 16),
        x_columns((call.OW - 1) * call.SW > call.left + call.W ? (call.OW - 1) * call.SW
                                                               : call.left + call.W),
        d_columns(call.OW > (call.left + call.W) / call.SW ? call.OW
                                                           : (call.left + call.W) / call.SW),
        vectors(2 * call.KH * call.KW + 5 + 5) {
    x_columns += call.SW * kOverhang + call.KW;
    d_columns += kOverhang + 2 * call.KW;
    const int64_t wider = x_columns > d_columns ? x_columns : d_columns;
    floats = pitch * (vectors + wider + call.KH * (x_columns + d_columns));
  }
};

template <typename Elem, int K, int S>
struct TrainingBand {
  static constexpr int V = kWidth<float>;
  using Vec = Vector<float>;
  static constexpr int kWide = kRegisters >= 32 ? 7 : 4, kNarrow = kRegisters >= 32 ? 4 : 2;

  const DwconvTrainingCall& call;
  const TrainingScratch size;
  const int64_t c_begin, channels;
  int64_t pitch;
  float *weight, *scale, *shift, *mean, *linear, *constant;
  float *pivot, *first, *second;          // of the block
  float* dweight;
  float *zeros, *x_rows, *d_rows;
  int64_t n = 0, staged = 0;  // x's rows [.., staged) of image n have been staged
  int64_t reach_h, reach_w;   // input rows and columns that an output reads

  TrainingBand(const DwconvTrainingCall& c, int64_t begin, int64_t end, bool d, void* scratch)
      : call(c), size(c, end - begin), c_begin(begin), channels(end - begin), pitch(size.pitch) {
    auto* next = static_cast<float*>(scratch);
    // The rows of d come last.
    const int64_t used = size.floats - (d ? 0 : K * size.d_columns * pitch);
    for (int64_t i = 0; i < used; ++i) next[i] = 0;
    auto take = [&](int64_t vectors) {
      float* at = next;
      next += vectors * pitch;
      return at;
    };
    auto copied = [&](const void* from, float* to) {
      if (from != nullptr)
        __builtin_memcpy(to, static_cast<const float*>(from) + c_begin,
                         static_cast<std::size_t>(channels) * sizeof(float));
      return to;
    };
    weight = take(K * K);
    for (int tap = 0; tap < K * K; ++tap)
      copied(static_cast<const float*>(call.weight) + tap * call.K, weight + tap * pitch);
    scale = copied(call.scale, take(1));
    shift = copied(call.shift, take(1));
    mean = copied(call.mean, take(1));
    linear = copied(call.linear, take(1));
    constant = copied(call.constant, take(1));
    pivot = take(1), first = take(1), second = take(1);
    dweight = take(K * K);
    zeros = take(size.x_columns > size.d_columns ? size.x_columns : size.d_columns);
    x_rows = take(K * size.x_columns);
    d_rows = take(K * size.d_columns);
    reach_h = (call.OH - 1) * S + K - call.top, reach_w = (call.OW - 1) * S + K - call.left;
    reach_h = reach_h < call.H ? reach_h : call.H;
    reach_w = reach_w < call.W ? reach_w : call.W;
  }

  int lanes(int64_t v) const { return static_cast<int>(channels - v < V ? channels - v : V); }

  // ---- x -------------------------------------------------------------------------------------
  const float* x_row(int64_t ih) const {
    return ih >= 0 && ih < reach_h ? x_rows + ih % K * size.x_columns * pitch : zeros;
  }

  void stage(int64_t begin, int64_t end) {
    if (staged < begin) staged = begin;
    if (end > reach_h) end = reach_h;
    for (; staged < end; ++staged) {
      const auto* from = static_cast<const Elem*>(call.x) +
                         (n * call.H + staged) * call.W * call.C + c_begin;
      float* to = x_rows + (staged % K * size.x_columns + call.left) * pitch;
      for (int64_t iw = 0; iw < reach_w; ++iw, from += call.C, to += pitch) {
        int64_t v = 0;
        for (; v + V <= channels; v += V) store(to + v, load(from + v));
        if (v < channels) store(to + v, load_first(from + v, lanes(v)));
      }
    }
  }

  // ---- convolution ---------------------------------------------------------------------------
  // Output row oh: finish(v, ow, sum, full) for every tile of T columns of a vector of channels.
  template <int T, typename Begin, typename Finish, typename End>
  inline __attribute__((always_inline)) void convolve(int64_t oh, const Begin& begin,
                                                      const Finish& finish, const End& end) {
    const int64_t ih = oh * S - call.top;
    stage(ih, ih + K);
    const float* row[K];
    for (int kh = 0; kh < K; ++kh) row[kh] = x_row(ih + kh);
    for (int64_t v = 0; v < channels; v += V) {
      auto state = begin(v);
      for (int64_t ow = 0; ow < call.OW; ow += T) {
        Vec sum[T] = {};
#pragma GCC unroll 5
        for (int kh = 0; kh < K; ++kh) {
          const float* from = row[kh] + ow * S * pitch + v;
          Vec in[(T - 1) * S + K];
#pragma GCC unroll 32
          for (int j = 0; j < (T - 1) * S + K; ++j) in[j] = load(from + j * pitch);
#pragma GCC unroll 5
          for (int kw = 0; kw < K; ++kw) {
            const Vec w = load(weight + (kh * K + kw) * pitch + v);
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t) sum[t] += in[t * S + kw] * w;
          }
        }
        if (ow + T <= call.OW)
          finish(state, v, ow, sum, Constant<T>{});
        else
          finish(state, v, ow, sum, Constant<0>{});
      }
      end(state, v);
    }
  }

  // Tiles that waste least.
  template <typename Row>
  inline __attribute__((always_inline)) void tiled(int64_t columns, const Row& row) {
    if ((columns + kNarrow - 1) / kNarrow * kNarrow < (columns + kWide - 1) / kWide * kWide)
      row(Constant<kNarrow>{});
    else
      row(Constant<kWide>{});
  }

  struct Pair {
    Vec first, second;
  };
  auto begin_sums() const {
    return [](int64_t) __attribute__((always_inline)) { return Pair{}; };
  }
  auto end_sums() const {
    return [this](const Pair& sums, int64_t v) __attribute__((always_inline)) {
      store(first + v, load(first + v) + sums.first);
      store(second + v, load(second + v) + sums.second);
    };
  }

  // ---- statistics ------------------------------------------------------------------------------
  void statistics_row(int64_t oh, bool opens_block) {
    tiled(call.OW, [&](auto columns) __attribute__((always_inline)) {
      constexpr int T = decltype(columns)::value;
      convolve<T>(
          oh, begin_sums(),
          [&](Pair& sums, int64_t v, int64_t ow, Vec* conv, auto full)
              __attribute__((always_inline)) {
                const int count =
                    decltype(full)::value ? T : static_cast<int>(call.OW - ow);
                if (opens_block && ow == 0) {  // the mean of the first tile
                  Vec total = {};
#pragma GCC unroll 16
                  for (int t = 0; t < T; ++t)
                    if (t < count) total += conv[t];
                  store(pivot + v, total / static_cast<float>(count));
                }
                const Vec from = load(pivot + v);
#pragma GCC unroll 16
                for (int t = 0; t < T; ++t)
                  if (t < count) {
                    const Vec d = conv[t] - from;
                    sums.first += d;
                    sums.second += d * d;
                  }
              },
          end_sums());
    });
  }

  // ---- gradients -------------------------------------------------------------------------------
  struct Gradient {
    Vec mean, scale, shift;
  };

  // dz of a tile, and its convolution less the mean; 0 past the row's end.
  template <int T, int Full>
  inline __attribute__((always_inline)) void gradient_tile(Bounds bounds, int64_t oh, int64_t v,
                                                           int64_t ow, Vec* conv, Vec* dz) const {
    const int count = Full ? T : static_cast<int>(call.OW - ow);
    const auto* dy = static_cast<const Elem*>(call.dy) +
                     ((n * call.OH + oh) * call.OW + ow) * call.K + c_begin + v;
    const int part = lanes(v);
    const Vec m = load(mean + v), factor = load(scale + v), offset = load(shift + v);
    Vec z[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      dz[t] = Vec{};
      if (t < count) dz[t] = part == V ? load(dy + t * call.K) : load_first(dy + t * call.K, part);
      conv[t] -= m;
      z[t] = conv[t] * factor + offset;
    }
    if (bounds.exact) {
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) dz[t] = activate_backward<float>(bounds, z[t], dz[t]);
    } else {
      Vec z_copy[T], dz_copy[T];
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) z_copy[t] = z[t], dz_copy[t] = dz[t];
      activate_backward_tile<float>(call, z_copy, dz_copy, T);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) dz[t] = dz_copy[t];
    }
  }

  void sums_row(int64_t oh) {
    const Bounds bounds = bounds_of(call.activation);
    tiled(call.OW, [&](auto columns) __attribute__((always_inline)) {
      constexpr int T = decltype(columns)::value;
      convolve<T>(
          oh, begin_sums(),
          [&](Pair& sums, int64_t v, int64_t ow, Vec* conv, auto full)
              __attribute__((always_inline)) {
                Vec dz[T];
                gradient_tile<T, decltype(full)::value>(bounds, oh, v, ow, conv, dz);
#pragma GCC unroll 16
                for (int t = 0; t < T; ++t) {
                  sums.first += dz[t] * conv[t];
                  sums.second += dz[t];
                }
              },
          end_sums());
    });
  }

  // The gradient of the convolution's row oh, into the ring.
  void d_row(int64_t oh) {
    const Bounds bounds = bounds_of(call.activation);
    float* to = d_rows + (oh % K * size.d_columns + K - 1) * pitch;
    tiled(call.OW, [&](auto columns) __attribute__((always_inline)) {
      constexpr int T = decltype(columns)::value;
      convolve<T>(
          oh, [](int64_t) { return 0; },
          [&](int, int64_t v, int64_t ow, Vec* conv, auto full) __attribute__((always_inline)) {
            constexpr int Full = decltype(full)::value;
            const int count = Full ? T : static_cast<int>(call.OW - ow);
            Vec dz[T];
            gradient_tile<T, Full>(bounds, oh, v, ow, conv, dz);
            const Vec factor = load(scale + v), b = load(linear + v), c = load(constant + v);
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t)
              if (t < count)
                store(to + (ow + t) * pitch + v, dz[t] * factor + (conv[t] * b + c));
          },
          [](int, int64_t) {});
    });
  }

  // Input row ih: dx, and its share of dweight.
  void dx_row(int64_t ih) {
    if constexpr (S == 1)
      tiled(call.W, [&](auto columns) __attribute__((always_inline)) {
        dx_row_tiled<decltype(columns)::value>(ih);
      });
    else
      dx_row_tiled<(kRegisters >= 32 ? 4 : 2)>(ih);
  }

  // A tile is T steps of S columns, the scratch's columns q * S + r.
  template <int T>
  inline __attribute__((always_inline)) void dx_row_tiled(int64_t ih) {
    constexpr int kColumns = T + (K - 1) / S;
    const int64_t phase = (ih + call.top) % S;
    const float* row[K] = {};  // by tap row
    for (int64_t kh = phase; kh < K; kh += S) {
      const int64_t scaled = ih + call.top - kh, oh = scaled / S;
      row[kh] = scaled >= 0 && oh < call.OH ? d_rows + oh % K * size.d_columns * pitch : zeros;
    }
    const float* x = x_row(ih);
    auto* dx = static_cast<Elem*>(call.dx);
    if (dx != nullptr) dx += (n * call.H + ih) * call.W * call.C + c_begin;
    const int64_t q_end = (call.W + call.left + S - 1) / S;
    for (int64_t v = 0; v < channels; v += V) {
      const int part = lanes(v);
      for (int64_t q = call.left / S; q < q_end; q += T) {
        Vec sum[S][T] = {}, in[S][T];
#pragma GCC unroll 2
        for (int r = 0; r < S; ++r)
#pragma GCC unroll 16
          for (int t = 0; t < T; ++t) in[r][t] = load(x + ((q + t) * S + r) * pitch + v);
        for (int64_t kh = phase; kh < K; kh += S) {
          const float* from = row[kh] + (q + (K - 1) - (K - 1) / S) * pitch + v;
          Vec d[kColumns];
#pragma GCC unroll 32
          for (int j = 0; j < kColumns; ++j) d[j] = load(from + j * pitch);
#pragma GCC unroll 5
          for (int kw = 0; kw < K; ++kw) {
            constexpr int kLast = (K - 1) / S;
            const int64_t tap = (kh * K + kw) * pitch + v;
            const Vec w = load(weight + tap);
            Vec added = load(dweight + tap);
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t) {
              const Vec g = d[t + kLast - kw / S];
              sum[kw % S][t] += g * w;
              added += g * in[kw % S][t];
            }
            store(dweight + tap, added);
          }
        }
        if (dx == nullptr) continue;
#pragma GCC unroll 2
        for (int r = 0; r < S; ++r)
#pragma GCC unroll 16
          for (int t = 0; t < T; ++t) {
            const int64_t iw = (q + t) * S + r - call.left;
            if (iw < 0 || iw >= call.W) continue;
            Elem* to = dx + iw * call.C + v;
            if (part == V)
              store(to, sum[r][t]);
            else
              store_first(to, sum[r][t], part);
          }
      }
    }
  }

  // ---- blocks ------------------------------------------------------------------------------------
  // row(i, opens) for every output row (or input row) of a block, image by image.
  template <typename Row>
  inline __attribute__((always_inline)) void each_row(int64_t block, int64_t rows,
                                                      const Row& row) {
    const int64_t band = block % call.bands, image = block / call.bands * call.images;
    const int64_t begin = rows * band / call.bands, end = rows * (band + 1) / call.bands;
    bool opens = true;
    for (n = image; n < image + call.images && n < call.N; ++n) {
      staged = 0;
      for (int64_t i = begin; i < end; ++i) {
        row(i, opens);
        opens = false;
      }
    }
  }

  void put(int64_t block, int64_t values, int64_t value, float* from) {
    __builtin_memcpy(
        static_cast<float*>(call.partials) + (block * values + value) * call.K + c_begin, from,
        static_cast<std::size_t>(channels) * sizeof(float));
    for (int64_t i = 0; i < pitch; ++i) from[i] = 0;
  }

  void statistics(int64_t block) {
    each_row(block, call.OH, [&](int64_t oh, bool opens) { statistics_row(oh, opens); });
    put(block, 3, 0, pivot), put(block, 3, 1, first), put(block, 3, 2, second);
  }

  void gradient_sums(int64_t block) {
    each_row(block, call.OH, [&](int64_t oh, bool) { sums_row(oh); });
    put(block, 2, 0, first), put(block, 2, 1, second);
  }

  void gradients(int64_t block) {
    int64_t next = 0, image = -1;  // the output row to come
    each_row(block, call.H, [&](int64_t ih, bool) {
      const int64_t lowest = ih + call.top - (K - 1), last = (ih + call.top) / S;
      if (n != image) {
        image = n;
        next = lowest <= 0 ? 0 : (lowest + S - 1) / S;
      }
      for (; next <= last && next < call.OH; ++next) d_row(next);
      stage(ih, ih + 1);
      dx_row(ih);
    });
    for (int tap = 0; tap < K * K; ++tap) put(block, K * K, tap, dweight + tap * pitch);
  }
};
