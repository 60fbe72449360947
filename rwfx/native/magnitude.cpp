// rwfx::draw_by_norm on the CPU: the rule of rwfx/ops/magnitude.py, and its rows up to the rounding of sums.

#include "draw.h"
#include "rows.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <torch/library.h>

#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

namespace rwfx {
namespace {

using at::Tensor;

// Norms to the power, over the largest first: the power of a large one would overflow.
void norms(const Tensor& weight, double power, double* out) {
  const Tensor given = at::linalg_vector_norm(weight.flatten(1), 2, {1}).to(at::kDouble).contiguous();
  const double* norm = given.const_data_ptr<double>();
  double largest = 0;
  for (int64_t r = 0; r < given.numel(); ++r) {
    largest = norm[r] > largest || std::isnan(norm[r]) ? norm[r] : largest;
  }
  for (int64_t r = 0; r < given.numel(); ++r) {
    out[r] = std::pow(norm[r] / largest, power);
  }
}

std::vector<Tensor> draw_by_norm(
    at::TensorList weights,
    const Tensor& given_chances,
    const Tensor& given_order,
    const Tensor& state,
    const Tensor& last,
    double power,
    int64_t refresh,
    at::IntArrayRef exactly,
    const std::optional<Tensor>& budget,
    int64_t resample_every,
    bool unbiased) {
  const int64_t seed = state.const_data_ptr<int64_t>()[0], step = state.const_data_ptr<int64_t>()[1];
  const int64_t num_weights = static_cast<int64_t>(weights.size());
  const bool again = step % resample_every != 0;
  // Since the last draw, resample_every steps ago, a multiple of refresh has come by.
  const bool anew = !again && (step % refresh < resample_every || budget);
  const Uniform uniform = Uniform::of_step(seed, step);
  const int64_t* before = last.const_data_ptr<int64_t>();
  Tensor chances = given_chances.clone(), order = given_order.clone(), next = at::empty_like(last);
  double* p = chances.mutable_data_ptr<double>();
  int64_t* places = order.mutable_data_ptr<int64_t>();
  int64_t* bounds = next.mutable_data_ptr<int64_t>();
  int64_t* numbers = bounds + num_weights + 1;

  std::vector<Tensor> out, scales;
  int64_t first = 0, drawn = 0;
  bounds[0] = 0;
  for (int64_t k = 0; k < num_weights; ++k) {
    const int64_t rows = weights[k].size(0);
    const int64_t count = again ? before[k + 1] - before[k]
        : budget                ? budget->const_data_ptr<int64_t>()[k + 1]
                                : exactly[k];
    Tensor set = at::empty({count}, last.options());
    int64_t* row = set.mutable_data_ptr<int64_t>();
    if (again) {
      std::transform(before + num_weights + 1 + drawn, before + num_weights + 1 + drawn + count, row, [&](int64_t n) {
        return n - first;
      });
    } else {
      if (anew) {
        norms(weights[k], power, p);
        to_chances(p, rows, count);
        const std::vector<int64_t> anew_order = random_order(uniform, k, rows);
        std::copy(anew_order.begin(), anew_order.end(), places);
      }
      systematic(p, places, rows, uniform(num_weights, k), count, row);
    }
    if (unbiased) {
      Tensor scale = at::empty({count}, last.options().dtype(at::kFloat));
      std::transform(row, row + count, scale.mutable_data_ptr<float>(), [&](int64_t r) {
        return static_cast<float>(1 / p[r]);
      });
      scales.push_back(scale);
    }
    for (int64_t i = 0; i < count; ++i) {
      numbers[drawn + i] = row[i] + first;
    }
    bounds[k + 1] = drawn += count;
    out.push_back(set);
    first += rows;
    p += rows;
    places += rows;
  }
  std::fill(numbers + drawn, numbers + first, 0);
  out.insert(out.end(), scales.begin(), scales.end());
  out.insert(out.end(), {chances, order, next});
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(rwfx, CPU, m) {
  m.impl("draw_by_norm", draw_by_norm);
}

TORCH_LIBRARY_IMPL(rwfx, AutogradCPU, m) {
  m.impl("draw_by_norm", torch::CppFunction::makeFallthrough());
}

}  // namespace rwfx
