// rwfx::extremes on the CPU: the largest and the smallest of rwfx/extremes.py.

#include "memory.h"
#include "rows.h"

#include <torch/library.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <functional>
#include <iterator>
#include <limits>
#include <type_traits>
#include <vector>

namespace rwfx {
namespace {

using at::Tensor;

template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

// An unsigned number for each that is ordered as they are, or as their magnitudes; NaN is above all, as for torch.topk.
template <class T>
BitsOf<T> ordered(T number, bool magnitudes) {
  using Bits = BitsOf<T>;
  constexpr Bits SIGN = Bits(1) << (8 * sizeof(T) - 1);
  const Bits bits = std::bit_cast<Bits>(number + T(0)) & (magnitudes ? ~SIGN : ~Bits(0));  // -0 is 0
  return number != number ? std::numeric_limits<Bits>::max() : bits & SIGN ? ~bits : bits | SIGN;
}

constexpr int DIGIT = 11;
using Counts = std::array<int64_t, 1 << DIGIT>;

// The digit of the last that is taken, of which `left` are taken beside all with larger ones; then how many of it are.
int64_t last_digit(const Counts& counts, int64_t& left) {
  int64_t digit = counts.size() - 1;
  for (; counts[digit] < left; --digit) {
    left -= counts[digit];
  }
  return digit;
}

// Digit by digit: how many of the numbers have each, and then the same of those alone that have the last one's.
template <class T>
Tensor extremes_of(const Tensor& given, int64_t count, bool largest, bool magnitudes) {
  using Bits = BitsOf<T>;
  constexpr int BITS = 8 * sizeof(T);
  const T* numbers = given.const_data_ptr<T>();
  const int64_t size = given.numel(), threads = at::get_num_threads();
  const Bits turned = largest ? Bits(0) : ~Bits(0);
  Scratch<Bits> scratch(size);
  Bits* rank = scratch.data();
  std::vector<Counts> of_thread(threads, Counts{});
  at::parallel_for(0, threads, grain(size / threads + 1), [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const int64_t begin = size * k / threads, end = size * (k + 1) / threads;
      for (int64_t n = begin; n < end; ++n) {
        rank[n] = ordered(numbers[n], magnitudes) ^ turned;
      }
      Counts other{};  // every second one, so that one number's count does not wait for its neighbour's
      for (int64_t n = begin; n < end; ++n) {
        ++(n & 1 ? other : of_thread[k])[rank[n] >> (BITS - DIGIT)];
      }
      std::transform(other.begin(), other.end(), of_thread[k].begin(), of_thread[k].begin(), std::plus<int64_t>());
    }
  });
  Counts counts{};
  for (const Counts& own : of_thread) {
    std::transform(own.begin(), own.end(), counts.begin(), counts.begin(), std::plus<int64_t>());
  }
  int64_t left = count;
  int shift = BITS - DIGIT;
  Bits last = static_cast<Bits>(last_digit(counts, left)) << shift;
  std::vector<Bits> alike;
  std::copy_if(rank, rank + size, std::back_inserter(alike), [&](Bits bits) { return bits >> shift == last >> shift; });
  while (shift > 0) {
    shift = std::max(0, shift - DIGIT);
    counts.fill(0);
    for (const Bits bits : alike) {
      ++counts[(bits >> shift) % counts.size()];
    }
    const Bits mask = static_cast<Bits>(counts.size() - 1) << shift;
    last = (last & ~mask) | static_cast<Bits>(last_digit(counts, left)) << shift;
    std::erase_if(alike, [&](Bits bits) { return bits >> shift != last >> shift; });
  }
  const Tensor places = fresh({count}, given.options().dtype(at::kLong));
  int64_t* to = places.mutable_data_ptr<int64_t>();
  int64_t taken = 0;
  for (int64_t n = 0; taken < count; ++n) {
    const bool is_equal = (rank[n] == last) & (left > 0);
    left -= is_equal;
    to[taken] = n;
    taken += (rank[n] > last) | is_equal;
  }
  return places;
}

Tensor extremes(const Tensor& numbers, int64_t count, bool largest, bool magnitudes) {
  TORCH_CHECK_VALUE(
      numbers.dim() == 1 && numbers.is_floating_point() && count >= 0 && count <= numbers.numel(), "there are no ",
      count, " extremes of numbers of ", numbers.scalar_type(), " of the shape ", numbers.sizes(), ".");
  if (count == 0) {
    return at::empty({0}, numbers.options().dtype(at::kLong));
  }
  // float has the numbers of the half precisions.
  const Tensor given = numbers.to(numbers.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
  return given.scalar_type() == at::kDouble ? extremes_of<double>(given, count, largest, magnitudes)
                                            : extremes_of<float>(given, count, largest, magnitudes);
}

}  // namespace

TORCH_LIBRARY_IMPL(rwfx, CPU, m) {
  m.impl("extremes", extremes);
}

}  // namespace rwfx
