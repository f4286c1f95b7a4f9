// Matrix instructions of a warp, and copies to shared memory that run beside it: inline PTX under
// nvcc, PTX's own definitions in emulation (tests/emulation/mma.h). All 32 lanes take part.
#pragma once

#include "memory.cuh"

#ifndef __CUDACC__
#include "mma.h"
#endif

namespace mnet::cuda {

#ifdef __CUDACC__
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// Starts a copy of 16 bytes of global memory to shared memory, or of zeros where `valid` is false;
// `from` is an address of global memory even then.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid,
                                           int line = __builtin_LINE()) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  emulation::copy_async(to, from, valid, line);
#endif
}

// What was started since the last call becomes a group.
__device__ __forceinline__ void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulation::commit_copies();
#endif
}

// Waits for all of this thread's groups but the last `Pending`.
template <int Pending>
__device__ __forceinline__ void wait_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#else
  emulation::wait_copies(Pending);
#endif
}

// Four matrices of 8 rows of 16 bytes in shared memory. Lane l says where row l % 8 of matrix l / 8
// is; it gets 4 bytes of each matrix: of row l / 4, the (l % 4)-th.
__device__ __forceinline__ void load_matrices(const void* row, uint32_t (&words)[4],
                                              int line = __builtin_LINE()) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
#else
  emulation::load_matrices(row, words, line);
#endif
}

// What tensors hold as float32 and matrix instructions multiply with 10 bits of mantissa.
struct tf32 {
  float value;
};

// How a kernel for such elements sees them in memory.
template <typename Element>
using Stored = std::conditional_t<std::is_same_v<Element, tf32>, float, Element>;

// To the nearest TF32 number, of two the one that is farther from zero.
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t word) {
#ifdef __CUDACC__
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(__uint_as_float(word)));
  return word;
#else
  return emulation::round_to_tf32(word);
#endif
}

// load_matrices, and what multiply_add asks of its operands.
template <typename Element>
__device__ __forceinline__ void load_operands(const void* row, uint32_t (&words)[4],
                                              int line = __builtin_LINE()) {
  load_matrices(row, words, line);
  if constexpr (std::is_same_v<Element, tf32>) {
#pragma unroll
    for (uint32_t& word : words) word = round_to_tf32(word);
  }
}

// sum (16 x 8, float32) += a (16 x 16, by rows) * b (16 x 8, by columns). Lane l = 4 g + t holds
//   sum  (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
//   a    (g, 2t..), (g + 8, 2t..), (g, 8 + 2t..), (g + 8, 8 + 2t..), two elements each
//   b    (2t.., g), (8 + 2t.., g), likewise
// For tf32, rounded before, of half the depth: one element in a word, t for 2t and 4 for 8.
template <typename Element>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, int line = __builtin_LINE()) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<Element, tf32>)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else if constexpr (std::is_same_v<Element, bfloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  if constexpr (std::is_same_v<Element, tf32>)
    emulation::multiply_add<1>(
        sum, a, b0, b1, [](uint32_t word, int) { return emulation::float_of_tf32(word); }, line);
  else
    emulation::multiply_add<2>(
        sum, a, b0, b1,
        [](uint32_t two, int which) {
          return which == 0 ? widen_low<Element>(two) : widen_high<Element>(two);
        },
        line);
#endif
}

}  // namespace mnet::cuda
