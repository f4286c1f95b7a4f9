// The backward of dwconv_bn_act: buffers x, weight, scale, shift, dy; dconv, partials, flipped;
// dx, dweight, dscale, dshift (any of the last seven may be left out, as in a call).
// A variant is "FIRST,DATA", the names for the first and the third step, or "auto".
#include "../../csrc/cuda/dwconv_backward.cuh"
#include "../../csrc/cuda/dwconv_general.cuh"

#include "dwconv_request.h"
#include "elements.h"

namespace mnet::cuda {
namespace {

BackwardChoice choice_of(const emulation::Request& r, const DwconvBackwardCall& call) {
  if (r.variant == "auto") return choose(call);
  const std::string_view variant = r.variant;
  const std::size_t comma = variant.find(',');
  return {variant.substr(0, comma), variant.substr(comma + 1)};
}

std::string text(const BackwardChoice& choice) {
  return std::string(choice.first) + "," + std::string(choice.data);
}

// All "FIRST,DATA": one_pass is its own.
std::string pairs(const std::vector<const char*>& firsts, const std::vector<const char*>& datas) {
  std::string all;
  for (const std::string_view first : firsts) {
    const bool one_pass = BackwardChoice{first, {}}.is_one_pass();
    for (const std::string_view data : one_pass ? std::vector<const char*>{first.data()} : datas)
      all += (all.empty() ? "" : " ") + text({first, data});
  }
  return all;
}

// Returns the variants that ran.
std::string run(const emulation::Request& r) {
  DwconvBackwardCall call = backward_call_of_request(r);
  const BackwardChoice choice = choice_of(r, call);
  call.chunks = chunks_of(call, choice);
  with_compiled(call.forward.dtype, [&](auto element) {
    using Element = decltype(element);
    launch_backward<Element>(r.launcher, choice, call, [&](const DwconvCall& forward) {
      DwconvGeneral::launch<Element>(r.launcher, forward);
    });
  });
  return text(choice);
}

// The variants that the call would take.
std::string chosen(const emulation::Request& r) {
  return text(choose(backward_call_of_request(r)));
}

// Of one_pass: threads and shared bytes of a block, blocks, bytes of x and dy on their way to one.
std::string one_pass(const emulation::Request& r) {
  const DwconvBackwardCall call = backward_call_of_request(r);
  const OnePassPlan plan = one_pass_plan(call);
  const int ahead = plan.stages / plan.stage - 1, strip = 4 + 4 / static_cast<int>(call.forward.SH);
  const int64_t pixels = call.forward.SH == 1 ? strip : strip + 4;  // S rows of 4 of x, T of dy
  return std::to_string(plan.threads()) + " " + std::to_string(plan.shared_bytes) + " " +
         std::to_string(plan.blocks()) + " " +
         std::to_string(ahead * plan.images * plan.strips * pixels * kOnePassChannels *
                        element_bytes(call.forward));
}

// How many rows of partial sums the call makes.
std::string chunks(const emulation::Request& r) {
  const DwconvBackwardCall call = backward_call_of_request(r);
  return std::to_string(chunks_of(call, choice_of(r, call)));
}

// All "FIRST,DATA" that can run the call.
std::string able(const emulation::Request& r) {
  const DwconvBackwardCall call = backward_call_of_request(r);
  return pairs(BackwardVariants::able(call), backward_data_able(call));
}

std::string names(const emulation::Request&) {
  return pairs(BackwardVariants::names(), backward_data_names());
}

const emulation::Registration run_("dwconv_backward", run),
    chosen_("dwconv_backward_choose", chosen), one_pass_("dwconv_backward_one_pass", one_pass),
    chunks_("dwconv_backward_chunks", chunks), able_("dwconv_backward_able", able),
    names_("dwconv_backward_names", names);

}  // namespace
}  // namespace mnet::cuda
