// From a checked problem to the kernels of the instruction set in use: how a call is cut into tasks
// for torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "../problem.h"
#include "kernels.h"

namespace mnet::cpu {

inline int64_t size_of(Element element) { return element == Element::bf16 ? 2 : 4; }
inline int64_t panels_of(int64_t channels) { return (channels + kPanel - 1) / kPanel; }

// Bytes of a dense convolution's packed weights: see pack_conv_weight.
inline int64_t packed_bytes(const Problem& p) {
  const int64_t taps = p.KH * p.KW * p.C, pairs = p.dtype == DType::bfloat16;
  return panels_of(p.K) * (pairs ? (taps + 1) / 2 : taps) * kPanel * 4;
}

// A call with all but its pointers.
DwconvCall dwconv_call(const Problem& p);
ConvCall conv_call(const Problem& p);

// About how many pixels a task of a dense convolution has: their patches and a panel of weights
// stay in the second-level cache, and all weights are read once for each block.
int64_t block_pixels(const ConvCall& call, int64_t threads);

// Runs a call whose pointers are set, channels_last, on `threads` of torch's threads; on the
// calling one alone where that is 1.
void run_dwconv_channels_last(DwconvCall& call, const Problem& p, int64_t threads);
void run_conv(ConvCall& call, const Problem& p, int64_t threads);
void run_pool(MapCall& call, int64_t threads);
void run_sigmoid(MapCall& call, int64_t threads);
void run_scale(MapCall& call, int64_t threads);

// The same on the calling thread and without looking at how large the call is; for parts of calls.
void run_here(DwconvCall& call);
void run_here(ConvCall& call);
void run_here(const InterleaveCall& call);

// run(begin, end) for all of [0, tasks), cut up for the threads.
template <typename Tasks>
void share(int64_t tasks, int64_t threads, const Tasks& run) {
  if (threads == 1)
    run(0, tasks);
  else
    torch::stable::parallel_for(0, tasks, 1, run);
}

}  // namespace mnet::cpu
