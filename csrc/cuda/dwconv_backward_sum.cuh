// The second step of the backward: the chunks' partial sums added, always in the same order.
#pragma once

#include "dwconv_backward_call.cuh"

namespace mnet::cuda {

// A block adds 32 neighbouring channels of one row of sums; each of its warps every 16th chunk.
inline constexpr int kSumChannels = 32, kSumSlices = 16;
inline constexpr int kSumThreads = kSumChannels * kSumSlices;

// Row `row` of channel k, added up: in the threads of slice 0. `shared`: kSumThreads floats.
__device__ __forceinline__ float sum_of_chunks(const DwconvBackwardCall& call, int64_t row,
                                               int64_t k, float* shared) {
  const int channel = static_cast<int>(threadIdx.x) % kSumChannels;
  const int slice = static_cast<int>(threadIdx.x) / kSumChannels;
  const int64_t K = call.forward.K;
  float sum[1] = {0};
#pragma unroll 8
  for (int64_t chunk = slice; chunk < call.chunks; chunk += kSumSlices)
    sum[0] += load<1>(call.partials + (chunk * call.rows + row) * K + k, k < K).lane[0];
  store_shared(shared + threadIdx.x, narrow<float>(sum));
  __syncthreads();
  if (slice != 0) return 0;
#pragma unroll
  for (int i = 1; i < kSumSlices; ++i)
    sum[0] += load_shared<1>(shared + i * kSumChannels + channel).lane[0];
  return sum[0];
}

template <typename Element>
__global__ void __launch_bounds__(kSumThreads)
    dwconv_backward_sum(const DwconvBackwardCall call, const int groups) {
  const int64_t K = call.forward.K, taps = call.forward.KH * call.forward.KW;
  const int64_t row = blockIdx.x / groups;
  const int64_t k =
      static_cast<int64_t>(blockIdx.x % groups) * kSumChannels + threadIdx.x % kSumChannels;
  const float sum[1] = {sum_of_chunks(call, row, k, reinterpret_cast<float*>(shared_memory()))};
  if (threadIdx.x >= kSumChannels || k >= K) return;
  if (row < taps)
    store(static_cast<Element*>(call.dweight) + k * taps + row, narrow<Element>(sum));
  else
    store((row == taps ? call.dscale : call.dshift) + k, narrow<float>(sum));
}

template <typename Element, typename Launcher>
void launch_backward_sum(Launcher&& launcher, const DwconvBackwardCall& call) {
  const int64_t groups = divide_up(call.forward.K, kSumChannels);
  launcher(dwconv_backward_sum<Element>,
           Geometry{call.rows * groups, kSumThreads, kSumThreads * static_cast<int>(sizeof(float)),
                    true},
           call, static_cast<int>(groups));
}

}  // namespace mnet::cuda
