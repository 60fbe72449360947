// Operations on the keys of sparse weights on the CPU: those of rwfx/keys.py and rwfx/nonzeros.py, each in a few passes
// over what it has.
//
// Keys are sorted and distinct, so sets of them are passed side by side, a range of keys for each thread. What is to be
// sorted, keys by their digits or numbers by their rows, is dealt to some hundreds of buckets first, and then sorted in
// each bucket, which fits the nearest caches.

#include "rows.h"
#include "memory.h"

#include <ATen/ops/full.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

namespace rwfx {
namespace {

using at::Tensor;

// Buckets that keys are dealt to: to more places than these is not written at once.
constexpr int BUCKET_BITS = 9;
// Bits of a digit within a bucket.
constexpr int DIGIT = 8;
constexpr int64_t LARGEST = std::numeric_limits<int32_t>::max();

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

// int32 numbers of an index.
struct Places {
  Tensor tensor;
  const int32_t* data;
  int64_t count;

  explicit Places(const Tensor& given) : tensor(given.contiguous()), data(nullptr), count(given.numel()) {
    TORCH_CHECK_VALUE(
        given.dim() == 1 && given.scalar_type() == at::kInt, "an index must be of one-dimensional int32 tensors, got ",
        given.scalar_type(), " of shape ", given.sizes(), ".");
    data = tensor.const_data_ptr<int32_t>();
  }
};

constexpr const char* UNSORTED = "keys must be sorted and not negative.";

// Of so many groups, each with its share of the numbers, how many are enough for a thread.
int64_t grain_of(int64_t numbers, int64_t groups) {
  return grain(numbers / std::max<int64_t>(1, groups) + 1);
}

Tensor numbers(int64_t size, const Tensor& like, at::ScalarType type) {
  return fresh({size}, like.options().dtype(type));
}

void check_starts(const Places& ccol, const Places& row) {
  TORCH_CHECK_VALUE(
      ccol.count && ccol.data[0] == 0 && ccol.data[ccol.count - 1] == row.count &&
          std::is_sorted(ccol.data, ccol.data + ccol.count),
      "the columns of an index must begin at 0 and end at its ", row.count, " numbers.");
}

// What was dealt to buckets: those of bucket b lie from starts[b] to starts[b + 1], in the order they had.
template <class Item>
struct Dealt {
  Scratch<Item> memory;
  Item* items;
  std::vector<int64_t> starts;

  Dealt(int64_t count, int64_t buckets) : memory(count), items(memory.data()), starts(buckets + 1) {}
};

// Deals `count` items; for_items(begin, end, f) calls f(bucket, item) for those from `begin` to `end`.
template <class Item, class ForItems>
Dealt<Item> deal(int64_t count, int64_t buckets, const ForItems& for_items) {
  const int64_t parts = at::get_num_threads();
  Dealt<Item> dealt(count, buckets);
  std::vector<std::vector<int64_t>> next(parts, std::vector<int64_t>(buckets, 0));
  const auto for_parts = [&](auto f) {
    at::parallel_for(0, parts, grain_of(count, parts), [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        for_items(count * part / parts, count * (part + 1) / parts, [&, to = next[part].data()](int64_t bucket, Item item) {
          f(to[bucket], item);
        });
      }
    });
  };
  for_parts([](int64_t& number, const Item&) { ++number; });
  int64_t sum = 0;
  for (int64_t b = 0; b < buckets; ++b) {
    dealt.starts[b] = sum;
    for (std::vector<int64_t>& of_part : next) {
      sum += std::exchange(of_part[b], sum);
    }
  }
  dealt.starts[buckets] = sum;
  for_parts([&](int64_t& at, const Item& item) { dealt.items[at++] = item; });
  return dealt;
}

// Calls f(begin, end) for buckets, in parallel.
template <class Item, class F>
void for_buckets(const Dealt<Item>& dealt, F f) {
  const auto buckets = static_cast<int64_t>(dealt.starts.size()) - 1;
  at::parallel_for(0, buckets, grain_of(dealt.starts.back(), buckets), f);
}

// ---- The index.

std::tuple<Tensor, Tensor> columns_of(const Tensor& given, int64_t rows, int64_t columns) {
  const Keys keys(given);
  TORCH_CHECK_VALUE(
      std::min(rows, columns) >= 0 && std::max({rows, columns, keys.count}) <= LARGEST, "int32 cannot count ", rows,
      " rows, ", columns, " columns and ", keys.count, " keys.");
  const Tensor ccol = numbers(columns + 1, given, at::kInt), row = numbers(keys.count, given, at::kInt);
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
  const Places ccol(given_ccol), row(given_row);
  check_starts(ccol, row);
  const Tensor crow = numbers(rows + 1, given_row, at::kInt);
  const Tensor col = numbers(row.count, given_row, at::kInt), order = numbers(row.count, given_row, at::kInt);
  int32_t *crow_to = crow.mutable_data_ptr<int32_t>(), *col_to = col.mutable_data_ptr<int32_t>();
  int32_t* order_to = order.mutable_data_ptr<int32_t>();
  // Neighbouring rows are a bucket.
  struct Number {
    int32_t row, col, order;
  };
  const int shift = std::max(0, static_cast<int>(std::bit_width(static_cast<uint64_t>(rows))) - BUCKET_BITS);
  const auto for_numbers = [&](int64_t begin, int64_t end, auto f) {
    int64_t j = std::upper_bound(ccol.data, ccol.data + ccol.count, begin) - ccol.data - 1;
    for (int64_t n = begin; n < end; ++n) {
      for (; n >= ccol.data[j + 1]; ++j) {
      }
      const int32_t o = row.data[n];
      TORCH_CHECK_VALUE(o >= 0 && o < rows, "row ", o, " is not one of ", rows, ".");
      f(o >> shift, Number{o, static_cast<int32_t>(j), static_cast<int32_t>(n)});
    }
  };
  const Dealt<Number> dealt = deal<Number>(row.count, (rows >> shift) + 1, for_numbers);
  for_buckets(dealt, [&](int64_t begin, int64_t end) {
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
  const Places ccol(given_ccol), row(given_row);
  check_starts(ccol, row);
  const Tensor keys = numbers(row.count, given_row, at::kLong);
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

// ---- Sets of keys.

// Calls f(begin, end, first, last) in parallel: the keys from `begin` to `end`, and the others, from `first` to `last`,
// that come before the next of them. Together they are all.
template <class F>
void for_ranges(const Keys& keys, const Keys& others, F f) {
  const auto start = [&](int64_t n) {
    return n == 0 ? 0 : n == keys.count ? others.count : others.place_of(keys.data[n]);
  };
  at::parallel_for(0, keys.count, GRAIN, [&](int64_t begin, int64_t end) {
    f(begin, end, start(begin), start(end));
  });
}

Tensor replaced(const Tensor& given, const Tensor& given_pruned, const Tensor& given_grown) {
  const Keys keys(given), pruned(given_pruned), grown(given_grown);
  TORCH_CHECK_VALUE(
      pruned.are_sorted() && (!pruned.count || (pruned.data[0] >= 0 && pruned.end()[-1] < keys.count)),
      "what is pruned must be positions of ", keys.count, " keys, in order.");
  TORCH_CHECK_VALUE(grown.are_sorted(), "what is grown must be sorted.");
  const Tensor after = numbers(keys.count - pruned.count + grown.count, given, at::kLong);
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
  const Tensor rest = numbers(keys.count, given, at::kLong);
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
  const int shift = std::max(0, static_cast<int>(std::bit_width(static_cast<uint64_t>(largest))) - BUCKET_BITS);
  const auto for_keys = [&](int64_t begin, int64_t end, auto f) {
    for (int64_t n = begin; n < end; ++n) {
      f(keys.data[n] >> shift, keys.data[n]);
    }
  };
  const Dealt<int64_t> dealt = deal<int64_t>(keys.count, (largest >> shift) + 1, for_keys);
  std::vector<int64_t> counts(dealt.starts.size() - 1);
  for_buckets(dealt, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> spare;
    for (int64_t b = begin; b < end; ++b) {
      int64_t *first = &dealt.items[dealt.starts[b]], *last = &dealt.items[dealt.starts[b + 1]];
      sort_by_digits(first, last, spare, shift);
      counts[b] = std::unique(first, last) - first;
    }
  });
  const Tensor distinct = numbers(std::accumulate(counts.begin(), counts.end(), int64_t(0)), given, at::kLong);
  int64_t* at = distinct.mutable_data_ptr<int64_t>();
  for (size_t b = 0; b < counts.size(); ++b) {
    at = std::copy_n(&dealt.items[dealt.starts[b]], counts[b], at);
  }
  return distinct;
}

// ---- What lies at keys.

// to[m] = from[place[m]], or 0 where that is negative.
template <class Bits>
void gather(const Tensor& from, Tensor& to, int64_t first, const int32_t* place, int64_t count) {
  const Bits* source = static_cast<const Bits*>(from.const_data_ptr());
  Bits* target = static_cast<Bits*>(to.mutable_data_ptr()) + first;
  for (int64_t m = 0; m < count; ++m) {
    target[m] = place[m] < 0 ? Bits(0) : source[place[m]];
  }
}

std::tuple<std::vector<Tensor>, Tensor> carried(const Tensor& given_before, const Tensor& given_after, at::TensorList numbers) {
  const Keys before(given_before), after(given_after);
  TORCH_CHECK_VALUE(before.count <= LARGEST, "int32 cannot count ", before.count, " keys.");
  std::vector<Tensor> from, to;
  for (const Tensor& part : numbers) {
    TORCH_CHECK_VALUE(
        part.dim() == 1 && part.numel() == before.count, "there must be a number for each of ", before.count,
        " keys, got the shape ", part.sizes(), ".");
    TORCH_CHECK_VALUE(part.element_size() <= 8, "numbers of ", part.scalar_type(), " are not carried.");
    from.push_back(part.contiguous());
    to.push_back(fresh({after.count}, part.options()));
  }
  constexpr int64_t TOGETHER = 1024;
  std::atomic<int64_t> stayed = 0;
  at::parallel_for(0, after.count, GRAIN, [&](int64_t begin, int64_t end) {
    std::array<int32_t, TOGETHER> place;
    int64_t found = 0;
    const int64_t* at = before.data + before.place_of(after.data[begin]);
    for (int64_t first = begin; first < end; first += TOGETHER) {
      const int64_t count = std::min(TOGETHER, end - first);
      for (int64_t m = 0; m < count; ++m) {
        const int64_t key = after.data[first + m];
        while (at != before.end() && *at < key) {
          ++at;
        }
        const bool stays = at != before.end() && *at == key;
        place[m] = stays ? static_cast<int32_t>(at - before.data) : -1;
        found += stays;
      }
      for (size_t k = 0; k < from.size(); ++k) {
        const auto size = from[k].element_size();
        const auto take = size == 8 ? gather<uint64_t>
            : size == 4             ? gather<uint32_t>
            : size == 2             ? gather<uint16_t>
                                    : gather<uint8_t>;
        take(from[k], to[k], first, place.data(), count);
      }
    }
    stayed += found;
  });
  return {to, at::full({}, after.count - stayed, given_after.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(rwfx, CPU, m) {
  m.impl("columns_of", columns_of);
  m.impl("rows_of", rows_of);
  m.impl("keys_of", keys_of);
  m.impl("replaced", replaced);
  m.impl("without", without);
  m.impl("distinct_keys", distinct_keys);
  m.impl("carried", carried);
}

}  // namespace rwfx
