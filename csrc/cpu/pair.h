// A depthwise convolution and the 1x1 convolution that follows it: in one pass, strip by strip
// (strip.h), or one after the other; and a cost model that says which is faster.
#pragma once

#include "kernels.h"

namespace mnet::cpu {

enum class Pairing { by_cost, always, never };

// Estimated nanoseconds of each way, without what both have in common.
struct PairCost {
  double fused = 0, separate = 0;
};
// For calls of the same images, `depthwise`'s result being `dense`'s input.
PairCost pair_cost(const DwconvCall& depthwise, const ConvCall& dense, int64_t threads);
bool in_one_go(const PairCost& cost, Pairing pairing);

// Output rows of a strip of the two.
int64_t pair_rows(const DwconvCall& depthwise, const ConvCall& dense, int64_t threads);

}  // namespace mnet::cpu
