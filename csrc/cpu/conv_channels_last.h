// Dense convolution (one group), channels_last, float32 or bfloat16, as a matrix product in tiles
// (conv_tile.h): pixels x taps times taps x output channels.
//
// A 1x1 kernel reads the image in place; any other gathers its patches into scratch first. Weights
// come packed by pack_conv_weight: panels of kPanel output channels, [panel][step][channel],
// zero-filled at the end, a step being one tap in float32 and a pair of taps in bfloat16. Included
// once per instruction set.

// n values from the image to a patch, in the patch's type.
template <typename To, typename From>
MNET_INLINE void copy_values(To* to, const From* from, int64_t n) {
  constexpr int V = kWidth<float>;
  if constexpr (sizeof(To) == sizeof(From)) {
    for (; n >= V; n -= V, to += V, from += V) __builtin_memcpy(to, from, V * sizeof(To));
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  } else {
    for (; n >= V; n -= V, to += V, from += V) store(to, load(from));
    if (n > 0) store_first(to, load_first(from, static_cast<int>(n)), static_cast<int>(n));
  }
}

// A short run of values: two copies that overlap, of half the next power of two.
template <typename T>
MNET_INLINE void copy_run(T* to, const T* from, int64_t n) {
  const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
  auto* out = reinterpret_cast<char*>(to);
  const auto* in = reinterpret_cast<const char*>(from);
  auto twice = [&](auto half) __attribute__((always_inline)) {
    constexpr int kHalf = decltype(half)::value;
    char first[kHalf], last[kHalf];
    __builtin_memcpy(first, in, kHalf);
    __builtin_memcpy(last, in + bytes - kHalf, kHalf);
    __builtin_memcpy(out, first, kHalf);
    __builtin_memcpy(out + bytes - kHalf, last, kHalf);
  };
  if (bytes > 64) return copy_values(to, from, n);
  if (bytes > 32) return twice(Constant<32>{});
  if (bytes > 16) return twice(Constant<16>{});
  if (bytes > 8) return twice(Constant<8>{});
  copy_values(to, from, n);
}

// The patches of pixels [begin, begin + count), one row each, `stride` values apart.
template <typename Elem>
static void gather_patches(const ConvCall& call, int64_t begin, int64_t count, Patch<Elem>* to,
                           int64_t stride) {
  // Without dilation a row of the kernel is one run of the image, cut by its borders.
  const int64_t step = call.DW == 1 ? call.KW : 1;
  int64_t ow = begin % call.OW, oh = begin / call.OW % call.OH, n = begin / call.OW / call.OH;
  for (int64_t p = 0; p < count; ++p, to += stride) {
    const Elem* image = static_cast<const Elem*>(call.x) + n * call.H * call.W * call.C;
    const int64_t iw = ow * call.SW - call.left, top = oh * call.SH - call.top;
    Patch<Elem>* out = to;
    const bool whole = sizeof(Elem) == sizeof(Patch<Elem>) && call.DW == 1 && top >= 0 &&
                       top + (call.KH - 1) * call.DH < call.H && iw >= 0 && iw + call.KW <= call.W;
    if constexpr (sizeof(Elem) == sizeof(Patch<Elem>)) {
      const int64_t run = call.KW * call.C;
      for (int64_t kh = 0; whole && kh < call.KH; ++kh, out += run)
        copy_run(out,
                 reinterpret_cast<const Patch<Elem>*>(image) +
                     ((top + kh * call.DH) * call.W + iw) * call.C,
                 run);
    }
    for (int64_t kh = 0; !whole && kh < call.KH; ++kh) {
      const int64_t ih = top + kh * call.DH;
      for (int64_t kw = 0; kw < call.KW; kw += step, out += step * call.C) {
        const int64_t at = iw + kw * call.DW;
        const int64_t skip = at < 0 ? (-at < step ? -at : step) : 0;
        const int64_t fit = call.W - at < step ? call.W - at : step;
        const bool inside = ih >= 0 && ih < call.H && skip < fit;
        if (!inside || skip > 0 || fit < step)
          for (int64_t c = 0; c < step * call.C; ++c) out[c] = Patch<Elem>{};
        if (inside)
          copy_values(out + skip * call.C, image + (ih * call.W + at + skip) * call.C,
                      (fit - skip) * call.C);
      }
    }
    if (call.taps % Step<Elem>::kTaps) *out = Patch<Elem>{};  // fills the last step up
    if (++ow < call.OW) continue;
    ow = 0;
    if (++oh == call.OH) oh = 0, ++n;
  }
}

template <typename Elem>
MNET_INLINE bool rows_collide(int64_t stride) {
  return stride * static_cast<int64_t>(sizeof(Patch<Elem>)) % 4096 == 0;
}
// Whether the image is read in place. Rows of patches that all start in the same few sets of the
// first-level cache would evict one another.
template <typename Elem>
MNET_INLINE bool reads_in_place(const ConvCall& call) {
  return call.pointwise && sizeof(Patch<Elem>) == sizeof(Elem) &&
         call.taps % Step<Elem>::kTaps == 0 && !rows_collide<Elem>(call.taps);
}
// Values from one gathered patch to the next.
template <typename Elem>
MNET_INLINE int64_t gathered_stride(const ConvCall& call) {
  const int64_t taps = steps_of<Elem>(call) * Step<Elem>::kTaps;
  return taps + (rows_collide<Elem>(taps) ? 64 / static_cast<int64_t>(sizeof(Patch<Elem>)) : 0);
}

// Whether a patch is so many runs of the image, one a kernel row, that can be read where they are.
template <typename Elem>
MNET_INLINE bool reads_rows(const ConvCall& call) {
  return !call.pointwise && sizeof(Patch<Elem>) == sizeof(Elem) && Step<Elem>::kTaps == 1 &&
         call.DW == 1 && call.K <= kPanel;
}

// The patches of a pixel and of those that follow it in the image; `count` of them do not touch its
// border and lie in one output row.
template <typename Elem>
MNET_INLINE Patches<Elem> patches_in_image(const ConvCall& call, int64_t pixel, int64_t* count) {
  const int64_t ow = pixel % call.OW, oh = pixel / call.OW % call.OH;
  const int64_t top = oh * call.SH - call.top, left = ow * call.SW - call.left;
  const int64_t fit = (call.W - call.KW - left + call.SW) / call.SW, rest = call.OW - ow;
  const bool inside =
      top >= 0 && top + (call.KH - 1) * call.DH < call.H && left >= 0 && left + call.KW <= call.W;
  *count = !inside ? 0 : fit < rest ? fit : rest;
  const int64_t n = pixel / call.OW / call.OH, row = call.KW * call.C;
  const auto* image = static_cast<const Patch<Elem>*>(call.x);
  return {image + ((n * call.H + top) * call.W + left) * call.C, call.SW * call.C, row,
          call.DH * call.W * call.C - row};
}

// What a task of so many tiles asks for besides its own weights: its share of what follows the
// call, or the next block's pixels.
template <typename Elem>
MNET_INLINE Wanted later_of(const ConvCall& call, int64_t task, const Elem* image, int64_t count,
                            int64_t tiles) {
  const auto* from = reinterpret_cast<const char*>(image + count * call.C);
  int64_t bytes = call.prefetch ? count * call.C * static_cast<int64_t>(sizeof(Elem)) : 0;
  if (call.next_bytes > 0) {
    const int64_t tasks = call.pixel_blocks * call.channel_blocks;
    bytes = call.next_bytes / tasks;
    from = static_cast<const char*>(call.next) + task * bytes;
  }
  const int64_t steps = tiles * steps_of<Elem>(call), step = (bytes + steps - 1) / steps;
  return {from, step < kMostWanted ? step : kMostWanted};
}

template <typename Elem>
static void convolve(const ConvCall& call, int64_t begin, int64_t end, void* scratch) {
  constexpr int V = kWidth<float>;
  const Clamp<float> clamp = clamp_of<float>(call.activation);
  const int64_t pixels = call.N * call.OH * call.OW, steps = steps_of<Elem>(call);
  const bool in_place = reads_in_place<Elem>(call), in_rows = reads_rows<Elem>(call);
  const int64_t stride = in_place ? call.C : gathered_stride<Elem>(call);
  const int64_t panel_bytes = steps * kPanel * kStepBytes;
  int64_t gathered = -1;  // the block that scratch holds
  for (int64_t task = begin; task < end; ++task) {
    // Threads share out the larger number: who has all pixels of a panel reads it alone.
    const bool by_channels = call.channel_blocks > call.pixel_blocks;
    const int64_t block = by_channels ? task % call.pixel_blocks : task / call.channel_blocks;
    const int64_t channels = by_channels ? task / call.pixel_blocks : task % call.channel_blocks;
    const int64_t first = block * pixels / call.pixel_blocks;
    const int64_t count = (block + 1) * pixels / call.pixel_blocks - first;
    const Elem* image = static_cast<const Elem*>(call.x) + first * call.C;
    const auto* patches = reinterpret_cast<const Patch<Elem>*>(image);
    if (!in_place) {
      patches = static_cast<const Patch<Elem>*>(scratch);
      if (gathered != block && !in_rows)
        gather_patches<Elem>(call, first, count, static_cast<Patch<Elem>*>(scratch), stride);
      gathered = block;
    }
    const int64_t tiles = (count + kTilePixels - 1) / kTilePixels;
    const int64_t panels = (call.K + kPanel - 1) / kPanel;
    const int64_t panel_begin = channels * panels / call.channel_blocks;
    const int64_t panel_end = (channels + 1) * panels / call.channel_blocks;
    Wanted later = later_of<Elem>(call, task, image, count, (panel_end - panel_begin) * tiles);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const char* weight = static_cast<const char*>(call.weight) + panel * panel_bytes;
      const int64_t columns = call.K - panel * kPanel < kPanel ? call.K - panel * kPanel : kPanel;
      for (int64_t column = 0; column < columns; column += 2 * V) {
        const int lanes = static_cast<int>(columns - column < 2 * V ? columns - column : 2 * V);
        const int vectors = (lanes + V - 1) / V, last = lanes - (vectors - 1) * V;
        const auto& tiles_of = kConvTiles<Elem>[vectors - 1 + (kHalves && last <= V / 2 ? 2 : 0)];
        const int64_t channel = panel * kPanel + column;
        TileRun<Elem> run{{patches, stride, steps, 0},
                          weight + column * kStepBytes,
                          channel,
                          static_cast<Elem*>(call.y) + first * call.K + channel,
                          last,
                          clamp,
                          0,
                          0,
                          {{weight, 0}, {weight, 0}}};
        if (column == 0) {
          const char* next = weight + panel_bytes;
          run.wanted[0] = {next, kMostWanted};
          run.wanted[1] = {next + panel_bytes / 2, kMostWanted};
          if (tiles > 1) {
            run.wanted[0].step = (kPanel * kStepBytes + tiles - 1) / tiles;
            run.wanted[1] = later;
            later.at += tiles * steps * later.step;
          }
        }
        // Tiles of as many pixels, then of one less.
        const int64_t most = (count + tiles - 1) / tiles, full = count - (most - 1) * tiles;
        for (int64_t pixel = 0; run.end < tiles;) {
          const int64_t size = run.end < full ? most : most - 1;
          run.begin = run.end;
          run.end = run.end < full ? full : tiles;
          if (in_rows) {
            int64_t inside = 0;
            run.patches = patches_in_image<Elem>(call, first + pixel, &inside);
            if (inside < size) {
              Patch<Elem>* to = static_cast<Patch<Elem>*>(scratch) + pixel * stride;
              gather_patches<Elem>(call, first + pixel, size, to, stride);
              run.patches = {to, stride, steps, 0};
              inside = size;
            }
            if (inside / size < run.end - run.begin) run.end = run.begin + inside / size;
          }
          pixel += size * (run.end - run.begin);
          tiles_of[size - 1](call, run);
        }
      }
    }
  }
  if (call.stream) drain_streams();
}

// Bytes of scratch that a thread needs.
template <typename Elem>
static int64_t convolve_scratch(const ConvCall& call) {
  const int64_t pixels = call.N * call.OH * call.OW;
  const int64_t block = (pixels + call.pixel_blocks - 1) / call.pixel_blocks + 1;
  return reads_in_place<Elem>(call)
             ? 0
             : block * gathered_stride<Elem>(call) * static_cast<int64_t>(sizeof(Patch<Elem>));
}
