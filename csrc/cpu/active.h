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
std::vector<std::string> instruction_sets();  // compiled and running here, widest first
// Throws std::runtime_error where `name` is not one of instruction_sets().
void set_instruction_set(const std::string& name);

}  // namespace mnet::cpu
