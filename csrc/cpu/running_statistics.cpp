// BatchNorm's running statistics after a batch, in place: one call where plain PyTorch takes four.
#include <torch/csrc/stable/library.h>

#include "../tensor.h"

namespace mnet::cpu {
namespace {

template <typename Real>
void update(Tensor& running, const Tensor& batch, double momentum, double correction) {
  auto* to = static_cast<Real*>(running.mutable_data_ptr());
  const auto* from = static_cast<const Real*>(batch.const_data_ptr());
  const int64_t to_stride = running.stride(0), from_stride = batch.stride(0);
  for (int64_t k = 0; k < running.size(0); ++k) {
    Real& value = to[k * to_stride];
    value =
        static_cast<Real>((1 - momentum) * value + momentum * (correction * from[k * from_stride]));
  }
}

}  // namespace

// var is biased, running_var is not; count: values a channel.
void update_running_statistics(Tensor running_mean, Tensor running_var, Tensor mean, Tensor var,
                               double momentum, int64_t count) {
  constexpr const char* kOp = "update_running_statistics";
  const TensorFacts facts = facts_of(mean);
  if (facts.dim != 1) check::fail(kOp, "mean", "shape (C_out,)", check::shape(facts));
  if (facts.dtype != DType::float32 && facts.dtype != DType::float64)
    check::fail(kOp, "mean", "float32 or float64", facts.dtype_name);
  auto alike = [&](const char* name, const Tensor& t) {
    const TensorFacts own = facts_of(t);
    if (own.dim != 1 || own.sizes[0] != facts.sizes[0])
      check::fail(kOp, name, "mean's " + check::shape(facts), check::shape(own));
    if (own.dtype != facts.dtype)
      check::fail(kOp, name, check::join("mean's dtype ", facts.dtype_name), own.dtype_name);
    if (!own.same_device(facts)) check::fail(kOp, name, "the CPU", check::device(own));
  };
  alike("running_mean", running_mean), alike("running_var", running_var), alike("var", var);
  if (count < 2) check::fail(kOp, "count", "at least 2", check::join(count));
  const double unbiased = static_cast<double>(count) / static_cast<double>(count - 1);
  const auto run = facts.dtype == DType::float64 ? update<double> : update<float>;
  run(running_mean, mean, momentum, 1.0);
  run(running_var, var, momentum, unbiased);
}

}  // namespace mnet::cpu

STABLE_TORCH_LIBRARY_IMPL(mnet_kernels, CPU, m) {
  m.impl("update_running_statistics", TORCH_BOX(&mnet::cpu::update_running_statistics));
}
