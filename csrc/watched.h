// Tensors whose addresses are looked at from C++, by a number that stands for a list of them.
// No torch header: bindings.cpp includes this.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "lines.h"

namespace mnet {

// Some bytes, and where in a copy of many such pieces they are again.
struct Piece {
  const char* from;
  std::size_t size, copy;
};
// Whether all of them still are what was copied; on torch's threads.
bool same(const std::vector<Piece>& pieces, const char* copies);

// Whether the tensors of a list lie at these addresses.
bool lie_at(std::int64_t list, const std::vector<std::uintptr_t>& addresses);
void forget(std::int64_t list);
// Adds what lie_at looks at.
void add_lines_of(std::int64_t list, Lines& lines);

}  // namespace mnet
