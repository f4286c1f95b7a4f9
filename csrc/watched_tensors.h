// Lists of tensors, each known to Python by a number, and whether they still lie where they lay.
// Used by watch.h. No torch header: bindings.cpp includes this.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "lines.h"

namespace mnet {

// `size` bytes in memory, in cache lines that begin every `step` bytes; `copy`: where in a copy of
// many such pieces they are again, one after the other.
struct Piece {
  const char* from;
  std::size_t size, step, copy;
};
// Whether all of them still are what was copied; on torch's threads.
bool same(const std::vector<Piece>& pieces, const char* copies);

// Whether the tensors of a list lie where they lay when they were added, in the same way.
bool lie_as_before(std::int64_t list);
void forget(std::int64_t list);
// Adds what lie_as_before looks at.
void add_lines_of(std::int64_t list, Lines& lines);

}  // namespace mnet
