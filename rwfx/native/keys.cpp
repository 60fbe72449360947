// Sets of keys on the CPU, and what lies at them: rwfx/keys.py, in a few passes over what there is.
//
// Keys are sorted and distinct, so sets of them are passed side by side, a range of keys for each thread.

#include "buckets.h"

#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

namespace rwfx {
namespace {

using at::Tensor;

// Bits of a digit, by which a bucket is sorted.
constexpr int DIGIT = 8;

// Calls f(begin, end, first, last) in parallel: the keys from `begin` to `end`, and the others, from `first` to `last`,
// that come before the next of them. Together they are all.
template <class F>
void for_ranges(const Keys& keys, const Keys& others, F f) {
  const auto start = [&](int64_t n) {
    return n == 0 ? 0 : n == keys.count ? others.count : others.place_of(keys.data[n]);
  };
  at::parallel_for(0, keys.count, GRAIN, [&](int64_t begin, int64_t end) {
    const int64_t first = start(begin), last = start(end);
    TORCH_CHECK_VALUE(first <= last, "keys must be sorted.");
    f(begin, end, first, last);
  });
}

Tensor replaced(const Tensor& given, const Tensor& given_pruned, const Tensor& given_grown) {
  const Keys keys(given), pruned(given_pruned), grown(given_grown);
  TORCH_CHECK_VALUE(
      pruned.are_sorted() && (!pruned.count || (pruned.data[0] >= 0 && pruned.end()[-1] < keys.count)),
      "what is pruned must be positions of ", keys.count, " keys, in order.");
  TORCH_CHECK_VALUE(grown.are_sorted(), "what is grown must be sorted.");
  const Tensor after = fresh_like(given, keys.count - pruned.count + grown.count, at::kLong);
  int64_t* to = after.mutable_data_ptr<int64_t>();
  if (!keys.count) {
    std::copy(grown.data, grown.end(), to);
  }
  for_ranges(keys, grown, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    const int64_t* gone = pruned.data + pruned.place_of(begin);
    int64_t* at = to + begin - (gone - pruned.data) + first;
    for (int64_t n = begin; n < end; ++n) {
      for (; first < last && grown.data[first] < keys.data[n]; ++first) {
        *at++ = grown.data[first];
      }
      const bool is_gone = gone != pruned.end() && *gone == n;
      if (!is_gone) {
        *at++ = keys.data[n];
      }
      gone += is_gone;
    }
    std::copy(grown.data + first, grown.data + last, at);
  });
  return after;
}

Tensor without(const Tensor& given, const Tensor& given_others) {
  const Keys keys(given), others(given_others);
  const Tensor rest = fresh_like(given, keys.count, at::kLong);
  int64_t* to = rest.mutable_data_ptr<int64_t>();
  const int64_t parts = at::get_num_threads();
  std::vector<int64_t> counts(parts);
  at::parallel_for(0, parts, grain_of(keys.count, parts), [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      int64_t n = keys.count * part / parts, at = n;
      const int64_t begin = n, end = keys.count * (part + 1) / parts;
      const int64_t* other = n < end ? others.data + others.place_of(keys.data[n]) : others.end();
      // Which of both is next is as good as random: no branch hangs on it.
      while (n < end && other < others.end()) {
        const int64_t key = keys.data[n], next = *other;
        to[at] = key;
        at += key < next;
        n += key <= next;
        other += next <= key;
      }
      counts[part] = std::copy(keys.data + n, keys.data + end, to + at) - (to + begin);
    }
  });
  int64_t count = 0;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t* own = to + keys.count * part / parts;
    count = std::copy(own, own + counts[part], to + count) - to;
  }
  return rest.resize_({count});
}

// Sorts what lies from `first` to `last` by its lowest `bits`.
void sort_by_digits(int64_t* first, int64_t* last, std::vector<int64_t>& spare, int bits) {
  const int64_t count = last - first;
  spare.resize(std::max<size_t>(spare.size(), count));
  int64_t *from = first, *to = spare.data();
  for (int shift = 0; shift < bits; shift += DIGIT) {
    const auto digit = [&](int64_t key) { return (key >> shift) & ((1 << DIGIT) - 1); };
    std::array<int64_t, 1 << DIGIT> at{};
    for (int64_t n = 0; n < count; ++n) {
      ++at[digit(from[n])];
    }
    std::exclusive_scan(at.begin(), at.end(), at.begin(), int64_t(0));
    for (int64_t n = 0; n < count; ++n) {
      to[at[digit(from[n])]++] = from[n];
    }
    std::swap(from, to);
  }
  if (from != first) {
    std::copy(from, from + count, first);
  }
}

Tensor distinct_keys(const Tensor& given) {
  const Keys keys(given);
  int64_t largest = 0;
  for (int64_t n = 0; n < keys.count; ++n) {
    TORCH_CHECK_VALUE(keys.data[n] >= 0, "keys must not be negative, got ", keys.data[n], ".");
    largest = std::max(largest, keys.data[n]);
  }
  // Buckets by the highest bits.
  const int shift = bucket_shift(largest);
  const auto for_keys = [&](int64_t begin, int64_t end, auto f) {
    for (int64_t n = begin; n < end; ++n) {
      f(keys.data[n] >> shift, keys.data[n]);
    }
  };
  const Buckets<int64_t> dealt(keys.count, (largest >> shift) + 1, for_keys);
  std::vector<int64_t> counts(dealt.starts.size() - 1);
  dealt.for_each([&](int64_t begin, int64_t end) {
    std::vector<int64_t> spare;
    for (int64_t b = begin; b < end; ++b) {
      int64_t *first = &dealt.items[dealt.starts[b]], *last = &dealt.items[dealt.starts[b + 1]];
      sort_by_digits(first, last, spare, shift);
      counts[b] = std::unique(first, last) - first;
    }
  });
  const Tensor distinct = fresh_like(given, std::accumulate(counts.begin(), counts.end(), int64_t(0)), at::kLong);
  int64_t* at = distinct.mutable_data_ptr<int64_t>();
  for (size_t b = 0; b < counts.size(); ++b) {
    at = std::copy_n(&dealt.items[dealt.starts[b]], counts[b], at);
  }
  return distinct;
}

// ---- What lies at keys.

Tensor origins(const Tensor& given_before, const Tensor& given_after) {
  const Keys before(given_before), after(given_after);
  TORCH_CHECK_VALUE(before.count <= LARGEST, "int32 cannot count ", before.count, " keys.");
  const Tensor origin = fresh_like(given_after, after.count, at::kInt);
  int32_t* to = origin.mutable_data_ptr<int32_t>();
  at::parallel_for(0, after.count, GRAIN, [&](int64_t begin, int64_t end) {
    const int64_t* at = before.data + before.place_of(after.data[begin]);
    for (int64_t n = begin; n < end; ++n) {
      while (at != before.end() && *at < after.data[n]) {
        ++at;
      }
      to[n] = at != before.end() && *at == after.data[n] ? static_cast<int32_t>(at - before.data) : -1;
    }
  });
  return origin;
}

template <class Bits>
void carry(const Tensor& numbers, const Tensor& origin, const Tensor& moved) {
  const Bits* from = static_cast<const Bits*>(numbers.const_data_ptr());
  const int32_t* of = origin.const_data_ptr<int32_t>();
  Bits* to = static_cast<Bits*>(moved.mutable_data_ptr());
  const int64_t size = numbers.numel();
  at::parallel_for(0, origin.numel(), GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      TORCH_CHECK_VALUE(of[n] < size, "there are ", size, " numbers and not one at ", of[n], ".");
      to[n] = of[n] < 0 ? Bits(0) : from[of[n]];
    }
  });
}

Tensor carried(const Tensor& given, const Tensor& given_origin) {
  TORCH_CHECK_VALUE(
      given.dim() == 1 && given_origin.dim() == 1 && given_origin.scalar_type() == at::kInt,
      "numbers must be one-dimensional and their origins int32, got the shape ", given.sizes(), " and ",
      given_origin.scalar_type(), " of shape ", given_origin.sizes(), ".");
  const Tensor from = given.contiguous(), origin = given_origin.contiguous();
  const Tensor moved = fresh({origin.numel()}, given.options());
  switch (given.element_size()) {
    case 1:
      carry<uint8_t>(from, origin, moved);
      break;
    case 2:
      carry<uint16_t>(from, origin, moved);
      break;
    case 4:
      carry<uint32_t>(from, origin, moved);
      break;
    case 8:
      carry<uint64_t>(from, origin, moved);
      break;
    default:
      TORCH_CHECK_VALUE(false, "numbers of ", given.scalar_type(), " are not carried.");
  }
  return moved;
}

}  // namespace

TORCH_LIBRARY_IMPL(rwfx, CPU, m) {
  m.impl("replaced", replaced);
  m.impl("without", without);
  m.impl("distinct_keys", distinct_keys);
  m.impl("origins", origins);
  m.impl("carried", carried);
}

}  // namespace rwfx
