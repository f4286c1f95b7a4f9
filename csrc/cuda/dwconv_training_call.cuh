// dwconv_bn_act with the batch's own statistics, and its backward: what their kernels share.
//
//   mean, var = of conv(x) over N, OH, OW     scale = gamma / sqrt(var + eps)
//   z = scale * (conv(x) - mean) + beta       shift = beta - mean * scale
//   xhat = (conv - mean) / sqrt(var + eps)    dbeta = sum(dz), dgamma = sum(dz * xhat)
//   dconv = scale * (dz - dbeta / m - xhat * dgamma / m), m = N * OH * OW
//
// Forward: a pass that convolves and keeps only moments, one block that adds them up, and the
// forward kernel. Backward: a pass that convolves again and sums dz and dz * (conv - mean), one
// block that makes of them what dconv takes a channel, and then the steps of
// dwconv_backward_call.cuh. x is all that stays in memory between the two, beside mean and var.
//
// Memory traffic in tensors of y's size for stride 1: forward 1 + 2, backward 2 + 3, or 2 + 3 + 2
// where it is not one pass that makes dconv and all from it. Native moves 7 and 12: the
// convolution's output, statistics, normalisation and activation one by one.
//
// Accuracy: sums are shifted by a first value of their thread's, and merged (Chan, Golub and
// LeVeque, 1979) in a fixed order, differences of means before their squares: as good for a mean
// that is 10^5 standard deviations as for 0. No atomics: the same call gives the same bits.
#pragma once

#include "dwconv_backward_call.cuh"

namespace mnet::cuda {

struct DwconvTrainingCall {
  // Its forward call's scale and shift are the next two; in the backward, where z is made of
  // conv - mean, beta takes the place of shift.
  DwconvBackwardCall backward;
  float* scale;        // (K,), made of what follows
  float* shift;        // (K,); null in the backward
  const float* gamma;  // (K,), or null for 1
  const float* beta;   // (K,), or null for 0
  float* mean;         // (K,), of the convolution; written by the forward
  float* var;          // (K,), likewise, the biased one
  float eps;
  // The forward's: count, pivot, mean - pivot, sum of squares around the mean: (chunks, 4, K).
  float* moments;
  // The backward's: (K,) each; dgamma and dbeta may be null.
  float* by_conv;
  float* constant;
  float* dgamma;
  float* dbeta;
};

inline constexpr int kMomentRows = 4;

// Of some values: how many, their mean, and the sum of squares around it.
template <typename Real>
struct Moments {
  Real count, mean, squares;

  __device__ __forceinline__ void merge(Real other, Real other_mean, Real other_squares) {
    if (other == 0) return;
    const Real both = count + other, apart = other_mean - mean;
    const Real share = other / both;
    mean += apart * share;
    squares += other_squares + apart * apart * (count * share);
    count = both;
  }
};

// Moments of a thread's values, for V channels: sums of what they lie off the first.
template <int V>
struct ShiftedSums {
  int count = 0;
  float pivot[V] = {}, sums[V] = {}, squares[V] = {};

  __device__ __forceinline__ void add(const float (&values)[V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (count == 0) pivot[v] = values[v];
      const float off = values[v] - pivot[v];
      sums[v] += off;
      squares[v] += off * off;
    }
    ++count;
  }
};

// Shared memory of store_moments, laid out as that of store_partials: 3 * V rows, then the counts.
constexpr int moments_bytes(int V) {
  return (3 * V + 1) * (kBackwardThreads + 32 / V) * static_cast<int>(sizeof(float));
}

// Merges what the slices of a block have, in their order, and writes the chunk's rows. `k`: the
// block's first channel. Means are told apart relative to the first slice's pivot.
template <int V>
__device__ __forceinline__ void store_moments(const DwconvTrainingCall& call,
                                              const BackwardShare& share, int64_t chunk, int64_t k,
                                              const ShiftedSums<V>& own) {
  const int pitch = partials_pitch<V>(share.lanes), thread = static_cast<int>(threadIdx.x);
  auto* shared = reinterpret_cast<float*>(shared_memory());
  auto put = [&](int row, float value) {
    const float values[1] = {value};
    store_shared(shared + row * pitch + thread, narrow<float>(values));
  };
  const auto count = static_cast<float>(own.count);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const float mean = own.count == 0 ? 0 : own.sums[v] / count;
    put(v, own.pivot[v]);
    put(V + v, mean);
    put(2 * V + v, own.squares[v] - own.sums[v] * mean);
  }
  put(3 * V, count);
  __syncthreads();
  const int64_t K = call.backward.forward.K;
  const int channels = share.lanes * V;
  for (int at = thread; at < channels; at += kBackwardThreads) {
    const int lane = at / V, row = at % V;
    auto get = [&](int row, int slice) {
      return load_shared<1>(shared + row * pitch + lane + slice).lane[0];
    };
    const float pivot = get(row, 0);
    Moments<float> all{};
    for (int slice = 0; slice < kBackwardThreads; slice += share.lanes)
      all.merge(get(3 * V, slice), get(row, slice) - pivot + get(V + row, slice),
                get(2 * V + row, slice));
    const float rows[kMomentRows] = {all.count, pivot, all.mean, all.squares};
#pragma unroll
    for (int i = 0; i < kMomentRows; ++i) {
      const float value[1] = {rows[i]};
      store(call.moments + (chunk * kMomentRows + i) * K + k + at, narrow<float>(value),
            k + at < K);
    }
  }
}

enum class ChannelStep { moments, affine, terms };

}  // namespace mnet::cuda
