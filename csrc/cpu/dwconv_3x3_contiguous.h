// Depthwise 3x3, stride 1 or 2, contiguous (N, C, H, W): vectors run along a row, straight from the
// input to the output. R output rows at once share the input rows that they have in common.
//
// Where a vector reaches over the left or right edge, a mask loads zeros, so that padding is never
// written anywhere and no border needs code of its own: it takes loads with a mask for each lane,
// of AVX-512. Others stage planes (see dwconv_contiguous.h). Included once per instruction set.

#if defined(MNET_AVX512)

MNET_INLINE bool dw3_contiguous_serves(const DwconvCall& call) {
  return call.KH == 3 && call.KW == 3 && call.SH == call.SW && call.SH <= 2 && call.DH == 1 &&
         call.DW == 1;
}

// Lanes l with 0 <= first + l < width.
MNET_INLINE u32 lanes_inside(int64_t first, int64_t width) {
  const int64_t begin = first < 0 ? -first : 0, end = width - first;
  if (begin > 31 || end <= begin) return 0;
  const u32 from = ~u32{0} << begin;
  return end > 31 ? from : from & ~(~u32{0} << end);
}

MNET_INLINE Vector<float> load_lanes(const float* p, u32 lanes) {
  return (Vector<float>)_mm512_maskz_loadu_ps((__mmask16)lanes, p);
}
template <typename Elem>
MNET_INLINE Vector<float> load_lanes(const Elem* p, u32 lanes) {
  const VectorU16 bits = (VectorU16)_mm256_maskz_loadu_epi16((__mmask16)lanes, p);
  return load((const Elem*)&bits);
}

MNET_INLINE Vector<float> odd_lanes(Vector<float> low, Vector<float> high) {
  const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return (Vector<float>)_mm512_permutex2var_ps((__m512)low, odd, (__m512)high);
}

// 32 elements, apart by their parity.
template <typename Elem>
MNET_INLINE void load_even_and_odd(const Elem* p, u32 lanes, Vector<float>* to) {
  const Vector<float> low = load_lanes(p, lanes & 0xffff), high = load_lanes(p + 16, lanes >> 16);
  to[0] = even_lanes<float>(low, high);
  to[1] = odd_lanes(low, high);
}
MNET_INLINE void load_even_and_odd(const bf16* p, u32 lanes, Vector<float>* to) {
  const auto pairs = bit_cast<VectorU32>(_mm512_maskz_loadu_epi16((__mmask32)lanes, p));
  to[0] = bit_cast<Vector<float>>(pairs << 16);
  to[1] = bit_cast<Vector<float>>(pairs & 0xffff0000u);
}

// What the three taps of a row see of it, for 16 output columns: from `p` on.
template <int S>
struct TapLanes;

template <>
struct TapLanes<1> {
  TapLanes() = default;
  u32 lanes[3];
  inline __attribute__((always_inline)) TapLanes(int64_t first, int64_t width)
      : lanes{lanes_inside(first, width), lanes_inside(first + 1, width),
              lanes_inside(first + 2, width)} {}
  template <typename Elem>
  inline __attribute__((always_inline)) void read(const Elem* p, Vector<float>* taps) const {
#pragma GCC unroll 3
    for (int kw = 0; kw < 3; ++kw) taps[kw] = load_lanes(p + kw, lanes[kw]);
  }
};

template <>
struct TapLanes<2> {
  TapLanes() = default;
  u32 lanes, last;
  inline __attribute__((always_inline)) TapLanes(int64_t first, int64_t width)
      : lanes(lanes_inside(first, width)), last(lanes_inside(first + 32, width) & 1) {}
  template <typename Elem>
  inline __attribute__((always_inline)) void read(const Elem* p, Vector<float>* taps) const {
    load_even_and_odd(p, lanes, taps);
    const Vector<float> next = load_lanes(p + 32, last);
    taps[2] = (Vector<float>)_mm512_maskz_alignr_epi32(0xffff, (__m512i)next, (__m512i)taps[0], 1);
  }
};

// The first vectors' lanes of every row, found once; wider images find the others each time.
template <int S>
struct RowLanes {
  static constexpr int64_t kKept = 32;
  TapLanes<S> kept[kKept];
  int64_t width, left;

  explicit RowLanes(const DwconvCall& call) : width(call.W), left(call.left) {
    for (int64_t i = 0; i < kKept && i * kWidth<float> < call.OW; ++i) kept[i] = find(i);
  }
  inline __attribute__((always_inline)) TapLanes<S> find(int64_t i) const {
    return TapLanes<S>(i * kWidth<float> * S - left, width);
  }
  inline __attribute__((always_inline)) TapLanes<S> at(int64_t i) const {
    return i < kKept ? kept[i] : find(i);
  }
};

struct PlaneConstants {
  Vector<float> weight[9], scale, shift;
};

// Output rows [oh, oh + R) of a plane.
template <typename Elem, int S, int R, bool Clamped>
static void dw3_contiguous_rows(const DwconvCall& call, const RowLanes<S>& row_lanes,
                                const PlaneConstants& constants, const Elem* plane, Elem* y,
                                int64_t oh) {
  constexpr int V = kWidth<float>, kRows = (R - 1) * S + 3;
  const int64_t OW = call.OW, W = call.W, ih = oh * S - call.top;
  // Rows of the image among those that are read.
  const int row_begin = ih < 0 ? static_cast<int>(ih > -kRows ? -ih : kRows) : 0;
  const int row_end = call.H - ih < kRows ? static_cast<int>(call.H - ih) : kRows;
  const PlaneConstants c = constants;
  const Clamp<float> clamp = clamp_of<float>(call.activation);
  const Elem* from = plane + ih * W - call.left;
  Elem* to = y + oh * OW;
  for (int64_t ow = 0; ow < OW; ow += V, from += V * S, to += V) {
    const TapLanes<S> lanes = row_lanes.at(ow / V);
    Vector<float> sum[R] = {};
    const Elem* row = from;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i, row += W) {
      if (i < row_begin || i >= row_end) continue;
      Vector<float> taps[3];
      lanes.read(row, taps);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int kw = 0; kw < 3; ++kw)
          if (i - r * S >= 0 && i - r * S < 3) sum[r] += taps[kw] * c.weight[(i - r * S) * 3 + kw];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vector<float> z = sum[r] * c.scale + c.shift;
      if (Clamped) z = at_most<float>(at_least<float>(z, clamp.low), clamp.high);
      if (!Clamped) z = activate<float>(call.activation, static_cast<float>(call.slope), z);
      if (ow + V <= OW)
        store(to + r * OW, z);
      else
        store_first(to + r * OW, z, static_cast<int>(OW - ow));
    }
  }
}

template <typename Elem, int S, bool Clamped>
static void dw3_contiguous_planes(const DwconvCall& call, int64_t begin, int64_t end) {
  // As many rows as registers hold; with stride 2 more would not save much.
  constexpr int kRows = S == 1 ? 7 : 3;
  const RowLanes<S> lanes(call);
  // Counted along: a plane of 7x7 takes hardly longer than the divisions would.
  int64_t part = begin % call.row_tasks, plane = begin / call.row_tasks, k = plane % call.K;
  int64_t in_plane = plane / call.multiplier, copy = plane % call.multiplier;
  for (int64_t task = begin; task < end; ++task) {
    int64_t oh = part * call.rows_per_task;
    const int64_t oh_end = oh + call.rows_per_task < call.OH ? oh + call.rows_per_task : call.OH;
    const auto* x = static_cast<const Elem*>(call.x) + in_plane * call.H * call.W;
    auto* y = static_cast<Elem*>(call.y) + plane * call.OH * call.OW;
    const auto* w = static_cast<const Elem*>(call.weight) + k * call.weight_channel;
    PlaneConstants constants;
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t)
      constants.weight[t] = broadcast<float>(
          load_first(w + t / 3 * call.weight_row + t % 3 * call.weight_column, 1)[0]);
    constants.scale = broadcast<float>(static_cast<const float*>(call.scale)[k]);
    constants.shift = broadcast<float>(static_cast<const float*>(call.shift)[k]);
    auto rows = [&](auto count) __attribute__((always_inline)) {
      constexpr int R = decltype(count)::value;
      dw3_contiguous_rows<Elem, S, R, Clamped>(call, lanes, constants, x, y, oh);
      oh += R;
    };
    while (oh < oh_end) {
      const int64_t left = oh_end - oh;
      if (kRows == 7 && left >= 7 && left != 8)
        rows(Constant<kRows>{});
      else if (kRows == 7 && left >= 4 && left != 5)
        rows(Constant<4>{});
      else if (left == 1)  // has nothing to share, so that four rows are two and two
        rows(Constant<1>{});
      else if (left == 2 || left == 4)
        rows(Constant<2>{});
      else
        rows(Constant<3>{});
    }
    if (++part < call.row_tasks) continue;
    part = 0, ++plane;
    if (++k == call.K) k = 0;
    if (++copy == call.multiplier) copy = 0, ++in_plane;
  }
}

template <typename Elem>
static void dw3_contiguous(const DwconvCall& call, int64_t begin, int64_t end) {
  const bool clamped = clamp_of<float>(call.activation).exact;
  if (call.SH == 1)
    return clamped ? dw3_contiguous_planes<Elem, 1, true>(call, begin, end)
                   : dw3_contiguous_planes<Elem, 1, false>(call, begin, end);
  return clamped ? dw3_contiguous_planes<Elem, 2, true>(call, begin, end)
                 : dw3_contiguous_planes<Elem, 2, false>(call, begin, end);
}

#else

MNET_INLINE bool dw3_contiguous_serves(const DwconvCall&) { return false; }
template <typename Elem>
static void dw3_contiguous(const DwconvCall&, int64_t, int64_t) {}

#endif
