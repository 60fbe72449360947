// Drawing by sizes with exact probabilities: the rule of rwfx/ops/magnitude.py.

#pragma once

#include "random.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <vector>

namespace rwfx {

// min(1, c * size) in place, with c such that they add up to `count`.
inline void to_chances(double* size, int64_t rows, int64_t count) {
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

// A random order of so many numbers.
inline std::vector<int64_t> random_order(const Uniform& uniform, uint64_t stream, int64_t count) {
  std::vector<int64_t> key(count), order(count);
  for (int64_t k = 0; k < count; ++k) {
    key[k] = static_cast<int64_t>(uniform.bits(stream, k));
  }
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return key[a] < key[b]; });
  return order;
}

// Whether u, u + 1, ..., each times the line's length over count, fall on a row when all are laid end to end in order.
inline void systematic(const double* p, const int64_t* order, int64_t rows, double u, int64_t count, int64_t* out) {
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

}  // namespace rwfx
