// In which order and how much at a time the stages of a sequence are run, and where what passes
// between them is kept.
#pragma once

#include <vector>

#include "sequence.h"
#include "strip.h"

namespace mnet::cpu {

// Stages [begin, end) that go strip by strip, of so many rows of the last result; 0: one stage,
// whole.
struct Group {
  int64_t begin, end;
  int64_t rows;
};

struct Schedule {
  std::vector<Group> groups;
  std::vector<PairCost> pairs;  // by stage: the pair that begins there, if any
  std::vector<int64_t> slot;    // by stage: where its result goes; -1: to the caller, or no further
                                // than its group
  std::vector<int64_t> slots;   // sizes in bytes, of one image
  int64_t image = 0;            // the sum of slots
};

// For `images` images that go together, on so many threads.
Schedule schedule_of(const Sequence& sequence, int64_t images, int64_t threads);

// The calls of stages for so many images; of the pointers only constants are set.
DwconvCall depthwise_call(const Sequence& sequence, int64_t i, int64_t images);
ConvCall dense_call(const Sequence& sequence, int64_t i, int64_t images);
std::vector<Step> steps_of(const Sequence& sequence, int64_t begin, int64_t end, int64_t images);

}  // namespace mnet::cpu
