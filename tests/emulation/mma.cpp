// The building blocks of csrc/cuda/mma.cuh alone: a product of 16 x 16 by 16 x 8 elements (of tf32
// half as deep), copied to shared memory asynchronously; and the faults that the emulation must
// find in their use.
#include "../../csrc/cuda/mma.cuh"

#include "request.h"

namespace mnet::cuda {
namespace {

enum class Fault { none, missing_wait, missing_commit, missing_barrier, half_warp, not_rounded };

// y (16, 8) = a (16, 16) by rows * b (8, 16) by columns, for each of the block's two warps; the
// last `rows` of b are left out.
template <typename Element, Fault fault>
__global__ void product(const Stored<Element>* a, const Stored<Element>* b, float* y, int rows) {
  constexpr int V = 16 / sizeof(Element);
  unsigned char* shared = shared_memory();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  // 24 rows of 32 bytes, two copies each, by the first warp and by half of the second.
  if (thread < 48) {
    const bool exists = thread < 2 * (24 - rows);
    copy_async(shared + thread * 16, thread < 32 ? a + thread * V : b + (thread - 32) * V, exists);
  }
  if (fault != Fault::missing_commit) commit_copies();
  if (fault != Fault::missing_wait) wait_copies<0>();
  if (fault != Fault::missing_barrier) __syncthreads();
  if (fault == Fault::half_warp && lane >= 16) return;
  uint32_t of_a[4], of_b[4];
  const auto* row_of_a = shared + lane % 16 * 32 + lane / 16 * 16;
  if constexpr (fault == Fault::not_rounded)
    load_matrices(row_of_a, of_a);
  else
    load_operands<Element>(row_of_a, of_a);
  load_operands<Element>(shared + 512 + lane % 8 * 32 + lane / 8 % 2 * 16, of_b);
  float sum[4] = {};
  multiply_add<Element>(sum, of_a, of_b[0], of_b[1]);
  for (int i = 0; i < 4; ++i) {
    const float value[1] = {sum[i]};
    store(y + thread / 32 * 128 + (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2,
          narrow<float>(value));
  }
}

template <typename Element, Fault fault = Fault::none>
void launch(const emulation::Request& r) {
  r.launcher(product<Element, fault>, Geometry{1, 64, 24 * 32, /*cooperates=*/true},
             r.buffer<const Stored<Element>>("a"), r.buffer<const Stored<Element>>("b"),
             r.buffer<float>("y"), static_cast<int>(r.integer("rows")));
}

std::string run(const emulation::Request& r) {
  if (r.variant == "bfloat16") launch<bfloat16>(r);
  if (r.variant == "float16") launch<float16>(r);
  if (r.variant == "tf32") launch<tf32>(r);
  if (r.variant == "not_rounded") launch<tf32, Fault::not_rounded>(r);
  if (r.variant == "missing_wait") launch<bfloat16, Fault::missing_wait>(r);
  if (r.variant == "missing_commit") launch<bfloat16, Fault::missing_commit>(r);
  if (r.variant == "missing_barrier") launch<bfloat16, Fault::missing_barrier>(r);
  if (r.variant == "half_warp") launch<bfloat16, Fault::half_warp>(r);
  return "";
}

const emulation::Registration run_("product", run);

}  // namespace
}  // namespace mnet::cuda
