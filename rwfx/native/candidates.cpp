// rwfx::draw_places on the CPU: the draws of rwfx/ops/candidates.py.

#include "memory.h"
#include "random.h"
#include "rows.h"

#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

namespace rwfx {
namespace {

using at::Tensor;
using std::optional;

// Running sums, in which the first above a number is found in constant time on average: numbers fall into as many cells
// as there are sums, and of each cell it is kept where a search begins (the guide table of Chen & Asau 1974).
class RunningSums {
 public:
  explicit RunningSums(const Tensor& given)
      : tensor_(given.to(at::kDouble).contiguous()), sums_(tensor_.const_data_ptr<double>()), count_(tensor_.numel()) {
    const double sum = count_ ? sums_[count_ - 1] : 0;
    TORCH_CHECK_VALUE(
        sum > 0 && sum < std::numeric_limits<double>::infinity() && count_ <= std::numeric_limits<int32_t>::max(),
        "nothing can be drawn by ", count_, " sums up to ", sum, ".");
    per_number_ = static_cast<double>(count_) / sum;
    first_.resize(count_);
    int64_t n = 0;
    for (int64_t cell = 0; cell < count_; ++cell) {
      while (n + 1 < count_ && cell_of(sums_[n]) < cell) {
        ++n;
      }
      first_[cell] = static_cast<int32_t>(n);
    }
  }
  // The first entry whose sum is above `at`, or the last.
  int64_t find(double at) const {
    int64_t n = first_[cell_of(at)];
    while (n + 1 < count_ && sums_[n] <= at) {
      ++n;
    }
    return n;
  }

 private:
  int64_t cell_of(double at) const {
    return static_cast<int64_t>(std::clamp(at * per_number_, 0.0, static_cast<double>(count_ - 1)));
  }
  Tensor tensor_;
  const double* sums_;
  int64_t count_;
  double per_number_;
  std::vector<int32_t> first_;
};

Tensor draw_places(
    const Tensor& key, const optional<Tensor>& sums_GI, const optional<Tensor>& sum_O, int64_t rows, int64_t columns,
    int64_t count) {
  constexpr uint64_t COLUMN = 0, ROW = 1;  // the streams of rwfx/ops/candidates.py
  const Uniform uniform{static_cast<uint64_t>(key.item<int64_t>())};
  const Tensor places = fresh({count}, key.options());
  int64_t* to = places.mutable_data_ptr<int64_t>();
  if (!sums_GI || !sum_O) {
    at::parallel_for(0, count, GRAIN, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        const auto a = static_cast<int64_t>(uniform(COLUMN, m) * static_cast<double>(columns));
        to[m] = a * rows + static_cast<int64_t>(uniform(ROW, m) * static_cast<double>(rows));
      }
    });
    return places;
  }
  TORCH_CHECK_VALUE(
      sums_GI->dim() == 2 && sums_GI->size(0) > 0 && sums_GI->size(1) == columns && sum_O->numel() == rows &&
          rows % sums_GI->size(0) == 0,
      "sums of the shapes ", sums_GI->sizes(), " and ", sum_O->sizes(), " are not of ", rows, " rows and ", columns,
      " columns.");
  const RunningSums of_inputs(*sums_GI), of_rows(*sum_O);
  const int64_t per_group = rows / sums_GI->size(0);
  at::parallel_for(0, count, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const int64_t b = of_rows.find(uniform(ROW, m)), group = b / per_group;
      const int64_t a = of_inputs.find(uniform(COLUMN, m) + static_cast<double>(group)) - group * columns;
      to[m] = std::clamp<int64_t>(a, 0, columns - 1) * rows + b;
    }
  });
  return places;
}

}  // namespace

TORCH_LIBRARY_IMPL(rwfx, CPU, m) {
  m.impl("draw_places", draw_places);
}

}  // namespace rwfx
