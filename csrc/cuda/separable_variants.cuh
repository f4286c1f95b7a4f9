// The variants of separable_conv and the choice between them. All are one kernel
// (separable_conv.cuh) with different tiles.
//   resident_*  the block's middle stays in shared memory, all channels of it: computed once for
//               all of the block's tiles of output channels
//   stream_64   the middle passes by, two chunks of channels at a time: any number of channels, for
//               the price of computing it once for every 128 output channels
#pragma once

#include "separable_conv.cuh"
#include "variants.cuh"

namespace mnet::cuda {

template <typename Tile>
int64_t separable_shared_bytes(const SeparableCall& call) {
  return Tile::shared_bytes(separable_plan<Tile>(call).slots);
}

template <typename Element, typename Tile, typename Launcher>
void launch_separable(Launcher&& launcher, const SeparableCall& call) {
  const SeparablePlan plan = separable_plan<Tile>(call);
  const Geometry geometry{divide_up(plan.pixels, Tile::kPixels) * plan.splits, Tile::kThreads,
                          static_cast<int>(Tile::shared_bytes(plan.slots)), true};
  launcher(separable_conv_kernel<Element, Tile>, geometry, call, plan);
}

template <typename Tile>
bool separable_can_run(const SeparableCall& call) {
  return separable_fits(call) && separable_shared_bytes<Tile>(call) <= call.shared_limit;
}

// Weights pass L2 once for 128 pixels: what large products are bound by.
struct SeparableResident128 : SeparableTile<4, 2, 4, 1, 2, false, 1> {
  static constexpr const char* kName = "resident_128";
  static bool can_run(const SeparableCall& call) {
    return separable_can_run<SeparableResident128>(call);
  }
  template <typename Element, typename Launcher>
  static void launch(Launcher&& launcher, const SeparableCall& call) {
    launch_separable<Element, SeparableResident128>(launcher, call);
  }
};

// Two blocks a multiprocessor up to 512 channels: one loads while the other multiplies.
struct SeparableResident64 : SeparableTile<2, 2, 4, 1, 3, false, 2> {
  static constexpr const char* kName = "resident_64";
  static bool can_run(const SeparableCall& call) {
    return separable_can_run<SeparableResident64>(call);
  }
  template <typename Element, typename Launcher>
  static void launch(Launcher&& launcher, const SeparableCall& call) {
    launch_separable<Element, SeparableResident64>(launcher, call);
  }
};

// For small batches: 16 pixels by 32 output channels, so that there are blocks enough, and 16 warps
// that share the depth of the product, so that it does not take long.
struct SeparableResident16 : SeparableTile<1, 1, 1, 16, 3, false, 1> {
  static constexpr const char* kName = "resident_16";
  static bool can_run(const SeparableCall& call) {
    return separable_can_run<SeparableResident16>(call);
  }
  template <typename Element, typename Launcher>
  static void launch(Launcher&& launcher, const SeparableCall& call) {
    launch_separable<Element, SeparableResident16>(launcher, call);
  }
};

struct SeparableStream64 : SeparableTile<2, 2, 4, 1, 3, true, 1> {
  static constexpr const char* kName = "stream_64";
  static bool can_run(const SeparableCall& call) {
    return separable_can_run<SeparableStream64>(call);
  }
  template <typename Element, typename Launcher>
  static void launch(Launcher&& launcher, const SeparableCall& call) {
    launch_separable<Element, SeparableStream64>(launcher, call);
  }
};

using SeparableVariants =
    Variants<SeparableResident128, SeparableResident64, SeparableResident16, SeparableStream64>;

// The largest tile whose blocks fill the machine; those of 128 pixels split between at most two (a
// split computes the middle again), those of 64 as far as there are tiles of output channels. Else
// the smallest.
inline const char* choose(const SeparableCall& call) {
  const int64_t pixels = call.depthwise.N * call.depthwise.OH * call.depthwise.OW;
  const int64_t channel_tiles = divide_up(call.K, 128);
  auto fills = [&](int64_t tile_pixels, int64_t splits) {
    return divide_up(pixels, tile_pixels) * std::min(channel_tiles, splits) >= call.multiprocessors;
  };
  // Below 256 channels memory is the limit, and more blocks have more loads on their way.
  if (call.depthwise.K >= 256 && fills(128, 2) && SeparableResident128::can_run(call))
    return SeparableResident128::kName;
  const bool large = fills(64, channel_tiles);
  if (large && SeparableResident64::can_run(call)) return SeparableResident64::kName;
  if (!large && SeparableResident16::can_run(call)) return SeparableResident16::kName;
  return SeparableStream64::kName;
}

}  // namespace mnet::cuda
