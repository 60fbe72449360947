// Batches as the sparse products read them: (tile, channel, place, lane), see sparse_products.h.
//
// A *strip* is LANES examples of consecutive items (the features of a linear layer, the pixels of an image's line),
// each of which becomes a vector.

#pragma once

#include "vectors.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace rwfx {

// Where a strip lies in a tensor: `lanes` examples, of which the last tile may have fewer than LANES, or none.
struct Strip {
  int64_t lanes, lane_stride;
  int64_t items, item_stride;
};

// to[item * stride + lane] = from[...], zero for the lanes that are missing.
template <class T, class S>
void pack_strip(const S* from, const Strip& strip, T* to, int64_t stride) {
  constexpr int64_t L = LANES<T>;
  int64_t item = 0;
  if constexpr (std::is_same_v<T, S>) {
    if (strip.lanes == L && strip.lane_stride == 1) {
      for (; item < strip.items; ++item) {
        store(to + item * stride, load(from + item * strip.item_stride));
      }
    } else if (strip.lanes == L && strip.item_stride == 1) {
      for (; item + L <= strip.items; item += L) {
        Vector<T> rows[L];
        for (int64_t l = 0; l < L; ++l) {
          rows[l] = load(from + l * strip.lane_stride + item);
        }
        transpose<T>(rows);
        for (int64_t i = 0; i < L; ++i) {
          store(to + (item + i) * stride, rows[i]);
        }
      }
    }
  }
  for (; item < strip.items; ++item) {
    for (int64_t l = 0; l < L; ++l) {
      const S* at = from + l * strip.lane_stride + item * strip.item_stride;
      to[item * stride + l] = l < strip.lanes ? static_cast<T>(*at) : T(0);
    }
  }
}

// The way back; the lanes that are missing are left out.
template <class T, class S>
void unpack_strip(const T* from, int64_t stride, const Strip& strip, S* to) {
  constexpr int64_t L = LANES<T>;
  int64_t item = 0;
  if constexpr (std::is_same_v<T, S>) {
    if (strip.lanes == L && strip.lane_stride == 1) {
      for (; item < strip.items; ++item) {
        store(to + item * strip.item_stride, load(from + item * stride));
      }
    } else if (strip.lanes == L && strip.item_stride == 1) {
      for (; item + L <= strip.items; item += L) {
        Vector<T> rows[L];
        for (int64_t i = 0; i < L; ++i) {
          rows[i] = load(from + (item + i) * stride);
        }
        transpose<T>(rows);
        for (int64_t l = 0; l < L; ++l) {
          store(to + l * strip.lane_stride + item, rows[l]);
        }
      }
    }
  }
  for (; item < strip.items; ++item) {
    for (int64_t l = 0; l < strip.lanes; ++l) {
      to[l * strip.lane_stride + item * strip.item_stride] = static_cast<S>(from[item * stride + l]);
    }
  }
}

// A linear layer's batch, (B, features) with any strides: a tile has `places` times LANES examples.
template <class S>
struct Examples {
  S* data;
  int64_t batch, down, across, places;

  // The features from `begin` to `end` of a tile, whose first is at `tile_data`.
  template <class T>
  void pack(int64_t tile, int64_t begin, int64_t end, T* tile_data) const {
    each_strip<T>(tile, begin, end, [&](S* at, const Strip& strip, int64_t offset) {
      pack_strip<T>(at, strip, tile_data + offset, places * LANES<T>);
    });
  }
  template <class T>
  void unpack(int64_t tile, int64_t begin, int64_t end, const T* tile_data) const {
    each_strip<T>(tile, begin, end, [&](S* at, const Strip& strip, int64_t offset) {
      unpack_strip<T>(tile_data + offset, places * LANES<T>, strip, at);
    });
  }

 private:
  template <class T, class F>
  void each_strip(int64_t tile, int64_t begin, int64_t end, F f) const {
    constexpr int64_t L = LANES<T>;
    for (int64_t p = 0; p < places; ++p) {
      const int64_t first = (tile * places + p) * L;
      const Strip strip{std::clamp<int64_t>(batch - first, 0, L), down, end - begin, across};
      f(data + (strip.lanes ? first * down + begin * across : 0), strip, (begin * places + p) * L);
    }
  }
};

// A convolution's batch, (B, C, H, W) with any strides: a tile has LANES images, with `above` and `left` places of
// padding on both sides of each.
template <class S>
struct Images {
  S* data;
  int64_t batch, height, width;
  int64_t strides[4];
  int64_t above, left;

  template <class T>
  void pack(int64_t tile, int64_t begin, int64_t end, T* tile_data) const {
    const int64_t plane = (height + 2 * above) * (width + 2 * left) * LANES<T>;
    if (above || left) {
      std::fill(tile_data + begin * plane, tile_data + end * plane, T(0));
    }
    each_strip<T>(tile, begin, end, [&](S* at, const Strip& strip, int64_t offset) {
      pack_strip<T>(at, strip, tile_data + offset, LANES<T>);
    });
  }
  template <class T>
  void unpack(int64_t tile, int64_t begin, int64_t end, const T* tile_data) const {
    each_strip<T>(tile, begin, end, [&](S* at, const Strip& strip, int64_t offset) {
      unpack_strip<T>(tile_data + offset, LANES<T>, strip, at);
    });
  }

 private:
  template <class T, class F>
  void each_strip(int64_t tile, int64_t begin, int64_t end, F f) const {
    constexpr int64_t L = LANES<T>;
    const int64_t line = width + 2 * left, lanes = std::clamp<int64_t>(batch - tile * L, 0, L);
    // Without padding the lines of an image that lie one after the other are one strip.
    const bool whole = !above && !left && strides[2] == width * strides[3];
    const int64_t lines = whole ? 1 : height, items = whole ? height * width : width;
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t h = 0; h < lines; ++h) {
        S* at = data + (lanes ? tile * L * strides[0] + c * strides[1] + h * strides[2] : 0);
        f(at, {lanes, strides[0], items, strides[3]}, ((c * (height + 2 * above) + h + above) * line + left) * L);
      }
    }
  }
};

}  // namespace rwfx
