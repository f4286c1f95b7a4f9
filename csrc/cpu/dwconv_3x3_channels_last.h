// Depthwise 3x3, stride 1 or 2, channels_last: where MobileNets spend their depthwise time.
//
// One block of channels walks along R output rows at once. Every input pixel of the (R-1)*S+3 rows
// is loaded once, and added to the (at most three) output columns it reaches; these live in
// registers until their last column has come. The nine weights stay in registers for the whole
// walk. With stride 1 it is the multiplications that take the time, with stride 2 the loads.
// Included once per instruction set (see instruction_set.inc).

// Output rows [oh, oh_end) of image n, channels [c_begin, c_end).
using DwRows = void (*)(const DwconvCall&, int64_t n, int64_t oh, int64_t oh_end, int64_t c_begin,
                        int64_t c_end);

// Square kernels with stride 1 or 2, no dilation, one output a channel.
MNET_INLINE bool is_fast(const DwconvCall& call) {
  return call.KH == call.KW && call.SH == call.SW && call.SH <= 2 && call.DH == 1 && call.DW == 1 &&
         call.multiplier == 1;
}

// Rows above and below the image: a pixel of zeros that every step stays on.
alignas(64) static constexpr char kZeroPixel[64] = {};

// The input rows of a walk, which step along them by one offset from their first pixels: as many
// pointers of their own would not fit in registers, and wait for memory at every step.
template <typename Elem, int Rows>
struct RowPointers {
  const char* first[Rows];
  int64_t moves[Rows];  // all bits of a row of the image, none of one outside

  inline __attribute__((always_inline)) RowPointers(const DwconvCall& call, int64_t n, int64_t ih) {
    const auto* image = static_cast<const Elem*>(call.x) + n * call.H * call.W * call.C;
    for (int i = 0; i < Rows; ++i) {
      const bool inside = ih + i >= 0 && ih + i < call.H;
      const auto* row = reinterpret_cast<const char*>(image + (ih + i) * call.W * call.C);
      first[i] = inside ? row : kZeroPixel;
      moves[i] = inside ? -1 : 0;
    }
  }
  inline __attribute__((always_inline)) const Elem* at(int i, int64_t offset) const {
    return reinterpret_cast<const Elem*>(first[i] + (offset & moves[i]));
  }
};
template <typename Elem, int R, int S>
using WalkRows = RowPointers<Elem, (R - 1) * S + 3>;

// What a walk needs to know of a block's channels, one multiplication and one addition a tap.
template <typename Elem>
struct FmaTaps {
  static constexpr int kChannels = kWidth<float>;
  using Sum = Vector<float>;
  // Output rows at once: as many as registers hold. With stride 2 more would not save much.
  template <int S>
  static constexpr int kRows = S == 1 ? 4 : 2;
  template <int R, int S>
  struct Column {
    Vector<float> row[(R - 1) * S + 3];
    inline __attribute__((always_inline)) void read(const WalkRows<Elem, R, S>& from,
                                                    int64_t offset) {
#pragma GCC unroll 8
      for (int i = 0; i < (R - 1) * S + 3; ++i) row[i] = load(from.at(i, offset));
    }
  };

  Vector<float> weight[3][3], scale, shift;

  inline __attribute__((always_inline)) FmaTaps(const DwconvCall& call, int64_t c)
      : scale(load(static_cast<const float*>(call.scale) + c)),
        shift(load(static_cast<const float*>(call.shift) + c)) {
#pragma GCC unroll 9
    for (int tap = 0; tap < 9; ++tap)
      weight[tap / 3][tap % 3] = load(static_cast<const float*>(call.weight) + tap * call.K + c);
  }

  // Output row r's share of one input column.
  template <int R, int S>
  inline __attribute__((always_inline)) void add(Sum& sum, const Column<R, S>& in, int r,
                                                 int kw) const {
#pragma GCC unroll 3
    for (int kh = 0; kh < 3; ++kh) sum += in.row[r * S + kh] * weight[kh][kw];
  }

  template <bool Clamped>
  inline __attribute__((always_inline)) void finish(const DwconvCall& call, Clamp<float> clamp,
                                                    bool streams, Elem* y, Sum sum) const {
    sum = sum * scale + shift;
    if (!Clamped) sum = activate<float>(call.activation, static_cast<float>(call.slope), sum);
    if (Clamped) sum = at_most<float>(at_least<float>(sum, clamp.low), clamp.high);
    if constexpr (sizeof(Elem) == 4)
      if (streams) return stream(y, sum);
    store(y, sum);
  }
};

#if defined(MNET_AVX512_BF16)
// The same in bfloat16 by dot products of pairs: rows 0 and 1 of a window interleaved, then row 2
// with zeros. Two thirds of the multiplications, and half of the conversions, which are a
// by-product of interleaving. Products are exact and accumulated in float. Interleaving works
// within quarters of a register, so that `low` holds channels 0-3, 8-11, 16-19, 24-27 of a block
// and `high` the rest.
struct DotTaps {
  static constexpr int kChannels = 2 * kWidth<float>;
  struct Sum {
    Vector<float> low, high;
  };
  template <int S>
  static constexpr int kRows = 2;
  struct Pairs {
    __m512i low, high;
    Pairs() = default;
    inline __attribute__((always_inline)) Pairs(__m512i first, __m512i second)
        : low(_mm512_unpacklo_epi16(first, second)), high(_mm512_unpackhi_epi16(first, second)) {}
  };
  template <int R, int S>
  struct Column {
    Pairs upper[R], lower[R];  // rows 0 and 1 of output row r's window; row 2
    inline __attribute__((always_inline)) void read(const WalkRows<bf16, R, S>& from,
                                                    int64_t offset) {
      auto row = [&](int i) __attribute__((always_inline)) {
        return _mm512_loadu_si512(from.at(i, offset));
      };
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        upper[r] = Pairs(row(r * S), row(r * S + 1));
        lower[r] = Pairs(row(r * S + 2), __m512i{});
      }
    }
  };

  Pairs upper[3], lower[3];
  Sum scale, shift;

  inline __attribute__((always_inline)) static Sum split(const void* per_channel, int64_t c) {
    const auto* from = static_cast<const float*>(per_channel) + c;
    const __m512 first = (__m512)load(from), second = (__m512)load(from + kWidth<float>);
    return {(Vector<float>)_mm512_maskz_shuffle_f32x4(0xffff, first, second, 0x88),
            (Vector<float>)_mm512_maskz_shuffle_f32x4(0xffff, first, second, 0xdd)};
  }
  inline __attribute__((always_inline)) DotTaps(const DwconvCall& call, int64_t c)
      : scale(split(call.scale, c)), shift(split(call.shift, c)) {
    const auto* weight = static_cast<const bf16*>(call.weight) + c;
#pragma GCC unroll 3
    for (int kw = 0; kw < 3; ++kw) {
      auto tap = [&](int kh) { return _mm512_loadu_si512(weight + (kh * 3 + kw) * call.K); };
      upper[kw] = Pairs(tap(0), tap(1));
      lower[kw] = Pairs(tap(2), __m512i{});
    }
  }

  inline __attribute__((always_inline)) static void add_pairs(Sum& sum, const Pairs& in,
                                                              const Pairs& w) {
    sum.low = (Vector<float>)_mm512_dpbf16_ps((__m512)sum.low, (__m512bh)in.low, (__m512bh)w.low);
    sum.high =
        (Vector<float>)_mm512_dpbf16_ps((__m512)sum.high, (__m512bh)in.high, (__m512bh)w.high);
  }
  template <int R, int S>
  inline __attribute__((always_inline)) void add(Sum& sum, const Column<R, S>& in, int r,
                                                 int kw) const {
    add_pairs(sum, in.upper[r], upper[kw]);
    add_pairs(sum, in.lower[r], lower[kw]);
  }

  template <bool Clamped>
  inline __attribute__((always_inline)) void finish(const DwconvCall& call, Clamp<float> clamp,
                                                    bool streams, bf16* y, Sum sum) const {
    auto act = [&](Vector<float> z) {
      if (!Clamped) return activate<float>(call.activation, static_cast<float>(call.slope), z);
      return at_most<float>(at_least<float>(z, clamp.low), clamp.high);
    };
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)act(sum.high * scale.high + shift.high),
                                              (__m512)act(sum.low * scale.low + shift.low));
    // Quarters of `low` and `high` in turn: the channels in order.
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    const __m512i out = _mm512_maskz_permutexvar_epi64(0xff, order, (__m512i)both);
    if (streams) return _mm512_stream_si512(reinterpret_cast<__m512i*>(y), out);
    _mm512_storeu_si512(y, out);
  }
};
#endif

// A load waits for an earlier store to the same offset in a page of 4 KB, in the belief that it
// might be the same address. Where pixels lie a multiple of 512 bytes apart, a walk's loads have
// but few offsets, and its stores likewise.
struct Aliasing {
  // x and y begin at the same offset: every load would wait. The results of a walk are gathered
  // elsewhere in the page before they are stored.
  bool same;
  // y's is a little behind: a block's stores would meet the loads of the next.
  bool next;
};
constexpr int64_t kStagePixel = 512, kStageColumns = 56;
MNET_INLINE Aliasing aliasing_of(const DwconvCall& call, int64_t size) {
  constexpr int64_t kPage = 4096;
  const int64_t pixel = call.K * size, lowest_bit = pixel & -pixel;
  const int64_t period = lowest_bit < kPage ? lowest_bit : kPage;
  const auto ahead = static_cast<int64_t>(reinterpret_cast<std::uintptr_t>(call.y) -
                                          reinterpret_cast<std::uintptr_t>(call.x)) &
                     (period - 1);
  if (period < kStagePixel || call.stream) return {false, false};
  const bool costs = call.SH == 2 || period >= 4 * kStagePixel;
  return {costs && ahead == 0 && call.OW <= kStageColumns, ahead > 0 && ahead <= 128};
}

// What is left of a thread's input to ask for, in the order of memory: its walks do so a share at
// every step, ahead of where they are.
struct Ahead {
  const char *next, *end;
};

// R output rows from oh on, all columns, channels [c_begin, c_end). Returns what is left to ask
// for.
template <typename Taps, typename Elem, int S, int R, bool Clamped>
static Ahead dw3_walk(const DwconvCall& call, int64_t n, int64_t oh, int64_t c_begin, int64_t c_end,
                      Ahead ahead) {
  constexpr int64_t kSize = sizeof(Elem), kBlock = Taps::kChannels;
  const int64_t ih = oh * S - call.top;
  const WalkRows<Elem, R, S> rows(call, n, ih);
  const int64_t in_pixel = call.C * kSize;
  // As much as the next walk reads for the first time.
  constexpr int64_t kShare = Taps::template kRows<S> * S * kBlock * kSize;
  auto* y = static_cast<Elem*>(call.y) + (n * call.OH + oh) * call.OW * call.K;
  alignas(64) char stage_memory[(kStageColumns + 1) * kStagePixel];
  const Aliasing alias = aliasing_of(call, kSize);
  const bool staged = alias.same;
  // What a store might change, to the compiler's mind.
  const int64_t OW = call.OW, K = call.K;
  const int64_t to_pixel = staged ? kStagePixel / kSize : K, to_row = staged ? 64 / kSize : OW * K;
  const bool streams = call.stream;
  const Clamp<float> clamp = clamp_of<float>(call.activation);
  // Columns are counted from the first one that an output reads, in the padding or not.
  const int64_t left = call.left, right = left + call.W, end = (OW - 1) * S + 3;
  const int64_t inside_end = right < end ? right : end;

  const int64_t blocks = (c_end - c_begin + kBlock - 1) / kBlock;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t next = c_begin + (alias.next ? blocks - 1 - block : block) * kBlock;
    // The last block is moved back to end at c_end: some channels are computed twice.
    const int64_t c = next + kBlock <= c_end ? next : c_end - kBlock;
    const Taps taps(call, c);
    using Sum = typename Taps::Sum;
    Sum begun[R] = {}, half[R] = {};  // outputs that lack two columns, and one
    int64_t offset = c * kSize;
    const bool asks = ahead.next < ahead.end;
    const auto line = reinterpret_cast<std::uintptr_t>(static_cast<const Elem*>(call.x) + c) -
                      reinterpret_cast<std::uintptr_t>(stage_memory);
    auto* const stage = reinterpret_cast<Elem*>(
        stage_memory + (line + 128) % static_cast<std::uintptr_t>(kStagePixel));
    Elem* to = staged ? stage : y + c;
    // Stride 2: an odd column is the middle one of an output, an even one its first or last.
    auto column = [&](auto odd, bool inside, bool ends) __attribute__((always_inline)) {
      constexpr bool kOdd = decltype(odd)::value;
      typename Taps::template Column<R, S> in{};
      if (inside) {
        if (asks) prefetch(ahead.next, kShare), ahead.next += kShare;
        in.read(rows, offset);
        offset += in_pixel;
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Sum done = half[r];
        if (S == 1) half[r] = begun[r], begun[r] = Sum{};
        if (S == 2 && !kOdd) half[r] = Sum{};
        if (inside && S == 1) {
          taps.template add<R, S>(done, in, r, 2);
          taps.template add<R, S>(half[r], in, r, 1);
          taps.template add<R, S>(begun[r], in, r, 0);
        } else if (inside && kOdd) {
          taps.template add<R, S>(half[r], in, r, 1);
        } else if (inside) {
          taps.template add<R, S>(done, in, r, 2);
          taps.template add<R, S>(half[r], in, r, 0);
        }
        if (ends) taps.template finish<Clamped>(call, clamp, streams, to + r * to_row, done);
      }
      if (ends) to += to_pixel;
    };
    auto inside = [&](int64_t j) { return j >= left && j < inside_end; };
    for (int64_t j = 0; j < end;) {
      if (j < 2 || j < left || j + S > inside_end) {  // where something may be missing
        column(Constant<false>{}, inside(j), j >= 2);
        if (S == 2 && j + 1 < end) column(Constant<true>{}, inside(j + 1), false);
        j += S;
        continue;
      }
      for (; j + S <= inside_end; j += S) {
        column(Constant<false>{}, true, true);
        if (S == 2) column(Constant<true>{}, true, false);
      }
    }
    if (staged)
      for (int64_t r = 0; r < R; ++r)
        for (int64_t i = 0; i < OW; ++i)
          __builtin_memcpy(y + (r * OW + i) * K + c, stage + r * to_row + i * to_pixel,
                           kBlock * kSize);
  }
  return ahead;
}

template <typename Taps, typename Elem, int S>
static void dw3_rows(const DwconvCall& call, int64_t n, int64_t oh, int64_t oh_end, int64_t c_begin,
                     int64_t c_end) {
  constexpr int kRows = Taps::template kRows<S>;
  const bool clamped = clamp_of<float>(call.activation).exact;
  // Small walks come first: nobody has asked for the rows of the first. A single row has little to
  // share.
  auto rows_of_next = [&] {
    const int64_t left = oh_end - oh, rest = left % kRows;
    return left == 1 ? 1 : rest == 0 ? kRows : rest > 1 ? rest : kRows == 2 ? 3 : 2;
  };
  auto input = [&](int64_t output_rows) {  // where the rows end that so many output rows read
    const int64_t row = n * call.H + (output_rows - 1) * S - call.top + 3, rows = call.N * call.H;
    return static_cast<const char*>(call.x) +
           (row < rows ? row : rows) * call.W * call.C * static_cast<int64_t>(sizeof(Elem));
  };
  Ahead ahead{};
  if (call.prefetch && call.channel_chunks == 1)  // at a call's end also for what may come after it
    ahead = {input(oh + rows_of_next()), input(oh_end < call.OH ? oh_end : oh_end + kRows)};
  auto walk = [&](auto rows) __attribute__((always_inline)) {
    constexpr int R = decltype(rows)::value;
    if (clamped)
      ahead = dw3_walk<Taps, Elem, S, R, true>(call, n, oh, c_begin, c_end, ahead);
    else
      ahead = dw3_walk<Taps, Elem, S, R, false>(call, n, oh, c_begin, c_end, ahead);
    oh += R;
  };
  while (oh < oh_end) {
    const int64_t rows = rows_of_next();
    if (rows == 1)
      walk(Constant<1>{});
    else if (rows == 2)
      walk(Constant<2>{});
    else if (rows == 3)
      walk(Constant<3>{});
    else
      walk(Constant<kRows>{});
  }
  if (call.stream) drain_streams();
}

template <typename Elem>
static DwRows dw3_rows_for(const DwconvCall& call) {
  return call.SH == 1 ? dw3_rows<FmaTaps<Elem>, Elem, 1> : dw3_rows<FmaTaps<Elem>, Elem, 2>;
}

// Whether the kernel reads the weight in x's own type instead of the accumulator's.
static bool dwconv_keeps_weight(const DwconvCall& call) {
#if defined(MNET_AVX512_BF16)
  return call.element == Element::bf16 && is_fast(call) && call.KH == 3 &&
         call.C >= DotTaps::kChannels;
#else
  (void)call;
  return false;
#endif
}

#if defined(MNET_AVX512_BF16)
template <>
DwRows dw3_rows_for<bf16>(const DwconvCall& call) {
  if (dwconv_keeps_weight(call))
    return call.SH == 1 ? dw3_rows<DotTaps, bf16, 1> : dw3_rows<DotTaps, bf16, 2>;
  return call.SH == 1 ? dw3_rows<FmaTaps<bf16>, bf16, 1> : dw3_rows<FmaTaps<bf16>, bf16, 2>;
}
#endif
