// Products with the non-zeros of a weight, for a batch that is packed.
//
// An output is the sum of few terms: a number of the weight times a number of the input, for each example. So examples
// lie side by side, in vectors, and one non-zero serves a BLOCK of vectors at once. A batch is packed as
//
//     (tile, channel, place, lane)
//
// A lane is an example. A place is a pixel of LANES examples, with the padding around; of a linear layer, which has no
// pixels, LANES more examples. So a linear layer is a convolution with a kernel of one, and both have one kernel here.
//
// The backward pass is one sweep over the columns: while a block of x and of dx is in registers, each non-zero of the
// column reads a block of g once, for both products.
//
// Axes, in the order of a name's letters: N non-zeros, O rows, I columns, P places.

#pragma once

#include "memory.h"
#include "vectors.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace rwfx {

// Vectors that one non-zero serves: as many as there are registers to add up in, or of a linear layer more. Its input is
// larger than the nearest caches, and to come by it less often is worth a few sums that are kept in memory.
constexpr int BLOCK = 8, WIDE_BLOCK = 16;
// Bytes of a linear layer's input, or in the backward pass of the output's gradient, that are packed at once.
constexpr int64_t MOST_BYTES = 1 << 23;
// How many features of a linear layer are packed or handed on at once on the other side, which is passed in order.
constexpr int64_t PIECE = 64;
// How many vectors before its turn a block of a linear layer is fetched: what is on its way at once, in lines of a cache,
// is the same for blocks of all sizes.
constexpr int32_t AHEAD = 160;

template <int NUMBER, class T>
void fetch(const T* block) {
  for (int64_t line = 0; line < NUMBER * VECTOR_BYTES; line += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(block) + line);
  }
}

// Where a product reads and writes. Offsets and strides count numbers.
struct Plan {
  int64_t tiles;
  int64_t channels, rows, groups;
  int64_t in_places, out_places;  // of a channel, of a row
  int64_t kernel;  // columns of a channel
  bool each_once;  // every place of the input is read at one place of the output for each column, and no other
  std::vector<int64_t> in_place;  // (P,): of an output's place, where the first place of the kernel lies
  std::vector<int64_t> in_offset;  // (I,): from there to what a column of the first group reads

  int64_t columns() const {
    return static_cast<int64_t>(in_offset.size());
  }
  int64_t rows_of_group() const {
    return rows / groups;
  }
};

// The places of a weight's numbers: rwfx/nonzeros.py.
struct Places {
  const int32_t *ccol, *row, *crow, *col, *order;
};

template <class T>
int64_t in_tile(const Plan& plan) {
  return plan.channels * plan.in_places * LANES<T>;
}
template <class T>
int64_t out_tile(const Plan& plan) {
  return plan.rows * plan.out_places * LANES<T>;
}
template <class T>
int64_t group_offset(const Plan& plan) {
  return plan.channels / plan.groups * plan.in_places * LANES<T>;
}

// Calls f(first, number) for the blocks that all places are divided into: the widest first, of 4, 2, 1 at the end.
template <class F>
void for_blocks(const Plan& plan, F f) {
  int64_t p = 0;
  const auto take = [&](auto number) {
    for (; p + number <= plan.out_places; p += number) {
      f(p, number);
    }
  };
  if (plan.each_once) {
    take(std::integral_constant<int, WIDE_BLOCK>());
  }
  take(std::integral_constant<int, BLOCK>());
  take(std::integral_constant<int, 4>());
  take(std::integral_constant<int, 2>());
  take(std::integral_constant<int, 1>());
}

// Whether the places of a block lie one after the other in the input.
template <class T, int NUMBER>
bool is_contiguous(const Plan& plan, int64_t first) {
  const int64_t* at = plan.in_place.data() + first;
  for (int i = 1; i < NUMBER; ++i) {
    if (at[i] != at[i - 1] + LANES<T>) {
      return false;
    }
  }
  return true;
}

// A block of the input, where its places lie.
template <class T, int NUMBER, bool CONTIGUOUS>
struct Block {
  T* base[CONTIGUOUS ? 1 : NUMBER];

  Block(const Plan& plan, T* tile, int64_t first) {
    for (int i = 0; i < (CONTIGUOUS ? 1 : NUMBER); ++i) {
      base[i] = tile + plan.in_place[first + i];
    }
  }
  T* at(int i, int64_t offset) const {
    return CONTIGUOUS ? base[0] + offset + i * LANES<std::remove_const_t<T>> : base[i] + offset;
  }
};

// y[o] = bias[o] + sum over the row of values * x, for a block and the rows from `begin`, which lies at `y`, to `end`.
// `values` are by rows.
template <class T, int NUMBER, bool CONTIGUOUS>
void forward_block(
    const Plan& plan, const Places& at, const T* values, const T* bias, const T* x, T* y, int64_t first,
    int64_t begin, int64_t end) {
  constexpr int64_t L = LANES<T>;
  const Block<const T, NUMBER, CONTIGUOUS> block(plan, x, first);
  const int64_t* in_offset = plan.in_offset.data();
  const int32_t nnz = at.crow[plan.rows];
  for (int64_t o = begin; o < end; ++o) {
    Vector<T> sum[NUMBER];
    for (int i = 0; i < NUMBER; ++i) {
      sum[i] = Vector<T>{} + (bias ? bias[o] : T(0));
    }
    const int64_t group = plan.groups == 1 ? 0 : o / plan.rows_of_group() * group_offset<T>(plan);
    for (int32_t n = at.crow[o]; n < at.crow[o + 1]; ++n) {
      const T value = values[n];
      const int64_t offset = in_offset[at.col[n]] + group;
      if (plan.each_once && n + AHEAD / NUMBER < nnz) {
        fetch<NUMBER>(block.at(0, in_offset[at.col[n + AHEAD / NUMBER]]));
      }
      for (int i = 0; i < NUMBER; ++i) {
        sum[i] += value * load(block.at(i, offset));
      }
    }
    T* to = y + ((o - begin) * plan.out_places + first) * L;
    for (int i = 0; i < NUMBER; ++i) {
      store(to + i * L, sum[i]);
    }
  }
}

// dx += values * g and dv += sum of g * x, for a block and the columns from `begin` to `end`; what column `origin` reads
// of the first group lies at `x` and `dx`.
template <class T, int NUMBER, bool CONTIGUOUS, bool DX, bool DV>
void backward_block(
    const Plan& plan, const Places& at, const T* values, const T* x, const T* g, T* dx, T* dv, int64_t first,
    int64_t origin, int64_t begin, int64_t end) {
  constexpr int64_t L = LANES<T>;
  const Block<const T, NUMBER, CONTIGUOUS> x_block(plan, x, first);
  const Block<T, NUMBER, CONTIGUOUS> dx_block(plan, dx, DX ? first : 0);
  const int64_t g_row = plan.out_places * L, per_group = plan.rows_of_group();
  const int32_t nnz = at.ccol[plan.columns()];
  g += first * L;
  for (int64_t j = begin; j < end; ++j) {
    int32_t n = at.ccol[j];
    const int32_t last = at.ccol[j + 1];
    do {
      // Sorted by rows, those of a group lie together.
      const int64_t group = plan.groups == 1 || n == last ? 0 : at.row[n] / per_group;
      const int64_t offset = plan.in_offset[j] - plan.in_offset[origin] + group * group_offset<T>(plan);
      const int64_t bound = (group + 1) * per_group;
      Vector<T> in[NUMBER], to[NUMBER];
      for (int i = 0; i < NUMBER; ++i) {
        if constexpr (DV) {
          in[i] = load(x_block.at(i, offset));
        }
        if constexpr (DX) {
          to[i] = plan.each_once ? Vector<T>{} : load(dx_block.at(i, offset));
        }
      }
      for (; n < last && at.row[n] < bound; ++n) {
        const T value = DX ? values[n] : T(0);
        const T* from = g + at.row[n] * g_row;
        if (plan.each_once && n + AHEAD / NUMBER < nnz) {
          fetch<NUMBER>(g + at.row[n + AHEAD / NUMBER] * g_row);
        }
        Vector<T> sum[2] = {Vector<T>{}, Vector<T>{}};
        for (int i = 0; i < NUMBER; ++i) {
          const Vector<T> of_g = load(from + i * L);
          if constexpr (DX) {
            to[i] += value * of_g;
          }
          if constexpr (DV) {
            sum[i % 2] += in[i] * of_g;
          }
        }
        if constexpr (DV) {
          dv[n] += sum_of<T>(sum[0] + sum[1]);
        }
      }
      if constexpr (DX) {
        for (int i = 0; i < NUMBER; ++i) {
          store(dx_block.at(i, offset), to[i]);
        }
      }
    } while (n < last);
  }
}

// Where `parts` equal shares of the non-zeros begin, in steps of `step` of what `starts` counts.
inline std::vector<int64_t> shares(const int32_t* starts, int64_t size, int64_t step, int64_t parts) {
  std::vector<int64_t> bounds(parts + 1, size);
  bounds[0] = 0;
  for (int64_t k = 1; k < parts; ++k) {
    const int64_t wanted = static_cast<int64_t>(starts[size]) * k / parts;
    const int64_t found = std::lower_bound(starts, starts + size, wanted) - starts;
    bounds[k] = std::max(bounds[k - 1], std::min(size, found / step * step));
  }
  return bounds;
}

// Whether threads take tiles each for itself: else they share every tile's rows or columns. A linear layer's tiles, of
// `size` numbers each, are read in no order: then those of all threads together may be as large as one.
template <class T>
bool by_tiles(const Plan& plan, int64_t size) {
  const int64_t threads = at::get_num_threads(), bytes = threads * size * static_cast<int64_t>(sizeof(T));
  return plan.tiles >= 2 * threads && (!plan.each_once || bytes <= MOST_BYTES);
}

// Calls f(first channel, last channel) in parallel.
template <class T, class F>
void for_channels(int64_t channels, int64_t places, F f) {
  constexpr int64_t TOGETHER = 16;  // features of an example that share a line of the cache
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / (TOGETHER * places * LANES<T>));
  at::parallel_for(0, (channels + TOGETHER - 1) / TOGETHER, grain, [&](int64_t begin, int64_t end) {
    f(begin * TOGETHER, std::min(channels, end * TOGETHER));
  });
}

// Not inlined, nor is backward_tile: every kind of batch would compile it again.
template <class T>
[[gnu::noinline]] void forward_tile(
    const Plan& plan, const Places& at, const T* values, const T* bias, const T* x, T* y, int64_t begin, int64_t end) {
  for_blocks(plan, [&](int64_t first, auto number) {
    constexpr int NUMBER = decltype(number)::value;
    const auto block = is_contiguous<T, NUMBER>(plan, first) ? forward_block<T, NUMBER, true>
                                                             : forward_block<T, NUMBER, false>;
    block(plan, at, values, bias, x, y, first, begin, end);
  });
}

// The same, handed on to a batch; `y` has room for as many rows as are handed on at once.
template <class T, class Out>
void forward_rows(
    const Plan& plan, const Places& at, const T* values, const T* bias, const T* x, T* y, const Out& out, int64_t tile,
    int64_t begin, int64_t end) {
  const int64_t step = plan.each_once ? PIECE : std::max<int64_t>(1, end - begin);
  for (int64_t o = begin; o < end; o += step) {
    const int64_t last = std::min(end, o + step);
    forward_tile<T>(plan, at, values, bias, x, y, o, last);
    out.unpack(tile, o, last, y);
  }
}

// y = W x + bias; `in` and `out` are batches of packing.h.
template <class T, class In, class Out>
void forward(const Plan& plan, const Places& at, const T* values, const T* bias, const In& in, const Out& out) {
  const int64_t threads = at::get_num_threads(), nnz = at.crow[plan.rows];
  const int64_t x_size = in_tile<T>(plan), row = plan.out_places * LANES<T>;
  // By rows, once: every tile reads them one after the other then.
  const at::Tensor memory = fresh({nnz}, c10::CppTypeToScalarType<T>::value);
  T* by_rows = memory.mutable_data_ptr<T>();
  at::parallel_for(0, nnz, 1 << 14, [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n) {
      by_rows[n] = values[at.order[n]];
    }
  });
  values = by_rows;
  if (by_tiles<T>(plan, x_size)) {
    at::parallel_for(0, plan.tiles, 1, [&](int64_t from, int64_t to) {
      Scratch<T> scratch(x_size + (plan.each_once ? PIECE : plan.rows) * row);
      T *x = scratch.data(), *y = x + x_size;
      for (int64_t t = from; t < to; ++t) {
        in.pack(t, 0, plan.channels, x);
        forward_rows<T>(plan, at, values, bias, x, y, out, t, 0, plan.rows);
      }
    });
    return;
  }
  Scratch<T> scratch(x_size + (plan.each_once ? threads * PIECE : plan.rows) * row);
  T *x = scratch.data(), *y = x + x_size;
  const std::vector<int64_t> bounds = shares(at.crow, plan.rows, 1, threads);
  for (int64_t t = 0; t < plan.tiles; ++t) {
    for_channels<T>(plan.channels, plan.in_places, [&](int64_t begin, int64_t end) {
      in.pack(t, begin, end, x + begin * plan.in_places * LANES<T>);
    });
    at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
      for (int64_t k = from; k < to; ++k) {
        T* own = y + (plan.each_once ? k * PIECE : bounds[k]) * row;
        forward_rows<T>(plan, at, values, bias, x, own, out, t, bounds[k], bounds[k + 1]);
      }
    });
  }
}

template <class T, bool DX, bool DV>
[[gnu::noinline]] void backward_tile(
    const Plan& plan, const Places& at, const T* values, const T* x, const T* g, T* dx, T* dv, int64_t origin,
    int64_t begin, int64_t end) {
  // A channel's columns one after the other, so that its input and its gradient stay near.
  const int64_t step = std::max<int64_t>(1, plan.kernel > 1 ? plan.kernel : end - begin);
  for (int64_t j = begin; j < end; j += step) {
    for_blocks(plan, [&](int64_t first, auto number) {
      constexpr int NUMBER = decltype(number)::value;
      const auto block = is_contiguous<T, NUMBER>(plan, first) ? backward_block<T, NUMBER, true, DX, DV>
                                                               : backward_block<T, NUMBER, false, DX, DV>;
      block(plan, at, values, x, g, dx, dv, first, origin, j, std::min(end, j + step));
    });
  }
}

// The same, with the input from a batch and its gradient handed on to one: of a linear layer as the columns are passed,
// `x` and `dx` having room for PIECE of them, else all columns at once.
template <class T, bool DX, bool DV, class In, class Out>
void backward_columns(
    const Plan& plan, const Places& at, const T* values, const In& in, T* x, const T* g, T* dx, const Out& out, T* dv,
    int64_t tile, int64_t begin, int64_t end) {
  const int64_t step = plan.each_once ? PIECE : std::max<int64_t>(1, end - begin);
  for (int64_t j = begin; j < end; j += step) {
    const int64_t last = std::min(end, j + step);
    const int64_t channel = plan.each_once ? j : 0, last_channel = plan.each_once ? last : plan.channels;
    if constexpr (DV) {
      in.pack(tile, channel, last_channel, x);
    }
    if (DX && !plan.each_once) {
      std::fill(dx, dx + in_tile<T>(plan), T(0));
    }
    backward_tile<T, DX, DV>(plan, at, values, x, g, dx, dv, j, j, last);
    if constexpr (DX) {
      out.unpack(tile, channel, last_channel, dx);
    }
  }
}

// dx = W^T g, and dv, which holds zeros before: the sum of g x at the places of the numbers.
template <class T, bool DX, bool DV, class In, class Grad, class Out>
void backward(
    const Plan& plan, const Places& at, const T* values, const In& in, const Grad& grad, const Out& out, T* dv) {
  const int64_t threads = at::get_num_threads(), columns = plan.columns(), nnz = at.ccol[columns];
  const int64_t channel = plan.in_places * LANES<T>, g_size = out_tile<T>(plan);
  if (by_tiles<T>(plan, g_size)) {
    const int64_t x_size = (plan.each_once ? PIECE : plan.channels) * channel;
    std::vector<std::vector<T>> sums(DV ? threads : 0);
    at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
      Scratch<T> scratch(g_size + x_size + (DX ? x_size : 0));
      T *g = scratch.data(), *x = g + g_size, *dx = DX ? x + x_size : nullptr;
      for (int64_t part = from; part < to; ++part) {
        if constexpr (DV) {
          sums[part].assign(nnz, T(0));
        }
        T* sum = DV ? sums[part].data() : nullptr;
        for (int64_t t = plan.tiles * part / threads; t < plan.tiles * (part + 1) / threads; ++t) {
          grad.pack(t, 0, plan.rows, g);
          backward_columns<T, DX, DV>(plan, at, values, in, x, g, dx, out, sum, t, 0, columns);
        }
      }
    });
    for (const std::vector<T>& sum : sums) {
      for (int64_t n = 0; n < nnz; ++n) {
        dv[n] += sum[n];
      }
    }
    return;
  }
  const int64_t x_size = (plan.each_once ? threads * PIECE : plan.channels) * channel;
  Scratch<T> scratch(g_size + x_size + (DX ? x_size : 0));
  T *g = scratch.data(), *x = g + g_size, *dx = DX ? x + x_size : nullptr;
  // The columns of one channel write to the same places of dx.
  const std::vector<int64_t> bounds = shares(at.ccol, columns, DX ? plan.kernel : 1, threads);
  for (int64_t t = 0; t < plan.tiles; ++t) {
    for_channels<T>(plan.rows, plan.out_places, [&](int64_t begin, int64_t end) {
      grad.pack(t, begin, end, g + begin * plan.out_places * LANES<T>);
    });
    if (!plan.each_once) {
      for_channels<T>(plan.channels, plan.in_places, [&](int64_t begin, int64_t end) {
        if constexpr (DV) {
          in.pack(t, begin, end, x + begin * channel);
        }
        if constexpr (DX) {
          std::fill(dx + begin * channel, dx + end * channel, T(0));
        }
      });
    }
    at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
      for (int64_t k = from; k < to; ++k) {
        if (plan.each_once) {
          const int64_t own = k * PIECE * channel;
          backward_columns<T, DX, DV>(
              plan, at, values, in, x + own, g, DX ? dx + own : nullptr, out, dv, t, bounds[k], bounds[k + 1]);
          continue;
        }
        backward_tile<T, DX, DV>(plan, at, values, x, g, dx, dv, 0, bounds[k], bounds[k + 1]);
        if (DX && plan.groups == 1) {
          const int64_t first = bounds[k] / plan.kernel;
          out.unpack(t, first, bounds[k + 1] / plan.kernel, dx + first * channel);
        }
      }
    });
    if (DX && plan.groups > 1) {  // a column belongs to a channel of every group
      out.unpack(t, 0, plan.channels, dx);
    }
  }
}

}  // namespace rwfx
