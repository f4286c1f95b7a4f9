// AVX-512 (F, BW, DQ, VL) with its bfloat16 conversions, x86-64 only.
#if defined(__x86_64__)
#include <cstdint>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#include <immintrin.h>

#define MNET_ISA avx512_bf16
#define MNET_AVX512
#define MNET_AVX512_BF16
#define MNET_VECTOR_BYTES 64
#define MNET_REGISTERS 32
#include "instruction_set.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
