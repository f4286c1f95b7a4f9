// Kernels with planted faults: proof that the emulation and its sanitizers find them. Also the
// building blocks that kernels do not all use: conversions and shuffles.
#include "../../csrc/cuda/memory.cuh"

#include "request.h"

namespace mnet::cuda {
namespace {

enum class Fault { none, missing_barrier, halo_out_of_bounds, shared_out_of_bounds, misaligned };

constexpr int kTile = 64;

// y[i] = x[i-1] + x[i] + x[i+1] by tiles in shared memory, zeros outside.
template <Fault fault>
__global__ void sum_of_three(const float* x, float* y, int count) {
  auto* tile = reinterpret_cast<float*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  const int first = static_cast<int>(blockIdx.x) * kTile;
  for (int i = thread; i < kTile + 2; i += kTile) {
    const int at = first + i - 1;
    const bool inside = at >= 0 && at < count;
    store_shared(tile + i, load<1>(x + at, fault == Fault::halo_out_of_bounds || inside));
  }
  if (fault != Fault::missing_barrier) __syncthreads();
  if (fault == Fault::misaligned) load<4>(x + thread);
  const int beyond = fault == Fault::shared_out_of_bounds ? 1 : 0;
  float sum[1] = {};
  for (int i = 0; i < 3; ++i) sum[0] += load_shared<1>(tile + thread + i + beyond).lane[0];
  if (first + thread < count) store(y + first + thread, narrow<float>(sum));
}

template <Fault fault>
void launch(const emulation::Request& r) {
  const int count = static_cast<int>(r.integer("count_of_x"));
  r.launcher(sum_of_three<fault>,
             Geometry{divide_up(count, kTile), kTile, (kTile + 2) * 4, /*cooperates=*/true},
             r.buffer<const float>("x"), r.buffer<float>("y"), count);
}

std::string sum(const emulation::Request& r) {
  if (r.variant == "correct") launch<Fault::none>(r);
  if (r.variant == "missing_barrier") launch<Fault::missing_barrier>(r);
  if (r.variant == "halo_out_of_bounds") launch<Fault::halo_out_of_bounds>(r);
  if (r.variant == "shared_out_of_bounds") launch<Fault::shared_out_of_bounds>(r);
  if (r.variant == "misaligned") launch<Fault::misaligned>(r);
  return "";
}

// y[i] = x[i] in another type.
template <typename From, typename To>
__global__ void convert_kernel(const From* x, To* y) {
  const float value[1] = {widen(load<1>(x + blockIdx.x).lane[0])};
  store(y + blockIdx.x, narrow<To>(value));
}

std::string convert(const emulation::Request& r) {
  const Geometry each{r.integer("count_of_x"), 1, 0, false};
  if (r.variant == "from_float16")
    r.launcher(convert_kernel<float16, float>, each, r.buffer<float16>("x"), r.buffer<float>("y"));
  if (r.variant == "to_float16")
    r.launcher(convert_kernel<float, float16>, each, r.buffer<float>("x"), r.buffer<float16>("y"));
  if (r.variant == "from_bfloat16")
    r.launcher(convert_kernel<bfloat16, float>, each, r.buffer<bfloat16>("x"),
               r.buffer<float>("y"));
  if (r.variant == "to_bfloat16")
    r.launcher(convert_kernel<float, bfloat16>, each, r.buffer<float>("x"),
               r.buffer<bfloat16>("y"));
  return "";
}

// y[thread] = the sum over its warp, by a butterfly.
__global__ void warp_sum_kernel(const float* x, float* y) {
  float sum = load<1>(x + threadIdx.x).lane[0];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  const float value[1] = {sum};
  store(y + threadIdx.x, narrow<float>(value));
}

std::string warp_sum(const emulation::Request& r) {
  r.launcher(warp_sum_kernel,
             Geometry{1, static_cast<int>(r.integer("count_of_x")), 0, /*cooperates=*/true},
             r.buffer<const float>("x"), r.buffer<float>("y"));
  return "";
}

// Loads of V floats from global memory at a stride of `step` vectors, and through shared memory.
__global__ void strided_kernel(const float* x, float* y, int step) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const auto thread = static_cast<int>(threadIdx.x);
  const auto value = load<1>(x + thread * step);
  store_shared(shared + thread * step, value);
  store(y + thread, value, thread % 2 == 0);
}

std::string strided(const emulation::Request& r) {
  const int step = static_cast<int>(r.integer("step"));
  r.launcher(strided_kernel, Geometry{1, 32, 32 * step * 4, false}, r.buffer<const float>("x"),
             r.buffer<float>("y"), step);
  return "";
}

const emulation::Registration sum_("sum_of_three", sum), convert_("convert", convert),
    warp_sum_("warp_sum", warp_sum), strided_("strided", strided);

}  // namespace
}  // namespace mnet::cuda
