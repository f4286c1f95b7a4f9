#include "pair.h"

#include <algorithm>

#include "launch.h"

namespace mnet::cpu {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Into how many bands of rows (strips) an image is cut: bands have as many pixels as a block of the
// product where its weights are large, so that they are read no more often than without bands, and
// fewer pixels where they are not; threads get equally many bands.
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

int64_t pair_rows(const DwconvCall& depthwise, const ConvCall& dense, int64_t threads) {
  return ceil_div(depthwise.OH, bands_of(depthwise, dense, threads));
}

bool in_one_go(const PairCost& cost, Pairing pairing) {
  return pairing == Pairing::always || (pairing == Pairing::by_cost && cost.fused <= cost.separate);
}

// The cost model, in nanoseconds of the slowest thread; what both ways have in common is left out.
// Rates of one core of a current server processor; only their ratios matter, within a factor of 2.
PairCost pair_cost(const DwconvCall& depthwise, const ConvCall& dense, int64_t threads) {
  constexpr double kFlops = 100, kNearBytes = 40, kFarBytes = 15;  // each nanosecond, float32
  constexpr int64_t kNear = 512 << 10;  // bytes that stay in a second-level cache
  constexpr double kMeeting = 5000;     // until all threads have met
  PairCost cost;
  const int64_t bands = bands_of(depthwise, dense, threads), size = size_of(depthwise.element);
  const auto tasks = depthwise.N * bands, pixels = depthwise.N * depthwise.OH * depthwise.OW;
  const double weights = static_cast<double>(dense.K * dense.taps * size);
  auto rate = [](double bytes) { return bytes < kNear ? kNearBytes : kFarBytes; };

  // One after the other: what is between them is written and read, and threads meet once more.
  // Pixels and channels are shared out evenly, and so are the weights that a thread reads.
  const double middle = static_cast<double>(pixels * depthwise.K * size) / threads;
  cost.separate = 2 * middle / rate(middle) + (threads > 1 ? kMeeting : 0) +
                  static_cast<double>(ceil_div(pixels, block_pixels(dense, threads))) / threads *
                      weights / rate(weights);

  // In strips: the thread with the most rows comes last, and reads all weights for every block.
  const int64_t band_pixels = ceil_div(depthwise.OH, bands) * depthwise.OW;
  const int64_t most = ceil_div(tasks, threads);
  const double wait =
      static_cast<double>(most * band_pixels) - static_cast<double>(pixels) / threads;
  cost.fused = std::max(0.0, wait) * static_cast<double>(2 * dense.taps * dense.K) / kFlops +
               static_cast<double>(most * ceil_div(band_pixels, block_pixels(dense, 1))) * weights /
                   rate(weights);
  return cost;
}

}  // namespace mnet::cpu
