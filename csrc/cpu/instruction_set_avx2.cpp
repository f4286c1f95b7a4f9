// AVX2 with FMA and F16C, x86-64 only.
#if defined(__x86_64__)
#include <cstdint>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

#define MNET_ISA avx2
#define MNET_AVX2
#define MNET_VECTOR_BYTES 32
#define MNET_REGISTERS 16
#include "instruction_set.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
