// The passes of training that only sum, for 3x3 and 5x5 kernels of stride 1 and 2, both layouts:
// moments of the convolution, or the sums of dz * (conv - mean) and of dz.
//
// A thread walks down a strip of T columns as the forward's stream does (dwconv_channels_last.cuh):
// an input row is loaded and converted once and added to all the output rows that it reaches. In
// place of a store, a finished row goes into sums that stay in registers until the end of the
// thread's chunk, over strips, rows and images.
//
// Channels_last: lanes are eight neighbouring vectors of channels and slices are neighbouring
// strips, whose halo they share. Contiguous: a block owns one channel, of small
// planes two (V = 1).
#pragma once

#include <type_traits>

#include "dwconv_channels_last.cuh"
#include "dwconv_training_call.cuh"

namespace mnet::cuda {

struct TrainingStreamPlan {
  BackwardShare share;
  Divisor strips, row_blocks;
  int rows;  // of a row block
};

// Channels of a thread, in elements of so many bytes: the reduction has more to keep in registers.
constexpr int training_width(int K, int bytes, bool reduction) {
  if (K == 5) return reduction && bytes == 4 ? 2 : 4;
  return reduction ? 4 : 16 / bytes;
}

// Reduction: the backward's pass, else that of the statistics.
template <typename Element, int K, int S, int V, int P, bool Reduction>
__global__ void __launch_bounds__(kBackwardThreads, K == 3 && V == 1 ? 5 : 2)
    dwconv_training_stream(const DwconvTrainingCall call, const TrainingStreamPlan plan) {
  constexpr int T = kStrip, kColumns = (T - 1) * S + K;
  constexpr int kRing = (K + S - 1) / S, kPeriod = kRing * S;
  static_assert(kPeriod % P == 0);
  const DwconvCall& forward = call.backward.forward;
  const BackwardShare& share = plan.share;
  const int lanes = share.lanes, thread = static_cast<int>(threadIdx.x);
  const int group = static_cast<int>(blockIdx.x % static_cast<uint32_t>(share.groups));
  const int chunk = static_cast<int>(blockIdx.x / static_cast<uint32_t>(share.groups));
  const int C = forward.C, H = forward.H, W = forward.W, OH = forward.OH, OW = forward.OW;
  const int c = (group * lanes + thread % lanes) * V;
  const bool here = c < C, last = forward.channels_last;
  const int pixel = last ? C : 1;
  // 64-bit once an item: an image has less than 2^31 elements, a tensor may have more.
  const auto* x = static_cast<const Element*>(forward.x) + (last ? c : int64_t{c} * (H * W));
  const auto* dy =
      static_cast<const Element*>(call.backward.dy) + (last ? c : int64_t{c} * (OH * OW));

  float taps[K * K][V];
  float scale[Reduction ? V : 1], beta[Reduction ? V : 1], mean[Reduction ? V : 1];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if constexpr (Reduction) {
      scale[v] = here ? per_channel(call.scale, c + v, 1) : 0;
      beta[v] = here ? per_channel(call.beta, c + v, 0) : 0;
      mean[v] = here ? per_channel(call.mean, c + v, 0) : 0;
    }
#pragma unroll
    for (int t = 0; t < K * K; ++t)
      taps[t][v] = widen(load<1>(static_cast<const Element*>(forward.weight) +
                                     static_cast<int64_t>(c + v) * (K * K) + t,
                                 here)
                             .lane[0]);
  }

  ShiftedSums<V> moments;  // one of these two is not used
  float gradients[2][V] = {};
  const int per_chunk = static_cast<int>(share.per_chunk), items = static_cast<int>(share.items);
  const int end =
      here ? (chunk + 1 < static_cast<int>(share.chunks) ? (chunk + 1) * per_chunk : items) : 0;
  for (int item = chunk * per_chunk + thread / lanes; item < end;
       item += kBackwardThreads / lanes) {
    auto at = static_cast<uint32_t>(item);
    const int ow = static_cast<int>(plan.strips.divide(at)) * T;
    const int oh = static_cast<int>(plan.row_blocks.divide(at)) * plan.rows;
    const auto n = static_cast<int64_t>(at);
    const int rows = OH - oh < plan.rows ? OH - oh : plan.rows, in_rows = (rows - 1) * S + K;
    const int ih = oh * S - static_cast<int>(forward.top);
    const int iw = ow * S - static_cast<int>(forward.left);
    const auto* from = x + n * (H * W) * C + (ih * W + iw) * pixel;
    const auto* gradient = dy + n * (OH * OW) * C + (oh * OW + ow) * pixel;

    auto request = [&](int i, int j) {
      const bool inside = i < in_rows && static_cast<unsigned>(ih + i) < static_cast<unsigned>(H) &&
                          static_cast<unsigned>(iw + j) < static_cast<unsigned>(W);
      return load<V>(from + (i * W + j) * pixel, inside);
    };
    auto request_dy = [&](int r, int t) {
      return load<V>(gradient + (r * OW + t) * pixel, Reduction && r < rows && ow + t < OW);
    };
    // Input row i waits in coming[i % P] from P rows before its turn; dy from one row before.
    Vector<Element, V> coming[P][kColumns], coming_dy[T];
#pragma unroll
    for (int i = 0; i < P; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) coming[i][j] = request(i, j);
#pragma unroll
    for (int t = 0; t < T; ++t) coming_dy[t] = request_dy(0, t);

    float sums[kRing][T * V] = {};
    int row = 0;
#pragma unroll 1
    for (int first = 0; first < in_rows; first += kPeriod) {
#pragma unroll
      for (int phase = 0; phase < kPeriod; ++phase) {
        const int i = first + phase;
        if (i >= in_rows) break;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          float in[V];
          widen(coming[phase % P][j], in);
          coming[phase % P][j] = request(i + P, j);
          add_column<K, S, T, V>(phase, j, in, taps, sums);
        }
        if ((phase - (K - 1) + kPeriod) % S != 0 || i < K - 1) continue;
        float (&conv)[T * V] = sums[(phase - (K - 1) + kPeriod) / S % kRing];
        if constexpr (Reduction) {
          float z[T * V], dz[T * V];
#pragma unroll
          for (int t = 0; t < T; ++t) {
            float wide[V];
            widen(coming_dy[t], wide);
            coming_dy[t] = request_dy(row + 1, t);
#pragma unroll
            for (int v = 0; v < V; ++v) {
              dz[t * V + v] = wide[v];
              conv[t * V + v] -= mean[v];
              z[t * V + v] = conv[t * V + v] * scale[v] + beta[v];
            }
          }
          activation_backward_all(forward.activation, forward.slope, z, dz);
#pragma unroll
          for (int t = 0; t < T; ++t)
            if (ow + t < OW)
#pragma unroll
              for (int v = 0; v < V; ++v) {
                gradients[0][v] += dz[t * V + v] * conv[t * V + v];
                gradients[1][v] += dz[t * V + v];
              }
        } else {
#pragma unroll
          for (int t = 0; t < T; ++t) {
            float values[V];
#pragma unroll
            for (int v = 0; v < V; ++v) values[v] = conv[t * V + v];
            if (ow + t < OW) moments.add(values);
          }
        }
        ++row;
      }
    }
  }
  const int64_t k = int64_t{group} * lanes * V;
  if constexpr (Reduction)
    store_partials(call.backward, share.lanes, chunk, 0, 2, k, gradients);
  else
    store_moments(call, share, chunk, k, moments);
}

struct DwconvTrainingStream {
  static constexpr const char* kName = "stream";

  static bool can_run(const DwconvTrainingCall& call) {
    const DwconvCall& f = call.backward.forward;
    const int64_t K = f.KH, S = f.SH;
    const int64_t height = std::max(f.H, (f.OH + K) * S + K), width = std::max(f.W, f.OW * S + K);
    return f.multiplier == 1 && f.DH == 1 && f.DW == 1 && f.KW == K && (K == 3 || K == 5) &&
           f.SW == S && (S == 1 || S == 2) &&
           fit_int32({height * width * f.C, f.N * f.OH * f.OW, f.C * K * K});
  }

  static BackwardShare share(const DwconvTrainingCall& call) { return plan(call).share; }

  template <typename Element, typename Launcher>
  static void launch(Launcher&& launcher, const DwconvTrainingCall& call) {
    with_kernel_to_5(call.backward.forward, [&](auto kernel, auto stride) {
      constexpr int K = decltype(kernel)::value, S = decltype(stride)::value;
      if (call.backward.pass == BackwardPass::reduction)
        launch_width<Element, K, S, true>(launcher, call);
      else
        launch_width<Element, K, S, false>(launcher, call);
    });
  }

 private:
  template <typename F>
  static void with_kernel_to_5(const DwconvCall& call, F&& f) {
    auto stride = [&](auto kernel) {
      if (call.SH == 1) return f(kernel, std::integral_constant<int, 1>{});
      return f(kernel, std::integral_constant<int, 2>{});
    };
    if (call.KH == 3) return stride(std::integral_constant<int, 3>{});
    return stride(std::integral_constant<int, 5>{});
  }

  static int width(const DwconvTrainingCall& call) {
    const DwconvCall& f = call.backward.forward;
    const int64_t bytes = f.dtype == DType::float32 ? 4 : 2;
    const int64_t V = training_width(static_cast<int>(f.KH), static_cast<int>(bytes),
                                     call.backward.pass == BackwardPass::reduction);
    const bool fits = f.channels_last && f.C % V == 0 && aligned(f.x, V * bytes) &&
                      aligned(call.backward.dy, V * bytes);
    return fits ? static_cast<int>(V) : 1;
  }

  // Rows of an item: all, unless there are then too few items for the blocks.
  static TrainingStreamPlan plan(const DwconvTrainingCall& call) {
    const DwconvCall& f = call.backward.forward;
    const int V = width(call);
    const int64_t strips = divide_up(f.OW, kStrip);
    int64_t rows = f.OH;
    auto threads = [&] { return f.N * strips * divide_up(f.OH, rows) * (f.C / V); };
    while (rows > 7 && threads() < kBackwardBlocks * kBackwardThreads) rows = divide_up(rows, 2);
    const int64_t row_blocks = divide_up(f.OH, rows);
    TrainingStreamPlan plan;
    plan.share = backward_share(f, V, f.N * row_blocks * strips, V > 1 ? 8 : 32);
    plan.strips = Divisor(static_cast<uint32_t>(strips));
    plan.row_blocks = Divisor(static_cast<uint32_t>(row_blocks));
    plan.rows = static_cast<int>(rows);
    return plan;
  }

  template <typename Element, int K, int S, bool Reduction, typename Launcher>
  static void launch_width(Launcher&& launcher, const DwconvTrainingCall& call) {
    if (width(call) == 1) return launch_as<Element, K, S, 1, Reduction>(launcher, call);
    constexpr int V = training_width(K, sizeof(Element), Reduction);
    launch_as<Element, K, S, V, Reduction>(launcher, call);
  }

  template <typename Element, int K, int S, int V, bool Reduction, typename Launcher>
  static void launch_as(Launcher&& launcher, const DwconvTrainingCall& call) {
    const TrainingStreamPlan plan = DwconvTrainingStream::plan(call);
    const int shared = Reduction ? partials_bytes(2, V) : moments_bytes(V);
    launcher(dwconv_training_stream<Element, K, S, V, kRowsComing<K, S>, Reduction>,
             Geometry{plan.share.blocks(), kBackwardThreads, shared, true}, call, plan);
  }
};

}  // namespace mnet::cuda
