// The variants of conv_bn_act and the choice between them. All are one kernel (conv_bn_act.cuh)
// with different tiles of pixels by output channels.
#pragma once

#include "conv_bn_act.cuh"
#include "variants.cuh"

namespace mnet::cuda {

template <typename Element, typename Tile, typename Launcher>
void launch_conv(Launcher&& launcher, const ConvCall& call) {
  const ConvPlan plan = conv_plan<Tile>(call);
  const Geometry geometry{static_cast<int64_t>(plan.tiles) * plan.groups, Tile::kThreads,
                          static_cast<int>(Tile::shared_bytes(plan.slots)), true};
  launcher(conv_bn_act_kernel<Element, Tile>, geometry, call, plan);
}

template <typename Tile>
bool conv_can_run(const ConvCall& call) {
  return conv_fits<Tile>(call.conv) &&
         Tile::shared_bytes(conv_plan<Tile>(call).slots) <= call.shared_limit;
}

// 128 by 128: fewest bytes past L2 and shared memory for each product, for what products bound.
struct ConvTile128 : ConvTile<4, 2, 4, 1, 3, 2, 1> {
  static constexpr const char* kName = "tile_128";
  static bool can_run(const ConvCall& call) { return conv_can_run<ConvTile128>(call); }
  template <typename Element, typename Launcher>
  static void launch(Launcher&& launcher, const ConvCall& call) {
    launch_conv<Element, ConvTile128>(launcher, call);
  }
};

// 64 by 64, in small blocks: while some wait or multiply, others store.
struct ConvTile64 : ConvTile<2, 2, 2, 1, 3, 5, 4> {
  static constexpr const char* kName = "tile_64";
  static bool can_run(const ConvCall& call) { return conv_can_run<ConvTile64>(call); }
  template <typename Element, typename Launcher>
  static void launch(Launcher&& launcher, const ConvCall& call) {
    launch_conv<Element, ConvTile64>(launcher, call);
  }
};

// For small batches: 16 by 32, so that there are blocks enough, and 8 warps that share the depth,
// so that it does not take long.
struct ConvTile16 : ConvTile<1, 1, 1, 8, 4, 2, 2> {
  static constexpr const char* kName = "tile_16";
  static bool can_run(const ConvCall& call) { return conv_can_run<ConvTile16>(call); }
  template <typename Element, typename Launcher>
  static void launch(Launcher&& launcher, const ConvCall& call) {
    launch_conv<Element, ConvTile16>(launcher, call);
  }
};

using ConvVariants = Variants<ConvTile128, ConvTile64, ConvTile16>;

// The largest tile whose blocks fill the machine; below 128 values of depth memory is the limit,
// and more blocks have more on their way.
inline const char* choose(const ConvCall& call) {
  const DwconvCall& conv = call.conv;
  const int64_t pixels = conv.N * conv.OH * conv.OW;
  auto fills = [&](int64_t tile) {
    return divide_up(pixels, tile) * divide_up(conv.K, tile) >= call.multiprocessors;
  };
  if (conv.KH * conv.KW * conv.C >= 128 && fills(128) && ConvTile128::can_run(call))
    return ConvTile128::kName;
  return fills(64) && ConvTile64::can_run(call) ? ConvTile64::kName : ConvTile16::kName;
}

}  // namespace mnet::cuda
