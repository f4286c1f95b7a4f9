// A depthwise convolution and the 1x1 convolution that follows it, band by band: the depthwise rows
// of a band stay in a buffer in the second-level cache and are the matrix of the product.
#pragma once

#include "kernels.h"

namespace mnet::cpu {

enum class Pairing { by_cost, always, never };

struct PairPlan {
  int64_t bands;           // of one image; 0: one after the other
  double fused, separate;  // what each way costs beyond the other, in nanoseconds, estimated
};
// For calls of the same images, `depthwise`'s result being `dense`'s input.
PairPlan plan_pair(const DwconvCall& depthwise, const ConvCall& dense, int64_t threads,
                   Pairing pairing = Pairing::by_cost);

// All pointers are set but depthwise.y and dense.x. On `threads` of torch's threads, on the calling
// one alone where that is 1.
void run_pair(const DwconvCall& depthwise, const ConvCall& dense, const PairPlan& plan,
              int64_t threads);

}  // namespace mnet::cpu
