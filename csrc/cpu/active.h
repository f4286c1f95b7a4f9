// The instruction set in use: the widest this machine runs, unless a test or a benchmark asks for
// another.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace mnet::cpu {

const Kernels& active_kernels();
// The widest set, not above the active one, whose vectors `channels` channels fill.
const Kernels& narrowed_kernels(int64_t channels);
// Whether a result of `bytes` at `y`, computed from `read` bytes, is to be stored past the caches:
// it would not be found there anyway, and every vector of a pixel of `pixel_bytes` is aligned.
bool stores_past_caches(const void* y, int64_t bytes, int64_t read, int64_t pixel_bytes);
std::vector<std::string> instruction_sets();  // compiled and running here, widest first
// Throws std::runtime_error where `name` is not one of instruction_sets().
void set_instruction_set(const std::string& name);

}  // namespace mnet::cpu
