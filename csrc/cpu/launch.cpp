#include "launch.h"

#include <algorithm>

#include "active.h"
#include "memory.h"

namespace mnet::cpu {
namespace {

// Calls from this size on, in and out, find part of their input beyond the second-level cache.
constexpr int64_t kPrefetchFrom = int64_t{1} << 20;

Element element_of(DType dtype) {
  switch (dtype) {
    case DType::float64: return Element::f64;
    case DType::bfloat16: return Element::bf16;
    case DType::float16: return Element::f16;
    default: return Element::f32;
  }
}

int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// A unit of work is one output row of a chunk of channels. Channels are only cut where there are
// not enough rows: threads that share a pixel's lines take them from one another (a processor
// prefetches past the end of a chunk), which costs more than an uneven share.
int64_t plan(DwconvCall& call, int64_t width, int64_t threads) {
  const int64_t rows = call.N * call.OH, block = 2 * width;  // the widest that kernels work on
  const bool cut = threads > 1 && rows < 2 * threads && call.K >= threads * block;
  const int64_t chunks = cut ? threads : 1;
  call.channel_chunk = (call.K + chunks * block - 1) / (chunks * block) * block;
  // The last chunk takes the rest.
  call.channel_chunks = std::max<int64_t>(1, call.K / call.channel_chunk);
  return rows * call.channel_chunks;
}

// Output channels are shared out too where there are few blocks.
int64_t plan(ConvCall& call, int64_t threads) {
  const int64_t pixels = call.N * call.OH * call.OW, block = block_pixels(call, threads);
  call.pixel_blocks = (pixels + block - 1) / block;
  call.channel_blocks = 1;
  constexpr int64_t kWorthSharing = 128 << 10;  // products; less takes about as long as to share it
  if (pixels * call.taps * call.K < kWorthSharing) {
    call.pixel_blocks = 1;
  } else if (threads > 1 && call.pixel_blocks < 4 * threads) {
    call.channel_blocks =
        std::min(panels_of(call.K), (4 * threads + call.pixel_blocks - 1) / call.pixel_blocks);
    // A few panels that threads cannot share evenly: of one of them each takes some pixels.
    if (call.pointwise && call.pixel_blocks == 1 && call.channel_blocks % threads)
      call.pixel_blocks = std::min(pixels, threads);
  }
  return call.pixel_blocks * call.channel_blocks;
}

// Below so many bytes a map is done before a second thread would have begun.
int64_t parts_of(const MapCall& call, int64_t most, int64_t threads) {
  constexpr int64_t kWorthSharing = 64 << 10;
  const int64_t bytes = call.N * call.pixels * call.C * (call.element == Element::bf16 ? 2 : 4);
  return bytes < kWorthSharing ? 1 : std::min(most, (threads + call.N - 1) / call.N);
}

void run_conv_on(ConvCall& call, int64_t threads) {
  const Kernels& kernels = active_kernels();
  const int64_t tasks = plan(call, threads);
  const auto bytes = static_cast<std::size_t>(kernels.conv_channels_last_scratch(call));
  share(tasks, threads, [&](int64_t begin, int64_t end) {
    kernels.conv_channels_last(call, begin, end, scratch_bytes<Scratch::kernel>(bytes));
  });
}

}  // namespace

int64_t block_pixels(const ConvCall& call, int64_t threads) {
  constexpr int64_t kFew = 56, kCache = 512 << 10;
  int64_t pixels = kFew;
  while (threads == 1 && pixels < 4 * kFew && 2 * pixels * call.taps * 4 <= kCache) pixels *= 2;
  return pixels;
}

DwconvCall dwconv_call(const Problem& p) {
  DwconvCall call{};
  call.N = p.N, call.C = p.C, call.H = p.H, call.W = p.W;
  call.K = p.K, call.OH = p.OH, call.OW = p.OW, call.multiplier = p.multiplier;
  call.KH = p.KH, call.KW = p.KW, call.SH = p.SH, call.SW = p.SW, call.DH = p.DH, call.DW = p.DW;
  call.top = p.top, call.left = p.left;
  call.element = element_of(p.dtype);
  call.activation = p.activation;
  call.slope = p.slope;
  const int64_t elements = p.N * (p.C * p.H * p.W + p.K * p.OH * p.OW);
  call.prefetch = elements * size_of(p.dtype) > kPrefetchFrom;
  return call;
}

ConvCall conv_call(const Problem& p) {
  ConvCall call{};
  call.N = p.N, call.C = p.C, call.H = p.H, call.W = p.W;
  call.K = p.K, call.OH = p.OH, call.OW = p.OW, call.taps = p.KH * p.KW * p.C;
  call.KH = p.KH, call.KW = p.KW, call.SH = p.SH, call.SW = p.SW, call.DH = p.DH, call.DW = p.DW;
  call.top = p.top, call.left = p.left;
  call.pointwise = call.taps == p.C && p.SH == 1 && p.SW == 1 && p.OH == p.H && p.OW == p.W &&
                   p.top == 0 && p.left == 0;
  call.prefetch = call.pointwise;
  call.element = element_of(p.dtype);
  call.activation = p.activation;
  call.slope = p.slope;
  return call;
}

void run_dwconv_channels_last(DwconvCall& call, const Problem& p, int64_t threads) {
  // Vectors must not be wider than a pixel's channels.
  const Kernels& kernels = narrowed_kernels(p.K);
  call.stream = may_stream(call.y, p, size_of(p.dtype));
  share(plan(call, kernels.width, threads), threads,
        [&](int64_t begin, int64_t end) { kernels.dwconv_channels_last(call, begin, end); });
}

void run_here(DwconvCall& call) {
  const Kernels& kernels = narrowed_kernels(call.K);
  kernels.dwconv_channels_last(call, 0, plan(call, kernels.width, 1));
}

void run_conv(ConvCall& call, const Problem& p, int64_t threads) {
  call.stream = p.dtype == DType::float32 && may_stream(call.y, p, sizeof(float));
  run_conv_on(call, threads);
}

void run_here(ConvCall& call) { run_conv_on(call, 1); }

void run_here(const InterleaveCall& call) { active_kernels().interleave(call); }

void run_pool(MapCall& call, int64_t threads) {
  call.parts = parts_of(call, panels_of(call.C), threads);
  share(call.N * call.parts, threads,
        [&](int64_t begin, int64_t end) { active_kernels().pool_channels_last(call, begin, end); });
}

void run_sigmoid(MapCall& call, int64_t threads) {
  call.parts = parts_of(call, call.pixels, threads);
  share(call.N * call.parts, threads, [&](int64_t begin, int64_t end) {
    active_kernels().sigmoid_channels_last(call, begin, end);
  });
}

void run_scale(MapCall& call, int64_t threads) {
  call.parts = parts_of(call, call.pixels, threads);
  share(call.N * call.parts, threads, [&](int64_t begin, int64_t end) {
    active_kernels().scale_channels_last(call, begin, end);
  });
}

}  // namespace mnet::cpu
