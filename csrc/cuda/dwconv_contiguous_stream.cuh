// Depthwise convolution, contiguous, where rows are whole vectors of 16 bytes (16-bit elements: or
// 8) and the padding is the usual one. A thread loads a vector of its own columns of a row, and a
// narrow one of its neighbours' on either side, which the first-level cache holds; P rows are on
// their way while one is used. Fewest instructions: for planes with wide rows.
#pragma once

#include "dwconv_contiguous.cuh"

namespace mnet::cuda {

struct ContiguousStreamPlan {
  Divisor strips, row_blocks, channels;
  int rows;  // of a row block
  uint32_t threads;
};

// The narrowest vector that holds so many elements.
constexpr int vector_for(int elements) { return elements > 2 ? 4 : elements; }

// What a thread loads of an input row: its own columns and its neighbours'.
template <typename Element, int V, int Before, int After>
struct RowVectors {
  static constexpr int kBefore = vector_for(Before), kAfter = vector_for(After);
  Vector<Element, (Before ? kBefore : 1)> before;
  Vector<Element, V> own;
  Vector<Element, (After ? kAfter : 1)> after;

  // `from`: the first of the thread's own columns.
  __device__ __forceinline__ void request(const Element* from, bool inside, bool at_left,
                                          bool at_right) {
    own = load<V>(from, inside);
    if constexpr (Before > 0) before = load<kBefore>(from - kBefore, inside && !at_left);
    if constexpr (After > 0) after = load<kAfter>(from + V, inside && !at_right);
  }

  __device__ __forceinline__ void widen_to(float (&in)[Before + V + After]) const {
    float wide[V];
    widen(own, wide);
#pragma unroll
    for (int v = 0; v < V; ++v) in[Before + v] = wide[v];
    if constexpr (Before > 0) {
      float halo[kBefore];
      widen(before, halo);
#pragma unroll
      for (int j = 0; j < Before; ++j) in[j] = halo[kBefore - Before + j];
    }
    if constexpr (After > 0) {
      float halo[kAfter];
      widen(after, halo);
#pragma unroll
      for (int j = 0; j < After; ++j) in[Before + V + j] = halo[j];
    }
  }
};

// Rows on their way in the stream.
template <int K, int S>
constexpr int kContiguousRowsComing = S == 1   ? K
                                      : K == 5 ? 3
                                               : 2;

// Blocks on a multiprocessor that registers are shared out for.
template <int K>
constexpr int kStreamBlocks = K == 3   ? 5
                              : K == 5 ? 3
                                       : 2;

// Left: columns of padding. V input columns a thread, V / S output columns.
template <typename Element, int K, int S, int Left, int V, Activations Known>
__global__ void __launch_bounds__(kContiguousThreads, kStreamBlocks<K>)
    dwconv_contiguous_stream(const DwconvCall call, const ContiguousStreamPlan plan) {
  constexpr int T = V / S, P = kContiguousRowsComing<K, S>;
  static_assert(kPeriod<K, S> % P == 0);
  uint32_t at = blockIdx.x * kContiguousThreads + threadIdx.x;
  if (at >= plan.threads) return;
  const int strip = static_cast<int>(plan.strips.divide(at));
  const int oh = static_cast<int>(plan.row_blocks.divide(at)) * plan.rows;
  const auto plane = static_cast<int64_t>(at);
  const int c = static_cast<int>(plan.channels.divide(at));

  const int H = call.H, W = call.W, OH = call.OH, OW = call.OW;
  const int left_rows = OH - oh, rows = left_rows < plan.rows ? left_rows : plan.rows;
  const int in_rows = (rows - 1) * S + K;
  const int ih = oh * S - static_cast<int>(call.top);
  const auto* x = static_cast<const Element*>(call.x) + plane * (H * W) + (ih * W + strip * V);
  auto* y = static_cast<Element*>(call.y) + plane * (OH * OW) + (oh * OW + strip * T);

  // Input row i waits in coming[i % P] from P rows before its turn.
  RowVectors<Element, V, Left, K - S - Left> coming[P];
  const bool at_left = strip == 0, at_right = (strip + 1) * V >= W;
  auto request = [&](int i, auto& into) {
    const bool inside = i < in_rows && static_cast<unsigned>(ih + i) < static_cast<unsigned>(H);
    into.request(x + i * W, inside, at_left, at_right);
  };
#pragma unroll
  for (int i = 0; i < P; ++i) request(i, coming[i]);
  float taps[K * K];
  load_taps_of<K, Element>(call, c, true, taps);
  const float scale = per_channel(call.scale, c, 1), shift = per_channel(call.shift, c, 0);

  walk<K, S, T>(
      in_rows, taps,
      [&](int i, int phase, auto& in) {
        coming[phase % P].widen_to(in);
        request(i + P, coming[phase % P]);
        return true;
      },
      [&](float (&z)[T]) {
        finish_strip<Known>(call, scale, shift, z);
        store(y, narrow<Element>(z));
        y += OW;
      });
}

// Few rows a thread where there is little to do, else so many that their halo costs little, but
// not so many that the last wave is much emptier than the others.
template <int S, int V>
ContiguousStreamPlan stream_plan(const DwconvCall& call) {
  const int64_t strips = call.W / V, in_row = call.N * call.C * strips;
  const int64_t one_wave = kMultiprocessors * 512;
  int64_t rows = call.OH;
  auto threads = [&] { return in_row * divide_up(call.OH, rows); };
  while ((rows > 14 && threads() < 8 * one_wave) || (rows > 1 && threads() < one_wave))
    rows = divide_up(rows, 2);
  if (!fit_int32({threads()}))
    throw std::runtime_error("dwconv_contiguous: more threads than 32-bit indices count");
  ContiguousStreamPlan plan;
  plan.strips = Divisor(static_cast<uint32_t>(strips));
  plan.row_blocks = Divisor(static_cast<uint32_t>(divide_up(call.OH, rows)));
  plan.channels = Divisor(static_cast<uint32_t>(call.C));
  plan.rows = static_cast<int>(rows);
  plan.threads = static_cast<uint32_t>(threads());
  return plan;
}

// The columns that a thread of the stream owns: as many as rows and pointers allow; 0 for none.
inline int stream_width(const DwconvCall& call) {
  const int64_t bytes = element_bytes(call), S = call.SH;
  auto fits = [&](int64_t V) {
    return call.W % V == 0 && call.OW * S == call.W && aligned(call.x, V * bytes) &&
           aligned(call.y, V / S * bytes);
  };
  // Registers for 7x7 taps leave no room for a strip of 8.
  if (bytes == 2 && call.KH < 7 && fits(8)) return 8;
  return fits(4) ? 4 : 0;
}

struct DwconvContiguousStream {
  static constexpr const char* kName = "contiguous_stream";

  static bool can_run(const DwconvCall& call) {
    const int64_t centre = call.KW / 2;
    // Threads are 32-bit numbers; rows are shared out only where they are few.
    return contiguous_fast_path(call) && stream_width(call) > 0 &&
           fit_int32({call.N * call.C * (call.W / 4)}) &&
           (call.left == centre || (call.SW == 2 && call.left == centre - 1));
  }

  template <typename Element, typename Launcher>
  static void launch(Launcher&& launcher, const DwconvCall& call) {
    with_contiguous_kernel(call, [&](auto kernel, auto stride) {
      constexpr int K = decltype(kernel)::value, S = decltype(stride)::value;
      if constexpr (sizeof(Element) == 2 && K < 7) {
        if (stream_width(call) == 8) return launch_width<Element, K, S, 8>(launcher, call);
      }
      launch_width<Element, K, S, 4>(launcher, call);
    });
  }

 private:
  template <typename Element, int K, int S, int V, typename Launcher>
  static void launch_width(Launcher&& launcher, const DwconvCall& call) {
    // At stride 2 TensorFlow's padding of an even width has a column less on the left.
    if constexpr (S == 2) {
      if (call.left < K / 2) return launch_left<Element, K, S, K / 2 - 1, V>(launcher, call);
    }
    launch_left<Element, K, S, K / 2, V>(launcher, call);
  }

  template <typename Element, int K, int S, int Left, int V, typename Launcher>
  static void launch_left(Launcher&& launcher, const DwconvCall& call) {
    const auto plan = stream_plan<S, V>(call);
    const Geometry geometry{divide_up(plan.threads, kContiguousThreads), kContiguousThreads, 0,
                            false};
    with_activations<true>(call, [&](auto known) {
      launcher(dwconv_contiguous_stream<Element, K, S, Left, V, known>, geometry, call, plan);
    });
  }
};

}  // namespace mnet::cuda
