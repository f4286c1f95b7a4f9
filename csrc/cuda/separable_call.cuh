// separable_conv on a GPU: the call, and how it is shared out. One kernel does
//
//   middle = round(dw_act(dw_scale * depthwise(x) + dw_shift))          never in global memory
//   y = pw_act(pw_scale * (pw_weight * middle) + pw_shift) + residual
//
// for a block's pixels and output channels: the middle goes to shared memory in x's dtype, the
// pointwise weights stream through shared memory from L2, sums stay in registers.
#pragma once

#include "divisor.cuh"
#include "dwconv_channels_last.cuh"
#include "product.cuh"

namespace mnet::cuda {

struct SeparableCall {
  DwconvCall depthwise;   // channels_last; its K is the middle's channels, its y not used
  const void* pw_weight;  // (K, depthwise.K), contiguous
  const float* pw_scale;  // (K,) or null for 1; likewise pw_shift and 0
  const float* pw_shift;  // (K,)
  const void* residual;   // (N, K, OH, OW) channels_last, or null
  void* y;                // (N, K, OH, OW) channels_last
  int64_t K;
  Activation pw_activation;
  int multiprocessors, shared_limit;  // of the device; bytes that a block may have
  bool tf32;                          // float32 products may be tf32's
};

// How the depthwise half is computed. `three` and `vectors` move 16 bytes of channels at a time.
enum class Depthwise {
  three,    // 3x3, all nine loads on their way at once
  pairs,    // 3x3 with stride 1: two neighbouring pixels share their loads
  vectors,  // any kernel
  scalars,  // any call: depth multiplier, odd channels, misaligned tensors
};

// Pixels are numbered down strips of columns, so that a tile is nearly square and its halo small:
// by column of the strip, then row, strip, image. A strip's width divides OW.
struct SeparablePlan {
  Divisor columns, rows, strips;
  int64_t pixels;
  int splits;     // blocks that share a tile of pixels, each with its tiles of output channels
  int tiles;      // of output channels, in all
  int per_split;  // of them
  int chunks;     // of the middle's channels
  int slots;      // chunks that shared memory holds
  Depthwise depthwise;
  bool wide_weights, wide_outputs;  // in vectors of 16 bytes
  bool small;                       // pixels can be divided by Divisor
};

template <int MI, int WM, int WN, int WK, int Stages, bool Stream, int Blocks>
struct SeparableTile : ProductTile<MI, WM, WN, WK, Stages> {
  using Product = ProductTile<MI, WM, WN, WK, Stages>;
  static constexpr bool kStream = Stream;
  static constexpr int kBlocks = Blocks;
  static constexpr int kPlaceBytes = 16 * Product::kPixels;

  static int64_t shared_bytes(int64_t slots) {
    return kPlaceBytes + slots * Product::kPixelBytes + Stages * Product::kWeightBytes +
           Product::kPartBytes;
  }
};

// Output pixel (n, oh, ow) of a row of the tile; n is -1 where there is none.
struct SeparablePlace {
  int64_t n;
  int oh, ow;
};

__device__ __forceinline__ SeparablePlace load_place(const unsigned char* places, int row) {
  const auto words = load_shared<4>(reinterpret_cast<const uint32_t*>(places) + row * 4);
  return {static_cast<int64_t>(words.lane[0] | static_cast<uint64_t>(words.lane[1]) << 32),
          static_cast<int>(words.lane[2]), static_cast<int>(words.lane[3])};
}

// Writes the places of a tile's pixels, of which `first` is the first.
template <typename Tile>
__device__ __forceinline__ void store_places(const SeparablePlan& plan, int64_t first,
                                             unsigned char* places) {
  const int row = static_cast<int>(threadIdx.x);
  if (row >= Tile::kPixels) return;
  int64_t n = first + row;
  uint32_t column, oh, strip;
  if (plan.small) {
    auto at = static_cast<uint32_t>(n);
    column = plan.columns.divide(at), oh = plan.rows.divide(at), strip = plan.strips.divide(at);
    n = n < plan.pixels ? static_cast<int64_t>(at) : -1;
  } else {
    int64_t at = n;
    column = at % plan.columns.value, at /= plan.columns.value;
    oh = at % plan.rows.value, at /= plan.rows.value;
    strip = at % plan.strips.value, at /= plan.strips.value;
    n = n < plan.pixels ? at : -1;
  }
  const auto image = static_cast<uint64_t>(n);
  Vector<uint32_t, 4> words;
  words.lane[0] = static_cast<uint32_t>(image), words.lane[1] = static_cast<uint32_t>(image >> 32);
  words.lane[2] = oh, words.lane[3] = strip * plan.columns.value + column;
  store_shared(reinterpret_cast<uint32_t*>(places) + row * 4, words);
}

// ---- the host's side ----

// The width of a strip, at most OW: the divisor of OW whose tiles of `pixels` read least, columns
// and rows of halo included. Of an even OW only even ones: neighbours go in pairs.
inline int64_t strip_width(const DwconvCall& call, int64_t pixels) {
  const int64_t step = call.OW % 2 == 0 ? 2 : 1;
  int64_t best = call.OW, least = INT64_MAX;
  for (int64_t width = step; width <= std::min<int64_t>(call.OW, 256); width += step) {
    if (call.OW % width != 0) continue;
    const int64_t rows = divide_up(pixels, width);
    const int64_t read = (width * call.SW + call.KW) * (rows * call.SH + call.KH);
    if (read < least) best = width, least = read;
  }
  return best;
}

template <typename Tile>
Depthwise depthwise_of(const SeparableCall& call, int64_t strip) {
  const DwconvCall& dw = call.depthwise;
  const int64_t height = std::max(dw.H, (dw.OH - 1) * dw.SH + dw.KH * dw.DH);
  const int64_t width = std::max(dw.W, (dw.OW - 1) * dw.SW + dw.KW * dw.DW);
  const bool vectors = dw.multiplier == 1 && dw.C * element_bytes(dw) % 16 == 0 &&
                       aligned(dw.x, 16) && aligned(dw.weight, 16) && aligned(dw.scale, 16) &&
                       aligned(dw.shift, 16) &&
                       fit_int32({height, width, dw.top, dw.left, height * width,
                                  height * width * dw.C, dw.KH * dw.KW * dw.C});
  if (!vectors) return Depthwise::scalars;
  if (dw.KH != 3 || dw.KW != 3) return Depthwise::vectors;
  const bool neighbours = Tile::kRows % 2 == 0 && dw.SW == 1 && dw.DW == 1 && strip % 2 == 0;
  return neighbours ? Depthwise::pairs : Depthwise::three;
}

// Whether 32-bit numbers hold what is counted of the call.
inline bool separable_fits(const SeparableCall& call) {
  const DwconvCall& dw = call.depthwise;
  return fit_int32({dw.OH, dw.OW, dw.C, dw.K, call.K});
}

// The fewest splits with which blocks fill the machine; a stream has one tile of channels a block.
template <typename Tile>
SeparablePlan separable_plan(const SeparableCall& call) {
  const DwconvCall& dw = call.depthwise;
  const int64_t bytes = element_bytes(dw), strip = strip_width(dw, Tile::kPixels);
  if (!separable_fits(call)) throw std::runtime_error("rows, columns or channels beyond 32 bits");
  SeparablePlan plan;
  plan.columns = Divisor(static_cast<uint32_t>(strip));
  plan.rows = Divisor(static_cast<uint32_t>(dw.OH));
  plan.strips = Divisor(static_cast<uint32_t>(dw.OW / strip));
  plan.pixels = dw.N * dw.OH * dw.OW;
  plan.small = fit_int32({plan.pixels});
  const int64_t pixel_tiles = divide_up(plan.pixels, Tile::kPixels);
  plan.tiles = static_cast<int>(divide_up(call.K, Tile::kChannels));
  const int64_t wanted =
      std::min<int64_t>(plan.tiles, divide_up(call.multiprocessors, pixel_tiles));
  plan.per_split = Tile::kStream ? 1 : static_cast<int>(plan.tiles / wanted);
  plan.splits = static_cast<int>(divide_up(plan.tiles, plan.per_split));
  plan.chunks = static_cast<int>(divide_up(dw.K * bytes, Tile::kSlabs * kSlabBytes));
  plan.slots = Tile::kStream ? std::min(plan.chunks, 2) : plan.chunks;
  plan.depthwise = depthwise_of<Tile>(call, strip);
  plan.wide_weights = dw.K * bytes % 16 == 0 && aligned(call.pw_weight, 16);
  plan.wide_outputs = call.K * bytes % 16 == 0 && aligned(call.y, 16) && aligned(call.residual, 16);
  return plan;
}

}  // namespace mnet::cuda
