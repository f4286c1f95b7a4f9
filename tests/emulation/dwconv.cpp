// The forward kernels of dwconv_bn_act: buffers x, weight, scale, shift, y.
#include "../../csrc/cuda/dwconv_variants.cuh"

#include "request.h"

namespace mnet::cuda {
namespace {

DwconvCall call_of_request(const emulation::Request& r) {
  DwconvCall call{};
  call.N = r.integer("N"), call.C = r.integer("C"), call.H = r.integer("H"),
  call.W = r.integer("W"), call.K = r.integer("K"), call.OH = r.integer("OH"),
  call.OW = r.integer("OW"), call.multiplier = call.K / call.C, call.KH = r.integer("KH"),
  call.KW = r.integer("KW"), call.SH = r.integer("SH"), call.SW = r.integer("SW"),
  call.DH = r.integer("DH"), call.DW = r.integer("DW"), call.top = r.integer("top"),
  call.left = r.integer("left"), call.slope = static_cast<float>(r.real("slope"));
  call.activation = static_cast<Activation>(r.integer("activation"));
  call.dtype = static_cast<DType>(r.integer("dtype"));
  call.channels_last = r.integer("channels_last") != 0;
  call.x = r.buffer("x"), call.weight = r.buffer("weight"), call.y = r.buffer("y");
  call.scale = r.buffer<const float>("scale"), call.shift = r.buffer<const float>("shift");
  return call;
}

// Returns the variant that ran; "auto" leaves the choice to the heuristic.
std::string run(const emulation::Request& r) {
  const DwconvCall call = call_of_request(r);
  const std::string variant = r.variant == "auto" ? choose(call) : r.variant;
  with_element(call.dtype, [&](auto element) {
    DwconvVariants::launch<decltype(element)>(r.launcher, variant, call);
  });
  return variant;
}

std::string join(const std::vector<const char*>& names) {
  std::string all;
  for (const char* name : names) all += (all.empty() ? "" : " ") + std::string(name);
  return all;
}

std::string names(const emulation::Request&) { return join(DwconvVariants::names()); }
std::string able(const emulation::Request& r) {
  return join(DwconvVariants::able(call_of_request(r)));
}
std::string chosen(const emulation::Request& r) { return choose(call_of_request(r)); }

const emulation::Registration run_(("dwconv"), run), names_("dwconv_names", names),
    able_("dwconv_able", able), chosen_("dwconv_choose", chosen);

}  // namespace
}  // namespace mnet::cuda
