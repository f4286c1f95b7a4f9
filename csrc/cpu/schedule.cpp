#include "schedule.h"

#include <algorithm>
#include <utility>

#include "active.h"
#include "launch.h"
#include "memory.h"

namespace mnet::cpu {
namespace {

constexpr int64_t kFar = 512 << 10;  // bytes of a result that had better not be written to memory

const Stage& stage(const Sequence& s, int64_t i) { return s.stages[static_cast<std::size_t>(i)]; }
bool is_convolution(const Stage& s) { return s.kind == Kind::depthwise || s.kind == Kind::dense; }
int64_t result_bytes(const Stage& s) { return s.p.K * s.p.OH * s.p.OW * size_of(s.p.dtype); }

// Whether stages [begin, end) may go in strips: what lies between two of them is read by nobody
// after them, and a residual that starts inside the group is still in its window, row for row, when
// it is added: no stage since has a stride.
bool can_group(const Sequence& s, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (!is_convolution(stage(s, i))) return false;
    if (i + 1 < end && stage(s, i).last_use >= end) return false;
    const int64_t other = stage(s, i).other;
    for (int64_t k = other; other > begin && k <= i; ++k)
      if (stage(s, k).p.SH != 1) return false;
  }
  return true;
}

// Appends stage i of a group that begins at `begin`, whose stages before i are in `steps` already.
void add_step(std::vector<Step>& steps, const Sequence& s, int64_t begin, int64_t i,
              int64_t images) {
  if (stage(s, i).kind == Kind::depthwise) return steps.push_back({depthwise_call(s, i, images)});
  const auto before = static_cast<int64_t>(steps.size()) - (i - begin);
  const int64_t other = stage(s, i).other;
  steps.push_back({dense_call(s, i, images), other > begin ? other - 1 - begin + before : -1});
}

// What it gains, in nanoseconds, to run stages [begin, end) in strips instead of pair by pair, or
// stage by stage where they are not `paired` (by stage): large results between them are not written
// and read again, but rows at the edge of two threads' ranges are computed twice. And how many rows
// such strips have; 0: even the smallest does not fit into the second-level cache. Measured: what
// is written and read again soon costs little where the third-level cache is ours alone, and up to
// 6 % of MobileNet V2 where others use it too.
struct Gain {
  double nanoseconds;
  int64_t rows;
};
// `steps`: the stages' calls.
Gain gain_of(const Sequence& s, int64_t begin, int64_t end, const std::vector<bool>& paired,
             const std::vector<Step>& steps, int64_t images, int64_t threads) {
  constexpr double kFlops = 100, kFarBytes = 40;  // of one core, each nanosecond
  constexpr int64_t kWindow = 512 << 10;
  const int64_t OH = rows_of(steps.back()).OH, parts = std::min(OH, parts_of(images, threads));
  const int64_t first = parts / 2 * OH / parts, last = (parts / 2 + 1) * OH / parts;
  Gain gain{0, std::min<int64_t>(last - first, 2)};
  if (window_bytes(steps, gain.rows) > kWindow) return {};
  while (2 * gain.rows <= last - first && window_bytes(steps, 2 * gain.rows) <= kWindow)
    gain.rows *= 2;

  const double share = static_cast<double>(images) / threads;
  const std::vector<Range> ranges = ranges_of(steps, first, last);
  for (int64_t i = begin; i + 1 < end; ++i) {
    const Problem& p = stage(s, i).p;
    const int64_t bytes = result_bytes(stage(s, i));
    if (!paired[static_cast<std::size_t>(i)] && bytes > kFar)
      gain.nanoseconds += 2 * static_cast<double>(bytes) * share / kFarBytes;
    // Rows that another thread computes too.
    const Range& rows = ranges[ranges.size() - static_cast<std::size_t>(end - i)];
    const auto twice = static_cast<double>((rows.end - rows.begin) * parts - p.OH);
    gain.nanoseconds -= std::max(0.0, twice) * share *
                        static_cast<double>(2 * p.OW * p.K * p.KH * p.KW * p.C / p.groups) / kFlops;
  }
  return gain;
}

void choose_groups(Schedule& schedule, const Sequence& s, int64_t threads) {
  const auto [first, count, images] = schedule.segment;
  std::vector<bool> paired(s.stages.size());
  for (int64_t i = first; i + 1 < count; ++i) {
    if (!stage(s, i).feeds_block) continue;
    const auto at = static_cast<std::size_t>(i);
    schedule.pairs[at] =
        pair_cost(depthwise_call(s, i, images), dense_call(s, i + 1, images), threads);
    paired[at] = in_one_go(schedule.pairs[at], stage(s, i).pairing);
  }
  int64_t far_end = 0;  // no result from there on is large
  for (int64_t i = first; i < count; ++i)
    if (result_bytes(stage(s, i)) > kFar) far_end = i + 1;
  for (int64_t i = first; i < count;) {
    Group best{i, i + 1, 0};
    const bool planes = i == 0 && s.planes;
    std::vector<Step> steps;
    if (planes || i < far_end) steps = steps_of(s, i, i + 1, images);
    if (planes)
      best.rows = std::max<int64_t>(1, gain_of(s, 0, 1, paired, steps, images, threads).rows);
    else if (paired[static_cast<std::size_t>(i)])
      best = {i, i + 2,
              pair_rows(depthwise_call(s, i, images), dense_call(s, i + 1, images), threads)};
    double most = 0;
    for (int64_t end = i + 2; i < far_end && end <= count && is_convolution(stage(s, end - 1));
         ++end) {
      if (stage(s, end - 2).feeds_block && !paired[static_cast<std::size_t>(end - 2)]) break;
      add_step(steps, s, i, end - 1, images);
      if (paired[static_cast<std::size_t>(end - 1)] || !can_group(s, i, end)) continue;
      const Gain gain = gain_of(s, i, end, paired, steps, images, threads);
      if (gain.rows == 0) break;
      if (gain.nanoseconds > most) most = gain.nanoseconds, best = {i, end, gain.rows};
    }
    schedule.groups.push_back(best);
    i = best.end;
  }
}

// Dense stages of a pixel or two (the layers after a global mean) do little but wait for their
// weights from memory. So the dense stages before them prefetch those weights meanwhile: the
// nearest stage first, each as many bytes as arrive while it works.
void ask_early(Schedule& schedule, const Sequence& s) {
  constexpr int64_t kFew = 2, kLarge = 64 << 10, kFlopsAByte = 20;
  const int64_t begin = schedule.segment.begin, images = schedule.segment.images;
  std::vector<int64_t> room(s.stages.size());  // bytes
  for (const Group& group : schedule.groups) {
    const int64_t i = group.end - 1;
    const Problem& p = stage(s, i).p;
    if (stage(s, i).kind != Kind::dense) continue;
    if (const int64_t pixels = images * p.OH * p.OW; pixels > kFew) {
      const int64_t flops = 2 * pixels * p.K * p.KH * p.KW * p.C;
      room[static_cast<std::size_t>(i)] = flops / kFlopsAByte;
      continue;
    }
    int64_t bytes = packed_bytes(p);
    if (bytes < kLarge) continue;
    for (int64_t j = i; j-- > begin && bytes > 0;) {
      const auto at = static_cast<std::size_t>(j);
      const int64_t part = std::min(bytes, std::exchange(room[at], 0));
      if (part == 0) continue;
      bytes -= part;
      schedule.asked[at] = {reinterpret_cast<const char*>(stage(s, i).weight) + bytes, part};
    }
  }
}

// Gives each value that leaves its group a slot that no value still in use holds; a scale writes
// over what it scales where nobody else reads that.
void place(Schedule& schedule, const Sequence& s) {
  std::vector<int64_t> held;  // by slot: the last stage that uses what is in it
  for (const Group& group : schedule.groups) {
    const int64_t i = group.end - 1;
    if (i + 1 == schedule.segment.end) break;
    const Stage& last = stage(s, i);
    const bool in_place = last.kind == Kind::scale && last.other > schedule.segment.begin &&
                          stage(s, last.other - 1).last_use == i;
    // A group reads its input until its end.
    const auto free = in_place
                          ? held.begin() + schedule.slot[static_cast<std::size_t>(last.other - 1)]
                          : std::find_if(held.begin(), held.end(),
                                         [&](int64_t use) { return use < group.begin; });
    const auto slot = static_cast<std::size_t>(free - held.begin());
    if (free == held.end()) held.push_back(0), schedule.slots.push_back(0);
    held[slot] = last.last_use;
    schedule.slot[static_cast<std::size_t>(i)] = static_cast<int64_t>(slot);
    schedule.slots[slot] = std::max(schedule.slots[slot], whole_lines(result_bytes(last)));
  }
  for (int64_t size : schedule.slots) schedule.image += size;
}

}  // namespace

DwconvCall depthwise_call(const Sequence& sequence, int64_t i, int64_t images) {
  const Stage& from = stage(sequence, i);
  Problem p = from.p;
  p.N = images;
  DwconvCall call = dwconv_call(p);
  const bool own = narrowed_kernels(p.K).dwconv_keeps_weight(call);
  call.weight = own ? from.own_weight : from.weight;
  call.scale = from.scale, call.shift = from.shift;
  return call;
}

ConvCall dense_call(const Sequence& sequence, int64_t i, int64_t images) {
  const Stage& from = stage(sequence, i);
  Problem p = from.p;
  p.N = images;
  ConvCall call = conv_call(p);
  call.weight = from.weight, call.scale = from.scale, call.shift = from.shift;
  return call;
}

std::vector<Step> steps_of(const Sequence& sequence, int64_t begin, int64_t end, int64_t images) {
  std::vector<Step> steps;
  if (begin == 0 && sequence.planes) {
    const Problem& p = stage(sequence, 0).p;
    steps.push_back({InterleaveCall{images, p.C, p.H, p.W, p.C, p.H, p.W, p.H * p.W, nullptr,
                                    nullptr, conv_call(p).element}});
  }
  for (int64_t i = begin; i < end; ++i) add_step(steps, sequence, begin, i, images);
  return steps;
}

Schedule schedule_of(const Sequence& sequence, const Segment& segment, int64_t threads) {
  Schedule schedule;
  schedule.segment = segment;
  schedule.pairs.resize(sequence.stages.size());
  schedule.asked.resize(sequence.stages.size());
  schedule.slot.resize(sequence.stages.size(), -1);
  choose_groups(schedule, sequence, threads);
  ask_early(schedule, sequence);
  place(schedule, sequence);
  return schedule;
}

std::vector<Segment> segments_of(const Sequence& sequence, int64_t images) {
  constexpr int64_t kNear = 1 << 20;  // bytes that a stage may read and write
  const auto count = static_cast<int64_t>(sequence.stages.size());
  std::vector<int64_t> together(sequence.stages.size());
  std::vector<bool> starts(sequence.stages.size());  // nothing from there on reads older values
  int64_t fit = images, oldest = count;
  for (int64_t i = count; i-- > 0;) {
    const Stage& here = stage(sequence, i);
    const Problem& p = here.p;
    const int64_t bytes = p.C * p.H * p.W * size_of(p.dtype) + result_bytes(here);
    while (fit > 1 && fit * bytes > kNear) fit /= 2;
    together[static_cast<std::size_t>(i)] = fit;
    if (here.other >= 0) oldest = std::min(oldest, here.other);
    starts[static_cast<std::size_t>(i)] = oldest >= i;
  }
  std::vector<Segment> segments{{0, count, together[0]}};
  for (int64_t i = 1; i < count; ++i) {
    const auto at = static_cast<std::size_t>(i);
    if (!starts[at] || together[at] < 2 * segments.back().images) continue;
    segments.back().end = i;
    segments.push_back({i, count, together[at]});
  }
  return segments;
}

}  // namespace mnet::cpu
