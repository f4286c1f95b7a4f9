// The backward of dwconv_bn_act: what its kernels share. With frozen statistics:
//
//   z = scale * conv(x) + shift      recomputed in float32 from x, never in memory
//   dz = dy * act'(z)                dshift = sum(dz), dscale = sum(dz * conv(x))
//   dconv = dz * scale               dweight = sum(dconv * x), dx = transposed conv(dconv)
//
// Three steps. The first reads x and dy once, writes dconv in x's dtype and leaves one row of
// float32 sums a chunk of the work: (chunks, KH * KW + 2, K), for each tap, then dscale, dshift.
// The second adds the chunks in their order. The third makes dx from dconv, for stride 1 by the
// forward kernels. No atomics: the same call gives the same bits. For 3x3 kernels in channels_last
// the first step makes dx as well and keeps dconv in shared memory, in float32
// (dwconv_backward_one_pass.cuh).
//
// Memory traffic in tensors of y's size, x being S*S of them (stride S): the first step moves
// S*S + 1 + 1, the third 1 + S*S: 5 for stride 1, 11 for stride 2; in one pass 3 and 9. Native
// moves 5 for z and its activation, 3 for dz, 2 for dconv, 3 for dscale, 1 for dshift, 2 for dx
// and at least 2 for dweight: 18 for stride 1.
//
// Instructions that nvcc 13 makes of them for sm_90, bfloat16, stride 1 and ReLU6, an element of y:
// 54 in the first step and 19 in the third; 63 in one pass, 27 of which are the multiply-adds of
// its three convolutions. While a GPU of 132 multiprocessors moves three tensors at 4.3 TB/s it
// starts 41 of them in 16-bit types and 83 in float32. By that alone one pass would take 0.6 of the
// three steps' time in float32 and 0.8 in 16-bit types, and no less on planes of 7 x 7.
//
// Through the batch's own statistics (dwconv_training_call.cuh) the first step becomes two: one
// that only sums, and one whose dconv = dz * scale + (conv - mean) * by_conv + constant.
#pragma once

#include <cmath>

#include "../activation_backward.h"
#include "dwconv_call.cuh"

namespace mnet::cuda {

// What a pass over x does, over dy too for all but the second.
enum class BackwardPass {
  frozen,      // dconv and all sums: KH * KW + 2 rows
  statistics,  // moments of the convolution alone: the forward's, in training
  reduction,   // the sums of dz * (conv - mean) and of dz alone: 2 rows
  through,     // dconv with these in it, and the weight's sums: KH * KW rows
};

struct DwconvBackwardCall {
  DwconvCall forward;  // its y is not used
  const void* dy;      // (N, K, OH, OW); dtype and layout of this and all below are x's
  void* dconv;         // (N, K, OH, OW); null where nothing reads it
  float* partials;     // (chunks, rows, K); null where no sums are wanted
  int64_t chunks, rows;
  BackwardPass pass;
  const float* mean;      // (K,), taken from the convolution first; null for 0
  const float* by_conv;   // (K,), for the pass through the statistics, as is
  const float* constant;  // (K,)
  void* dx;               // (N, C, H, W), or null
  void* flipped;          // (K, 1, KH, KW), room for the transposed convolution's weight
  void* dweight;          // (K, 1, KH, KW), or null, and then the next two are, too
  float* dscale;          // (K,)
  float* dshift;          // (K,)
};

inline constexpr int kBackwardThreads = 128;

// How the first step is shared out. A block owns the channels of one group and the items (pixels,
// or column strips) of one chunk; its threads are `lanes` vectors of channels by slices of items.
struct BackwardShare {
  int lanes;
  int64_t groups, chunks, items;
  int64_t per_chunk;  // items

  int64_t blocks() const { return groups * chunks; }
};

// About four waves of blocks on the largest GPUs; a constant, so that sums do not depend on which
// GPU runs. More chunks would cost the second step more than they gain the first.
inline constexpr int64_t kBackwardBlocks = 1056;

// most_lanes: neighbouring vectors of channels a block takes.
inline BackwardShare backward_share(const DwconvCall& call, int V, int64_t items,
                                    int most_lanes = 32) {
  BackwardShare share{};
  share.items = items;
  const int64_t vectors = call.K / V;
  share.lanes = 1;
  if (call.channels_last) {
    // As many as share a warp with the fewest that have no channel.
    share.lanes = most_lanes;
    for (int lanes : {16, 8, 4})
      if (lanes < most_lanes &&
          divide_up(vectors, lanes) * lanes < divide_up(vectors, share.lanes) * share.lanes)
        share.lanes = lanes;
  } else if (call.H * call.W * element_bytes(call) < 128) {
    share.lanes = 2;  // planes so small have a good part of their sectors in common with the next
  }
  share.groups = divide_up(vectors, share.lanes);
  const int64_t slices = kBackwardThreads / share.lanes;
  const int64_t wanted = divide_up(kBackwardBlocks, share.groups);
  share.per_chunk =
      divide_up(divide_up(items, std::min(wanted, divide_up(items, slices))), slices) * slices;
  share.chunks = divide_up(items, share.per_chunk);
  return share;
}

// dz[i] from z[i] and dy[i], which it replaces: the switch is passed once for all of them.
template <Activations Known = Activations::any, int Count>
__device__ __forceinline__ void activation_backward_all(Activation activation, float slope,
                                                        const float (&z)[Count],
                                                        float (&dy)[Count]) {
  if constexpr (Known == Activations::clamps) {
    // Comparisons with NaN are false: a bound that is NaN is none.
    const float low = activation == Activation::identity ? NAN : 0;
    const float high = activation == Activation::relu6 ? 6 : NAN;
#pragma unroll
    for (int i = 0; i < Count; ++i) dy[i] = z[i] <= low || z[i] >= high ? 0 : dy[i];
    return;
  }
  switch (activation) {
#define MNET_CASE(name)                                            \
  case Activation::name:                                           \
    _Pragma("unroll") for (int i = 0; i < Count; ++i) dy[i] =      \
        activation_backward(Activation::name, slope, z[i], dy[i]); \
    break;
    MNET_CASE(identity)
    MNET_CASE(relu)
    MNET_CASE(relu6)
    MNET_CASE(leaky_relu)
    MNET_CASE(hardswish)
    MNET_CASE(silu)
    MNET_CASE(hardsigmoid)
#undef MNET_CASE
  }
}

// Shared memory of store_partials: a row a sum of a vector's channels, a column a thread.
constexpr int partials_bytes(int count, int V, int threads = kBackwardThreads) {
  return count * V * (threads + 32 / V) * static_cast<int>(sizeof(float));
}

// Rows lie so far apart that a warp's threads, which read neighbouring channels, hit different
// banks.
template <int V>
__device__ __forceinline__ int partials_pitch(int lanes, int threads = kBackwardThreads) {
  return threads + (lanes < 32 / V ? lanes : 32 / V);
}

// Adds what the slices of a block have summed, in their order, and writes rows `first` to
// first + Count (those below `end`) of the chunk's partial sums. `k` is the block's first channel.
template <int Count, int V>
__device__ __forceinline__ void store_partials(const DwconvBackwardCall& call, int lanes,
                                               int64_t chunk, int64_t first, int64_t end, int64_t k,
                                               const float (&sums)[Count][V],
                                               int threads = kBackwardThreads) {
  const int pitch = partials_pitch<V>(lanes, threads);
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < Count * V; ++i) {
    const float value[1] = {sums[i / V][i % V]};
    store_shared(shared + i * pitch + thread, narrow<float>(value));
  }
  __syncthreads();
  const int64_t K = call.forward.K;
  const int channels = lanes * V;
  for (int at = thread; at < Count * channels; at += threads) {
    const int row = at / channels, channel = at % channels;
    const float* from = shared + (row * V + channel % V) * pitch + channel / V;
    float sum[1] = {0};
#pragma unroll 8
    for (int lane = 0; lane < threads; lane += lanes) sum[0] += load_shared<1>(from + lane).lane[0];
    store(call.partials + (chunk * call.rows + first + row) * K + k + channel, narrow<float>(sum),
          first + row < end && k + channel < K);
  }
}

}  // namespace mnet::cuda
