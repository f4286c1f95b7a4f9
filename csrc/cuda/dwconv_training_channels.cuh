// The steps of training whose work is a few values a channel. For one source file: these kernels
// are no templates.
#pragma once

#include "dwconv_backward_sum.cuh"
#include "dwconv_training_call.cuh"

namespace mnet::cuda {

__device__ __forceinline__ void put_channel(float* values, int64_t k, float value) {
  const float one[1] = {value};
  if (values != nullptr) store(values + k, narrow<float>(one));
}

// scale and shift of channel k. Forward and backward come by the same ones.
__device__ __forceinline__ void store_affine(const DwconvTrainingCall& call, int64_t k, float mean,
                                             float var) {
  const float scale = per_channel(call.gamma, k, 1) / std::sqrt(var + call.eps);
  put_channel(call.scale, k, scale);
  put_channel(call.shift, k, std::fma(-mean, scale, per_channel(call.beta, k, 0)));
}

// The forward's second step: mean and var of all chunks, and the affine of its third.
inline constexpr int kMomentsShared = 3 * kSumThreads * static_cast<int>(sizeof(double));

__global__ void __launch_bounds__(kSumThreads)
    dwconv_training_moments(const DwconvTrainingCall call) {
  const int channel = static_cast<int>(threadIdx.x) % kSumChannels;
  const int slice = static_cast<int>(threadIdx.x) / kSumChannels;
  const int64_t K = call.backward.forward.K;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kSumChannels + channel;
  Moments<double> all{};
  for (int64_t chunk = slice; chunk < call.backward.chunks; chunk += kSumSlices) {
    auto row = [&](int i) {
      return load<1>(call.moments + (chunk * kMomentRows + i) * K + k, k < K).lane[0];
    };
    all.merge(row(0), static_cast<double>(row(1)) + row(2), row(3));
  }
  auto* shared = reinterpret_cast<double*>(shared_memory());
  const double rows[3] = {all.count, all.mean, all.squares};
#pragma unroll
  for (int i = 0; i < 3; ++i)
    store_shared(shared + i * kSumThreads + threadIdx.x, Vector<double, 1>{{rows[i]}});
  __syncthreads();
  if (slice != 0 || k >= K) return;
  for (int i = 1; i < kSumSlices; ++i) {
    auto row = [&](int r) {
      return load_shared<1>(shared + r * kSumThreads + i * kSumChannels + channel).lane[0];
    };
    all.merge(row(0), row(1), row(2));
  }
  const auto mean = static_cast<float>(all.mean);
  const auto var = static_cast<float>(all.count > 0 ? all.squares / all.count : 0);
  put_channel(call.mean, k, mean);
  put_channel(call.var, k, var);
  store_affine(call, k, mean, var);
}

// The backward's beginning: the affine that the forward had.
__global__ void __launch_bounds__(kSumChannels)
    dwconv_training_affine(const DwconvTrainingCall call) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kSumChannels + threadIdx.x;
  if (k >= call.backward.forward.K) return;
  store_affine(call, k, per_channel(call.mean, k, 0), per_channel(call.var, k, 0));
}

// After the backward's reduction: dgamma and dbeta, and what dconv takes of them.
__global__ void __launch_bounds__(kSumThreads)
    dwconv_training_terms(const DwconvTrainingCall call) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kSumChannels + threadIdx.x % kSumChannels;
  const float off_mean = sum_of_chunks(call.backward, 0, k, shared);
  const float all = sum_of_chunks(call.backward, 1, k, shared + kSumThreads);
  if (threadIdx.x >= kSumChannels || k >= call.backward.forward.K) return;
  const float by_std = 1 / std::sqrt(per_channel(call.var, k, 0) + call.eps);
  const float scale = per_channel(call.scale, k, 1);
  const DwconvCall& forward = call.backward.forward;
  const auto count = static_cast<float>(forward.N * forward.OH * forward.OW);
  put_channel(call.by_conv, k, -scale * by_std * by_std * off_mean / count);
  put_channel(call.constant, k, -scale * all / count);
  put_channel(call.dgamma, k, off_mean * by_std);
  put_channel(call.dbeta, k, all);
}

// The kernels whose work is a few values a channel.
template <typename Launcher>
void launch_channels(Launcher&& launcher, ChannelStep step, const DwconvTrainingCall& call) {
  const int64_t blocks = divide_up(call.backward.forward.K, kSumChannels);
  const int floats = kSumThreads * static_cast<int>(sizeof(float));
  switch (step) {
    case ChannelStep::moments:
      return launcher(dwconv_training_moments, Geometry{blocks, kSumThreads, kMomentsShared, true},
                      call);
    case ChannelStep::affine:
      return launcher(dwconv_training_affine, Geometry{blocks, kSumChannels, 0, false}, call);
    case ChannelStep::terms:
      return launcher(dwconv_training_terms, Geometry{blocks, kSumThreads, 2 * floats, true}, call);
  }
}

}  // namespace mnet::cuda
