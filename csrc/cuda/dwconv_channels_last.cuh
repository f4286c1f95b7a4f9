// Depthwise convolution, channels_last: K x K, stride S, no dilation, one output a channel.
//
// A thread owns V neighbouring channels (one memory instruction of up to 16 bytes) and a strip of
// T output columns. Threads are numbered along channel vectors first, up to 128 bytes of a pixel,
// then along strips, then down the plane: a block reads whole sectors, and what its threads share
// (pixels at the edges of strips and rows, weights) comes from the first-level cache.
//
//   stream   walks down the plane. An input row is loaded and converted once; it is added to all
//            the output rows it reaches, whose sums wait in registers. P rows are on their way
//            while one is used. For large problems: fewest instructions an output.
//   tile     one output row; all loads are issued before the first is used. For small problems,
//            whose time is the latency of a load.
//
// Zeros beyond the border come from predicated loads; two instructions for each load of a vector
// are too few for a second, unpredicated path to pay.
#pragma once

#include <algorithm>
#include <type_traits>

#include "divisor.cuh"
#include "dwconv_call.cuh"

namespace mnet::cuda {

inline constexpr int kChannelsLastThreads = 128;

// The weights of V channels are what registers are spent on: K*K*V of them.
template <typename Element, int K>
constexpr int kWidest = K == 3   ? 16 / sizeof(Element)
                        : K == 5 ? 4
                                 : 2;

// T: as many output columns as leave registers for rows on their way.
inline constexpr int kStrip = 2;

// Rows on their way in the stream: as many as give 32 KiB in flight on a multiprocessor.
template <int K, int S>
constexpr int kRowsComing = K == 3 ? (S == 1 ? 3 : 2) : 1;

// How outputs are shared out between threads.
struct ChannelsLastPlan {
  Divisor vectors;  // of one chunk of channels
  Divisor strips, row_blocks, chunks;
  int rows;  // of a row block
  uint32_t threads;
};

// Where a thread works: its first channel, output column and output row.
struct ChannelsLastPlace {
  int n, c, ow, oh;
};

template <int V, int T>
__device__ __forceinline__ bool place_of_thread(const DwconvCall& call,
                                                const ChannelsLastPlan& plan,
                                                ChannelsLastPlace& place) {
  uint32_t at = blockIdx.x * kChannelsLastThreads + threadIdx.x;
  if (at >= plan.threads) return false;
  const uint32_t vector = plan.vectors.divide(at);
  const uint32_t strip = plan.strips.divide(at);
  const uint32_t row_block = plan.row_blocks.divide(at);
  const uint32_t chunk = plan.chunks.divide(at);
  place.n = static_cast<int>(at);
  place.c = static_cast<int>(chunk * plan.vectors.value + vector) * V;
  place.ow = static_cast<int>(strip) * T;
  place.oh = static_cast<int>(row_block) * plan.rows;
  return place.c < static_cast<int>(call.C);  // the last chunk may be shorter
}

// K*K taps of V channels lie one after the other in memory, whole vectors of them.
template <int K, int V, typename Element>
__device__ __forceinline__ void load_taps(const DwconvCall& call, int c, float (&taps)[K * K][V]) {
  const auto* from = static_cast<const Element*>(call.weight) + static_cast<int64_t>(c) * (K * K);
#pragma unroll
  for (int i = 0; i < K * K; ++i) {
    float values[V];
    widen(load<V>(from + i * V), values);
#pragma unroll
    for (int v = 0; v < V; ++v) taps[(i * V + v) % (K * K)][(i * V + v) / (K * K)] = values[v];
  }
}

// V values of scale or shift from c on, by vectors of at most 16 bytes.
template <int V>
__device__ __forceinline__ void load_affine(const float* values, int c, float otherwise,
                                            float (&result)[V]) {
  constexpr int kStep = V < 4 ? V : 4;
#pragma unroll
  for (int v = 0; v < V; v += kStep) {
    Vector<float, kStep> vector;
    if (values) vector = load<kStep>(values + c + v);
#pragma unroll
    for (int i = 0; i < kStep; ++i) result[v + i] = values ? vector.lane[i] : otherwise;
  }
}

// A row of input vectors, zeros outside of the plane. `from` is where column iw would be.
template <int V, int Columns, typename Element>
__device__ __forceinline__ void load_row(const Element* from, int pixel, int iw, int W, bool inside,
                                         Vector<Element, V> (&row)[Columns]) {
#pragma unroll
  for (int j = 0; j < Columns; ++j)
    row[j] = load<V>(from + j * pixel,
                     inside && static_cast<unsigned>(iw + j) < static_cast<unsigned>(W));
}

// Rounds and stores T outputs of V channels from column ow on.
template <int V, int T, Activations Known, typename Element>
__device__ __forceinline__ void finish(const DwconvCall& call, float (&sum)[T * V],
                                       const float (&scale)[V], const float (&shift)[V],
                                       Element* to, int ow) {
#pragma unroll
  for (int i = 0; i < T * V; ++i) sum[i] = sum[i] * scale[i % V] + shift[i % V];
  activate_all<Known>(call.activation, call.slope, sum);
#pragma unroll
  for (int t = 0; t < T; ++t) {
    float strip[V];
#pragma unroll
    for (int v = 0; v < V; ++v) strip[v] = sum[t * V + v];
    store(to + t * static_cast<int>(call.C), narrow<Element>(strip),
          ow + t < static_cast<int>(call.OW));
  }
}

// Adds column j of input row `phase` (modulo the rows after which all is as before) to all that it
// reaches of T columns of output rows; output row r waits in sums[r % ((K + S - 1) / S)].
template <int K, int S, int T, int V>
__device__ __forceinline__ void add_column(int phase, int j, const float (&in)[V],
                                           const float (&taps)[K * K][V],
                                           float (&sums)[(K + S - 1) / S][T * V]) {
  constexpr int kRing = (K + S - 1) / S, kPeriod = kRing * S;
#pragma unroll
  for (int t = 0; t < T; ++t) {
    const int kw = j - t * S;
    if (kw < 0 || kw >= K) continue;
#pragma unroll
    for (int kh = phase % S; kh < K; kh += S) {
      float (&sum)[T * V] = sums[(phase - kh + kPeriod) / S % kRing];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float before = kh == 0 && kw == 0 ? 0 : sum[t * V + v];
        sum[t * V + v] = before + in[v] * taps[kh * K + kw][v];
      }
    }
  }
}

template <typename Element, int K, int S, int V, int P, Activations Known>
__global__ void __launch_bounds__(kChannelsLastThreads, 2)
    dwconv_channels_last_stream(const DwconvCall call, const ChannelsLastPlan plan) {
  constexpr int T = kStrip, kColumns = (T - 1) * S + K;
  constexpr int kRing = (K + S - 1) / S;  // output rows that an input row reaches
  constexpr int kPeriod = kRing * S;      // input rows until all is as before
  static_assert(kPeriod % P == 0);
  // A row's place is filled again when all of it is used and its outputs are stored: across these
  // branches nvcc copies what has just been asked for, and waits for it. A lone row cannot wait.
  constexpr bool kRefillLast = P > 1;
  ChannelsLastPlace at;
  if (!place_of_thread<V, T>(call, plan, at)) return;
  const int C = call.C, H = call.H, W = call.W;
  const int left = static_cast<int>(call.OH) - at.oh;
  const int rows = left < plan.rows ? left : plan.rows;
  const int in_rows = (rows - 1) * S + K;
  const int ih = at.oh * S - static_cast<int>(call.top);
  const int iw = at.ow * S - static_cast<int>(call.left);
  // 64-bit once: an image has less than 2^31 elements, a tensor may have more.
  const auto* x = static_cast<const Element*>(call.x) + static_cast<int64_t>(at.n) * (H * W * C) +
                  ((ih * W + iw) * C + at.c);
  auto* y = static_cast<Element*>(call.y) +
            (static_cast<int64_t>(at.n) * static_cast<int>(call.OH) + at.oh) *
                (static_cast<int>(call.OW) * C) +
            (at.ow * C + at.c);

  // Input row i waits in coming[i % P] from P rows before its turn.
  Vector<Element, V> coming[P][kColumns];
  auto request = [&](int i, int j) {
    const bool inside = i < in_rows && static_cast<unsigned>(ih + i) < static_cast<unsigned>(H) &&
                        static_cast<unsigned>(iw + j) < static_cast<unsigned>(W);
    return load<V>(x + (i * W + j) * C, inside);
  };
#pragma unroll
  for (int i = 0; i < P; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) coming[i][j] = request(i, j);
  float taps[K * K][V], scale[V], shift[V];
  load_taps<K, V, Element>(call, at.c, taps);
  load_affine(call.scale, at.c, 1, scale);
  load_affine(call.shift, at.c, 0, shift);

  // Output row r waits in sums[r % kRing]. Rows before the first are summed and dropped.
  float sums[kRing][T * V] = {};
  for (int first = 0; first < in_rows; first += kPeriod) {
#pragma unroll
    for (int phase = 0; phase < kPeriod; ++phase) {
      const int i = first + phase;
      if (i >= in_rows) return;
      // Column by column: few converted inputs are alive at a time.
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        float in[V];
        widen(coming[phase % P][j], in);
        if constexpr (!kRefillLast) coming[phase % P][j] = request(i + P, j);
        add_column<K, S, T, V>(phase, j, in, taps, sums);
      }
      if ((phase - (K - 1) + kPeriod) % S == 0 && i >= K - 1) {
        finish<V, T, Known>(call, sums[(phase - (K - 1) + kPeriod) / S % kRing], scale, shift, y,
                            at.ow);
        y += static_cast<int>(call.OW) * C;
      }
      if constexpr (kRefillLast) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) coming[phase % P][j] = request(i + P, j);
      }
    }
  }
}

template <typename Element, int K, int S, int V>
__global__ void __launch_bounds__(kChannelsLastThreads, 2)
    dwconv_channels_last_tile(const DwconvCall call, const ChannelsLastPlan plan) {
  constexpr int T = kStrip, kColumns = (T - 1) * S + K;
  ChannelsLastPlace at;
  if (!place_of_thread<V, T>(call, plan, at)) return;
  const int C = call.C, H = call.H, W = call.W;
  const int ih = at.oh * S - static_cast<int>(call.top);
  const int iw = at.ow * S - static_cast<int>(call.left);
  const auto* x = static_cast<const Element*>(call.x) + static_cast<int64_t>(at.n) * (H * W * C) +
                  ((ih * W + iw) * C + at.c);

  Vector<Element, V> in[K][kColumns];
#pragma unroll
  for (int i = 0; i < K; ++i)
    load_row(x + i * W * C, C, iw, W, static_cast<unsigned>(ih + i) < static_cast<unsigned>(H),
             in[i]);
  float taps[K * K][V], scale[V], shift[V];
  load_taps<K, V, Element>(call, at.c, taps);
  load_affine(call.scale, at.c, 1, scale);
  load_affine(call.shift, at.c, 0, shift);

  float sum[T * V] = {};
#pragma unroll
  for (int kh = 0; kh < K; ++kh)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      float wide[V];
      widen(in[kh][j], wide);
#pragma unroll
      for (int t = 0; t < T; ++t) {
        const int kw = j - t * S;
        if (kw < 0 || kw >= K) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) sum[t * V + v] += wide[v] * taps[kh * K + kw][v];
      }
    }
  auto* y = static_cast<Element*>(call.y) +
            (static_cast<int64_t>(at.n) * static_cast<int>(call.OH) + at.oh) *
                (static_cast<int>(call.OW) * C) +
            (at.ow * C + at.c);
  finish<V, T, Activations::any>(call, sum, scale, shift, y, at.ow);
}

// What an H200 runs at once: 132 multiprocessors, some 12 warps of such threads on each.
inline constexpr int64_t kOneWave = 132 * 384;

// Rows of a block are chosen for the stream: few, so that the last wave is not much emptier than
// the others, but not so few that reading their halo again costs more than that.
template <int V, int T>
ChannelsLastPlan plan_of(const DwconvCall& call, int64_t element_bytes, bool whole_rows) {
  const int64_t vectors = call.C / V;
  const int64_t chunks = divide_up(vectors * V * element_bytes, 128);
  const int64_t in_chunk = divide_up(vectors, chunks), strips = divide_up(call.OW, T);
  const int64_t in_row = call.N * chunks * in_chunk * strips;
  int64_t rows = whole_rows ? call.OH : 1;
  while (rows > 7 && in_row * divide_up(call.OH, rows) < 8 * kOneWave) rows = divide_up(rows, 2);
  const int64_t row_blocks = divide_up(call.OH, rows);
  ChannelsLastPlan plan;
  plan.vectors = Divisor(static_cast<uint32_t>(in_chunk));
  plan.strips = Divisor(static_cast<uint32_t>(strips));
  plan.row_blocks = Divisor(static_cast<uint32_t>(row_blocks));
  plan.chunks = Divisor(static_cast<uint32_t>(chunks));
  plan.rows = static_cast<int>(rows);
  if (!fit_int32({in_row * row_blocks}))
    throw std::runtime_error("dwconv_channels_last: more threads than 32-bit indices count");
  plan.threads = static_cast<uint32_t>(in_row * row_blocks);
  return plan;
}

// Calls f(constant V) with the widest vectors that C and the pointers allow.
template <typename Element, int K, typename F>
void with_width(const DwconvCall& call, F&& f) {
  constexpr int kMost = kWidest<Element, K>;
  auto fits = [&](int v) {
    const int64_t bytes = v * static_cast<int64_t>(sizeof(Element)), wide = v < 4 ? v * 4 : 16;
    return call.C % v == 0 && aligned(call.x, bytes) && aligned(call.y, bytes) &&
           aligned(call.weight, bytes) && aligned(call.scale, wide) && aligned(call.shift, wide);
  };
  if (kMost > 2 && fits(kMost)) return f(std::integral_constant<int, kMost>{});
  if (fits(2)) return f(std::integral_constant<int, 2>{});
  return f(std::integral_constant<int, 1>{});
}

// Calls f(constant K, constant S).
template <typename F>
void with_kernel(const DwconvCall& call, F&& f) {
  auto stride = [&](auto kernel) {
    if (call.SH == 1) return f(kernel, std::integral_constant<int, 1>{});
    return f(kernel, std::integral_constant<int, 2>{});
  };
  if (call.KH == 3) return stride(std::integral_constant<int, 3>{});
  if (call.KH == 5) return stride(std::integral_constant<int, 5>{});
  return stride(std::integral_constant<int, 7>{});
}

// Threads are 32-bit numbers. How many there may be at most: where vectors are single elements, up
// to twice as many as channels, in chunks; the stream's rows are shared out only where threads are
// few, the tile's always.
inline int64_t most_threads(const DwconvCall& call, bool every_row) {
  return 2 * call.C * call.N * divide_up(call.OW, kStrip) * (every_row ? call.OH : 1);
}

inline bool channels_last_can_run(const DwconvCall& call) {
  const int64_t K = call.KH, S = call.SH;
  const int64_t height = std::max(call.H, (call.OH - 1) * S + K);
  const int64_t width = std::max(call.W, (call.OW - 1) * S + K);
  return call.channels_last && call.multiplier == 1 && call.DH == 1 && call.DW == 1 &&
         call.KW == K && (K == 3 || K == 5 || K == 7) && call.SW == S && (S == 1 || S == 2) &&
         fit_int32({height, width, height * width, height * width * call.C, call.N,
                    most_threads(call, false)});
}

struct DwconvChannelsLastStream {
  static constexpr const char* kName = "channels_last_stream";

  static bool can_run(const DwconvCall& call) { return channels_last_can_run(call); }

  template <typename Element, typename Launcher>
  static void launch(Launcher&& launcher, const DwconvCall& call) {
    with_kernel(call, [&](auto kernel, auto stride) {
      constexpr int K = decltype(kernel)::value, S = decltype(stride)::value;
      with_width<Element, K>(call, [&](auto width) {
        constexpr int V = decltype(width)::value;
        const auto plan = plan_of<V, kStrip>(call, sizeof(Element), true);
        const Geometry geometry{divide_up(plan.threads, kChannelsLastThreads), kChannelsLastThreads,
                                0, false};
        constexpr int P = kRowsComing<K, S>;
        with_activations<V == kWidest<Element, K>>(call, [&](auto known) {
          launcher(dwconv_channels_last_stream<Element, K, S, V, P, known>, geometry, call, plan);
        });
      });
    });
  }
};

struct DwconvChannelsLastTile {
  static constexpr const char* kName = "channels_last_tile";

  static bool can_run(const DwconvCall& call) {
    return channels_last_can_run(call) && fit_int32({most_threads(call, true)});
  }

  template <typename Element, typename Launcher>
  static void launch(Launcher&& launcher, const DwconvCall& call) {
    with_kernel(call, [&](auto kernel, auto stride) {
      constexpr int K = decltype(kernel)::value, S = decltype(stride)::value;
      with_width<Element, K>(call, [&](auto width) {
        constexpr int V = decltype(width)::value;
        const auto plan = plan_of<V, kStrip>(call, sizeof(Element), false);
        const Geometry geometry{divide_up(plan.threads, kChannelsLastThreads), kChannelsLastThreads,
                                0, false};
        launcher(dwconv_channels_last_tile<Element, K, S, V>, geometry, call, plan);
      });
    });
  }
};

}  // namespace mnet::cuda
