// Operations on the keys of sparse weights on the CPU: those of rwfx/nonzeros.py, each in a few passes over what it has.
//
// Keys are sorted and distinct, so two sets of them are passed side by side; a sort of keys that were drawn goes by their
// digits; and what lies by columns is dealt to the rows in one pass, in which each row's numbers keep their order.

#include "rows.h"

#include <torch/library.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

namespace rwfx {
namespace {

using at::Tensor;

// Bits of a digit: a place for each of its values fits the nearest cache.
constexpr int DIGIT = 11;

struct Keys {
  Tensor tensor;
  const int64_t* data;
  int64_t count;

  explicit Keys(const Tensor& given) : tensor(given.contiguous()), data(nullptr), count(given.numel()) {
    TORCH_CHECK_VALUE(
        given.dim() == 1 && given.scalar_type() == at::kLong, "keys must be a one-dimensional int64 tensor, got ",
        given.scalar_type(), " of shape ", given.sizes(), ".");
    data = tensor.const_data_ptr<int64_t>();
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> index_of(const Tensor& given, int64_t rows, int64_t columns) {
  const Keys keys(given);
  constexpr int64_t LARGEST = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(
      std::min(rows, columns) >= 0 && std::max({rows, columns, keys.count}) <= LARGEST, "int32 cannot count ", rows,
      " rows, ", columns, " columns and ", keys.count, " keys.");
  const auto numbers = [&](int64_t size) { return at::empty({size}, given.options().dtype(at::kInt)); };
  const Tensor ccol = numbers(columns + 1), row = numbers(keys.count), crow = numbers(rows + 1);
  const Tensor col = numbers(keys.count), order = numbers(keys.count);
  int32_t *ccol_to = ccol.mutable_data_ptr<int32_t>(), *row_to = row.mutable_data_ptr<int32_t>();
  int32_t *crow_to = crow.mutable_data_ptr<int32_t>(), *col_to = col.mutable_data_ptr<int32_t>();
  int32_t* order_to = order.mutable_data_ptr<int32_t>();
  std::vector<int32_t> next(rows + 1, 0);  // of each row: how many there are, and then where its next number goes
  int64_t n = 0;
  for (int64_t j = 0; j < columns; ++j) {
    ccol_to[j] = static_cast<int32_t>(n);
    for (const int64_t first = j * rows; n < keys.count && keys.data[n] < first + rows; ++n) {
      const int64_t o = keys.data[n] - first;
      TORCH_CHECK_VALUE(o >= 0, "keys must be sorted and not negative.");
      row_to[n] = static_cast<int32_t>(o);
      ++next[o];
    }
  }
  ccol_to[columns] = static_cast<int32_t>(n);
  TORCH_CHECK_VALUE(n == keys.count, "a key is beyond the ", rows, " rows and ", columns, " columns.");
  int32_t sum = 0;
  for (int64_t o = 0; o <= rows; ++o) {
    crow_to[o] = sum;
    sum += std::exchange(next[o], sum);
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int32_t k = ccol_to[j]; k < ccol_to[j + 1]; ++k) {
      const int32_t at = next[row_to[k]]++;
      col_to[at] = static_cast<int32_t>(j);
      order_to[at] = k;
    }
  }
  return {ccol, row, crow, col, order};
}

std::tuple<Tensor, Tensor> find_keys(const Tensor& given, const Tensor& given_wanted) {
  const Keys keys(given), wanted(given_wanted);
  const Tensor found = at::empty({wanted.count}, given.options().dtype(at::kBool));
  const Tensor place = at::empty({wanted.count}, given.options());
  bool* found_to = found.mutable_data_ptr<bool>();
  int64_t* place_to = place.mutable_data_ptr<int64_t>();
  const int64_t *first = keys.data, *last = first + keys.count;
  at::parallel_for(0, wanted.count, GRAIN, [&](int64_t begin, int64_t end) {
    const int64_t* at = first;
    for (int64_t m = begin; m < end; ++m) {
      const int64_t key = wanted.data[m];
      if (m == begin || key < wanted.data[m - 1]) {
        at = std::lower_bound(first, last, key);
      } else {
        // From where the one before was, in steps that double.
        int64_t step = 1;
        while (last - at > step && at[step] < key) {
          at += step;
          step *= 2;
        }
        at = std::lower_bound(at, std::min(last, at + step + 1), key);
      }
      found_to[m] = at != last && *at == key;
      place_to[m] = std::max<int64_t>(0, std::min(at - first, keys.count - 1));
    }
  });
  return {found, place};
}

Tensor merge_keys(const Tensor& given, const Tensor& given_others) {
  const Keys keys(given), others(given_others);
  const Tensor merged = at::empty({keys.count + others.count}, given.options());
  std::merge(
      keys.data, keys.data + keys.count, others.data, others.data + others.count, merged.mutable_data_ptr<int64_t>());
  return merged;
}

Tensor distinct_keys(const Tensor& given) {
  const Keys keys(given);
  std::vector<int64_t> sorted(keys.data, keys.data + keys.count), next(keys.count);
  int64_t largest = 0;
  for (const int64_t key : sorted) {
    TORCH_CHECK_VALUE(key >= 0, "keys must not be negative, got ", key, ".");
    largest = std::max(largest, key);
  }
  const int bits = static_cast<int>(std::bit_width(static_cast<uint64_t>(largest)));
  for (int shift = 0; shift < bits; shift += DIGIT) {
    const auto digit = [&](int64_t key) { return (key >> shift) & ((1 << DIGIT) - 1); };
    std::array<int64_t, 1 << DIGIT> at{};
    for (const int64_t key : sorted) {
      ++at[digit(key)];
    }
    int64_t sum = 0;
    for (int64_t& start : at) {
      sum += std::exchange(start, sum);
    }
    for (const int64_t key : sorted) {
      next[at[digit(key)]++] = key;
    }
    std::swap(sorted, next);
  }
  sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
  const Tensor distinct = at::empty({static_cast<int64_t>(sorted.size())}, given.options());
  std::copy(sorted.begin(), sorted.end(), distinct.mutable_data_ptr<int64_t>());
  return distinct;
}

}  // namespace

TORCH_LIBRARY_IMPL(rwfx, CPU, m) {
  m.impl("index_of", index_of);
  m.impl("find_keys", find_keys);
  m.impl("merge_keys", merge_keys);
  m.impl("distinct_keys", distinct_keys);
}

}  // namespace rwfx
