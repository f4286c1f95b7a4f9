// separable_conv: the kernel.
#pragma once

#include "separable_depthwise.cuh"

namespace mnet::cuda {

// Blocks a multiprocessor that registers are kept free for: shared memory allows one on sm_80.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <typename Tile>
constexpr int kSeparableBlocks = 1;
#else
template <typename Tile>
constexpr int kSeparableBlocks = Tile::kBlocks;
#endif

template <typename Element, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, kSeparableBlocks<Tile>)
    separable_conv_kernel(const SeparableCall call, const SeparablePlan plan) {
  using Memory = Stored<Element>;
  constexpr int kStages = Tile::kStages;
  constexpr int kStep = 32 / sizeof(Element);  // channels
  unsigned char* places = shared_memory();
  unsigned char* middle = places + Tile::kPlaceBytes;
  unsigned char* weights = middle + plan.slots * Tile::kPixelBytes;
  auto* parts = reinterpret_cast<float*>(weights + kStages * Tile::kWeightBytes);
  const DwconvCall& dw = call.depthwise;
  const ProductOutputs out{call.pw_scale, call.pw_shift,      call.residual, call.y,
                           call.K,        call.pw_activation, dw.slope};
  const auto block = static_cast<int>(blockIdx.x);
  const int warp_channel = warp_of<Tile>(threadIdx.x).n * (8 * Tile::kNI);
  const int first = block % plan.splits * plan.per_split;
  const int last = first + plan.per_split < plan.tiles ? first + plan.per_split : plan.tiles;

  // Weights arrive kStages - 1 chunks ahead.
  auto request = [&](int tile, int chunk, int stage) {
    for (; chunk >= plan.chunks; chunk -= plan.chunks) ++tile;
    if (stage >= kStages) stage -= kStages;
    if (tile < last)
      request_weights<Memory, Tile>(anew(static_cast<int>(threadIdx.x)), call.pw_weight, call.K,
                                    dw.K, plan.wide_weights,
                                    static_cast<int64_t>(tile) * Tile::kChannels, chunk,
                                    weights + stage * Tile::kWeightBytes);
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) request(first, i, i);
  store_places<Tile>(plan, static_cast<int64_t>(block / plan.splits) * Tile::kPixels, places);
  __syncthreads();
  for (int chunk = 0; chunk < (Tile::kStream ? 1 : plan.chunks); ++chunk)
    depthwise_chunk<Memory, Tile>(call, plan, chunk, places, middle + chunk * Tile::kPixelBytes);

  int stage = 0;
  for (int tile = first; tile < last; ++tile) {
    const int64_t first_channel = static_cast<int64_t>(tile) * Tile::kChannels;
    const bool works = first_channel + warp_channel < call.K;  // a warp beyond the last has nothing
    float sum[Tile::kMI][Tile::kNI][4] = {};
    for (int chunk = 0; chunk < plan.chunks; ++chunk) {
      wait_copies<kStages - 2>();
      // This chunk is there, for all threads; the last one's places are free.
      __syncthreads();
      request(tile, chunk + kStages - 1, stage + kStages - 1);
      if (Tile::kStream && chunk + 1 < plan.chunks)
        depthwise_chunk<Memory, Tile>(call, plan, chunk + 1, places,
                                      middle + (chunk + 1) % 2 * Tile::kPixelBytes);
      const int64_t left = dw.K - static_cast<int64_t>(chunk) * (kStep * Tile::kSteps);
      const int steps =
          left < kStep * Tile::kSteps ? static_cast<int>((left + kStep - 1) / kStep) : Tile::kSteps;
      const int slot = Tile::kStream ? chunk % 2 : chunk;
      if (works)
        multiply_chunk<Element, Tile>(threadIdx.x, middle + slot * Tile::kPixelBytes,
                                      weights + stage * Tile::kWeightBytes, steps, sum);
      if (++stage == kStages) stage = 0;
    }
    const int thread = anew(static_cast<int>(threadIdx.x));
    if constexpr (Tile::kWK > 1) add_parts<Tile>(thread, parts, sum);
    if (works && threadIdx.x < Tile::kThreads / Tile::kWK)
      store_outputs<Memory, Tile, true>(
          thread, out, plan.wide_outputs, affine_of_lane<Tile>(thread, out, first_channel),
          first_channel, sum, [&](int row) {
            const SeparablePlace at = load_place(places, row);
            return at.n < 0 ? -1 : (at.n * dw.OH + at.oh) * dw.OW + at.ow;
          });
  }
}

}  // namespace mnet::cuda
