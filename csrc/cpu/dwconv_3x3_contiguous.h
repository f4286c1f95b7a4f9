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
MNET_INLINE void load_even_and_odd(const Elem* p, u32 lanes, Vector<float>& even,
                                   Vector<float>& odd) {
  const Vector<float> low = load_lanes(p, lanes & 0xffff), high = load_lanes(p + 16, lanes >> 16);
  even = even_lanes<float>(low, high);
  odd = odd_lanes(low, high);
}
MNET_INLINE void load_even_and_odd(const bf16* p, u32 lanes, Vector<float>& even,
                                   Vector<float>& odd) {
  const auto pairs = bit_cast<VectorU32>(_mm512_maskz_loadu_epi16((__mmask32)lanes, p));
  even = bit_cast<Vector<float>>(pairs << 16);
  odd = bit_cast<Vector<float>>(pairs & 0xffff0000u);
}

// Vectors of 16 lanes, or of 8 for narrow images.
typedef float HalfVector __attribute__((vector_size(MNET_VECTOR_BYTES / 2)));
template <int Lanes>
struct LanesOf {
  using type = Vector<float>;
};
template <>
struct LanesOf<8> {
  using type = HalfVector;
};
MNET_INLINE void narrow(Vector<float> v, Vector<float>& to) { to = v; }
MNET_INLINE void narrow(Vector<float> v, HalfVector& to) {
  to = (HalfVector)_mm512_castps512_ps256((__m512)v);
}
MNET_INLINE Vector<float> whole(Vector<float> v) { return v; }
MNET_INLINE Vector<float> whole(HalfVector v) {
  return (Vector<float>)_mm512_zextps256_ps512((__m256)v);
}
MNET_INLINE void load_lanes(const float* p, u32 lanes, HalfVector& to) {
  to = (HalfVector)_mm256_maskz_loadu_ps((__mmask8)lanes, p);
}
MNET_INLINE void load_lanes(const bf16* p, u32 lanes, HalfVector& to) {
  const __m128i bits = _mm_maskz_loadu_epi16((__mmask8)lanes, p);
  to = (HalfVector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}
MNET_INLINE void load_lanes(const f16* p, u32 lanes, HalfVector& to) {
  to = (HalfVector)_mm256_cvtph_ps(_mm_maskz_loadu_epi16((__mmask8)lanes, p));
}
template <typename Elem>
MNET_INLINE void load_lanes(const Elem* p, u32 lanes, Vector<float>& to) {
  to = load_lanes(p, lanes);
}

// What the three taps of a row see of it, for `Lanes` output columns: from `p` on.
template <int S, int Lanes>
struct TapLanes;

template <int Lanes>
struct TapLanes<1, Lanes> {
  u32 lanes[3];
  TapLanes() = default;
  inline __attribute__((always_inline)) TapLanes(int64_t first, int64_t width)
      : lanes{lanes_inside(first, width), lanes_inside(first + 1, width),
              lanes_inside(first + 2, width)} {}
  template <typename Elem, typename V>
  inline __attribute__((always_inline)) void read(const Elem* p, V* taps) const {
#pragma GCC unroll 3
    for (int kw = 0; kw < 3; ++kw) load_lanes(p + kw, lanes[kw], taps[kw]);
  }
};

template <int Lanes>
struct TapLanes<2, Lanes> {
  u32 lanes, last;
  TapLanes() = default;
  inline __attribute__((always_inline)) TapLanes(int64_t first, int64_t width)
      : lanes(lanes_inside(first, width)), last(lanes_inside(first + 2 * Lanes, width) & 1) {}
  template <typename Elem, typename V>
  inline __attribute__((always_inline)) void read(const Elem* p, V* taps) const {
    Vector<float> even, odd;
    const Vector<float> next = load_lanes(p + 2 * Lanes, last);
    if constexpr (Lanes == 16) {
      load_even_and_odd(p, lanes, even, odd);
    } else {
      const Vector<float> low = load_lanes(p, lanes & 0xffff);
      even = even_lanes<float>(low, next), odd = odd_lanes(low, low);
    }
    narrow(even, taps[0]);
    narrow(odd, taps[1]);
    const __m512i after = Lanes == 16 ? (__m512i)next : (__m512i)even;
    narrow((Vector<float>)_mm512_maskz_alignr_epi32(0xffff, after, (__m512i)even, 1), taps[2]);
  }
};

// The first vectors' lanes of every row, found once; wider images find the others each time.
template <int S, int Lanes>
struct RowLanes {
  static constexpr int64_t kKept = 32;
  TapLanes<S, Lanes> kept[kKept];
  int64_t width, left;

  explicit RowLanes(const DwconvCall& call) : width(call.W), left(call.left) {
    for (int64_t i = 0; i < kKept && i * Lanes < call.OW; ++i) kept[i] = find(i);
  }
  inline __attribute__((always_inline)) TapLanes<S, Lanes> find(int64_t i) const {
    return TapLanes<S, Lanes>(i * Lanes * S - left, width);
  }
  inline __attribute__((always_inline)) TapLanes<S, Lanes> at(int64_t i) const {
    return i < kKept ? kept[i] : find(i);
  }
};

struct PlaneConstants {
  Vector<float> weight[9], scale, shift;
};

// Output rows [oh, oh + R) of a plane.
template <typename Elem, int S, int Lanes, int R>
static void dw3_contiguous_rows(const DwconvCall& call, const RowLanes<S, Lanes>& row_lanes,
                                const PlaneConstants& constants, const Elem* plane, Elem* y,
                                int64_t oh) {
  constexpr int kRows = (R - 1) * S + 3;
  const int64_t OW = call.OW, W = call.W, ih = oh * S - call.top;
  // Rows of the image among those that are read.
  const int row_begin = ih < 0 ? static_cast<int>(ih > -kRows ? -ih : kRows) : 0;
  const int row_end = call.H - ih < kRows ? static_cast<int>(call.H - ih) : kRows;
  using Taps = typename LanesOf<Lanes>::type;
  Taps weight[9];
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) narrow(constants.weight[t], weight[t]);
  const Vector<float> scale = constants.scale, shift = constants.shift;
  const Clamp<float> clamp = clamp_of<float>(call.activation);
  const Elem* from = plane + ih * W - call.left;
  Elem* to = y + oh * OW;
  for (int64_t ow = 0; ow < OW; ow += Lanes, from += Lanes * S, to += Lanes) {
    const TapLanes<S, Lanes> lanes = row_lanes.at(ow / Lanes);
    Taps sum[R] = {};
    const Elem* row = from;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i, row += W) {
      if (i < row_begin || i >= row_end) continue;
      Taps taps[3];
      lanes.read(row, taps);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int kw = 0; kw < 3; ++kw)
          if (i - r * S >= 0 && i - r * S < 3) sum[r] += taps[kw] * weight[(i - r * S) * 3 + kw];
    }
    Vector<float> z[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      z[r] = whole(sum[r]) * scale + shift;
      if (clamp.exact) z[r] = at_most<float>(at_least<float>(z[r], clamp.low), clamp.high);
    }
    if (!clamp.exact) activate_registers<float, R>(call, z);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      if (ow + Lanes <= OW && Lanes == kWidth<float>)
        store(to + r * OW, z[r]);
      else
        store_first(to + r * OW, z[r], static_cast<int>(OW - ow < Lanes ? OW - ow : Lanes));
  }
}

template <typename Elem, int S, int Lanes>
static void dw3_contiguous_planes(const DwconvCall& call, int64_t begin, int64_t end) {
  // As many rows as registers hold; with stride 2 more would not save much.
  constexpr int kRows = S == 1 ? 7 : 3;
  const RowLanes<S, Lanes> lanes(call);
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
      dw3_contiguous_rows<Elem, S, Lanes, R>(call, lanes, constants, x, y, oh);
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
  const bool narrow = call.OW <= 8;
  if (call.SH == 1)
    return narrow ? dw3_contiguous_planes<Elem, 1, 8>(call, begin, end)
                  : dw3_contiguous_planes<Elem, 1, 16>(call, begin, end);
  return narrow ? dw3_contiguous_planes<Elem, 2, 8>(call, begin, end)
                : dw3_contiguous_planes<Elem, 2, 16>(call, begin, end);
}

#else

MNET_INLINE bool dw3_contiguous_serves(const DwconvCall&) { return false; }
template <typename Elem>
static void dw3_contiguous(const DwconvCall&, int64_t, int64_t) {}

#endif
