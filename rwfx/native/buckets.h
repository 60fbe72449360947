// Sorting by buckets: items are dealt to some hundreds of them, by all threads, and then sorted in each, which fits the
// nearest caches.

#pragma once

#include "keys.h"
#include "memory.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <utility>
#include <vector>

namespace rwfx {

// To more buckets than these is not dealt: each is written to at its own place.
constexpr int BUCKET_BITS = 9;

// How far numbers up to `largest` are shifted to be buckets.
inline int bucket_shift(int64_t largest) {
  return std::max(0, static_cast<int>(std::bit_width(static_cast<uint64_t>(largest))) - BUCKET_BITS);
}

// Items, dealt: those of bucket b lie from starts[b] to starts[b + 1], in the order they had.
template <class Item>
class Buckets {
 public:
  // for_items(begin, end, f) calls f(bucket, item) for those from `begin` to `end` of `count`.
  template <class ForItems>
  Buckets(int64_t count, int64_t buckets, const ForItems& for_items)
      : memory_(count), items(memory_.data()), starts(buckets + 1) {
    const int64_t parts = at::get_num_threads();
    std::vector<std::vector<int64_t>> next(parts, std::vector<int64_t>(buckets, 0));
    const auto for_parts = [&](auto f) {
      at::parallel_for(0, parts, grain_of(count, parts), [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
          const int64_t first = count * part / parts, last = count * (part + 1) / parts;
          for_items(first, last, [&, to = next[part].data()](int64_t bucket, Item item) { f(to[bucket], item); });
        }
      });
    };
    for_parts([](int64_t& number, const Item&) { ++number; });
    int64_t sum = 0;
    for (int64_t b = 0; b < buckets; ++b) {
      starts[b] = sum;
      for (std::vector<int64_t>& of_part : next) {
        sum += std::exchange(of_part[b], sum);
      }
    }
    starts[buckets] = sum;
    for_parts([&](int64_t& at, const Item& item) { items[at++] = item; });
  }

  // Calls f(begin, end) for buckets, in parallel.
  template <class F>
  void for_each(F f) const {
    const auto buckets = static_cast<int64_t>(starts.size()) - 1;
    at::parallel_for(0, buckets, grain_of(starts.back(), buckets), f);
  }

 private:
  Scratch<Item> memory_;

 public:
  Item* const items;
  std::vector<int64_t> starts;
};

}  // namespace rwfx
