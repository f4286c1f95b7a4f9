// What conv_sequence is given, checked: its stages.
#pragma once

#include <vector>

#include "../tensor.h"
#include "launch.h"
#include "pair.h"

namespace mnet::cpu {

enum class Kind { depthwise, dense, pool, sigmoid, scale };

// Of `values`, value 0 is the sequence's input and value i + 1 the result of stage i. Every stage
// reads the value before it, and some another one: dense, `other` is added to the result; scale,
// `other` is multiplied by the value before, one factor a channel.
struct Stage {
  Problem p;  // of one image; a pool has one pixel of output
  Kind kind;
  int64_t other;  // or -1
  const float *weight, *scale, *shift;
  const float* own_weight;  // depthwise bfloat16: the weight in that type
  Pairing pairing = Pairing::by_cost;
  bool feeds_block = false;  // with the next stage, which is the only one to read the result
  int64_t last_use = 0;      // the last stage that reads the result
};

struct Sequence {
  std::vector<Stage> stages;
  bool planes = false;  // the input comes in planes of a few channels; only stage 0 reads it
};

inline int64_t size_of(DType dtype) { return dtype == DType::bfloat16 ? 2 : 4; }

// Raises what is wrong with the arguments. `constants` must outlive the result.
//
// A row of `stages` (int64, 16 columns): kind (0 depthwise, 2 always and 3 never paired with what
// follows, where it can be; 1 dense; 4 pool: the mean of all pixels; 5 scale; 6 sigmoid), C, K, KH,
// KW, SH, SW, DH, DW, top, left, bottom, right (top = -1: as TensorFlow's "same"), activation,
// other, offset in `constants`. There lie, each on its own cache lines: the weight (packed, or in
// float32 by tap; in bfloat16 depthwise ones once more in bfloat16, for kernels that want them so),
// scale, shift, slope. Of the last three only kind, C = K and other count.
Sequence checked_sequence(const Tensor& x, const Tensor& stages, const Tensor& constants);

}  // namespace mnet::cpu
