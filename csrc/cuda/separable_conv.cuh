// separable_conv: the kernel. Products are matrix instructions of the tensor cores for 16-bit
// elements; for float32 plain multiply-adds, as accurate as native's, which TF32 is not.
#pragma once

#include "separable_depthwise.cuh"

namespace mnet::cuda {

// Starts copying a tile of weights, `channels` from n on and one chunk deep, to shared memory;
// zeros where there are none.
template <typename Element, typename Tile>
__device__ __forceinline__ void request_weights(const SeparableCall& call, bool wide, int64_t n,
                                                int chunk, unsigned char* to) {
  constexpr int V = 16 / sizeof(Element);
  const int64_t depth = call.depthwise.K;
  const auto* weight = static_cast<const Element*>(call.pw_weight);
  const int vector = static_cast<int>(threadIdx.x) % Tile::kVectors;
  const int first = static_cast<int>(threadIdx.x) / Tile::kVectors;
  const int64_t k = static_cast<int64_t>(chunk * Tile::kVectors + vector) * V;
#pragma unroll
  for (int i = 0; i < Tile::kChannels / Tile::kApart; ++i) {
    const int row = first + i * Tile::kApart;
    auto* place = to + swizzled<Tile::kChannels>(first, vector) + i * Tile::kApart * kSlabBytes;
    const bool exists = n + row < call.K;
    const auto* from = weight + (exists ? (n + row) * depth : 0);
    if (wide) {
      copy_async(place, from + (k < depth ? k : 0), exists && k < depth);
    } else {
#pragma unroll 1
      for (int v = 0; v < V; ++v)
        store_shared(reinterpret_cast<Element*>(place) + v,
                     load<1>(from + k + v, exists && k + v < depth));
    }
  }
}

// A warp's part of the grid of warps.
struct SeparableWarp {
  int m, n, k, lane;
};

template <typename Tile>
__device__ __forceinline__ SeparableWarp warp_of_thread() {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  return {warp / Tile::kWN % Tile::kWM, warp % Tile::kWN, warp / (Tile::kWN * Tile::kWM),
          thread % 32};
}

// sum += middle * weights over the first `steps` steps of a chunk. sum[i][j]: 16 pixels by 8
// channels, laid out in a warp as multiply_add has it.
template <typename Element, typename Tile>
__device__ __forceinline__ void multiply_chunk(const unsigned char* middle,
                                               const unsigned char* weights, int steps,
                                               float (&sum)[Tile::kMI][Tile::kNI][4]) {
  constexpr int MI = Tile::kMI, NI = Tile::kNI;
  const SeparableWarp warp = warp_of_thread<Tile>();
  const int lane = warp.lane;
  // Rows 8 apart are swizzled alike, so few addresses have to be computed.
  const auto at = [](const unsigned char* tile, int rows, int row, int below, int vector) {
    return tile + row * kSlabBytes + (vector / kSlabVectors * rows + below) * kSlabBytes +
           (vector % kSlabVectors ^ row % kSlabVectors) * 16;
  };
  middle += warp.m * (16 * MI) * kSlabBytes;
  weights += warp.n * (8 * NI) * kSlabBytes;
  constexpr int kSteps = Tile::kSteps / Tile::kWK;
#pragma unroll(sizeof(Element) == 2 ? kSteps : 1)
  for (int i = 0; i < kSteps; ++i) {
    const int step = warp.k + i * Tile::kWK;
    if (step >= steps) break;
    if constexpr (sizeof(Element) == 2) {
      uint32_t a[MI][4];
#pragma unroll
      for (int m = 0; m < MI; ++m)
        load_matrices(at(middle, Tile::kPixels, lane % 16, 16 * m, 2 * step + lane / 16), a[m]);
#pragma unroll
      for (int n = 0; n < NI; n += 2) {
        uint32_t b[4];
        load_matrices(
            at(weights, Tile::kChannels, lane / 16 * 8 + lane % 8, 8 * n, 2 * step + lane / 8 % 2),
            b);
#pragma unroll
        for (int m = 0; m < MI; ++m) {
          multiply_add<Element>(sum[m][n], a[m], b[0], b[1]);
          multiply_add<Element>(sum[m][n + 1], a[m], b[2], b[3]);
        }
      }
    } else {
      const int g = lane / 4, t = lane % 4;
#pragma unroll
      for (int vector = 2 * step; vector < 2 * step + 2; ++vector) {
        Vector<float, 4> b[NI][2];
#pragma unroll
        for (int n = 0; n < 2 * NI; ++n)
          b[n / 2][n % 2] = load_shared<4>(reinterpret_cast<const float*>(
              at(weights, Tile::kChannels, 2 * t + n % 2, n / 2 * 8, vector)));
#pragma unroll
        for (int m = 0; m < 2 * MI; ++m) {
          const auto a = load_shared<4>(
              reinterpret_cast<const float*>(at(middle, Tile::kPixels, g, m * 8, vector)));
#pragma unroll
          for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int n = 0; n < 2 * NI; ++n)
              sum[m / 2][n / 2][m % 2 * 2 + n % 2] += a.lane[k] * b[n / 2][n % 2].lane[k];
        }
      }
    }
  }
}

// Adds the sums of the warps that share pixels and channels, in a fixed order; the first has them.
template <typename Tile>
__device__ __forceinline__ void add_parts(float* parts, float (&sum)[Tile::kMI][Tile::kNI][4]) {
  constexpr int kPart = 32 * Tile::kSums, kHalf = Tile::kWK / 2;
  const SeparableWarp warp = warp_of_thread<Tile>();
  float* mine = parts + (warp.m * Tile::kWN + warp.n) * (kHalf * kPart) + warp.lane;
  float* own = mine + warp.k % kHalf * kPart;
  // The upper half of the warps leaves its sums to the lower, which leaves both together.
#pragma unroll
  for (int upper = 1; upper >= 0; --upper) {
    if (warp.k / kHalf == upper) {
#pragma unroll
      for (int i = 0; i < Tile::kSums; ++i) {
        float value[1] = {sum[i / 16][i / 4 % 4][i % 4]};
        if (upper == 0) value[0] += load_shared<1>(own + 32 * i).lane[0];
        store_shared(own + 32 * i, narrow<float>(value));
      }
    }
    __syncthreads();
  }
  for (int i = warp.k; i < Tile::kSums; i += Tile::kWK) {
    float total[1] = {0};
    for (int k = 0; k < kHalf; ++k) total[0] += load_shared<1>(mine + k * kPart + 32 * i).lane[0];
    store_shared(mine + 32 * i, narrow<float>(total));
  }
  __syncthreads();
  if (warp.k != 0) return;
#pragma unroll
  for (int i = 0; i < Tile::kSums; ++i)
    sum[i / 16][i / 4 % 4][i % 4] = load_shared<1>(mine + 32 * i).lane[0];
}

// Of a quad of lanes, lane q's values[i] becomes lane i's values[q].
__device__ __forceinline__ void transpose_quad(float (&values)[4]) {
  const int lane = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const bool odd = lane & bit;
      const float other = __shfl_xor_sync(0xffffffffu, odd ? values[i] : values[i + bit], bit);
      (odd ? values[i] : values[i + bit]) = other;
    }
}

// Affine, activation, residual, rounding. A lane gets 8 neighbouring channels of each of its rows.
template <typename Element, typename Tile>
__device__ __forceinline__ void store_outputs(const SeparableCall& call, bool wide,
                                              const unsigned char* places, int64_t first,
                                              const float (&sum)[Tile::kMI][Tile::kNI][4]) {
  constexpr int V = 16 / sizeof(Element);
  const SeparableWarp warp = warp_of_thread<Tile>();
  const int64_t K = call.K, n = first + warp.n * (8 * Tile::kNI) + warp.lane % 4 * 8;
  float scale[8], shift[8];
#pragma unroll
  for (int v = 0; v < 8; ++v) {
    const bool exists = n + v < K;
    scale[v] = call.pw_scale ? load<1>(call.pw_scale + n + v, exists).lane[0] : 1;
    shift[v] = call.pw_shift ? load<1>(call.pw_shift + n + v, exists).lane[0] : 0;
  }
#pragma unroll
  for (int m = 0; m < 2 * Tile::kMI; ++m) {
    float low[4], high[4], z[8];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      low[i] = sum[m / 2][i][m % 2 * 2], high[i] = sum[m / 2][i][m % 2 * 2 + 1];
    transpose_quad(low);
    transpose_quad(high);
#pragma unroll
    for (int v = 0; v < 8; ++v) z[v] = (v % 2 == 0 ? low : high)[v / 2] * scale[v] + shift[v];
    activate_all(call.pw_activation, call.depthwise.slope, z);

    const SeparablePlace at = load_place(places, warp.m * (16 * Tile::kMI) + m * 8 + warp.lane / 4);
    const int64_t pixel = (at.n * call.depthwise.OH + at.oh) * call.depthwise.OW + at.ow;
    auto* y = static_cast<Element*>(call.y) + pixel * K + n;
    const Element* residual = nullptr;
    if (call.residual) residual = static_cast<const Element*>(call.residual) + pixel * K + n;
    if (wide) {
#pragma unroll
      for (int part = 0; part < 8 / V; ++part) {
        const bool exists = at.n >= 0 && n + part * V < K;
        float out[V], more[V] = {};
        if (residual) widen(load<V>(residual + part * V, exists), more);
#pragma unroll
        for (int v = 0; v < V; ++v) out[v] = z[part * V + v] + more[v];
        store(y + part * V, narrow<Element>(out), exists);
      }
    } else {
#pragma unroll
      for (int v = 0; v < 8; ++v) {
        const bool exists = at.n >= 0 && n + v < K;
        float out[1] = {z[v]};
        if (residual) out[0] += widen(load<1>(residual + v, exists).lane[0]);
        store(y + v, narrow<Element>(out), exists);
      }
    }
  }
}

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
  constexpr int kStages = Tile::kStages;
  constexpr int kStep = 32 / sizeof(Element);  // channels
  unsigned char* places = shared_memory();
  unsigned char* middle = places + Tile::kPlaceBytes;
  unsigned char* weights = middle + plan.slots * Tile::kMiddleBytes;
  auto* parts = reinterpret_cast<float*>(weights + kStages * Tile::kWeightBytes);
  const auto block = static_cast<int>(blockIdx.x);
  const int warp_channel = warp_of_thread<Tile>().n * (8 * Tile::kNI);
  const int first = block % plan.splits * plan.per_split;
  const int last = first + plan.per_split < plan.tiles ? first + plan.per_split : plan.tiles;

  // Weights arrive kStages - 1 chunks ahead.
  auto request = [&](int tile, int chunk, int stage) {
    for (; chunk >= plan.chunks; chunk -= plan.chunks) ++tile;
    if (stage >= kStages) stage -= kStages;
    if (tile < last)
      request_weights<Element, Tile>(call, plan.wide_weights,
                                     static_cast<int64_t>(tile) * Tile::kChannels, chunk,
                                     weights + stage * Tile::kWeightBytes);
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) request(first, i, i);
  store_places<Tile>(plan, static_cast<int64_t>(block / plan.splits) * Tile::kPixels, places);
  __syncthreads();
  for (int chunk = 0; chunk < (Tile::kStream ? 1 : plan.chunks); ++chunk)
    depthwise_chunk<Element, Tile>(call, plan, chunk, places, middle + chunk * Tile::kMiddleBytes);

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
        depthwise_chunk<Element, Tile>(call, plan, chunk + 1, places,
                                       middle + (chunk + 1) % 2 * Tile::kMiddleBytes);
      const int64_t left = call.depthwise.K - static_cast<int64_t>(chunk) * (kStep * Tile::kSteps);
      const int steps =
          left < kStep * Tile::kSteps ? static_cast<int>((left + kStep - 1) / kStep) : Tile::kSteps;
      const int slot = Tile::kStream ? chunk % 2 : chunk;
      if (works)
        multiply_chunk<Element, Tile>(middle + slot * Tile::kMiddleBytes,
                                      weights + stage * Tile::kWeightBytes, steps, sum);
      if (++stage == kStages) stage = 0;
    }
    if constexpr (Tile::kWK > 1) add_parts<Tile>(parts, sum);
    if (works && threadIdx.x < Tile::kThreads / Tile::kWK)
      store_outputs<Element, Tile>(call, plan.wide_outputs, places, first_channel, sum);
  }
}

}  // namespace mnet::cuda
