// conv_bn_act_training on the CPU: a 1x1 convolution with the norm and activation after it, in
// training. Forward reads x, and z once more; backward reads dy and z twice and x once, and hands
// the gradient of z to both matrix products through the caches. Blocks depend on the shapes alone:
// so does every sum, whatever the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "../tensor.h"
#include "active.h"
#include "batch_statistics.h"
#include "constants.h"
#include "kernels.h"
#include "launch.h"
#include "memory.h"

namespace mnet::cpu {
namespace {

using Optional = std::optional<Tensor>;
using Kernel = void (*)(const ConvTrainingCall&, int64_t, int64_t, void*);

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Problem checked(const char* op, const Tensor& x, const Tensor& weight, const Optional& gamma,
                const Optional& beta, std::string activation, double slope, double eps) {
  const TensorFacts facts = facts_of(x);
  const Problem p = checked_problem(op, facts, facts_of(weight), {}, {},
                                    {{1}, {0}, {1}, std::move(activation), slope, 1});
  if (p.dtype != DType::float32) check::fail(op, "x", "float32", facts.dtype_name);
  if (p.KH != 1 || p.KW != 1)
    check::fail(op, "weight", check::join("a 1x1 kernel, shape (C_out, ", p.C, ", 1, 1)"),
                check::shape(facts_of(weight)));
  check::affine(op, "gamma", facts_of(gamma), p, facts);
  check::affine(op, "beta", facts_of(beta), p, facts);
  check::batch_statistics(op, p, eps);
  return p;
}

// A call on dense tensors, without its pointers.
struct Training {
  const Problem& p;
  const TrainingKernels& kernels = *active_kernels().training;
  const int64_t threads = torch::stable::get_num_threads();
  ConvTrainingCall call{};
  std::vector<float> ones, zeros;

  explicit Training(const Problem& problem) : p(problem) {
    call.P = p.N * p.H * p.W, call.C = p.C, call.K = p.K;
    call.activation = p.activation, call.slope = p.slope;
    // What a block reads and writes stays in the second-level cache; sixteen blocks share out well.
    constexpr int64_t kValues = int64_t{1} << 15, kMost = 1024, kLeast = 16, kBlocks = 16;
    const int64_t fit = std::clamp(kValues / std::max(p.C, p.K), 4 * kLeast, kMost);
    call.block = std::clamp(ceil_div(call.P, kBlocks), kLeast, fit);
    if (call.block == fit) call.block = ceil_div(call.P, ceil_div(blocks(), 4) * 4);  // even shares
    const auto filled = static_cast<std::size_t>(panels_of(std::max(p.C, p.K)) * kPanel);
    ones.assign(filled, 1.0f), zeros.assign(filled, 0.0f);
    call.ones = ones.data(), call.zeros = zeros.data();
  }

  int64_t blocks() const { return ceil_div(call.P, call.block); }
  int64_t pixels_of(int64_t block) const {
    return std::min(call.block, call.P - block * call.block);
  }

  void run(Kernel kernel, int64_t tasks) {
    const auto bytes = static_cast<std::size_t>(kernels.conv_training_scratch(call));
    share(tasks, threads, [&](int64_t begin, int64_t end) {
      kernel(call, begin, end, scratch_bytes<Scratch::kernel>(bytes));
    });
  }

  const float* run_with_partials(Kernel kernel, int64_t values) {
    call.partials = static_cast<float*>(scratch_bytes<Scratch::partials>(
        static_cast<std::size_t>(blocks() * values * p.K) * sizeof(float)));
    run(kernel, blocks());
    return call.partials;
  }

  // `memory`: of the packed weight and of as many floats more.
  float* pack(const Tensor& weight, bool transposed, int64_t more) {
    const int64_t panels = panels_of(transposed ? p.C : p.K);
    const int64_t floats = panels * kPanel * (transposed ? p.K : p.C);
    auto* packed = static_cast<float*>(
        scratch_bytes<Scratch::panels>(static_cast<std::size_t>(floats + more) * sizeof(float)));
    const auto* from = static_cast<const float*>(weight.const_data_ptr());
    share(panels, threads, [&](int64_t begin, int64_t end) {
      kernels.pack_conv_panels(from, p.K, p.C, transposed, begin, end, packed);
    });
    call.packed = packed;
    return packed + floats;
  }
};

// The weight's gradient, and dx where call.dx is set. Small weights: by slabs of pixels, whose
// gradients of the weight are added up; large ones: by chunks of pixels, whose operands of the
// weight's gradient all threads share.
void convolution_gradients(Training& training, const Tensor& weight, Tensor& dweight) {
  constexpr int64_t kSmall = int64_t{1} << 16, kChunk = int64_t{1} << 20, kLine = 16, kTasks = 16;
  ConvTrainingCall& call = training.call;
  const int64_t V = training.kernels.width, R = training.kernels.gradient_rows;
  const int64_t values = call.K * call.C, blocks = training.blocks();
  call.slabs = values > kSmall ? 1 : std::min(blocks, 4 * values > kSmall ? kTasks / 2 : kTasks);
  // Slabs write a gradient of the weight each, chunks the operands.
  if (2 * call.slabs * values > call.P * (call.C + call.K)) call.slabs = 1;
  const int64_t fit = std::max(kChunk / (call.C + call.K) / call.block, int64_t{1});
  const int64_t chunk = (call.slabs > 1 ? 1 : ceil_div(blocks, ceil_div(blocks, fit))) * call.block;
  // A line more, so that panels do not share cache sets.
  call.d_stride = chunk * R + kLine, call.x_stride = chunk * V + kLine;
  call.d_floats = ceil_div(call.K, std::max(V, R)) * std::max(V, R) / R * call.d_stride;
  call.d_floats = ceil_div(call.d_floats, kLine) * kLine;
  call.x_floats = ceil_div(call.C, V) * call.x_stride;
  call.dweight = static_cast<float*>(dweight.mutable_data_ptr());
  call.columns = ceil_div(call.C, 2 * V), call.row_tiles = ceil_div(call.K, R);
  if (call.slabs > 1) {
    float* sums = training.pack(weight, true, call.slabs * values);
    float* total = std::exchange(call.dweight, sums);
    training.run(training.kernels.conv_slab_gradients, call.slabs);
    constexpr int64_t kPart = 4096;
    share(ceil_div(values, kPart), training.threads, [&](int64_t begin, int64_t end) {
      const int64_t last = std::min(end * kPart, values);
      for (int64_t i = begin * kPart; i < last; ++i) {
        float sum = sums[i];
        for (int64_t slab = 1; slab < call.slabs; ++slab) sum += sums[slab * values + i];
        total[i] = sum;
      }
    });
    return;
  }
  call.d_panels = training.pack(weight, true, call.d_floats + call.x_floats);
  call.x_panels = call.d_panels + call.d_floats;
  const int64_t tiles = call.row_tiles;
  call.row_tiles = std::clamp(call.columns * tiles / kTasks, int64_t{1}, int64_t{8});
  for (call.chunk_first = 0; call.chunk_first < call.P; call.chunk_first += chunk) {
    call.chunk_pixels = std::min(chunk, call.P - call.chunk_first);
    training.run(training.kernels.conv_data_gradient, ceil_div(call.chunk_pixels, call.block));
    training.run(training.kernels.conv_weight_gradient,
                 call.columns * ceil_div(tiles, call.row_tiles));
  }
}

Tensor dense_weight(const Tensor& weight) { return dense(weight, Layout::contiguous); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_act_training(Tensor x, Tensor weight,
                                                                Optional gamma, Optional beta,
                                                                std::string activation,
                                                                double slope, double eps) {
  const Problem p =
      checked("conv_bn_act_training", x, weight, gamma, beta, std::move(activation), slope, eps);
  Tensor y = empty_result(x, p.N, p.K, p.H, p.W, Layout::channels_last);
  Tensor z = empty_result(x, p.N, p.K, p.H, p.W, Layout::channels_last);
  Tensor mean = empty_channels(p, p.K), var = empty_channels(p, p.K);
  const auto K = static_cast<std::size_t>(p.K);
  Statistics exact{std::vector<double>(K), std::vector<double>(K)};
  const Tensor input = dense(x, Layout::channels_last), flat = dense_weight(weight);
  Training training(p);
  ConvTrainingCall& call = training.call;
  if (p.N > 0) {
    call.x = static_cast<const float*>(input.const_data_ptr());
    call.z = values<float>(z);
    training.pack(flat, false, 0);
    const float* partials = training.run_with_partials(training.kernels.conv_statistics, 5);
    exact = merged(partials, training.blocks(), K,
                   [&](int64_t block) { return training.pixels_of(block); });
  }
  std::vector<float> gamma_memory, beta_memory, scale(K);
  const float* factor = per_channel<float>(gamma, p.K, 1.0f, gamma_memory);
  float *means = values<float>(mean), *vars = values<float>(var);
  for (std::size_t k = 0; k < K; ++k) {
    means[k] = static_cast<float>(exact.mean[k]);
    vars[k] = static_cast<float>(exact.var[k]);
    scale[k] = static_cast<float>(factor[k] / std::sqrt(exact.var[k] + eps));
  }
  if (p.N == 0) return {y, z, mean, var};
  call.scale = scale.data();
  call.shift = per_channel<float>(beta, p.K, 0.0f, beta_memory);
  call.mean = values<float>(mean);
  call.y = values<float>(y);
  call.stream = may_stream(call.y, p, sizeof(float));
  training.run(training.kernels.conv_normalise, training.blocks());
  return {y, z, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_act_training_backward(
    Tensor dy, Tensor x, Tensor z, Tensor weight, Optional gamma, Optional beta, Tensor mean,
    Tensor var, std::string activation, double slope, double eps, bool data, bool sums) {
  constexpr const char* op = "conv_bn_act_training_backward";
  const Problem p = checked(op, x, weight, gamma, beta, std::move(activation), slope, eps);
  const TensorFacts facts = facts_of(x);
  check::affine(op, "mean", facts_of(mean), p, facts);
  check::affine(op, "var", facts_of(var), p, facts);
  check::gradient(op, facts_of(dy), p, facts);
  const TensorFacts of_z = facts_of(z);
  if (of_z.dim != 4 || of_z.dtype != DType::float32 || z.numel() != p.N * p.K * p.H * p.W)
    check::fail(op, "z", "what conv_bn_act_training returned", check::shape(of_z));

  Tensor dx = data ? empty_result(x, p.N, p.C, p.H, p.W, Layout::channels_last)
                   : empty_strided(x, {0}, {1});
  // With the weight's own strides, dense ones of which differ where sizes are 1 alone.
  const auto strides = weight.strides();
  Tensor dweight =
      weight.is_contiguous()
          ? empty_strided(x, {p.K, p.C, 1, 1}, {strides[0], strides[1], strides[2], strides[3]})
          : empty_4d(x, p.K, p.C, 1, 1, Layout::contiguous);
  Tensor dgamma = empty_channels(p, p.K), dbeta = empty_channels(p, p.K);
  if (p.N == 0) {
    for (Tensor* t : {&dweight, &dgamma, &dbeta})
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(t->get()));
    return {dx, dweight, dgamma, dbeta};
  }
  const Tensor input = dense(x, Layout::channels_last), output = dense(z, Layout::channels_last);
  const Tensor gradient = dense(dy, Layout::channels_last), flat = dense_weight(weight);
  Training training(p);
  ConvTrainingCall& call = training.call;
  std::vector<float> gamma_memory, shift_memory, mean_memory, var_memory;
  const float* factor = per_channel<float>(gamma, p.K, 1.0f, gamma_memory);
  NormBackward<float> norm(factor, per_channel<float>(var, p.K, 1.0f, var_memory), eps,
                           static_cast<std::size_t>(p.K));
  call.x = static_cast<const float*>(input.const_data_ptr());
  call.z = const_cast<float*>(static_cast<const float*>(output.const_data_ptr()));
  call.dy = static_cast<const float*>(gradient.const_data_ptr());
  call.mean = per_channel<float>(mean, p.K, 0.0f, mean_memory);
  call.scale = norm.scale.data();
  call.shift = per_channel<float>(beta, p.K, 0.0f, shift_memory);
  call.linear = norm.linear.data();
  call.constant = norm.constant.data();
  const float* partials = training.run_with_partials(training.kernels.conv_gradient_sums, 4);
  const auto total =
      joined(added_up(partials, training.blocks(), 4 * p.K), static_cast<std::size_t>(p.K));
  norm.write_sums(total, dgamma, dbeta);
  norm.add_statistics(factor, total, static_cast<double>(call.P));
  if (data) call.dx = static_cast<float*>(dx.mutable_data_ptr());
  if (data || sums) convolution_gradients(training, flat, dweight);
  return {dx, dweight, dgamma, dbeta};
}

}  // namespace mnet::cpu

STABLE_TORCH_LIBRARY_IMPL(mnet_kernels, CPU, m) {
  m.impl("conv_bn_act_training", TORCH_BOX(&mnet::cpu::conv_bn_act_training));
  m.impl("conv_bn_act_training_backward", TORCH_BOX(&mnet::cpu::conv_bn_act_training_backward));
}
