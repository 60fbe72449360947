// rwfx::draw_by_norm on the CPU: the rule of rwfx/ops/magnitude.py, and its rows up to the rounding of sums.

#include "random.h"
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

// min(1, c * size) in place, with c such that they add up to `count`.
void to_chances(double* size, int64_t rows, int64_t count) {
  double largest = 0;
  for (int64_t r = 0; r < rows; ++r) {
    size[r] = std::isfinite(size[r]) && size[r] > 0 ? size[r] : 0;
    largest = std::max(largest, size[r]);
  }
  // A row that no size draws still takes part where the others are too few.
  const double least = largest > 0 ? largest * 1e-9 : 1;
  for (int64_t r = 0; r < rows; ++r) {
    size[r] = std::max(size[r], least);
  }
  if (count >= rows) {
    std::fill(size, size + rows, 1.0);
    return;
  }
  std::vector<double> sorted(size, size + rows), rest(rows);
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  std::partial_sum(sorted.rbegin(), sorted.rend(), rest.rbegin());
  // With the `fixed` largest at 1, the others share the remaining count: the fewest for which none is above 1.
  int64_t fixed = 0;
  while (fixed < rows && sorted[fixed] * static_cast<double>(count - fixed) > rest[fixed]) {
    ++fixed;
  }
  const double factor = static_cast<double>(count - fixed) / rest[fixed];
  for (int64_t r = 0; r < rows; ++r) {
    size[r] = std::min(1.0, size[r] * factor);
  }
}

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

// Whether u, u + 1, ..., each times the line's length over count, fall on a row when all are laid end to end in order.
void systematic(const double* p, const int64_t* order, int64_t rows, double u, int64_t count, int64_t* out) {
  std::vector<double> ends(rows);
  double end = 0;
  for (int64_t k = 0; k < rows; ++k) {
    ends[k] = end += p[order[k]];
  }
  int64_t at = 0;
  for (int64_t k = 0; k < count; ++k) {
    const double point = (static_cast<double>(k) + u) * (end / static_cast<double>(count));
    while (at < rows - 1 && ends[at] <= point) {
      ++at;
    }
    out[k] = order[at];
  }
  std::sort(out, out + count);
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
        std::vector<int64_t> key(rows);
        for (int64_t r = 0; r < rows; ++r) {
          key[r] = static_cast<int64_t>(uniform.bits(k, r));
        }
        std::iota(places, places + rows, 0);
        std::sort(places, places + rows, [&](int64_t a, int64_t b) { return key[a] < key[b]; });
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
