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

// Stages [begin, end) of a sequence, which so many images go through together.
struct Segment {
  int64_t begin, end;
  int64_t images;
};

// Weights that are asked for while an earlier stage works.
struct Asked {
  const char* from;
  int64_t bytes;
};

struct Schedule {
  Segment segment;
  std::vector<Group> groups;
  std::vector<PairCost> pairs;  // by stage: the pair that begins there, if any
  std::vector<Asked> asked;     // by stage
  std::vector<int64_t> slot;    // by stage: where its result goes; -1: to the caller, or no further
                                // than its group
  std::vector<int64_t> slots;   // sizes in bytes, of one image
  int64_t image = 0;            // the sum of slots
};

// For images that go together, on so many threads.
Schedule schedule_of(const Sequence& sequence, const Segment& segment, int64_t threads);
inline Segment whole(const Sequence& sequence, int64_t images) {
  return {0, static_cast<int64_t>(sequence.stages.size()), images};
}

// A sequence cut up for a thread that has so many images: from where on their values are small,
// more of them go through together, so that weights are read once for all and tiles are full. Only
// the value between two segments passes from one to the other.
std::vector<Segment> segments_of(const Sequence& sequence, int64_t images);

// The calls of stages for so many images; of the pointers only constants are set.
DwconvCall depthwise_call(const Sequence& sequence, int64_t i, int64_t images);
ConvCall dense_call(const Sequence& sequence, int64_t i, int64_t images);
std::vector<Step> steps_of(const Sequence& sequence, int64_t begin, int64_t end, int64_t images);

}  // namespace mnet::cpu
