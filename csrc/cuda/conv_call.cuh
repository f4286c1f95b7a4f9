// conv_bn_act on a GPU: the call, and how it is shared out. A dense convolution is a product of two
// matrices:
//
//   y (pixels, K) = act(scale * (patches (pixels, depth) * weight^T (depth, K)) + shift)
//
// depth = KH*KW*C, channels innermost, as channels_last weights lie. The patches are never in
// global memory: a chunk of them is gathered from x into shared memory.
#pragma once

#include <algorithm>

#include "divisor.cuh"
#include "product.cuh"

namespace mnet::cuda {

struct ConvCall {
  DwconvCall conv;  // channels_last, weight (K, C, KH, KW) too; its multiplier is not used
  int multiprocessors, shared_limit;  // of the device; bytes that a block may have
  bool tf32;                          // float32 products may be tf32's
};

// Where a chunk of patches comes from.
enum class Gather {
  rows,      // 1x1, stride 1: a patch is its pixel; vectors of 16 bytes, copied asynchronously
  vectors,   // likewise, of any kernel: each vector lies in one tap
  elements,  // any call: few or odd channels, a misaligned x
};

// Each block has one tile of output channels and every `groups`-th tile of pixels, one after the
// other: what comes next is on its way while sums are stored, and weights may stay where they are.
struct ConvPlan {
  Divisor channels;        // of a tap: in vectors, or for Gather::elements in elements
  Divisor kernel_columns;  // taps to rows of taps
  Divisor columns, rows;   // of the output
  int64_t pixels;
  int pixel_tiles, tiles;  // of pixels, of output channels
  int groups;              // blocks that share a tile of output channels
  int depth, chunks;
  int lanes_log2;  // of the vectors that are gathered of each row of a chunk
  int slots;       // chunks of weights that shared memory holds
  bool weights_stay;
  Gather gather;
  bool wide_weights, wide_outputs;  // in vectors of 16 bytes
  bool small;                       // pixels can be divided by Divisor
};

// Blocks: of a multiprocessor, for which registers are kept free; of float32 FloatBlocks, whose
// multiply-adds take more.
template <int MI, int WM, int WN, int WK, int Stages, int Blocks, int FloatBlocks>
struct ConvTile : ProductTile<MI, WM, WN, WK, Stages> {
  using Product = ProductTile<MI, WM, WN, WK, Stages>;
  static constexpr int kWindowBytes = 16 * Product::kPixels;
  static constexpr int kAffineBytes = 8 * Product::kChannels;
  static_assert(Product::kChannels <= Product::kThreads);

  template <typename Element>
  MNET_HOST_DEVICE static constexpr int blocks() {
    return std::is_same_v<Element, float> ? FloatBlocks : Blocks;
  }

  // Of a block, with so many chunks of weights.
  static int64_t shared_bytes(int64_t slots) {
    return kWindowBytes + kAffineBytes + Stages * Product::kPixelBytes +
           slots * Product::kWeightBytes + Product::kPartBytes;
  }
};

// ---- the host's side ----

inline Gather gather_of(const DwconvCall& conv) {
  if (conv.C * element_bytes(conv) % 16 != 0 || !aligned(conv.x, 16)) return Gather::elements;
  const bool same = conv.KH == 1 && conv.KW == 1 && conv.SH == 1 && conv.SW == 1 && conv.top == 0 &&
                    conv.left == 0 && conv.OH == conv.H && conv.OW == conv.W;
  return same ? Gather::rows : Gather::vectors;
}

// Whether 32-bit indices reach all of the call; single elements are found by offsets in an image.
template <typename Tile>
bool conv_fits(const DwconvCall& conv) {
  const int64_t height = std::max(conv.H, (conv.OH - 1) * conv.SH + conv.KH * conv.DH);
  const int64_t width = std::max(conv.W, (conv.OW - 1) * conv.SW + conv.KW * conv.DW);
  return fit_int32({height, width, conv.top, conv.left, conv.KH * conv.KW * conv.C, conv.K,
                    divide_up(conv.N * conv.OH * conv.OW, Tile::kPixels)}) &&
         (gather_of(conv) != Gather::elements || fit_int32({height * width * conv.C}));
}

template <typename Tile>
ConvPlan conv_plan(const ConvCall& call) {
  const DwconvCall& conv = call.conv;
  if (!conv_fits<Tile>(conv))
    throw std::runtime_error("rows, columns, channels, an image or tiles of pixels beyond 32 bits");
  const int64_t bytes = element_bytes(conv),
                most = bytes == 4 && !call.tf32 ? Tile::template blocks<float>()
                                                : Tile::template blocks<tf32>(),
                depth = conv.KH * conv.KW * conv.C;
  ConvPlan plan;
  plan.gather = gather_of(conv);
  plan.channels = Divisor(
      static_cast<uint32_t>(plan.gather == Gather::elements ? conv.C : conv.C * bytes / 16));
  plan.kernel_columns = Divisor(static_cast<uint32_t>(conv.KW));
  plan.columns = Divisor(static_cast<uint32_t>(conv.OW));
  plan.rows = Divisor(static_cast<uint32_t>(conv.OH));
  plan.pixels = conv.N * conv.OH * conv.OW;
  plan.small = fit_int32({plan.pixels});
  const int64_t pixel_tiles = divide_up(plan.pixels, Tile::kPixels);
  plan.pixel_tiles = static_cast<int>(pixel_tiles);
  plan.tiles = static_cast<int>(divide_up(conv.K, Tile::kChannels));
  plan.depth = static_cast<int>(depth);
  plan.chunks = static_cast<int>(divide_up(depth * bytes, Tile::kSlabs * kSlabBytes));
  plan.lanes_log2 = 0;
  const int64_t vectors = std::min<int64_t>(2 * divide_up(depth * bytes, 32), Tile::kVectors);
  while ((1 << plan.lanes_log2) < vectors) ++plan.lanes_log2;
  const auto groups = [&](int64_t slots) {
    const int64_t blocks =
        std::clamp<int64_t>(call.shared_limit / Tile::shared_bytes(slots), 1, most);
    return std::min(pixel_tiles, std::max<int64_t>(1, blocks * call.multiprocessors / plan.tiles));
  };
  // Weights stay if they take no more room than those that pass by, or if a block uses them again
  // and a multiprocessor still holds as many blocks as registers allow.
  plan.weights_stay =
      plan.chunks <= Tile::kStages || (groups(Tile::kStages) < pixel_tiles &&
                                       most * Tile::shared_bytes(plan.chunks) <= call.shared_limit);
  plan.slots = plan.weights_stay ? plan.chunks : Tile::kStages;
  plan.groups = static_cast<int>(groups(plan.slots));
  plan.wide_weights = depth * bytes % 16 == 0 && aligned(conv.weight, 16);
  plan.wide_outputs = conv.K * bytes % 16 == 0 && aligned(conv.y, 16);
  return plan;
}

}  // namespace mnet::cuda
