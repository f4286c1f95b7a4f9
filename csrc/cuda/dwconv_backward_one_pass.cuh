// All of the backward in one pass over memory, for 3x3 kernels of stride 1 and 2, channels_last:
// x and dy are read once, dx is written once, dconv lives in shared memory. The weight's sums (and,
// with frozen statistics, those of scale and shift) are left as the stream leaves them.
//
// A block owns 16 channels of a tile of columns (whole rows, unless they are long) in one image or,
// where rows are short, several, and walks down the rows. A thread owns two channels of a strip of
// 4 / S columns. A step of the walk is a row of dconv:
//   - rows of x and dy come by asynchronous copies, asked for some steps ahead: what is on its way
//     takes no registers, and the columns that strips share are read once
//   - the K rows of x that a row of dconv sees are in registers, loaded and converted once
//   - the row of dconv goes to a ring of four in shared memory; the dx that it completes is made a
//     step later, so that a step has one barrier
// Only between tiles and between row blocks is dconv computed twice; its sums are added once.
//
// Lanes are eight neighbouring pairs of channels: whole sectors. Pixels of a strip lie one apart
// from the next strip's, so that a warp's lanes meet in no bank.
#pragma once

#include <algorithm>
#include <type_traits>

#include "dwconv_backward_call.cuh"
#include "mma.cuh"

namespace mnet::cuda {

inline constexpr int kOnePassThreads = 256;  // at most
inline constexpr int kOnePassLanes = 8, kOnePassWidth = 2;
inline constexpr int kOnePassChannels = kOnePassLanes * kOnePassWidth;
inline constexpr int kOnePassKept = 4;  // rows of dconv

// Steps that copies run ahead: some 40 KiB on their way on a multiprocessor.
template <typename Element>
constexpr int kOnePassAhead = sizeof(Element) == 4 ? 2 : 3;

struct OnePassPlan {
  int groups;      // of channels
  int strips;      // of a tile, with the `beside` at each end whose dx is the next tile's
  int beside;      // 0 where a tile is a whole row
  int origin;      // column of dconv where the first tile begins, without them
  int tiles;       // in a row
  int rows;        // steps of a row block
  int row_blocks;  // in an image
  int images;      // side by side in a block
  int turns;       // of a block, each of so many images
  int chunks;      // of images

  // Shared memory: stages of what a step reads, S rows of x and one of dy, and the ring. In bytes:
  // what an image takes in a row of x and of dy; a row of x, a stage, all stages.
  int image_x, image_y, row_x, stage, stages;
  int image_dconv, row_dconv;  // in floats: likewise of the ring
  int step_x, step_dy;         // elements of x and dy that a step goes down

  int64_t blocks() const { return int64_t{groups} * tiles * row_blocks * chunks; }
  int threads() const {
    return static_cast<int>(divide_up(int64_t{images} * strips * kOnePassLanes, 32)) * 32;
  }
};

// Pixels from a strip to the next in a row of x, and in one of dy or dconv.
inline constexpr int kOnePassStripX = 5;
template <int S>
constexpr int kOnePassStripY = 4 / S + 1;

// Through: the batch's statistics, else frozen ones.
template <typename Element, int S, bool Through>
__global__ void __launch_bounds__(kOnePassThreads, 2)
    dwconv_backward_one_pass(const DwconvBackwardCall call, const OnePassPlan plan) {
  constexpr int K = 3, V = kOnePassWidth, T = 4 / S, P = kOnePassAhead<Element>;
  constexpr int kColumns = (T - 1) * S + K;  // of x, for a strip
  constexpr int kReach = (K - 1) / S;        // rows of dconv above that dx sees, and first steps
  constexpr int kPixel = kOnePassChannels * static_cast<int>(sizeof(Element));
  constexpr int kParts = kPixel / 16;  // of a copy each
  constexpr int kStripX = kOnePassStripX, kStripY = kOnePassStripY<S>;
  const DwconvCall& forward = call.forward;
  const int C = forward.C, H = forward.H, W = forward.W, OH = forward.OH, OW = forward.OW;
  const int top = forward.top, left = forward.left, N = forward.N;

  // ---- where this thread works ----
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kOnePassLanes;
  auto block = static_cast<int>(blockIdx.x);
  auto next = [&](int count) {
    const int place = block % count;
    block /= count;
    return place;
  };
  const int first_channel = next(plan.groups) * kOnePassChannels;
  const int partial = block, tile = next(plan.tiles), row_block = next(plan.row_blocks);
  const int turn = block * plan.turns;
  const int in_block = thread / kOnePassLanes;
  const bool working = in_block < plan.images * plan.strips;  // the last warp may be too many
  const int image = working ? in_block / plan.strips : 0;
  const int strip = working ? in_block % plan.strips : 0;
  const bool own = working && strip >= plan.beside && strip < plan.strips - plan.beside;
  const int c = first_channel + lane * V;
  const bool here = c < C;
  // dconv's column of the strip's first pixel, and x's that it sees first.
  const int ow =
      plan.origin + (tile * (plan.strips - 2 * plan.beside) + strip - plan.beside) * T;
  const int iw = ow * S - left;

  // Rows of dconv: those whose dx is ours, from `first` on; those that exist and that we compute.
  const int first = row_block * plan.rows;
  const int dx_rows = (H - 1 + top) / S + 1, all = dx_rows > OH ? dx_rows : OH;
  const int end = all - first < plan.rows ? all : first + plan.rows;
  const int conv_first = first > kReach ? first - kReach : 0, conv_end = end < OH ? end : OH;
  // The first steps fill the rows of x, the last one only completes dx.
  const int begin = conv_first - kReach, steps = end - begin + 1;

  auto* const stages = shared_memory();
  auto* const ring = reinterpret_cast<float*>(stages + plan.stages);
  const int at_x = image * plan.image_x + strip * kStripX * kPixel;
  const int at_y = S * plan.row_x + image * plan.image_y + strip * kStripY * kPixel;
  const int at_dconv = image * plan.image_dconv +
                       (strip + 1) * kStripY * kOnePassChannels + lane * V;

  // ---- copies ----
  // A strip's lanes copy its pixels: a lane its part of every kStep-th from `pixel` on. Of what it
  // copies, bit i of `columns` says whether it is in the plane: x's, those past the last strip, dy's.
  constexpr int kStep = kOnePassLanes / kParts, kCopies = S * T / kStep;
  constexpr int kCopiesY = T < kStep ? 1 : T / kStep;
  const int pixel = lane / kParts, part = lane % kParts;
  const int copied = first_channel + part * (16 / static_cast<int>(sizeof(Element)));
  const bool copies_halo = working && strip == plan.strips - 1 && pixel < K - S;
  const bool copies_dy = T >= kStep || pixel < T;
  uint32_t columns = 0;
  auto put = [&](int bit, int column, int size) {
    if (copied < C && static_cast<unsigned>(column) < static_cast<unsigned>(size))
      columns |= 1u << bit;
  };
  for (int i = 0; i < kCopies; ++i) put(i, iw + pixel + i * kStep, W);
  put(kCopies, iw + pixel + S * T, W);
  for (int i = 0; i < kCopiesY; ++i) put(kCopies + 1 + i, ow + pixel + i * kStep, OW);

  const int64_t image_x = int64_t{H} * (W * C), image_y = int64_t{OH} * (OW * C);
  const int top_row = begin * S - top + K - S;
  int ahead_n = turn * plan.images + image, ahead_turn = 0, ahead_d = begin, ahead_stage = 0;
  const auto* ahead_x = static_cast<const Element*>(forward.x) + ahead_n * image_x +
                        (int64_t{top_row} * W + iw + pixel) * C + copied;
  const auto* ahead_dy = static_cast<const Element*>(call.dy) + ahead_n * image_y +
                         (int64_t{begin} * OW + ow + pixel) * C + copied;
  const int copied_at = pixel * kPixel + part * 16;
  auto copy_step = [&] {
    if (ahead_turn < plan.turns && working) {
      const uint32_t valid = ahead_n < N ? columns : 0;
      unsigned char* const to = stages + ahead_stage + copied_at;
      auto copy = [&](unsigned char* place, const Element* from, uint32_t bits, int bit) {
        copy_async(place, from, (bits & 1u << bit) != 0);
      };
#pragma unroll
      for (int s = 0; s < S; ++s) {
        const bool row = static_cast<unsigned>(ahead_d * S + (K - S + s - top)) <
                         static_cast<unsigned>(H);
        const uint32_t bits = row ? valid : 0;
        unsigned char* const to_row = to + at_x + s * plan.row_x;
        const Element* const from = ahead_x + s * W * C;
#pragma unroll
        for (int i = 0; i < kCopies; ++i)
          copy(to_row + i * kStep * kPixel, from + i * kStep * C, bits, i);
        if (copies_halo) copy(to_row + kStripX * kPixel, from + S * T * C, bits, kCopies);
      }
      if (ahead_d >= conv_first && ahead_d < conv_end && copies_dy)
#pragma unroll
        for (int i = 0; i < kCopiesY; ++i)
          copy(to + at_y + i * kStep * kPixel, ahead_dy + i * kStep * C, valid, kCopies + 1 + i);
    }
    commit_copies();
    ahead_stage = ahead_stage + plan.stage == plan.stages ? 0 : ahead_stage + plan.stage;
    ahead_x += plan.step_x, ahead_dy += plan.step_dy;
    if (++ahead_d <= end) return;
    ahead_d = begin, ++ahead_turn, ahead_n += plan.images;
    ahead_x += plan.images * image_x - int64_t{steps} * plan.step_x;
    ahead_dy += plan.images * image_y - int64_t{steps} * plan.step_dy;
  };

  for (int i = thread; i < kOnePassKept * plan.row_dconv / 4; i += static_cast<int>(blockDim.x))
    store_shared(ring + i * 4, Vector<float, 4>{});
#pragma unroll
  for (int p = 0; p < P; ++p) copy_step();

  // What z and dconv take of a channel is read again in every step: registers are scarcer.
  float* const affine = ring + kOnePassKept * plan.row_dconv;
  if (thread < kOnePassChannels && first_channel + thread < C) {
    const int k = first_channel + thread;
    auto put_affine = [&](int row, const float* values, float otherwise) {
      const float value[1] = {per_channel(values, k, otherwise)};
      store_shared(affine + row * kOnePassChannels + thread, narrow<float>(value));
    };
    put_affine(0, forward.scale, 1), put_affine(1, forward.shift, 0);
    if constexpr (Through)
      put_affine(2, call.mean, 0), put_affine(3, call.by_conv, 0), put_affine(4, call.constant, 0);
  }
  float taps[K * K][V];
#pragma unroll
  for (int v = 0; v < V; ++v)
#pragma unroll
    for (int t = 0; t < K * K; ++t)
      taps[t][v] = widen(load<1>(static_cast<const Element*>(forward.weight) +
                                     static_cast<int64_t>(c + v) * (K * K) + t,
                                 here)
                             .lane[0]);
  constexpr int kRows = Through ? K * K : K * K + 2;
  float sums[kRows][V] = {};

  // The ring's row that is filled, and the three before it.
  float *now = ring + at_dconv, *above[K];
  for (int i = 0; i < K; ++i) above[i] = now + (K - i) * plan.row_dconv;
  // Bit j: whether column j of dx, the first that of tap (., 1) on our first of dconv, is ours.
  uint32_t stored = 0;
  for (int j = 0; j < S * T; ++j)
    if (own && here && static_cast<unsigned>(iw + 1 + j) < static_cast<unsigned>(W))
      stored |= 1u << j;
  // Makes the S rows of dx that the row above[0] of dconv completes.
  auto complete = [&](Element* to, int ih, uint32_t valid) {
#pragma unroll
    for (int s = 0; s < S; ++s) {
      float sum[S * T][V] = {};
#pragma unroll
      for (int kh = s; kh < K; kh += S) {
#pragma unroll
        for (int column = S == 1 ? -1 : 0; column <= T; ++column) {
          // The next strip begins a pixel later than this one ends.
          const int place = column < 0 ? -2 : column < T ? column : kStripY;
          const auto dconv = load_shared<V>(above[(kh - s) / S] + place * kOnePassChannels);
#pragma unroll
          for (int kw = 0; kw < K; ++kw) {
            const int j = column * S - 1 + kw;
            if (j < 0 || j >= S * T) continue;
#pragma unroll
            for (int v = 0; v < V; ++v) sum[j][v] += dconv.lane[v] * taps[kh * K + kw][v];
          }
        }
      }
      const uint32_t bits =
          static_cast<unsigned>(ih + s) < static_cast<unsigned>(H) ? valid : 0;
#pragma unroll
      for (int j = 0; j < S * T; ++j)
        store(to + (s * W + j) * C, narrow<Element>(sum[j]), (bits & 1u << j) != 0);
    }
  };

  // ---- the walk ----
  const bool summing = call.partials != nullptr;
  constexpr int kAtOnce = 2, kValues = kAtOnce * V;
  const int to_y = at_y - at_x;
  const unsigned char* from = stages + at_x + lane * (V * static_cast<int>(sizeof(Element)));
  const unsigned char* const from_end = from + plan.stages;
#pragma unroll 1
  for (int done = 0; done < plan.turns; ++done) {
    const int n = (turn + done) * plan.images + image;
    const bool inside = n < N && ow >= 0 && ow + T <= OW;
    const uint32_t valid = n < N && call.dx != nullptr ? stored : 0;
    // Of the rows that row `first` of dconv completes.
    int ih = S * first - top;
    auto* dx = static_cast<Element*>(call.dx) + n * image_x + (int64_t{ih} * W + iw + 1) * C + c;
    float window[K][kColumns][V] = {};  // input row i, counted from the first that comes, in i % K
#pragma unroll 1
    for (int d_first = begin; d_first <= end; d_first += K)
#pragma unroll
      for (int phase = 0; phase < K; ++phase) {
        const int d = d_first + phase;
        if (d > end) break;
        wait_copies<P - 1>();
        __syncthreads();
        copy_step();
        if (d > first) {
          if (call.dx != nullptr) complete(dx, ih, valid);
          dx += plan.step_x, ih += S;
        }
#pragma unroll
        for (int s = 0; s < S; ++s)
#pragma unroll
          for (int j = 0; j < kColumns; ++j)
            widen(load_shared<V>(reinterpret_cast<const Element*>(
                      from + s * plan.row_x + (j + j / (S * T)) * kPixel)),
                  window[(phase * S + K - S + s) % K][j]);
        const bool there = d >= conv_first && d < conv_end, adds = summing && d >= first;
        // Two columns at a time: registers.
#pragma unroll
        for (int t = 0; t < T; t += kAtOnce) {
          float dconv[kValues] = {};
          if (there) {
            float dz[kValues], conv[kValues], z[kValues];
            auto of_channels = [&](int row) {
              return load_shared<V>(affine + row * kOnePassChannels + lane * V);
            };
            const auto scale = of_channels(0), shift = of_channels(1);
            Vector<float, V> mean{};
            if constexpr (Through) mean = of_channels(2);
#pragma unroll
            for (int i = 0; i < kValues; i += V) {
              float wide[V];
              widen(load_shared<V>(reinterpret_cast<const Element*>(from + to_y +
                                                                    (t + i / V) * kPixel)),
                    wide);
#pragma unroll
              for (int v = 0; v < V; ++v) {
                dz[i + v] = wide[v];
                float sum = -mean.lane[v];
#pragma unroll
                for (int kh = 0; kh < K; ++kh)
#pragma unroll
                  for (int kw = 0; kw < K; ++kw)
                    sum += window[(phase * S + kh) % K][(t + i / V) * S + kw][v] *
                           taps[kh * K + kw][v];
                conv[i + v] = sum;
                z[i + v] = sum * scale.lane[v] + shift.lane[v];
              }
            }
            activation_backward_all(forward.activation, forward.slope, z, dz);
#pragma unroll
            for (int i = 0; i < kValues; ++i) dconv[i] = dz[i] * scale.lane[i % V];
            if constexpr (Through) {
              const auto by_conv = of_channels(3), constant = of_channels(4);
#pragma unroll
              for (int i = 0; i < kValues; ++i)
                dconv[i] += conv[i] * by_conv.lane[i % V] + constant.lane[i % V];
            }
            if (!inside)
#pragma unroll
              for (int i = 0; i < kValues; ++i)
                if (n >= N ||
                    static_cast<unsigned>(ow + t + i / V) >= static_cast<unsigned>(OW))
                  dconv[i] = dz[i] = 0;
            if (adds) {
#pragma unroll
              for (int i = 0; i < kValues; ++i) {
                if constexpr (!Through) {
                  sums[K * K][i % V] += dz[i] * conv[i];
                  sums[K * K + 1][i % V] += dz[i];
                }
#pragma unroll
                for (int kh = 0; kh < K; ++kh)
#pragma unroll
                  for (int kw = 0; kw < K; ++kw)
                    sums[kh * K + kw][i % V] +=
                        window[(phase * S + kh) % K][(t + i / V) * S + kw][i % V] * dconv[i];
              }
            }
          }
#pragma unroll
          for (int i = 0; i < kValues; i += V) {
            float pair[V];
#pragma unroll
            for (int v = 0; v < V; ++v) pair[v] = dconv[i + v];
            store_shared(now + (t + i / V) * kOnePassChannels, narrow<float>(pair), working);
          }
        }
        from = from + plan.stage == from_end ? from_end - plan.stages : from + plan.stage;
        float* const oldest = above[K - 1];
#pragma unroll
        for (int i = K - 1; i > 0; --i) above[i] = above[i - 1];
        above[0] = now, now = oldest;
      }
  }
  if (!summing) return;
  __syncthreads();
  // What no image or another tile's strip has put there.
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int v = 0; v < V; ++v) sums[i][v] = own && here ? sums[i][v] : 0;
  store_partials(call, kOnePassLanes, partial, 0, kRows, first_channel, sums,
                 static_cast<int>(blockDim.x));
}

template <bool Through>
struct DwconvBackwardOnePassOf {
  static constexpr const char* kName = "one_pass";

  static bool can_run(const DwconvBackwardCall& call) {
    const DwconvCall& f = call.forward;
    const int64_t S = f.SH, part = 16 / element_bytes(f);
    const int64_t height = f.H + 2 * f.KH + f.OH * S, width = f.W + 2 * f.KW + f.OW * S;
    return f.channels_last && f.multiplier == 1 && f.DH == 1 && f.DW == 1 && f.KH == 3 &&
           f.KW == 3 && f.SW == S && (S == 1 || S == 2) && f.C % part == 0 && aligned(f.x, 16) &&
           aligned(call.dy, 16) && aligned(call.dx, 16) &&
           fit_int32({height * width * f.C, f.N + 32, f.C * 9});
  }

  // Blocks are some two waves, where the call has as many rows.
  static OnePassPlan plan(const DwconvBackwardCall& call) {
    const DwconvCall& f = call.forward;
    const int64_t S = f.SH, T = 4 / S;
    const int64_t origin = f.left == 0 ? -1 : 0;
    const int64_t columns = std::max(f.OW - 1, (f.W + f.left - 2) / S) - origin + 1;
    constexpr int64_t kMost = kOnePassThreads / kOnePassLanes;
    int64_t strips = divide_up(columns, T), tiles = 1, images = kMost / strips;
    const bool whole = strips <= kMost;
    if (!whole) {
      tiles = divide_up(strips, kMost - 2);
      strips = divide_up(strips, tiles) + 2, images = 1;
    }
    const int64_t groups = divide_up(f.C, kOnePassChannels);
    auto blocks = [&](int64_t row_blocks) {
      return groups * tiles * row_blocks * divide_up(f.N, images);
    };
    while (images > 1 && blocks(1) < kWave) images = divide_up(images, 2);
    const int64_t all = std::max((f.H - 1 + f.top) / S + 1, f.OH);
    int64_t rows = all;
    while (rows > kFewRows && blocks(divide_up(all, rows)) < kWave) rows = divide_up(rows, 2);
    const int64_t row_blocks = divide_up(all, rows), turns = divide_up(f.N, images);
    const int64_t chunks = std::min(turns, divide_up(2 * kWave, groups * tiles * row_blocks));
    OnePassPlan plan;
    plan.groups = static_cast<int>(groups), plan.strips = static_cast<int>(strips);
    plan.beside = whole ? 0 : 1, plan.origin = static_cast<int>(origin);
    plan.tiles = static_cast<int>(tiles), plan.rows = static_cast<int>(rows);
    plan.row_blocks = static_cast<int>(row_blocks), plan.images = static_cast<int>(images);
    plan.turns = static_cast<int>(divide_up(turns, chunks));
    plan.chunks = static_cast<int>(divide_up(turns, plan.turns));
    plan.step_x = static_cast<int>(S * f.W * f.C), plan.step_dy = static_cast<int>(f.OW * f.C);

    const int pixel = kOnePassChannels * static_cast<int>(element_bytes(f));
    const int strip = S == 1 ? kOnePassStripY<1> : kOnePassStripY<2>;
    // Four pixels more of x: those past the last strip. A strip more of dconv at each end: zeros.
    plan.image_x = (plan.strips * kOnePassStripX + 4) * pixel;
    plan.image_y = plan.strips * strip * pixel;
    plan.image_dconv = (plan.strips + 2) * strip * kOnePassChannels;
    plan.row_x = plan.images * plan.image_x, plan.row_dconv = plan.images * plan.image_dconv;
    plan.stage = static_cast<int>(S) * plan.row_x + plan.images * plan.image_y;
    plan.stages = plan.stage * (1 + (f.dtype == DType::float32 ? kOnePassAhead<float>
                                                               : kOnePassAhead<bfloat16>));
    return plan;
  }

  static bool pays(const DwconvBackwardCall&) { return true; }

  // Rows of partial sums.
  static int64_t chunks(const DwconvBackwardCall& call) {
    const OnePassPlan plan = DwconvBackwardOnePassOf::plan(call);
    return plan.blocks() / plan.groups;
  }

  template <typename Element, typename Launcher>
  static void launch(Launcher&& launcher, const DwconvBackwardCall& call) {
    if (call.forward.SH == 1) return launch_as<Element, 1>(launcher, call);
    launch_as<Element, 2>(launcher, call);
  }

 private:
  // What an H100 runs at once: two blocks a multiprocessor.
  static constexpr int64_t kWave = 264;
  // A row block computes two rows again and waits for its first; of fewer rows that is dear.
  static constexpr int64_t kFewRows = 28;

  template <typename Element, int S, typename Launcher>
  static void launch_as(Launcher&& launcher, const DwconvBackwardCall& call) {
    const OnePassPlan plan = DwconvBackwardOnePassOf::plan(call);
    const int sums = partials_bytes(Through ? 9 : 11, kOnePassWidth, kOnePassThreads);
    const int bytes = std::max(plan.stages + (kOnePassKept * plan.row_dconv + 5 * kOnePassChannels) * 4, sums);
    launcher(dwconv_backward_one_pass<Element, S, Through>,
             Geometry{plan.blocks(), plan.threads(), bytes, true}, call, plan);
  }
};

using DwconvBackwardOnePass = DwconvBackwardOnePassOf<false>;
using DwconvBackwardOnePassThrough = DwconvBackwardOnePassOf<true>;

}  // namespace mnet::cuda
