// Depthwise convolution, any kernel size, stride, dilation, multiplier and layout: one output
// element a thread, neighbours in memory are neighbours in a warp. What no other variant can run.
#pragma once

#include "dwconv_call.cuh"

namespace mnet::cuda {

inline constexpr int kGeneralThreads = 256;

// Index: int, or int64_t for tensors that need it.
template <typename Element, typename Index>
__global__ void __launch_bounds__(kGeneralThreads) dwconv_general(const DwconvCall call) {
  const Index C = call.C, H = call.H, W = call.W, K = call.K, OH = call.OH, OW = call.OW;
  const Index at = static_cast<Index>(blockIdx.x) * kGeneralThreads + threadIdx.x;
  if (at >= static_cast<Index>(call.N) * K * OH * OW) return;
  Index n, k, oh, ow;
  if (call.channels_last) {
    k = at % K, ow = at / K % OW, oh = at / K / OW % OH, n = at / K / OW / OH;
  } else {
    ow = at % OW, oh = at / OW % OH, k = at / OW / OH % K, n = at / OW / OH / K;
  }
  const Index c = k / static_cast<Index>(call.multiplier);
  const Index pixel = call.channels_last ? C : 1;
  const Index plane = call.channels_last ? n * H * W * C + c : (n * C + c) * H * W;
  const auto* x = static_cast<const Element*>(call.x) + plane;
  const auto* weight = static_cast<const Element*>(call.weight);

  const Index KH = call.KH, KW = call.KW;
  const Index first_row = oh * static_cast<Index>(call.SH) - static_cast<Index>(call.top);
  const Index first_column = ow * static_cast<Index>(call.SW) - static_cast<Index>(call.left);
  float sum = 0;
  for (Index kh = 0; kh < KH; ++kh) {
    const Index ih = first_row + kh * static_cast<Index>(call.DH);
    if (ih < 0 || ih >= H) continue;
    for (Index kw = 0; kw < KW; ++kw) {
      const Index iw = first_column + kw * static_cast<Index>(call.DW);
      const bool inside = iw >= 0 && iw < W;
      const float in = widen(load<1>(x + (ih * W + iw) * pixel, inside).lane[0]);
      sum += in * widen(load<1>(weight + (k * KH + kh) * KW + kw, inside).lane[0]);
    }
  }
  float z[1] = {sum * per_channel(call.scale, k, 1) + per_channel(call.shift, k, 0)};
  activate_all(call.activation, call.slope, z);
  store(static_cast<Element*>(call.y) + at, narrow<Element>(z));
}

struct DwconvGeneral {
  static constexpr const char* kName = "general";

  static bool can_run(const DwconvCall&) { return true; }

  template <typename Element, typename Launcher>
  static void launch(Launcher&& launcher, const DwconvCall& call) {
    const int64_t outputs = call.N * call.K * call.OH * call.OW;
    const Geometry geometry{divide_up(outputs, kGeneralThreads), kGeneralThreads, 0, false};
    const int64_t padded_height = (call.OH - 1) * call.SH + call.KH * call.DH;
    const int64_t padded_width = (call.OW - 1) * call.SW + call.KW * call.DW;
    if (fit_int32({outputs, call.N * call.C * call.H * call.W, call.K * call.KH * call.KW,
                   padded_height, padded_width}))
      launcher(dwconv_general<Element, int>, geometry, call);
    else
      launcher(dwconv_general<Element, int64_t>, geometry, call);
  }
};

}  // namespace mnet::cuda
