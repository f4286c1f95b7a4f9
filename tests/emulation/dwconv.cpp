// The forward kernels of dwconv_bn_act: buffers x, weight, scale, shift, y.
#include "../../csrc/cuda/dwconv_variants.cuh"

#include "dwconv_request.h"
#include "elements.h"

namespace mnet::cuda {
namespace {

// Returns the variant that ran; "auto" leaves the choice to the heuristic.
std::string run(const emulation::Request& r) {
  const DwconvCall call = call_of_request(r);
  const std::string variant = r.variant == "auto" ? choose(call) : r.variant;
  with_compiled(call.dtype, [&](auto element) {
    DwconvVariants::launch<decltype(element)>(r.launcher, variant, call);
  });
  return variant;
}

std::string names(const emulation::Request&) { return emulation::joined(DwconvVariants::names()); }
std::string able(const emulation::Request& r) {
  return emulation::joined(DwconvVariants::able(call_of_request(r)));
}
std::string chosen(const emulation::Request& r) { return choose(call_of_request(r)); }

const emulation::Registration run_(("dwconv"), run), names_("dwconv_names", names),
    able_("dwconv_able", able), chosen_("dwconv_choose", chosen);

}  // namespace
}  // namespace mnet::cuda
