// In which order and how much at a time the stages of a sequence are run, and where what passes
// between them is kept.
#pragma once

#include <vector>

#include "sequence.h"
#include "strip.h"

namespace mnet::cpu {

// Stages [begin, end) that an image goes through together, `rows` rows of the last result at a time
// (a strip, see strip.h); rows = 0: a single stage, run as a whole.
struct Group {
  int64_t begin, end;
  int64_t rows;
};

// Stages [begin, end) of a sequence, which `images` images go through together.
struct Segment {
  int64_t begin, end;
  int64_t images;
};

// Weights of a later stage that are prefetched while an earlier one works.
struct Asked {
  const char* from;
  int64_t bytes;
};

struct Schedule {
  Segment segment;
  std::vector<Group> groups;
  std::vector<PairCost> pairs;  // by stage: the pair that begins there, if any
  std::vector<Asked> asked;     // by stage
  // By stage, the slot of memory that its result goes to; -1: it goes to the caller, or does not
  // leave its group. Slots are used again when what is in them has been read for the last time.
  std::vector<int64_t> slot;
  std::vector<int64_t> slots;  // their sizes in bytes, of one image
  int64_t image = 0;           // the sum of slots
};

// For images that go together, on so many threads.
Schedule schedule_of(const Sequence& sequence, const Segment& segment, int64_t threads);
inline Segment whole(const Sequence& sequence, int64_t images) {
  return {0, static_cast<int64_t>(sequence.stages.size()), images};
}

// A sequence cut up for a thread that has `images` images of its own. The further down a network,
// the smaller its values: later segments take more images at a time, so that weights are read once
// for all of them and tiles are full. Cuts lie where one value alone passes from before to after.
std::vector<Segment> segments_of(const Sequence& sequence, int64_t images);

// The calls of stages for `images` images; of the pointers only those to constants are set.
DwconvCall depthwise_call(const Sequence& sequence, int64_t i, int64_t images);
ConvCall dense_call(const Sequence& sequence, int64_t i, int64_t images);
std::vector<Step> steps_of(const Sequence& sequence, int64_t begin, int64_t end, int64_t images);

}  // namespace mnet::cpu
