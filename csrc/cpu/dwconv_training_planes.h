// Training of depthwise convolutions of any kernel, stride, dilation and multiplier, contiguous:
// plane by plane, staged as in dwconv_contiguous.h.
//
// A tap reads the staged plane at a fixed offset from the output's own index, so that the gradient
// of a tap is a dot product of two flat runs, and dx, staged as x is, a sum of flat runs. What lies
// between the rows of the convolution's gradient is zero. Included once per instruction set.

// Lanes from n on set to 0.
template <typename T>
MNET_INLINE Vector<T> first_lanes(Vector<T> v, int n) {
#if defined(MNET_AVX512)
  if constexpr (sizeof(T) == 4)
    return (Vector<T>)_mm512_maskz_mov_ps((__mmask16)((1u << n) - 1), (__m512)v);
  else
    return (Vector<T>)_mm512_maskz_mov_pd((__mmask8)((1u << n) - 1), (__m512d)v);
#else
  for (int i = n; i < kWidth<T>; ++i) v[i] = 0;
  return v;
#endif
}
template <typename T>
MNET_INLINE T sum_of_lanes(Vector<T> v) {
  T sum = 0;
  for (int i = 0; i < kWidth<T>; ++i) sum += v[i];
  return sum;
}

// `to[o] = sum of weights[t] * from[t][o]`, o in whole vectors up to `flat`.
template <typename Acc>
static void flat_sum(const DwconvCall& identity, const Acc* const* from, const Acc* weights,
                     int64_t count, int64_t flat, Acc* to) {
  constexpr int V = kWidth<Acc>;
  constexpr int kBlock = 8;
  for (int64_t o = 0; o < flat; o += kBlock * V) {
    if (flat - o > kBlock / 2 * V)
      flat_block<Acc, kBlock>(identity, from, weights, count, 1, 0, o, to);
    else
      flat_block<Acc, kBlock / 2>(identity, from, weights, count, 1, 0, o, to);
  }
}

struct PlaneScratch {
  Staging staging;
  int64_t taps, lead, d, plane, accumulators, bytes;

  PlaneScratch(const DwconvTrainingCall& call, int64_t accumulator, int64_t element)
      : staging(staging_of(call, kWidth<float>)), taps(call.KH * call.KW) {
    const int64_t reach =
        (call.KH - 1) * call.DH / call.SH * staging.pitch + (call.KW - 1) * call.DW / call.SW;
    lead = (reach + 15) / 16 * 16;
    // Before the gradient as far as taps reach back, behind it as far as dx's run goes.
    d = lead + staging.phase + staging.slack;
    plane = call.H * call.W;
    const int64_t phases = call.SH * call.SW;
    accumulators = 2 * phases * staging.phase + staging.phase + staging.flat + d +
                   call.multiplier * (2 * taps + 5) + taps + call.W + 64;
    bytes = accumulators * accumulator + 2 * taps * static_cast<int64_t>(sizeof(void*)) +
            plane * element + 64;
  }
};

template <typename Elem>
struct TrainingPlane {
  using Acc = Accumulator<Elem>;
  using Vec = Vector<Acc>;
  static constexpr int V = kWidth<Acc>;

  DwconvTrainingCall call;
  const PlaneScratch size;
  const Staging& s;
  DwconvCall identity;
  Acc *staged, *dx_staged, *added, *conv, *d, *weights, *dweight, *sums, *chosen, *line;
  const Acc **taps, **d_taps;
  Elem* plane;
  int64_t n = 0, k = 0;

  TrainingPlane(const DwconvTrainingCall& c, void* scratch)
      : call(as_one_block(c)),
        size(call, sizeof(Acc), sizeof(Elem)),
        s(size.staging),
        identity(call) {
    identity.activation = Activation::identity;
    taps = static_cast<const Acc**>(scratch);
    d_taps = taps + size.taps;
    auto* next = reinterpret_cast<Acc*>(d_taps + size.taps);
    for (int64_t i = 0; i < size.accumulators; ++i) next[i] = 0;
    auto take = [&](int64_t count) {
      Acc* at = next;
      next += count;
      return at;
    };
    const int64_t phases = call.SH * call.SW;
    staged = take(phases * s.phase);
    dx_staged = take(phases * s.phase);
    added = take(s.phase);
    conv = take(s.flat);
    d = take(size.d) + size.lead;
    weights = take(call.multiplier * size.taps);
    dweight = take(call.multiplier * size.taps);
    sums = take(5 * call.multiplier);
    chosen = take(size.taps);
    line = take(call.W + 64);
    plane = reinterpret_cast<Elem*>(next);
    for (int64_t t = 0; t < size.taps; ++t) taps[t] = staged + phase_of(t) * s.phase + offset_of(t);
  }

  static DwconvTrainingCall as_one_block(DwconvTrainingCall call) {
    call.rows_per_task = call.OH, call.row_tasks = 1;
    return call;
  }
  int64_t phase_of(int64_t tap) const {
    return tap / call.KW * call.DH % call.SH * call.SW + tap % call.KW * call.DW % call.SW;
  }
  int64_t offset_of(int64_t tap) const {
    return tap / call.KW * call.DH / call.SH * s.pitch + tap % call.KW * call.DW / call.SW;
  }

  const Elem* plane_of(const void* tensor, int64_t channels, int64_t channel,
                       int64_t pixels) const {
    return static_cast<const Elem*>(tensor) + (n * channels + channel) * pixels;
  }

  // x's plane, without what no output reads: an Inf there must not meet the zeros between rows.
  const Elem* read_plane(int64_t c) {
    const Elem* from = plane_of(call.x, call.C, c, call.H * call.W);
    const int64_t rows = (call.OH - 1) * call.SH + (call.KH - 1) * call.DH + 1 - call.top;
    const int64_t columns = (call.OW - 1) * call.SW + (call.KW - 1) * call.DW + 1 - call.left;
    if (rows >= call.H && columns >= call.W) return from;
    for (int64_t i = 0; i < call.H * call.W; ++i)
      plane[i] = i / call.W < rows && i % call.W < columns ? from[i] : Elem{};
    return plane;
  }

  void convolve(int64_t m) {
    const int64_t flat = (call.OH - 1) * s.pitch + call.OW;
    flat_sum(identity, taps, weights + m * size.taps, size.taps, flat, conv);
  }

  // The convolution to where it is kept, or from there.
  void keep() {
    const int64_t pixels = call.OH * call.OW;
    Elem* to = static_cast<Elem*>(call.z) + (n * call.K + k) * pixels;
    each_vector([&](int64_t o, int64_t i, int n) { store_lanes(to + i, load(conv + o), n); });
  }
  void read_kept() {
    const Elem* from = plane_of(call.z, call.K, k, call.OH * call.OW);
    each_vector(
        [&](int64_t o, int64_t i, int n) { store_lanes(conv + o, load_lanes(from + i, n), n); });
  }

  // body(o, i, lanes) for all vectors of all output rows: o counts in the flat run, i in the plane.
  template <typename Body>
  inline __attribute__((always_inline)) void each_vector(const Body& body) const {
    for (int64_t oh = 0; oh < call.OH; ++oh)
      for (int64_t ow = 0; ow < call.OW; ow += V)
        body(oh * s.pitch + ow, oh * call.OW + ow,
             static_cast<int>(call.OW - ow < V ? call.OW - ow : V));
  }

  // A block of channel c: `opens` before the first plane of each output channel.
  enum class Needs { convolution_computed, convolution, convolution_and_x };
  template <typename Body>
  void each_plane(int64_t block, int64_t c, Needs needs, const Body& body) {
    const bool reads = call.z != nullptr && needs != Needs::convolution_computed;
    for (int64_t m = 0; m < call.multiplier; ++m)
      for (int64_t t = 0; t < size.taps; ++t)
        weights[m * size.taps + t] =
            static_cast<const Acc*>(call.weight)[t * call.K + c * call.multiplier + m];
    const int64_t begin = block * call.images;
    for (n = begin; n < begin + call.images && n < call.N; ++n) {
      if (!reads || needs == Needs::convolution_and_x)
        stage(call, s, read_plane(c), 0, call.OH, staged);
      for (int64_t m = 0; m < call.multiplier; ++m) {
        k = c * call.multiplier + m;
        reads ? read_kept() : convolve(m);
        body(m, n == begin);
      }
    }
  }

  void put(int64_t block, int64_t c, int64_t values, Acc* from) const {
    for (int64_t m = 0; m < call.multiplier; ++m)
      for (int64_t value = 0; value < values; ++value) {
        Acc& sum = from[m * values + value];
        static_cast<Acc*>(
            call.partials)[(block * values + value) * call.K + c * call.multiplier + m] = sum;
        sum = 0;
      }
  }

  // Lanes to a sum in two numbers.
  static void add(Acc* to, Vec lanes) {
    Sum<Acc> sum{to[0], to[1]};
    sum.add(sum_of_lanes<Acc>(lanes));
    to[0] = sum.value, to[1] = sum.lost;
  }

  void statistics(int64_t block, int64_t c) {
    each_plane(block, c, Needs::convolution_computed, [&](int64_t m, bool opens) {
      if (call.z != nullptr) keep();
      Acc* mine = sums + 5 * m;
      if (opens) {
        Vec total = {};
        each_vector([&](int64_t o, int64_t, int lanes) {
          total += first_lanes<Acc>(load(conv + o), lanes);
        });
        mine[0] = sum_of_lanes<Acc>(total) / static_cast<Acc>(call.OH * call.OW);
      }
      Vec first = {}, second = {};
      each_vector([&](int64_t o, int64_t, int lanes) {
        const Vec away = first_lanes<Acc>(load(conv + o) - mine[0], lanes);
        first += away;
        second += away * away;
      });
      add(mine + 1, first);
      add(mine + 3, second);
    });
    put(block, c, 5, sums);
  }

  // body(o, lanes, dz, convolution less the mean) of output channel k.
  template <typename Body>
  void each_gradient(const Body& body) {
    const Elem* dy = plane_of(call.dy, call.K, k, call.OH * call.OW);
    auto value = [&](const void* of) { return static_cast<const Acc*>(of)[k]; };
    const Acc mean = value(call.mean), scale = value(call.scale), shift = value(call.shift);
    const Bounds bounds = bounds_of(call.activation);
    each_vector([&](int64_t o, int64_t i, int lanes) {
      const Vec centred = load(conv + o) - mean, z = centred * scale + shift;
      Vec dz = load_lanes(dy + i, lanes);
      if (bounds.exact)
        dz = activate_backward<Acc>(bounds, z, dz);
      else
        activate_backward_tile<Acc>(call, &z, &dz, 1);
      body(o, lanes, dz, centred);
    });
  }

  void gradient_sums(int64_t block, int64_t c) {
    each_plane(block, c, Needs::convolution, [&](int64_t m, bool) {
      Vec first = {}, second = {};
      each_gradient([&](int64_t, int lanes, Vec dz, Vec centred) {
        dz = first_lanes<Acc>(dz, lanes);
        first += dz * first_lanes<Acc>(centred, lanes);
        second += dz;
      });
      add(sums + 4 * m, first);
      add(sums + 4 * m + 2, second);
    });
    put(block, c, 4, sums);
  }

  void gradients(int64_t block, int64_t c) {
    each_plane(block, c, Needs::convolution_and_x, [&](int64_t m, bool) {
      const Acc scale = static_cast<const Acc*>(call.scale)[k];
      const Acc linear = static_cast<const Acc*>(call.linear)[k];
      const Acc constant = static_cast<const Acc*>(call.constant)[k];
      each_gradient([&](int64_t o, int lanes, Vec dz, Vec centred) {
        const Vec gradient = dz * scale + (centred * linear + constant);
        store_lanes(d + o, gradient, lanes);
      });
      for (int64_t t = 0; t < size.taps; ++t) dweight[m * size.taps + t] += dot(d, taps[t]);
      if (call.dx == nullptr) return;
      for (int64_t phase = 0; phase < call.SH * call.SW; ++phase) add_phase(phase, m);
      if (m + 1 == call.multiplier) unstage(c);
    });
    put(block, c, size.taps, dweight);
  }

  Acc dot(const Acc* a, const Acc* b) const {
    const int64_t flat = (call.OH - 1) * s.pitch + call.OW;
    Vec sum[4] = {};
    for (int64_t o = 0; o < flat; o += 4 * V)  // the gradient is 0 past the end
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum[i] += load(a + o + i * V) * load(b + o + i * V);
    return sum_of_lanes<Acc>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }

  // dx of the columns and rows of one phase; the first output channel of an input channel sets it.
  void add_phase(int64_t phase, int64_t m) {
    int64_t count = 0;
    for (int64_t t = 0; t < size.taps; ++t)
      if (phase_of(t) == phase) {
        d_taps[count] = d - offset_of(t);
        chosen[count++] = weights[m * size.taps + t];
      }
    Acc* to = dx_staged + phase * s.phase;
    const int64_t flat = s.phase_rows * s.pitch;
    if (count == 0) return;  // stays 0
    flat_sum(identity, d_taps, chosen, count, flat, m == 0 ? to : added);
    for (int64_t o = 0; m > 0 && o < flat; o += V) store(to + o, load(to + o) + load(added + o));
  }

  void unstage(int64_t c) {
    auto* image = static_cast<Elem*>(call.dx) + (n * call.C + c) * call.H * call.W;
    for (int64_t ih = 0; ih < call.H; ++ih) {
      const int64_t a = (ih + call.top) % call.SH, y = (ih + call.top) / call.SH;
      for (int64_t b = 0; b < call.SW; ++b) {  // the columns iw = x * SW + b - left
        const Acc* from = dx_staged + (a * call.SW + b) * s.phase + y * s.pitch;
        int64_t x = call.left > b ? ceil_div(call.left - b, call.SW) : 0;
        for (int64_t iw = x * call.SW + b - call.left; iw < call.W; iw += call.SW, ++x)
          line[iw] = y < s.phase_rows && x < s.pitch ? from[x] : 0;
      }
      Elem* to = image + ih * call.W;
      int64_t iw = 0;
      for (; iw + V <= call.W; iw += V) store(to + iw, load(line + iw));
      if (iw < call.W) store_first(to + iw, load(line + iw), static_cast<int>(call.W - iw));
    }
  }
};
