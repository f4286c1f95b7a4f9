// separable_conv's arguments, checked, as two convolutions; no torch header (see problem.h).
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "problem.h"

namespace mnet {

// What reaches `pointwise` is the depthwise result.
struct SeparableProblem {
  Problem depthwise, pointwise;
};

struct SeparableTensors {
  TensorFacts x, dw_weight, dw_scale, dw_shift, pw_weight, pw_scale, pw_shift, residual;
};

// Throws std::runtime_error with a sentence that names operator, argument, expected and actual.
inline SeparableProblem checked_separable(const char* op, const SeparableTensors& t,
                                          std::vector<int64_t> stride, std::vector<int64_t> padding,
                                          std::vector<int64_t> dilation, std::string dw_activation,
                                          std::string pw_activation, double slope) {
  using check::fail;
  using check::join;
  using check::shape;
  SeparableProblem both;
  const Problem& p = both.depthwise =
      checked_problem(op, t.x, t.dw_weight, t.dw_scale, t.dw_shift,
                      {std::move(stride), std::move(padding), std::move(dilation),
                       std::move(dw_activation), slope, 0, "dw_"});
  const TensorFacts& w = t.pw_weight;
  if (w.dim != 4 || w.sizes[0] < 1 || w.sizes[1] != p.K || w.sizes[2] != 1 || w.sizes[3] != 1)
    fail(op, "pw_weight", join("shape (K, ", p.K, ", 1, 1) for ", p.K, " depthwise channels"),
         shape(w));
  const int64_t middle_sizes[4] = {p.N, p.K, p.OH, p.OW};
  TensorFacts middle = t.x;
  middle.sizes = middle_sizes;
  both.pointwise = checked_problem(op, middle, t.pw_weight, t.pw_scale, t.pw_shift,
                                   {{1}, {0}, {1}, std::move(pw_activation), slope, 1, "pw_"});
  const TensorFacts& r = t.residual;
  if (!r.present) return both;
  const int64_t sizes[4] = {p.N, both.pointwise.K, p.OH, p.OW};
  bool same = r.dim == 4;
  for (int d = 0; same && d < 4; ++d) same = r.sizes[d] == sizes[d];
  if (!same) fail(op, "residual", "the result's shape " + check::show(sizes, 4), shape(r));
  if (r.dtype != t.x.dtype) fail(op, "residual", join("x's dtype ", t.x.dtype_name), r.dtype_name);
  if (!r.same_device(t.x))
    fail(op, "residual", "x's device " + check::device(t.x), check::device(r));
  return both;
}

}  // namespace mnet
