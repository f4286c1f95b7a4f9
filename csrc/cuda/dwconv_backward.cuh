// The backward of dwconv_bn_act: its variants, the choice between them, and its three steps in
// order. What is computed and what it moves: dwconv_backward_call.cuh.
#pragma once

#include <string_view>

#include "dwconv_backward_data.cuh"
#include "dwconv_backward_general.cuh"
#include "dwconv_backward_stream.cuh"
#include "dwconv_backward_sum.cuh"
#include "variants.cuh"

namespace mnet::cuda {

// The first step (dconv and the partial sums) and the third (dx). To the latter's table belongs
// "transposed" too, which is no row of it as it is made of forward kernels.
using BackwardVariants = Variants<DwconvBackwardStream, DwconvBackwardGeneral>;
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

// Which variants a call takes.
struct BackwardChoice {
  std::string_view first, data;
};

// What runs every call.
inline constexpr BackwardChoice kGeneralBackward{DwconvBackwardGeneral::kName,
                                                 DwconvBackwardDataGeneral::kName};

inline BackwardChoice choose(const DwconvBackwardCall& call) {
  BackwardChoice choice = kGeneralBackward;
  if (DwconvBackwardStream::can_run(call)) choice.first = DwconvBackwardStream::kName;
  if (DwconvBackwardDataParity::can_run(call)) choice.data = DwconvBackwardDataParity::kName;
  if (DwconvBackwardDataTransposed::can_run(call))
    choice.data = DwconvBackwardDataTransposed::kName;
  return choice;
}

// How the first step is shared out; its chunks are the rows of `partials`.
inline BackwardShare share_of(const DwconvBackwardCall& call, const BackwardChoice& choice) {
  if (choice.first == DwconvBackwardStream::kName) return DwconvBackwardStream::share(call);
  return DwconvBackwardGeneral::share(call);
}

// Whether the first step reads its dconv again, so that it has to have a place also without dx.
inline bool needs_dconv(const BackwardChoice& choice) {
  return choice.first == DwconvBackwardGeneral::kName;
}

// Starts what computes those of dx and (dweight, dscale, dshift) that have a place to go to.
// run_forward(call) starts a forward kernel of the same element. Of the passes through statistics,
// the first step is here only where it is the general kernel's.
template <typename Element, typename Launcher, typename Forward>
void launch_backward(Launcher&& launcher, const BackwardChoice& choice,
                     const DwconvBackwardCall& call, Forward&& run_forward) {
  const bool empty = call.forward.N == 0;  // sums of nothing are zeros
  const bool first =
      call.pass == BackwardPass::frozen || choice.first == DwconvBackwardGeneral::kName;
  if (!empty && first) BackwardVariants::launch<Element>(launcher, choice.first, call);
  if (call.pass == BackwardPass::reduction) return;
  if (call.dweight) launch_backward_sum<Element>(launcher, call);
  if (empty || call.dx == nullptr) return;
  if (choice.data == DwconvBackwardDataTransposed::kName)
    DwconvBackwardDataTransposed::launch<Element>(launcher, call, run_forward);
  else
    BackwardDataVariants::launch<Element>(launcher, choice.data, call);
}

}  // namespace mnet::cuda
