// conv_bn_act: the kernel.
#pragma once

#include "conv_gather.cuh"

namespace mnet::cuda {

// Scale and shift of the block's channels, in shared memory: it stores many times.
template <typename Tile>
__device__ __forceinline__ void store_affine(const ProductOutputs& out, int64_t first,
                                             unsigned char* affine) {
  const int channel = static_cast<int>(threadIdx.x);
  if (channel >= Tile::kChannels) return;
  const int64_t k = first + channel;
  const float both[2] = {out.scale ? load<1>(out.scale + k, k < out.K).lane[0] : 1,
                         out.shift ? load<1>(out.shift + k, k < out.K).lane[0] : 0};
  store_shared(reinterpret_cast<float*>(affine) + 2 * channel, narrow<float>(both));
}

template <typename Tile>
__device__ __forceinline__ ProductAffine load_affine(int thread, const unsigned char* affine) {
  const ProductWarp warp = warp_of<Tile>(thread);
  const auto* from =
      reinterpret_cast<const float*>(affine) + warp.n * (16 * Tile::kNI) + warp.lane % 4 * 4;
  ProductAffine result;
#pragma unroll
  for (int i = 0; i < Tile::kNI; ++i) {
    const auto two = load_shared<4>(from + 16 * i);
    result.scale[2 * i] = two.lane[0], result.shift[2 * i] = two.lane[1];
    result.scale[2 * i + 1] = two.lane[2], result.shift[2 * i + 1] = two.lane[3];
  }
  return result;
}

template <typename Element, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::template blocks<Element>())
    conv_bn_act_kernel(const ConvCall call, const ConvPlan plan) {
  using Memory = Stored<Element>;
  constexpr int kStages = Tile::kStages;
  constexpr int kStep = 32 / sizeof(Element);  // of the depth
  const DwconvCall& conv = call.conv;
  const ProductOutputs out{conv.scale, conv.shift,      nullptr,   conv.y,
                           conv.K,     conv.activation, conv.slope};
  unsigned char* windows = shared_memory();
  unsigned char* affine = windows + Tile::kWindowBytes;
  unsigned char* patches = affine + Tile::kAffineBytes;
  unsigned char* weights = patches + kStages * Tile::kPixelBytes;
  auto* parts = reinterpret_cast<float*>(weights + plan.slots * Tile::kWeightBytes);
  const auto block = static_cast<int>(blockIdx.x);
  const int64_t first_channel = static_cast<int64_t>(block % plan.tiles) * Tile::kChannels;
  const int first_tile = block / plan.tiles;
  const bool works = first_channel + warp_of<Tile>(threadIdx.x).n * (8 * Tile::kNI) < conv.K;

  store_affine<Tile>(out, first_channel, affine);

  // Chunks of patches and weights arrive kStages - 1 ahead.
  int coming_tile = first_tile, coming_chunk = 0, coming_stage = 0;
  const auto request = [&] {
    const int thread = anew(static_cast<int>(threadIdx.x));
    if (coming_tile < plan.pixel_tiles) {
      const ConvLane lane = conv_lane<Tile>(plan, thread);
      const int64_t first = static_cast<int64_t>(coming_tile) * Tile::kPixels;
      unsigned char* to = patches + coming_stage * Tile::kPixelBytes;
      if (plan.gather == Gather::rows) {
        gather_rows<Memory, Tile>(lane, conv, plan, first, coming_chunk, to);
      } else {
        if (coming_chunk == 0) store_windows<Tile>(thread, conv, plan, first, windows);
        if (plan.gather == Gather::vectors)
          gather_vectors<Memory, Tile>(lane, conv, plan, windows, coming_chunk, to);
        else
          gather_elements<Memory, Tile>(lane, conv, plan, windows, coming_chunk, to);
      }
      if (!plan.weights_stay || coming_tile == first_tile)
        request_weights<Memory, Tile>(
            thread, conv.weight, conv.K, plan.depth, plan.wide_weights, first_channel, coming_chunk,
            weights + (plan.weights_stay ? coming_chunk : coming_stage) * Tile::kWeightBytes);
      if (++coming_chunk == plan.chunks) coming_chunk = 0, coming_tile += plan.groups;
    }
    commit_copies();
    if (++coming_stage == kStages) coming_stage = 0;
  };

  float sum[Tile::kMI][Tile::kNI][4] = {};
  int chunk = 0, stage = 0, ahead = 0;
  for (int tile = first_tile; tile < plan.pixel_tiles;) {
    const bool begins = ahead < kStages - 1;
    if (!begins) {
      wait_copies<kStages - 2>();
      // This chunk is there, for all threads; the last one's places are free.
      __syncthreads();
    }
    request();
    if (begins) {
      ++ahead;
      continue;
    }
    const int left = plan.depth - chunk * (kStep * Tile::kSteps);
    const int steps = left < kStep * Tile::kSteps ? (left + kStep - 1) / kStep : Tile::kSteps;
    const int thread = anew(static_cast<int>(threadIdx.x));
    if (works)
      multiply_chunk<Element, Tile>(
          thread, patches + stage * Tile::kPixelBytes,
          weights + (plan.weights_stay ? chunk : stage) * Tile::kWeightBytes, steps, sum);
    if (++stage == kStages) stage = 0;
    if (++chunk < plan.chunks) continue;

    if constexpr (Tile::kWK > 1) add_parts<Tile>(thread, parts, sum);
    const int64_t first_pixel = static_cast<int64_t>(tile) * Tile::kPixels;
    if (works && threadIdx.x < Tile::kThreads / Tile::kWK)
      store_outputs<Memory, Tile, false>(thread, out, plan.wide_outputs,
                                         load_affine<Tile>(thread, affine), first_channel, sum,
                                         [&](int row) {
                                           const int64_t pixel = first_pixel + row;
                                           return pixel < plan.pixels ? pixel : -1;
                                         });
#pragma unroll
    for (int i = 0; i < Tile::kSums; ++i) sum[i / 16][i / 4 % 4][i % 4] = 0;
    chunk = 0, tile += plan.groups;
  }
}

}  // namespace mnet::cuda
