#include "strip.h"

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "launch.h"
#include "memory.h"

namespace mnet::cpu {
namespace {

// The most rows of every result but the last that are needed at a time: whoever reads it starts
// where it stopped, or at most its reach less its stride above.
std::vector<int64_t> window_rows(const std::vector<RowsOf>& geometry, int64_t rows) {
  std::vector<int64_t> most(geometry.size());
  most.back() = rows;
  for (std::size_t k = geometry.size(); k-- > 1;) {
    const RowsOf& next = geometry[k];
    most[k - 1] = std::min(next.H, (most[k] - 1) * next.stride + next.reach);
  }
  return most;
}

std::vector<RowsOf> geometry_of(const std::vector<Step>& steps) {
  std::vector<RowsOf> geometry;
  for (const Step& step : steps) geometry.push_back(rows_of(step));
  return geometry;
}

// Rows of one value, of which some are in memory.
struct Rows {
  char* memory;
  int64_t base, end;  // rows [base, end) are there
  int64_t capacity, row;
  char* at(int64_t h) const { return memory + (h - base) * row; }
};

// A call for output rows [oh, oh_end) of image n alone, read from and written to `from` and `to`.
template <typename Call>
Call part(Call call, const Rows& from, const Rows& to, int64_t oh, int64_t oh_end, bool near) {
  const int64_t first = std::clamp(oh * call.SH - call.top, from.base, call.H);
  call.x = from.at(first), call.y = to.at(oh);
  call.N = 1, call.OH = oh_end - oh;
  if constexpr (!std::is_same_v<Call, InterleaveCall>) {
    call.H -= first, call.top += first - oh * call.SH;
    call.stream = false;
    call.prefetch = call.prefetch && !near;
  }
  if constexpr (std::is_same_v<Call, ConvCall>) call.H = call.pointwise ? call.OH : call.H;
  return call;
}

class Strips {
 public:
  Strips(const std::vector<Step>& steps, int64_t rows)
      : steps_(steps),
        rows_(rows),
        geometry_(geometry_of(steps)),
        capacity_(window_rows(geometry_, rows)) {}

  // Rows [oh, oh_end) of the last result of image n.
  void operator()(int64_t n, int64_t oh, int64_t oh_end) const {
    const std::size_t last = steps_.size() - 1;
    auto* memory = static_cast<char*>(
        scratch_bytes<Scratch::band>(static_cast<std::size_t>(bytes_of(geometry_, capacity_))));
    const std::vector<Range> needed = ranges_of(steps_, oh, oh_end);
    // values[k] is what step k reads, values[k + 1] its result.
    std::vector<Rows> values{input(n)};
    for (std::size_t k = 0; k < last; ++k) {
      values.push_back({memory, needed[k].begin, needed[k].begin, capacity_[k], geometry_[k].row});
      memory += whole_lines(capacity_[k] * geometry_[k].row);
    }
    values.push_back(output(n));
    values.back().end = oh;
    std::vector<int64_t> ends(last + 1);
    while (values.back().end < oh_end) {
      ends[last] = std::min(oh_end, values.back().end + rows_);
      for (std::size_t k = last; k > 0; --k) {
        // A stride may leave rows out that nobody has to compute.
        const int64_t first = geometry_[k].first_input(values[k + 1].end);
        if (first > values[k].end) values[k].base = values[k].end = first;
        ends[k - 1] = std::max(values[k].end, geometry_[k].input_end(ends[k]));
      }
      for (std::size_t k = 0; k <= last; ++k) {
        Rows& to = values[k + 1];
        if (to.end == ends[k]) continue;
        if (k < last && ends[k] - to.base > to.capacity) make_room(values, k);
        compute(n, k, values, ends[k]);
        to.end = ends[k];
      }
    }
  }

  static int64_t bytes_of(const std::vector<RowsOf>& geometry,
                          const std::vector<int64_t>& capacity) {
    int64_t bytes = 0;
    for (std::size_t k = 0; k + 1 < geometry.size(); ++k)
      bytes += whole_lines(capacity[k] * geometry[k].row);
    return bytes;
  }

 private:
  // Image n, as the first step finds it: whole images, or planes of them.
  Rows input(int64_t n) const {
    return std::visit(
        [n](const auto& call) {
          constexpr bool kPlanes = std::is_same_v<std::decay_t<decltype(call)>, InterleaveCall>;
          const int64_t pixel = size_of(call.element) * call.C, image = call.H * call.W * pixel;
          return Rows{static_cast<char*>(const_cast<void*>(call.x)) + n * image, 0, call.H, call.H,
                      call.W * (kPlanes ? size_of(call.element) : pixel)};
        },
        steps_.front().call);
  }
  Rows output(int64_t n) const {
    const RowsOf& g = geometry_.back();
    void* y = std::visit([](const auto& call) { return call.y; }, steps_.back().call);
    return {static_cast<char*>(y) + n * g.OH * g.row, 0, g.OH, g.OH, g.row};
  }

  // Moves the rows of step k's result that are still to be read to the front.
  void make_room(std::vector<Rows>& values, std::size_t k) const {
    Rows& value = values[k + 1];
    int64_t first = geometry_[k + 1].first_input(values[k + 2].end);
    for (std::size_t j = k + 2; j < steps_.size(); ++j)
      if (steps_[j].other == static_cast<int64_t>(k)) first = std::min(first, values[j + 1].end);
    std::copy(value.at(first), value.at(value.end), value.memory);
    value.base = first;
  }

  void compute(int64_t n, std::size_t k, const std::vector<Rows>& values, int64_t end) const {
    const Step& step = steps_[k];
    const Rows &from = values[k], &to = values[k + 1];
    std::visit(
        [&](const auto& whole) {
          auto call = part(whole, from, to, to.end, end, k > 0);
          if constexpr (std::is_same_v<decltype(call), ConvCall>) {
            const int64_t rows = whole.N * whole.OH, row = n * whole.OH + to.end;
            call.next = static_cast<const char*>(call.next) + call.next_bytes * row / rows;
            call.next_bytes = call.next_bytes * call.OH / rows;
            if (step.other >= 0)
              call.residual = values[static_cast<std::size_t>(step.other) + 1].at(to.end);
            else if (call.residual)
              call.residual = static_cast<const char*>(call.residual) +
                              (n * geometry_[k].OH + to.end) * geometry_[k].row;
          }
          run_here(call);
        },
        step.call);
  }

  const std::vector<Step>& steps_;
  const int64_t rows_;
  const std::vector<RowsOf> geometry_;
  const std::vector<int64_t> capacity_;
};

}  // namespace

int64_t RowsOf::first_input(int64_t oh) const {
  return std::clamp<int64_t>(oh * stride - top, 0, H);
}
int64_t RowsOf::input_end(int64_t oh_end) const {
  return std::clamp<int64_t>((oh_end - 1) * stride - top + reach, 0, H);
}

RowsOf rows_of(const Step& step) {
  return std::visit(
      [](const auto& call) {
        return RowsOf{call.H,   call.OH,
                      call.SH,  (call.KH - 1) * call.DH + 1,
                      call.top, call.OW * call.K * size_of(call.element)};
      },
      step.call);
}

std::vector<Range> ranges_of(const std::vector<Step>& steps, int64_t oh, int64_t oh_end) {
  std::vector<Range> ranges(steps.size());
  ranges.back() = {oh, oh_end};
  for (std::size_t k = steps.size(); k-- > 1;) {
    const RowsOf next = rows_of(steps[k]);
    const int64_t end = next.input_end(ranges[k].end);
    ranges[k - 1] = {std::min(end, next.first_input(ranges[k].begin)), end};
  }
  return ranges;
}

int64_t parts_of(int64_t images, int64_t threads) { return threads / std::gcd(images, threads); }

int64_t window_bytes(const std::vector<Step>& steps, int64_t rows) {
  const std::vector<RowsOf> geometry = geometry_of(steps);
  return Strips::bytes_of(geometry, window_rows(geometry, rows));
}

void run_strips(const std::vector<Step>& steps, int64_t rows, int64_t threads) {
  const int64_t N = std::visit([](const auto& call) { return call.N; }, steps.back().call);
  const int64_t OH = rows_of(steps.back()).OH;
  const int64_t parts = std::min(OH, parts_of(N, threads));
  const Strips strips(steps, rows);
  share(N * parts, threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts;
      strips(task / parts, part * OH / parts, (part + 1) * OH / parts);
    }
  });
}

}  // namespace mnet::cpu
