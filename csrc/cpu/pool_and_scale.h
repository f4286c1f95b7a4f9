// What a squeeze-and-excitation block does besides convolving, channels_last: the mean of every
// channel over all pixels, the sigmoid of every value, and every pixel times one factor a channel.
// Included once per instruction set (see instruction_set.inc).

// Channels [channel, channel + B vectors) of one image; the last vector may be cut short.
template <typename Elem, int B>
static void pool_channels(const MapCall& call, const Elem* x, Elem* y, int lanes) {
  constexpr int V = kWidth<float>;
  // Sums of few values, then of few such sums, and so on: rounding errors of a long sum of values
  // of one sign grow with its length.
  constexpr int64_t kFew = 16;
  auto from = [&](const Elem* p, int b) __attribute__((always_inline)) {
    return B == 1 && lanes < V ? load_first(p + b * V, lanes) : load(p + b * V);
  };
  Vector<float> total[B] = {}, sum[B] = {}, piece[B] = {};
  for (int64_t p = 0; p < call.pixels;) {
    const int64_t end = call.pixels - p < kFew ? call.pixels : p + kFew;
    for (; p < end; ++p)
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) piece[b] += from(x + p * call.C, b);
    const bool full = p % (kFew * kFew) == 0 || p == call.pixels;
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      sum[b] += piece[b];
      piece[b] = Vector<float>{};
      if (full) total[b] += sum[b], sum[b] = Vector<float>{};
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) {
    const Vector<float> mean = total[b] / static_cast<float>(call.pixels);
    if (B == 1 && lanes < V)
      store_first(y + b * V, mean, lanes);
    else
      store(y + b * V, mean);
  }
}

// A task is one of call.parts of the channels of one image.
template <typename Elem>
static void pool(const MapCall& call, int64_t begin, int64_t end) {
  constexpr int V = kWidth<float>, kVectors = 4;
  const int64_t panels = (call.C + kPanel - 1) / kPanel;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / call.parts, part = task % call.parts;
    const Elem* x = static_cast<const Elem*>(call.x) + n * call.pixels * call.C;
    Elem* y = static_cast<Elem*>(call.y) + n * call.C;
    const int64_t last = (part + 1) * panels / call.parts * kPanel;
    const int64_t c_end = last < call.C ? last : call.C;
    int64_t c = part * panels / call.parts * kPanel;
    for (; c_end - c >= kVectors * V; c += kVectors * V)
      pool_channels<Elem, kVectors>(call, x + c, y + c, V);
    for (; c < c_end; c += V)
      pool_channels<Elem, 1>(call, x + c, y + c, static_cast<int>(c_end - c < V ? c_end - c : V));
  }
}

// A task is one of call.parts of the pixels of one image, here and below.
template <typename Elem>
static void sigmoid_map(const MapCall& call, int64_t begin, int64_t end) {
  constexpr int V = kWidth<float>;
  const auto sigmoid = [](Vector<float> z) __attribute__((always_inline)) {
    return 1.0f / (1.0f + exponential(-z));
  };
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / call.parts * call.pixels, part = task % call.parts;
    const int64_t last = (image + (part + 1) * call.pixels / call.parts) * call.C;
    const auto* x = static_cast<const Elem*>(call.x);
    auto* y = static_cast<Elem*>(call.y);
    int64_t i = (image + part * call.pixels / call.parts) * call.C;
    for (; i + V <= last; i += V) store(y + i, sigmoid(load(x + i)));
    if (const int rest = static_cast<int>(last - i); rest > 0)
      store_first(y + i, sigmoid(load_first(x + i, rest)), rest);
  }
}

template <typename Elem>
static void scale_map(const MapCall& call, int64_t begin, int64_t end) {
  constexpr int V = kWidth<float>;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / call.parts, part = task % call.parts;
    const Elem* gate = static_cast<const Elem*>(call.gate) + n * call.C;
    const int64_t image = n * call.pixels;
    for (int64_t p = image + part * call.pixels / call.parts;
         p < image + (part + 1) * call.pixels / call.parts; ++p) {
      const Elem* x = static_cast<const Elem*>(call.x) + p * call.C;
      Elem* y = static_cast<Elem*>(call.y) + p * call.C;
      int64_t c = 0;
      for (; c + V <= call.C; c += V) store(y + c, load(x + c) * load(gate + c));
      if (const int rest = static_cast<int>(call.C - c); rest > 0)
        store_first(y + c, load_first(x + c, rest) * load_first(gate + c, rest), rest);
    }
  }
}
