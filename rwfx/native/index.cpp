// The index of a sparse weight on the CPU: rwfx/nonzeros.py, in a few passes over keys, rows and columns.

#include "buckets.h"

#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

namespace rwfx {
namespace {

using at::Tensor;

// int32 numbers of an index.
struct Indices {
  Tensor tensor;
  const int32_t* data;
  int64_t count;

  explicit Indices(const Tensor& given) : tensor(given.contiguous()), data(nullptr), count(given.numel()) {
    TORCH_CHECK_VALUE(
        given.dim() == 1 && given.scalar_type() == at::kInt, "an index must be of one-dimensional int32 tensors, got ",
        given.scalar_type(), " of shape ", given.sizes(), ".");
    data = tensor.const_data_ptr<int32_t>();
  }
};

void check_index(const Indices& ccol, const Indices& row, int64_t rows) {
  TORCH_CHECK_VALUE(rows >= 0 && rows <= LARGEST, "int32 cannot count ", rows, " rows.");
  TORCH_CHECK_VALUE(
      ccol.count && ccol.data[0] == 0 && ccol.data[ccol.count - 1] == row.count &&
          std::is_sorted(ccol.data, ccol.data + ccol.count),
      "the columns of an index must begin at 0 and end at its ", row.count, " numbers.");
}

constexpr const char* UNSORTED = "keys must be sorted and not negative.";

std::tuple<Tensor, Tensor> columns_of(const Tensor& given, int64_t rows, int64_t columns) {
  const Keys keys(given);
  TORCH_CHECK_VALUE(
      std::min(rows, columns) >= 0 && std::max({rows, columns, keys.count}) <= LARGEST, "int32 cannot count ", rows,
      " rows, ", columns, " columns and ", keys.count, " keys.");
  const Tensor ccol = fresh_like(given, columns + 1, at::kInt), row = fresh_like(given, keys.count, at::kInt);
  int32_t *ccol_to = ccol.mutable_data_ptr<int32_t>(), *row_to = row.mutable_data_ptr<int32_t>();
  at::parallel_for(0, columns, grain_of(keys.count, columns), [&](int64_t begin, int64_t end) {
    int64_t n = keys.place_of(begin * rows);
    for (int64_t j = begin; j < end; ++j) {
      ccol_to[j] = static_cast<int32_t>(n);
      for (const int64_t first = j * rows; n < keys.count && keys.data[n] < first + rows; ++n) {
        const int64_t o = keys.data[n] - first;
        TORCH_CHECK_VALUE(o >= 0, UNSORTED);
        row_to[n] = static_cast<int32_t>(o);
      }
    }
    TORCH_CHECK_VALUE(n == keys.place_of(end * rows), UNSORTED);
  });
  TORCH_CHECK_VALUE(keys.place_of(0) == 0, UNSORTED);
  TORCH_CHECK_VALUE(
      keys.place_of(columns * rows) == keys.count, "a key is beyond the ", rows, " rows and ", columns, " columns.");
  ccol_to[columns] = static_cast<int32_t>(keys.count);
  return {ccol, row};
}

std::tuple<Tensor, Tensor, Tensor> rows_of(const Tensor& given_ccol, const Tensor& given_row, int64_t rows) {
  const Indices ccol(given_ccol), row(given_row);
  check_index(ccol, row, rows);
  const Tensor crow = fresh_like(given_row, rows + 1, at::kInt);
  const Tensor col = fresh_like(given_row, row.count, at::kInt), order = fresh_like(given_row, row.count, at::kInt);
  int32_t *crow_to = crow.mutable_data_ptr<int32_t>(), *col_to = col.mutable_data_ptr<int32_t>();
  int32_t* order_to = order.mutable_data_ptr<int32_t>();
  // Neighbouring rows are a bucket.
  struct Number {
    int32_t row, col, order;
  };
  const int shift = bucket_shift(rows);
  const auto for_numbers = [&](int64_t begin, int64_t end, auto f) {
    int64_t j = std::upper_bound(ccol.data, ccol.data + ccol.count, begin) - ccol.data - 1;
    for (int64_t n = begin; n < end; ++n) {
      while (n >= ccol.data[j + 1]) {
        ++j;
      }
      const int32_t o = row.data[n];
      TORCH_CHECK_VALUE(o >= 0 && o < rows, "row ", o, " is not one of ", rows, ".");
      f(o >> shift, Number{o, static_cast<int32_t>(j), static_cast<int32_t>(n)});
    }
  };
  const Buckets<Number> dealt(row.count, (rows >> shift) + 1, for_numbers);
  dealt.for_each([&](int64_t begin, int64_t end) {
    std::vector<int32_t> next(int64_t(1) << shift);
    for (int64_t b = begin; b < end; ++b) {
      const Number *first = &dealt.items[dealt.starts[b]], *last = &dealt.items[dealt.starts[b + 1]];
      const int64_t base = b << shift, of_bucket = std::clamp<int64_t>(rows - base, 0, next.size());
      std::fill(next.begin(), next.end(), 0);
      for (const Number* n = first; n < last; ++n) {
        ++next[n->row - base];
      }
      auto sum = static_cast<int32_t>(dealt.starts[b]);
      for (int64_t o = 0; o < of_bucket; ++o) {
        crow_to[base + o] = sum;
        sum += std::exchange(next[o], sum);
      }
      for (const Number* n = first; n < last; ++n) {
        const int32_t at = next[n->row - base]++;
        col_to[at] = n->col;
        order_to[at] = n->order;
      }
    }
  });
  crow_to[rows] = static_cast<int32_t>(row.count);
  return {crow, col, order};
}

Tensor keys_of(const Tensor& given_ccol, const Tensor& given_row, int64_t rows) {
  const Indices ccol(given_ccol), row(given_row);
  check_index(ccol, row, rows);
  const Tensor keys = fresh_like(given_row, row.count, at::kLong);
  int64_t* to = keys.mutable_data_ptr<int64_t>();
  const int64_t columns = ccol.count - 1;
  at::parallel_for(0, columns, grain_of(row.count, columns), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      for (int32_t n = ccol.data[j]; n < ccol.data[j + 1]; ++n) {
        to[n] = j * rows + row.data[n];
      }
    }
  });
  return keys;
}

}  // namespace

TORCH_LIBRARY_IMPL(rwfx, CPU, m) {
  m.impl("columns_of", columns_of);
  m.impl("rows_of", rows_of);
  m.impl("keys_of", keys_of);
}

}  // namespace rwfx
