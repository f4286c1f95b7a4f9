// Depthwise convolution, contiguous (N, C, H, W): vectors run over a plane. 3x3 has a file of its
// own where there is AVX-512.
//
// A block of a plane is first staged in scratch as accumulator values, zero-padded, and split by
// stride into SH x SW phases, so that a tap is a plain shifted run whatever the stride, dilation
// or padding. Rows of all phases share one pitch; output pixel (y, x) sits at y * pitch + x, and a
// tap reads at that same index plus its offset: one flat loop without borders, in which planes
// narrower than a vector cost little more than wide ones. The pitch - OW columns between two rows
// are computed and thrown away. Included once per instruction set (see instruction_set.inc).

struct Staging {
  int64_t pitch;       // elements a row
  int64_t phase_rows;  // rows a phase
  int64_t phase;       // elements a phase, slack included
  int64_t flat;        // elements of the output run, whole vectors
  int64_t slack;       // elements that whole-vector loads may read past the end
};

static Staging staging_of(const DwconvCall& call, int64_t width) {
  Staging s;
  s.slack = 8 * width;
  s.pitch = call.OW + (call.KW - 1) * call.DW / call.SW;
  s.phase_rows = call.rows_per_task + (call.KH - 1) * call.DH / call.SH;
  s.phase = (s.phase_rows * s.pitch + s.slack + 15) / 16 * 16;
  s.flat = ((call.rows_per_task - 1) * s.pitch + call.OW + s.slack + 15) / 16 * 16;
  return s;
}

MNET_INLINE int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

// Every S-th element from `from`, n of them, converted.
template <typename Elem>
MNET_INLINE void copy_strided(Accumulator<Elem>* to, const Elem* from, int64_t stride, int64_t n) {
  using Acc = Accumulator<Elem>;
  constexpr int V = kWidth<Acc>;
  int64_t i = 0;
  if (stride == 1) {
    for (; i + V <= n; i += V) store(to + i, load(from + i));
    if (i < n)
      store_first(to + i, load_first(from + i, static_cast<int>(n - i)), static_cast<int>(n - i));
    return;
  }
  if (stride == 2) {
    for (; i + V < n; i += V)  // one short of the end: the second load reaches 2V elements
      store(to + i, even_lanes<Acc>(load(from + 2 * i), load(from + 2 * i + V)));
    const int rest = static_cast<int>(n - i), reach = 2 * rest - 1;
    const Vector<Acc> low = load_first(from + 2 * i, reach < V ? reach : V);
    const Vector<Acc> high = reach > V ? load_first(from + 2 * i + V, reach - V) : Vector<Acc>{};
    return store_first(to + i, even_lanes<Acc>(low, high), rest);
  }
  for (; i < n; ++i) to[i] = load_first(from + i * stride, 1)[0];
}

// Stages output rows [oh, oh + rows) of a plane: every input element that they reach. Padding is
// left as it is: zero from the start, or cleared by the caller.
template <typename Elem>
static void stage(const DwconvCall& call, const Staging& s, const Elem* plane, int64_t oh,
                  int64_t rows, Accumulator<Elem>* scratch) {
  for (int64_t a = 0; a < call.SH && a < (call.KH - 1) * call.DH + 1; ++a)
    for (int64_t b = 0; b < call.SW && b < (call.KW - 1) * call.DW + 1; ++b) {
      Accumulator<Elem>* phase = scratch + (a * call.SW + b) * s.phase;
      // Columns x of the phase hold input column x * SW + b - left.
      const int64_t x_begin = call.left > b ? ceil_div(call.left - b, call.SW) : 0;
      int64_t x_end = ceil_div(call.W + call.left - b, call.SW);
      if (x_end > s.pitch) x_end = s.pitch;
      const int64_t phase_rows = rows + ((call.KH - 1) * call.DH - a + call.SH) / call.SH - 1;
      for (int64_t y = 0; y < phase_rows; ++y) {
        const int64_t ih = (oh + y) * call.SH + a - call.top;
        if (ih < 0 || ih >= call.H || x_begin >= x_end) continue;
        copy_strided(phase + y * s.pitch + x_begin,
                     plane + ih * call.W + x_begin * call.SW + b - call.left, call.SW,
                     x_end - x_begin);
      }
    }
}

// sum over taps of weight * run, over B vectors from `o` on.
template <typename Acc, int B>
MNET_INLINE void flat_block(const DwconvCall& call, const Acc* const* taps, const Acc* weights,
                            int64_t tap_count, Acc scale, Acc shift, int64_t o, Acc* out) {
  constexpr int V = kWidth<Acc>;
  Vector<Acc> sum[B] = {};
  for (int64_t t = 0; t < tap_count; ++t) {
    const Vector<Acc> w = broadcast<Acc>(weights[t]);
    const Acc* from = taps[t] + o;
#pragma GCC unroll 16
    for (int b = 0; b < B; ++b) sum[b] += load(from + b * V) * w;
  }
#pragma GCC unroll 16
  for (int b = 0; b < B; ++b) sum[b] = sum[b] * scale + shift;
  activate_registers<Acc, B>(call, sum);
#pragma GCC unroll 16
  for (int b = 0; b < B; ++b) store(out + o + b * V, sum[b]);
}

// K x K taps of stride 1 and R rows at once: a loaded vector serves up to K output rows.
template <typename Acc, int K, int R>
MNET_INLINE void row_block(const DwconvCall& call, const Acc* staged, int64_t pitch,
                           const Acc* weights, Acc scale, Acc shift, int64_t columns, Acc* out) {
  constexpr int V = kWidth<Acc>;
  for (int64_t next = 0; next < columns; next += V) {
    // The last vector ends with the row: past it lies the next row's result.
    const int64_t o = next + V <= columns ? next : columns - V;
    Vector<Acc> sum[R] = {};
#pragma GCC unroll 16
    for (int i = 0; i < R + K - 1; ++i)
#pragma GCC unroll 16
      for (int kw = 0; kw < K; ++kw) {
        const Vector<Acc> in = load(staged + i * pitch + o + kw);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
          if (i - r >= 0 && i - r < K) sum[r] += in * weights[(i - r) * K + kw];
      }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r] = sum[r] * scale + shift;
    activate_registers<Acc, R>(call, sum);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) store(out + r * pitch + o, sum[r]);
  }
}

template <typename Elem>
static void dw_contiguous(const DwconvCall& call, int64_t begin, int64_t end,
                          void* scratch_memory) {
  if constexpr (sizeof(Elem) <= 4)
    if (dw3_contiguous_serves(call)) return dw3_contiguous<Elem>(call, begin, end);
  using Acc = Accumulator<Elem>;
  constexpr int V = kWidth<Acc>;
  constexpr int kBlock = 8;
  const Staging s = staging_of(call, kWidth<float>);
  const int64_t tap_count = call.KH * call.KW;
  auto* scratch = static_cast<Acc*>(scratch_memory);
  Acc* out = scratch + call.SH * call.SW * s.phase;
  Acc* weights = out + s.flat;
  auto** taps = reinterpret_cast<const Acc**>(weights + tap_count + tap_count % 2);  // aligned
  const int64_t staged = call.SH * call.SW * s.phase;
  for (int64_t t = 0; t < tap_count; ++t) {
    const int64_t h = t / call.KW * call.DH, w = t % call.KW * call.DW;
    taps[t] = scratch + (h % call.SH * call.SW + w % call.SW) * s.phase + h / call.SH * s.pitch +
              w / call.SW;
  }
  for (int64_t i = 0; i < staged; ++i) scratch[i] = 0;
  const bool rows_share = call.KH == 3 && call.KW == 3 && call.SH == 1 && call.SW == 1 &&
                          call.DH == 1 && call.DW == 1 && call.OW >= 2 * V;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t oh = task % call.row_tasks * call.rows_per_task, plane = task / call.row_tasks;
    const int64_t rows = oh + call.rows_per_task < call.OH ? call.rows_per_task : call.OH - oh;
    const int64_t n = plane / call.K, k = plane % call.K;
    // A plane in one piece has its padding always in the same place; a block of one has not.
    if (call.row_tasks > 1)
      for (int64_t i = 0; i < staged; ++i) scratch[i] = 0;
    stage(call, s,
          static_cast<const Elem*>(call.x) + (n * call.C + k / call.multiplier) * call.H * call.W,
          oh, rows, scratch);
    for (int64_t t = 0; t < tap_count; ++t)
      weights[t] = static_cast<const Acc*>(call.weight)[t * call.K + k];
    const Acc scale = static_cast<const Acc*>(call.scale)[k];
    const Acc shift = static_cast<const Acc*>(call.shift)[k];

    int64_t r = 0;
    if (rows_share)
      for (; r + 4 <= rows; r += 4)
        row_block<Acc, 3, 4>(call, scratch + r * s.pitch, s.pitch, weights, scale, shift, call.OW,
                             out + r * s.pitch);
    int64_t o = r * s.pitch;
    const int64_t flat = (rows - 1) * s.pitch + call.OW;
    for (; o < flat; o += kBlock * V) {
      if (flat - o > kBlock / 2 * V)
        flat_block<Acc, kBlock>(call, taps, weights, tap_count, scale, shift, o, out);
      else
        flat_block<Acc, kBlock / 2>(call, taps, weights, tap_count, scale, shift, o, out);
    }
    auto* y = static_cast<Elem*>(call.y) + (plane * call.OH + oh) * call.OW;
    for (int64_t row = 0; row < rows; ++row) {
      const Acc* from = out + row * s.pitch;
      Elem* to = y + row * call.OW;
      int64_t i = 0;
      for (; i + V <= call.OW; i += V) store(to + i, load(from + i));
      if (i < call.OW) store_first(to + i, load(from + i), static_cast<int>(call.OW - i));
    }
  }
}

// Elements of scratch, of the accumulator's type, that a thread needs.
static int64_t dw_contiguous_scratch(const DwconvCall& call) {
  const Staging s = staging_of(call, kWidth<float>);
  const int64_t taps = call.KH * call.KW;
  return call.SH * call.SW * s.phase + s.flat + taps + 1 + 2 * taps;  // a pointer is two floats
}
