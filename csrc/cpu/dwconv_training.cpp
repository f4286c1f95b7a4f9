// dwconv_bn_act_training and the gradients of both depthwise operators on the CPU: cut the call
// into blocks of pixels, hand these to the kernels, add up what comes back in the blocks' order.
// Blocks depend on the shapes alone: so does every sum, whatever the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../tensor.h"
#include "active.h"
#include "batch_statistics.h"
#include "constants.h"
#include "dwconv_bn_act.h"
#include "kernels.h"
#include "launch.h"
#include "memory.h"

namespace mnet::cpu {
namespace {

using Optional = std::optional<Tensor>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Kernel = void (*)(const DwconvTrainingCall&, int64_t, int64_t, void*);

DwconvTrainingCall training_call(const Problem& p, Layout layout) {
  DwconvTrainingCall call{dwconv_call(p)};
  call.channels_last = layout == Layout::channels_last;
  return call;
}

bool goes_by_rows(const DwconvTrainingCall& call) {
  return dwconv_training_is_fast(call, narrowed_kernels(call.K).width);
}

// A call whose tensors are dense and whose constants are set, and the instruction set for it.
template <typename Acc>
struct Training {
  const Problem& p;
  DwconvTrainingCall call{};
  bool fast;
  const TrainingKernels& kernels;
  std::vector<Acc> weight_memory;

  Training(const Problem& problem, const Tensor& x, const Tensor& weight, Layout layout)
      : p(problem),
        call{training_call(p, layout)},
        fast(goes_by_rows(call)),
        kernels(*(fast ? narrowed_kernels(p.K) : active_kernels()).training) {
    call.x = x.const_data_ptr();
    call.weight = by_tap<Acc>(p, weight, false, weight_memory);
  }

  int64_t blocks() const { return (p.N + call.images - 1) / call.images * call.bands; }

  int64_t pixels_of(int64_t block) const {
    const int64_t band = block % call.bands, image = block / call.bands * call.images;
    const int64_t rows = p.OH * (band + 1) / call.bands - p.OH * band / call.bands;
    return std::min(call.images, p.N - image) * rows * p.OW;
  }

  // Blocks of about 1024 pixels keep sums in float short; those of gradients are whole images where
  // there are enough, since a band computes its neighbours' rows too.
  const Acc* run(Kernel kernel, int64_t values, bool gradients) {
    constexpr int64_t kPixels = 1024, kBlocks = 8, kRows = 8;
    const int64_t pixels = p.OH * p.OW, threads = torch::stable::get_num_threads();
    call.images = std::clamp<int64_t>(kPixels / pixels, 1, p.N);
    const int64_t groups = (p.N + call.images - 1) / call.images;
    call.images = (p.N + groups - 1) / groups;  // as many in each
    call.bands = 1;
    if (fast && pixels > kPixels)
      call.bands = gradients ? std::clamp<int64_t>(p.H / kRows, 1, (kBlocks + p.N - 1) / p.N)
                             : std::min(p.OH, (pixels + kPixels - 1) / kPixels);
    call.channel_chunk = 1, call.channel_chunks = p.C;
    if (fast) {  // cut where there are few blocks for the threads, or scratch leaves the caches
      constexpr int64_t kCache = 512 << 10;
      const int64_t unit = 2 * kernels.width;
      call.channel_chunk = p.K, call.channel_chunks = 1;
      const int64_t fitting = (kernels.dwconv_training_scratch(call) + kCache - 1) / kCache;
      const int64_t sharing = threads == 1 ? 1 : (2 * threads + blocks() - 1) / blocks();
      const int64_t chunks = std::min(std::max(fitting, sharing), std::max<int64_t>(p.K / unit, 1));
      call.channel_chunk = std::max<int64_t>(p.K / chunks / unit, 1) * unit;
      call.channel_chunks = std::max<int64_t>(p.K / call.channel_chunk, 1);
    }
    auto* partials = static_cast<Acc*>(scratch_bytes<Scratch::partials>(
        static_cast<std::size_t>(blocks() * values * p.K) * sizeof(Acc)));
    call.partials = partials;
    const auto bytes = static_cast<std::size_t>(kernels.dwconv_training_scratch(call));
    share(blocks() * call.channel_chunks, threads, [&](int64_t begin, int64_t end) {
      kernel(call, begin, end, scratch_bytes<Scratch::kernel>(bytes));
    });
    return partials;
  }

  // [value][K], added over blocks.
  std::vector<double> sums(Kernel kernel, int64_t values, bool gradients) {
    const Acc* partials = run(kernel, values, gradients);
    return added_up(partials, blocks(), values * p.K);
  }
};

template <typename Acc>
void write_dweight(const Problem& p, const std::vector<double>& sums, void* to) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  const int64_t taps = p.KH * p.KW;
  auto write = [&](auto* out) {
    const double* sum = sums.data();
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t k = 0; k < p.K; ++k)
        out[k * taps + t] = static_cast<std::decay_t<decltype(*out)>>(static_cast<Acc>(*sum++));
  };
  switch (p.dtype) {
    case DType::bfloat16: return write(static_cast<BFloat16*>(to));
    case DType::float16: return write(static_cast<Half*>(to));
    default: return write(static_cast<Acc*>(to));
  }
}

// x's layout.
Layout layout_for(const Tensor& x) {
  return is_one_pixel(x) && is_channels_last(x) ? Layout::channels_last : layout_of(x);
}

// As the kernels take it: planes lie one behind the other.
Layout kernel_layout(const Problem& p, const Tensor& x) {
  const Layout layout = layout_for(x);
  return goes_by_rows(training_call(p, layout)) ? layout : Layout::contiguous;
}

// For a result in the kernels' layout: `result` itself where that is its own.
Tensor in_layout(const Problem& p, const Tensor& result, Layout layout) {
  const bool same =
      layout == Layout::contiguous ? result.is_contiguous() : is_channels_last(result);
  return same ? result
              : empty_result(result, p.N, result.size(1), result.size(2), result.size(3), layout);
}
void copy_to(Tensor& result, const Tensor& from) {
  if (result.get() != from.get())
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(result.get(), from.get(), 0));
}

// Whether backward reads the convolution instead of computing it again: where it is small beside x.
// mnet_kernels/dwconv_training.py says the same for fake tensors.
bool keeps_convolution(const Problem& p) {
  return p.dtype == DType::float32 && p.SH * p.SW >= 4 && p.H * p.W > 1;
}

// What both gradients have in common. z: the convolution, or none. mean and var: of the batch, or
// none for frozen statistics.
struct Backward {
  const Tensor &dy, &x, &weight;
  const Optional& z;
  const Optional &scale, &shift, &mean, &var;
  double eps;
  bool data, sums;
};

template <typename Acc>
void backward(const Problem& p, const Backward& in, Tensor& dx, Tensor& dweight, Tensor& dscale,
              Tensor& dshift) {
  const Layout layout = kernel_layout(p, in.x);
  const Tensor x = dense(in.x, layout), dy = dense(in.dy, layout);
  const Optional z = in.z ? Optional(dense(*in.z, layout)) : Optional();
  Training<Acc> training(p, x, in.weight, layout);
  const auto K = static_cast<std::size_t>(p.K);
  std::vector<Acc> scale_memory, shift_memory, mean_memory, var_memory;
  const Acc* gamma = per_channel<Acc>(in.scale, p.K, Acc(1), scale_memory);
  const Acc* var = per_channel<Acc>(in.var, p.K, Acc(1), var_memory);
  NormBackward<Acc> norm(gamma, in.var ? var : nullptr, in.eps, K);
  DwconvTrainingCall& call = training.call;
  call.dy = dy.const_data_ptr();
  if (z) call.z = const_cast<void*>(z->const_data_ptr());
  call.scale = norm.scale.data();
  call.shift = per_channel<Acc>(in.shift, p.K, Acc(0), shift_memory);
  call.mean = per_channel<Acc>(in.mean, p.K, Acc(0), mean_memory);
  call.linear = norm.linear.data();
  call.constant = norm.constant.data();

  if (in.sums || in.var) {
    const auto sums = joined(training.sums(training.kernels.dwconv_gradient_sums, 4, false), K);
    if (in.sums) norm.write_sums(sums, dscale, dshift);
    if (in.var) norm.add_statistics(gamma, sums, static_cast<double>(p.N * p.OH * p.OW));
  }
  Tensor data = in.data ? in_layout(p, dx, layout) : dx;
  if (in.data) call.dx = data.mutable_data_ptr();
  call.stream = in.data && p.dtype == DType::float32 && may_stream(call.dx, p, sizeof(float));
  const auto sums = training.sums(training.kernels.dwconv_gradients, p.KH * p.KW, true);
  if (in.sums) write_dweight<Acc>(p, sums, dweight.mutable_data_ptr());
  if (in.data) copy_to(dx, data);
}

FourTensors gradients(const Problem& p, const Backward& in) {
  const Layout layout = layout_of(in.x);
  Tensor dx =
      in.data ? empty_result(in.x, p.N, p.C, p.H, p.W, layout) : empty_strided(in.x, {0}, {1});
  Tensor dweight = in.sums ? empty_4d(in.x, p.K, 1, p.KH, p.KW, Layout::contiguous)
                           : empty_strided(in.x, {0}, {1});
  Tensor dscale = empty_channels(p, in.sums ? p.K : 0);
  Tensor dshift = empty_channels(p, in.sums ? p.K : 0);
  if (p.N == 0) {
    for (Tensor* t : {&dweight, &dscale, &dshift})
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(t->get()));
  } else if (p.dtype == DType::float64) {
    backward<double>(p, in, dx, dweight, dscale, dshift);
  } else {
    backward<float>(p, in, dx, dweight, dscale, dshift);
  }
  return {dx, dweight, dscale, dshift};
}

// y = activate(scale * (z - mean) + shift) from the convolution that is kept.
Tensor normalised(const Problem& p, const Tensor& x, Tensor& z, Tensor& mean, const float* scale,
                  const float* shift, Layout layout) {
  const TrainingKernels& kernels = *active_kernels().training;
  const int64_t threads = torch::stable::get_num_threads();
  Tensor y = empty_result(x, p.N, p.K, p.OH, p.OW, layout);
  auto normalise = [&](auto call, auto kernel, int64_t tasks) {
    call.activation = p.activation, call.slope = p.slope;
    call.z = values<float>(z), call.y = values<float>(y);
    call.mean = values<float>(mean), call.scale = scale, call.shift = shift;
    share(tasks, threads, [&](int64_t begin, int64_t end) { kernel(call, begin, end, nullptr); });
  };
  if (layout == Layout::contiguous) {
    normalise(DwconvTrainingCall{dwconv_call(p)}, kernels.dwconv_normalise, p.N * p.K);
    return y;
  }
  ConvTrainingCall call{};
  call.P = p.N * p.OH * p.OW, call.K = p.K;
  call.block = 64;
  constexpr int64_t kFloat = sizeof(float);
  call.stream = may_stream(y.const_data_ptr(), 2 * call.P * call.K * kFloat, call.K * kFloat);
  normalise(call, kernels.conv_normalise, (call.P + call.block - 1) / call.block);
  return y;
}

// z: the convolution, written where it is kept.
template <typename Acc>
Tensor forward(const Problem& p, const Tensor& x, const Tensor& weight, const Optional& gamma,
               const Optional& beta, const Conv2dArguments& args, double eps, Tensor& z,
               Tensor& mean, Tensor& var) {
  const auto K = static_cast<std::size_t>(p.K);
  const Layout layout = kernel_layout(p, x);
  const bool keeps = keeps_convolution(p);
  Statistics exact{std::vector<double>(K), std::vector<double>(K)};
  if (p.N > 0) {
    const Tensor input = dense(x, layout);
    Training<Acc> training(p, input, weight, layout);
    Tensor kept = keeps ? in_layout(p, z, layout) : z;
    if (keeps) training.call.z = kept.mutable_data_ptr();
    const Acc* partials = training.run(training.kernels.dwconv_statistics, 5, false);
    exact = merged(partials, training.blocks(), K,
                   [&](int64_t block) { return training.pixels_of(block); });
    copy_to(z, kept);
  }
  Tensor scale = empty_channels(p, p.K), shift = empty_channels(p, p.K);
  std::vector<Acc> gamma_memory, beta_memory;
  const Acc* factor = per_channel<Acc>(gamma, p.K, Acc(1), gamma_memory);
  const Acc* offset = per_channel<Acc>(beta, p.K, Acc(0), beta_memory);
  Acc *means = values<Acc>(mean), *vars = values<Acc>(var);
  Acc *scales = values<Acc>(scale), *shifts = values<Acc>(shift);
  for (std::size_t k = 0; k < K; ++k) {
    const double slope = factor[k] / std::sqrt(exact.var[k] + eps);
    means[k] = static_cast<Acc>(exact.mean[k]);
    vars[k] = static_cast<Acc>(exact.var[k]);
    scales[k] = static_cast<Acc>(slope);
    shifts[k] = static_cast<Acc>(offset[k] - exact.mean[k] * slope);
  }
  if constexpr (std::is_same_v<Acc, float>)
    if (keeps) return normalised(p, x, z, mean, scales, offset, layout_for(x));
  return dwconv_bn_act(x, weight, scale, shift, args.stride, args.padding, args.dilation,
                       args.activation, args.slope);
}

Problem checked(const char* op, const Tensor& x, const Tensor& weight, const Optional& gamma,
                const Optional& beta, const Conv2dArguments& args, double eps) {
  const TensorFacts facts = facts_of(x);
  const Problem p = checked_problem(op, facts, facts_of(weight), {}, {}, args);
  check::affine(op, "gamma", facts_of(gamma), p, facts);
  check::affine(op, "beta", facts_of(beta), p, facts);
  check::batch_statistics(op, p, eps);
  return p;
}

}  // namespace

FourTensors dwconv_bn_act_training(Tensor x, Tensor weight, Optional gamma, Optional beta,
                                   std::vector<int64_t> stride, std::vector<int64_t> padding,
                                   std::vector<int64_t> dilation, std::string activation,
                                   double slope, double eps) {
  const Conv2dArguments args{std::move(stride), std::move(padding), std::move(dilation),
                             std::move(activation), slope};
  const Problem p = checked("dwconv_bn_act_training", x, weight, gamma, beta, args, eps);
  Tensor mean = empty_channels(p, p.K), var = empty_channels(p, p.K);
  Tensor z = keeps_convolution(p) ? empty_result(x, p.N, p.K, p.OH, p.OW, layout_for(x))
                                  : empty_strided(x, {0}, {1});
  Tensor y = p.dtype == DType::float64
                 ? forward<double>(p, x, weight, gamma, beta, args, eps, z, mean, var)
                 : forward<float>(p, x, weight, gamma, beta, args, eps, z, mean, var);
  return {y, z, mean, var};
}

FourTensors dwconv_bn_act_training_backward(Tensor dy, Tensor x, Tensor z, Tensor weight,
                                            Optional gamma, Optional beta, Tensor mean, Tensor var,
                                            std::vector<int64_t> stride,
                                            std::vector<int64_t> padding,
                                            std::vector<int64_t> dilation, std::string activation,
                                            double slope, double eps, bool data, bool sums) {
  constexpr const char* op = "dwconv_bn_act_training_backward";
  const Conv2dArguments args{std::move(stride), std::move(padding), std::move(dilation),
                             std::move(activation), slope};
  const Problem p = checked(op, x, weight, gamma, beta, args, eps);
  check::affine(op, "mean", facts_of(mean), p, facts_of(x));
  check::affine(op, "var", facts_of(var), p, facts_of(x));
  check::gradient(op, facts_of(dy), p, facts_of(x));
  const bool keeps = keeps_convolution(p);
  const TensorFacts of_z = facts_of(z);
  const char* const returned = "what dwconv_bn_act_training returned";
  if (of_z.dtype != p.dtype) check::fail(op, "z", returned, of_z.dtype_name);
  if (z.numel() != (keeps ? p.N * p.K * p.OH * p.OW : 0) || (keeps && of_z.dim != 4))
    check::fail(op, "z", returned, check::shape(of_z));
  return gradients(p, {dy, x, weight, keeps ? Optional(z) : Optional(), gamma, beta, mean, var, eps,
                       data, sums});
}

FourTensors dwconv_bn_act_backward(Tensor dy, Tensor x, Tensor weight, Optional scale,
                                   Optional shift, std::vector<int64_t> stride,
                                   std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                   std::string activation, double slope, bool data, bool sums) {
  constexpr const char* op = "dwconv_bn_act_backward";
  const Problem p = checked_problem(
      op, facts_of(x), facts_of(weight), facts_of(scale), facts_of(shift),
      {std::move(stride), std::move(padding), std::move(dilation), std::move(activation), slope});
  check::gradient(op, facts_of(dy), p, facts_of(x));
  return gradients(p, {dy, x, weight, {}, scale, shift, {}, {}, 0, data, sums});
}

}  // namespace mnet::cpu

STABLE_TORCH_LIBRARY_IMPL(mnet_kernels, CPU, m) {
  m.impl("dwconv_bn_act_training", TORCH_BOX(&mnet::cpu::dwconv_bn_act_training));
  m.impl("dwconv_bn_act_training_backward", TORCH_BOX(&mnet::cpu::dwconv_bn_act_training_backward));
  m.impl("dwconv_bn_act_backward", TORCH_BOX(&mnet::cpu::dwconv_bn_act_backward));
}
