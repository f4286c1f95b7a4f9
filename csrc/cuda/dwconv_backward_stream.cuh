// The backward's first step for 3x3, 5x5 and 7x7 kernels of stride 1 and 2, both layouts. A thread
// walks down a column with K rows of input in registers: each is loaded once and serves the
// convolution that z needs and then the weight's sums. Its sums stay in registers until the end of
// its chunk, over rows, columns and images.
//
// The rows are moved up in registers, a fifth of the instructions: K copies of the loop's body,
// each with the rows in their places, save that but keep so much alive that they spill.
//
// Channels_last: lanes are neighbouring vectors of channels, few enough that the columns between a
// block's slices, which each of two reads, are few too. Contiguous: a block owns one channel, of
// small planes two, and its slices are neighbouring columns (V = 1).
#pragma once

#include <type_traits>

#include "dwconv_backward_call.cuh"

namespace mnet::cuda {

// The items of a stream: each a column of `rows` output rows.
struct BackwardStreamPlan {
  BackwardShare share;
  int rows, row_blocks;
};

// Through: the pass through the batch's statistics, else the one with frozen ones.
template <typename Element, int K, int S, int V, int P, bool Through>
__global__ void __launch_bounds__(kBackwardThreads, K == 3 && V == 1 ? 5 : 2)
    dwconv_backward_stream(const DwconvBackwardCall call, const BackwardStreamPlan plan) {
  const DwconvCall& forward = call.forward;
  const BackwardShare& share = plan.share;
  const int lanes = share.lanes, thread = static_cast<int>(threadIdx.x);
  const int group = static_cast<int>(blockIdx.x % static_cast<uint32_t>(share.groups));
  const int chunk = static_cast<int>(blockIdx.x / static_cast<uint32_t>(share.groups));
  const int C = forward.C, H = forward.H, W = forward.W, OH = forward.OH, OW = forward.OW;
  const int c = (group * lanes + thread % lanes) * V;
  const bool here = c < C;
  const bool last = forward.channels_last;
  const int pixel = last ? C : 1;
  // 64-bit once an item: an image has less than 2^31 elements, a tensor may have more.
  const auto* x = static_cast<const Element*>(forward.x) + (last ? c : int64_t{c} * (H * W));
  const auto* dy = static_cast<const Element*>(call.dy) + (last ? c : int64_t{c} * (OH * OW));
  auto* dconv_to = static_cast<Element*>(call.dconv) + (last ? c : int64_t{c} * (OH * OW));

  float taps[K * K][V], scale[V], shift[V];
  float mean[Through ? V : 1], by_conv[Through ? V : 1], constant[Through ? V : 1];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    scale[v] = here ? per_channel(forward.scale, c + v, 1) : 0;
    shift[v] = here ? per_channel(forward.shift, c + v, 0) : 0;
    if constexpr (Through) {
      mean[v] = here ? per_channel(call.mean, c + v, 0) : 0;
      by_conv[v] = here ? per_channel(call.by_conv, c + v, 0) : 0;
      constant[v] = here ? per_channel(call.constant, c + v, 0) : 0;
    }
#pragma unroll
    for (int t = 0; t < K * K; ++t)
      taps[t][v] = widen(load<1>(static_cast<const Element*>(forward.weight) +
                                     static_cast<int64_t>(c + v) * (K * K) + t,
                                 here)
                             .lane[0]);
  }

  constexpr int kRows = Through ? K * K : K * K + 2;
  float sums[kRows][V] = {};
  const int per_chunk = static_cast<int>(share.per_chunk), items = static_cast<int>(share.items);
  const int end =
      here ? (chunk + 1 < static_cast<int>(share.chunks) ? (chunk + 1) * per_chunk : items) : 0;
  for (int item = chunk * per_chunk + thread / lanes; item < end;
       item += kBackwardThreads / lanes) {
    const int ow = item % OW, row_block = item / OW % plan.row_blocks;
    const int n = item / OW / plan.row_blocks, oh = row_block * plan.rows;
    const int rows = OH - oh < plan.rows ? OH - oh : plan.rows;
    const int ih = oh * S - static_cast<int>(forward.top);
    const int iw = ow * S - static_cast<int>(forward.left);
    const auto* from = x + static_cast<int64_t>(n) * (H * W) * C + (ih * W + iw) * pixel;
    const int64_t out = static_cast<int64_t>(n) * (OH * OW) * C + (oh * OW + ow) * pixel;

    auto request = [&](int i, int j) {
      const bool inside = static_cast<unsigned>(ih + i) < static_cast<unsigned>(H) &&
                          static_cast<unsigned>(iw + j) < static_cast<unsigned>(W);
      return load<V>(from + (i * W + j) * pixel, inside && i < (rows - 1) * S + K);
    };
    auto request_dy = [&](int r) { return load<V>(dy + out + r * OW * pixel, r < rows); };

    // The rows that output row r sees, and those that wait: coming[p] holds what output row r + p
    // adds to them, S rows of x and one of dy.
    float window[K][K][V];
    Vector<Element, V> coming[P][S][K], coming_dy[P];
#pragma unroll
    for (int p = 0; p < P; ++p) {
      coming_dy[p] = request_dy(p);
#pragma unroll
      for (int s = 0; s < S; ++s)
#pragma unroll
        for (int j = 0; j < K; ++j) coming[p][s][j] = request(p * S + K - S + s, j);
    }
#pragma unroll
    for (int i = 0; i < K - S; ++i)
#pragma unroll
      for (int j = 0; j < K; ++j) widen(request(i, j), window[i][j]);

#pragma unroll 1
    for (int r = 0; r < rows; ++r) {
#pragma unroll
      for (int s = 0; s < S; ++s)
#pragma unroll
        for (int j = 0; j < K; ++j) {
          widen(coming[0][s][j], window[K - S + s][j]);
#pragma unroll
          for (int p = 1; p < P; ++p) coming[p - 1][s][j] = coming[p][s][j];
          coming[P - 1][s][j] = request((r + P) * S + K - S + s, j);
        }
      float dz[V], conv[V] = {}, z[V], dconv[V];
      widen(coming_dy[0], dz);
#pragma unroll
      for (int p = 1; p < P; ++p) coming_dy[p - 1] = coming_dy[p];
      coming_dy[P - 1] = request_dy(r + P);
#pragma unroll
      for (int kh = 0; kh < K; ++kh)
#pragma unroll
        for (int kw = 0; kw < K; ++kw)
#pragma unroll
          for (int v = 0; v < V; ++v) conv[v] += window[kh][kw][v] * taps[kh * K + kw][v];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if constexpr (Through) conv[v] -= mean[v];
        z[v] = conv[v] * scale[v] + shift[v];
      }
      activation_backward_all(forward.activation, forward.slope, z, dz);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        dconv[v] = dz[v] * scale[v];
        if constexpr (Through) {
          dconv[v] += conv[v] * by_conv[v] + constant[v];
        } else {
          sums[K * K][v] += dz[v] * conv[v];
          sums[K * K + 1][v] += dz[v];
        }
      }
      store(dconv_to + out + r * OW * pixel, narrow<Element>(dconv), call.dconv != nullptr);
#pragma unroll
      for (int kh = 0; kh < K; ++kh)
#pragma unroll
        for (int kw = 0; kw < K; ++kw)
#pragma unroll
          for (int v = 0; v < V; ++v) {
            sums[kh * K + kw][v] += window[kh][kw][v] * dconv[v];
            if (kh >= S) window[kh - S][kw][v] = window[kh][kw][v];
          }
    }
  }
  if (call.partials == nullptr) return;
  store_partials(call, share.lanes, chunk, 0, kRows, int64_t{group} * lanes * V, sums);
}

template <bool Through>
struct DwconvBackwardStreamOf {
  static constexpr const char* kName = "stream";

  static bool can_run(const DwconvBackwardCall& call) {
    const DwconvCall& f = call.forward;
    const int64_t K = f.KH, S = f.SH;
    const int64_t height = std::max(f.H, (f.OH + K) * S + K), width = std::max(f.W, f.OW * S + K);
    return f.multiplier == 1 && f.DH == 1 && f.DW == 1 && f.KW == K &&
           (K == 3 || K == 5 || (K == 7 && !Through)) && f.SW == S && (S == 1 || S == 2) &&
           fit_int32({height * width * f.C, f.N * f.OH * f.OW, f.C * K * K});
  }

  static BackwardShare share(const DwconvBackwardCall& call) { return plan(call).share; }

  template <typename Element, typename Launcher>
  static void launch(Launcher&& launcher, const DwconvBackwardCall& call) {
    auto stride = [&](auto kernel) {
      if (call.forward.SH == 1) return launch_width<Element, kernel, 1>(launcher, call);
      return launch_width<Element, kernel, 2>(launcher, call);
    };
    if (call.forward.KH == 3) return stride(std::integral_constant<int, 3>{});
    if (call.forward.KH == 5) return stride(std::integral_constant<int, 5>{});
    if constexpr (!Through) return stride(std::integral_constant<int, 7>{});
  }

 private:
  // Taps, their sums and the window take 3*K*K*V registers.
  static constexpr int widest(int64_t K) { return K == 3 ? 4 : K == 5 ? 2 : 1; }

  // Rows on their way: about 128 bytes a thread, as far as there are registers.
  static constexpr int rows_coming(int K, int row_bytes) {
    const int most = K == 3 ? 4 : K == 5 ? 2 : 1, rows = 128 / row_bytes;
    return rows < 1 ? 1 : rows < most ? rows : most;
  }

  static int width(const DwconvBackwardCall& call) {
    const DwconvCall& f = call.forward;
    const int V = widest(f.KH);
    const int64_t bytes = V * (f.dtype == DType::float32 ? 4 : 2);
    const bool fits = f.channels_last && f.C % V == 0 && aligned(f.x, bytes) &&
                      aligned(call.dy, bytes) && aligned(call.dconv, bytes);
    return fits ? V : 1;
  }

  // Rows of an item: all, unless there are then too few items for the blocks.
  static BackwardStreamPlan plan(const DwconvBackwardCall& call) {
    const DwconvCall& f = call.forward;
    const int V = width(call);
    int64_t rows = f.OH;
    auto threads = [&] { return f.N * f.OW * divide_up(f.OH, rows) * (f.C / V); };
    while (rows > 7 && threads() < kBackwardBlocks * kBackwardThreads) rows = divide_up(rows, 2);
    const int64_t row_blocks = divide_up(f.OH, rows);
    return {backward_share(f, V, f.N * row_blocks * f.OW, V > 1 ? 8 : 32), static_cast<int>(rows),
            static_cast<int>(row_blocks)};
  }

  template <typename Element, int K, int S, typename Launcher>
  static void launch_width(Launcher&& launcher, const DwconvBackwardCall& call) {
    if (width(call) == 1) return launch_as<Element, K, S, 1>(launcher, call);
    if constexpr (widest(K) > 1) launch_as<Element, K, S, widest(K)>(launcher, call);
  }

  template <typename Element, int K, int S, int V, typename Launcher>
  static void launch_as(Launcher&& launcher, const DwconvBackwardCall& call) {
    const BackwardStreamPlan plan = DwconvBackwardStreamOf::plan(call);
    const bool sums = call.partials != nullptr;
    constexpr int P = rows_coming(K, (S * K + 1) * V * static_cast<int>(sizeof(Element)));
    const Geometry geometry{plan.share.blocks(), kBackwardThreads,
                            sums ? partials_bytes(static_cast<int>(call.rows), V) : 0, sums};
    launcher(dwconv_backward_stream<Element, K, S, V, P, Through>, geometry, call, plan);
  }
};

using DwconvBackwardStream = DwconvBackwardStreamOf<false>;
// 7x7 kernels are the general one's there.
using DwconvBackwardStreamThrough = DwconvBackwardStreamOf<true>;

}  // namespace mnet::cuda
