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
//   - the row of dconv goes to a ring in shared memory; the dx that it completes is made a step
//     later, so that a step has one barrier
// Only between tiles and between row blocks is dconv computed twice; its sums are added once.
//
// Lanes are eight neighbouring pairs of channels: whole sectors. Pixels of a strip lie one apart
// from the next strip's, so that a warp's lanes meet in no bank.
#pragma once

#include <algorithm>

#include "dwconv_backward_one_pass_plan.cuh"
#include "mma.cuh"

namespace mnet::cuda {

// Through: the batch's statistics, else frozen ones. Known: the other activations take more
// registers.
template <typename Element, int S, bool Through, Activations Known>
__global__ void __launch_bounds__(kOnePassThreads, Known == Activations::clamps ? 2 : 1)
    dwconv_backward_one_pass(const DwconvBackwardCall call, const OnePassPlan plan) {
  constexpr int K = 3, V = kOnePassWidth, T = 4 / S, P = kOnePassAhead<Element>;
  constexpr int kColumns = (T - 1) * S + K;  // of x, for a strip
  constexpr int kReach = (K - 1) / S;        // rows of dconv above that dx sees; first steps
  constexpr int kPixel = kOnePassChannels * static_cast<int>(sizeof(Element));
  constexpr int kParts = kPixel / 16;  // of a copy each
  constexpr int kStripDconv = one_pass_strip_of_dconv(S), kRing = one_pass_ring(S);
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
  const int ow = plan.origin + (tile * (plan.strips - 2 * plan.beside) + strip - plan.beside) * T;
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
  const int at_stage = image * ((S + 1) * plan.row) + strip * (kOnePassStrip * kPixel);
  const int at_dconv =
      image * plan.image_dconv + (2 + strip * kStripDconv) * kOnePassChannels + lane * V;

  // ---- what of it is in the planes: a register of bits, as there are too few for more ----
  // A strip's lanes copy its pixels: a lane its part of every kStep-th from `pixel` on.
  constexpr int kStep = kOnePassLanes / kParts, kCopies = S * T / kStep;
  constexpr int kCopiesY = T < kStep ? 1 : T / kStep;
  constexpr int kX = 0, kHalo = kX + kCopies, kY = kHalo + 1;  // copies; past the last strip
  constexpr int kDx = kY + kCopiesY, kDconv = kDx + S * T;     // columns to be stored, to be summed
  const int pixel = lane / kParts, part = lane % kParts;
  const int copied = first_channel + part * (16 / static_cast<int>(sizeof(Element)));
  uint32_t inside = 0;
  auto put = [&](int bit, bool wanted, int column, int size) {
    if (wanted && static_cast<unsigned>(column) < static_cast<unsigned>(size)) inside |= 1u << bit;
  };
#pragma unroll
  for (int i = 0; i < kCopies; ++i) put(kX + i, copied < C, iw + pixel + i * kStep, W);
  put(kHalo, copied < C, iw + pixel + S * T, W);
#pragma unroll
  for (int i = 0; i < kCopiesY; ++i) put(kY + i, copied < C, ow + pixel + i * kStep, OW);
  // dx's first column is that of tap (., 1) on our first of dconv.
#pragma unroll
  for (int j = 0; j < S * T; ++j) put(kDx + j, own && here, iw + 1 + j, W);
#pragma unroll
  for (int t = 0; t < T; ++t) put(kDconv + t, true, ow + t, OW);
  constexpr uint32_t kAllDconv = ((1u << T) - 1) << kDconv;

  // ---- copies ----
  const bool copies_halo = working && strip == plan.strips - 1 && pixel < K - S;
  const bool copies_dy = T >= kStep || pixel < T;
  const int64_t image_x = int64_t{H} * (W * C), image_y = int64_t{OH} * (OW * C);
  const int top_row = begin * S - top + K - S, first_n = turn * plan.images + image;
  int ahead_n = first_n, ahead_turn = 0, ahead_d = begin;
  const auto* ahead_x = static_cast<const Element*>(forward.x) + first_n * image_x +
                        (int64_t{top_row} * W + iw + pixel) * C + copied;
  const auto* ahead_dy = static_cast<const Element*>(call.dy) + first_n * image_y +
                         (int64_t{begin} * OW + ow + pixel) * C + copied;
  unsigned char* const copied_to = stages + at_stage + pixel * kPixel + part * 16;
  auto copy_step = [&](int stage) {
    if (ahead_turn < plan.turns && working) {
      const uint32_t valid = ahead_n < N ? inside : 0;
      unsigned char* const to = copied_to + stage;
      auto has = [](uint32_t bits, int bit) { return (bits & 1u << bit) != 0; };
#pragma unroll
      for (int s = 0; s < S; ++s) {
        const bool row =
            static_cast<unsigned>(ahead_d * S + (K - S + s - top)) < static_cast<unsigned>(H);
        const uint32_t bits = row ? valid : 0;
        unsigned char* const to_row = to + s * plan.row;
        const Element* const from = ahead_x + s * W * C;
#pragma unroll
        for (int i = 0; i < kCopies; ++i)
          copy_async(to_row + i * kStep * kPixel, from + i * kStep * C, has(bits, kX + i));
        if (copies_halo)
          copy_async(to_row + kOnePassStrip * kPixel, from + S * T * C, has(bits, kHalo));
      }
      if (ahead_d >= conv_first && ahead_d < conv_end && copies_dy)
#pragma unroll
        for (int i = 0; i < kCopiesY; ++i)
          copy_async(to + S * plan.row + i * kStep * kPixel, ahead_dy + i * kStep * C,
                     has(valid, kY + i));
    }
    commit_copies();
    ahead_x += plan.step_x, ahead_dy += plan.step_dy;
    if (++ahead_d <= end) return;
    ahead_d = begin, ++ahead_turn, ahead_n += plan.images;
    ahead_x += plan.images * image_x - int64_t{steps} * plan.step_x;
    ahead_dy += plan.images * image_y - int64_t{steps} * plan.step_dy;
  };

  for (int i = thread; i < kRing * plan.row_dconv / 4; i += static_cast<int>(blockDim.x))
    store_shared(ring + i * 4, Vector<float, 4>{});
#pragma unroll
  for (int p = 0; p < P; ++p) copy_step(p * plan.stage);

  // What z and dconv take of a channel is read again in every step: registers are few.
  float* const affine = ring + kRing * plan.row_dconv;
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

  // The ring's row that is filled, and those before it.
  float *now = ring + at_dconv, *above[kReach + 1];
#pragma unroll
  for (int i = 0; i <= kReach; ++i) above[i] = now + (i + 1) * plan.row_dconv;
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
          const int place = column < 0 ? -2 : column < T ? column : kStripDconv;
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
      const uint32_t bits = static_cast<unsigned>(ih + s) < static_cast<unsigned>(H) ? valid : 0;
#pragma unroll
      for (int j = 0; j < S * T; ++j)
        store(to + (s * W + j) * C, narrow<Element>(sum[j]), (bits & 1u << (kDx + j)) != 0);
    }
  };

  // ---- the walk ----
  const bool summing = call.partials != nullptr;
  constexpr int kAtOnce = S == 1 ? 2 : 1, kValues = kAtOnce * V;  // columns: registers are few
  // The rows of x that a row of dconv sees: of stride 1, copies of the step's body have them where
  // they are, of stride 2 one is moved.
  constexpr int kPhases = S == 1 ? K : 1;
  const unsigned char* const first_stage =
      stages + at_stage + lane * (V * static_cast<int>(sizeof(Element)));
  int stage = 0;
  // Of the rows that row `first` of dconv completes.
  auto* dx = static_cast<Element*>(call.dx) + first_n * image_x +
             (int64_t{S * first - top} * W + iw + 1) * C + c;
#pragma unroll 1
  for (int done = 0; done < plan.turns; ++done) {
    const uint32_t there = first_n + done * plan.images < N ? inside : 0;
    float window[K][kColumns][V] = {};
#pragma unroll 1
    for (int d_first = begin; d_first <= end; d_first += kPhases)
#pragma unroll
      for (int phase = 0; phase < kPhases; ++phase) {
        auto row = [&](int i) -> float (&)[kColumns][V] { return window[(phase + i) % K]; };
        const int d = d_first + phase;
        if (d > end) break;
        wait_copies<P - 1>();
        __syncthreads();
        copy_step(stage == 0 ? plan.stages - plan.stage : stage - plan.stage);  // the last step's
        if (d > first) {
          if (call.dx != nullptr) complete(dx, S * (d - 1) - top, there);
          dx += plan.step_x;
        }
        const unsigned char* const from = first_stage + stage;
        stage = stage + plan.stage == plan.stages ? 0 : stage + plan.stage;
#pragma unroll
        for (int s = 0; s < S; ++s)
#pragma unroll
          for (int j = 0; j < kColumns; ++j)
            widen(load_shared<V>(reinterpret_cast<const Element*>(from + s * plan.row +
                                                                  (j + j / (S * T)) * kPixel)),
                  row(K - S + s)[j]);
        const bool exists = d >= conv_first && d < conv_end, adds = summing && d >= first;
#pragma unroll
        for (int t = 0; t < T; t += kAtOnce) {
          float dconv[kValues] = {};
          if (exists) {
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
              widen(load_shared<V>(reinterpret_cast<const Element*>(from + S * plan.row +
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
                    sum += row(kh)[(t + i / V) * S + kw][v] * taps[kh * K + kw][v];
                conv[i + v] = sum;
                z[i + v] = sum * scale.lane[v] + shift.lane[v];
              }
            }
            activation_backward_all<Known>(forward.activation, forward.slope, z, dz);
#pragma unroll
            for (int i = 0; i < kValues; ++i) dconv[i] = dz[i] * scale.lane[i % V];
            if constexpr (Through) {
              const auto by_conv = of_channels(3), constant = of_channels(4);
#pragma unroll
              for (int i = 0; i < kValues; ++i)
                dconv[i] += conv[i] * by_conv.lane[i % V] + constant.lane[i % V];
            }
            if ((there & kAllDconv) != kAllDconv)
#pragma unroll
              for (int i = 0; i < kValues; ++i)
                if ((there & 1u << (kDconv + t + i / V)) == 0) dconv[i] = dz[i] = 0;
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
                    sums[kh * K + kw][i % V] += row(kh)[(t + i / V) * S + kw][i % V] * dconv[i];
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
        if constexpr (kPhases == 1)
#pragma unroll
          for (int j = 0; j < kColumns; ++j)
#pragma unroll
            for (int v = 0; v < V; ++v) window[0][j][v] = window[K - 1][j][v];
        float* const oldest = above[kReach];
#pragma unroll
        for (int i = kReach; i > 0; --i) above[i] = above[i - 1];
        above[0] = now, now = oldest;
      }
    dx += plan.images * image_x - int64_t{end - first} * plan.step_x;
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

  // Fewer bytes than the three steps at every size of plane, and no more instructions. But a block
  // walks alone, row after row: not where some multiprocessors would have none.
  static bool pays(const DwconvBackwardCall& call) {
    return call.forward.N > 0 && one_pass_plan(call).blocks() >= kOnePassWave / 2;
  }

  // Rows of partial sums.
  static int64_t chunks(const DwconvBackwardCall& call) {
    const OnePassPlan plan = one_pass_plan(call);
    return plan.blocks() / plan.groups;
  }

  template <typename Element, typename Launcher>
  static void launch(Launcher&& launcher, const DwconvBackwardCall& call) {
    if (call.forward.SH == 1) return launch_as<Element, 1>(launcher, call);
    launch_as<Element, 2>(launcher, call);
  }

 private:
  template <typename Element, int S, typename Launcher>
  static void launch_as(Launcher&& launcher, const DwconvBackwardCall& call) {
    const OnePassPlan plan = one_pass_plan(call);
    const int sums = partials_bytes(Through ? 9 : 11, kOnePassWidth, plan.threads());
    with_activations<true>(call.forward, [&](auto known) {
      launcher(dwconv_backward_one_pass<Element, S, Through, known>,
               Geometry{plan.blocks(), plan.threads(), std::max(plan.shared_bytes, sums), true},
               call, plan);
    });
  }
};

using DwconvBackwardOnePass = DwconvBackwardOnePassOf<false>;
using DwconvBackwardOnePassThrough = DwconvBackwardOnePassOf<true>;

}  // namespace mnet::cuda
