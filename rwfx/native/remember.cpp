// rwfx::remember on the CPU: the equations of rwfx/ops/remember.py, in the same letters, in one pass over the rows of each
// use.

#include "rows.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/pow.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

namespace rwfx {
namespace {

using at::Tensor;

constexpr float TINY = 1e-30f, HUGE_BASE = 1e30f;

std::tuple<Tensor, Tensor, Tensor> remember(
    at::TensorList seen,
    const Tensor& given_taken,
    const Tensor& given_value,
    const Tensor& sizes,
    const Tensor& use,
    const Tensor& given_row,
    const Tensor& given_last,
    int64_t num_rows,
    bool learned,
    double rate,
    double forget,
    double optimism,
    double floor,
    double power) {
  const Tensor taken = given_taken.contiguous(), value = given_value.contiguous();
  const Tensor row = given_row.contiguous(), last = given_last.contiguous();
  Tensor taken_now = at::empty_like(taken), value_now = at::empty_like(value), base = at::empty_like(value);
  const float *before = taken.const_data_ptr<float>(), *v = value.const_data_ptr<float>();
  float *m = taken_now.mutable_data_ptr<float>(), *v_now = value_now.mutable_data_ptr<float>();
  float* p = base.mutable_data_ptr<float>();
  const int64_t* row_of = row.const_data_ptr<int64_t>();
  const auto towards = static_cast<float>(optimism), least = static_cast<float>(floor);
  const auto most = std::pow(HUGE_BASE, static_cast<float>(1 / std::max(power, 1.0)));

  std::vector<char> drawn(learned ? num_rows : 0, 0);
  if (learned) {
    const int64_t* numbers = last.const_data_ptr<int64_t>() + last.numel() - num_rows;
    for (int64_t k = 0; k < numbers[-1]; ++k) {
      drawn[numbers[k]] = 1;
    }
  }
  int64_t begin = 0;
  for (const Tensor& given : seen) {
    const Tensor of_use = given.contiguous();
    const int64_t count = of_use.numel(), end = begin + count;
    const float* from = of_use.const_data_ptr<float>();
    TORCH_CHECK(end <= taken.numel(), "more magnitudes than rows are remembered.");
    bool is_new = false;
    double sum = 0;
    int64_t summed = 0;
    for (int64_t n = begin; n < end; ++n) {
      const float x = from[n - begin];
      m[n] = std::isfinite(x) ? x : 0;
      is_new = is_new || m[n] != before[n];
      if (learned && drawn[row_of[n]]) {
        sum += m[n];
        ++summed;
      }
    }
    if (learned) {
      const float mean = std::max(static_cast<float>(sum / std::max<int64_t>(summed, 1)), TINY);
      for (int64_t n = begin; n < end; ++n) {
        const bool was_drawn = drawn[row_of[n]];
        const float by = static_cast<float>(is_new ? (was_drawn ? rate : forget) : 0);
        v_now[n] = v[n] + by * ((was_drawn ? m[n] / mean : towards) - v[n]);
        p[n] = std::min(std::max(v_now[n], least), most);
      }
    } else {
      const float by = static_cast<float>(is_new ? rate : 0);
      for (int64_t n = begin; n < end; ++n) {
        v_now[n] = v[n] + by * (m[n] - v[n]);
        sum += v_now[n];
      }
      const float mean = std::max(static_cast<float>(sum / static_cast<double>(count)), TINY);
      for (int64_t n = begin; n < end; ++n) {
        p[n] = std::min(v_now[n] / mean + least, most);
      }
    }
    begin = end;
  }
  if (power == 4) {  // the default of every walk that learns
    for (int64_t n = 0; n < begin; ++n) {
      p[n] *= p[n];
      p[n] *= p[n];
    }
    return {taken_now, value_now, base};
  }
  return {taken_now, value_now, at::pow(base, power)};
}

}  // namespace

TORCH_LIBRARY_IMPL(rwfx, CPU, m) {
  m.impl("remember", remember);
}

TORCH_LIBRARY_IMPL(rwfx, AutogradCPU, m) {
  m.impl("remember", torch::CppFunction::makeFallthrough());
}

}  // namespace rwfx
