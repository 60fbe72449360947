// Sorting by buckets: items are dealt to some hundreds of them, by all threads, and then sorted in each, which fits the
// nearest caches.

#pragma once

#include "keys.h"

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
        const int64_t first = count * part / parts, last = count * (part + 1) / parts;
        for_items(first, last, [&, to = next[part].data()](int64_t bucket, Item item) { f(to[bucket], item); });
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

}  // namespace rwfx
