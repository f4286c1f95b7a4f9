// What a convolution of few channels reads, pixel after pixel: with these rows it is a 1x1
// convolution (training of the first one).
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "../tensor.h"
#include "launch.h"
#include "result_memory.h"

namespace mnet::cpu {
namespace {

constexpr int64_t kWhole = 16;  // floats that are copied at once

// `count` floats, and up to kWhole - 1 more.
inline void copy_and_more(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kWhole) std::memcpy(to + i, from + i, kWhole * sizeof(float));
}

// Patches of rows [begin, end) of all images' outputs; `last`: where x ends.
void gather(const Problem& p, const float* x, const float* last, int64_t begin, int64_t end,
            float* y) {
  const int64_t row = p.KW * p.C, patch = p.KH * row;  // floats
  const float* y_last = y + end * p.OW * patch;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t n = at / p.OH, ih = at % p.OH * p.SH - p.top;
    for (int64_t ow = 0; ow < p.OW; ++ow) {
      const int64_t iw = ow * p.SW - p.left;
      const int64_t before = std::clamp(-iw, int64_t{0}, p.KW);
      const int64_t behind = std::clamp(iw + p.KW - p.W, int64_t{0}, p.KW - before);
      float* to = y + (at * p.OW + ow) * patch;
      for (int64_t kh = 0; kh < p.KH; ++kh, to += row) {
        if (ih + kh < 0 || ih + kh >= p.H || before + behind >= p.KW) {
          std::fill_n(to, row, 0.0f);
          continue;
        }
        const float* from = x + ((n * p.H + ih + kh) * p.W + iw + before) * p.C;
        const int64_t count = row - (before + behind) * p.C;
        // What is written beyond a row's end is written again: rows come in order.
        if (count == row && last - from >= row + kWhole && y_last - to >= row + kWhole) {
          copy_and_more(from, count, to);
        } else {
          std::fill_n(to, before * p.C, 0.0f);
          std::copy_n(from, count, to + before * p.C);
          std::fill_n(to + before * p.C + count, behind * p.C, 0.0f);
        }
      }
    }
  }
}

}  // namespace

Tensor conv_patches(Tensor x, Tensor weight, std::vector<int64_t> stride,
                    std::vector<int64_t> padding) {
  constexpr const char* kOp = "conv_patches";
  const TensorFacts facts = facts_of(x);
  const Problem p =
      checked_problem(kOp, facts, facts_of(weight), {}, {},
                      {std::move(stride), std::move(padding), {1}, "identity", 0.0, 1});
  if (p.dtype != DType::float32) check::fail(kOp, "x", "float32", facts.dtype_name);
  Tensor patches = empty_result(x, p.N, p.KH * p.KW * p.C, p.OH, p.OW, Layout::channels_last);
  const Tensor input = dense(x, Layout::channels_last);
  const auto* from = static_cast<const float*>(input.const_data_ptr());
  auto* to = static_cast<float*>(patches.mutable_data_ptr());
  share(p.N * p.OH, torch::stable::get_num_threads(), [&](int64_t begin, int64_t end) {
    gather(p, from, from + p.N * p.H * p.W * p.C, begin, end, to);
  });
  return patches;
}

}  // namespace mnet::cpu

STABLE_TORCH_LIBRARY_IMPL(mnet_kernels, CPU, m) {
  m.impl("conv_patches", TORCH_BOX(&mnet::cpu::conv_patches));
}
