// Training forward and backward: buffers x, weight, gamma, beta, mean, var; scale, shift, moments,
// y; dy, dconv, partials, flipped, by_conv, constant; dx, dweight, dgamma, dbeta (any of the last
// six may be left out, as in a call). A variant is "SUMS,FIRST,DATA", the names for the passes
// that sum, for dconv's and for dx's, or "auto".
#include "../../csrc/cuda/dwconv_training.cuh"
#include "../../csrc/cuda/dwconv_general.cuh"
#include "../../csrc/cuda/dwconv_training_channels.cuh"

#include "dwconv_request.h"
#include "elements.h"

namespace mnet::cuda {
namespace {

DwconvTrainingCall training_call_of_request(const emulation::Request& r, BackwardPass pass) {
  DwconvTrainingCall call{};
  call.backward = backward_call_of_request(r);
  call.backward.pass = pass;
  call.scale = r.buffer<float>("scale"), call.shift = r.buffer<float>("shift");
  call.gamma = r.buffer<const float>("gamma"), call.beta = r.buffer<const float>("beta");
  call.mean = r.buffer<float>("mean"), call.var = r.buffer<float>("var");
  if (pass == BackwardPass::reduction) call.backward.forward.shift = call.beta;
  call.eps = static_cast<float>(r.real("eps"));
  call.backward.mean = call.mean;
  call.moments = r.buffer<float>("moments");
  call.by_conv = r.buffer<float>("by_conv"), call.constant = r.buffer<float>("constant");
  call.backward.by_conv = call.by_conv, call.backward.constant = call.constant;
  call.dgamma = r.buffer<float>("dgamma"), call.dbeta = r.buffer<float>("dbeta");
  return call;
}

TrainingChoice choice_of(const emulation::Request& r, const DwconvTrainingCall& call) {
  if (r.variant == "auto") return choose(call);
  const std::string_view variant = r.variant;
  const std::size_t first = variant.find(','), data = variant.rfind(',');
  return {variant.substr(0, first),
          {variant.substr(first + 1, data - first - 1), variant.substr(data + 1)}};
}

std::string text(const TrainingChoice& choice) {
  return std::string(choice.sums) + "," + std::string(choice.backward.first) + "," +
         std::string(choice.backward.data);
}

template <typename Element>
struct Steps {
  const emulation::Launcher& launcher;

  void pass(std::string_view variant, const DwconvTrainingCall& call) const {
    launch_training<Element>(launcher, variant, call);
  }
  void channels(ChannelStep step, const DwconvTrainingCall& call) const {
    launch_channels(launcher, step, call);
  }
  void backward(const BackwardChoice& choice, const DwconvBackwardCall& call) const {
    launch_backward<Element>(launcher, choice, call,
                             [&](const DwconvCall& transposed) { forward(transposed); });
  }
  void forward(const DwconvCall& call) const { DwconvGeneral::launch<Element>(launcher, call); }
};

template <typename F>
void with_steps(const emulation::Request& r, const DwconvTrainingCall& call, F&& f) {
  with_compiled(call.backward.forward.dtype,
                [&](auto element) { f(Steps<decltype(element)>{r.launcher}); });
}

// These return the variants that ran.
std::string forward(const emulation::Request& r) {
  const DwconvTrainingCall call = training_call_of_request(r, BackwardPass::statistics);
  const TrainingChoice choice = choice_of(r, call);
  with_steps(r, call, [&](auto steps) { training_forward(steps, choice, call); });
  return text(choice);
}

std::string backward(const emulation::Request& r) {
  const DwconvTrainingCall call = training_call_of_request(r, BackwardPass::reduction);
  const TrainingChoice choice = choice_of(r, call);
  with_steps(r, call, [&](auto steps) { training_backward(steps, choice, call); });
  return text(choice);
}

// Floats of `moments` and of `partials`.
std::string room(const emulation::Request& r) {
  const auto statistics = training_call_of_request(r, BackwardPass::statistics);
  const auto reduction = training_call_of_request(r, BackwardPass::reduction);
  const TrainingChoice choice = choice_of(r, reduction);
  const int64_t K = reduction.backward.forward.K;
  return std::to_string(kMomentRows * K * chunks_of_sums(statistics, choice)) + " " +
         std::to_string(floats_of_partials(reduction, choice));
}

// One pass alone, "PASS,KERNEL".
std::string pass(const emulation::Request& r) {
  const std::string_view variant = r.variant, named = variant.substr(0, variant.find(','));
  const std::string_view kernel = variant.substr(variant.find(',') + 1);
  const BackwardPass pass = named == "statistics"  ? BackwardPass::statistics
                            : named == "reduction" ? BackwardPass::reduction
                            : named == "through"   ? BackwardPass::through
                                                   : BackwardPass::frozen;
  DwconvTrainingCall call = training_call_of_request(r, pass);
  const int64_t taps = call.backward.forward.KH * call.backward.forward.KW;
  call.backward.rows = pass == BackwardPass::reduction ? 2
                       : pass == BackwardPass::through ? taps
                                                       : taps + 2;
  with_compiled(call.backward.forward.dtype, [&](auto element) {
    using Element = decltype(element);
    if (pass == BackwardPass::frozen)
      BackwardVariants::launch<Element>(r.launcher, kernel, call.backward);
    else
      launch_training<Element>(r.launcher, kernel, call);
  });
  return "";
}

// All "SUMS,FIRST,DATA" that can run the call.
std::string able(const emulation::Request& r) {
  const DwconvTrainingCall call = training_call_of_request(r, BackwardPass::reduction);
  std::vector<const char*> firsts = BackwardThroughVariants::able(call.backward);
  firsts.push_back(DwconvBackwardGeneral::kName);
  std::string all;
  for (const char* sums : TrainingVariants::able(call))
    for (const std::string_view first : firsts) {
      const bool one_pass = BackwardChoice{first, {}}.is_one_pass();
      for (const std::string_view data :
           one_pass ? std::vector<const char*>{first.data()} : backward_data_able(call.backward))
        all += (all.empty() ? "" : " ") + text({sums, {first, data}});
    }
  return all;
}

const emulation::Registration forward_("dwconv_training", forward),
    backward_("dwconv_training_backward", backward), room_("dwconv_training_room", room),
    able_("dwconv_training_able", able), pass_("dwconv_training_pass", pass);

}  // namespace
}  // namespace mnet::cuda
