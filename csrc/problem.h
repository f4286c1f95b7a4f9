// A call's arguments, checked, as plain numbers. No torch header: the same checks and the same
// sentences serve every backend, and whatever passes is safe to hand to a kernel.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "activation.h"

namespace mnet {

enum class DType { float32, float64, float16, bfloat16, other };

// What a check needs to know of a tensor; borrowed, so that a good call allocates nothing.
struct TensorFacts {
  const int64_t* sizes = nullptr;
  int64_t dim = 0;
  DType dtype = DType::other;
  const char* dtype_name = "";
  const char* device_name = "";  // without the index
  int32_t device_type = 0, device_index = 0;
  bool present = false;  // false: an optional argument that is None

  bool same_device(const TensorFacts& other) const {
    return device_type == other.device_type && device_index == other.device_index;
  }
};

struct Conv2dArguments {
  std::vector<int64_t> stride, padding, dilation;
  std::string activation;
  double slope;
  int64_t groups = 0;       // 0: depthwise, as many groups as x has channels
  const char* prefix = "";  // of the names that messages call weight, scale, shift, activation by
};

// One convolution + per-channel affine + activation. Sizes are at least 0, outputs at least 1
// pixel; padding is explicit (top, left, bottom, right).
struct Problem {
  int64_t N, C, H, W;          // input
  int64_t K, OH, OW;           // output channels and size
  int64_t groups, multiplier;  // multiplier: output channels a group
  int64_t KH, KW;
  int64_t SH, SW, DH, DW;
  int64_t top, left, bottom, right;
  DType dtype;
  Activation activation;
  double slope;
};

namespace check {

inline std::string show(const int64_t* values, std::size_t count) {
  std::ostringstream out;
  out << "(";
  for (std::size_t i = 0; i < count; ++i) out << (i ? ", " : "") << values[i];
  out << (count == 1 ? ",)" : ")");
  return out.str();
}

inline std::string show(const std::vector<int64_t>& values) {
  return show(values.data(), values.size());
}

inline std::string shape(const TensorFacts& t) {
  return "shape " + show(t.sizes, static_cast<std::size_t>(t.dim));
}

inline std::string device(const TensorFacts& t) {
  return t.device_index < 0 ? t.device_name
                            : std::string(t.device_name) + ":" + std::to_string(t.device_index);
}

template <typename... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// "dwconv_bn_act: weight: expected ..., got ..."
[[noreturn]] inline void fail(const char* op, const std::string& argument,
                              const std::string& expected, const std::string& actual) {
  throw std::runtime_error(join(op, ": ", argument, ": expected ", expected, ", got ", actual));
}

// A pair given as (h, w) or as one int for both.
inline void pair(const char* op, const char* name, const std::vector<int64_t>& value, int64_t* h,
                 int64_t* w) {
  if (value.empty() || value.size() > 2) fail(op, name, "an int or a pair (h, w)", show(value));
  *h = value.front();
  *w = value.back();
  if (*h < 1 || *w < 1) fail(op, name, "positive", show(value));
}

inline Activation activation(const char* op, const std::string& argument, const std::string& name) {
  for (std::size_t i = 0; i < kActivationCount; ++i)
    if (name == kActivationNames[i]) return static_cast<Activation>(i);
  std::string known;
  for (std::size_t i = 0; i < kActivationCount; ++i)
    known += (i ? ", " : "") + std::string(kActivationNames[i]);
  fail(op, argument, "one of " + known, "'" + name + "'");
}

// TensorFlow's "same": output = ceil(size / stride), the odd pixel at the end.
inline void same_padding(int64_t size, int64_t kernel, int64_t stride, int64_t dilation,
                         int64_t* begin, int64_t* end) {
  const int64_t total =
      ((size + stride - 1) / stride - 1) * stride + (kernel - 1) * dilation + 1 - size;
  *begin = total > 0 ? total / 2 : 0;
  *end = total > 0 ? total - total / 2 : 0;
}

inline void affine(const char* op, const std::string& name, const TensorFacts& t, const Problem& p,
                   const TensorFacts& x) {
  if (!t.present) return;
  if (t.dim != 1 || t.sizes[0] != p.K)
    fail(op, name, join("shape (", p.K, ",), one value an output channel"), shape(t));
  const DType expected = p.dtype == DType::float64 ? DType::float64 : DType::float32;
  if (t.dtype != expected)
    fail(op, name,
         join(expected == DType::float64 ? "float64" : "float32", " (x is ", x.dtype_name, ")"),
         t.dtype_name);
  if (!t.same_device(x)) fail(op, name, "x's device " + device(x), device(t));
}

// dy has the output's shape, x's dtype and device.
inline void gradient(const char* op, const TensorFacts& dy, const Problem& p,
                     const TensorFacts& x) {
  const int64_t expected[] = {p.N, p.K, p.OH, p.OW};
  bool same = dy.dim == 4;
  for (int i = 0; same && i < 4; ++i) same = dy.sizes[i] == expected[i];
  if (!same) fail(op, "dy", "the output's shape " + show(expected, 4), shape(dy));
  if (dy.dtype != x.dtype) fail(op, "dy", join("x's dtype ", x.dtype_name), dy.dtype_name);
  if (!dy.same_device(x)) fail(op, "dy", "x's device " + device(x), device(dy));
}

// What batch statistics ask for besides.
inline void batch_statistics(const char* op, const Problem& p, double eps) {
  if (!std::isfinite(eps) || eps < 0) fail(op, "eps", "a finite number, at least 0", join(eps));
  if (p.N * p.OH * p.OW == 1)
    fail(op, "x", "more than one value a channel in training",
         join("an output of shape (1, ", p.K, ", 1, 1)"));
}

}  // namespace check

// Throws std::runtime_error with a sentence that names operator, argument, expected and actual.
inline Problem checked_problem(const char* op, const TensorFacts& x, const TensorFacts& weight,
                               const TensorFacts& scale, const TensorFacts& shift,
                               const Conv2dArguments& args) {
  using check::device;
  using check::fail;
  using check::join;
  using check::shape;
  using check::show;
  auto name = [&](const char* argument) { return std::string(args.prefix) + argument; };
  Problem p{};
  if (x.dim != 4) fail(op, "x", "4 dimensions (N, C, H, W)", shape(x));
  if (x.dtype == DType::other) fail(op, "x", "float32, float64, float16 or bfloat16", x.dtype_name);
  p.N = x.sizes[0], p.C = x.sizes[1], p.H = x.sizes[2], p.W = x.sizes[3];
  p.dtype = x.dtype;
  if (p.C < 1) fail(op, "x", "at least one channel", shape(x));

  if (weight.dim != 4)
    fail(op, name("weight"), "4 dimensions (C_out, C_in / groups, Kh, Kw)", shape(weight));
  if (weight.dtype != x.dtype)
    fail(op, name("weight"), join("x's dtype ", x.dtype_name), weight.dtype_name);
  if (!weight.same_device(x)) fail(op, name("weight"), "x's device " + device(x), device(weight));
  const bool depthwise = args.groups == 0;
  p.groups = depthwise ? p.C : args.groups;
  if (p.groups < 1 || p.C % p.groups != 0)
    fail(op, "groups", join("a positive divisor of x's ", p.C, " channels"), join(p.groups));
  p.K = weight.sizes[0], p.KH = weight.sizes[2], p.KW = weight.sizes[3];
  if (weight.sizes[1] != p.C / p.groups || p.K < 1 || p.K % p.groups != 0 || p.KH < 1 || p.KW < 1)
    fail(op, name("weight"),
         depthwise ? join("shape (", p.C, "*M, 1, Kh, Kw) for x with ", p.C, " channels")
                   : join("shape (C_out, ", p.C / p.groups, ", Kh, Kw) for x with ", p.C,
                          " channels and ", p.groups, " groups"),
         shape(weight));
  p.multiplier = p.K / p.groups;

  check::pair(op, "stride", args.stride, &p.SH, &p.SW);
  check::pair(op, "dilation", args.dilation, &p.DH, &p.DW);
  const auto& pad = args.padding;
  if (pad.empty()) {
    check::same_padding(p.H, p.KH, p.SH, p.DH, &p.top, &p.bottom);
    check::same_padding(p.W, p.KW, p.SW, p.DW, &p.left, &p.right);
  } else {
    if (pad.size() > 4 || pad.size() == 3)
      fail(op, "padding", "an int, (h, w), (top, left, bottom, right) or \"same\"", show(pad));
    for (int64_t value : pad)
      if (value < 0) fail(op, "padding", "non-negative", show(pad));
    const std::size_t n = pad.size();
    p.top = pad[0], p.left = pad[n > 1], p.bottom = pad[n > 2 ? 2 : 0],
    p.right = pad[n > 2 ? 3 : (n > 1)];
  }
  constexpr int64_t kMost = int64_t{1} << 31;  // keeps every product below free of overflow
  for (int64_t value : {p.SH, p.SW, p.DH, p.DW, p.top, p.left, p.bottom, p.right})
    if (value >= kMost) fail(op, "stride, padding and dilation", "below 2^31", join(value));
  const int64_t room_h = p.H + p.top + p.bottom - (p.KH - 1) * p.DH - 1;
  const int64_t room_w = p.W + p.left + p.right - (p.KW - 1) * p.DW - 1;
  if (room_h < 0 || room_w < 0 || p.H < 1 || p.W < 1)
    fail(op, "x",
         join("a padded size of at least ", (p.KH - 1) * p.DH + 1, " x ", (p.KW - 1) * p.DW + 1,
              " (the dilated kernel)"),
         join(p.H + p.top + p.bottom, " x ", p.W + p.left + p.right, " from x of ", shape(x)));
  p.OH = room_h / p.SH + 1;
  p.OW = room_w / p.SW + 1;

  check::affine(op, name("scale"), scale, p, x);
  check::affine(op, name("shift"), shift, p, x);
  p.activation = check::activation(op, name("activation"), args.activation);
  if (!std::isfinite(args.slope)) fail(op, "slope", "a finite number", join(args.slope));
  p.slope = args.slope;
  return p;
}

}  // namespace mnet
