// The table of instruction sets, and which of them this machine runs.
#include "kernels.h"

namespace mnet::cpu {

#if defined(__x86_64__)
namespace avx512_bf16 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
#endif
namespace baseline {
extern const Kernels kKernels;
}

namespace {
#if defined(__x86_64__)
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}
bool runs_avx512_bf16() { return runs_avx512() && __builtin_cpu_supports("avx512bf16"); }
// F16C came with Ivy Bridge, AVX2 and FMA a generation later: they imply it.
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
bool runs_always() { return true; }
}  // namespace

const InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {&avx512_bf16::kKernels, runs_avx512_bf16},
    {&avx512::kKernels, runs_avx512},
    {&avx2::kKernels, runs_avx2},
#endif
    {&baseline::kKernels, runs_always},
};
const int kInstructionSetCount = sizeof(kInstructionSets) / sizeof(InstructionSet);

}  // namespace mnet::cpu
