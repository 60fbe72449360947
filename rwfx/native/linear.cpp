// rwfx::row_linear on the CPU: its autograd, and its backward as one operator, rwfx::row_linear_backward.
//
// The equations are those of rwfx/ops/linear.py, in the same letters. The products are PyTorch's own; around them, the
// rows and columns are gathered and scattered in one pass each, and a set of all rows is not gathered at all. So are
// rwfx::observe_, rwfx::top_rows and rwfx::record_ of rwfx/ops/observe.py, which that backward calls first.

#include "rows.h"

#include <ATen/ops/_sparse_coo_tensor_unsafe.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

namespace rwfx {
namespace {

using at::Tensor;
using std::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Above this share of columns, to gather and scatter them costs more than the rest of the product.
constexpr double MOST_COLUMNS = 0.7;

// x[places][:, columns] of a (B, O) with any strides, all places where none are given: (B, K), stored by columns where
// `by_columns` says so or x is.
Tensor gather_columns(
    const Tensor& x, const Tensor& columns, bool by_columns = false, const optional<Tensor>& places = {}) {
  const int64_t count = columns.numel(), down = x.stride(0), across = x.stride(1);
  const int64_t batch = places ? places->numel() : x.size(0);
  const int64_t* at = columns.const_data_ptr<int64_t>();
  const int64_t* place = places ? places->const_data_ptr<int64_t>() : nullptr;
  by_columns = by_columns || (down == 1 && across != 1);
  Tensor out = by_columns ? at::empty({count, batch}, x.options()).t() : at::empty({batch, count}, x.options());
  RWFX_DISPATCH(x.scalar_type(), "rwfx::gather_columns", [&] {
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    if (down == 1) {
      at::parallel_for(0, count, grain(batch), [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
          for (int64_t b = 0; b < batch; ++b) {
            to[by_columns ? k * batch + b : b * count + k] = from[at[k] * across + (place ? place[b] : b)];
          }
        }
      });
      return;
    }
    at::parallel_for(0, batch, grain(count), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const scalar_t* row = from + (place ? place[b] : b) * down;
        for (int64_t k = 0; k < count; ++k) {
          to[by_columns ? k * batch + b : b * count + k] = row[at[k] * across];
        }
      }
    });
  });
  return out;
}

// w[rows], and of these the columns given: (K, I) or (K, C).
Tensor gather_rows(const Tensor& w, const Tensor& rows, const optional<Tensor>& columns) {
  const int64_t count = rows.numel(), width = w.size(1), down = w.stride(0), across = w.stride(1);
  const int64_t* row_at = rows.const_data_ptr<int64_t>();
  const int64_t* at = columns ? columns->const_data_ptr<int64_t>() : nullptr;
  const int64_t taken = columns ? columns->numel() : width;
  Tensor out = at::empty({count, taken}, w.options());
  RWFX_DISPATCH(w.scalar_type(), "rwfx::gather_rows", [&] {
    const scalar_t* from = w.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, count, grain(taken), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const scalar_t* row = from + row_at[k] * down;
        if (at == nullptr && across == 1) {
          std::memcpy(to + k * taken, row, taken * sizeof(scalar_t));
          continue;
        }
        for (int64_t c = 0; c < taken; ++c) {
          to[k * taken + c] = row[(at ? at[c] : c) * across];
        }
      }
    });
  });
  return out;
}

// Whether a weight is the transpose of how it is stored, as Hugging Face's Conv1D has it.
bool is_by_columns(const Tensor& w) {
  return w.sym_stride(0) == 1 && w.sym_stride(1) != 1;
}

// w[rows], and of these the columns given, of a weight (O, I) that is stored either way: read where its numbers are
// beside each other.
Tensor gather_weight(const Tensor& w, const Tensor& rows, const optional<Tensor>& columns = {}) {
  return is_by_columns(w) ? gather_columns(w.t(), rows, false, columns).t() : gather_rows(w, rows, columns);
}

// A (B, I) that is x (B, C) in the columns given and zero elsewhere; with places it has `batch` of them, and all columns
// where none are given.
Tensor scatter_columns(
    const Tensor& given, const optional<Tensor>& columns, int64_t width, const optional<Tensor>& places, int64_t batch) {
  const Tensor x = given.contiguous();
  const int64_t count = x.size(1);
  const int64_t* at = columns ? columns->const_data_ptr<int64_t>() : nullptr;
  const int64_t* place = places ? places->const_data_ptr<int64_t>() : nullptr;
  Tensor out = places ? at::zeros({batch, width}, x.options()) : at::empty({batch, width}, x.options());
  RWFX_DISPATCH(x.scalar_type(), "rwfx::scatter_columns", [&] {
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, x.size(0), grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        scalar_t* row = to + (place ? place[b] : b) * width;
        if (!columns) {  // not by `at`, which is null for an empty set too
          std::memcpy(row, from + b * count, count * sizeof(scalar_t));
          continue;
        }
        if (place == nullptr) {
          std::memset(row, 0, width * sizeof(scalar_t));
        }
        for (int64_t c = 0; c < count; ++c) {
          row[at[c]] = from[b * count + c];
        }
      }
    });
  });
  return out;
}

// An unwritten (B, I), of which a call with `packed` reads the very front alone; somebody who looks for numbers that are
// not finite reads all of it.
Tensor unwritten(int64_t batch, int64_t width, const at::TensorOptions& options) {
  const bool looked_at = torch::autograd::AnomalyMode::is_enabled();
  return looked_at ? at::zeros({batch, width}, options) : at::empty({batch, width}, options);
}

// The places of the examples among `batch`, of which each has as many.
Tensor places_of(const Tensor& examples, int64_t num_examples, int64_t batch) {
  const Tensor kept = examples.contiguous();
  const int64_t count = kept.numel(), each = num_examples ? batch / num_examples : 0;
  const int64_t* from = kept.const_data_ptr<int64_t>();
  Tensor places = at::empty({count * each}, kept.options());
  int64_t* to = places.mutable_data_ptr<int64_t>();
  for (int64_t e = 0; e < count; ++e) {
    TORCH_CHECK_INDEX(
        0 <= from[e] && from[e] < num_examples, "example ", from[e], " of ", num_examples,
        ": a gradient came to a weight without passing the model's outputs, which decide about the examples.");
    for (int64_t k = 0; k < each; ++k) {
      *to++ = from[e] * each + k;
    }
  }
  return places;
}

// As scatter_columns, of an x that is stored by columns; so is the result. The other columns are not even written, for
// nothing reads them, but where somebody looks for numbers that are not finite.
Tensor scatter_by_columns(const Tensor& x, const Tensor& columns, int64_t width) {
  const int64_t count = columns.numel(), batch = x.size(0), bytes = batch * x.element_size();
  const int64_t* at = columns.const_data_ptr<int64_t>();
  const bool looked_at = torch::autograd::AnomalyMode::is_enabled();
  Tensor out = (looked_at ? at::zeros({width, batch}, x.options()) : at::empty({width, batch}, x.options())).t();
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t c = 0; c < count; ++c) {
    std::memcpy(to + at[c] * bytes, from + c * bytes, bytes);
  }
  return out;
}

// A (O, ...) that is `values` (K, ...) in the rows given and zero elsewhere.
Tensor scatter_rows(const Tensor& values, const Tensor& rows, int64_t num_rows) {
  auto sizes = values.sizes().vec();
  sizes[0] = num_rows;
  Tensor out = at::zeros(sizes, values.options());
  const int64_t each = values.numel() / std::max<int64_t>(1, rows.numel()) * values.element_size();
  const int64_t* at = rows.const_data_ptr<int64_t>();
  const char* from = static_cast<const char*>(values.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  at::parallel_for(0, rows.numel(), grain(each / 4), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      std::memcpy(to + at[k] * each, from + k * each, each);
    }
  });
  return out;
}

// A row gradient: see rwfx/ops/row_gradient.py. `values` is taken over; `rows` is copied.
Tensor pack(const Tensor& values, const Tensor& rows, int64_t num_rows) {
  auto sizes = values.sizes().vec();
  sizes[0] = num_rows;
  return at::_sparse_coo_tensor_unsafe(rows.clone().unsqueeze(0), values, sizes, values.options(), true);
}

// The magnitudes of the columns of x (..., O), all or those given: (K,) float32. They are added up in an order that is
// the same for every column, so that equal columns have equal magnitudes; and in blocks of the batch, as a long sum of
// small numbers loses them.
Tensor magnitudes(const Tensor& x, const optional<Tensor>& columns) {
  constexpr int64_t TILE = 256, BLOCK = 512, LANES = 32;
  const Tensor x_BO = x.reshape({-1, x.size(-1)});
  const int64_t batch = x_BO.size(0), down = x_BO.stride(0), across = x_BO.stride(1);
  const int64_t count = columns ? columns->numel() : x_BO.size(1);
  const int64_t* at = columns ? columns->const_data_ptr<int64_t>() : nullptr;
  Tensor out = at::empty({count}, x.options().dtype(at::kFloat));
  float* to = out.mutable_data_ptr<float>();
  RWFX_DISPATCH(x.scalar_type(), "rwfx::magnitudes", [&] {
    const scalar_t* from = x_BO.const_data_ptr<scalar_t>();
    const auto column = [&](int64_t k) { return (at ? at[k] : k) * across; };
    const auto size = [](scalar_t number) { return std::abs(static_cast<float>(number)); };
    const auto stored_by_columns = [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const scalar_t* numbers = from + column(k);
        to[k] = 0.0f;
        for (int64_t b = 0; b < batch;) {
          const int64_t stop = std::min(batch, b + BLOCK * LANES);
          std::array<float, LANES> sums{};
          for (; b + LANES <= stop; b += LANES) {
            for (int64_t l = 0; l < LANES; ++l) {
              sums[l] += size(numbers[b + l]);
            }
          }
          for (int64_t l = 0; b < stop; ++b, ++l) {
            sums[l] += size(numbers[b]);
          }
          to[k] += std::accumulate(sums.begin(), sums.end(), 0.0f);
        }
      }
    };
    // In tiles whose sums stay in the cache.
    const auto stored_by_rows = [&](int64_t begin, int64_t end) {
      std::fill(to + begin, to + end, 0.0f);
      for (int64_t first = begin; first < end; first += TILE) {
        const int64_t tile = std::min(TILE, end - first);
        for (int64_t block = 0; block < batch; block += BLOCK) {
          std::array<float, TILE> sums{};
          for (int64_t b = block; b < std::min(batch, block + BLOCK); ++b) {
            const scalar_t* numbers = from + b * down;
            if (at == nullptr && across == 1) {
              for (int64_t k = 0; k < tile; ++k) {
                sums[k] += size(numbers[first + k]);
              }
            } else {
              for (int64_t k = 0; k < tile; ++k) {
                sums[k] += size(numbers[column(first + k)]);
              }
            }
          }
          for (int64_t k = 0; k < tile; ++k) {
            to[first + k] += sums[k];
          }
        }
      }
    };
    if (down == 1 && across != 1) {
      at::parallel_for(0, count, grain(batch), stored_by_columns);
    } else {
      at::parallel_for(0, count, grain(batch), stored_by_rows);
    }
  });
  return out;
}

void observe_(Tensor& seen, const Tensor& g, const optional<Tensor>& given_rows) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const optional<Tensor> rows = given_rows ? optional<Tensor>(given_rows->contiguous()) : given_rows;
  const Tensor sizes = magnitudes(g, rows);
  const float* from = sizes.const_data_ptr<float>();
  const int64_t* at = rows ? rows->const_data_ptr<int64_t>() : nullptr;
  auto to = seen.accessor<float, 1>();
  for (int64_t k = 0; k < sizes.numel(); ++k) {
    to[at ? at[k] : k] = from[k];
  }
  torch::autograd::impl::bump_version(seen);
}

Tensor top_rows(const Tensor& g, int64_t count) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const int64_t num_rows = g.size(-1);
  TORCH_CHECK_VALUE(
      0 <= count && count <= num_rows, "top_rows takes from 0 to all ", num_rows, " rows, got count=", count, ".");
  const Tensor sizes = magnitudes(g, {});
  const float* from = sizes.const_data_ptr<float>();
  // The smaller, the earlier a row is taken: the bits of a number that is not negative are in its order, and the row's
  // own number tells equal rows apart.
  std::vector<uint64_t> turns(num_rows);
  for (int64_t row = 0; row < num_rows; ++row) {
    const float size = std::isfinite(from[row]) ? from[row] : std::numeric_limits<float>::infinity();
    turns[row] = static_cast<uint64_t>(~std::bit_cast<uint32_t>(size)) << 32 | static_cast<uint64_t>(row);
  }
  Tensor rows = at::empty({count}, g.options().dtype(at::kLong));
  if (count > 0) {
    std::vector<uint64_t> ordered = turns;
    std::nth_element(ordered.begin(), ordered.begin() + (count - 1), ordered.end());
    const uint64_t last = ordered[count - 1];
    int64_t* to = rows.mutable_data_ptr<int64_t>();
    for (int64_t row = 0; row < num_rows; ++row) {
      if (turns[row] <= last) {
        *to++ = row;
      }
    }
  }
  return rows;
}

void record_(Tensor& chosen, const Tensor& given_rows) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Tensor rows = given_rows.contiguous();
  const int64_t count = rows.numel();
  const int64_t* from = rows.const_data_ptr<int64_t>();
  auto to = chosen.accessor<int64_t, 1>();
  to[0] = count;
  for (int64_t k = 0; k < chosen.numel() - 1; ++k) {
    to[k + 1] = k < count ? from[k] : 0;
  }
  torch::autograd::impl::bump_version(chosen);
}

// What may be computed of the input first: its forward, and its backward, in place of the output's gradient, from either
// the input or the output.
struct Activation {
  std::string_view name;
  bool of_input;
  Tensor (*forward)(const Tensor& x);
  void (*backward_)(Tensor& g, const Tensor& of);
};

const Activation ACTIVATIONS[] = {
    {"relu", false, [](const Tensor& x) { return at::relu(x); },
     [](Tensor& g, const Tensor& a) { at::threshold_backward_out(g, g, a, 0); }},
    {"gelu", true, [](const Tensor& x) { return at::gelu(x); },
     [](Tensor& g, const Tensor& x) { at::gelu_backward_out(g, g, x); }},
    {"silu", true, [](const Tensor& x) { return at::silu(x); },
     [](Tensor& g, const Tensor& x) { at::silu_backward_out(g, g, x); }},
    {"tanh", false, [](const Tensor& x) { return at::tanh(x); },
     [](Tensor& g, const Tensor& a) { at::tanh_backward_out(g, g, a); }},
    {"sigmoid", false, [](const Tensor& x) { return at::sigmoid(x); },
     [](Tensor& g, const Tensor& a) { at::sigmoid_backward_out(g, g, a); }},
};

const Activation* activation_of(std::string_view name) {
  for (const Activation& activation : ACTIVATIONS) {
    if (activation.name == name) {
      return &activation;
    }
  }
  TORCH_CHECK_VALUE(name.empty(), "activation must be relu, gelu, silu, tanh, sigmoid or empty, got ", name, ".");
  return nullptr;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Gradients backward(
    const Tensor& g,
    const optional<Tensor>& a,
    const optional<Tensor>& activated,
    const optional<Tensor>& weight,
    const Tensor& given_rows,
    const optional<Tensor>& given_columns,
    const optional<Tensor>& scale,
    bool needs_bias,
    at::ScalarType x_dtype,
    at::ScalarType dtype,
    bool full_dx,
    std::string_view grad,
    std::string_view activation,
    bool direct,
    const optional<Tensor>& examples,
    int64_t num_examples,
    std::string_view packed,
    const optional<Tensor>& g_kept,
    bool by_columns) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Tensor rows = given_rows.contiguous();
  const int64_t num_rows = g.size(-1), count = rows.numel();
  const bool all_rows = count == num_rows;
  const Tensor g_BO = g_kept ? *g_kept : g.reshape({-1, num_rows});
  const int64_t batch = c10::multiply_integers(g.sizes().slice(0, g.dim() - 1));
  const optional<Tensor> places = examples ? optional<Tensor>(places_of(*examples, num_examples, batch)) : std::nullopt;
  const auto taking_part = [&](const Tensor& x) {
    const Tensor x_BI = x.reshape({-1, x.size(-1)});
    return places ? gather_rows(x_BI, *places, {}) : x_BI;
  };
  const auto of_all_rows = [&] {
    if (!places || g_kept) {
      return g_BO;
    }
    return packed == "rows" ? g_BO.narrow(0, 0, places->numel()) : gather_rows(g_BO, *places, {});
  };
  Tensor g_BK;
  if (places && packed == "columns") {
    g_BK = g_BO.as_strided({places->numel(), count}, {1, places->numel()});
  } else if (places && !g_kept && packed.empty() && !all_rows) {
    g_BK = gather_rows(g_BO, *places, rows);
  } else {
    g_BK = all_rows ? of_all_rows() : gather_columns(of_all_rows(), rows);
  }
  if (scale) {
    g_BK = at::mul(g_BK, scale->to(g.scalar_type()));
  }
  const auto of_parameter = [&](Tensor values) {
    values = values.to(dtype);
    if (grad == "kept" || (grad == "dense" && all_rows)) {
      return values;
    }
    return grad == "rows" ? pack(values, rows, num_rows) : scatter_rows(values, rows, num_rows);
  };
  Tensor dx, dw, db, a_E;
  if (a) {
    a_E = taking_part(*a);
    const Tensor a_g = a_E.to(g.scalar_type());
    if (by_columns && grad == "dense") {
      const Tensor dw_IK = at::mm(a_g.t(), g_BK).to(dtype);
      dw = (all_rows ? dw_IK : scatter_columns(dw_IK, rows, num_rows, {}, dw_IK.size(0))).t();
    } else {
      dw = of_parameter(at::mm(g_BK.t(), a_g));
    }
  }
  if (needs_bias) {
    db = of_parameter(g_BK.sum(0));
  }
  if (weight) {
    const int64_t width = weight->size(1);
    const Activation* of = activation_of(activation);
    const bool to_front = places && direct;
    // da (E, C), stored by columns where `across` says so; at the front of dx where the next call reads it there.
    const auto product = [&](const Tensor& g_EK, const Tensor& w_KC, bool across) {
      const int64_t num_places = g_EK.size(0), taken = w_KC.size(1);
      const std::array<int64_t, 2> sizes = {num_places, taken};
      const std::array<int64_t, 2> strides = {across ? 1 : taken, across ? num_places : 1};
      const bool cast = g.scalar_type() != x_dtype;
      Tensor front;
      if (to_front) {
        dx = unwritten(batch, width, g.options().dtype(x_dtype));
        front = dx.as_strided(sizes, strides);
      }
      Tensor da = to_front && !cast ? front : at::empty_strided(sizes, strides, g.options());
      at::mm_out(da, g_EK, w_KC);
      return !cast ? da : to_front ? front.copy_(da) : da.to(x_dtype);
    };
    const auto through = [&](Tensor da, const auto& columns_of) {
      if (of) {
        of->backward_(da, columns_of(*activated));
      }
      return da;
    };
    const auto finish = [&](const Tensor& da, const optional<Tensor>& columns) {
      if (to_front) {
        return dx;
      }
      return columns || places ? scatter_columns(da, columns, width, places, batch) : da;
    };
    if (given_columns && !full_dx && (direct || given_columns->numel() < MOST_COLUMNS * width)) {
      const Tensor columns = given_columns->contiguous();
      const bool all_columns = columns.numel() == width;
      const Tensor w_KC = all_columns && all_rows
          ? *weight
          : gather_weight(*weight, rows, all_columns ? optional<Tensor>() : optional<Tensor>(columns));
      const Tensor w = w_KC.to(g.scalar_type());
      const auto gather = [&](const Tensor& x) {
        return gather_columns(x.reshape({-1, width}), columns, direct, places);
      };
      const Tensor da = through(product(g_BK, w, direct), gather);
      dx = direct && !places ? scatter_by_columns(da, columns, width) : finish(da, columns);
    } else {
      const Tensor w = full_dx || all_rows ? *weight : gather_weight(*weight, rows);
      const Tensor g_x = full_dx ? of_all_rows() : g_BK;
      // What was gathered of the activation's output serves both products.
      const auto gather = [&](const Tensor& x) { return a && x.is_alias_of(*a) ? a_E : taking_part(x); };
      dx = finish(through(product(g_x, w.to(g.scalar_type()), false), gather), {});
    }
    auto shape = g.sizes().vec();
    shape.back() = width;
    dx = dx.view(shape);
  }
  return {dx, dw, db};
}

// Sizes are compared as symbols: this runs too where a compiler traces it.
void check(
    const Tensor& weight,
    const Tensor& rows,
    const optional<Tensor>& scale,
    const optional<Tensor>& seen,
    const optional<Tensor>& chosen,
    bool kept) {
  TORCH_CHECK_VALUE(
      rows.scalar_type() == at::kLong && rows.dim() == 1,
      "rows must be a one-dimensional int64 tensor of row numbers, got ", rows.scalar_type(), " of shape ",
      rows.sym_sizes(), ".");
  TORCH_CHECK_VALUE(
      !chosen || (!scale && !kept), scale ? "scale" : "kept_weight and kept_bias",
      " cannot be given with chosen: they belong to rows that are known in the forward pass, and these are chosen in "
      "the backward pass.");
  if (scale) {
    TORCH_CHECK_VALUE(
        at::isFloatingType(scale->scalar_type()) && scale->dim() == 1,
        "scale must be a one-dimensional floating-point tensor, got ", scale->scalar_type(), " of shape ",
        scale->sym_sizes(), ".");
    TORCH_CHECK_VALUE(
        scale->sym_size(0).sym_eq(rows.sym_size(0)).expect_true(__FILE__, __LINE__),
        "scale must have a number for each of the ", rows.sym_size(0), " rows, got ", scale->sym_size(0), ".");
  }
  const auto check_buffer = [&](const char* name, const optional<Tensor>& buffer, at::ScalarType type, int more) {
    if (buffer) {
      const c10::SymInt length = weight.sym_size(0) + more;
      TORCH_CHECK_VALUE(
          buffer->scalar_type() == type && buffer->dim() == 1 && buffer->sym_size(0) == length,
          name, " must be a ", type, " tensor of shape (", length, ",), got ", buffer->scalar_type(), " of shape ",
          buffer->sym_sizes(), ".");
    }
  };
  check_buffer("seen", seen, at::kFloat, 0);
  check_buffer("chosen", chosen, at::kLong, 1);
}

void check_examples(const Tensor& x, const Tensor& examples, const c10::SymInt& num_examples) {
  TORCH_CHECK_VALUE(
      examples.scalar_type() == at::kLong && examples.dim() == 1,
      "examples must be a one-dimensional int64 tensor, got ", examples.scalar_type(), " of shape ",
      examples.sym_sizes(), ".");
  c10::SymInt places = 1;
  for (int64_t d = 0; d < x.dim() - 1; ++d) {
    places *= x.sym_size(d);
  }
  TORCH_CHECK_VALUE(
      num_examples > 0 && places % num_examples == 0, "the ", places,
      " places of x (its leading dimensions) cannot be dealt to ", num_examples, " examples.");
}

// The row set of a backward pass, once what is asked for of the output's gradient is written down; and that gradient, of
// the examples that take part, where it had to be looked at.
std::pair<Tensor, optional<Tensor>> begin(AutogradContext* ctx, const Tensor& g, const Tensor& given_rows) {
  const auto& kept = ctx->saved_data;
  const auto buffer = [&](const char* name) {
    const auto found = kept.find(name);
    return found == kept.end() ? optional<Tensor>() : optional<Tensor>(found->second.toTensor());
  };
  const optional<Tensor> chosen = buffer("chosen"), examples = buffer("examples");
  optional<Tensor> seen = buffer("seen");
  if (!seen && !chosen) {
    return {given_rows, {}};
  }
  // Operators, as a compiler traces this.
  optional<Tensor> g_kept;
  if (examples) {
    const Tensor g_BO = g.reshape_symint({-1, g.sym_size(-1)});
    const c10::SymInt each = g_BO.sym_size(0) / kept.at("num_examples").toSymInt();
    if (kept.at("packed").toStringRef() == "rows") {
      g_kept = g_BO.slice_symint(0, 0, examples->sym_size(0) * each);
    } else if (each == 1) {
      g_kept = g_BO.index_select(0, *examples);
    } else {
      const c10::SymIntArrayRef sizes = {kept.at("num_examples").toSymInt(), each, g_BO.sym_size(1)};
      g_kept = g_BO.reshape_symint(sizes).index_select(0, *examples).reshape_symint({-1, g_BO.sym_size(1)});
    }
  }
  const Tensor& looked_at = g_kept ? *g_kept : g;
  static const auto observe = find_op<void(Tensor&, const Tensor&, const optional<Tensor>&)>("rwfx::observe_");
  static const auto top = find_op<Tensor(const Tensor&, c10::SymInt)>("rwfx::top_rows");
  static const auto record = find_op<void(Tensor&, const Tensor&)>("rwfx::record_");
  const bool all_seen = seen && kept.at("seen_all").toBool();
  Tensor rows = given_rows;
  if (all_seen) {
    observe.call(*seen, looked_at, {});
  }
  if (chosen) {
    rows = top.call(all_seen ? *seen : looked_at, given_rows.sym_size(0));
    Tensor written = *chosen;
    record.call(written, rows);
  }
  if (seen && !all_seen) {
    observe.call(*seen, looked_at, rows);
  }
  return {rows, g_kept};
}

// That of `backward`, whose number of examples a compiler may not know.
using BackwardOp = Gradients(
    const Tensor&,
    const optional<Tensor>&,
    const optional<Tensor>&,
    const optional<Tensor>&,
    const Tensor&,
    const optional<Tensor>&,
    const optional<Tensor>&,
    bool,
    at::ScalarType,
    at::ScalarType,
    bool,
    std::string_view,
    std::string_view,
    bool,
    const optional<Tensor>&,
    c10::SymInt,
    std::string_view,
    const optional<Tensor>&,
    bool);

// at::linear as it computes above autograd: there a product with a weight that is learned is always one of matrices, and
// below, where this runs, that of an input that is not contiguous would be a batch of them, which rounds differently.
Tensor linear(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, bool learned) {
  if (!learned || x.dim() < 3 || x.is_contiguous()) {
    return at::linear(x, weight, bias);
  }
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end() - 1);
  sizes.push_back(weight.sym_size(0));
  const Tensor y = at::mm(x.reshape_symint({-1, x.sym_size(-1)}), weight.t()).view_symint(sizes);
  return bias && bias->defined() ? y.add_(*bias) : y;
}

class RowLinear : public torch::autograd::Function<RowLinear> {
 public:
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& x,
      const Tensor& weight,
      const optional<Tensor>& bias,
      const optional<Tensor>& kept_weight,
      const optional<Tensor>& kept_bias,
      const Tensor& rows,
      const optional<Tensor>& columns,
      std::string_view dx,
      std::string_view grad,
      optional<at::ScalarType> dtype,
      std::string_view activation,
      bool direct,
      const optional<Tensor>& scale,
      const optional<Tensor>& seen,
      bool seen_all,
      const optional<Tensor>& chosen,
      const optional<Tensor>& examples,
      const c10::SymInt& num_examples,
      std::string_view packed) {
    check(weight, rows, scale, seen, chosen, kept_weight || kept_bias);
    if (examples) {
      check_examples(x, *examples, num_examples);
      ctx->saved_data["examples"] = *examples;
    }
    ctx->saved_data["num_examples"] = num_examples;
    ctx->saved_data["packed"] = std::string(packed);
    const Activation* of = activation_of(activation);
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor a = of ? of->forward(x) : x;
    const bool trained = (kept_weight ? *kept_weight : weight).requires_grad(), needs_x = x.requires_grad();
    // Only what the backward pass reads.
    ctx->save_for_backward({
        trained ? a : Tensor(),
        needs_x && of ? (of->of_input ? x : a) : Tensor(),
        needs_x ? weight : Tensor(),
    });
    // Not saved: a choice of examples may choose rows too, and writes them in the backward pass.
    ctx->saved_data["rows"] = rows;
    if (scale) {
      ctx->saved_data["scale"] = *scale;
    }
    if (columns) {
      ctx->saved_data["columns"] = *columns;
    }
    // Not saved: autograd would refuse a buffer that another call's backward pass has written since.
    if (seen) {
      ctx->saved_data["seen"] = *seen;
      ctx->saved_data["seen_all"] = seen_all;
    }
    if (chosen) {
      ctx->saved_data["chosen"] = *chosen;
    }
    ctx->saved_data["edges"] = std::vector<bool>{
        bias.has_value() && bias->defined(), kept_weight.has_value(), kept_bias.has_value()};
    ctx->saved_data["full_dx"] = dx == "full";
    ctx->saved_data["direct"] = direct;
    ctx->saved_data["by_columns"] = is_by_columns(weight);
    ctx->saved_data["grad"] = std::string(kept_weight ? "kept" : grad);
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["dtypes"] = std::vector<int64_t>{
        static_cast<int64_t>(x.scalar_type()), static_cast<int64_t>(weight.scalar_type())};
    const bool learned = weight.requires_grad();
    if (!dtype) {
      return linear(a, weight, bias, learned);
    }
    return linear(a.to(*dtype), weight.to(*dtype), bias ? optional<Tensor>(bias->to(*dtype)) : bias, learned);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "rwfx::row_linear has no second derivative: leave create_graph=True out.");
    const auto saved = ctx->get_saved_variables();
    const auto has = ctx->saved_data["edges"].toBoolList();
    const std::string grad = ctx->saved_data["grad"].toStringRef();
    const auto dtypes = ctx->saved_data["dtypes"].toIntVector();
    // An edge for every tensor of the arguments that is there, in their order.
    size_t edge = 0;
    const bool needs_x = ctx->needs_input_grad(edge++);
    const bool of_weight = ctx->needs_input_grad(edge++);
    const bool of_bias = has[0] && ctx->needs_input_grad(edge++);
    const bool of_kept_weight = has[1] && ctx->needs_input_grad(edge++);
    const bool of_kept_bias = has[2] && ctx->needs_input_grad(edge++);
    const bool kept = grad == "kept";
    const auto given = [&](size_t k, bool wanted) {
      return wanted && saved[k].defined() ? optional<Tensor>(saved[k]) : optional<Tensor>();
    };
    static const auto op = find_op<BackwardOp>("rwfx::row_linear_backward");
    const auto [rows, g_kept] = begin(ctx, gradients[0], ctx->saved_data["rows"].toTensor());
    const auto held = [&](const char* name) {
      const auto found = ctx->saved_data.find(name);
      return found == ctx->saved_data.end() ? optional<Tensor>() : optional<Tensor>(found->second.toTensor());
    };
    const auto [dx, dw, db] = op.call(
        gradients[0],
        given(0, kept ? of_kept_weight : of_weight),
        given(1, needs_x),
        given(2, needs_x),
        rows,
        held("columns"),
        held("scale"),
        kept ? of_kept_bias : of_bias,
        static_cast<at::ScalarType>(dtypes[0]),
        static_cast<at::ScalarType>(dtypes[1]),
        ctx->saved_data["full_dx"].toBool(),
        grad,
        ctx->saved_data["activation"].toStringRef(),
        ctx->saved_data["direct"].toBool(),
        held("examples"),
        ctx->saved_data["num_examples"].toSymInt(),
        ctx->saved_data["packed"].toStringRef(),
        g_kept,
        ctx->saved_data["by_columns"].toBool());
    variable_list all(19);
    all[0] = dx;
    all[kept ? 3 : 1] = dw;
    all[kept ? 4 : 2] = db;
    return all;
  }
};

Tensor row_linear(
    const Tensor& x,
    const Tensor& weight,
    const optional<Tensor>& bias,
    const Tensor& rows,
    std::string_view dx,
    std::string_view grad,
    optional<at::ScalarType> dtype,
    const optional<Tensor>& kept_weight,
    const optional<Tensor>& kept_bias,
    const optional<Tensor>& columns,
    std::string_view activation,
    bool direct,
    const optional<Tensor>& scale,
    const optional<Tensor>& seen,
    bool seen_all,
    const optional<Tensor>& chosen,
    const optional<Tensor>& examples,
    c10::SymInt num_examples,
    std::string_view packed) {
  return RowLinear::apply(
      x, weight, bias, kept_weight, kept_bias, rows, columns, dx, grad, dtype, activation, direct, scale, seen,
      seen_all, chosen, examples, num_examples, packed);
}

}  // namespace

TORCH_LIBRARY_IMPL(rwfx, CPU, m) {
  m.impl("row_linear_backward", backward);
  m.impl("observe_", observe_);
  m.impl("top_rows", top_rows);
  m.impl("record_", record_);
}

TORCH_LIBRARY_IMPL(rwfx, AutogradCPU, m) {
  m.impl("row_linear", row_linear);
  for (const char* op : {"row_linear_backward", "observe_", "top_rows", "record_"}) {
    m.impl(op, torch::CppFunction::makeFallthrough());
  }
}

}  // namespace rwfx
