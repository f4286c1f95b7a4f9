// The CPU kernels of one instruction set by themselves, against plain loops in double: for
// processors and compilers that the machine's Python was not built for. Exit status 1 and the first
// wrong case if they differ.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "kernels.h"

using namespace mnet;
using namespace mnet::cpu;
namespace mnet::cpu::MNET_ISA {
extern const Kernels kKernels;
}

namespace {

std::mt19937 generator(20261124);
double normal() { return std::normal_distribution<double>()(generator); }
int64_t pick(std::initializer_list<int64_t> of) { return of.begin()[generator() % of.size()]; }

uint16_t bf16_bits(double value) {
  float f = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
double from_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
double from_f16(uint16_t half) {
  const int exponent = (half >> 10) & 31, mantissa = half & 1023;
  const double size =
      exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return half & 0x8000 ? -size : size;
}
uint16_t f16_bits(double value) {  // of values whose halves are normal
  int exponent;
  const double fraction = std::frexp(std::fabs(value), &exponent);
  if (value == 0 || exponent < -12) return 0;
  const long mantissa = std::lrint(std::ldexp(fraction, 11));
  return static_cast<uint16_t>((value < 0 ? 0x8000 : 0) + ((exponent + 13) << 10) + mantissa);
}

size_t size_of(Element e) { return e == Element::f64 ? 8 : e == Element::f32 ? 4 : 2; }
double get(Element e, const void* p, int64_t i) {
  switch (e) {
    case Element::f64: return static_cast<const double*>(p)[i];
    case Element::f32: return static_cast<const float*>(p)[i];
    case Element::bf16: return from_bf16(static_cast<const uint16_t*>(p)[i]);
    case Element::f16: return from_f16(static_cast<const uint16_t*>(p)[i]);
  }
  return 0;
}
void put(Element e, void* p, int64_t i, double value) {
  switch (e) {
    case Element::f64: static_cast<double*>(p)[i] = value; break;
    case Element::f32: static_cast<float*>(p)[i] = static_cast<float>(value); break;
    case Element::bf16: static_cast<uint16_t*>(p)[i] = bf16_bits(value); break;
    case Element::f16: static_cast<uint16_t*>(p)[i] = f16_bits(value); break;
  }
}
double rounding(Element e) {
  return e == Element::f64   ? 0x1p-53
         : e == Element::f32 ? 0x1p-24
         : e == Element::f16 ? 0x1p-11
                             : 0x1p-8;
}

struct Buffer {
  std::vector<char> memory;
  Buffer(size_t bytes) : memory(bytes + 64, static_cast<char>(0xff)) {}  // NaN in every type
  void* data() {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  }
};

// One rounding at the store and, before it, one for every tap, the affine and the activation's
// steps; an activation with a constant of its own (hardsigmoid(0) is 0.5) rounds that too.
bool same(Element e, double y, double exact, double magnitude, int64_t taps) {
  const double wide = rounding(e == Element::f64 ? e : Element::f32);
  const double inner =
      static_cast<double>(taps + 8) * wide * std::fmax(magnitude, std::fabs(exact));
  const double smallest = e == Element::f16 ? 0x1p-25 : 0;
  return std::fabs(y - exact) <= rounding(e) * (std::fabs(exact) + inner) + inner + smallest;
}

bool depthwise(const Kernels& kernels, Element e, bool channels_last) {
  DwconvCall c{};
  c.N = pick({1, 2}), c.C = pick({1, 4, 5, 8, 16, 19, 33, 48, 70});
  c.H = pick({1, 4, 7, 9, 14}), c.W = pick({2, 7, 8, 13, 33});
  c.multiplier = pick({1, 1, 1, 2}), c.K = c.C * c.multiplier;
  c.KH = pick({1, 3, 3, 5, 7}), c.KW = pick({c.KH, c.KH, 2});
  c.SH = pick({1, 2}), c.SW = pick({c.SH, c.SH, 3}), c.DH = pick({1, 1, 2}), c.DW = c.DH;
  c.top = pick({c.KH / 2, c.KH - 1}) * c.DH, c.left = pick({c.KW / 2, 0}) * c.DW;
  const int64_t bottom = c.KH / 2 * c.DH, right = c.KW * c.DW;
  if (c.H + c.top + bottom < (c.KH - 1) * c.DH + 1) return true;
  c.OH = (c.H + c.top + bottom - (c.KH - 1) * c.DH - 1) / c.SH + 1;
  c.OW = (c.W + c.left + right - (c.KW - 1) * c.DW - 1) / c.SW + 1;
  // As backends do it: vectors are not wider than a pixel's channels.
  if (channels_last && c.K < kernels.width) return true;
  c.element = e;
  c.activation = static_cast<Activation>(generator() % kActivationCount);
  c.slope = 0.25;
  c.prefetch = generator() % 2;
  c.stream = channels_last && generator() % 2 && c.K * size_of(e) % 64 == 0;
  c.channel_chunk = c.K, c.channel_chunks = 1;
  c.rows_per_task = pick({1, 4, c.OH}),
  c.row_tasks = (c.OH + c.rows_per_task - 1) / c.rows_per_task;
  const Element acc = e == Element::f64 ? e : Element::f32;
  const Element weights = channels_last && kernels.dwconv_keeps_weight(c) ? e : acc;
  Buffer x(c.N * c.C * c.H * c.W * size_of(e)), w(c.K * c.KH * c.KW * size_of(weights));
  Buffer scale(c.K * size_of(acc)), shift(c.K * size_of(acc)),
      y(c.N * c.K * c.OH * c.OW * size_of(e));
  for (int64_t i = 0; i < c.N * c.C * c.H * c.W; ++i) put(e, x.data(), i, normal());
  for (int64_t i = 0; i < c.K * c.KH * c.KW; ++i)
    put(weights, w.data(), i, from_bf16(bf16_bits(normal())));
  for (int64_t k = 0; k < c.K; ++k)
    put(acc, scale.data(), k, 1 + normal() / 4), put(acc, shift.data(), k, normal());
  c.x = x.data(), c.weight = w.data(), c.scale = scale.data(), c.shift = shift.data(),
  c.y = y.data();
  if (channels_last) {
    const int64_t rows = c.N * c.OH, cut = generator() % (rows + 1);
    kernels.dwconv_channels_last(c, 0, cut);
    kernels.dwconv_channels_last(c, cut, rows);
  } else {
    Buffer scratch(kernels.dwconv_contiguous_scratch(c) * size_of(acc));
    kernels.dwconv_contiguous(c, 0, c.N * c.K * c.row_tasks, scratch.data());
  }
  for (int64_t n = 0; n < c.N; ++n)
    for (int64_t k = 0; k < c.K; ++k)
      for (int64_t oh = 0; oh < c.OH; ++oh)
        for (int64_t ow = 0; ow < c.OW; ++ow) {
          double sum = 0, magnitude = 0;
          for (int64_t kh = 0; kh < c.KH; ++kh)
            for (int64_t kw = 0; kw < c.KW; ++kw) {
              const int64_t ih = oh * c.SH - c.top + kh * c.DH, iw = ow * c.SW - c.left + kw * c.DW;
              if (ih < 0 || iw < 0 || ih >= c.H || iw >= c.W) continue;
              const int64_t in = k / c.multiplier;
              const int64_t at = channels_last ? ((n * c.H + ih) * c.W + iw) * c.C + in
                                               : ((n * c.C + in) * c.H + ih) * c.W + iw;
              const double term =
                  get(e, c.x, at) * get(weights, c.weight, (kh * c.KW + kw) * c.K + k);
              sum += term, magnitude += std::fabs(term);
            }
          const double a = get(acc, c.scale, k), b = get(acc, c.shift, k);
          const double exact = activate(c.activation, c.slope, sum * a + b);
          const int64_t at = channels_last ? ((n * c.OH + oh) * c.OW + ow) * c.K + k
                                           : ((n * c.K + k) * c.OH + oh) * c.OW + ow;
          if (!same(e, get(e, c.y, at), exact, magnitude * std::fabs(a) + std::fabs(b),
                    c.KH * c.KW)) {
            std::printf(
                "depthwise, element %d, %s, C=%ld %ldx%ld kernel %ldx%ld stride %ld, at %ld %ld "
                "%ld %ld: %g instead of %g\n",
                static_cast<int>(e), channels_last ? "channels_last" : "contiguous", (long)c.C,
                (long)c.H, (long)c.W, (long)c.KH, (long)c.KW, (long)c.SH, (long)n, (long)k,
                (long)oh, (long)ow, get(e, c.y, at), exact);
            return false;
          }
        }
  return true;
}

bool dense(const Kernels& kernels) {
  ConvCall c{};
  c.N = 1, c.C = pick({1, 3, 16, 150}), c.H = c.OH = pick({1, 5, 9}), c.W = c.OW = pick({2, 7, 13});
  c.K = pick({1, 8, 31, 32, 40, 64}), c.taps = c.C;
  c.KH = c.KW = c.SH = c.SW = c.DH = c.DW = 1;
  c.pointwise = true;
  c.activation = static_cast<Activation>(generator() % kActivationCount);
  c.slope = 0.25;
  const int64_t panels = (c.K + kPanel - 1) / kPanel, pixels = c.OH * c.OW;
  c.pixel_blocks = pick({1, 2}), c.channel_blocks = 1;
  Buffer x(pixels * c.C * 4), w(panels * kPanel * c.C * 4), y(pixels * c.K * 4),
      add(pixels * c.K * 4);
  Buffer scale(panels * kPanel * 4), shift(panels * kPanel * 4);
  auto fill = [](void* p, int64_t n) {
    for (int64_t i = 0; i < n; ++i) static_cast<float*>(p)[i] = static_cast<float>(normal());
  };
  fill(x.data(), pixels * c.C), fill(w.data(), panels * kPanel * c.C),
      fill(add.data(), pixels * c.K);
  fill(scale.data(), panels * kPanel), fill(shift.data(), panels * kPanel);
  c.x = x.data(), c.weight = w.data(), c.y = y.data(), c.scale = scale.data(),
  c.shift = shift.data();
  c.residual = generator() % 2 ? add.data() : nullptr;
  Buffer scratch((kernels.conv_channels_last_scratch(c) + 16) * 4);
  kernels.conv_channels_last(c, 0, c.pixel_blocks, scratch.data());
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t k = 0; k < c.K; ++k) {
      double sum = 0, magnitude = 0;
      for (int64_t i = 0; i < c.C; ++i) {
        const double term =
            get(Element::f32, c.x, p * c.C + i) *
            get(Element::f32, c.weight, (k / kPanel * c.C + i) * kPanel + k % kPanel);
        sum += term, magnitude += std::fabs(term);
      }
      const double a = get(Element::f32, c.scale, k), b = get(Element::f32, c.shift, k);
      const double r = c.residual ? get(Element::f32, c.residual, p * c.K + k) : 0;
      const double exact = activate(c.activation, c.slope, sum * a + b) + r;
      if (!same(Element::f32, get(Element::f32, c.y, p * c.K + k), exact,
                magnitude * std::fabs(a) + std::fabs(b) + std::fabs(r), c.C)) {
        std::printf("dense, C=%ld K=%ld, pixel %ld channel %ld: %g instead of %g\n", (long)c.C,
                    (long)c.K, (long)p, (long)k, get(Element::f32, c.y, p * c.K + k), exact);
        return false;
      }
    }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 100;
  const Kernels& kernels = MNET_ISA::kKernels;
  for (int i = 0; i < rounds; ++i) {
    for (Element e : {Element::f32, Element::f64, Element::bf16, Element::f16})
      for (bool channels_last : {false, true})
        if (!depthwise(kernels, e, channels_last)) return 1;
    if (!dense(kernels)) return 1;
  }
  std::printf("%s: all right\n", kernels.name);
}
