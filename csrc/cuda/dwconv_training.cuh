// Training: its variants, the choice between them, and the steps of forward and backward in order.
// What is computed and what it moves: dwconv_training_call.cuh.
#pragma once

#include "dwconv_backward.cuh"
#include "dwconv_training_stream.cuh"

namespace mnet::cuda {

// Moments for any call: an output a thread at a time.
template <typename Element, typename Index>
__global__ void __launch_bounds__(kBackwardThreads)
    dwconv_training_general(const DwconvTrainingCall call, const BackwardShare share) {
  const DwconvCall& forward = call.backward.forward;
  const Index groups = share.groups, chunk = static_cast<Index>(blockIdx.x) / groups;
  const Index group = static_cast<Index>(blockIdx.x) % groups;
  const auto at = backward_place<Index>(call.backward, share, group, chunk);
  const Index taps = static_cast<Index>(forward.KH) * static_cast<Index>(forward.KW);
  const auto* weight = static_cast<const Element*>(forward.weight) + at.k * taps;
  ShiftedSums<1> moments;
  for (Index item = at.item; item < at.end; item += at.step) {
    const float conv[1] = {
        convolution_at<Element>(forward, weight, OutputPixel<Index>(forward, item, at.k))};
    moments.add(conv);
  }
  store_moments(call, share, chunk, group * share.lanes, moments);
}

struct DwconvTrainingGeneral {
  static constexpr const char* kName = DwconvBackwardGeneral::kName;

  static bool can_run(const DwconvTrainingCall&) { return true; }

  // The reduction is the backward's general kernel's.
  template <typename Element, typename Launcher>
  static void launch(Launcher&& launcher, const DwconvTrainingCall& call) {
    const BackwardShare share = DwconvBackwardGeneral::share(call.backward);
    const Geometry geometry{share.blocks(), kBackwardThreads, moments_bytes(1), true};
    if (DwconvBackwardGeneral::fits_int32(call.backward.forward))
      launcher(dwconv_training_general<Element, int>, geometry, call, share);
    else
      launcher(dwconv_training_general<Element, int64_t>, geometry, call, share);
  }
};

// The passes that sum. Those that make dconv: the backward's, see choose().
using TrainingVariants = Variants<DwconvTrainingStream, DwconvTrainingGeneral>;

struct TrainingChoice {
  std::string_view sums;
  BackwardChoice backward;
};

inline constexpr TrainingChoice kGeneralTraining{DwconvTrainingGeneral::kName, kGeneralBackward};

// forced: of the first step of the backward.
inline TrainingChoice choose(const DwconvTrainingCall& call, std::string_view forced = {}) {
  if (forced == DwconvBackwardGeneral::kName) return kGeneralTraining;
  TrainingChoice choice{DwconvTrainingGeneral::kName, choose(call.backward, forced)};
  if (DwconvTrainingStream::can_run(call)) choice.sums = DwconvTrainingStream::kName;
  return choice;
}

inline bool is_general(std::string_view variant) { return variant == DwconvBackwardGeneral::kName; }

// Rows of moments, or of the reduction's sums: of the call's pass.
inline int64_t chunks_of_sums(const DwconvTrainingCall& call, const TrainingChoice& choice) {
  if (call.backward.forward.N == 0) return 0;
  return is_general(choice.sums) ? DwconvBackwardGeneral::share(call.backward).chunks
                                 : DwconvTrainingStream::share(call).chunks;
}

// Room for the partial sums of one after the other, in floats.
inline int64_t floats_of_partials(const DwconvTrainingCall& call, const TrainingChoice& choice) {
  const DwconvCall& f = call.backward.forward;
  return f.K * std::max(2 * chunks_of_sums(call, choice),
                        f.KH * f.KW * chunks_of(call.backward, choice.backward));
}

// Starts a pass over x: one that sums, or one through the statistics that is not the general one.
template <typename Element, typename Launcher>
void launch_training(Launcher&& launcher, std::string_view variant,
                     const DwconvTrainingCall& call) {
  if (call.backward.pass == BackwardPass::through)
    BackwardThroughVariants::launch<Element>(launcher, variant, call.backward);
  else
    TrainingVariants::launch<Element>(launcher, variant, call);
}

// In both, the call's pass is that which comes first: statistics, reduction.
//
// `steps` starts kernels of the call's element, one after the other:
//   pass(variant, call)        launch_training
//   channels(step, call)       launch_channels
//   backward(choice, call)     launch_backward
//   forward(call)              a forward kernel
template <typename Steps>
void training_forward(const Steps& steps, const TrainingChoice& choice, DwconvTrainingCall call) {
  call.backward.chunks = chunks_of_sums(call, choice);
  const bool empty = call.backward.forward.N == 0;
  if (!empty) steps.pass(choice.sums, call);
  steps.channels(ChannelStep::moments, call);
  if (!empty) steps.forward(call.backward.forward);
}

// Computes those of dx and (dweight, dgamma, dbeta) that have a place to go to.
template <typename Steps>
void training_backward(const Steps& steps, const TrainingChoice& choice, DwconvTrainingCall call) {
  DwconvBackwardCall& backward = call.backward;
  const bool empty = backward.forward.N == 0;
  void* const dconv = backward.dconv;
  steps.channels(ChannelStep::affine, call);
  backward.rows = 2, backward.chunks = chunks_of_sums(call, choice);
  backward.dconv = nullptr;
  if (is_general(choice.sums))
    steps.backward({choice.sums, {}}, backward);
  else if (!empty)
    steps.pass(choice.sums, call);
  steps.channels(ChannelStep::terms, call);
  backward.pass = BackwardPass::through;
  backward.rows = backward.forward.KH * backward.forward.KW;
  backward.chunks = chunks_of(backward, choice.backward);
  backward.dconv = dconv;
  if (backward.dweight == nullptr) backward.partials = nullptr;
  if (!empty && !choice.backward.is_general()) steps.pass(choice.backward.first, call);
  steps.backward(choice.backward, backward);
}

}  // namespace mnet::cuda
