// The calls that a request's numbers and buffers stand for.
#pragma once

#include "../../csrc/cuda/dwconv_backward_call.cuh"

#include "request.h"

namespace mnet::cuda {

inline DwconvCall call_of_request(const emulation::Request& r) {
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

inline DwconvBackwardCall backward_call_of_request(const emulation::Request& r) {
  DwconvBackwardCall call{};
  call.forward = call_of_request(r);
  call.dy = r.buffer("dy"), call.dconv = r.buffer("dconv");
  call.partials = r.buffer<float>("partials"), call.flipped = r.buffer("flipped");
  call.rows = call.forward.KH * call.forward.KW + 2;
  call.dx = r.buffer("dx"), call.dweight = r.buffer("dweight");
  call.dscale = r.buffer<float>("dscale"), call.dshift = r.buffer<float>("dshift");
  return call;
}

}  // namespace mnet::cuda
