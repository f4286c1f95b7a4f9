// Rows of x, of dy and of dx as training's kernels over channels work on them (see
// dwconv_training_rows.h): as floats, channel by channel, with zeros around them, in scratch.
// Included once per instruction set.

// Scratch of a thread, in floats. A pixel takes an odd number of cache lines, so that pixels one
// below the other do not share a cache set.
struct TrainingScratch {
  static constexpr int kOverhang = 7;  // columns that the last tile of a row may reach past it
  int64_t pitch;                       // a pixel
  int64_t x_columns, d_columns;        // a row of x, of the gradient of the convolution
  int64_t dy_columns, dx_columns;
  static constexpr int64_t kSums = 4;  // two sums over a block, and what rounding took from them
  int64_t vectors;                     // per-channel vectors
  int64_t floats;

  TrainingScratch(const DwconvTrainingCall& call, int64_t channels)
      : pitch(((channels + 15) / 16 | 1) * 16),
        x_columns((call.OW - 1) * call.SW > call.left + call.W ? (call.OW - 1) * call.SW
                                                               : call.left + call.W),
        d_columns(call.OW > (call.left + call.W) / call.SW ? call.OW
                                                           : (call.left + call.W) / call.SW),
        vectors(2 * call.KH * call.KW + 5 + 1 + kSums) {
    x_columns += call.SW * kOverhang + call.KW;
    d_columns += kOverhang + 2 * call.KW;
    dy_columns = call.OW + kOverhang, dx_columns = call.W + call.SW * kOverhang + 1;
    const int64_t wider = x_columns > d_columns ? x_columns : d_columns;
    floats =
        pitch * (vectors + wider + dy_columns + dx_columns + call.KH * (x_columns + d_columns));
  }
};

struct StagedRows {
  static constexpr int V = kWidth<float>;
  using Vec = Vector<float>;

  const DwconvTrainingCall& call;
  const TrainingScratch size;
  const int64_t c_begin, channels, pitch;
  float *weight, *scale, *shift, *mean, *linear, *constant;
  float *pivot, *sums;  // of the block
  float* dweight;
  float *zeros, *dy_row, *dx_line, *x_rows, *d_rows;
  int64_t n = 0, staged = 0;  // x's rows [.., staged) of image n have been staged
  int64_t reach_h, reach_w;   // input rows and columns that an output reads

  StagedRows(const DwconvTrainingCall& c, int64_t begin, int64_t end, bool d, void* scratch)
      : call(c), size(c, end - begin), c_begin(begin), channels(end - begin), pitch(size.pitch) {
    const int64_t K = call.KH;
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
    for (int64_t tap = 0; tap < K * K; ++tap)
      copied(static_cast<const float*>(call.weight) + tap * call.K, weight + tap * pitch);
    scale = copied(call.scale, take(1));
    shift = copied(call.shift, take(1));
    mean = copied(call.mean, take(1));
    linear = copied(call.linear, take(1));
    constant = copied(call.constant, take(1));
    pivot = take(1), sums = take(TrainingScratch::kSums);
    dweight = take(K * K);
    zeros = take(size.x_columns > size.d_columns ? size.x_columns : size.d_columns);
    dy_row = take(size.dy_columns);
    dx_line = take(size.dx_columns);
    x_rows = take(K * size.x_columns);
    d_rows = take(K * size.d_columns);
    reach_h = (call.OH - 1) * call.SH + K - call.top,
    reach_w = (call.OW - 1) * call.SW + K - call.left;
    reach_h = reach_h < call.H ? reach_h : call.H;
    reach_w = reach_w < call.W ? reach_w : call.W;
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
  // dx's row ih.
  void store_row(int64_t ih, const float* from) const {
    with_element([&](auto element) {
      auto* base = static_cast<decltype(element)*>(call.dx);
      if (call.channels_last)
        store_pixels(base + (n * call.H + ih) * call.W * call.C + c_begin, from);
      else
        store_planes(base + (n * call.K + c_begin) * call.H * call.W + ih * call.W, from);
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
  void store_pixels(Elem* to, const float* from) const {
    for (int64_t i = 0; i < call.W; ++i, to += call.C, from += pitch) {
      int64_t v = 0;
      for (; v + V <= channels; v += V) store(to + v, load(from + v));
      if (v < channels) store_first(to + v, load(from + v), static_cast<int>(channels - v));
    }
  }

  template <typename Elem>
  void store_planes(Elem* to, const float* from) const {
    const int64_t plane = call.H * call.W;
    for (int64_t v = 0; v < channels; v += V, to += V * plane) {
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
    return ih >= 0 && ih < reach_h ? x_rows + ih % call.KH * size.x_columns * pitch : zeros;
  }

  void stage(int64_t begin, int64_t end) {
    if (staged < begin) staged = begin;
    if (end > reach_h) end = reach_h;
    for (; staged < end; ++staged)
      load_row(call.x, call.H, call.W, staged, reach_w,
               x_rows + (staged % call.KH * size.x_columns + call.left) * pitch);
  }

  // A slice of a later row, into the second-level cache, while there is something to compute.
  void foresee(const void* tensor, int64_t pixel, int64_t pixels, int64_t v) const {
    if (!call.prefetch || !call.channels_last) return;
    const int64_t bytes = call.element == Element::f32 ? 4 : 2;
    const int64_t end = v + V < channels ? v + V : channels;
    const int64_t first = pixels * v / channels, last = pixels * end / channels;
    prefetch(static_cast<const char*>(tensor) + ((pixel + first) * call.K + c_begin) * bytes,
             (last - first) * call.K * bytes);
  }
};
