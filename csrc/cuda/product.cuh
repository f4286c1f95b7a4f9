// A product of two matrices by a block, and what becomes of it: a tile of pixels by output
// channels. The operands pass through shared memory in x's dtype, a chunk of the depth at a time;
// sums stay in registers. Products are matrix instructions of the tensor cores for 16-bit elements
// and tf32; for float32 plain multiply-adds, as accurate as native's without TF32.
#pragma once

#include "dwconv_call.cuh"
#include "mma.cuh"

namespace mnet::cuda {

inline constexpr int kSlabBytes = 128, kSlabVectors = 8;  // of a row, in shared memory

// Warps stand in a grid, WM x WN x WK: each multiplies 16 * MI pixels by 32 channels, over a WK-th
// of every chunk. A chunk is `kSlabs` slabs of 128 bytes of each row.
template <int MI, int WM, int WN, int WK, int Stages>
struct ProductTile {
  static constexpr int kMI = MI, kWM = WM, kWN = WN, kWK = WK, kStages = Stages;
  static constexpr int kNI = 4;  // matrices of 8 channels a warp has: a quad of lanes swaps four
  static constexpr int kThreads = 32 * WM * WN * WK;
  static constexpr int kPixels = 16 * MI * WM, kChannels = 8 * kNI * WN;
  static constexpr int kSlabs = WK > 4 ? WK / 4 : 1;
  static constexpr int kSteps = 4 * kSlabs;  // of 32 bytes: one matrix instruction deep
  static constexpr int kVectors = kSlabVectors * kSlabs;
  static constexpr int kPixelBytes = kSlabs * kPixels * kSlabBytes;
  static constexpr int kWeightBytes = kSlabs * kChannels * kSlabBytes;
  static constexpr int kSums = 4 * MI * kNI;  // of a thread
  static constexpr int kPartBytes = WK > 1 ? 2 * kThreads * kSums : 0;
  // A thread that fills a chunk has one vector of the depth, and every kApart-th row.
  static constexpr int kApart = kThreads / kVectors, kRows = kPixels / kApart;
  static_assert(kThreads % kVectors == 0 && kPixels % kApart == 0 && kChannels % kApart == 0);
  static_assert(kApart % kSlabVectors == 0);  // rows so far apart are swizzled alike
  static_assert(WK == 1 || kSteps % WK == 0);
};

// Where vector `vector` (16 bytes) of a row lies in a chunk of `rows` rows. Vectors of a slab
// change places by the row, so that 8 rows of one vector, as matrix loads want them, and 8 vectors
// of one row are both in different banks.
template <int Rows>
__device__ __forceinline__ int swizzled(int row, int vector) {
  return (vector / kSlabVectors * Rows + row) * kSlabBytes +
         ((vector % kSlabVectors) ^ (row % kSlabVectors)) * 16;
}

// y[pixel][k] = act(scale[k] * sum[pixel][k] + shift[k]) + residual[pixel][k]
struct ProductOutputs {
  const float* scale;  // (K,) or null for 1; likewise shift and 0
  const float* shift;
  const void* residual;  // (pixels, K) or null
  void* y;               // (pixels, K)
  int64_t K;
  Activation activation;
  float slope;
};

// A value that the compiler takes for a new one: what is computed of it is computed where it is
// used, not kept in registers, which are shorter than cycles, from before a loop.
__device__ __forceinline__ int anew(int value) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(value));
#endif
  return value;
}

template <typename T>
__device__ __forceinline__ const T* anew(const T* pointer) {
#ifdef __CUDACC__
  asm volatile("" : "+l"(pointer));
#endif
  return pointer;
}

// Starts copying a tile of weights, `channels` from n on and one chunk deep, to shared memory;
// zeros where there are none.
template <typename Element, typename Tile>
__device__ __forceinline__ void request_weights(int thread, const void* weights, int64_t K,
                                                int64_t depth, bool wide, int64_t n, int chunk,
                                                unsigned char* to) {
  constexpr int V = 16 / sizeof(Element);
  const auto* weight = static_cast<const Element*>(weights);  // (K, depth)
  const int vector = thread % Tile::kVectors, first = thread / Tile::kVectors;
  const int64_t k = static_cast<int64_t>(chunk * Tile::kVectors + vector) * V;
#pragma unroll
  for (int i = 0; i < Tile::kChannels / Tile::kApart; ++i) {
    const int row = first + i * Tile::kApart;
    auto* place = to + swizzled<Tile::kChannels>(first, vector) + i * Tile::kApart * kSlabBytes;
    const bool exists = n + row < K;
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
struct ProductWarp {
  int m, n, k, lane;
};

template <typename Tile>
__device__ __forceinline__ ProductWarp warp_of(int thread) {
  const int warp = thread / 32;
  return {warp / Tile::kWN % Tile::kWM, warp % Tile::kWN, warp / (Tile::kWN * Tile::kWM),
          thread % 32};
}

// sum += pixels * weights over the first `steps` steps of a chunk. sum[i][j]: 16 pixels by 8
// channels, laid out in a warp as multiply_add has it.
template <typename Element, typename Tile>
__device__ __forceinline__ void multiply_chunk(int thread, const unsigned char* pixels,
                                               const unsigned char* weights, int steps,
                                               float (&sum)[Tile::kMI][Tile::kNI][4]) {
  constexpr int MI = Tile::kMI, NI = Tile::kNI;
  const ProductWarp warp = warp_of<Tile>(thread);
  const int lane = warp.lane;
  // Rows 8 apart are swizzled alike, so few addresses have to be computed.
  const auto at = [](const unsigned char* tile, int rows, int row, int below, int vector) {
    return tile + row * kSlabBytes + (vector / kSlabVectors * rows + below) * kSlabBytes +
           (vector % kSlabVectors ^ row % kSlabVectors) * 16;
  };
  pixels += warp.m * (16 * MI) * kSlabBytes;
  weights += warp.n * (8 * NI) * kSlabBytes;
  constexpr bool kMatrix = !std::is_same_v<Element, float>;
  constexpr int kSteps = Tile::kSteps / Tile::kWK;
#pragma unroll(kMatrix ? kSteps : 1)
  for (int i = 0; i < kSteps; ++i) {
    const int step = warp.k + i * Tile::kWK;
    if (step >= steps) break;
    if constexpr (kMatrix) {
      uint32_t a[MI][4];
#pragma unroll
      for (int m = 0; m < MI; ++m)
        load_operands<Element>(at(pixels, Tile::kPixels, lane % 16, 16 * m, 2 * step + lane / 16),
                               a[m]);
#pragma unroll
      for (int n = 0; n < NI; n += 2) {
        uint32_t b[4];
        load_operands<Element>(
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
              reinterpret_cast<const float*>(at(pixels, Tile::kPixels, g, m * 8, vector)));
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
__device__ __forceinline__ void add_parts(int thread, float* parts,
                                          float (&sum)[Tile::kMI][Tile::kNI][4]) {
  constexpr int kPart = 32 * Tile::kSums, kHalf = Tile::kWK / 2;
  const ProductWarp warp = warp_of<Tile>(thread);
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
template <typename T>
__device__ __forceinline__ void transpose_quad(T (&values)[4]) {
  const int lane = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const bool odd = lane & bit;
      const T other = __shfl_xor_sync(0xffffffffu, odd ? values[i] : values[i + bit], bit);
      (odd ? values[i] : values[i + bit]) = other;
    }
}

// Eight values of a row, as vectors of 16 bytes.
template <typename Element>
using Eight = Vector<Element, 16 / sizeof(Element)>[sizeof(Element) / 2];

// From how products lie in a quad of lanes, in each lane two neighbouring channels of each of four
// matrices, to eight neighbouring channels, lane q's of matrix q; or back.
__device__ __forceinline__ void exchange_channels(Vector<float, 4> (&values)[2]) {
  auto& [a, b] = values;
  float low[4] = {a.lane[0], a.lane[2], b.lane[0], b.lane[2]};
  float high[4] = {a.lane[1], a.lane[3], b.lane[1], b.lane[3]};
  transpose_quad(low);
  transpose_quad(high);
  a = {low[0], high[0], low[1], high[1]};
  b = {low[2], high[2], low[3], high[3]};
}

template <typename Element>
__device__ __forceinline__ void exchange_channels(Vector<Element, 8> (&values)[1]) {
  transpose_quad(values[0].pair);
}

// What a lane multiplies and adds to its sums: two channels of each matrix.
struct ProductAffine {
  float scale[8], shift[8];
};

template <typename Tile>
__device__ __forceinline__ ProductAffine affine_of_lane(int thread, const ProductOutputs& out,
                                                        int64_t first) {
  const ProductWarp warp = warp_of<Tile>(thread);
  const int64_t n = first + warp.n * (8 * Tile::kNI) + warp.lane % 4 * 2;
  ProductAffine affine;
#pragma unroll
  for (int v = 0; v < 8; ++v) {
    const int64_t k = n + v / 2 * 8 + v % 2;
    affine.scale[v] = out.scale ? load<1>(out.scale + k, k < out.K).lane[0] : 1;
    affine.shift[v] = out.shift ? load<1>(out.shift + k, k < out.K).lane[0] : 0;
  }
  return affine;
}

// Affine, activation, residual, rounding. pixel_of(row of the tile) is where its pixel is in y; -1
// where there is none.
template <typename Element, typename Tile, bool HasResidual, typename PixelOf>
__device__ __forceinline__ void store_outputs(int thread, const ProductOutputs& out, bool wide,
                                              const ProductAffine& affine, int64_t first,
                                              const float (&sum)[Tile::kMI][Tile::kNI][4],
                                              PixelOf&& pixel_of) {
  constexpr int V = 16 / sizeof(Element), kParts = 8 / V;
  const ProductWarp warp = warp_of<Tile>(thread);
  const int64_t n = first + warp.n * (8 * Tile::kNI) + warp.lane % 4 * 8;
#pragma unroll
  for (int m = 0; m < 2 * Tile::kMI; ++m) {
    float z[8];
#pragma unroll
    for (int v = 0; v < 8; ++v)
      z[v] = sum[m / 2][v / 2][m % 2 * 2 + v % 2] * affine.scale[v] + affine.shift[v];
    activate_all(out.activation, out.slope, z);

    const int64_t pixel = pixel_of(warp.m * (16 * Tile::kMI) + m * 8 + warp.lane / 4);
    const int64_t at = pixel * out.K + n;
    const auto exists = [&](int v) { return pixel >= 0 && n + v < out.K; };
    Eight<Element> values;
    if (HasResidual && out.residual) {
      const auto* residual = static_cast<const Element*>(out.residual) + at;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        if (wide) {
          values[part] = load<V>(residual + part * V, exists(part * V));
        } else {
          Vector<Element, 1> each[V];
#pragma unroll
          for (int v = 0; v < V; ++v)
            each[v] = load<1>(residual + part * V + v, exists(part * V + v));
          values[part] = join(each);
        }
      }
      exchange_channels(values);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        float more[V];
        widen(values[part], more);
#pragma unroll
        for (int v = 0; v < V; ++v) z[part * V + v] += more[v];
      }
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float some[V];
#pragma unroll
      for (int v = 0; v < V; ++v) some[v] = z[part * V + v];
      values[part] = narrow<Element>(some);
    }
    exchange_channels(values);
    auto* y = static_cast<Element*>(out.y) + at;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (wide) {
        store(y + part * V, values[part], exists(part * V));
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v)
          store(y + part * V + v, element(values[part], v), exists(part * V + v));
      }
    }
  }
}

}  // namespace mnet::cuda
