// Training's rows (dwconv_training_rows.h) for kernels, strides and dilations that have no code of
// their own: everything about them is known at run time alone. Operands come from the caches anew
// for every tap, which in vectors over channels costs little. Included once per instruction set.

struct GeneralRows : StagedRows {
  using StagedRows::StagedRows;

  const float* read[kMostTapRows];  // by row of taps, the row of x that an output row meets

  void meet(int64_t oh) {
    for (int64_t kh = 0; kh < call.KH; ++kh)
      read[kh] = x_row(oh * call.SH - call.top + kh * call.DH);
  }

  // The convolution at T columns of the row that was met, a vector of channels.
  template <int T>
  inline __attribute__((always_inline)) void convolve_tile(int64_t v, int64_t ow, Vec* sum) const {
    const int64_t step = call.SW * pitch;
    const float* tap = weight + v;
    for (int64_t kh = 0; kh < call.KH; ++kh) {
      const float* from = read[kh] + ow * step + v;
      for (int64_t kw = 0; kw < call.KW; ++kw, tap += pitch, from += call.DW * pitch) {
        const Vec w = load(tap);
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) sum[t] += load(from + t * step) * w;
      }
    }
  }

  // What taps of one row add, each to the columns of x that it meets, `count` of them.
  struct Columns {
    const float *d, *x;
    float* dx;
    int64_t count;
    const float* weight;
    float* sum;
    int64_t tap_step, d_step;  // from tap to tap: of weight and sum; of d, backwards
  };
  template <int N>
  void add_taps_at(const Columns& at) const {
    const int64_t over = call.SW * pitch;
    Vec w[N], sum[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j)
      w[j] = load(at.weight + j * at.tap_step), sum[j] = load(at.sum + j * at.tap_step);
    const float *d = at.d, *x = at.x;
    float* dx = at.dx;
    for (int64_t i = 0; i < at.count; ++i, d += pitch, x += over, dx += over) {
      const Vec in = load(x);
      Vec out = load(dx);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) {
        const Vec g = load(d - j * at.d_step);
        out += g * w[j];
        sum[j] += g * in;
      }
      store(dx, out);
    }
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) store(at.sum + j * at.tap_step, sum[j]);
  }

  // As many taps at a time as registers hold.
  void add_taps(Columns at, int64_t taps) const {
    constexpr int kMost = kRegisters >= 32 ? 7 : 4;
    while (taps > 0) {
      const int n = static_cast<int>(taps < kMost ? taps : kMost);
      auto some = [&](auto number) {
        constexpr int N = decltype(number)::value;
        add_taps_at<N>(at);
        at.weight += N * at.tap_step, at.sum += N * at.tap_step, at.d -= N * at.d_step;
        taps -= N;
      };
      if (n == kMost)
        some(Constant<kMost>{});
      else if (n >= 5 && kMost > 5)
        some(Constant<5>{});
      else if (n >= 3)
        some(Constant<3>{});
      else if (n == 2)
        some(Constant<2>{});
      else
        some(Constant<1>{});
    }
  }

  // Row ih of x, a vector of channels: dx, which is 0 before, and its share of dweight.
  void add_row(int64_t ih, int64_t v, float* dx) const {
    const float* x = x_row(ih) + call.left * pitch + v;
    // Taps a period apart meet the same columns, a stride apart.
    int64_t period = 1;
    while (period * call.DW % call.SW != 0) ++period;
    for (int64_t kh = 0; kh < call.KH; ++kh) {
      const int64_t scaled = ih + call.top - kh * call.DH, oh = scaled / call.SH;
      if (scaled < 0 || oh * call.SH != scaled || oh >= call.OH) continue;
      const float* d = d_rows + (oh % size.ring * size.d_columns + d_margin()) * pitch + v;
      for (int64_t kw = 0; kw < period && kw < call.KW; ++kw) {
        const int64_t before = call.left - kw * call.DW;  // of column 0, from the tap
        const int64_t first = (call.SW - before % call.SW) % call.SW;
        if (first >= call.W) continue;
        const int64_t tap = (kh * call.KW + kw) * pitch + v;
        add_taps({d + (before + first) / call.SW * pitch, x + first * pitch, dx + first * pitch,
                  (call.W - first + call.SW - 1) / call.SW, weight + tap, dweight + tap,
                  period * pitch, period * call.DW / call.SW * pitch},
                 (call.KW - kw + period - 1) / period);
      }
    }
  }

  // Rows [begin, end) of x.
  void add_rows(int64_t begin, int64_t end) const {
    for (int64_t v = 0; v < channels; v += V)
      for (int64_t ih = begin; ih < end; ++ih) {
        float* dx = dx_rows + (ih - begin) * call.W * pitch + v;
        for (int64_t iw = 0; iw < call.W; ++iw) store(dx + iw * pitch, Vec{});
        add_row(ih, v, dx);
      }
    if (call.dx == nullptr) return;
    for (int64_t ih = begin; ih < end; ++ih)
      store_row(call.dx, call.H, call.W, ih, dx_rows + (ih - begin) * call.W * pitch);
  }
};
