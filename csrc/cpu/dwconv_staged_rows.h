// Rows of x, of dy and of dx as training's kernels over channels work on them (see
// dwconv_training_rows.h): as floats, channel by channel, with zeros around them, in scratch.
// Included once per instruction set.

// Scratch of a thread, in floats. A pixel takes an odd number of cache lines, so that pixels one
// below the other do not share a cache set.
struct TrainingScratch {
  static constexpr int kOverhang = 7;  // columns that the last tile of a row may read past it
  static constexpr int64_t kMostRows = 8;
  static constexpr int64_t kSums = 4;  // two sums over a block, and what rounding took from them
  int64_t pitch;                       // a pixel
  int64_t step, ring;            // input rows whose gradient is computed at a time; rows of a ring
  int64_t x_columns, d_columns;  // a row of x, of the gradient of the convolution
  int64_t span_h, span_w;        // rows and columns from an output's first tap to its last
  int64_t columns, floats;

  TrainingScratch(const DwconvTrainingCall& call, int64_t channels)
      : pitch(((channels + 15) / 16 | 1) * 16),
        span_h((call.KH - 1) * call.DH + 1),
        span_w((call.KW - 1) * call.DW + 1) {
    constexpr int64_t kColumns = 28;  // for which taps had better stay in registers
    step = kColumns / call.W;
    step = step < 2 ? 2 : step < kMostRows ? step : kMostRows;
    step = step < call.H ? step : call.H;
    ring = step + span_h - 1;
    const int64_t read = (call.OW - 1) * call.SW, reach = (call.left + call.W) / call.SW;
    x_columns = read > call.left + call.W ? read : call.left + call.W;
    x_columns += call.SW * kOverhang + span_w;
    d_columns = (call.OW > reach ? call.OW : reach) + 2 * span_w;
    const int64_t wider = x_columns > d_columns ? x_columns : d_columns;
    const int64_t rows_read = (call.z == nullptr ? 1 : 2) * call.OW;
    columns = 2 * call.KH * call.KW + 5 + 1 + kSums + wider + rows_read + step * call.W +
              ring * (x_columns + d_columns);
    floats = pitch * columns;
  }
};

struct StagedRows {
  static constexpr int V = kWidth<float>;
  using Vec = Vector<float>;

  const DwconvTrainingCall& call;
  const TrainingScratch size;
  const int64_t c_begin, channels, pitch;
  const bool direct;  // dy, dx and z are read and written where they are
  float *weight, *scale, *shift, *mean, *linear, *constant;
  float *pivot, *sums;  // of the block
  float* dweight;
  float *zeros, *dy_row, *z_row, *dx_rows, *x_rows, *d_rows;
  int64_t n = 0, staged = 0;  // x's rows [.., staged) of image n have been staged
  int64_t reach_h, reach_w;   // input rows and columns that an output reads

  StagedRows(const DwconvTrainingCall& c, int64_t begin, int64_t end, void* scratch)
      : call(c),
        size(c, end - begin),
        c_begin(begin),
        channels(end - begin),
        pitch(size.pitch),
        direct(c.channels_last && c.element == Element::f32 && channels % V == 0) {
    const int64_t taps = call.KH * call.KW;
    auto* next = static_cast<float*>(scratch);
    auto take = [&](int64_t vectors) {
      float* at = next;
      next += vectors * pitch;
      return at;
    };
    auto zeroed = [&](int64_t vectors) {
      float* at = take(vectors);
      for (int64_t i = 0; i < vectors * pitch; ++i) at[i] = 0;
      return at;
    };
    auto copied = [&](const void* from, float* to) {
      if (from != nullptr)
        __builtin_memcpy(to, static_cast<const float*>(from) + c_begin,
                         static_cast<std::size_t>(channels) * sizeof(float));
      return to;
    };
    weight = zeroed(taps);
    for (int64_t tap = 0; tap < taps; ++tap)
      copied(static_cast<const float*>(call.weight) + tap * call.K, weight + tap * pitch);
    scale = copied(call.scale, zeroed(1));
    shift = copied(call.shift, zeroed(1));
    mean = copied(call.mean, zeroed(1));
    linear = copied(call.linear, zeroed(1));
    constant = copied(call.constant, zeroed(1));
    pivot = zeroed(1), sums = zeroed(TrainingScratch::kSums);
    dweight = zeroed(taps);
    zeros = zeroed(size.x_columns > size.d_columns ? size.x_columns : size.d_columns);
    dy_row = take(call.OW);
    z_row = take(call.z == nullptr ? 0 : call.OW);
    dx_rows = take(size.step * call.W);
    x_rows = take(size.ring * size.x_columns);
    d_rows = take(size.ring * size.d_columns);
    reach_h = (call.OH - 1) * call.SH + size.span_h - call.top,
    reach_w = (call.OW - 1) * call.SW + size.span_w - call.left;
    reach_h = reach_h < call.H ? reach_h : call.H;
    reach_w = reach_w < call.W ? reach_w : call.W;
    clear_around(x_rows, size.x_columns, call.left, reach_w);
    clear_around(d_rows, size.d_columns, d_margin(), call.OW);
  }

  // Columns of zeros before a row of the convolution's gradient.
  int64_t d_margin() const { return size.span_w - 1; }

  // The columns of a ring's rows before the `count` from `first` on, and behind them.
  void clear_around(float* rows, int64_t columns, int64_t first, int64_t count) const {
    for (int64_t row = 0; row < size.ring; ++row, rows += columns * pitch) {
      for (int64_t i = 0; i < first * pitch; ++i) rows[i] = 0;
      for (int64_t i = (first + count) * pitch; i < columns * pitch; ++i) rows[i] = 0;
    }
  }

  // ---- rows in and out -------------------------------------------------------------------------
  // body(a value of the type that x, dy and dx have).
  template <typename Body>
  void with_element(const Body& body) const {
    switch (call.element) {
      case Element::bf16: return body(bf16{});
      case Element::f16: return body(f16{});
      default: return body(0.0f);
    }
  }

  // The first `count` pixels of row `row` of a tensor of `rows` x `columns` pixels.
  void load_row(const void* tensor, int64_t rows, int64_t columns, int64_t row, int64_t count,
                float* to) const {
    with_element([&](auto element) {
      const auto* base = static_cast<const decltype(element)*>(tensor);
      if (call.channels_last)
        load_pixels(base + (n * rows + row) * columns * call.K + c_begin, count, to);
      else
        load_planes(base + (n * call.K + c_begin) * rows * columns + row * columns, rows * columns,
                    count, to);
    });
  }
  // Row `row` of a tensor of `rows` x `columns` pixels.
  void store_row(void* tensor, int64_t rows, int64_t columns, int64_t row,
                 const float* from) const {
    with_element([&](auto element) {
      auto* base = static_cast<decltype(element)*>(tensor);
      if (call.channels_last)
        store_pixels(base + (n * rows + row) * columns * call.K + c_begin, columns, from);
      else
        store_planes(base + (n * call.K + c_begin) * rows * columns + row * columns, rows * columns,
                     columns, from);
    });
  }

  template <typename Elem>
  void load_pixels(const Elem* from, int64_t count, float* to) const {
    for (int64_t i = 0; i < count; ++i, from += call.K, to += pitch) {
      int64_t v = 0;
      for (; v + V <= channels; v += V) store(to + v, load(from + v));
      if (v < channels) store(to + v, load_first(from + v, static_cast<int>(channels - v)));
    }
  }

  template <typename Elem>
  void load_planes(const Elem* from, int64_t plane, int64_t count, float* to) const {
    for (int64_t v = 0; v < channels; v += V, from += V * plane) {
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

  template <typename Elem>
  void store_pixels(Elem* to, int64_t count, const float* from) const {
    for (int64_t i = 0; i < count; ++i, to += call.K, from += pitch) {
      int64_t v = 0;
      for (; v + V <= channels; v += V) store(to + v, load(from + v));
      if (v < channels) store_first(to + v, load(from + v), static_cast<int>(channels - v));
    }
  }

  template <typename Elem>
  void store_planes(Elem* to, int64_t plane, int64_t count, const float* from) const {
    for (int64_t v = 0; v < channels; v += V, to += V * plane) {
      const int64_t planes = channels - v < V ? channels - v : V;
      for (int64_t i = 0; i < count; i += V) {
        const int part = static_cast<int>(count - i < V ? count - i : V);
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
    return ih >= 0 && ih < reach_h ? x_rows + ih % size.ring * size.x_columns * pitch : zeros;
  }

  void stage(int64_t begin, int64_t end) {
    if (staged < begin) staged = begin;
    if (end > reach_h) end = reach_h;
    for (; staged < end; ++staged)
      load_row(call.x, call.H, call.W, staged, reach_w,
               x_rows + (staged % size.ring * size.x_columns + call.left) * pitch);
  }

  // Pixels that are needed later, asked for a few lines at a time while there is something to
  // compute, into the second-level cache: many at once would fill the queue to memory.
  struct Ahead {
    const char* next;
    int64_t step, bytes, count;

    inline __attribute__((always_inline)) void ask() {
      for (int64_t i = 0; i < count; ++i, next += step) prefetch(next, bytes);
    }
  };
  // In so many `times`.
  Ahead ahead_of(const void* tensor, int64_t pixel, int64_t pixels, int64_t times) const {
    if (!call.prefetch || !call.channels_last) return {};
    const int64_t bytes = call.element == Element::f32 ? 4 : 2, row = call.K * bytes;
    const char* from = static_cast<const char*>(tensor) + pixel * row + c_begin * bytes;
    if (channels < call.K) return {from, row, channels * bytes, (pixels + times - 1) / times};
    const int64_t lines = (pixels * row + 63) / 64, share = (lines + times - 1) / times * 64;
    return {from, share, share, 1};
  }

  // An output row of dy or z, where it lies or staged.
  struct Pixels {
    const float* first;
    int64_t step;  // from pixel to pixel
    bool asks;     // for the row below
  };
  Pixels row_of(const void* tensor, int64_t oh, float* staged_row) {
    if (direct)
      return {static_cast<const float*>(tensor) + (n * call.OH + oh) * call.OW * call.K + c_begin,
              call.K, call.prefetch};
    load_row(tensor, call.OH, call.OW, oh, call.OW, staged_row);
    return {staged_row, pitch, false};
  }
  // Where statistics leave a row of z.
  struct Kept {
    float* first;
    int64_t step;
    bool asks;
  };
  Kept kept_row(int64_t oh) const {
    if (call.z == nullptr || !direct) return {call.z == nullptr ? nullptr : z_row, pitch, false};
    return {static_cast<float*>(call.z) + (n * call.OH + oh) * call.OW * call.K + c_begin, call.K,
            call.prefetch};
  }

  // ---- blocks ----------------------------------------------------------------------------------
  // run(first, end, opens) for every `step` output rows (or input rows) of a block, image by image.
  template <typename Run>
  inline __attribute__((always_inline)) void each_rows(int64_t block, int64_t rows, int64_t step,
                                                       const Run& run) {
    const int64_t band = block % call.bands, image = block / call.bands * call.images;
    const int64_t begin = rows * band / call.bands, end = rows * (band + 1) / call.bands;
    bool opens = true;
    for (n = image; n < image + call.images && n < call.N; ++n) {
      staged = 0;
      for (int64_t i = begin; i < end; i += step) {
        run(i, i + step < end ? i + step : end, opens);
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
};
