// Training of depthwise convolutions: K x K, stride 1 or 2, or (0, 0) of any kernel, stride and
// dilation (dwconv_general_rows.h): statistics of the convolution, and its gradients, by
// computing it again. Vectors run over channels, whatever the layout.
//
// A thread works down a block of rows with all of a chunk's channels. What is read more than once,
// x and the convolution's gradient, is staged in scratch, as floats, channel by channel, with zeros
// around it, in rings of rows; dy and dx too where they are not floats already. So memory is read
// and written row after row, no tile of columns has a border, and operands come from the
// second-level cache. Included once per instruction set (see instruction_set.inc).

template <int K, int S>
struct TrainingRows : GeneralRows {
  static constexpr bool kGeneral = K == 0;
  static constexpr int kWide = kRegisters >= 32 ? 7 : 4, kNarrow = kRegisters >= 32 ? 4 : 2;
  using GeneralRows::GeneralRows;

  // ---- convolution ---------------------------------------------------------------------------
  // Output row oh: finish(v, ow, sum, full) for every tile of T columns of a vector of channels.
  template <int T, typename Begin, typename Finish, typename End>
  inline __attribute__((always_inline)) void convolve(int64_t oh, bool reads_dy, const Begin& begin,
                                                      const Finish& finish, const End& end) {
    const int64_t stride = kGeneral ? call.SH : S, ih = oh * stride - call.top;
    stage(ih, ih + size.span_h);
    meet(oh);
    const int64_t tiles = (call.OW + T - 1) / T * ((channels + V - 1) / V);
    Ahead x_ahead = ahead_of(call.x, (n * call.H + staged) * call.W, stride * call.W, tiles);
    Ahead dy_ahead = reads_dy && !direct
                         ? ahead_of(call.dy, (n * call.OH + oh + 1) * call.OW, call.OW, tiles)
                         : Ahead{};
    for (int64_t v = 0; v < channels; v += V) {
      auto state = begin(v);
      for (int64_t ow = 0; ow < call.OW; ow += T) {
        x_ahead.ask();
        dy_ahead.ask();
        Vec sum[T] = {};
        if constexpr (kGeneral)
          convolve_tile<T>(v, ow, sum);
        else
          own_tile(v, ow, sum, Constant<T>{});
        if (ow + T <= call.OW)
          finish(state, v, ow, sum, Constant<T>{});
        else
          finish(state, v, ow, sum, Constant<0>{});
      }
      end(state, v);
    }
  }

  template <typename Width>
  inline __attribute__((always_inline)) void own_tile(int64_t v, int64_t ow, Vec* sum,
                                                      Width) const {
    constexpr int T = Width::value;
#pragma GCC unroll 5
    for (int kh = 0; kh < K; ++kh) {
      const float* from = read[kh] + ow * S * pitch + v;
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
  }

  // The same of a row that has been kept, where one has been, or of the convolution.
  template <int T, typename Begin, typename Finish, typename End>
  inline __attribute__((always_inline)) void kept_or_convolve(int64_t oh, const Begin& begin,
                                                              const Finish& finish,
                                                              const End& end) {
    if (S == 1 || call.z == nullptr) return convolve<T>(oh, true, begin, finish, end);
    const Pixels z = row_of(call.z, oh, z_row);
    for (int64_t v = 0; v < channels; v += V) {
      auto state = begin(v);
      const float* from = z.first + v;
      for (int64_t ow = 0; ow < call.OW; ow += T, from += T * z.step) {
        const int count = ow + T <= call.OW ? T : static_cast<int>(call.OW - ow);
        Vec conv[T];
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
          conv[t] = t < count ? load(from + t * z.step) : Vec{};
          if (z.asks) __builtin_prefetch(from + (t + call.OW) * z.step, 0, 2);  // the pixel below
        }
        if (count == T)
          finish(state, v, ow, conv, Constant<T>{});
        else
          finish(state, v, ow, conv, Constant<0>{});
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
    const Kept z = kept_row(oh);
    tiled(call.OW, [&](auto columns) __attribute__((always_inline)) {
      constexpr int T = decltype(columns)::value;
      convolve<T>(
          oh, false, begin_sums(),
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
                float* const to = z.first + ow * z.step + v;
#pragma GCC unroll 16
                for (int t = 0; t < T; ++t) {
                  if (S == 1 || z.first == nullptr || t >= count) continue;
                  if (z.asks) __builtin_prefetch(to + (t + call.OW) * z.step, 1, 2);
                  store(to + t * z.step, conv[t]);
                }
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
    if (z.first == z_row) store_row(call.z, call.OH, call.OW, oh, z_row);
  }

  // ---- gradients -------------------------------------------------------------------------------

  // each(t, dz, convolution less the mean) for the first `count` columns of a tile.
  template <int T, typename Each>
  inline __attribute__((always_inline)) void gradient_tile(Bounds bounds, int64_t v, Pixels dy,
                                                           int64_t ow, const Vec* conv, int count,
                                                           const Each& each) const {
    const Vec m = load(mean + v), factor = load(scale + v), offset = load(shift + v);
    const float* from = dy.first + ow * dy.step + v;
    if (bounds.exact) {
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        if (t >= count) continue;
        if (dy.asks) __builtin_prefetch(from + (t + call.OW) * dy.step, 0, 2);  // the pixel below
        const Vec centred = conv[t] - m, z = centred * factor + offset;
        each(t, activate_backward<float>(bounds, z, load(from + t * dy.step)), centred);
      }
      return;
    }
    Vec centred[T], z[T], dz[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      centred[t] = conv[t] - m;
      z[t] = centred[t] * factor + offset;
      dz[t] = t < count ? load(from + t * dy.step) : Vec{};
    }
    activate_backward_tile<float>(call, z, dz, T);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
      if (t < count) each(t, dz[t], centred[t]);
  }

  void sums_row(int64_t oh) {
    const Bounds bounds = bounds_of(call.activation);
    const Pixels dy = row_of(call.dy, oh, dy_row);
    tiled(call.OW, [&](auto columns) __attribute__((always_inline)) {
      constexpr int T = decltype(columns)::value;
      kept_or_convolve<T>(
          oh, begin_sums(),
          [&](Pair& pair, int64_t v, int64_t ow, Vec* conv, auto full)
              __attribute__((always_inline)) {
                const int count = decltype(full)::value ? T : static_cast<int>(call.OW - ow);
                Vec along = {}, all = {};
                gradient_tile<T>(bounds, v, dy, ow, conv, count,
                                 [&](int, Vec dz, Vec centred) __attribute__((always_inline)) {
                                   along += dz * centred;
                                   all += dz;
                                 });
                pair.first.add(along);
                pair.second.add(all);
              },
          end_sums());
    });
  }

  // The gradient of the convolution's row oh, into the ring.
  void d_row(int64_t oh) {
    const Bounds bounds = bounds_of(call.activation);
    const Pixels dy = row_of(call.dy, oh, dy_row);
    float* to = d_rows + (oh % size.ring * size.d_columns + d_margin()) * pitch;
    tiled(call.OW, [&](auto columns) __attribute__((always_inline)) {
      constexpr int T = decltype(columns)::value;
      kept_or_convolve<T>(
          oh, [](int64_t) { return 0; },
          [&](int, int64_t v, int64_t ow, Vec* conv, auto full) __attribute__((always_inline)) {
            const int count = decltype(full)::value ? T : static_cast<int>(call.OW - ow);
            const Vec factor = load(scale + v), b = load(linear + v), c = load(constant + v);
            gradient_tile<T>(bounds, v, dy, ow, conv, count,
                             [&](int t, Vec dz, Vec centred) __attribute__((always_inline)) {
                               store(to + (ow + t) * pitch + v, dz * factor + (centred * b + c));
                             });
          },
          [](int, int64_t) {});
    });
  }

  // Rows of taps whose taps, and the sums of their gradients, stay in registers.
  static constexpr int kTapRows = K <= 3 ? K : 1;
  struct Taps {
    Vec weight[kTapRows][K], sum[kTapRows][K];
  };

  // Of a column q * S + R of the scratch, rows First, First + S, ... of taps: what they add to dx
  // and to the taps' gradients; d: at column q - (K - 1).
  template <int R, int First>
  inline __attribute__((always_inline)) Vec column(Vec x, const float* const* d, Taps& taps,
                                                   Vec dx) const {
#pragma GCC unroll 3
    for (int kh = First; kh < kTapRows; kh += S)
#pragma GCC unroll 5
      for (int kw = R; kw < K; kw += S) {
        const Vec g = load(d[kh] + (K - 1 - kw / S) * pitch);
        dx += g * taps.weight[kh][kw];
        taps.sum[kh][kw] += g * x;
      }
    return dx;
  }

  // An input row: by row of taps, the gradient of the convolution that it meets.
  struct Meeting {
    const float* d[K];
    const float* x;
    int64_t phase;
  };
  // Whether gradients read x where it is: where it is read once, and to its end.
  bool reads_x() const {
    return S > 1 && direct && call.z != nullptr && reach_h == call.H && reach_w == call.W;
  }
  Meeting meeting(int64_t ih) const {
    Meeting row;
    row.x = reads_x()
                ? static_cast<const float*>(call.x) + (n * call.H + ih) * call.W * call.C + c_begin
                : x_row(ih) + call.left * pitch;
    row.phase = (ih + call.top) % S;
    for (int kh = 0; kh < K; ++kh) {
      const int64_t scaled = ih + call.top - kh, oh = scaled / S;
      row.d[kh] =
          (scaled >= 0 && oh < call.OH ? d_rows + oh % size.ring * size.d_columns * pitch : zeros) +
          call.left / S * pitch;
    }
    return row;
  }

  // A row of dx, from what there is `before` or nothing.
  template <int First>
  inline __attribute__((always_inline)) void dx_row(const float* const* rows, const float* x,
                                                    int64_t x_pixel, Taps& taps,
                                                    const float* before, float* to,
                                                    int64_t to_pixel, bool asks,
                                                    bool streams) const {
    const float* d[kTapRows];
#pragma GCC unroll 3
    for (int i = 0; i < kTapRows; ++i) d[i] = rows[i];
    auto one = [&](auto r) __attribute__((always_inline)) {
      constexpr int R = decltype(r)::value;
      Vec dx = {};
      if (kTapRows < K && before != nullptr) dx = load(before), before += pitch;
      if (asks) {  // for the pixel below
        if (!streams) __builtin_prefetch(to + call.W * to_pixel, 1, 2);
        if (S > 1) __builtin_prefetch(x + call.W * x_pixel, 0, 2);
      }
      dx = column<R, First>(load(x), d, taps, dx);
      if (kStreams && streams)
        stream(to, dx);
      else
        store(to, dx);
      to += to_pixel, x += x_pixel;
      if (R == S - 1)
#pragma GCC unroll 3
        for (int i = 0; i < kTapRows; ++i) d[i] += pitch;
    };
    int64_t left = call.W;
    if constexpr (S == 2)
      if (call.left % 2 == 1) one(Constant<1>{}), --left;
    for (; left >= S; left -= S) {
      one(Constant<0>{});
      if constexpr (S == 2) one(Constant<1>{});
    }
    if (left > 0) one(Constant<0>{});
  }

  // `count` input rows from `begin` on, a vector of channels: what rows of taps from `kh` on add.
  void add_taps(int64_t begin, int64_t count, const Meeting* rows, int64_t v, int kh) {
    float* const tap = dweight + kh * K * pitch + v;
    Taps taps;
#pragma GCC unroll 3
    for (int i = 0; i < kTapRows; ++i)
#pragma GCC unroll 5
      for (int kw = 0; kw < K; ++kw) {
        taps.weight[i][kw] = load(weight + ((kh + i) * K + kw) * pitch + v);
        taps.sum[i][kw] = load(tap + (i * K + kw) * pitch);
      }
    const bool here = direct && call.dx != nullptr && kh + kTapRows + S > K;  // dx is complete
    const bool asks = here && call.prefetch, streams = here && call.stream;
    const int64_t to_pixel = here ? call.C : pitch, x_pixel = reads_x() ? call.C : pitch;
    for (int64_t i = 0; i < count; ++i) {
      const Meeting& row = rows[i];
      if (kTapRows < K && kh % S != row.phase) continue;
      const float* d[kTapRows];
      for (int j = 0; j < kTapRows; ++j) d[j] = row.d[kh + j] + v;
      float* to = dx_rows + i * call.W * pitch + v;
      const float* before = kh < S ? nullptr : to;
      if (here)
        to =
            static_cast<float*>(call.dx) + (n * call.H + begin + i) * call.W * call.C + c_begin + v;
      if (kTapRows < K || row.phase == 0)
        dx_row<0>(d, row.x + v, x_pixel, taps, before, to, to_pixel, asks, streams);
      else
        dx_row<S - 1>(d, row.x + v, x_pixel, taps, before, to, to_pixel, asks, streams);
    }
#pragma GCC unroll 3
    for (int i = 0; i < kTapRows; ++i)
#pragma GCC unroll 5
      for (int kw = 0; kw < K; ++kw) store(tap + (i * K + kw) * pitch, taps.sum[i][kw]);
  }

  // Input rows [begin, end): dx, and their share of dweight.
  void input_rows(int64_t begin, int64_t end) {
    Meeting rows[TrainingScratch::kMostRows];
    for (int64_t ih = begin; ih < end; ++ih) rows[ih - begin] = meeting(ih);
    for (int64_t v = 0; v < channels; v += V)
      for (int kh = 0; kh < K; kh += kTapRows) add_taps(begin, end - begin, rows, v, kh);
    if (direct || call.dx == nullptr) return;
    for (int64_t ih = begin; ih < end; ++ih)
      store_row(call.dx, call.H, call.W, ih, dx_rows + (ih - begin) * call.W * pitch);
  }

  // ---- blocks ----------------------------------------------------------------------------------
  void statistics(int64_t block) {
    each_rows(block, call.OH, 1,
              [&](int64_t oh, int64_t, bool opens) { statistics_row(oh, opens); });
    put(block, 5, 0, pivot), put_sums(block, 5, 1);
  }

  void gradient_sums(int64_t block) {
    each_rows(block, call.OH, 1, [&](int64_t oh, int64_t, bool) { sums_row(oh); });
    put_sums(block, 4, 0);
  }

  void gradients(int64_t block) {
    int64_t next = 0, image = -1;  // the output row to come
    each_rows(block, call.H, size.step, [&](int64_t ih, int64_t end, bool) {
      const int64_t stride = kGeneral ? call.SH : S;
      const int64_t lowest = ih + call.top - (size.span_h - 1);
      const int64_t last = (end - 1 + call.top) / stride;
      if (n != image) {
        image = n;
        next = lowest <= 0 ? 0 : (lowest + stride - 1) / stride;
      }
      for (; next <= last && next < call.OH; ++next) d_row(next);
      if constexpr (kGeneral) {
        stage(ih, end);
        add_rows(ih, end);
      } else {
        if (!reads_x()) stage(ih, end);
        input_rows(ih, end);
      }
    });
    const int64_t taps = call.KH * call.KW;
    for (int64_t tap = 0; tap < taps; ++tap) put(block, taps, tap, dweight + tap * pitch);
    if (call.stream) drain_streams();
  }
};
