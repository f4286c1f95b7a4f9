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

// sum (16 x 8, float32) += a (16 x 16, by rows) * b (16 x 8, by columns). Lane l = 4 g + t holds
//   sum  (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
//   a    (g, 2t..), (g + 8, 2t..), (g, 8 + 2t..), (g + 8, 8 + 2t..), two elements each
//   b    (2t.., g), (8 + 2t.., g), likewise
template <typename Element>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, int line = __builtin_LINE()) {
  static_assert(sizeof(Element) == 2);
#ifdef __CUDACC__
  if constexpr (std::is_same_v<Element, bfloat16>)
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
  const auto widened = [](uint32_t two, int which) {
    return which == 0 ? widen_low<Element>(two) : widen_high<Element>(two);
  };
  emulation::multiply_add(sum, a, b0, b1, widened, line);
#endif
}

}  // namespace mnet::cuda
