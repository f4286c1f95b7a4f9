#include "pair.h"

#include <algorithm>

#include "launch.h"
#include "memory.h"

namespace mnet::cpu {
namespace {

int64_t size_of(Element element) { return element == Element::bf16 ? 2 : 4; }

// Output rows [oh, oh_end) of image n of both, what is between them in `band`.
void run_band(DwconvCall depthwise, ConvCall dense, int64_t n, int64_t oh, int64_t oh_end,
              void* band) {
  const int64_t size = size_of(depthwise.element);
  auto image = [&](const void* p, int64_t values) {
    return static_cast<const char*>(p) + n * values * size;
  };
  depthwise.x = image(depthwise.x, depthwise.H * depthwise.W * depthwise.C);
  depthwise.y = band;
  depthwise.top -= oh * depthwise.SH;
  depthwise.N = 1, depthwise.OH = oh_end - oh;
  depthwise.stream = false;
  run_dwconv_channels_last_here(depthwise);

  const int64_t offset = (n * dense.OH + oh) * dense.OW * dense.K * size;
  dense.x = band;
  dense.y = static_cast<char*>(dense.y) + offset;
  if (dense.residual) dense.residual = static_cast<const char*>(dense.residual) + offset;
  dense.N = 1, dense.H = dense.OH = oh_end - oh;
  run_conv_here(dense);
}

}  // namespace

// Not where bands for all threads would be too small to pay for reading the weights once more each.
PairPlan plan_pair(const DwconvCall& depthwise, const ConvCall&, int64_t threads) {
  constexpr int64_t kBandPixels = 112, kFewestPixels = 56;
  // Even numbers of rows: the depthwise kernel takes two at a time.
  const int64_t rows = std::max<int64_t>(2, kBandPixels / depthwise.OW / 2 * 2);
  int64_t bands = (depthwise.OH + rows - 1) / rows;
  bands = (depthwise.N * bands + threads - 1) / threads * threads / depthwise.N;
  if (threads > 1 && depthwise.OH * depthwise.OW < bands * kFewestPixels) return {0};
  return {bands};
}

void run_pair(const DwconvCall& depthwise, const ConvCall& dense, const PairPlan& plan,
              int64_t threads) {
  const int64_t bands = plan.bands, tallest = (depthwise.OH + bands - 1) / bands;
  const auto bytes =
      static_cast<std::size_t>(tallest * depthwise.OW * depthwise.K * size_of(depthwise.element));
  share(depthwise.N * bands, threads, [&](int64_t begin, int64_t end) {
    void* band = scratch_bytes<Scratch::band>(bytes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / bands, in_image = task % bands;
      run_band(depthwise, dense, n, in_image * depthwise.OH / bands,
               (in_image + 1) * depthwise.OH / bands, band);
    }
  });
}

}  // namespace mnet::cpu
