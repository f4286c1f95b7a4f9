// The backward of dwconv_bn_act: its variants, the choice between them, and its steps in order.
// What is computed and what it moves: dwconv_backward_call.cuh.
#pragma once

#include <string_view>

#include "dwconv_backward_data.cuh"
#include "dwconv_backward_general.cuh"
#include "dwconv_backward_one_pass.cuh"
#include "dwconv_backward_stream.cuh"
#include "dwconv_backward_sum.cuh"
#include "variants.cuh"

namespace mnet::cuda {

// The first step (dconv and the partial sums; one_pass: dx too) and the third (dx). To the latter's
// table belongs "transposed" too, which is no row of it as it is made of forward kernels.
using BackwardVariants =
    Variants<DwconvBackwardOnePass, DwconvBackwardStream, DwconvBackwardGeneral>;
// The first step through the batch's statistics, where it is not the general kernel's.
using BackwardThroughVariants = Variants<DwconvBackwardOnePassThrough, DwconvBackwardStreamThrough>;
using BackwardDataVariants = Variants<DwconvBackwardDataParity, DwconvBackwardDataGeneral>;

inline std::vector<const char*> backward_data_names() {
  auto names = BackwardDataVariants::names();
  names.push_back(DwconvBackwardDataTransposed::kName);
  return names;
}

inline std::vector<const char*> backward_data_able(const DwconvBackwardCall& call) {
  auto names = BackwardDataVariants::able(call);
  if (DwconvBackwardDataTransposed::can_run(call))
    names.push_back(DwconvBackwardDataTransposed::kName);
  return names;
}

// Which variants a call takes; of one_pass, dx's is itself.
struct BackwardChoice {
  std::string_view first, data;

  bool is_one_pass() const { return first == DwconvBackwardOnePass::kName; }
  bool is_general() const { return first == DwconvBackwardGeneral::kName; }
  // Whether dconv has to have a place in memory. The general kernel reads it again itself.
  bool needs_dconv(bool dx) const { return is_general() || (dx && !is_one_pass()); }
  bool needs_flipped() const { return data == DwconvBackwardDataTransposed::kName; }
};

// What runs every call.
inline constexpr BackwardChoice kGeneralBackward{DwconvBackwardGeneral::kName,
                                                 DwconvBackwardDataGeneral::kName};

// The fastest variants for a call, or the fastest of those whose first step is `forced`, if that
// can run it.
inline BackwardChoice choose(const DwconvBackwardCall& call, std::string_view forced = {}) {
  if (forced == DwconvBackwardGeneral::kName) return kGeneralBackward;
  const bool through = call.pass != BackwardPass::frozen;
  const std::string_view one_pass = DwconvBackwardOnePass::kName;
  if (DwconvBackwardOnePass::can_run(call) &&
      (forced == one_pass || (forced.empty() && DwconvBackwardOnePass::pays(call))))
    return {one_pass, one_pass};
  BackwardChoice choice = kGeneralBackward;
  if (through ? DwconvBackwardStreamThrough::can_run(call) : DwconvBackwardStream::can_run(call))
    choice.first = DwconvBackwardStream::kName;
  if (DwconvBackwardDataParity::can_run(call)) choice.data = DwconvBackwardDataParity::kName;
  if (DwconvBackwardDataTransposed::can_run(call))
    choice.data = DwconvBackwardDataTransposed::kName;
  return choice;
}

// Rows of partial sums that the first step leaves; of sums of the weight, if through statistics.
inline int64_t chunks_of(const DwconvBackwardCall& call, const BackwardChoice& choice) {
  if (call.forward.N == 0) return 0;
  if (choice.is_one_pass()) return DwconvBackwardOnePass::chunks(call);
  if (choice.is_general()) return DwconvBackwardGeneral::share(call).chunks;
  return call.pass == BackwardPass::frozen ? DwconvBackwardStream::share(call).chunks
                                           : DwconvBackwardStreamThrough::share(call).chunks;
}

// Starts what computes those of dx and (dweight, dscale, dshift) that have a place to go to.
// run_forward(call) starts a forward kernel of the same element. Of the passes through statistics,
// the first step is here only where it is the general kernel's, the others' is training's.
template <typename Element, typename Launcher, typename Forward>
void launch_backward(Launcher&& launcher, const BackwardChoice& choice,
                     const DwconvBackwardCall& call, Forward&& run_forward) {
  const bool empty = call.forward.N == 0;  // sums of nothing are zeros
  const bool first = call.pass == BackwardPass::frozen || choice.is_general();
  if (!empty && first) BackwardVariants::launch<Element>(launcher, choice.first, call);
  if (call.pass == BackwardPass::reduction) return;
  if (call.dweight) launch_backward_sum<Element>(launcher, call);
  if (empty || call.dx == nullptr || choice.is_one_pass()) return;
  if (choice.data == DwconvBackwardDataTransposed::kName)
    DwconvBackwardDataTransposed::launch<Element>(launcher, call, run_forward);
  else
    BackwardDataVariants::launch<Element>(launcher, choice.data, call);
}

}  // namespace mnet::cuda
