// What the contiguous (NCHW) forward kernels share: K x K, stride S, no dilation, one output a
// channel. A thread owns a strip of T output columns of a plane and walks down it: an input row is
// converted once and added to all the output rows it reaches, whose sums wait in registers.
//   dwconv_contiguous_stream.cuh   rows straight from global memory, where they are whole vectors
//   dwconv_contiguous_run.cuh      planes by way of shared memory: any width, padding, alignment
#pragma once

#include <algorithm>
#include <type_traits>

#include "divisor.cuh"
#include "dwconv_call.cuh"

namespace mnet::cuda {

inline constexpr int kContiguousThreads = 128;
inline constexpr int64_t kMultiprocessors = 132;  // of an H200

// The taps of a channel; valid: whether there is such a channel.
template <int K, typename Element>
__device__ __forceinline__ void load_taps_of(const DwconvCall& call, int c, bool valid,
                                             float (&taps)[K * K]) {
  const auto* from = static_cast<const Element*>(call.weight) + static_cast<int64_t>(c) * (K * K);
#pragma unroll
  for (int i = 0; i < K * K; ++i) taps[i] = widen(load<1>(from + i, valid).lane[0]);
}

template <Activations Known, int T>
__device__ __forceinline__ void finish_strip(const DwconvCall& call, float scale, float shift,
                                             float (&z)[T]) {
#pragma unroll
  for (int t = 0; t < T; ++t) z[t] = z[t] * scale + shift;
  activate_all<Known>(call.activation, call.slope, z);
}

// Input rows after which a walk's registers have their first roles again.
template <int K, int S>
constexpr int kPeriod = (K + S - 1) / S * S;

// Down a strip. row(i, phase, in) gives input row i, phase being i modulo the period, or false for
// a row of zeros; emit(sums) takes an output row's sums and may change them.
template <int K, int S, int T, typename Row, typename Emit>
__device__ __forceinline__ void walk(int in_rows, const float (&taps)[K * K], Row&& row,
                                     Emit&& emit) {
  constexpr int kRing = (K + S - 1) / S;  // output rows that an input row reaches
  // Output row r waits in sums[r % kRing]. Rows before the first are summed and dropped.
  float sums[kRing][T] = {};
  for (int first = 0; first < in_rows; first += kPeriod<K, S>) {
#pragma unroll
    for (int phase = 0; phase < kPeriod<K, S>; ++phase) {
      const int i = first + phase;
      if (i >= in_rows) return;
      float in[(T - 1) * S + K];
      if (row(i, phase, in)) {
#pragma unroll
        for (int kh = phase % S; kh < K; kh += S) {
          float (&sum)[T] = sums[(phase - kh + kPeriod<K, S>) / S % kRing];
#pragma unroll
          for (int kw = 0; kw < K; ++kw)
#pragma unroll
            for (int t = 0; t < T; ++t) sum[t] += in[t * S + kw] * taps[kh * K + kw];
        }
      }
      if ((phase - (K - 1) + kPeriod<K, S>) % S == 0) {
        float (&done)[T] = sums[(phase - (K - 1) + kPeriod<K, S>) / S % kRing];
        if (i >= K - 1) emit(done);
#pragma unroll
        for (int t = 0; t < T; ++t) done[t] = 0;
      }
    }
  }
}

// Calls f(constant K, constant S).
template <typename F>
void with_contiguous_kernel(const DwconvCall& call, F&& f) {
  auto stride = [&](auto kernel) {
    if (call.SH == 1) return f(kernel, std::integral_constant<int, 1>{});
    return f(kernel, std::integral_constant<int, 2>{});
  };
  if (call.KH == 3) return stride(std::integral_constant<int, 3>{});
  if (call.KH == 5) return stride(std::integral_constant<int, 5>{});
  return stride(std::integral_constant<int, 7>{});
}

inline bool contiguous_fast_path(const DwconvCall& call) {
  const int64_t K = call.KH, S = call.SH;
  const int64_t height = std::max(call.H, (call.OH - 1) * S + K);
  const int64_t width = std::max(call.W, (call.OW - 1) * S + K);
  return !call.channels_last && call.multiplier == 1 && call.DH == 1 && call.DW == 1 &&
         call.KW == K && (K == 3 || K == 5 || K == 7) && call.SW == S && (S == 1 || S == 2) &&
         fit_int32({height, width, height * width, call.N * call.C});
}

}  // namespace mnet::cuda
