#include "watched_tensors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "tensor.h"

namespace mnet {
namespace {

struct List {
  std::vector<Tensor> tensors;
  std::vector<std::int64_t> places;  // of each what all_of_place tells
};

std::mutex mutex;
std::int64_t newest = 0;
std::map<std::int64_t, List>& lists() {
  static auto* all = new std::map<std::int64_t, List>;  // outlives every user
  return *all;
}

// Calls f with every number of a tensor's place, for as long as it answers true. Of a contiguous
// one, strides say no more: every question costs as much as one of the other checks.
template <typename F>
bool all_of_place(const Tensor& x, F f) {
  if (!f(reinterpret_cast<std::int64_t>(x.const_data_ptr())) || !f(x.numel())) return false;
  const bool contiguous = x.is_contiguous();
  if (!f(contiguous)) return false;
  if (contiguous) return true;
  const auto strides = x.strides();
  return f(static_cast<std::int64_t>(strides.size())) &&
         std::all_of(strides.begin(), strides.end(), f);
}

// Adds x to a list; list 0 makes a new one.
std::int64_t watch(Tensor x, std::int64_t list) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (list == 0) list = ++newest;
  List& to = lists()[list];
  all_of_place(x, [&](std::int64_t number) { return to.places.push_back(number), true; });
  to.tensors.push_back(std::move(x));
  return list;
}

}  // namespace

bool same(const std::vector<Piece>& pieces, const char* copies) {
  constexpr std::int64_t kWorthSharing = 32, kAhead = 4;
  const auto count = static_cast<std::int64_t>(pieces.size());
  std::atomic<bool> all{true};
  torch::stable::parallel_for(0, count, kWorthSharing, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const Piece& ahead = pieces[static_cast<std::size_t>(std::min(i + kAhead, end - 1))];
      for (std::size_t at = 0; at < ahead.size; at += kLine)
        __builtin_prefetch(ahead.from + at / kLine * ahead.step, 0, 2);
      const Piece& piece = pieces[static_cast<std::size_t>(i)];
      const std::size_t together = piece.step == kLine ? piece.size : kLine;
      for (std::size_t at = 0; at < piece.size; at += together)
        if (std::memcmp(piece.from + at / kLine * piece.step, copies + piece.copy + at,
                        std::min(together, piece.size - at)) != 0)
          all = false;
    }
  });
  return all;
}

bool lie_as_before(std::int64_t list) {
  const List* all = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    all = &lists().at(list);  // stays where it is while others come and go
  }
  const std::int64_t* was = all->places.data();
  for (const Tensor& tensor : all->tensors)
    if (!all_of_place(tensor, [&](std::int64_t number) { return number == *was++; })) return false;
  return true;
}

// A handle points to an at::Tensor, that is to a pointer to what the tensor is made of; in the
// first words of this are the pointers to its storage and its version.
void add_lines_of(std::int64_t list, Lines& lines) {
  constexpr std::size_t kWords = 6, kBytes = 192;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Tensor& tensor : lists().at(list).tensors) {
    const void* made_of = *reinterpret_cast<void* const*>(tensor.get());
    lines.add(tensor.get(), sizeof(void*));
    lines.add(made_of, kBytes);
    for (std::size_t i = 0; i < kWords; ++i)
      if (void* word = static_cast<void* const*>(made_of)[i]) lines.add(word, 2 * sizeof(void*));
  }
}

void forget(std::int64_t list) {
  const std::lock_guard<std::mutex> lock(mutex);
  lists().erase(list);
}

}  // namespace mnet

STABLE_TORCH_LIBRARY_IMPL(mnet_kernels, CPU, m) { m.impl("watch", TORCH_BOX(&mnet::watch)); }
