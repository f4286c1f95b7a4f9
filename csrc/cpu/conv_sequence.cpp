// Convolutions one after the other, channels_last, float32 or bfloat16, as one call, with the
// squeeze-and-excitation blocks and global means between them: what passes from one to the next
// stays in memory that is used again for every image and every call.
//
// A depthwise convolution and the 1x1 convolution that follows it go through band by band (pair.h).
// With at least one image a thread, every thread takes its images through all stages by
// itself, and threads meet once. The images left over go through together, all threads working on
// each stage or pair of stages.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../tensor.h"
#include "active.h"
#include "launch.h"
#include "memory.h"
#include "pair.h"
#include "sequence.h"

namespace mnet::cpu {
namespace {

constexpr int64_t kLine = 64;

// One run through the stages: `images` images from x to y; `memory` holds that many times
// sequence.image bytes.
class Run {
 public:
  Run(const Sequence& sequence, const void* x, void* y, int64_t images, char* memory,
      int64_t threads)
      : sequence_(sequence), x_(x), y_(y), images_(images), threads_(threads) {
    for (int64_t size : sequence.slots) slots_.push_back(memory), memory += size * images;
  }

  void operator()() const {
    const auto count = static_cast<int64_t>(sequence_.stages.size());
    for (int64_t i = 0; i < count; ++i) {
      const Stage& stage = sequence_.stages[i];
      const Problem p = problem(i);
      if (stage.feeds_block) {
        const DwconvCall first = depthwise(i);
        const ConvCall second = dense(i + 1);
        if (const PairPlan plan = plan_pair(first, second, threads_, stage.pairing); plan.bands) {
          run_pair(first, second, plan, threads_);
          ++i;
          continue;
        }
      }
      switch (stage.kind) {
        case Kind::depthwise: {
          DwconvCall call = depthwise(i);
          run_dwconv_channels_last(call, p, threads_);
          break;
        }
        case Kind::dense: {
          ConvCall call = dense(i);
          run_conv(call, p, threads_);
          break;
        }
        case Kind::pool: {
          MapCall call = map(i, p.H * p.W);
          call.x = value(i);
          run_pool(call, threads_);
          break;
        }
        case Kind::scale: {
          MapCall call = map(i, p.OH * p.OW);
          call.x = value(stage.other), call.gate = value(i);
          run_scale(call, threads_);
          break;
        }
      }
    }
  }

 private:
  const void* value(int64_t v) const { return v == 0 ? x_ : slots_[sequence_.stages[v - 1].slot]; }
  void* result(int64_t i) const {
    const int64_t slot = sequence_.stages[i].slot;
    return slot < 0 ? y_ : slots_[slot];
  }
  Problem problem(int64_t i) const {
    Problem p = sequence_.stages[i].p;
    p.N = images_;
    return p;
  }
  ConvCall dense(int64_t i) const {
    const Stage& stage = sequence_.stages[i];
    ConvCall call = conv_call(problem(i));
    call.x = value(i), call.y = result(i);
    call.weight = stage.weight, call.scale = stage.scale, call.shift = stage.shift;
    call.residual = stage.other < 0 ? nullptr : value(stage.other);
    return call;
  }
  DwconvCall depthwise(int64_t i) const {
    const Stage& stage = sequence_.stages[i];
    DwconvCall call = dwconv_call(problem(i));
    const bool own = narrowed_kernels(call.K).dwconv_keeps_weight(call);
    call.x = value(i), call.y = result(i);
    call.weight = own ? stage.own_weight : stage.weight;
    call.scale = stage.scale, call.shift = stage.shift;
    return call;
  }

  MapCall map(int64_t i, int64_t pixels) const {
    const Problem& p = sequence_.stages[i].p;
    return {images_, p.C, pixels, nullptr, nullptr, result(i), conv_call(p).element, 1};
  }

  const Sequence& sequence_;
  const void* x_;
  void* y_;
  const int64_t images_, threads_;
  std::vector<char*> slots_;
};

// Runs with the memory it needs: kept for the thread's next call unless it is large.
void run_here(const Sequence& sequence, const void* x, void* y, int64_t images, int64_t threads) {
  constexpr std::size_t kKept = std::size_t{128} << 20;
  const auto bytes = static_cast<std::size_t>(sequence.image * images) + kLine;
  std::unique_ptr<char[]> own(bytes > kKept ? new char[bytes] : nullptr);
  void* memory = own ? align_line(own.get()) : scratch_bytes<Scratch::sequence>(bytes);
  Run(sequence, x, y, images, static_cast<char*>(memory), threads)();
}

}  // namespace

Tensor conv_sequence(Tensor x, Tensor stages, Tensor constants) {
  const TensorFacts facts = facts_of(x);
  const Sequence sequence = checked_sequence(x, stages, constants);
  const Tensor input = dense(x, Layout::channels_last);
  const Problem& last = sequence.stages.back().p;
  const int64_t N = x.size(0), size = size_of(facts.dtype);
  const int64_t x_size = x.numel() / N * size, y_size = last.K * last.OH * last.OW * size;
  Tensor y = empty_4d(x, N, last.K, last.OH, last.OW, Layout::channels_last);
  const auto* from = static_cast<const char*>(input.const_data_ptr());
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  const int64_t threads = torch::stable::get_num_threads(), alone = N / threads * threads;
  torch::stable::parallel_for(0, alone, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      run_here(sequence, from + n * x_size, to + n * y_size, 1, 1);
  });
  if (alone < N) run_here(sequence, from + alone * x_size, to + alone * y_size, N - alone, threads);
  return y;
}

// How conv_sequence would run these stages with so many threads; of x only shape and dtype matter.
// Three numbers a stage: the bands in which an image goes through it and the next one (0: it goes
// alone, or is the second of a pair), and the estimated costs of fusing and of not, in nanoseconds.
std::vector<int64_t> conv_sequence_plan(Tensor x, Tensor stages, Tensor constants,
                                        int64_t threads) {
  Sequence s = checked_sequence(x, stages, constants);
  const int64_t N = x.size(0), images = N < threads ? N : 1;
  std::vector<int64_t> plan;
  for (std::size_t i = 0; i < s.stages.size(); ++i) {
    PairPlan pair{};
    if (s.stages[i].feeds_block) {
      s.stages[i].p.N = s.stages[i + 1].p.N = images;
      pair = plan_pair(dwconv_call(s.stages[i].p), conv_call(s.stages[i + 1].p),
                       N < threads ? threads : 1, s.stages[i].pairing);
    }
    for (double value : {static_cast<double>(pair.bands), pair.fused, pair.separate})
      plan.push_back(static_cast<int64_t>(value));
  }
  return plan;
}

}  // namespace mnet::cpu

STABLE_TORCH_LIBRARY_IMPL(mnet_kernels, CPU, m) {
  m.impl("conv_sequence", TORCH_BOX(&mnet::cpu::conv_sequence));
  m.impl("conv_sequence_plan", TORCH_BOX(&mnet::cpu::conv_sequence_plan));
}
