// The machine that device code runs on: a GPU under nvcc, or its emulation by the host compiler
// (tests/emulation), which gives the same words (__global__, threadIdx, __syncthreads, ...) their
// meaning. Device code includes no torch header; that is what lets it run in both.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "emulation.h"
#endif

namespace mnet::cuda {

// How a kernel is started. A launcher, CUDA's or the emulated one, is called as
// launcher(kernel, geometry, arguments...).
struct Geometry {
  int64_t blocks;    // a one-dimensional grid
  int threads;       // of a block, likewise
  int shared_bytes;  // of a block, behind shared_memory()
  bool cooperates;   // threads meet: barriers or shuffles (the emulation then runs real threads)
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The block's shared memory, aligned to 16 bytes. Kernels have no other: its size is the host's
// choice, and the emulation knows its exact end.
__device__ __forceinline__ unsigned char* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char mnet_shared_memory[];
  return mnet_shared_memory;
#else
  return emulation::shared_memory();
#endif
}

}  // namespace mnet::cuda
