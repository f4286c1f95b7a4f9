// What operators that normalise by the batch's own statistics share: sums over blocks of pixels,
// added in the blocks' order, whatever the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../tensor.h"

namespace mnet::cpu {

// One value a channel, of the accumulation type.
inline Tensor empty_channels(const Problem& p, int64_t count) {
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      1, &count, &stride,
      p.dtype == DType::float64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <typename Acc>
Acc* values(Tensor& t) {
  return static_cast<Acc*>(t.mutable_data_ptr());
}

// The sums, [value][K], over blocks (at least one) whose partials are [value].
template <typename Acc>
std::vector<double> added_up(const Acc* partials, int64_t blocks, int64_t values) {
  std::vector<double> total(partials, partials + values);
  partials += values;
  for (int64_t block = 1; block < blocks; ++block)
    for (double& sum : total) sum += *partials++;
  return total;
}

// Of sums in two numbers, [value][2][K], one.
inline std::vector<double> joined(const std::vector<double>& pairs, std::size_t K) {
  std::vector<double> sums(pairs.size() / 2);
  for (std::size_t value = 0; value < sums.size(); value += K)
    for (std::size_t k = 0; k < K; ++k)
      sums[value + k] = pairs[2 * value + k] + pairs[2 * value + K + k];
  return sums;
}

struct Statistics {
  std::vector<double> mean, var;  // biased
};

// The batch's: those of the blocks, merged (Chan, Golub, LeVeque 1983). A block's partials are a
// pivot and the sums of (value - pivot) and of its square, each in two numbers, each [K], over
// pixels_of(block) values.
template <typename Acc, typename Pixels>
Statistics merged(const Acc* pivot, int64_t blocks, std::size_t K, const Pixels& pixels_of) {
  Statistics s{std::vector<double>(K), std::vector<double>(K)};
  double before = 0;
  for (int64_t block = 0; block < blocks; ++block, pivot += 5 * K) {
    const Acc *sum = pivot + K, *squares = sum + 2 * K;
    const auto count = static_cast<double>(pixels_of(block));
    const double after = before + count, share = count / after, weight = before * share;
    const double each = 1 / count;
    for (std::size_t k = 0; k < K; ++k) {
      const double first = static_cast<double>(sum[k]) + sum[K + k], offset = first * each;
      const double away = pivot[k] + offset - s.mean[k];
      s.mean[k] += away * share;
      s.var[k] += squares[k] + (squares[K + k] - first * offset) + away * away * weight;
    }
    before = after;
  }
  for (double& sum : s.var) sum = std::max(sum, 0.0) / before;
  return s;
}

// The vectors of a backward pass through the statistics, for z = scale * centred + shift: the
// gradient of what was normalised is scale * dz + linear * centred + constant.
template <typename Acc>
struct NormBackward {
  std::vector<Acc> scale, linear, constant;
  std::vector<double> inverse;  // 1 / the standard deviation

  // var: of the batch, or none for frozen statistics, where gamma is the scale.
  NormBackward(const Acc* gamma, const Acc* var, double eps, std::size_t K)
      : scale(gamma, gamma + K), linear(K), constant(K), inverse(K, 1.0) {
    for (std::size_t k = 0; var != nullptr && k < K; ++k) {
      inverse[k] = 1 / std::sqrt(static_cast<double>(var[k]) + eps);
      scale[k] = static_cast<Acc>(gamma[k] * inverse[k]);
    }
  }

  // From the sums of dz * centred and of dz, (2, K), over `count` values.
  void add_statistics(const Acc* gamma, const std::vector<double>& sums, double count) {
    const std::size_t K = scale.size();
    for (std::size_t k = 0; k < K; ++k) {
      const double factor = gamma[k] * inverse[k] / count;
      linear[k] = static_cast<Acc>(-factor * inverse[k] * inverse[k] * sums[k]);
      constant[k] = static_cast<Acc>(-factor * sums[K + k]);
    }
  }

  // The gradients of gamma and beta.
  void write_sums(const std::vector<double>& sums, Tensor& dgamma, Tensor& dbeta) const {
    const std::size_t K = scale.size();
    Acc *along = values<Acc>(dgamma), *all = values<Acc>(dbeta);
    for (std::size_t k = 0; k < K; ++k) {
      along[k] = static_cast<Acc>(sums[k] * inverse[k]);
      all[k] = static_cast<Acc>(sums[K + k]);
    }
  }
};

}  // namespace mnet::cpu
