// Training of depthwise K x K, stride 1 or 2: statistics of the convolution, and its gradients, by
// computing it again. Vectors run over channels, whatever the layout.
//
// A thread works down a block of rows with all of a chunk's channels. What comes from memory, and
// the convolution's gradient, is staged in scratch, as floats, channel by channel, with zeros
// around it: rings of K rows for x and for the gradient, one row for dy and dx. So memory is read
// and written row after row, no tile of columns has a border, and all operands come from the
// second-level cache. Included once per instruction set (see instruction_set.inc).

// Scratch of a thread, in floats. A pixel takes an odd number of cache lines, so that pixels one
// below the other do not share a cache set.
struct TrainingScratch {
  static constexpr int kOverhang = 7;  // columns that the last tile of a row may reach past it
  int64_t pitch;                       // a pixel
  int64_t x_columns, d_columns;        // a row of x, of the gradient of the convolution
  int64_t dy_columns, dx_columns;
  int64_t vectors;  // per-channel vectors
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
    dy_columns = call.OW + kOverhang, dx_columns = call.W + call.SW * kOverhang + 1;
    const int64_t wider = x_columns > d_columns ? x_columns : d_columns;
    floats =
        pitch * (vectors + wider + dy_columns + dx_columns + call.KH * (x_columns + d_columns));
  }
};

template <typename Elem, int K, int S>
struct TrainingRows {
  static constexpr int V = kWidth<float>;
  using Vec = Vector<float>;
  static constexpr int kWide = kRegisters >= 32 ? 7 : 4, kNarrow = kRegisters >= 32 ? 4 : 2;

  const DwconvTrainingCall& call;
  const TrainingScratch size;
  const int64_t c_begin, channels;
  int64_t pitch;
  float *weight, *scale, *shift, *mean, *linear, *constant;
  float *pivot, *first, *second;  // of the block
  float* dweight;
  float *zeros, *dy_row, *dx_line, *x_rows, *d_rows;
  int64_t n = 0, staged = 0;  // x's rows [.., staged) of image n have been staged
  int64_t reach_h, reach_w;   // input rows and columns that an output reads

  TrainingRows(const DwconvTrainingCall& c, int64_t begin, int64_t end, bool d, void* scratch)
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
    dy_row = take(size.dy_columns);
    dx_line = take(size.dx_columns);
    x_rows = take(K * size.x_columns);
    d_rows = take(K * size.d_columns);
    reach_h = (call.OH - 1) * S + K - call.top, reach_w = (call.OW - 1) * S + K - call.left;
    reach_h = reach_h < call.H ? reach_h : call.H;
    reach_w = reach_w < call.W ? reach_w : call.W;
  }

  // ---- rows in and out -------------------------------------------------------------------------
  // The first `count` pixels of row `row` of a tensor of `rows` x `columns` pixels.
  void load_row(const void* tensor, int64_t rows, int64_t columns, int64_t row, int64_t count,
                float* to) const {
    const auto* base = static_cast<const Elem*>(tensor);
    if (!call.channels_last) return load_planes(base, rows, columns, row, count, to);
    const Elem* from = base + (n * rows + row) * columns * call.K + c_begin;
    for (int64_t i = 0; i < count; ++i, from += call.K, to += pitch) {
      int64_t v = 0;
      for (; v + V <= channels; v += V) store(to + v, load(from + v));
      if (v < channels) store(to + v, load_first(from + v, static_cast<int>(channels - v)));
    }
  }

  void load_planes(const Elem* base, int64_t rows, int64_t columns, int64_t row, int64_t count,
                   float* to) const {
    const int64_t plane = rows * columns;
    for (int64_t v = 0; v < channels; v += V) {
      const Elem* from = base + (n * call.K + c_begin + v) * plane + row * columns;
      const int64_t planes = channels - v < V ? channels - v : V;
      for (int64_t i = 0; i < count; i += V) {
        const int part = static_cast<int>(count - i < V ? count - i : V);
        Vec block[V] = {};
        for (int64_t c = 0; c < planes; ++c)
          block[c] =
              part == V ? load(from + c * plane + i) : load_first(from + c * plane + i, part);
        transpose(block);
        for (int j = 0; j < part; ++j) store(to + (i + j) * pitch + v, block[j]);
      }
    }
  }

  // dx's row ih.
  void store_row(int64_t ih, const float* from) const {
    auto* base = static_cast<Elem*>(call.dx);
    if (!call.channels_last) return store_planes(base, ih, from);
    Elem* to = base + (n * call.H + ih) * call.W * call.C + c_begin;
    for (int64_t i = 0; i < call.W; ++i, to += call.C, from += pitch) {
      int64_t v = 0;
      for (; v + V <= channels; v += V) store(to + v, load(from + v));
      if (v < channels) store_first(to + v, load(from + v), static_cast<int>(channels - v));
    }
  }

  void store_planes(Elem* base, int64_t ih, const float* from) const {
    const int64_t plane = call.H * call.W;
    for (int64_t v = 0; v < channels; v += V) {
      Elem* to = base + (n * call.K + c_begin + v) * plane + ih * call.W;
      const int64_t planes = channels - v < V ? channels - v : V;
      for (int64_t i = 0; i < call.W; i += V) {
        const int part = static_cast<int>(call.W - i < V ? call.W - i : V);
        Vec block[V];
        for (int j = 0; j < V; ++j) block[j] = j < part ? load(from + (i + j) * pitch + v) : Vec{};
        transpose(block);
        for (int64_t c = 0; c < planes; ++c) {
          if (part == V)
            store(to + c * plane + i, block[c]);
          else
            store_first(to + c * plane + i, block[c], part);
        }
      }
    }
  }

  const float* x_row(int64_t ih) const {
    return ih >= 0 && ih < reach_h ? x_rows + ih % K * size.x_columns * pitch : zeros;
  }

  void stage(int64_t begin, int64_t end) {
    if (staged < begin) staged = begin;
    if (end > reach_h) end = reach_h;
    for (; staged < end; ++staged)
      load_row(call.x, call.H, call.W, staged, reach_w,
               x_rows + (staged % K * size.x_columns + call.left) * pitch);
  }

  // A slice of a later row, into the second-level cache, while there is something to compute.
  void foresee(const void* tensor, int64_t pixel, int64_t pixels, int64_t v) const {
    if (!call.prefetch || !call.channels_last) return;
    constexpr auto kSize = static_cast<int64_t>(sizeof(Elem));
    const int64_t end = v + V < channels ? v + V : channels;
    const int64_t first = pixels * v / channels, last = pixels * end / channels;
    prefetch(static_cast<const Elem*>(tensor) + (pixel + first) * call.K + c_begin,
             (last - first) * call.K * kSize);
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
      foresee(call.x, (n * call.H + staged) * call.W, S * call.W, v);
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
  auto begin_gradient(int64_t oh) const {
    return [this, oh](int64_t v) __attribute__((always_inline)) {
      foresee(call.dy, (n * call.OH + oh + 1) * call.OW, call.OW, v);
      return Pair{};
    };
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
                const int count = decltype(full)::value ? T : static_cast<int>(call.OW - ow);
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
  // dz of a tile (0 past the row's end), and its convolution less the mean.
  template <int T>
  inline __attribute__((always_inline)) void gradient_tile(Bounds bounds, int64_t v, int64_t ow,
                                                           Vec* conv, Vec* dz) const {
    const Vec m = load(mean + v), factor = load(scale + v), offset = load(shift + v);
    Vec z[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      dz[t] = load(dy_row + (ow + t) * pitch + v);
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

  void stage_dy(int64_t oh) { load_row(call.dy, call.OH, call.OW, oh, call.OW, dy_row); }

  void sums_row(int64_t oh) {
    const Bounds bounds = bounds_of(call.activation);
    stage_dy(oh);
    tiled(call.OW, [&](auto columns) __attribute__((always_inline)) {
      constexpr int T = decltype(columns)::value;
      convolve<T>(
          oh, begin_gradient(oh),
          [&](Pair& sums, int64_t v, int64_t ow, Vec* conv, auto) __attribute__((always_inline)) {
            Vec dz[T];
            gradient_tile<T>(bounds, v, ow, conv, dz);
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
    stage_dy(oh);
    float* to = d_rows + (oh % K * size.d_columns + K - 1) * pitch;
    tiled(call.OW, [&](auto columns) __attribute__((always_inline)) {
      constexpr int T = decltype(columns)::value;
      convolve<T>(
          oh, begin_gradient(oh),
          [&](Pair&, int64_t v, int64_t ow, Vec* conv, auto full) __attribute__((always_inline)) {
            const int count = decltype(full)::value ? T : static_cast<int>(call.OW - ow);
            Vec dz[T];
            gradient_tile<T>(bounds, v, ow, conv, dz);
            const Vec factor = load(scale + v), b = load(linear + v), c = load(constant + v);
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t)
              if (t < count) store(to + (ow + t) * pitch + v, dz[t] * factor + (conv[t] * b + c));
          },
          [](const Pair&, int64_t) {});
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
    const int64_t q_begin = call.left / S, q_end = (call.W + call.left + S - 1) / S;
    for (int64_t v = 0; v < channels; v += V) {
      for (int64_t q = q_begin; q < q_end; q += T) {
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
        float* to = dx_line + (q - q_begin) * S * pitch + v;
#pragma GCC unroll 2
        for (int r = 0; r < S; ++r)
#pragma GCC unroll 16
          for (int t = 0; t < T; ++t) store(to + (t * S + r) * pitch, sum[r][t]);
      }
    }
    if (call.dx != nullptr) store_row(ih, dx_line + call.left % S * pitch);
  }

  // ---- blocks
  // ------------------------------------------------------------------------------------ row(i,
  // opens) for every output row (or input row) of a block, image by image.
  template <typename Row>
  inline __attribute__((always_inline)) void each_row(int64_t block, int64_t rows, const Row& row) {
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
