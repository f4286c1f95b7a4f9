// Depthwise convolution, channels_last: vectors run over channels. 3x3 has a file of its own.
//
// A tile of T output pixels of a row is accumulated in registers for one vector of channels, then
// for the next vector, so memory is walked along its innermost dimension in (T-1)*S+K input streams
// of pixels. An input pixel is loaded once a tile and used by every output pixel it reaches.
// Included once per instruction set (see instruction_set.inc). load, store and Vector are vec.h's,
// Clamp and activate vec_activation.h's, DwRows and is_fast dwconv_3x3_channels_last.h's.

// Registers must hold the accumulators and one row of input pixels.
template <int S>
constexpr int kTileColumns = kRegisters >= 32 ? (S == 1 ? 7 : 4) : (S == 1 ? 4 : 3);

// Where a tile's inputs lie, and which of them are inside the image.
struct TileWindow {
  int row_begin, row_end;        // valid input rows of the tile, relative to its first
  int column_begin, column_end;  // likewise columns
};

// T output pixels, channels [c_begin, c_end). x: the tile's first input pixel, which may lie
// outside of the image; Interior: the window is whole, nothing has to be left out.
template <typename Elem, int K, int S, int T, bool Interior>
MNET_INLINE void dw_tile(const DwconvCall& call, const Elem* x, Elem* y, TileWindow window,
                         int64_t c_begin, int64_t c_end) {
  using Acc = Accumulator<Elem>;
  constexpr int V = kWidth<Acc>;
  constexpr int kColumns = (T - 1) * S + K;
  const int64_t pixel = call.C, row = call.W * call.C;
  const auto* weight = static_cast<const Acc*>(call.weight);
  const auto* scale = static_cast<const Acc*>(call.scale);
  const auto* shift = static_cast<const Acc*>(call.shift);
  const Clamp<Acc> clamp = clamp_of<Acc>(call.activation);
  for (int64_t next = c_begin; next < c_end; next += V) {
    // The last vector is moved back to end at c_end: some channels are computed twice.
    const int64_t c = next + V <= c_end ? next : c_end - V;
    Vector<Acc> sum[T] = {};
    for (int kh = 0; kh < K; ++kh) {
      if (!Interior && (kh < window.row_begin || kh >= window.row_end)) continue;
      Vector<Acc> in[kColumns];
#pragma GCC unroll 32
      for (int j = 0; j < kColumns; ++j)
        in[j] = Interior || (j >= window.column_begin && j < window.column_end)
                    ? load(x + kh * row + j * pixel + c)
                    : Vector<Acc>{};
#pragma GCC unroll 16
      for (int kw = 0; kw < K; ++kw) {
        const Vector<Acc> w = load(weight + (kh * K + kw) * call.K + c);
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) sum[t] += in[t * S + kw] * w;
      }
    }
    const Vector<Acc> factor = load(scale + c), offset = load(shift + c);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sum[t] = sum[t] * factor + offset;
    if (!clamp.exact) activate_registers<Acc, T>(call, sum);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
      store(y + t * call.K + c, at_most<Acc>(at_least<Acc>(sum[t], clamp.low), clamp.high));
  }
}

// Output row oh, all columns, channels [c_begin, c_end) of image n.
template <typename Elem, int K, int S>
static void dw_row(const DwconvCall& call, int64_t n, int64_t oh, int64_t c_begin, int64_t c_end) {
  constexpr int T = kTileColumns<S>;
  const int64_t ih = oh * S - call.top;
  const auto* x = static_cast<const Elem*>(call.x) + (n * call.H + ih) * call.W * call.C;
  auto* y = static_cast<Elem*>(call.y) + (n * call.OH + oh) * call.OW * call.K;
  TileWindow window;
  window.row_begin = ih < 0 ? static_cast<int>(-ih < K ? -ih : K) : 0;
  window.row_end = call.H - ih < K ? static_cast<int>(call.H - ih) : K;

  auto tile = [&](auto columns, int64_t ow) __attribute__((always_inline)) {
    constexpr int kTile = decltype(columns)::value;
    constexpr int kColumns = (kTile - 1) * S + K;
    const int64_t iw = ow * S - call.left;
    window.column_begin = iw < 0 ? static_cast<int>(-iw < kColumns ? -iw : kColumns) : 0;
    window.column_end = call.W - iw < kColumns ? static_cast<int>(call.W - iw) : kColumns;
    const Elem* from = x + iw * call.C;
    Elem* to = y + ow * call.K;
    // The rows that the next output row reads for the first time, below this tile: too many
    // streams for the processor to foresee.
    if (call.prefetch && c_begin == 0)
      for (int r = 0; r < S; ++r)
        prefetch(from + (K + r) * call.W * call.C,
                 kTile * S * call.C * static_cast<int64_t>(sizeof(Elem)));
    if constexpr (kTile == T) {
      const bool interior = window.row_begin == 0 && window.row_end == K &&
                            window.column_begin == 0 && window.column_end == kColumns;
      if (interior) return dw_tile<Elem, K, S, kTile, true>(call, from, to, window, c_begin, c_end);
    }
    dw_tile<Elem, K, S, kTile, false>(call, from, to, window, c_begin, c_end);
  };

  int64_t ow = 0;
  for (; ow + T <= call.OW; ow += T) tile(Constant<T>{}, ow);
  if (ow == call.OW) return;
  if (call.OW >= T && call.OW - ow > 1)  // end with a tile that overlaps its neighbour
    return tile(Constant<T>{}, call.OW - T);
  for (; ow + 2 <= call.OW; ow += 2) tile(Constant<2>{}, ow);
  if (ow < call.OW) tile(Constant<1>{}, ow);
}

template <typename Elem, int K, int S>
static void dw_rows(const DwconvCall& call, int64_t n, int64_t oh, int64_t oh_end, int64_t c_begin,
                    int64_t c_end) {
  for (; oh < oh_end; ++oh) dw_row<Elem, K, S>(call, n, oh, c_begin, c_end);
}

// Lane i of the result is lane index[i] of v.
template <typename Acc>
using LaneIndex = std::conditional_t<sizeof(Acc) == 8, VectorI64, VectorI32>;
template <typename Acc>
MNET_INLINE Vector<Acc> lanes_of(Vector<Acc> v, LaneIndex<Acc> index) {
#if defined(__clang__)
  Vector<Acc> result;
  for (int i = 0; i < kWidth<Acc>; ++i) result[i] = v[index[i]];
  return result;
#else
  return __builtin_shuffle(v, index);
#endif
}

// A vector of output channels for any kernel, stride, dilation and multiplier. Whole: as many as a
// vector has lanes, and one output a channel.
template <typename Elem, bool Whole>
struct GeneralChannels {
  using Acc = Accumulator<Elem>;
  static constexpr int V = kWidth<Acc>;
  const DwconvCall& call;
  const int64_t c;
  const int lanes;
  // Of input channels: the first, how many, and which one a lane reads.
  int64_t input;
  int inputs;
  LaneIndex<Acc> index;

  GeneralChannels(const DwconvCall& call, int64_t c, int lanes) : call(call), c(c), lanes(lanes) {
    if constexpr (!Whole) {
      input = c / call.multiplier;
      inputs = static_cast<int>((c + lanes - 1) / call.multiplier - input) + 1;
      for (int i = 0; i < V; ++i)
        index[i] = static_cast<int>((c + (i < lanes ? i : lanes - 1)) / call.multiplier - input);
    }
  }

  inline __attribute__((always_inline)) Vector<Acc> read(const Elem* pixel) const {
    if constexpr (Whole) return load(pixel + c);
    const Vector<Acc> in = load_lanes(pixel + input, inputs);
    return call.multiplier == 1 ? in : lanes_of<Acc>(in, index);
  }
  inline __attribute__((always_inline)) Vector<Acc> constant(const void* from, int64_t at) const {
    const auto* values = static_cast<const Acc*>(from) + at * call.K + c;
    return Whole ? load(values) : load_lanes(values, lanes);
  }

  // T columns of row oh, from ow on.
  template <int T>
  void tile(const Elem* image, int64_t oh, int64_t ow, Elem* y) const {
    Vector<Acc> sum[T] = {};
    const int64_t step = call.SW * call.C;
    for (int64_t kh = 0; kh < call.KH; ++kh) {
      const int64_t ih = oh * call.SH - call.top + kh * call.DH;
      if (ih < 0 || ih >= call.H) continue;
      for (int64_t kw = 0; kw < call.KW; ++kw) {
        const int64_t iw = ow * call.SW - call.left + kw * call.DW;
        const Elem* from = image + (ih * call.W + iw) * call.C;
        const Vector<Acc> w = constant(call.weight, kh * call.KW + kw);
        if (iw >= 0 && iw + (T - 1) * call.SW < call.W) {
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t) sum[t] += read(from + t * step) * w;
          continue;
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
          if (iw + t * call.SW >= 0 && iw + t * call.SW < call.W)
            sum[t] += read(from + t * step) * w;
      }
    }
    const Vector<Acc> factor = constant(call.scale, 0), offset = constant(call.shift, 0);
    const Clamp<Acc> clamp = clamp_of<Acc>(call.activation);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[t] = sum[t] * factor + offset;
    if (!clamp.exact) activate_registers<Acc, T>(call, sum);
    Elem* to = y + ow * call.K + c;
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t, to += call.K) {
      const Vector<Acc> out = at_most<Acc>(at_least<Acc>(sum[t], clamp.low), clamp.high);
      if (Whole)
        store(to, out);
      else
        store_lanes(to, out, lanes);
    }
  }
};

// Any kernel, stride, dilation and multiplier, any number of channels.
template <typename Elem>
static void dw_general(const DwconvCall& call, int64_t n, int64_t oh_begin, int64_t oh_end,
                       int64_t c_begin, int64_t c_end) {
  constexpr int V = kWidth<Accumulator<Elem>>, T = kRegisters >= 32 ? 8 : 4;
  const auto* image = static_cast<const Elem*>(call.x) + n * call.H * call.W * call.C;
  auto run = [&](const auto& channels, int64_t oh, int64_t ow) {
    Elem* y = static_cast<Elem*>(call.y) + (n * call.OH + oh) * call.OW * call.K;
    if (ow + T <= call.OW)
      channels.template tile<T>(image, oh, ow, y);
    else if (call.OW >= T)  // overlaps its neighbour
      channels.template tile<T>(image, oh, call.OW - T, y);
    else
      for (int64_t i = ow; i < call.OW; ++i) channels.template tile<1>(image, oh, i, y);
  };
  for (int64_t oh = oh_begin; oh < oh_end; ++oh)
    for (int64_t ow = 0; ow < call.OW; ow += T)
      for (int64_t next = c_begin; next < c_end; next += V) {
        // The last vector is moved back to end at c_end: some channels are computed twice.
        const int64_t c = next + V <= c_end || c_end - c_begin < V ? next : c_end - V;
        const int lanes = static_cast<int>(c_end - c < V ? c_end - c : V);
        if (lanes == V && call.multiplier == 1)
          run(GeneralChannels<Elem, true>(call, c, lanes), oh, ow);
        else
          run(GeneralChannels<Elem, false>(call, c, lanes), oh, ow);
      }
}

template <typename Elem>
static void dw_channels_last(const DwconvCall& call, int64_t begin, int64_t end) {
  DwRows rows = dw_general<Elem>;
  if constexpr (sizeof(Elem) <= 4)  // float64 is for references, not for speed
    if (is_fast(call) && call.C >= kWidth<float>) {
      const bool one = call.SH == 1;
      if (call.KH == 3) rows = dw3_rows_for<Elem>(call);
      if (call.KH == 5) rows = one ? dw_rows<Elem, 5, 1> : dw_rows<Elem, 5, 2>;
      if (call.KH == 7) rows = one ? dw_rows<Elem, 7, 1> : dw_rows<Elem, 7, 2>;
    }
  // A task is an output row of a chunk of channels. Those that follow one another in an image and a
  // chunk are run as one.
  const int64_t image_rows = call.N * call.OH;
  for (int64_t task = begin; task < end;) {
    const int64_t chunk = task / image_rows, row = task % image_rows;
    const int64_t n = row / call.OH, oh = row % call.OH;
    const int64_t oh_end = call.OH - oh < end - task ? call.OH : oh + end - task;
    const int64_t c = chunk * call.channel_chunk;
    const int64_t c_end = chunk + 1 < call.channel_chunks ? c + call.channel_chunk : call.K;
    rows(call, n, oh, oh_end, c, c_end);
    task += oh_end - oh;
  }
}
