// dwconv_bn_act_training and its backward on a GPU: check the call, make its memory dense, allocate
// the results and the room for what lies between the steps, start the kernels on the current stream
// of x's device.
#include <tuple>

#include "dwconv_backward_launch.h"
#include "dwconv_launch.h"
#include "dwconv_training.cuh"
#include "dwconv_training_launch.h"
#include "dwconv_variants.cuh"
#include "facts.h"
#include "operators.h"

namespace mnet::cuda {
namespace {

constexpr const char* kForward = "dwconv_bn_act_training";
constexpr const char* kBackward = "dwconv_bn_act_training_backward";

// The arguments that are not tensors.
struct Constants {
  std::vector<int64_t> stride, padding, dilation;
  std::string activation;
  double slope, eps;
};

Problem checked(const char* op, const TensorFacts& x, const Tensor& weight,
                const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta,
                const Constants& constants) {
  const Problem p = checked_problem(op, x, facts_of(weight), {}, {},
                                    {constants.stride, constants.padding, constants.dilation,
                                     constants.activation, constants.slope});
  check_dtype(op, p);
  check::affine(op, "gamma", facts_of(gamma), p, x);
  check::affine(op, "beta", facts_of(beta), p, x);
  check::batch_statistics(op, p, constants.eps);
  return p;
}

TrainingChoice choice_for(const DwconvTrainingCall& call) {
  return choose(call, forced_backward());
}

// The kernels of the call's dtype; see training_forward.
struct Steps {
  Launcher launcher;
  DType dtype;

  void pass(std::string_view variant, const DwconvTrainingCall& call) const {
    switch (dtype) {
      case DType::float16: return launch_training_float16(launcher, variant, call);
      case DType::bfloat16: return launch_training_bfloat16(launcher, variant, call);
      default: return launch_training_float32(launcher, variant, call);
    }
  }
  void channels(ChannelStep step, const DwconvTrainingCall& call) const {
    launch_training_channels(launcher, step, call);
  }
  void backward(const BackwardChoice& choice, const DwconvBackwardCall& call) const {
    const RunForward run_forward = [&](const DwconvCall& transposed) { forward(transposed); };
    switch (dtype) {
      case DType::float16: return launch_backward_float16(launcher, choice, call, run_forward);
      case DType::bfloat16: return launch_backward_bfloat16(launcher, choice, call, run_forward);
      default: return launch_backward_float32(launcher, choice, call, run_forward);
    }
  }
  void forward(const DwconvCall& call) const {
    const char* variant = choose(call);
    switch (dtype) {
      case DType::float16: return launch_float16(launcher, variant, call);
      case DType::bfloat16: return launch_bfloat16(launcher, variant, call);
      default: return launch_float32(launcher, variant, call);
    }
  }
};

// Starts one of training_forward and training_backward; a failure names operator and kernels.
template <typename Start>
void start(const char* op, const TrainingChoice& choice, Start&& start_all) {
  try {
    start_all();
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(check::join(op, ": ", error.what(), " (kernels ", choice.sums, ", ",
                                         choice.backward.first, ", ", choice.backward.data, ")"));
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> dwconv_bn_act_training(
    Tensor x, Tensor weight, std::optional<Tensor> gamma, std::optional<Tensor> beta,
    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
    std::string activation, double slope, double eps) {
  const TensorFacts facts = facts_of(x);
  const Problem p = checked(kForward, facts, weight, gamma, beta,
                            {std::move(stride), std::move(padding), std::move(dilation),
                             std::move(activation), slope, eps});
  const torch::stable::accelerator::DeviceGuard guard(facts.device_index);
  const Layout layout = layout_of(x);
  const Tensor input = mnet::dense(x, layout), taps = mnet::dense(weight, Layout::contiguous);
  const std::optional<Tensor> gammas = dense(gamma), betas = dense(beta);
  Tensor y = empty_4d(x, p.N, p.K, p.OH, p.OW, layout);
  Tensor mean = empty_floats(x, p.K), var = empty_floats(x, p.K);

  DwconvTrainingCall call{};
  call.eps = static_cast<float>(eps);
  call.gamma = values(gammas), call.beta = values(betas);
  call.mean = floats(mean), call.var = floats(var);
  call.backward.pass = BackwardPass::statistics;
  DwconvCall& forward = call.backward.forward;
  forward = call_of(p, layout == Layout::channels_last);
  forward.x = input.const_data_ptr();
  forward.weight = taps.const_data_ptr();
  forward.y = y.mutable_data_ptr();
  const TrainingChoice choice = choice_for(call);
  // Freed in the stream's order.
  Tensor affine = empty_floats(x, 2 * p.K);
  Tensor moments = empty_floats(x, kMomentRows * chunks_of_sums(call, choice) * p.K);
  call.scale = floats(affine), call.shift = call.scale + p.K;
  call.moments = floats(moments);
  forward.scale = call.scale, forward.shift = call.shift;
  const Steps steps{Launcher::on(current_stream(facts.device_index)), p.dtype};
  start(kForward, choice, [&] { training_forward(steps, choice, call); });
  return {y, empty_strided(x, {0}, {1}), mean, var};  // the convolution is not kept
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dwconv_bn_act_training_backward(
    Tensor dy, Tensor x, Tensor /*z*/, Tensor weight, std::optional<Tensor> gamma,
    std::optional<Tensor> beta, Tensor mean, Tensor var, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation, std::string activation,
    double slope, double eps, bool data, bool sums) {
  const TensorFacts facts = facts_of(x);
  const Problem p = checked(kBackward, facts, weight, gamma, beta,
                            {std::move(stride), std::move(padding), std::move(dilation),
                             std::move(activation), slope, eps});
  check::gradient(kBackward, facts_of(dy), p, facts);
  check::affine(kBackward, "mean", facts_of(mean), p, facts);
  check::affine(kBackward, "var", facts_of(var), p, facts);
  const torch::stable::accelerator::DeviceGuard guard(facts.device_index);
  const Layout layout = layout_of(x);
  const Tensor input = mnet::dense(x, layout), gradient = mnet::dense(dy, layout);
  const Tensor taps = mnet::dense(weight, Layout::contiguous);
  const std::optional<Tensor> gammas = dense(gamma), betas = dense(beta);
  Tensor means = dense_1d(mean), vars = dense_1d(var);

  Tensor dx = data ? empty_4d(x, p.N, p.C, p.H, p.W, layout) : empty_strided(x, {0}, {1});
  Tensor dweight =
      sums ? empty_4d(x, p.K, 1, p.KH, p.KW, Layout::contiguous) : empty_strided(x, {0}, {1});
  Tensor dgamma = empty_floats(x, sums ? p.K : 0), dbeta = empty_floats(x, sums ? p.K : 0);
  Tensor channels = empty_floats(x, 3 * p.K);  // freed in the stream's order, as all below

  DwconvTrainingCall call{};
  call.eps = static_cast<float>(eps);
  call.gamma = values(gammas), call.beta = values(betas);
  call.mean = floats(means), call.var = floats(vars);
  call.scale = floats(channels);
  call.by_conv = call.scale + p.K, call.constant = call.by_conv + p.K;
  DwconvBackwardCall& backward = call.backward;
  backward.pass = BackwardPass::reduction;
  backward.forward = call_of(p, layout == Layout::channels_last);
  backward.forward.x = input.const_data_ptr();
  backward.forward.weight = taps.const_data_ptr();
  backward.forward.scale = call.scale, backward.forward.shift = call.beta;
  backward.dy = gradient.const_data_ptr();
  backward.mean = call.mean, backward.by_conv = call.by_conv, backward.constant = call.constant;
  if (data) backward.dx = dx.mutable_data_ptr();
  if (sums) {
    backward.dweight = dweight.mutable_data_ptr();
    call.dgamma = floats(dgamma), call.dbeta = floats(dbeta);
  }
  const TrainingChoice choice = choice_for(call);
  std::optional<Tensor> dconv, flipped;
  if (choice.backward.needs_dconv(data)) {
    dconv = empty_4d(x, p.N, p.K, p.OH, p.OW, layout);
    backward.dconv = dconv->mutable_data_ptr();
  }
  if (data && choice.backward.needs_flipped()) {
    flipped = empty_4d(x, p.K, 1, p.KH, p.KW, Layout::contiguous);
    backward.flipped = flipped->mutable_data_ptr();
  }
  Tensor partials = empty_floats(x, floats_of_partials(call, choice));
  backward.partials = floats(partials);
  const Steps steps{Launcher::on(current_stream(facts.device_index)), p.dtype};
  start(kBackward, choice, [&] { training_backward(steps, choice, call); });
  return {dx, dweight, dgamma, dbeta};
}

}  // namespace mnet::cuda

STABLE_TORCH_LIBRARY_IMPL(mnet_kernels, CUDA, m) {
  m.impl("dwconv_bn_act_training", TORCH_BOX(&mnet::cuda::dwconv_bn_act_training));
  m.impl("dwconv_bn_act_training_backward",
         TORCH_BOX(&mnet::cuda::dwconv_bn_act_training_backward));
}
