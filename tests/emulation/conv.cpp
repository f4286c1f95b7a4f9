// The kernels of conv_bn_act: buffers x, weight, scale, shift, y.
#include "../../csrc/cuda/conv_variants.cuh"

#include "dwconv_request.h"
#include "elements.h"

namespace mnet::cuda {
namespace {

ConvCall conv_call_of_request(const emulation::Request& r) {
  return {call_of_request(r), static_cast<int>(r.integer("multiprocessors")),
          static_cast<int>(r.integer("shared_limit")), r.integer("tf32") != 0};
}

// Returns the variant that ran; "auto" leaves the choice to the heuristic.
std::string run(const emulation::Request& r) {
  const ConvCall call = conv_call_of_request(r);
  const std::string variant = r.variant == "auto" ? choose(call) : r.variant;
  with_compiled_product(call.conv.dtype, call.tf32, [&](auto element) {
    ConvVariants::launch<decltype(element)>(r.launcher, variant, call);
  });
  return variant;
}

std::string names(const emulation::Request&) { return emulation::joined(ConvVariants::names()); }
std::string able(const emulation::Request& r) {
  return emulation::joined(ConvVariants::able(conv_call_of_request(r)));
}
std::string chosen(const emulation::Request& r) { return choose(conv_call_of_request(r)); }

const emulation::Registration run_("conv", run), names_("conv_names", names),
    able_("conv_able", able), chosen_("conv_choose", chosen);

}  // namespace
}  // namespace mnet::cuda
