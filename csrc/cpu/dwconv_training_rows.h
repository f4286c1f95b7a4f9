// Training of depthwise K x K, stride 1 or 2: statistics of the convolution, and its gradients, by
// computing it again. Vectors run over channels, whatever the layout.
//
// A thread works down a block of rows with all of a chunk's channels. What comes from memory, and
// the convolution's gradient, is staged in scratch, as floats, channel by channel, with zeros
// around it: rings of K rows for x and for the gradient, one row for dy and dx. So memory is read
// and written row after row, no tile of columns has a border, and all operands come from the
// second-level cache. Included once per instruction set (see instruction_set.inc).

template <int K, int S>
struct TrainingRows : StagedRows {
  static constexpr int kWide = kRegisters >= 32 ? 7 : 4, kNarrow = kRegisters >= 32 ? 4 : 2;
  using StagedRows::StagedRows;

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
          for (int j = 0; j < (T - 1) * S + K; ++j) in[j] = kept(load(from + j * pitch));
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
    Sum<Vec> first, second;
  };
  float* sum_of(int i, int64_t v) const { return sums + i * pitch + v; }
  inline __attribute__((always_inline)) Pair load_sums(int64_t v) const {
    return {{load(sum_of(0, v)), load(sum_of(1, v))}, {load(sum_of(2, v)), load(sum_of(3, v))}};
  }
  auto begin_sums() const {
    return [this](int64_t v) __attribute__((always_inline)) { return load_sums(v); };
  }
  auto begin_gradient(int64_t oh) const {
    return [this, oh](int64_t v) __attribute__((always_inline)) {
      foresee(call.dy, (n * call.OH + oh + 1) * call.OW, call.OW, v);
      return load_sums(v);
    };
  }
  auto end_sums() const {
    return [this](const Pair& pair, int64_t v) __attribute__((always_inline)) {
      store(sum_of(0, v), pair.first.value), store(sum_of(1, v), pair.first.lost);
      store(sum_of(2, v), pair.second.value), store(sum_of(3, v), pair.second.lost);
    };
  }
  // The sum of a tile, neighbours first.
  template <int T>
  static inline __attribute__((always_inline)) Vec tile_sum(const Vec* tile) {
    Vec sum[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sum[t] = tile[t];
#pragma GCC unroll 4
    for (int step = 1; step < T; step *= 2)
#pragma GCC unroll 16
      for (int t = 0; t + step < T; t += 2 * step) sum[t] += sum[t + step];
    return sum[0];
  }

  // ---- statistics ------------------------------------------------------------------------------
  void statistics_row(int64_t oh, bool opens_block) {
    tiled(call.OW, [&](auto columns) __attribute__((always_inline)) {
      constexpr int T = decltype(columns)::value;
      convolve<T>(
          oh, begin_sums(),
          [&](Pair& pair, int64_t v, int64_t ow, Vec* conv, auto full)
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
                Vec away[T], squares[T];
#pragma GCC unroll 16
                for (int t = 0; t < T; ++t) {
                  away[t] = t < count ? conv[t] - from : Vec{};
                  squares[t] = away[t] * away[t];
                }
                pair.first.add(tile_sum<T>(away));
                pair.second.add(tile_sum<T>(squares));
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
          [&](Pair& pair, int64_t v, int64_t ow, Vec* conv, auto) __attribute__((always_inline)) {
            Vec dz[T];
            gradient_tile<T>(bounds, v, ow, conv, dz);
            pair.second.add(tile_sum<T>(dz));
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t) dz[t] *= conv[t];
            pair.first.add(tile_sum<T>(dz));
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
          oh,
          [this, oh](int64_t v) __attribute__((always_inline)) {
            foresee(call.dy, (n * call.OH + oh + 1) * call.OW, call.OW, v);
            return 0;
          },
          [&](int, int64_t v, int64_t ow, Vec* conv, auto full) __attribute__((always_inline)) {
            const int count = decltype(full)::value ? T : static_cast<int>(call.OW - ow);
            Vec dz[T];
            gradient_tile<T>(bounds, v, ow, conv, dz);
            const Vec factor = load(scale + v), b = load(linear + v), c = load(constant + v);
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t)
              if (t < count) store(to + (ow + t) * pitch + v, dz[t] * factor + (conv[t] * b + c));
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
          for (int j = 0; j < kColumns; ++j) d[j] = kept(load(from + j * pitch));
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

  // ---- blocks ----------------------------------------------------------------------------------
  // row(i, opens) for every output row (or input row) of a block, image by image.
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

  void put_sums(int64_t block, int64_t values, int64_t from) {
    for (int i = 0; i < TrainingScratch::kSums; ++i) put(block, values, from + i, sums + i * pitch);
  }

  void statistics(int64_t block) {
    each_row(block, call.OH, [&](int64_t oh, bool opens) { statistics_row(oh, opens); });
    put(block, 5, 0, pivot), put_sums(block, 5, 1);
  }

  void gradient_sums(int64_t block) {
    each_row(block, call.OH, [&](int64_t oh, bool) { sums_row(oh); });
    put_sums(block, 4, 0);
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
