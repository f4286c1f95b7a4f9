// The backward of dwconv_bn_act: buffers x, weight, scale, shift, dy; dconv, partials, flipped;
// dx, dweight, dscale, dshift (any of the last seven may be left out, as in a call).
// A variant is "FIRST,DATA", the names for the first and the third step, or "auto".
#include "../../csrc/cuda/dwconv_backward.cuh"
#include "../../csrc/cuda/dwconv_general.cuh"

#include "request.h"

namespace mnet::cuda {
namespace {

DwconvBackwardCall call_of_request(const emulation::Request& r) {
  DwconvBackwardCall call{};
  DwconvCall& forward = call.forward;
  forward.N = r.integer("N"), forward.C = r.integer("C"), forward.H = r.integer("H"),
  forward.W = r.integer("W"), forward.K = r.integer("K"), forward.OH = r.integer("OH"),
  forward.OW = r.integer("OW"), forward.multiplier = forward.K / forward.C,
  forward.KH = r.integer("KH"), forward.KW = r.integer("KW"), forward.SH = r.integer("SH"),
  forward.SW = r.integer("SW"), forward.DH = r.integer("DH"), forward.DW = r.integer("DW"),
  forward.top = r.integer("top"), forward.left = r.integer("left");
  forward.slope = static_cast<float>(r.real("slope"));
  forward.activation = static_cast<Activation>(r.integer("activation"));
  forward.dtype = static_cast<DType>(r.integer("dtype"));
  forward.channels_last = r.integer("channels_last") != 0;
  forward.x = r.buffer("x"), forward.weight = r.buffer("weight");
  forward.scale = r.buffer<const float>("scale"), forward.shift = r.buffer<const float>("shift");
  call.dy = r.buffer("dy"), call.dconv = r.buffer("dconv");
  call.partials = r.buffer<float>("partials"), call.flipped = r.buffer("flipped");
  call.dx = r.buffer("dx"), call.dweight = r.buffer("dweight");
  call.dscale = r.buffer<float>("dscale"), call.dshift = r.buffer<float>("dshift");
  return call;
}

BackwardChoice choice_of(const emulation::Request& r, const DwconvBackwardCall& call) {
  if (r.variant == "auto") return choose(call);
  const std::string_view variant = r.variant;
  const std::size_t comma = variant.find(',');
  return {variant.substr(0, comma), variant.substr(comma + 1)};
}

std::string text(const BackwardChoice& choice) {
  return std::string(choice.first) + "," + std::string(choice.data);
}

// Returns the variants that ran.
std::string run(const emulation::Request& r) {
  DwconvBackwardCall call = call_of_request(r);
  const BackwardChoice choice = choice_of(r, call);
  call.chunks = share_of(call, choice).chunks;
  with_element(call.forward.dtype, [&](auto element) {
    using Element = decltype(element);
    launch_backward<Element>(r.launcher, choice, call, [&](const DwconvCall& forward) {
      DwconvGeneral::launch<Element>(r.launcher, forward);
    });
  });
  return text(choice);
}

// How many rows of partial sums the call makes.
std::string chunks(const emulation::Request& r) {
  const DwconvBackwardCall call = call_of_request(r);
  return std::to_string(share_of(call, choice_of(r, call)).chunks);
}

// All "FIRST,DATA" that can run the call.
std::string able(const emulation::Request& r) {
  const DwconvBackwardCall call = call_of_request(r);
  std::string all;
  for (const char* first : BackwardVariants::able(call))
    for (const char* data : backward_data_able(call))
      all += (all.empty() ? "" : " ") + text({first, data});
  return all;
}

std::string names(const emulation::Request&) {
  std::string all;
  for (const char* first : BackwardVariants::names())
    for (const char* data : backward_data_names())
      all += (all.empty() ? "" : " ") + text({first, data});
  return all;
}

const emulation::Registration run_("dwconv_backward", run),
    chunks_("dwconv_backward_chunks", chunks), able_("dwconv_backward_able", able),
    names_("dwconv_backward_names", names);

}  // namespace
}  // namespace mnet::cuda
