// What every processor of the architecture has: SSE2 on x86-64, NEON on Arm, else whatever the
// compiler makes of 16-byte vectors.
#include <cstdint>

#include "kernels.h"

#define MNET_ISA baseline
#define MNET_VECTOR_BYTES 16
#if defined(__aarch64__)
#define MNET_REGISTERS 32
#else
#define MNET_REGISTERS 16
#endif
#include "instruction_set.inc"
