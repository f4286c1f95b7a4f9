// Convolutions one after the other, channels_last, float32 or bfloat16, as one call, with the
// squeeze-and-excitation blocks and global means between them: what passes from one to the next
// stays in memory that is used again for every image and every call.
//
// Groups of convolutions go through strip by strip (schedule.h). With at least one image a thread,
// every thread takes its images through all stages by itself, and threads meet once: segment by
// segment, the more images at a time the smaller they have become. The images left over go through
// together, all threads working on each stage or group.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "../tensor.h"
#include "active.h"
#include "launch.h"
#include "memory.h"
#include "result_memory.h"
#include "schedule.h"

namespace mnet::cpu {
namespace {

// One run through a schedule's stages: `images` images from x to y; `memory` holds that many times
// schedule.image bytes.
class Run {
 public:
  Run(const Sequence& sequence, const Schedule& schedule, const void* x, void* y, int64_t images,
      char* memory, int64_t threads)
      : sequence_(sequence), schedule_(schedule), x_(x), y_(y), images_(images), threads_(threads) {
    for (int64_t size : schedule.slots) slots_.push_back(memory), memory += size * images;
  }

  void operator()() const {
    for (const Group& group : schedule_.groups)
      if (group.rows > 0)
        strips(group);
      else
        alone(group.begin);
  }

 private:
  const void* value(int64_t v) const {
    return v == schedule_.segment.begin ? x_
                                        : slots_[schedule_.slot[static_cast<std::size_t>(v - 1)]];
  }
  void* result(int64_t i) const {
    const int64_t slot = schedule_.slot[static_cast<std::size_t>(i)];
    return slot < 0 ? y_ : slots_[static_cast<std::size_t>(slot)];
  }
  const void* residual(int64_t i) const {
    const int64_t other = sequence_.stages[static_cast<std::size_t>(i)].other;
    return other < 0 ? nullptr : value(other);
  }

  void ask(ConvCall& call, int64_t i) const {
    const Asked& asked = schedule_.asked[static_cast<std::size_t>(i)];
    call.next = asked.from, call.next_bytes = asked.bytes;
  }

  void strips(const Group& group) const {
    std::vector<Step> steps = steps_of(sequence_, group.begin, group.end, images_);
    std::visit([&](auto& call) { call.x = value(group.begin); }, steps.front().call);
    std::visit([&](auto& call) { call.y = result(group.end - 1); }, steps.back().call);
    if (auto* call = std::get_if<ConvCall>(&steps.back().call)) ask(*call, group.end - 1);
    auto step = steps.rbegin();
    for (int64_t i = group.end; i-- > group.begin; ++step)
      if (auto* call = std::get_if<ConvCall>(&step->call); call && step->other < 0)
        call->residual = residual(i);
    run_strips(steps, group.rows, threads_);
  }

  void alone(int64_t i) const {
    const Stage& stage = sequence_.stages[static_cast<std::size_t>(i)];
    Problem p = stage.p;
    p.N = images_;
    switch (stage.kind) {
      case Kind::depthwise: {
        DwconvCall call = depthwise_call(sequence_, i, images_);
        call.x = value(i), call.y = result(i);
        return run_dwconv_channels_last(call, p, threads_);
      }
      case Kind::dense: {
        ConvCall call = dense_call(sequence_, i, images_);
        call.x = value(i), call.y = result(i), call.residual = residual(i);
        ask(call, i);
        return run_conv(call, p, threads_);
      }
      case Kind::pool: {
        MapCall call = map(i, p.H * p.W);
        call.x = value(i);
        return run_pool(call, threads_);
      }
      case Kind::sigmoid: {
        MapCall call = map(i, p.OH * p.OW);
        call.x = value(i);
        return run_sigmoid(call, threads_);
      }
      case Kind::scale: {
        MapCall call = map(i, p.OH * p.OW);
        call.x = value(stage.other), call.gate = value(i);
        return run_scale(call, threads_);
      }
    }
  }

  MapCall map(int64_t i, int64_t pixels) const {
    const Problem& p = sequence_.stages[static_cast<std::size_t>(i)].p;
    return {images_, p.C, pixels, nullptr, nullptr, result(i), conv_call(p).element, 1};
  }

  const Sequence& sequence_;
  const Schedule& schedule_;
  const void* x_;
  void* y_;
  const int64_t images_, threads_;
  std::vector<char*> slots_;
};

// Memory for a thread's call, kept for its next one unless it is large.
template <typename Body>
void with_memory(int64_t size, const Body& body) {
  constexpr std::size_t kKept = std::size_t{128} << 20;
  const auto bytes = static_cast<std::size_t>(size) + kLine;
  std::unique_ptr<char[]> own(bytes > kKept ? new char[bytes] : nullptr);
  void* memory = own ? align_line(own.get()) : scratch_bytes<Scratch::sequence>(bytes);
  body(static_cast<char*>(memory));
}

// A thread's images, through all segments.
class Segments {
 public:
  Segments(const Sequence& sequence, int64_t images) : sequence_(sequence) {
    for (const Segment& segment : segments_of(sequence, images)) {
      schedules_.push_back(schedule_of(sequence, segment, 1));
      const Problem& p = sequence.stages[static_cast<std::size_t>(segment.begin)].p;
      const int64_t input = p.C * p.H * p.W * size_of(p.dtype);
      input_.push_back(input);
      const int64_t bytes = schedules_.back().image + (segment.begin > 0 ? input : 0);
      bytes_.push_back(whole_lines(bytes * segment.images));
    }
    const Problem& p = sequence.stages.back().p;
    input_.push_back(p.K * p.OH * p.OW * size_of(p.dtype));
  }

  void operator()(const char* x, char* y, int64_t images) const {
    with_memory(std::accumulate(bytes_.begin(), bytes_.end(), int64_t{0}),
                [&](char* memory) { through(schedules_.size() - 1, x, y, images, memory); });
  }

 private:
  // From the sequence's input to the result of a segment, images at a time.
  void through(std::size_t segment, const char* x, char* y, int64_t images, char* memory) const {
    const Schedule& schedule = schedules_[segment];
    for (int64_t n = 0; n < images; n += schedule.segment.images) {
      const int64_t count = std::min(schedule.segment.images, images - n);
      const char* from = x + n * input_[0];
      char* rest = memory + bytes_[segment];
      if (segment > 0) {
        char* between = memory + schedule.image * schedule.segment.images;
        through(segment - 1, from, between, count, rest);
        from = between;
      }
      Run(sequence_, schedule, from, y + n * input_[segment + 1], count, memory, 1)();
    }
  }

  const Sequence& sequence_;
  std::vector<Schedule> schedules_;
  std::vector<int64_t> input_;  // bytes of a segment's, of one image; after the last, of the result
  std::vector<int64_t> bytes_;  // of memory
};

}  // namespace

Tensor conv_sequence(Tensor x, Tensor stages, Tensor constants, bool flat) {
  const TensorFacts facts = facts_of(x);
  const Sequence sequence = checked_sequence(x, stages, constants);
  const Tensor input = sequence.planes ? x : dense(x, Layout::channels_last);
  const Problem& last = sequence.stages.back().p;
  const int64_t N = x.size(0), size = size_of(facts.dtype);
  const int64_t x_size = x.numel() / N * size, y_size = last.K * last.OH * last.OW * size;
  if (flat && last.OH * last.OW != 1)
    check::fail("conv_sequence", "flat", "a result of one pixel",
                check::join(last.OH, " x ", last.OW));
  Tensor y = flat ? empty_strided(x, {N, last.K}, {last.K, 1})
                  : empty_result(x, N, last.K, last.OH, last.OW, Layout::channels_last);
  const auto* from = static_cast<const char*>(input.const_data_ptr());
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  const int64_t threads = torch::stable::get_num_threads(), alone = N / threads * threads;
  if (alone > 0) {
    const Segments segments(sequence, alone / threads);
    torch::stable::parallel_for(0, alone, 1, [&](int64_t begin, int64_t end) {
      segments(from + begin * x_size, to + begin * y_size, end - begin);
    });
  }
  if (const int64_t left = N - alone; left > 0) {
    const Schedule schedule = schedule_of(sequence, whole(sequence, left), threads);
    with_memory(schedule.image * left, [&](char* memory) {
      Run(sequence, schedule, from + alone * x_size, to + alone * y_size, left, memory, threads)();
    });
  }
  return y;
}

// How conv_sequence would run these stages with so many threads; of x only shape and dtype matter.
// Three numbers a stage: whether an image goes through it and the next one in the same strips, and
// of a pair the estimated costs of doing so and of not, in nanoseconds.
std::vector<int64_t> conv_sequence_plan(Tensor x, Tensor stages, Tensor constants,
                                        int64_t threads) {
  const Sequence s = checked_sequence(x, stages, constants);
  const int64_t N = x.size(0);
  std::vector<Segment> segments{whole(s, N)};
  if (N >= threads) segments = segments_of(s, N / threads);
  std::vector<int64_t> plan;
  for (const Segment& segment : segments) {
    const Schedule schedule = schedule_of(s, segment, N < threads ? threads : 1);
    for (const Group& group : schedule.groups)
      for (int64_t i = group.begin; i < group.end; ++i) {
        const PairCost& cost = schedule.pairs[static_cast<std::size_t>(i)];
        plan.push_back(i + 1 < group.end);
        plan.push_back(static_cast<int64_t>(cost.fused));
        plan.push_back(static_cast<int64_t>(cost.separate));
      }
  }
  return plan;
}

}  // namespace mnet::cpu

STABLE_TORCH_LIBRARY_IMPL(mnet_kernels, CPU, m) {
  m.impl("conv_sequence", TORCH_BOX(&mnet::cpu::conv_sequence));
  m.impl("conv_sequence_plan", TORCH_BOX(&mnet::cpu::conv_sequence_plan));
}
