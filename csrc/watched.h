// Tensors whose addresses are looked at from C++, by a number that stands for a list of them.
// No torch header: bindings.cpp includes this.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mnet {

// Whether the tensors of a list lie at these addresses.
bool lie_at(std::int64_t list, const std::vector<std::uintptr_t>& addresses);
void forget(std::int64_t list);

}  // namespace mnet
