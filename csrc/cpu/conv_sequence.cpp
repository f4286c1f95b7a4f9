// Convolutions one after the other, channels_last, float32 or bfloat16, as one call: what passes
// between them stays in memory that is used again for every image and every call.
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

namespace mnet::cpu {
namespace {

constexpr const char* kOp = "conv_sequence";
constexpr int64_t kColumns = 16, kAlign = 16, kLine = 64;  // a cache line in floats, in bytes

struct Stage {
  Problem p;  // of one image
  bool dense;
  int64_t residual;  // the value that is added to the result, or -1
  const float *weight, *scale, *shift;
  const float* own_weight;  // depthwise bfloat16: the weight in that type
  Pairing pairing = Pairing::by_cost;
  bool feeds_block = false;  // with the next stage, which is the only one to read the result
  int64_t slot = -1;         // where the result goes; the last one is the caller's
};

// Value 0 is x, value i + 1 the result of stage i.
struct Sequence {
  std::vector<Stage> stages;
  std::vector<int64_t> slots;  // sizes in bytes, of one image
  int64_t image = 0;           // the sum of slots
};

int64_t aligned(int64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }
int64_t size_of(DType dtype) { return dtype == DType::bfloat16 ? 2 : 4; }

// A row of `stages`: kind (1 dense; depthwise 0, 2 always and 3 never paired with what follows,
// where it can be), C, K, KH, KW, SH, SW, DH, DW, top, left, bottom, right (top = -1: as
// TensorFlow's "same"), activation, residual, offset in `constants`. There lie, each on its own
// cache lines: the weight (packed, or in float32 by tap; in bfloat16 depthwise ones once more in
// bfloat16, for kernels that want them so), scale, shift, slope.
Stage stage_of(const int64_t* row, DType dtype, int64_t H, int64_t W, const float* constants,
               int64_t count) {
  auto expect = [&](bool good, const char* what) {
    if (!good) check::fail(kOp, "stages", what, check::show(row, kColumns));
  };
  Stage stage{};
  Problem& p = stage.p;
  expect(row[0] >= 0 && row[0] <= 3, "a kind from 0 to 3");
  stage.dense = row[0] == 1;
  if (row[0] > 1) stage.pairing = row[0] == 2 ? Pairing::always : Pairing::never;
  p.N = 1, p.C = row[1], p.H = H, p.W = W, p.K = row[2], p.KH = row[3], p.KW = row[4];
  p.SH = row[5], p.SW = row[6], p.DH = row[7], p.DW = row[8];
  p.top = row[9], p.left = row[10], p.bottom = row[11], p.right = row[12];
  p.dtype = dtype;
  for (int i = 1; i < 9; ++i)
    expect(row[i] > 0 && row[i] < int64_t{1} << 31, "positive sizes, strides and dilations");
  if (p.top == -1) {
    check::same_padding(p.H, p.KH, p.SH, p.DH, &p.top, &p.bottom);
    check::same_padding(p.W, p.KW, p.SW, p.DW, &p.left, &p.right);
  }
  for (int64_t edge : {p.top, p.left, p.bottom, p.right})
    expect(edge >= 0 && edge < int64_t{1} << 31, "padding of at least 0");
  expect(stage.dense || p.K % p.C == 0, "K a multiple of C");
  expect(row[13] >= 0 && row[13] < static_cast<int64_t>(kActivationCount), "a known activation");
  p.activation = static_cast<Activation>(row[13]);
  p.groups = stage.dense ? 1 : p.C;
  p.multiplier = p.K / p.groups;
  const int64_t room_h = p.H + p.top + p.bottom - (p.KH - 1) * p.DH - 1;
  const int64_t room_w = p.W + p.left + p.right - (p.KW - 1) * p.DW - 1;
  if (room_h < 0 || room_w < 0)
    check::fail(kOp, "x",
                check::join("a padded size of at least ", (p.KH - 1) * p.DH + 1, " x ",
                            (p.KW - 1) * p.DW + 1, " (the dilated kernel) at every stage"),
                check::join(p.H + p.top + p.bottom, " x ", p.W + p.left + p.right));
  p.OH = room_h / p.SH + 1, p.OW = room_w / p.SW + 1;

  const int64_t channels = stage.dense ? panels_of(p.K) * kPanel : p.K;
  const int64_t weights = stage.dense ? packed_bytes(p) / 4 : p.KH * p.KW * p.K;
  const bool twice = !stage.dense && dtype == DType::bfloat16;
  const int64_t own = twice ? (weights + 1) / 2 : 0;
  const int64_t size = aligned(weights) + aligned(own) + 2 * aligned(channels) + 1;
  expect(row[15] >= 0 && row[15] <= count - size, "an offset that lies within the constants");
  stage.weight = constants + row[15];
  stage.own_weight = stage.weight + aligned(weights);
  stage.scale = stage.own_weight + aligned(own);
  stage.shift = stage.scale + aligned(channels);
  p.slope = stage.shift[aligned(channels)];
  stage.residual = row[14];
  return stage;
}

bool is_pointwise(const Stage& stage) { return stage.dense && conv_call(stage.p).pointwise; }

Sequence sequence_of(const int64_t* rows, int64_t count, const Tensor& x, const float* constants,
                     int64_t constant_count) {
  Sequence s;
  std::vector<int64_t> last_use(static_cast<std::size_t>(count) + 1);
  int64_t C = x.size(1), H = x.size(2), W = x.size(3);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* row = rows + i * kColumns;
    if (row[1] != C)
      check::fail(kOp, i ? "stages" : "x", check::join(row[1], " channels"), check::join(C));
    s.stages.push_back(stage_of(row, facts_of(x).dtype, H, W, constants, constant_count));
    const Stage& stage = s.stages.back();
    C = stage.p.K, H = stage.p.OH, W = stage.p.OW;
    last_use[i] = i;
    const int64_t r = stage.residual;
    if (r == -1) continue;
    const bool known = stage.dense && r >= 0 && r <= i;
    const Problem* from = known && r > 0 ? &s.stages[r - 1].p : nullptr;
    if (!known || C != (from ? from->K : x.size(1)) || H != (from ? from->OH : x.size(2)) ||
        W != (from ? from->OW : x.size(3)))
      check::fail(kOp, "stages", "an earlier value of the result's shape as residual",
                  check::join(r, " at stage ", i));
    last_use[r] = i;
  }
  for (int64_t i = 0; i + 1 < count; ++i)
    if (!s.stages[i].dense && last_use[i + 1] == i + 1 && s.stages[i + 1].residual != i + 1 &&
        is_pointwise(s.stages[i + 1])) {
      s.stages[i].feeds_block = true;
      last_use[i] = std::max(last_use[i], i + 1);  // later bands still read it
    }
  // Each value takes a slot that no value still in use holds.
  std::vector<int64_t> held;  // by slot: the last stage that uses what is in it
  for (int64_t i = 0; i + 1 < count; ++i) {
    Stage& stage = s.stages[i];
    const auto free = std::find_if(held.begin(), held.end(), [&](int64_t use) { return use < i; });
    stage.slot = free - held.begin();
    if (free == held.end()) held.push_back(0), s.slots.push_back(0);
    held[stage.slot] = last_use[i + 1];
    const int64_t bytes = stage.p.K * stage.p.OH * stage.p.OW * size_of(stage.p.dtype);
    s.slots[stage.slot] = std::max(s.slots[stage.slot], (bytes + kLine - 1) / kLine * kLine);
  }
  for (int64_t size : s.slots) s.image += size;
  return s;
}

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
      if (stage.dense) {
        ConvCall call = dense(i);
        run_conv(call, p, threads_);
      } else {
        DwconvCall call = depthwise(i);
        run_dwconv_channels_last(call, p, threads_);
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
    call.residual = stage.residual < 0 ? nullptr : value(stage.residual);
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

Sequence checked_sequence(const Tensor& x, const Tensor& stages, const Tensor& constants) {
  const TensorFacts facts = facts_of(x);
  const bool known = facts.dtype == DType::float32 || facts.dtype == DType::bfloat16;
  if (facts.dim != 4 || !known || !x.is_cpu() || x.numel() == 0)
    check::fail(kOp, "x", "a float32 or bfloat16 CPU tensor (N, C, H, W) that is not empty",
                check::join(facts.dtype_name, " of ", check::shape(facts)));
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(stages.get(), &dtype));
  if (static_cast<ScalarType>(dtype) != ScalarType::Long || !stages.is_cpu() || stages.dim() != 2 ||
      stages.size(0) < 1 || stages.size(1) != kColumns || !stages.is_contiguous())
    check::fail(kOp, "stages", "an int64 CPU tensor (n, 16)", check::shape(facts_of(stages)));
  if (facts_of(constants).dtype != DType::float32 || !constants.is_cpu() ||
      !constants.is_contiguous())
    check::fail(kOp, "constants", "a contiguous float32 CPU tensor",
                facts_of(constants).dtype_name);
  return sequence_of(static_cast<const int64_t*>(stages.const_data_ptr()), stages.size(0), x,
                     static_cast<const float*>(constants.const_data_ptr()), constants.numel());
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
