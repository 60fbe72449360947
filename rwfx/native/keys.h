// What the kernels on keys share.

#pragma once

#include "memory.h"
#include "rows.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>

namespace rwfx {

// What int32 counts.
constexpr int64_t LARGEST = std::numeric_limits<int32_t>::max();

// Keys as a kernel reads them.
struct Keys {
  at::Tensor tensor;
  const int64_t* data;
  int64_t count;

  explicit Keys(const at::Tensor& given) : tensor(given.contiguous()), data(nullptr), count(given.numel()) {
    TORCH_CHECK_VALUE(
        given.dim() == 1 && given.scalar_type() == at::kLong, "keys must be a one-dimensional int64 tensor, got ",
        given.scalar_type(), " of shape ", given.sizes(), ".");
    data = tensor.const_data_ptr<int64_t>();
  }
  const int64_t* end() const {
    return data + count;
  }
  bool are_sorted() const {
    return std::adjacent_find(data, end(), std::greater_equal<int64_t>()) == end();
  }
  // How many are below.
  int64_t place_of(int64_t key) const {
    return std::lower_bound(data, data + count, key) - data;
  }
};

// Of so many groups, each with its share of the numbers, how many are enough for a thread.
inline int64_t grain_of(int64_t numbers, int64_t groups) {
  return grain(numbers / std::max<int64_t>(1, groups) + 1);
}

inline at::Tensor fresh_like(const at::Tensor& like, int64_t size, at::ScalarType type) {
  return fresh({size}, like.options().dtype(type));
}

}  // namespace rwfx
