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

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bands of as many pixels as a block of the product has where its weights are large, of fewer where
// they are not; as many for each thread.
int64_t bands_of(const DwconvCall& depthwise, const ConvCall& dense, int64_t threads) {
  constexpr int64_t kBandPixels = 112, kLargeWeights = 256 << 10;
  const bool large = dense.K * dense.taps * size_of(dense.element) > kLargeWeights;
  const int64_t pixels = large ? block_pixels(dense, 1) : kBandPixels;
  // Even numbers of rows: the depthwise kernel takes two at a time.
  const int64_t rows = std::max<int64_t>(2, pixels / depthwise.OW / 2 * 2);
  const int64_t bands = ceil_div(depthwise.OH, rows);
  return std::min(depthwise.OH, std::max<int64_t>(1, ceil_div(depthwise.N * bands, threads) *
                                                         threads / depthwise.N));
}

}  // namespace

// The cost model, in nanoseconds of the slowest thread; what both ways have in common is left out.
// Rates of one core of a current server processor; only their ratios matter, within a factor of 2.
PairPlan plan_pair(const DwconvCall& depthwise, const ConvCall& dense, int64_t threads,
                   Pairing pairing) {
  constexpr double kFlops = 100, kNearBytes = 40, kFarBytes = 15;  // each ns, float32
  constexpr int64_t kNear = 512 << 10;                             // of a second-level cache
  constexpr double kMeeting = 5000;                                // of all threads
  PairPlan plan{bands_of(depthwise, dense, threads), 0, 0};
  const int64_t size = size_of(depthwise.element);
  const auto tasks = depthwise.N * plan.bands, pixels = depthwise.N * depthwise.OH * depthwise.OW;
  const double weights = static_cast<double>(dense.K * dense.taps * size);
  auto rate = [](double bytes) { return bytes < kNear ? kNearBytes : kFarBytes; };

  // One after the other: what is between them is written and read, and threads meet once more.
  // Pixels and channels are shared out evenly, and so are the weights that a thread reads.
  const double middle = static_cast<double>(pixels * depthwise.K * size) / threads;
  plan.separate = 2 * middle / rate(middle) + (threads > 1 ? kMeeting : 0) +
                  static_cast<double>(ceil_div(pixels, block_pixels(dense, threads))) / threads *
                      weights / rate(weights);

  // By bands: the thread with the most rows comes last, and reads all weights for every block.
  const int64_t band_pixels = ceil_div(depthwise.OH, plan.bands) * depthwise.OW;
  const int64_t most = ceil_div(tasks, threads);
  const double wait =
      static_cast<double>(most * band_pixels) - static_cast<double>(pixels) / threads;
  plan.fused = std::max(0.0, wait) * static_cast<double>(2 * dense.taps * dense.K) / kFlops +
               static_cast<double>(most * ceil_div(band_pixels, block_pixels(dense, 1))) * weights /
                   rate(weights);
  if (pairing == Pairing::never || (pairing == Pairing::by_cost && plan.fused > plan.separate))
    plan.bands = 0;
  return plan;
}

void run_pair(const DwconvCall& depthwise, const ConvCall& dense, const PairPlan& plan,
              int64_t threads) {
  const int64_t bands = plan.bands, tallest = ceil_div(depthwise.OH, bands);
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
