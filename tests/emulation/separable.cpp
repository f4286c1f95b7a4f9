// The kernels of separable_conv: buffers x, dw_weight, dw_scale, dw_shift, pw_weight, pw_scale,
// pw_shift, residual, y.
#include "../../csrc/cuda/separable_variants.cuh"

#include "elements.h"
#include "request.h"

namespace mnet::cuda {
namespace {

SeparableCall call_of_request(const emulation::Request& r) {
  SeparableCall call{};
  DwconvCall& dw = call.depthwise;
  dw.N = r.integer("N"), dw.C = r.integer("C"), dw.H = r.integer("H"), dw.W = r.integer("W");
  dw.K = r.integer("middle"), dw.OH = r.integer("OH"), dw.OW = r.integer("OW");
  dw.multiplier = dw.K / dw.C, dw.KH = r.integer("KH"), dw.KW = r.integer("KW");
  dw.SH = r.integer("SH"), dw.SW = r.integer("SW"), dw.DH = r.integer("DH");
  dw.DW = r.integer("DW"), dw.top = r.integer("top"), dw.left = r.integer("left");
  dw.slope = static_cast<float>(r.real("slope"));
  dw.activation = static_cast<Activation>(r.integer("dw_activation"));
  dw.dtype = static_cast<DType>(r.integer("dtype"));
  dw.channels_last = true;
  dw.x = r.buffer("x"), dw.weight = r.buffer("dw_weight");
  dw.scale = r.buffer<const float>("dw_scale"), dw.shift = r.buffer<const float>("dw_shift");
  call.pw_weight = r.buffer("pw_weight");
  call.pw_scale = r.buffer<const float>("pw_scale");
  call.pw_shift = r.buffer<const float>("pw_shift");
  call.residual = r.buffer("residual"), call.y = r.buffer("y");
  call.K = r.integer("K");
  call.pw_activation = static_cast<Activation>(r.integer("pw_activation"));
  call.multiprocessors = static_cast<int>(r.integer("multiprocessors"));
  call.shared_limit = static_cast<int>(r.integer("shared_limit"));
  call.tf32 = r.integer("tf32") != 0;
  return call;
}

// Returns the variant that ran; "auto" leaves the choice to the heuristic.
std::string run(const emulation::Request& r) {
  const SeparableCall call = call_of_request(r);
  const std::string variant = r.variant == "auto" ? choose(call) : r.variant;
  with_compiled_product(call.depthwise.dtype, call.tf32, [&](auto element) {
    SeparableVariants::launch<decltype(element)>(r.launcher, variant, call);
  });
  return variant;
}

std::string names(const emulation::Request&) {
  return emulation::joined(SeparableVariants::names());
}
std::string able(const emulation::Request& r) {
  return emulation::joined(SeparableVariants::able(call_of_request(r)));
}
std::string chosen(const emulation::Request& r) { return choose(call_of_request(r)); }

const emulation::Registration run_("separable", run), names_("separable_names", names),
    able_("separable_able", able), chosen_("separable_choose", chosen);

}  // namespace
}  // namespace mnet::cuda
