// Backward for any kernel size, stride, dilation, multiplier and layout: what no other variant can
// run. One step more than the others: the weight's sums are taken from the stored dconv, nine taps
// at a time.
#pragma once

#include "dwconv_backward_call.cuh"

namespace mnet::cuda {

inline constexpr int kTapsAtOnce = 9;

// The output channel and the items of a thread.
template <typename Index>
struct BackwardPlace {
  Index k, item, end, step;
};

template <typename Index>
__device__ __forceinline__ BackwardPlace<Index> backward_place(const DwconvBackwardCall& call,
                                                               const BackwardShare& share,
                                                               Index group, Index chunk) {
  const Index lanes = share.lanes, thread = threadIdx.x;
  BackwardPlace<Index> at;
  at.k = group * lanes + thread % lanes;
  at.step = kBackwardThreads / lanes;
  at.item = chunk * static_cast<Index>(share.per_chunk) + thread / lanes;
  at.end = (chunk + 1) * static_cast<Index>(share.per_chunk);
  if (at.end > static_cast<Index>(share.items)) at.end = share.items;
  if (at.k >= static_cast<Index>(call.forward.K)) at.end = 0;
  return at;
}

// Where output pixel `item` of channel k lies in y, and what it sees of x: its plane, and the row
// and column of the first tap.
template <typename Index>
struct OutputPixel {
  Index y, plane, ih, iw;

  __device__ __forceinline__ OutputPixel(const DwconvCall& call, Index item, Index k) {
    const Index C = call.C, H = call.H, W = call.W, K = call.K, OH = call.OH, OW = call.OW;
    const Index n = item / (OH * OW), pixel = item % (OH * OW);
    const Index c = k / static_cast<Index>(call.multiplier);
    y = call.channels_last ? item * K + k : (n * K + k) * (OH * OW) + pixel;
    plane = call.channels_last ? n * H * W * C + c : (n * C + c) * H * W;
    ih = pixel / OW * static_cast<Index>(call.SH) - static_cast<Index>(call.top);
    iw = pixel % OW * static_cast<Index>(call.SW) - static_cast<Index>(call.left);
  }
};

// x[plane, ih, iw], 0 outside.
template <typename Element, typename Index>
__device__ __forceinline__ float input_at(const DwconvCall& call, Index plane, Index ih, Index iw,
                                          bool valid) {
  const Index H = call.H, W = call.W, pixel = call.channels_last ? static_cast<Index>(call.C) : 1;
  const bool inside = valid && ih >= 0 && ih < H && iw >= 0 && iw < W;
  return widen(
      load<1>(static_cast<const Element*>(call.x) + plane + (ih * W + iw) * pixel, inside).lane[0]);
}

// The convolution at output pixel `out`; `weight`: its channel's.
template <typename Element, typename Index>
__device__ __forceinline__ float convolution_at(const DwconvCall& call, const Element* weight,
                                                const OutputPixel<Index>& out) {
  const Index KH = call.KH, KW = call.KW;
  float conv = 0;
  for (Index kh = 0; kh < KH; ++kh)
    for (Index kw = 0; kw < KW; ++kw)
      conv += input_at<Element>(call, out.plane, out.ih + kh * static_cast<Index>(call.DH),
                                out.iw + kw * static_cast<Index>(call.DW), true) *
              widen(load<1>(weight + kh * KW + kw).lane[0]);
  return conv;
}

// dconv, and the partial sums of dz * (conv - mean) and dz, where the pass has them.
template <typename Element, typename Index>
__global__ void __launch_bounds__(kBackwardThreads)
    dwconv_backward_general(const DwconvBackwardCall call, const BackwardShare share) {
  const DwconvCall& forward = call.forward;
  const Index groups = share.groups, chunk = static_cast<Index>(blockIdx.x) / groups;
  const Index group = static_cast<Index>(blockIdx.x) % groups;
  const auto at = backward_place<Index>(call, share, group, chunk);
  const Index KH = forward.KH, KW = forward.KW;
  const auto* weight = static_cast<const Element*>(forward.weight) + at.k * (KH * KW);
  const bool here = at.k < static_cast<Index>(forward.K);
  const float scale = here ? per_channel(forward.scale, at.k, 1) : 0;
  const float shift = here ? per_channel(forward.shift, at.k, 0) : 0;
  const float mean = here ? per_channel(call.mean, at.k, 0) : 0;
  const float by_conv = here ? per_channel(call.by_conv, at.k, 0) : 0;
  const float constant = here ? per_channel(call.constant, at.k, 0) : 0;

  float sums[2][1] = {};
  for (Index item = at.item; item < at.end; item += at.step) {
    const OutputPixel<Index> out(forward, item, at.k);
    const float conv = convolution_at<Element>(forward, weight, out) - mean;
    const float z[1] = {conv * scale + shift};
    float dz[1] = {widen(load<1>(static_cast<const Element*>(call.dy) + out.y).lane[0])};
    activation_backward_all(forward.activation, forward.slope, z, dz);
    float dconv[1] = {dz[0] * scale};
    if (call.pass == BackwardPass::through) dconv[0] += conv * by_conv + constant;
    store(static_cast<Element*>(call.dconv) + out.y, narrow<Element>(dconv), call.dconv != nullptr);
    sums[0][0] += dz[0] * conv;
    sums[1][0] += dz[0];
  }
  if (call.partials == nullptr || call.pass == BackwardPass::through) return;
  store_partials(call, share.lanes, chunk, call.rows - 2, call.rows, group * share.lanes, sums);
}

// The partial sums of dweight, from the stored dconv: one group of taps a block.
template <typename Element, typename Index>
__global__ void __launch_bounds__(kBackwardThreads)
    dwconv_backward_general_weight(const DwconvBackwardCall call, const BackwardShare share) {
  const DwconvCall& forward = call.forward;
  const Index groups = share.groups, chunks = share.chunks;
  const Index group = static_cast<Index>(blockIdx.x) % groups;
  const Index chunk = static_cast<Index>(blockIdx.x) / groups % chunks;
  const Index first = static_cast<Index>(blockIdx.x) / groups / chunks * kTapsAtOnce;
  const Index KH = forward.KH, KW = forward.KW;
  const auto at = backward_place<Index>(call, share, group, chunk);

  float sums[kTapsAtOnce][1] = {};
  for (Index item = at.item; item < at.end; item += at.step) {
    const OutputPixel<Index> out(forward, item, at.k);
    const float dconv = widen(load<1>(static_cast<const Element*>(call.dconv) + out.y).lane[0]);
#pragma unroll
    for (int i = 0; i < kTapsAtOnce; ++i) {
      const Index tap = first + i;
      const Index ih = out.ih + tap / KW * static_cast<Index>(forward.DH);
      const Index iw = out.iw + tap % KW * static_cast<Index>(forward.DW);
      sums[i][0] += dconv * input_at<Element>(forward, out.plane, ih, iw, tap < KH * KW);
    }
  }
  store_partials(call, share.lanes, chunk, first, KH * KW, group * share.lanes, sums);
}

struct DwconvBackwardGeneral {
  static constexpr const char* kName = "general";

  static bool can_run(const DwconvBackwardCall&) { return true; }

  static BackwardShare share(const DwconvBackwardCall& call) {
    const DwconvCall& forward = call.forward;
    return backward_share(forward, 1, forward.N * forward.OH * forward.OW);
  }

  // Whether 32-bit indices reach all of the call.
  static bool fits_int32(const DwconvCall& forward) {
    const int64_t outputs = forward.N * forward.K * forward.OH * forward.OW;
    const int64_t padded_height = (forward.OH - 1) * forward.SH + forward.KH * forward.DH;
    const int64_t padded_width = (forward.OW - 1) * forward.SW + forward.KW * forward.DW;
    return fit_int32({outputs, forward.N * forward.C * forward.H * forward.W,
                      forward.K * forward.KH * forward.KW, padded_height, padded_width});
  }

  template <typename Element, typename Launcher>
  static void launch(Launcher&& launcher, const DwconvBackwardCall& call) {
    if (fits_int32(call.forward))
      launch_as<Element, int>(launcher, call);
    else
      launch_as<Element, int64_t>(launcher, call);
  }

 private:
  template <typename Element, typename Index, typename Launcher>
  static void launch_as(Launcher&& launcher, const DwconvBackwardCall& call) {
    const BackwardShare share = DwconvBackwardGeneral::share(call);
    const bool sums = call.partials != nullptr;
    const bool pair = sums && call.pass != BackwardPass::through;
    launcher(dwconv_backward_general<Element, Index>,
             Geometry{share.blocks(), kBackwardThreads, pair ? partials_bytes(2, 1) : 0, pair},
             call, share);
    const int64_t tap_groups = divide_up(call.forward.KH * call.forward.KW, kTapsAtOnce);
    if (sums && call.pass != BackwardPass::reduction)
      launcher(dwconv_backward_general_weight<Element, Index>,
               Geometry{share.blocks() * tap_groups, kBackwardThreads,
                        partials_bytes(kTapsAtOnce, 1), true},
               call, share);
  }
};

}  // namespace mnet::cuda
