// Batches as the sparse products read them: (tile, channel, place, lane), see sparse_products.h.
//
// A *strip* is LANES examples of consecutive items (the features of a linear layer, the pixels of an image's line),
// each of which becomes a vector.

#pragma once

#include "vectors.h"

#include <algorithm>
#include <cstdint>

namespace rwfx {

// Where a strip lies in a tensor: `lanes` examples, of which the last tile may have fewer than LANES, or none.
struct Strip {
  int64_t lanes, lane_stride;
  int64_t items, item_stride;
};

// to[item * stride + lane] = from[...], zero for the lanes that are missing.
template <class T>
void pack_strip(const T* from, const Strip& strip, T* to, int64_t stride) {
  constexpr int64_t L = LANES<T>;
  int64_t item = 0;
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
  for (; item < strip.items; ++item) {
    for (int64_t l = 0; l < L; ++l) {
      to[item * stride + l] = l < strip.lanes ? from[l * strip.lane_stride + item * strip.item_stride] : T(0);
    }
  }
}

// The way back; the lanes that are missing are left out.
template <class T>
void unpack_strip(const T* from, int64_t stride, const Strip& strip, T* to) {
  constexpr int64_t L = LANES<T>;
  int64_t item = 0;
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
  for (; item < strip.items; ++item) {
    for (int64_t l = 0; l < strip.lanes; ++l) {
      to[l * strip.lane_stride + item * strip.item_stride] = from[item * stride + l];
    }
  }
}

// A linear layer's batch, (B, features) with any strides: a tile has `places` times LANES examples.
template <class T>
struct Examples {
  T* data;
  int64_t batch, down, across, places;

  // The features from `begin` to `end` of a tile; `packed` is where the first of them lies.
  void pack(int64_t tile, int64_t begin, int64_t end, T* packed) const {
    each_strip(tile, begin, end, [&](T* at, const Strip& strip, int64_t offset) {
      pack_strip(at, strip, packed + offset, places * LANES<T>);
    });
  }
  void unpack(int64_t tile, int64_t begin, int64_t end, const T* packed) const {
    each_strip(tile, begin, end, [&](T* at, const Strip& strip, int64_t offset) {
      unpack_strip(packed + offset, places * LANES<T>, strip, at);
    });
  }

 private:
  template <class F>
  void each_strip(int64_t tile, int64_t begin, int64_t end, F f) const {
    // By few features at a time: what is packed of them stays near until all places have been written.
    constexpr int64_t L = LANES<T>, TOGETHER = 64;
    for (int64_t i = begin; i < end; i += TOGETHER) {
      for (int64_t p = 0; p < places; ++p) {
        const int64_t first = (tile * places + p) * L;
        const Strip strip{std::clamp<int64_t>(batch - first, 0, L), down, std::min(end - i, TOGETHER), across};
        f(data + (strip.lanes ? first * down + i * across : 0), strip, ((i - begin) * places + p) * L);
      }
    }
  }
};

// A convolution's batch, (B, C, H, W) with any strides: a tile has LANES images, with `above` and `left` places of
// padding on both sides of each.
template <class T>
struct Images {
  T* data;
  int64_t batch, height, width;
  int64_t strides[4];
  int64_t above, left;

  void pack(int64_t tile, int64_t begin, int64_t end, T* packed) const {
    const int64_t plane = (height + 2 * above) * (width + 2 * left) * LANES<T>;
    if (above || left) {
      std::fill(packed, packed + (end - begin) * plane, T(0));
    }
    each_strip(tile, begin, end, [&](T* at, const Strip& strip, int64_t offset) {
      pack_strip(at, strip, packed + offset, LANES<T>);
    });
  }
  void unpack(int64_t tile, int64_t begin, int64_t end, const T* packed) const {
    each_strip(tile, begin, end, [&](T* at, const Strip& strip, int64_t offset) {
      unpack_strip(packed + offset, LANES<T>, strip, at);
    });
  }

 private:
  template <class F>
  void each_strip(int64_t tile, int64_t begin, int64_t end, F f) const {
    constexpr int64_t L = LANES<T>;
    const int64_t line = width + 2 * left, lanes = std::clamp<int64_t>(batch - tile * L, 0, L);
    // Without padding the lines of an image that lie one after the other are one strip.
    const bool whole = !above && !left && strides[2] == width * strides[3];
    const int64_t lines = whole ? 1 : height, items = whole ? height * width : width;
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t h = 0; h < lines; ++h) {
        T* at = data + (lanes ? tile * L * strides[0] + c * strides[1] + h * strides[2] : 0);
        f(at, {lanes, strides[0], items, strides[3]}, (((c - begin) * (height + 2 * above) + h + above) * line + left) * L);
      }
    }
  }
};

}  // namespace rwfx
