// The patches of conv_bn_act: one chunk of the depth of a tile of pixels, into shared memory as
// the product wants it; zeros past the depth, past the image's edges and past the last pixel.
#pragma once

#include "conv_call.cuh"

namespace mnet::cuda {

// A thread gathers vector `vector` of rows `row`, `row` + `apart`, ... A row's vectors are one
// warp's. Eight lanes next to each other have eight vectors of a row or, of fewer, one vector of
// eight rows: either way they write to different banks (swizzled()).
struct ConvLane {
  int vector, row, apart;
};

template <typename Tile>
__device__ __forceinline__ ConvLane conv_lane(const ConvPlan& plan, int thread) {
  const int rows_log2 = 5 - plan.lanes_log2, lane = thread % 32;  // rows of a warp at a time
  const int first = thread / 32 << rows_log2, apart = Tile::kThreads >> plan.lanes_log2;
  if (plan.lanes_log2 < 3)
    return {lane >> rows_log2, first + (lane & ((1 << rows_log2) - 1)), apart};
  return {lane & ((1 << plan.lanes_log2) - 1), first + (lane >> plan.lanes_log2), apart};
}

// Where a pixel has its window in the input.
struct ConvWindow {
  int64_t at;  // of its first row and column, in elements from x; may lie outside of it
  int ih, iw;  // ih is H, below the image, where there is no pixel
};

__device__ __forceinline__ ConvWindow window_of(const DwconvCall& conv, const ConvPlan& plan,
                                                int64_t pixel) {
  const int64_t H = conv.H, W = conv.W;
  if (pixel >= plan.pixels) return {0, static_cast<int>(H), 0};
  int oh, ow;
  if (plan.small) {
    auto n = static_cast<uint32_t>(pixel);
    ow = static_cast<int>(plan.columns.divide(n)), oh = static_cast<int>(plan.rows.divide(n));
    pixel = n;
  } else {
    ow = static_cast<int>(pixel % plan.columns.value), pixel /= plan.columns.value;
    oh = static_cast<int>(pixel % plan.rows.value), pixel /= plan.rows.value;
  }
  const int ih = oh * static_cast<int>(conv.SH) - static_cast<int>(conv.top);
  const int iw = ow * static_cast<int>(conv.SW) - static_cast<int>(conv.left);
  return {((pixel * H + ih) * W + iw) * conv.C, ih, iw};
}

// Each warp writes the windows of the rows that it gathers, of the tile whose first pixel is
// `first`.
template <typename Tile>
__device__ __forceinline__ void store_windows(int thread, const DwconvCall& conv,
                                              const ConvPlan& plan, int64_t first,
                                              unsigned char* windows) {
  const int lane = thread % 32;
  const int rows_log2 = 5 - plan.lanes_log2;  // of a warp at a time
  const int row = (thread / 32 << rows_log2) + (lane & ((1 << rows_log2) - 1)) +
                  (lane >> rows_log2) * (Tile::kThreads >> plan.lanes_log2);
  __syncwarp();  // the last tile's are not needed any more
  if (row < Tile::kPixels) {
    const ConvWindow window = window_of(conv, plan, first + row);
    const auto at = static_cast<uint64_t>(window.at);
    Vector<uint32_t, 4> words;
    words.lane[0] = static_cast<uint32_t>(at), words.lane[1] = static_cast<uint32_t>(at >> 32);
    words.lane[2] = window.ih, words.lane[3] = window.iw;
    store_shared(reinterpret_cast<uint32_t*>(windows) + row * 4, words);
  }
  __syncwarp();
}

__device__ __forceinline__ ConvWindow load_window(const unsigned char* windows, int row) {
  const auto words = load_shared<4>(reinterpret_cast<const uint32_t*>(windows) + row * 4);
  return {static_cast<int64_t>(words.lane[0] | static_cast<uint64_t>(words.lane[1]) << 32),
          static_cast<int>(words.lane[2]), static_cast<int>(words.lane[3])};
}

template <typename Element, typename Tile>
__device__ __forceinline__ void gather_rows(const ConvLane& lane, const DwconvCall& conv,
                                            const ConvPlan& plan, int64_t first, int chunk,
                                            unsigned char* to) {
  const int c = (chunk * Tile::kVectors + lane.vector) * static_cast<int>(16 / sizeof(Element));
  const auto* x = static_cast<const Element*>(conv.x);
  to += swizzled<Tile::kPixels>(lane.row, lane.vector);
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
    const int row = lane.row + r * lane.apart;
    if (row >= Tile::kPixels) break;
    const bool exists = c < plan.depth && first + row < plan.pixels;
    copy_async(to + r * lane.apart * kSlabBytes, exists ? x + (first + row) * plan.depth + c : x,
               exists);
  }
}

template <typename Element, typename Tile>
__device__ __forceinline__ void gather_vectors(const ConvLane& lane, const DwconvCall& conv,
                                               const ConvPlan& plan, const unsigned char* windows,
                                               int chunk, unsigned char* to) {
  constexpr int V = 16 / sizeof(Element);
  uint32_t kh = chunk * Tile::kVectors + lane.vector;
  const bool exists = static_cast<int>(kh) * V < plan.depth;
  const uint32_t c = plan.channels.divide(kh) * V, kw = plan.kernel_columns.divide(kh);
  const int dh = static_cast<int>(kh) * static_cast<int>(conv.DH);
  const int dw = static_cast<int>(kw) * static_cast<int>(conv.DW);
  const int64_t at = (dh * conv.W + dw) * conv.C + c;
  const auto* x = static_cast<const Element*>(conv.x);
  to += swizzled<Tile::kPixels>(lane.row, lane.vector);
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
    if (lane.row + r * lane.apart >= Tile::kPixels) break;
    const ConvWindow window = load_window(windows, lane.row + r * lane.apart);
    const bool inside = exists &&
                        static_cast<unsigned>(window.ih + dh) < static_cast<unsigned>(conv.H) &&
                        static_cast<unsigned>(window.iw + dw) < static_cast<unsigned>(conv.W);
    copy_async(to + r * lane.apart * kSlabBytes, inside ? x + window.at + at : x, inside);
  }
}

// Two rows at a time. In a row of x, neighbours of the depth are neighbours until a row of taps
// ends; of a dilated kernel, until a tap ends.
template <typename Element, typename Tile>
__device__ __forceinline__ void gather_elements(const ConvLane& lane, const DwconvCall& conv,
                                                const ConvPlan& plan, const unsigned char* windows,
                                                int chunk, unsigned char* to) {
  constexpr int V = 16 / sizeof(Element), kTogether = Tile::kRows > 1 ? 2 : 1;
  const int first = (chunk * Tile::kVectors + lane.vector) * V, C = conv.C, DH = conv.DH;
  const int H = conv.H, width = conv.W * C, DW = conv.DW;  // in elements, as all columns are here
  const int gap = (DW - 1) * C, end = static_cast<int>(conv.KW) * DW * C;
  const int next_row = DH * width - end;
#pragma unroll 1
  for (int row = lane.row; row < Tile::kPixels; row += kTogether * lane.apart) {
    const Element* x[kTogether];
    int ih[kTogether], iw[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const bool exists = row + i * lane.apart < Tile::kPixels;
      const ConvWindow window = load_window(windows, exists ? row + i * lane.apart : row);
      x[i] = anew(static_cast<const Element*>(conv.x) + window.at);
      ih[i] = window.ih, iw[i] = window.iw * C;
    }
    uint32_t kh = anew(first);
    int c = static_cast<int>(plan.channels.divide(kh));
    int column = static_cast<int>(plan.kernel_columns.divide(kh)) * (DW * C) + c;
    int dh = static_cast<int>(kh) * DH, at = dh * width + column;
    Vector<Element, 1> values[kTogether][V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      // Without a branch.
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        values[i][v] = load<1>(
            x[i] + at, (first + v < plan.depth) &
                           (static_cast<unsigned>(ih[i] + dh) < static_cast<unsigned>(H)) &
                           (static_cast<unsigned>(iw[i] + column) < static_cast<unsigned>(width)));
      ++column, ++at;
      const bool ends_tap = ++c == C;
      c = ends_tap ? 0 : c;
      column += ends_tap ? gap : 0;
      at += ends_tap ? gap : 0;
      const bool ends_row = column == end;
      column = ends_row ? 0 : column;
      dh += ends_row ? DH : 0;
      at += ends_row ? next_row : 0;
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      auto* place = to + swizzled<Tile::kPixels>(row, lane.vector) + i * lane.apart * kSlabBytes;
      store_shared(reinterpret_cast<Element*>(place), join(values[i]),
                   row + i * lane.apart < Tile::kPixels);
    }
  }
}

}  // namespace mnet::cuda
