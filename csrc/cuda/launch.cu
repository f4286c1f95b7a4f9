#include "launch.h"

#include <cuda_runtime.h>

#include <stdexcept>

namespace mnet::cuda {
namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is told here, not at somebody else's next call
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// A block may have more shared memory than every GPU grants unasked.
void allow_shared_memory(const void* kernel, const Geometry& geometry) {
  constexpr int kGranted = 48 << 10;
  if (geometry.shared_bytes > kGranted)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               geometry.shared_bytes));
}

KernelFacts look(const void* kernel, const Geometry& geometry) {
  KernelFacts facts;
  facts.blocks = geometry.blocks;
  facts.threads = geometry.threads;
  facts.shared_bytes = geometry.shared_bytes;
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    cudaGetLastError();
    return facts;
  }
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel));
  facts.registers = attributes.numRegs;
  facts.local_bytes = static_cast<int>(attributes.localSizeBytes);
  allow_shared_memory(kernel, geometry);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &facts.blocks_per_sm, kernel, geometry.threads,
      static_cast<std::size_t>(geometry.shared_bytes)));
  return facts;
}

}  // namespace

DeviceLimits limits_of(int device) {
  DeviceLimits limits;
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    cudaGetLastError();
    return limits;
  }
  check(cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  check(cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                               device));
  return limits;
}

void Launcher::start(const void* kernel, const Geometry& geometry, void** arguments) const {
  if (facts_ != nullptr) {
    *facts_ = look(kernel, geometry);
    return;
  }
  if (geometry.blocks > INT32_MAX)
    throw std::runtime_error("CUDA: a grid has at most 2^31 - 1 blocks, this call needs " +
                             std::to_string(geometry.blocks));
  allow_shared_memory(kernel, geometry);
  check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(geometry.blocks)),
                         dim3(static_cast<unsigned>(geometry.threads)), arguments,
                         static_cast<std::size_t>(geometry.shared_bytes),
                         static_cast<cudaStream_t>(stream_)));
}

}  // namespace mnet::cuda
