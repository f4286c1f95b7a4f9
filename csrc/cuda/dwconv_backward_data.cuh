// The third step of the backward: dx from dconv, the transposed convolution as a gather. Nothing
// is written twice, nothing multiplied with inserted zeros.
//   transposed  stride 1: the forward kernels with the taps in reverse
//   parity      stride 2: 2x2 input pixels, on which each tap falls once
//   general     any call: every tap of every input pixel is asked whether it falls on an output
#pragma once

#include <algorithm>

#include "dwconv_backward_call.cuh"

namespace mnet::cuda {

inline constexpr int kDataThreads = 256;

template <typename Element, typename Index>
__global__ void __launch_bounds__(kDataThreads, sizeof(Index) == 8 ? 3 : 6)
    dwconv_backward_data_general(const DwconvBackwardCall call) {
  const DwconvCall& forward = call.forward;
  const Index C = forward.C, H = forward.H, W = forward.W, K = forward.K;
  const Index OH = forward.OH, OW = forward.OW, KH = forward.KH, KW = forward.KW;
  const Index at = static_cast<Index>(blockIdx.x) * kDataThreads + threadIdx.x;
  if (at >= static_cast<Index>(forward.N) * C * H * W) return;
  Index n = at;
  auto next = [&](Index size) {
    const Index whole = n / size, place = n - whole * size;
    n = whole;
    return place;
  };
  Index c = 0;
  if (forward.channels_last) c = next(C);
  const Index iw = next(W), ih = next(H);
  if (!forward.channels_last) c = next(C);
  const auto* dconv = static_cast<const Element*>(call.dconv);
  const auto* weight = static_cast<const Element*>(forward.weight);
  const Index SH = forward.SH, SW = forward.SW, multiplier = forward.multiplier;

  float sum[1] = {0};
  for (Index k = c * multiplier; k < (c + 1) * multiplier; ++k)
    for (Index kh = 0; kh < KH; ++kh) {
      const Index row = ih + static_cast<Index>(forward.top) - kh * static_cast<Index>(forward.DH);
      const Index oh = row / SH;
      if (row < 0 || oh * SH != row || oh >= OH) continue;
      for (Index kw = 0; kw < KW; ++kw) {
        const Index column =
            iw + static_cast<Index>(forward.left) - kw * static_cast<Index>(forward.DW);
        const Index ow = column / SW;
        const bool falls = column >= 0 && ow * SW == column && ow < OW;
        const Index out = forward.channels_last ? ((n * OH + oh) * OW + ow) * K + k
                                                : ((n * K + k) * OH + oh) * OW + ow;
        sum[0] += widen(load<1>(dconv + out, falls).lane[0]) *
                  widen(load<1>(weight + (k * KH + kh) * KW + kw, falls).lane[0]);
      }
    }
  store(static_cast<Element*>(call.dx) + at, narrow<Element>(sum));
}

struct DwconvBackwardDataGeneral {
  static constexpr const char* kName = "general";

  static bool can_run(const DwconvBackwardCall&) { return true; }

  template <typename Element, typename Launcher>
  static void launch(Launcher&& launcher, const DwconvBackwardCall& call) {
    const DwconvCall& forward = call.forward;
    const int64_t inputs = forward.N * forward.C * forward.H * forward.W;
    const Geometry geometry{divide_up(inputs, kDataThreads), kDataThreads, 0, false};
    if (fit_int32({inputs, forward.N * forward.K * forward.OH * forward.OW,
                   forward.K * forward.KH * forward.KW, forward.H + forward.top,
                   forward.W + forward.left, forward.KH * forward.DH, forward.KW * forward.DW}))
      launcher(dwconv_backward_data_general<Element, int>, geometry, call);
    else
      launcher(dwconv_backward_data_general<Element, int64_t>, geometry, call);
  }
};

// dx of 2x2 input pixels and V channels, the upper left of which has even coordinates where padding
// is counted in: tap (kh, kw) falls on the pixel of its own parity alone. A thread walks down a
// column of such squares with the taps in registers.
struct ParityPlan {
  int first_row, first_column;  // squares, counted with the padding
  int columns, rows;            // squares in a row; in a thread's part of a column
  int row_blocks;
  int64_t threads;
};

template <typename Element, int K, int V>
__global__ void __launch_bounds__(kDataThreads)
    dwconv_backward_data_parity(const DwconvBackwardCall call, const ParityPlan plan) {
  constexpr int R = (K + 1) / 2;  // rows and columns of outputs that a square sees
  const DwconvCall& forward = call.forward;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kDataThreads + threadIdx.x;
  if (thread >= plan.threads) return;
  const int C = forward.C, H = forward.H, W = forward.W, OH = forward.OH, OW = forward.OW;
  const bool last = forward.channels_last;
  const int vectors = C / V, pixel = last ? C : 1;
  auto at = static_cast<uint32_t>(thread);
  int c = 0, column = 0, row_block = 0;
  auto next = [&](int size) {
    const auto place = static_cast<int>(at % static_cast<uint32_t>(size));
    at /= static_cast<uint32_t>(size);
    return place;
  };
  if (last) c = next(vectors) * V;
  column = next(plan.columns);
  row_block = next(plan.row_blocks);
  if (!last) c = next(C);
  const auto n = static_cast<int64_t>(at);
  const auto* dconv = static_cast<const Element*>(call.dconv) + n * (OH * OW) * C +
                      (last ? c : int64_t{c} * (OH * OW));
  auto* dx = static_cast<Element*>(call.dx) + n * (H * W) * C + (last ? c : int64_t{c} * (H * W));

  float taps[K * K][V];
#pragma unroll
  for (int t = 0; t < K * K; ++t)
#pragma unroll
    for (int v = 0; v < V; ++v)
      taps[t][v] = widen(load<1>(static_cast<const Element*>(forward.weight) +
                                 static_cast<int64_t>(c + v) * (K * K) + t)
                             .lane[0]);

  const int square_column = plan.first_column + column;
  const int iw = 2 * square_column - static_cast<int>(forward.left);
  const int first = plan.first_row + row_block * plan.rows;
#pragma unroll 1
  for (int square_row = first; square_row < first + plan.rows; ++square_row) {
    const int ih = 2 * square_row - static_cast<int>(forward.top);
    if (ih >= H) break;
    Vector<Element, V> seen[R][R];
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
      for (int j = 0; j < R; ++j) {
        const int oh = square_row - i, ow = square_column - j;
        seen[i][j] = load<V>(dconv + (oh * OW + ow) * pixel,
                             static_cast<unsigned>(oh) < static_cast<unsigned>(OH) &&
                                 static_cast<unsigned>(ow) < static_cast<unsigned>(OW));
      }
    float sum[4][V] = {};
#pragma unroll
    for (int kh = 0; kh < K; ++kh)
#pragma unroll
      for (int kw = 0; kw < K; ++kw) {
        float in[V];
        widen(seen[kh / 2][kw / 2], in);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[kh % 2 * 2 + kw % 2][v] += in[v] * taps[kh * K + kw][v];
      }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = ih + i / 2, col = iw + i % 2;
      store(dx + (row * W + col) * pixel, narrow<Element>(sum[i]),
            static_cast<unsigned>(row) < static_cast<unsigned>(H) &&
                static_cast<unsigned>(col) < static_cast<unsigned>(W));
    }
  }
}

struct DwconvBackwardDataParity {
  static constexpr const char* kName = "parity";

  static bool can_run(const DwconvBackwardCall& call) {
    const DwconvCall& f = call.forward;
    const int64_t K = f.KH;
    const int64_t height = std::max(f.H + 2, f.OH + K), width = std::max(f.W + 2, f.OW + K);
    return f.multiplier == 1 && f.DH == 1 && f.DW == 1 && f.KW == K &&
           (K == 3 || K == 5 || K == 7) && f.SH == 2 && f.SW == 2 &&
           fit_int32({height * width * f.C, f.N * f.C * height * width / 4, f.C * K * K,
                      f.H + f.top, f.W + f.left});
  }

  template <typename Element, typename Launcher>
  static void launch(Launcher&& launcher, const DwconvBackwardCall& call) {
    // Taps take K*K*V registers.
    if (call.forward.KH == 3) return launch_as<Element, 3, 16 / sizeof(Element)>(launcher, call);
    if (call.forward.KH == 5) return launch_as<Element, 5, 4>(launcher, call);
    launch_as<Element, 7, 2>(launcher, call);
  }

 private:
  template <typename Element, int K, int V, typename Launcher>
  static void launch_as(Launcher&& launcher, const DwconvBackwardCall& call) {
    const DwconvCall& f = call.forward;
    if constexpr (V > 1)
      if (!f.channels_last || f.C % V != 0 || !aligned(call.dx, V * sizeof(Element)) ||
          !aligned(call.dconv, V * sizeof(Element)))
        return launch_as<Element, K, 1>(launcher, call);
    ParityPlan plan;
    plan.first_row = static_cast<int>(f.top / 2), plan.first_column = static_cast<int>(f.left / 2);
    plan.columns = static_cast<int>((f.left + f.W - 1) / 2) - plan.first_column + 1;
    const int squares = static_cast<int>((f.top + f.H - 1) / 2) - plan.first_row + 1;
    const int64_t in_row = f.N * (f.C / V) * plan.columns;
    plan.rows = squares;
    // Long columns share their taps, short ones fill the machine.
    while (plan.rows > 4 && in_row * divide_up(squares, plan.rows) < kFullMachine)
      plan.rows = static_cast<int>(divide_up(plan.rows, 2));
    plan.row_blocks = static_cast<int>(divide_up(squares, plan.rows));
    plan.threads = in_row * plan.row_blocks;
    launcher(dwconv_backward_data_parity<Element, K, V>,
             Geometry{divide_up(plan.threads, kDataThreads), kDataThreads, 0, false}, call, plan);
  }

  // Threads: some waves of what the largest GPUs run at once.
  static constexpr int64_t kFullMachine = 132 * 2048;
};

// Each channel's taps in reverse.
template <typename Element>
__global__ void __launch_bounds__(kDataThreads)
    dwconv_backward_flip(const DwconvBackwardCall call) {
  const int64_t taps = call.forward.KH * call.forward.KW;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kDataThreads + threadIdx.x;
  if (at >= call.forward.K * taps) return;
  store(static_cast<Element*>(call.flipped) + at,
        load<1>(static_cast<const Element*>(call.forward.weight) + at / taps * taps +
                (taps - 1 - at % taps)));
}

struct DwconvBackwardDataTransposed {
  static constexpr const char* kName = "transposed";

  static bool can_run(const DwconvBackwardCall& call) {
    const DwconvCall& f = call.forward;
    // More padding than the kernel reaches would be a negative one here.
    return f.SH == 1 && f.SW == 1 && f.multiplier == 1 && f.top <= (f.KH - 1) * f.DH &&
           f.left <= (f.KW - 1) * f.DW;
  }

  // The forward call that computes dx.
  static DwconvCall transposed(const DwconvBackwardCall& call) {
    DwconvCall t = call.forward;
    t.x = call.dconv, t.weight = call.flipped, t.y = call.dx;
    t.scale = t.shift = nullptr;
    t.activation = Activation::identity;
    t.H = call.forward.OH, t.W = call.forward.OW;
    t.OH = call.forward.H, t.OW = call.forward.W;
    t.top = (t.KH - 1) * t.DH - t.top, t.left = (t.KW - 1) * t.DW - t.left;
    return t;
  }

  // run_forward(call) starts a forward kernel.
  template <typename Element, typename Launcher, typename Forward>
  static void launch(Launcher&& launcher, const DwconvBackwardCall& call, Forward&& run_forward) {
    const DwconvCall& f = call.forward;
    launcher(dwconv_backward_flip<Element>,
             Geometry{divide_up(f.K * f.KH * f.KW, kDataThreads), kDataThreads, 0, false}, call);
    run_forward(transposed(call));
  }
};

}  // namespace mnet::cuda
