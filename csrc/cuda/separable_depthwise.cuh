// The depthwise half of separable_conv: one chunk of channels of a tile of pixels, rounded to x's
// dtype, into shared memory as the matrix instructions want it. Channels past the last are zeros;
// pixels past the last are anything.
#pragma once

#include "separable_call.cuh"

namespace mnet::cuda {

// What a thread works on: a vector of V channels.
struct SeparableLane {
  int vector;  // of the chunk
  int row;     // its first pixel
  int c;       // its first channel; 0 where there is none
  bool exists;
};

template <typename Tile, int V>
__device__ __forceinline__ SeparableLane lane_of(const DwconvCall& call, int chunk) {
  SeparableLane lane;
  lane.vector = static_cast<int>(threadIdx.x) % Tile::kVectors;
  lane.row = static_cast<int>(threadIdx.x) / Tile::kVectors;
  lane.c = (chunk * Tile::kVectors + lane.vector) * V;
  lane.exists = lane.c < static_cast<int>(call.K);
  if (!lane.exists) lane.c = 0;
  return lane;
}

// Where a pixel's window starts in the input.
struct SeparableWindow {
  int ih, iw;
  int64_t at;  // elements from x, at channel 0
  bool exists;
};

__device__ __forceinline__ SeparableWindow window_of(const DwconvCall& call,
                                                     const SeparablePlace& place) {
  SeparableWindow window;
  window.ih = place.oh * static_cast<int>(call.SH) - static_cast<int>(call.top);
  window.iw = place.ow * static_cast<int>(call.SW) - static_cast<int>(call.left);
  const int H = call.H, W = call.W, C = call.C;
  window.at = place.n * (static_cast<int64_t>(H) * W * C) + (window.ih * W + window.iw) * C;
  window.exists = place.n >= 0;
  return window;
}

// Affine (loaded late: registers are short before), activation, rounding; `to` is the vector's
// place in shared memory.
template <int V, typename Element>
__device__ __forceinline__ void finish_middle(const DwconvCall& call, const SeparableLane& lane,
                                              float (&sum)[V], Element* to) {
  float scale[V], shift[V];
  load_affine(call.scale, lane.c, 1, scale);
  load_affine(call.shift, lane.c, 0, shift);
#pragma unroll
  for (int v = 0; v < V; ++v) sum[v] = sum[v] * scale[v] + shift[v];
  activate_all(call.activation, call.slope, sum);
  store_shared(to, lane.exists ? narrow<Element>(sum) : Vector<Element, V>{});
}

// 3x3. T neighbouring pixels share their loads; of two, stride and dilation of columns are 1.
template <typename Element, typename Tile, int T>
__device__ __forceinline__ void depthwise_three(const DwconvCall& call, int chunk,
                                                const unsigned char* places,
                                                unsigned char* middle) {
  constexpr int V = 16 / sizeof(Element), kColumns = T + 2;
  constexpr int kComing = T == 1 ? 3 : 2;  // rows on their way: as many as there are registers for
  const SeparableLane lane = lane_of<Tile, V>(call, chunk);
  float taps[9][V];
  load_taps<3, V, Element>(call, lane.c, taps);
  const int H = call.H, W = call.W, C = call.C, DH = call.DH, DW = call.DW;
#pragma unroll 1
  for (int i = 0; i < Tile::kRows / T; ++i) {
    const int row = T * (lane.row + i * Tile::kApart);
    const SeparableWindow window = window_of(call, load_place(places, row));
    const auto* x = static_cast<const Element*>(call.x) + window.at + lane.c;
    const bool exists = window.exists && lane.exists;
    Vector<Element, V> in[3][kColumns];
    auto request = [&](int kh) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const bool inside = exists &&
                            static_cast<unsigned>(window.ih + kh * DH) < static_cast<unsigned>(H) &&
                            static_cast<unsigned>(window.iw + j * DW) < static_cast<unsigned>(W);
        in[kh][j] = load<V>(x + (kh * DH * W + j * DW) * C, inside);
      }
    };
#pragma unroll
    for (int kh = 0; kh < kComing; ++kh) request(kh);
    float sum[T][V] = {};
#pragma unroll
    for (int kh = 0; kh < 3; ++kh) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        float wide[V];
        widen(in[kh][j], wide);
#pragma unroll
        for (int t = 0; t < T; ++t) {
          if (j < t || j - t > 2) continue;
#pragma unroll
          for (int v = 0; v < V; ++v) sum[t][v] += wide[v] * taps[kh * 3 + j - t][v];
        }
      }
      if (kh + kComing < 3) request(kh + kComing);
    }
#pragma unroll
    for (int t = 0; t < T; ++t)
      finish_middle(
          call, lane, sum[t],
          reinterpret_cast<Element*>(middle + swizzled<Tile::kPixels>(row + t, lane.vector)));
  }
}

// Any kernel: tap by tap, for all of the thread's pixels at once.
template <typename Element, typename Tile>
__device__ __forceinline__ void depthwise_vectors(const DwconvCall& call, int chunk,
                                                  const unsigned char* places,
                                                  unsigned char* middle) {
  constexpr int V = 16 / sizeof(Element), R = Tile::kRows;
  const SeparableLane lane = lane_of<Tile, V>(call, chunk);
  const int H = call.H, W = call.W, C = call.C, KH = call.KH, KW = call.KW;
  const int DH = call.DH, DW = call.DW;
  SeparableWindow window[R];
#pragma unroll
  for (int r = 0; r < R; ++r)
    window[r] = window_of(call, load_place(places, lane.row + r * Tile::kApart));
  const auto* taps = static_cast<const Element*>(call.weight) + lane.c * (KH * KW);
  float sum[R][V] = {};
  for (int kh = 0; kh < KH; ++kh)
    for (int kw = 0; kw < KW; ++kw) {
      float tap[V];
#pragma unroll
      for (int v = 0; v < V; ++v) tap[v] = widen(load<1>(taps + v * (KH * KW)).lane[0]);
      ++taps;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const bool inside =
            window[r].exists && lane.exists &&
            static_cast<unsigned>(window[r].ih + kh * DH) < static_cast<unsigned>(H) &&
            static_cast<unsigned>(window[r].iw + kw * DW) < static_cast<unsigned>(W);
        float wide[V];
        widen(load<V>(static_cast<const Element*>(call.x) + window[r].at + lane.c +
                          (kh * DH * W + kw * DW) * C,
                      inside),
              wide);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[r][v] += wide[v] * tap[v];
      }
    }
#pragma unroll
  for (int r = 0; r < R; ++r)
    finish_middle(call, lane, sum[r],
                  reinterpret_cast<Element*>(
                      middle + swizzled<Tile::kPixels>(lane.row + r * Tile::kApart, lane.vector)));
}

// Any call, element by element, with 64-bit indices.
template <typename Element, typename Tile>
__device__ __forceinline__ void depthwise_scalars(const DwconvCall& call, int chunk,
                                                  const unsigned char* places,
                                                  unsigned char* middle) {
  constexpr int V = 16 / sizeof(Element);
  const int vector = static_cast<int>(threadIdx.x) % Tile::kVectors;
  const int64_t first = static_cast<int64_t>(chunk * Tile::kVectors + vector) * V;
  const int64_t C = call.C, H = call.H, W = call.W, KH = call.KH, KW = call.KW;
#pragma unroll 1
  for (int i = 0; i < Tile::kRows * V; ++i) {
    const int row = static_cast<int>(threadIdx.x) / Tile::kVectors + i / V * Tile::kApart;
    const SeparablePlace place = load_place(places, row);
    const int64_t k = first + i % V, c = k / call.multiplier;
    const bool exists = k < call.K;
    float sum = 0;
    for (int64_t kh = 0; kh < KH; ++kh) {
      const int64_t ih = place.oh * call.SH - call.top + kh * call.DH;
      if (!exists || place.n < 0 || ih < 0 || ih >= H) continue;
      for (int64_t kw = 0; kw < KW; ++kw) {
        const int64_t iw = place.ow * call.SW - call.left + kw * call.DW;
        const bool inside = iw >= 0 && iw < W;
        const auto* x = static_cast<const Element*>(call.x) + ((place.n * H + ih) * W + iw) * C + c;
        const auto* tap = static_cast<const Element*>(call.weight) + (k * KH + kh) * KW + kw;
        sum += widen(load<1>(x, inside).lane[0]) * widen(load<1>(tap, inside).lane[0]);
      }
    }
    float z[1] = {0};
    if (exists) {
      z[0] = sum * per_channel(call.scale, k, 1) + per_channel(call.shift, k, 0);
      activate_all(call.activation, call.slope, z);
    }
    auto* to = reinterpret_cast<Element*>(middle + swizzled<Tile::kPixels>(row, vector));
    store_shared(to + i % V, narrow<Element>(z));
  }
}

template <typename Element, typename Tile>
__device__ __forceinline__ void depthwise_chunk(const SeparableCall& call,
                                                const SeparablePlan& plan, int chunk,
                                                const unsigned char* places,
                                                unsigned char* middle) {
  const DwconvCall& dw = call.depthwise;
  switch (plan.depthwise) {
    case Depthwise::three: return depthwise_three<Element, Tile, 1>(dw, chunk, places, middle);
    case Depthwise::pairs:
      if constexpr (Tile::kRows % 2 == 0)
        depthwise_three<Element, Tile, 2>(dw, chunk, places, middle);
      return;
    case Depthwise::vectors: return depthwise_vectors<Element, Tile>(dw, chunk, places, middle);
    case Depthwise::scalars: return depthwise_scalars<Element, Tile>(dw, chunk, places, middle);
  }
}

}  // namespace mnet::cuda
